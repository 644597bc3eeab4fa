"""Several processes on one propagation: rank 0 leads, the others search and multiply for it.

Rank 0 runs phase 2 from top to bottom, as a single process does. What takes long and can be divided by rows
- neighbors, votes of nearest neighbors, products with the normalized affinity S - every process does for
its own share of the rows, and rank 0 puts the parts together:

    if not distributed.is_main():
        serve(device)
    else:
        with lead(device) as workers:
            graph = EmbeddingGraph(features, workers=workers)

So every decision is taken once, where solvers side by side would have to agree in the last bit. A row of S x
does not depend on which process computes it, and the exact search compares the same blocks of rows: on one
kind of CPU, with one number of threads for each process, the answers are those of one process bit for bit.
GPUs, approximate search, and fewer rows than two blocks for each process, round otherwise.

Rank 0 holds what a single process holds, except the other processes' rows of S. Another process holds the
features (4 N D bytes), its rows of S (8 bytes for each of at most 2 N K / size entries), and during a product
N x m numbers, m the width of a block of columns.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lib.graph import sparse
from lib.graph.knn import classify
from lib.graph.laplacian import Operator, csr_operator
from lib.graph.neighbors import Neighbors, nearest_neighbors
from lib.graph.search import ROWS
from lib.runtime import distributed
from lib.runtime.distributed import shard_of

TASKS = ("", "take_features", "find", "vote", "take_rows", "multiply")  # "" ends the work


def rows_of(rank: int, world_size: int, n: int) -> slice:
    """Return a process's part of n rows: whole blocks of the exact search, which round as in one process."""
    rows = shard_of(n, rank, world_size)
    if n < 2 * world_size * ROWS:
        return rows
    last = rank == world_size - 1
    return slice(rows.start - rows.start % ROWS, n if last else rows.stop - rows.stop % ROWS)


def _parts(n: int) -> list[slice]:
    """Return the part of n rows of every process."""
    size = distributed.world_size()
    return [rows_of(rank, size, n) for rank in range(size)]


def _own(n: int) -> slice:
    return _parts(n)[distributed.rank()]


def _collect(part: Tensor, n: int) -> Tensor:
    """Collect the parts of all processes on rank 0, n rows; other ranks get their own part back."""
    part = part.contiguous()
    if not distributed.is_main():
        dist.send(part, 0)
        return part
    whole = part.new_empty(n, *part.shape[1:])
    whole[_own(n)] = part
    for rank, rows in enumerate(_parts(n)[1:], 1):
        dist.recv(whole[rows], rank)
    return whole


def _announce(name: str = "", arguments: dict[str, Any] | None = None) -> tuple[str, dict] | None:
    """Tell every process the task that rank 0 names; return it, None at the end."""
    shape = (arguments or {}).get("shape", (0, 0))
    # There are thousands of products, so that their few numbers travel as one small tensor.
    header = torch.tensor([TASKS.index(name), *shape])
    dist.broadcast(header, 0)
    name = TASKS[int(header[0])]
    if name == "multiply":
        return name, {"columns": None, "shape": (int(header[1]), int(header[2]))}
    return (name, distributed.broadcast_object(arguments)) if name else None


