"""Nearest neighbours of every image by cosine: exact by blocks, approximate by cells, or by FAISS.

Exact search costs 2 N^2 D operations and is bound by the rate at which the machine multiplies matrices.
On a CPU every core works on rows of its own with one BLAS thread. Nothing here is larger than N x K or
a copy of the features, but for blocks of similarities within a stated number of bytes.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from lib.seeding import generator

try:  # holds numpy's BLAS to one thread per core; without it torch's own BLAS is used
    from threadpoolctl import threadpool_limits
except ImportError:
    threadpool_limits = None

BLOCK_BYTES = 256 * 2**20  # of similarities held at a time, by all threads together
TILE = 65_536  # columns multiplied at a time, at most
ROWS = 128  # multiplied at a time on a CPU, at most: their similarities should stay in the cache
GROUP = 32  # columns whose maximum stands for them in the first round of the top-K
METHODS = ("auto", "exact", "ivf", "faiss")
PRECISIONS = ("fp32", "bf16")
EXACT_BELOW = {"cpu": 250_000, "cuda": 4_000_000}  # rows; beyond, exact search takes minutes
RECALL = 0.97  # aimed at by the approximate search
SAMPLED_ROWS = 512  # whose exact neighbours the recall is measured against
CELLS_PER_ROOT = 4  # cells per square root of N
VOTES = 8  # nearest centroids that a query asks to be searched
LEAST_PROBES = 8
FAISS_PROBES = 32
MORE_CANDIDATES = 8  # of bfloat16, at least
SAMPLED_CELLS = 16  # on which the number of probed cells is chosen
ROWS_PER_CELL = 32  # of the k-means sample
KMEANS_ROUNDS = 6
FIRST = 2.0  # above every cosine: an image put before its duplicates
TIE = 1e-6  # cosines that differ by less are equal in float32


@dataclass(frozen=True)
class Neighbors:
    """Nearest neighbours by cosine, falling.

    Attributes:
        indexes: R x K, int32, one row for each row asked for.
        similarities: R x K, float32.
        scale_similarities: R, cosine of the neighbour that sets the local scale; empty if none does.
        recall: share of the exact neighbours that were found, measured on a random sample of rows
            (1 where the search is exact by construction).
    """

    indexes: Tensor
    similarities: Tensor
    scale_similarities: Tensor
    recall: float = 1.0


def _top_k(similarities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, falling, and their columns.

    They lie in the k groups of columns with the largest maxima: taking those maxima reads every
    column once, and the selection proper sees N / GROUP of them, then k GROUP candidates. A group is
    every N / GROUP-th column, so that its maximum is taken of whole vectors at once.
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


@contextlib.contextmanager
def _single_threaded_blas() -> Iterator[None]:
    """One thread inside each product, as the rows are divided among threads already."""
    threads = torch.get_num_threads()
    limits = (
        threadpool_limits(1, user_api="blas") if threadpool_limits else contextlib.nullcontext()
    )
    with limits:
        try:
            yield
        finally:
            torch.set_num_threads(threads)  # MKL's number is not one of each thread


def _in_parallel(work: Callable[[Iterator], None], items: Iterable, device: torch.device) -> None:
    """Let every core take `items` off one iterator; a GPU is kept busy by a single thread."""
    threads = torch.get_num_threads()
    shared = iter(list(items))  # next() of a list's iterator is atomic
    if device.type != "cpu" or threads == 1:
        return work(shared)
    with _single_threaded_blas(), ThreadPoolExecutor(threads, initializer=_one_thread) as pool:
        for future in [pool.submit(work, shared) for _ in range(threads)]:
            future.result()
    return None


def _one_thread() -> None:
    torch.set_num_threads(1)


def _product(left: Tensor, right: Tensor, buffer: Tensor | None) -> Tensor:
    """left @ right.T, float32; written to `buffer` where there is one."""
    if buffer is None:
        return (left @ right.T).float()
    out = buffer[: len(left) * len(right)].view(len(left), len(right))
    if threadpool_limits or torch.get_num_threads() == 1:
        np.matmul(left.numpy(), right.numpy().T, out=out.numpy())
    else:
        torch.mm(left, right.T, out=out)
    return out


def _rerank(
    queries: Tensor, columns: Tensor, places: Tensor, own: Tensor | None, own_value: float, k: int
) -> tuple[Tensor, Tensor]:
    """The k best of the candidates `places` by their float32 products."""
    values = (columns[places] @ queries[:, :, None])[:, :, 0]
    if own is not None:
        values = values.masked_fill(places == own[:, None], own_value)
    values, order = values.topk(k, dim=1)
    return values, places.gather(1, order)


def _best_of_tiles(
    queries: Tensor,
    columns: Tensor,
    k: int,
    tile: int,
    own: Tensor | None,
    own_value: float,
    buffer: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The k largest products of a block of queries, `tile` columns at a time."""
    top = None
    for first in range(0, len(columns), tile):
        part = _product(queries, columns[first : first + tile], buffer)
        if own is not None:
            inside = ((own >= first) & (own < first + tile)).nonzero()[:, 0]
            part[inside, own[inside] - first] = own_value
        found, where = _top_k(part, min(k, part.shape[1]))
        where = where + first
        if top is not None:
            found, where = torch.cat([top[0], found], 1), torch.cat([top[1], where], 1)
            found, order = found.topk(k, dim=1)
            where = where.gather(1, order)
        top = found, where
    return top


