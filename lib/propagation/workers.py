"""Several processes on one propagation: rank 0 leads, the others search and multiply for it.

Rank 0 runs phase 2 from top to bottom, as a single process does. What takes long and falls apart into rows
- neighbors, votes of nearest neighbors, products with the normalized affinity S - every process does for
its own share of the rows (`lib.runtime.distributed.Share`), and rank 0 puts the parts together:

    if not distributed.is_main():
        serve(device)
    else:
        with lead(device) as workers:
            metric = EmbeddingGraph(features, workers=workers)
            ...

So every decision is taken once. Processes that ran the solvers side by side would have to agree in the
last bit, or they would stop after different numbers of steps; here they may be of different machines. A
row of S x does not depend on which process computes it, and the exact search compares the same blocks of
rows: on one kind of machine, with one number of threads for each process, the answers are those of one
process bit for bit. Approximate search, and fewer rows than two blocks for each process, round otherwise.

Memory: rank 0 holds what a single process holds, but for the other processes' rows of S. Another process
holds the features (4 N D bytes), its rows of S (8 bytes for each of at most 2 N K / size entries), and
during a product N x m numbers, m the width of a block of columns.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.distributed as dist
from torch import Tensor

from lib.graph.knn import classify
from lib.graph.neighbors import Neighbors, nearest_neighbors
from lib.graph.search import ROWS
from lib.graph.spectral import Operator, csr_operator
from lib.runtime import distributed
from lib.runtime.distributed import Share

TASKS = ("", "take_features", "find", "vote", "take_rows", "multiply")  # "" ends the work
Task = tuple[str, dict[str, Any]]


def rows_of(share: Share, n: int) -> slice:
    """A process's part of n rows: whole blocks of the exact search, so that it rounds as in one process."""
    rows = share.rows(n)
    if n < 2 * share.size * ROWS:
        return rows
    last = share.rank == share.size - 1
    return slice(rows.start - rows.start % ROWS, n if last else rows.stop - rows.stop % ROWS)


def _rows_of(rank: int, n: int) -> slice:
    return rows_of(Share(rank, distributed.share().size), n)


def _own(n: int) -> slice:
    return rows_of(distributed.share(), n)


def _others() -> range:
    return range(1, distributed.share().size)


def _collect(part: Tensor, n: int) -> Tensor:
    """The parts of all processes, n rows, on rank 0; nothing to use elsewhere."""
    part = part.contiguous()
    if not distributed.is_main():
        dist.send(part, 0)
        return part
    whole = part.new_empty(n, *part.shape[1:])
    whole[_own(n)] = part
    for rank in _others():
        dist.recv(whole[_rows_of(rank, n)], rank)
    return whole


def _spread(x: Tensor) -> Tensor:
    """The tensor of rank 0 on every process; elsewhere `x` is what it is written to."""
    dist.broadcast(x, 0)
    return x


def _send_rows(part: sp.csr_matrix, rank: int) -> None:
    for values in (part.indptr.astype(np.int64), part.indices.astype(np.int64), part.data):
        dist.send(torch.from_numpy(values), rank)


def _receive_rows(n: int, size: int) -> sp.csr_matrix:
    rows = _own(n)
    pointers = torch.empty(rows.stop - rows.start + 1, dtype=torch.int64)
    columns, values = torch.empty(size, dtype=torch.int64), torch.empty(size)
    for received in (pointers, columns, values):
        dist.recv(received, 0)
    shape = (len(pointers) - 1, n)
    # scipy takes the smallest index type that will do
    return sp.csr_matrix((values.numpy(), columns.numpy(), pointers.numpy()), shape)


