"""Exact search for the rows with the largest products, by blocks.

On a CPU every core works on its own rows with one BLAS thread. Nothing here is larger than Q x K or a copy
of the features, except blocks of similarities within a stated number of bytes.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from lib.runtime.distributed import progress_bar

# Bound of the similarities that all threads hold together. A GPU's selection of the largest is busy with some
# thousand rows only.
BLOCK_BYTES = {"cpu": 2**28, "cuda": 2**30}
TILE = 65_536  # columns multiplied at a time, at most
ROWS = 128  # rows multiplied at a time on a CPU, at most: similarities that stay in the cache
GROUP = 32  # columns whose maximum stands for them in the first round of the top-K
MORE_CANDIDATES = 8  # additional candidates of bfloat16, at least
FIRST = 2.0  # above every cosine: puts an image before its duplicates


def top_k(similarities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k largest entries of each row, falling, and their columns.

    They lie in the k groups of columns with the largest maxima, so that less is sorted. A group is every
    N / GROUP-th column: maxima of whole vectors.
    """
    n = similarities.shape[1]
    groups = n // GROUP
    if k * GROUP * 2 >= n:
        return similarities.topk(k, dim=1)
    maxima = similarities[:, : groups * GROUP].unflatten(1, (GROUP, groups)).amax(dim=1)
    members = maxima.topk(k, dim=1, sorted=False).indices
    steps = groups * torch.arange(GROUP, device=members.device)
    columns = (members[:, None, :] + steps[:, None]).flatten(1)
    rest = torch.arange(groups * GROUP, n, device=members.device)  # columns outside of any group
    columns = torch.cat([columns, rest.expand(len(columns), -1)], dim=1)
    values, places = similarities.gather(1, columns).topk(k, dim=1)
    return values, columns.gather(1, places)


def in_parallel(work: Callable[[Iterator], None], items: Iterable, device: torch.device) -> None:
    """Let every core take `items` off one iterator; a single thread keeps a GPU busy."""
    threads = torch.get_num_threads()
    shared = iter(list(items))  # next() of a list's iterator is atomic
    if device.type != "cpu" or threads == 1:
        return work(shared)
    # One BLAS thread inside each product, as the rows are divided among threads already.
    with threadpool_limits(1, user_api="blas"):
        try:
            with ThreadPoolExecutor(threads, None, torch.set_num_threads, (1,)) as pool:
                for future in [pool.submit(work, shared) for _ in range(threads)]:
                    future.result()
        finally:
            torch.set_num_threads(threads)  # MKL has one number for all threads
    return None


def product(left: Tensor, right: Tensor, buffer: Tensor | None = None) -> Tensor:
    """Multiply left @ right.T, into `buffer` where there is one; float32, or that of the factors on a GPU."""
    if left.device.type != "cpu" or left.dtype != torch.float32:
        return left @ right.T if left.device.type == "cuda" else (left @ right.T).float()
    if buffer is None:
        out = torch.empty(len(left), len(right))
    else:
        out = buffer[: len(left) * len(right)].view(len(left), len(right))
    np.matmul(left.numpy(), right.numpy().T, out=out.numpy())  # faster than MKL on some CPUs
    return out


def exact_search(
    queries: Tensor,
    columns: Tensor,
    k: int,
    *,
    own: Tensor | None = None,
    own_value: float | None = FIRST,
    precision: str = "fp32",
    block_bytes: int | None = None,
    progress: str = "",
) -> tuple[Tensor, Tensor]:
    """Find the k largest products of each query with the rows of `columns`.

    Args:
        queries, columns: Q x D and N x D.
        own: column of each query whose product is replaced by `own_value`; None replaces none.
        precision: "bf16" multiplies in bfloat16 and ranks half as many candidates more in float32.
        block_bytes: bound of the similarities that all threads hold together; None: `BLOCK_BYTES`.
        progress: title of the progress bar; no bar if empty.

    Returns:
        Products, falling, and rows of `columns`, int32: Q x k each, on the device of `columns`.
    """
    own = None if own_value is None else own
    half, device = precision == "bf16", columns.device
    block_bytes = block_bytes or BLOCK_BYTES[device.type]
    wanted = min(len(columns), k + max(MORE_CANDIDATES, k // 2)) if half else k
    factors = columns.bfloat16() if half else columns
    # The tile is wide enough for the group maxima to pay, unless nearly everything is wanted.
    tile = min(len(columns), max(TILE, 4 * GROUP * wanted))
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    # The width of one query: its products, or the candidates that are ranked again.
    width = max(tile, wanted * columns.shape[1]) if half else tile
    at_once = max(1, min(block_bytes // (4 * width * threads), len(queries)))
    at_once = min(at_once, ROWS) if device.type == "cpu" else at_once
    values = torch.empty(len(queries), k, device=device)
    places = torch.empty(len(queries), k, dtype=torch.int32, device=device)
    bar = progress_bar(shown=bool(progress), total=len(queries), desc=progress, unit="img")

    def best_of_tiles(
        block: Tensor, mine: Tensor | None, buffer: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        top = None
        bounds = (0, -1) if mine is None else (int(mine.min()), int(mine.max()))
        for first in range(0, len(factors), tile):
            part = product(block, factors[first : first + tile], buffer)
            if first <= bounds[1] and bounds[0] < first + tile:  # elsewhere nobody waits for a GPU
                inside = ((mine >= first) & (mine < first + tile)).nonzero()[:, 0]
                part[inside, mine[inside] - first] = own_value
            found, where = top_k(part, min(wanted, part.shape[1]))
            where = where + first
            if top is not None:
                found, where = torch.cat([top[0], found], 1), torch.cat([top[1], where], 1)
                found, order = found.topk(wanted, dim=1)
                where = where.gather(1, order)
            top = found, where
        return top

    def work(starts: Iterator[int]) -> None:
        buffer = torch.empty(at_once * tile) if device.type == "cpu" and not half else None
        for start in starts:
            rows = slice(start, start + at_once)
            block, mine = queries[rows], None if own is None else own[rows].to(device)
            found, where = best_of_tiles(block.to(factors.dtype), mine, buffer)
            if half:  # the candidates are ranked again by their float32 products
                found = (columns[where] @ block[:, :, None])[:, :, 0]
                if mine is not None:
                    found = found.masked_fill(where == mine[:, None], own_value)
                found, order = found.topk(k, dim=1)
                where = where.gather(1, order)
            values[rows], places[rows] = found, where
            bar.update(len(block))

    with bar:
        in_parallel(work, range(0, len(queries), at_once), device)
    return values, places