def _search(
    queries: Tensor,
    columns: Tensor,
    k: int,
    *,
    own: Tensor | None = None,
    own_value: float = FIRST,
    precision: str = "fp32",
    block_bytes: int = BLOCK_BYTES,
    progress: str = "",
) -> tuple[Tensor, Tensor]:
    """The k largest products of each query with the rows of `columns`: values and places, on the CPU.

    Args:
        own: column of each query whose product is replaced by `own_value`.
        precision: "bf16" multiplies in bfloat16 and ranks half as many candidates again in float32.
        progress: what the bar says; no bar if empty.
    """
    half, device = precision == "bf16", columns.device
    wanted = min(len(columns), k + max(MORE_CANDIDATES, k // 2)) if half else k
    factors = columns.bfloat16() if half else columns
    # wide enough for the group maxima to pay, unless nearly everything is wanted
    tile = min(len(columns), max(TILE, 4 * GROUP * wanted))
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    at_once = max(1, min(block_bytes // (4 * tile * threads), len(queries)))
    at_once = min(at_once, ROWS) if device.type == "cpu" else at_once
    values = torch.empty(len(queries), k)
    places = torch.empty(len(queries), k, dtype=torch.int32)
    bar = _bar(len(queries), progress)

    def work(starts: Iterator[int]) -> None:
        buffer = torch.empty(at_once * tile) if device.type == "cpu" and not half else None
        for start in starts:
            rows = slice(start, start + at_once)
            block, mine = queries[rows], None if own is None else own[rows].to(device)
            left = block.to(factors.dtype)
            top = _best_of_tiles(left, factors, wanted, tile, mine, own_value, buffer)
            if half:
                top = _rerank(block, columns, top[1], mine, own_value, k)
            values[rows], places[rows] = top[0].cpu(), top[1].cpu()
            bar.update(len(block))

    with bar:
        _in_parallel(work, range(0, len(queries), at_once), device)
    return values, places


def _bar(total: int, text: str) -> tqdm:
    return tqdm(total=total, desc=text, unit="img", leave=False, disable=None if text else True)


def _recall(found: Tensor, exact: Tensor) -> float:
    """Share of the exact neighbours found, by their cosines: equally near ones replace each other."""
    return float((found >= exact[:, -1:] - TIE).float().mean())


@dataclass(frozen=True)
class _Cells:
    """The features sorted by their nearest centroid.

    Attributes:
        sorted: N x D features, cell after cell.
        order: N, the row of the features that each of them is.
        starts: C + 1, where each cell starts.
        centroids: C x D.
    """

    sorted: Tensor
    order: Tensor
    starts: list[int]
    centroids: Tensor

    def members(self, cell: int) -> slice:
        return slice(self.starts[cell], self.starts[cell + 1])


def _k_means(features: Tensor, num_cells: int, seed: int) -> Tensor:
    """Unit centroids of a random sample of the features (spherical k-means), num_cells x D."""
    rng = generator(seed, "sample")
    rows = torch.randperm(len(features), generator=rng)[: ROWS_PER_CELL * num_cells]
    sample = features[rows.to(features.device)]
    centroids = sample[:num_cells].clone()
    for _ in tqdm(range(KMEANS_ROUNDS), desc="k-means", leave=False, disable=None):
        nearest = _search(sample, centroids, 1)[1][:, 0].long().to(features.device)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, sample)
        full = sums.norm(dim=1) > 0  # a cell that lost all its members stays where it was
        centroids[full] = normalize(sums[full])
    return centroids


def _make_cells(features: Tensor, seed: int) -> _Cells:
    num_cells = max(1, round(CELLS_PER_ROOT * len(features) ** 0.5))
    num_cells = min(num_cells, len(features))
    centroids = _k_means(features, num_cells, seed)
    nearest = _search(features, centroids, 1, progress="cells")[1][:, 0]
    order = torch.argsort(nearest, stable=True)
    sizes = torch.bincount(nearest, minlength=num_cells)
    starts = [0, *sizes.cumsum(0).tolist()]
    return _Cells(features[order.to(features.device)], order, starts, centroids)


def _probed(cells: _Cells, cell: int, queries: Tensor, probes: int, k: int) -> list[int]:
    """The cells that the members of one cell search together, their own first.

    Each query votes for its `VOTES` nearest centroids, by how much nearer they are than the next
    one. More than `probes` cells are taken where these hold fewer than k images.
    """
    similarities = queries @ cells.centroids.T
    least = similarities.topk(min(VOTES + 1, similarities.shape[1]), dim=1).values[:, -1:]
    # the second term ranks the cells that nobody votes for
    votes = (similarities - least).relu().mean(dim=0) + 1e-3 * similarities.mean(dim=0)
    votes[cell] = torch.inf
    ranked = votes.argsort(descending=True).tolist()
    chosen, held = [], 0
    for rank, other in enumerate(ranked):
        if rank >= probes and held >= k:
            break
        chosen.append(other)
        held += cells.starts[other + 1] - cells.starts[other]
    return chosen


def _search_cell(
    cells: _Cells, cell: int, members: Tensor, k: int, probes: int, own_value: float, budget: int
) -> tuple[Tensor, Tensor]:
    """The k nearest of some `members` (places within the cell) among the probed cells, exactly."""
    own = cells.sorted[cells.members(cell)]
    # a sample of a crowded cell speaks for it
    speakers = own[:: 1 + len(own) // (ROWS_PER_CELL * CELLS_PER_ROOT)]
    chosen = _probed(cells, cell, speakers, probes, k + 1)
    candidates = torch.cat([cells.sorted[cells.members(c)] for c in chosen])
    ids = torch.cat([cells.order[cells.members(c)] for c in chosen])
    at_once = max(1, budget // (4 * len(candidates)))
    values, indexes = [], []
    for part in members.split(at_once):
        part_on_device = part.to(own.device)
        block = own[part_on_device] @ candidates.T
        block.scatter_(1, part_on_device[:, None], own_value)  # the cell's own rows come first
        found, where = _top_k(block, k)
        values.append(found.cpu())
        indexes.append(ids[where.cpu()].int())
    return torch.cat(values), torch.cat(indexes)


def _search_cells(
    cells: _Cells,
    k: int,
    *,
    chosen: Iterable[int],
    rows: slice,
    probes: int,
    own_value: float,
    block_bytes: int,
    progress: str = "",
) -> tuple[Tensor, Tensor]:
    """Approximate neighbours of `rows`, of those in the `chosen` cells; the others stay at -inf."""
    count, device = rows.stop - rows.start, cells.sorted.device
    values = torch.full((count, k), -torch.inf)
    indexes = torch.zeros(count, k, dtype=torch.int32)
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    bar = _bar(count, progress)

    def work(numbers: Iterator[int]) -> None:
        for cell in numbers:
            ids = cells.order[cells.members(cell)]
            members = ((ids >= rows.start) & (ids < rows.stop)).nonzero()[:, 0]
            if not len(members):
                continue
            found = _search_cell(cells, cell, members, k, probes, own_value, block_bytes // threads)
            to = ids[members] - rows.start
            values[to], indexes[to] = found
            bar.update(len(members))

    with bar:
        _in_parallel(work, chosen, device)
    return values, indexes


def _choose_probes(
    cells: _Cells, features: Tensor, k: int, recall: float, own_value: float, seed: int
) -> int:
    """The smallest power of two of probed cells that reaches `recall` on a few random cells."""
    num_cells = len(cells.centroids)
    picked = torch.randperm(num_cells, generator=generator(seed, "sample", 1))[:SAMPLED_CELLS]
    picked = [int(c) for c in picked if cells.starts[c + 1] > cells.starts[c]]
    ids = torch.cat([cells.order[cells.members(c)][:SAMPLED_ROWS] for c in picked])
    device = features.device
    exact, _ = _search(features[ids.to(device)], features, k, own=ids, own_value=own_value)
    probes = LEAST_PROBES
    while probes < num_cells:
        found = [
            _search_cell(
                cells,
                c,
                torch.arange(min(SAMPLED_ROWS, cells.starts[c + 1] - cells.starts[c])),
                k,
                probes,
                own_value,
                BLOCK_BYTES,
            )[0]
            for c in picked
        ]
        if _recall(torch.cat(found), exact) >= recall:
            break
        probes *= 2
    return min(probes, num_cells)


def _by_cells(
    features: Tensor,
    k: int,
    rows: slice,
    *,
    own_value: float,
    recall: float,
    block_bytes: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    cells = _make_cells(features, seed)
    probes = _choose_probes(cells, features, k, recall, own_value, seed)
    if 2 * probes >= len(
        cells.centroids
    ):  # these features have no cells: copying them is for nothing
        return _search(
            features[rows],
            features,
            k,
            own=torch.arange(rows.start, rows.stop),
            own_value=own_value,
            block_bytes=block_bytes,
            progress="neighbours",
        )
    return _search_cells(
        cells,
        k,
        chosen=range(len(cells.centroids)),
        rows=rows,
        probes=probes,
        own_value=own_value,
        block_bytes=block_bytes,
        progress="neighbours",
    )


def _by_faiss(features: Tensor, k: int, rows: slice, *, own_value: float) -> tuple[Tensor, Tensor]:
    """An inverted file of FAISS where there are many rows, its flat index otherwise."""
    try:
        import faiss
    except ImportError:
        raise ValueError(
            "FAISS is not installed: install faiss-cpu, or take the method exact or ivf"
        ) from None
    points = np.ascontiguousarray(features.cpu().numpy())
    n, dim = points.shape
    if n < EXACT_BELOW["cpu"]:
        index = faiss.IndexFlatIP(dim)
    else:
        num_cells = round(CELLS_PER_ROOT * n**0.5)
        index = faiss.index_factory(dim, f"IVF{num_cells},Flat", faiss.METRIC_INNER_PRODUCT)
        index.nprobe = FAISS_PROBES
        index.train(points)
    index.add(points)
    values, indexes = index.search(points[rows], min(k + 1, n))
    values, indexes = torch.from_numpy(values), torch.from_numpy(indexes)
    values[indexes < 0] = -torch.inf  # fewer were found
    own = torch.arange(rows.start, rows.stop)[:, None]
    values[indexes == own] = own_value
    if own_value == FIRST:  # among many duplicates it may not be there
        missing = ~(indexes == own).any(dim=1)
        values[missing, -1], indexes[missing, -1] = own_value, own[missing, 0]
    values, order = values.topk(k, dim=1)
    return values, indexes.gather(1, order).clamp(min=0).int()


def _measured_recall(
    features: Tensor, values: Tensor, rows: slice, own_value: float, seed: int, k: int
) -> float:
    """Recall of the first k of `values` on a random sample of the rows, the images themselves left out."""
    picked = torch.randperm(len(values), generator=generator(seed, "sample", 2))[:SAMPLED_ROWS]
    ids = picked + rows.start
    exact, _ = _search(features[ids.to(features.device)], features, k, own=ids, own_value=own_value)
    others = slice(int(own_value == FIRST), k)
    if others.start == k:
        return 1.0
    return _recall(values[picked, others], exact[:, others])


def _whole(rows: slice | None, n: int) -> slice:
    start, stop, step = (rows or slice(None)).indices(n)
    if step != 1 or stop <= start:
        raise ValueError(f"rows {rows} of {n} images: take a slice of one row at least, step 1")
    return slice(start, stop)


def _method_for(method: str, n: int, device: torch.device) -> str:
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: take one of {', '.join(METHODS)}")
    if method == "auto":
        return "exact" if n < EXACT_BELOW.get(device.type, EXACT_BELOW["cpu"]) else "ivf"
    return method


def nearest_neighbors(
    features: Tensor,
    k: int,
    *,
    include_self: bool,
    scale_rank: int = 0,
    block_bytes: int = BLOCK_BYTES,
    method: str = "auto",
    precision: str = "fp32",
    rows: slice | None = None,
    recall: float = RECALL,
    seed: int = 0,
) -> Neighbors:
    """The k nearest neighbours of every row among all rows, by blocks.

    Args:
        features: N x D unit vectors (float32), on any device.
        k: neighbours per row, at most N (N - 1 without the row itself).
        include_self: put each row first among its own neighbours, whatever duplicates there are;
            otherwise it is left out.
        scale_rank: also report the cosine of this neighbour (1-based, the row itself not counted).
        block_bytes: bound of the similarities in memory, by all threads together.
        method: "exact"; "ivf", k-means cells of which each row searches the nearest, exactly, their
            number chosen to reach `recall`; "faiss", where it is installed; "auto", exact below
            `EXACT_BELOW` rows.
        precision: of the products of the exact search, "fp32", or "bf16" with half as many candidates
            again ranked in float32 (faster where the hardware multiplies bfloat16).
        rows: those to find neighbours for, a slice of step 1; all if None. The cells of "ivf" are the
            same in every process that is given the same features and seed.
        recall: aimed at by "ivf".
        seed: of k-means and of the rows that the recall is measured on.

    Returns:
        Their neighbours, on the CPU, and the measured recall of a search that is not exact.

    Raises:
        ValueError: for fewer than two rows, no neighbour, an unknown method or precision, no rows asked
            for, or FAISS where it is not installed.

    Warns:
        UserWarning: where the measured recall stays below 0.95.
    """
    n = len(features)
    if n < 2:
        raise ValueError(f"a graph needs two images at least, not {n}")
    if k < 1:
        raise ValueError(f"a graph needs one neighbour per image at least, not {k}")
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: take one of {', '.join(PRECISIONS)}")
    method, rows = _method_for(method, n, features.device), _whole(rows, n)
    features = features.detach()  # the threads do not inherit no_grad
    k = min(k, n if include_self else n - 1)
    rank = min(scale_rank, n - 1)
    wanted = max(k, rank + include_self)
    own_value = FIRST if include_self else -torch.inf
    if method == "ivf":
        found = _by_cells(
            features,
            wanted,
            rows,
            own_value=own_value,
            recall=recall,
            block_bytes=block_bytes,
            seed=seed,
        )
    elif method == "faiss":
        found = _by_faiss(features, wanted, rows, own_value=own_value)
    else:
        found = _search(
            features[rows],
            features,
            wanted,
            own=torch.arange(rows.start, rows.stop),
            own_value=own_value,
            precision=precision,
            block_bytes=block_bytes,
            progress="neighbours",
        )
    values, indexes = found
    reached = 1.0
    if method != "exact" or precision != "fp32":
        reached = _measured_recall(features, values, rows, own_value, seed, wanted)
    if reached < 0.95:
        warnings.warn(
            f"{method} search found {reached:.1%} of the nearest neighbours", stacklevel=2
        )
    scales = values[:, rank - 1 + include_self].clone() if rank else torch.empty(0)
    values, indexes = values[:, :k].contiguous(), indexes[:, :k].contiguous()
    if include_self:
        values[:, 0] = 1.0
    return Neighbors(indexes, values.clamp_(-1, 1), scales.clamp_(-1, 1), reached)