class Worker:
    """What every process holds, and its part of each task. Rank 0 names the task, all do it together."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.features: Tensor = torch.empty(0)
        self.product: Operator | None = None

    def take_features(self, features: Tensor | None, shape: tuple[int, int]) -> None:
        held = torch.empty(shape, device=self.device) if features is None else features
        self.features = _spread(held.contiguous())

    def find(self, k: int, options: dict[str, Any]) -> Neighbors:
        """Neighbors of all rows, on rank 0; the recall is the mean over all rows."""
        n = len(self.features)
        found = nearest_neighbors(self.features, k, rows=_own(n), **options)
        parts = [found.indexes, found.similarities]
        if len(found.scale_similarities):
            parts.append(found.scale_similarities)
        whole = [_collect(part, n) for part in parts]
        size = distributed.share().size
        recalls = _collect(torch.tensor([found.recall], dtype=torch.float64), size)
        scales = whole[2] if len(whole) == 3 else found.scale_similarities
        return Neighbors(whole[0], whole[1], scales, float(recalls.mean()))

    def vote(
        self, bank: Tensor | None, labels: Tensor | None, num_labeled: int, options: dict[str, Any]
    ) -> Tensor:
        """Class probabilities of all rows, on rank 0."""
        if bank is None or labels is None:
            bank = torch.empty(num_labeled, self.features.shape[1], device=self.device)
            labels = torch.empty(num_labeled, dtype=torch.int64)
        bank, labels = _spread(bank), _spread(labels)
        n = len(self.features)
        return _collect(classify(self.features[_own(n)], bank, labels, **options), n)

    def take_rows(self, matrix: sp.csr_matrix | None, n: int, sizes: list[int]) -> None:
        """Own rows of a matrix of n rows, of which rank r has `sizes[r]` entries."""
        if matrix is None:
            own = _receive_rows(n, sizes[distributed.share().rank])
        else:
            own = matrix[_own(n)]
            for rank in _others():
                _send_rows(matrix[_rows_of(rank, n)], rank)
        self.product = csr_operator(own, self.device)

    def multiply(self, columns: Tensor | None, shape: tuple[int, int]) -> Tensor:
        """The matrix times columns, on rank 0."""
        assert self.product is not None
        held = torch.empty(shape, device=self.device) if columns is None else columns
        return _collect(self.product(_spread(held.contiguous())), shape[0])


def serve(device: torch.device | str) -> None:
    """Do this process's part of every task that rank 0 names, until it has no more."""
    worker = Worker(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # rank 0 says the same
        while (task := _announce()) is not None:
            name, arguments = task
            getattr(worker, name)(**arguments)


def _announce(name: str = "", arguments: dict[str, Any] | None = None) -> Task | None:
    """The task that rank 0 names, on every process; None at the end."""
    shape = (arguments or {}).get("shape", (0, 0))
    # products come by the thousand: their few numbers travel as one small tensor
    header = _spread(torch.tensor([TASKS.index(name), *shape]))
    name = TASKS[int(header[0])]
    if name == "multiply":
        return name, {"columns": None, "shape": (int(header[1]), int(header[2]))}
    return (name, distributed.broadcast_object(arguments)) if name else None


class Workers:
    """Rank 0's hold on all processes, itself included. Made by `lead`."""

    def __init__(self, device: torch.device | str) -> None:
        self._worker = Worker(device)
        self._divided = 0  # matrices so far
        self._busy = False

    def _together(self, name: str, tensors: dict[str, Any], **plain: Any) -> Any:
        """Let every process do a task; `tensors` are handed over inside of it."""
        self._busy = True
        _announce(name, plain | dict.fromkeys(tensors))
        answer = getattr(self._worker, name)(**tensors, **plain)
        self._busy = False
        return answer

    def _hand_out(self, features: Tensor) -> None:
        if features is not self._worker.features:
            shape = tuple(features.shape)
            self._together("take_features", {"features": features}, shape=shape)
            self._worker.features = features  # the same object again needs no second copy

    def nearest_neighbors(self, features: Tensor, k: int, **options: Any) -> Neighbors:
        """`lib.graph.neighbors.nearest_neighbors`, the rows divided among the processes."""
        if len(features) < distributed.share().size:
            return nearest_neighbors(features, k, **options)
        self._hand_out(features)
        return self._together("find", {}, k=k, options=options)

    def classify(
        self, queries: Tensor, bank: Tensor, bank_labels: Tensor, num_classes: int, **options: Any
    ) -> Tensor:
        """`lib.graph.knn.classify`, the queries divided among the processes."""
        options |= {"num_classes": num_classes}
        if len(queries) < distributed.share().size:
            return classify(queries, bank, bank_labels, **options)
        self._hand_out(queries)
        tensors = {"bank": bank.contiguous(), "labels": bank_labels.contiguous()}
        return self._together("vote", tensors, num_labeled=len(bank), options=options)

    def divide(self, matrix: sp.csr_matrix, device: torch.device | str) -> Operator:
        """Products with a square matrix on `device`, of which every process keeps its own rows.

        They are those of the newest matrix: older ones must not be asked for any more.
        """
        n = matrix.shape[0]
        if n < distributed.share().size:
            return csr_operator(matrix, device)
        parts = [_rows_of(rank, n) for rank in range(distributed.share().size)]
        sizes = [int(matrix.indptr[p.stop] - matrix.indptr[p.start]) for p in parts]
        self._together("take_rows", {"matrix": matrix}, n=n, sizes=sizes)
        self._divided += 1
        number = self._divided

        def product(columns: Tensor) -> Tensor:
            assert number == self._divided, "this matrix was replaced by another"
            shape = tuple(columns.shape)
            return self._together("multiply", {"columns": columns}, shape=shape)

        return product

    def dismiss(self) -> None:
        """Let the others go, unless they are in the midst of a task, which then has failed."""
        if not self._busy:
            _announce()


@contextmanager
def lead(device: torch.device | str) -> Iterator[Workers | None]:
    """On rank 0: the processes that `serve` here, for the length of a block; None where there are none."""
    if distributed.share().size == 1:
        yield None
        return
    workers = Workers(device)
    try:
        yield workers
    finally:
        workers.dismiss()