class Workers:
    """All processes as rank 0 sees them, itself included. Made by `lead`, and by `serve` on the others.

    Rank 0 calls `nearest_neighbors`, `classify` and `divide`. These name tasks, the methods in `TASKS`, that
    all processes do together; only rank 0 has their tensors, the others receive them.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.features: Tensor = torch.empty(0)
        self.product: Operator | None = None
        self.num_divided = 0  # matrices so far
        self.busy = False

    def nearest_neighbors(self, features: Tensor, k: int, **options: Any) -> Neighbors:
        """Run `lib.graph.neighbors.nearest_neighbors`, the rows divided among the processes."""
        if len(features) < distributed.world_size():
            return nearest_neighbors(features, k, **options)
        self._hand_out(features)
        return self._together("find", {}, k=k, options=options)

    def classify(
        self, queries: Tensor, bank: Tensor, bank_labels: Tensor, num_classes: int, **options: Any
    ) -> Tensor:
        """Run `lib.graph.knn.classify`, the queries divided among the processes."""
        options |= {"num_classes": num_classes}
        if len(queries) < distributed.world_size():
            return classify(queries, bank, bank_labels, **options)
        self._hand_out(queries)
        tensors = {"bank": bank, "labels": bank_labels}
        return self._together("vote", tensors, num_labeled=len(bank), options=options)

    def divide(self, matrix: Tensor) -> Operator:
        """Return products with a square CSR matrix, of which every process keeps its own rows.

        Only the newest matrix has products: those of older ones must not be used any more.
        """
        n = matrix.shape[0]
        if n < distributed.world_size():
            return csr_operator(matrix)
        self._together("take_rows", {"matrix": matrix}, n=n)
        self.num_divided += 1
        number = self.num_divided

        def product(columns: Tensor) -> Tensor:
            assert number == self.num_divided, "this matrix was replaced by another"
            return self._together("multiply", {"columns": columns}, shape=tuple(columns.shape))

        return product

    def _hand_out(self, features: Tensor) -> None:
        if features is not self.features:
            self._together("take_features", {"features": features}, shape=tuple(features.shape))
            self.features = features  # the same object again needs no second copy

    def _together(self, name: str, tensors: dict[str, Any], **plain: Any) -> Any:
        """Let every process do a task, in which it receives the `tensors`."""
        self.busy = True
        _announce(name, plain | dict.fromkeys(tensors))
        answer = getattr(self, name)(**tensors, **plain)
        self.busy = False
        return answer

    def _received(self, x: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """Send a float32 tensor of rank 0, where it is not None, to the device of every process."""
        held = torch.empty(shape, device=self.device) if x is None else x.contiguous()
        dist.broadcast(held, 0)
        return held

    def take_features(self, features: Tensor | None, shape: tuple[int, int]) -> None:
        self.features = self._received(features, shape)

    def find(self, k: int, options: dict[str, Any]) -> Neighbors:
        """Find the neighbors of all rows, on rank 0; the recall is the mean over the processes."""
        n = len(self.features)
        found = nearest_neighbors(self.features, k, rows=_own(n), **options)
        indexes, similarities = _collect(found.indexes, n), _collect(found.similarities, n)
        scales = found.scale_similarities
        scales = _collect(scales, n) if len(scales) else scales
        recall = torch.tensor([found.recall], dtype=torch.float64)
        recalls = _collect(recall, distributed.world_size())
        return Neighbors(indexes, similarities, scales, float(recalls.mean()))

    def vote(
        self, bank: Tensor | None, labels: Tensor | None, num_labeled: int, options: dict[str, Any]
    ) -> Tensor:
        """Compute the class probabilities of all rows, on rank 0."""
        n, dim = self.features.shape
        bank = self._received(bank, (num_labeled, dim))
        if labels is None:
            labels = torch.empty(num_labeled, dtype=torch.int64)
        labels = labels.to(self.device).contiguous()
        dist.broadcast(labels, 0)
        return _collect(classify(self.features[_own(n)], bank, labels, **options), n)

    def take_rows(self, matrix: Tensor | None, n: int) -> None:
        """Receive the own rows of a matrix of n rows."""
        own = _own(n)
        if matrix is None:
            crow = torch.empty(own.stop - own.start + 1, dtype=torch.int64, device=self.device)
            dist.recv(crow, 0)
            col = torch.empty(int(crow[-1]), dtype=torch.int64, device=self.device)
            values = torch.empty(len(col), device=self.device)
            dist.recv(col, 0)
            dist.recv(values, 0)
            smallest = torch.int32 if max(n, len(col)) < 2**31 else torch.int64
            part = sparse.csr(crow.to(smallest), col.to(smallest), values, n)
        else:
            # Copies: the arrays of the whole matrix go, and the own ones start where memory is aligned.
            part = sparse.csr(*(x.clone() for x in sparse.arrays(sparse.rows_of(matrix, own))), n)
            for rank, rows in enumerate(_parts(n)[1:], 1):
                crow, col, values = sparse.arrays(sparse.rows_of(matrix, rows))
                for array in (crow.long(), col.long(), values):
                    dist.send(array.contiguous(), rank)
        self.product = csr_operator(part)

    def multiply(self, columns: Tensor | None, shape: tuple[int, int]) -> Tensor:
        """Multiply the matrix by columns, on rank 0."""
        assert self.product is not None
        return _collect(self.product(self._received(columns, shape)), shape[0])


def serve(device: torch.device | str) -> None:
    """Do this process's part of every task that rank 0 names, until it has no more."""
    workers = Workers(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # rank 0 gives the same warnings
        while (task := _announce()) is not None:
            name, arguments = task
            getattr(workers, name)(**arguments)


@contextmanager
def lead(device: torch.device | str) -> Iterator[Workers | None]:
    """Lead, on rank 0, the processes that `serve`, for the length of a block; None where there are none."""
    if distributed.world_size() == 1:
        yield None
        return
    workers = Workers(device)
    try:
        yield workers
    finally:
        if not workers.busy:  # otherwise a task has failed in its midst
            _announce()
