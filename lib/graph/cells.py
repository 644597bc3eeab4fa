"""Approximate nearest neighbors by k-means cells, in two rounds.

In the first round the rows of a cell search together the few cells that are nearest to most of them. In the
second round each row searches the other cells whose centroid is not much farther away than its K-th
neighbor so far. How much farther is measured: on a sample of rows whose exact neighbors are known, it is the
margin that loses the allowed share of them. Most rows leave out most cells.

FAISS's inverted file needs 3.8 times the processor time at the same recall of 0.962 on a million points, K =
20: 3,642 against 955 s (the better of 4,000 and 8,000 lists; one core of an AMD EPYC, 2026-11-28;
scripts/benchmarks/neighbors.py --images 1000000 --repetitions 1 --queries 4000). On 200,000 points it needs
2.6 to 2.8 times as much (369 and 354 against 143 and 128 s, recall 0.970; 2026-11-27). On 20,000 points,
where exact search is taken, it needs 0.5 to 0.8 times as much.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lib.graph.search import BLOCK_BYTES, exact_search, in_parallel, product, top_k
from lib.runtime.distributed import progress_bar
from lib.runtime.seeding import generator

CELLS_PER_ROOT = 8  # cells per square root of N
COARSE_PER_ROOT = 2  # the same, where only the order of rows matters
VOTES = 8  # nearest centroids that a row votes for
PROBES = 32  # cells searched in the first round
VOTERS = 128  # rows of a cell that vote, at most about this many
SAMPLED_ROWS = 512  # rows whose exact neighbors the margin is measured with
ROWS_PER_CELL = 16  # rows of the k-means sample for each cell
KMEANS_ROUNDS = 5
RECALL = 0.97  # share of the exact neighbors that the search aims at
TARGETS = 256  # cells compared with a block of rows at a time
MERGE_BYTES = 64 * 2**20  # bound of neighbors and candidates merged at a time
WORTHWHILE = 0.5  # share of all pairs of rows: where more are compared, exact search is faster


@dataclass(frozen=True)
class Cells:
    """Features sorted by their nearest centroid."""

    sorted: Tensor  # N x D, cell after cell
    order: Tensor  # N, the row that each of them has in the features
    starts: list[int]  # C + 1, where each cell starts
    centroids: Tensor  # C x D

    def __len__(self) -> int:
        return len(self.centroids)

    def members(self, cell: int) -> slice:
        return slice(self.starts[cell], self.starts[cell + 1])

    def of(self, places: Tensor) -> Tensor:
        """Find the cell of each place in the sorted order."""
        return torch.searchsorted(torch.tensor(self.starts), places, right=True) - 1


class Found(NamedTuple):
    """Neighbors so far of the rows `start` ... `start + R` of the features, changed in place."""

    values: Tensor  # R x K cosines, falling
    places: Tensor  # R x K rows of the features
    start: int


def _assign(features: Tensor, cells_per_root: float) -> tuple[Tensor, Tensor]:
    """Find unit centroids by spherical k-means on a sample; also each row's nearest one, on the CPU."""
    num_cells = min(max(1, round(cells_per_root * len(features) ** 0.5)), len(features))
    rows = torch.randperm(len(features), generator=generator(0, "sample"))
    sample = features[rows[: ROWS_PER_CELL * num_cells].to(features.device)]
    centroids = sample[:num_cells].clone()
    for _ in range(KMEANS_ROUNDS):
        _, nearest = exact_search(sample, centroids, 1, progress="k-means")
        nearest = nearest[:, 0].long()
        sums = torch.zeros_like(centroids).index_add_(0, nearest, sample)
        full = sums.norm(dim=1) > 0  # a cell that lost all its members keeps its centroid
        centroids[full] = normalize(sums[full])
    return centroids, exact_search(features, centroids, 1, progress="cells")[1][:, 0].cpu()


def near_order(features: Tensor) -> Tensor:
    """Order the rows of N x D unit vectors cell after cell: near rows lie near each other in memory."""
    return torch.argsort(_assign(features, COARSE_PER_ROOT)[1], stable=True)


def _probed(cells: Cells, cell: int, least: int) -> list[int]:
    """Choose the cells that all rows of one cell search in the first round, their own first."""
    own = cells.sorted[cells.members(cell)]
    voters = own[:: 1 + len(own) // VOTERS]  # a sample of a crowded cell votes
    similarities = voters @ cells.centroids.T
    threshold = similarities.topk(min(VOTES + 1, len(cells)), dim=1).values[:, -1:]
    # Rows vote for centroids by how much nearer these are than the first one that gets no vote of theirs.
    # The second term ranks the cells that nobody votes for.
    votes = (similarities - threshold).relu().mean(dim=0) + 1e-3 * similarities.mean(dim=0)
    votes[cell] = torch.inf
    chosen, held = [], 0
    for other in votes.argsort(descending=True).tolist():
        if len(chosen) >= PROBES and held >= least:
            break
        chosen.append(other)
        held += cells.starts[other + 1] - cells.starts[other]
    return chosen


def _search_cell(
    cells: Cells, cell: int, members: Tensor, k: int, own_value: float, budget: int
) -> tuple[Tensor, Tensor, list[int]]:
    """Find the k nearest of some `members` (places in the cell) among the probed cells; return these too."""
    own = cells.sorted[cells.members(cell)]
    chosen = _probed(cells, cell, k + 1)
    candidates = torch.cat([cells.sorted[cells.members(c)] for c in chosen])
    ids = torch.cat([cells.order[cells.members(c)] for c in chosen])
    at_once = max(1, budget // (4 * len(candidates)))
    values, places = [], []
    for part in members.split(at_once):
        part_on_device = part.to(own.device)
        block = product(own[part_on_device], candidates)
        block.scatter_(1, part_on_device[:, None], own_value)  # the cell's own rows come first
        found, where = top_k(block, k)
        values.append(found.cpu())
        places.append(ids[where.cpu()].int())
    return torch.cat(values), torch.cat(places), chosen


def _first_round(
    cells: Cells, k: int, rows: slice, own_value: float, block_bytes: int
) -> tuple[Found, Tensor]:
    """Find neighbors of `rows` in the cells that their cell votes for; return which cells, C x C, bool."""
    count = rows.stop - rows.start
    found = Found(torch.empty(count, k), torch.empty(count, k, dtype=torch.int32), rows.start)
    searched = torch.zeros(len(cells), len(cells), dtype=torch.bool)
    budget = block_bytes // torch.get_num_threads()
    bar = progress_bar(total=count, desc="neighbors, first round", unit="img")

    def work(numbers: Iterator[int]) -> None:
        for cell in numbers:
            ids = cells.order[cells.members(cell)]
            members = ((ids >= rows.start) & (ids < rows.stop)).nonzero()[:, 0]
            if len(members):
                values, places, chosen = _search_cell(cells, cell, members, k, own_value, budget)
                to = ids[members] - rows.start
                found.values[to], found.places[to] = values, places
                searched[cell, chosen] = True
            bar.update(len(members))

    with bar:
        in_parallel(work, range(len(cells)), cells.sorted.device)
    return found, searched


def _choose_margin(cells: Cells, k: int, own_value: float, budget: int) -> tuple[float, float]:
    """Measure how far below its K-th cosine a row may lie from a centroid for that cell to be searched.

    Also return the share of all pairs of rows that are then compared.
    """
    order = torch.randperm(len(cells.order), generator=generator(0, "sample", 1))
    places = order[:SAMPLED_ROWS].sort().values
    # The first round for these rows: their K-th cosines so far, and the searched cells (S x C).
    worst, searched = torch.empty(len(places)), torch.zeros(len(places), len(cells)).bool()
    for row, (place, cell) in enumerate(
        zip(places.tolist(), cells.of(places).tolist(), strict=True)
    ):
        member = torch.tensor([place - cells.starts[cell]])
        values, _, chosen = _search_cell(cells, cell, member, k, own_value, budget)
        worst[row], searched[row, chosen] = values[0, -1], True
    rows = cells.sorted[places.to(cells.sorted.device)]
    _, exact = exact_search(rows, cells.sorted, k, own=places, own_value=own_value)
    nearer = (rows @ cells.centroids.T).cpu() - worst[:, None]  # S x C
    of = cells.of(exact.long().cpu())
    # +inf means that the first round finds a neighbor; as the margin, that no second round is needed.
    reached = nearer.gather(1, of).masked_fill(searched.gather(1, of), torch.inf)
    lowest = reached.flatten().sort(descending=True).values
    margin = float(lowest[min(len(lowest) - 1, int(RECALL * len(lowest)))])
    sizes = torch.tensor(cells.starts).diff().float()
    compared = ((nearer >= margin) | searched).float() @ sizes
    return margin, float(compared.mean()) / len(cells.order)


def _merge(found: Found, rows: Tensor, values: Tensor, places: Tensor) -> None:
    """Put new candidates among the neighbors of their rows; rows: n, rising, of `found`."""
    k = found.values.shape[1]
    touched, counts = torch.unique_consecutive(rows, return_counts=True)
    width = k + int(counts.max())
    if 8 * width * len(touched) > MERGE_BYTES and len(touched) > 1:
        # Halves, until a row with far more candidates than the others widens only few of them.
        middle = int(counts[: len(touched) // 2].sum())
        for half in (slice(middle), slice(middle, None)):
            _merge(found, rows[half], values[half], places[half])
        return
    first = counts.cumsum(0) - counts
    column = torch.arange(len(rows)) - first.repeat_interleave(counts)
    row = torch.arange(len(touched)).repeat_interleave(counts)
    wide = torch.full((len(touched), width), -torch.inf)
    ids = torch.zeros_like(wide, dtype=torch.int32)
    wide[:, :k], ids[:, :k] = found.values[touched], found.places[touched]
    wide[row, k + column], ids[row, k + column] = values, places
    best, where = wide.topk(k, dim=1)
    found.values[touched], found.places[touched] = best, ids.gather(1, where)


def _search_targets(
    cells: Cells, queries: Tensor, worst: Tensor, wanted: Tensor, targets: range
) -> tuple[Tensor, Tensor, Tensor]:
    """Find products above each query's `worst` in the cells that it wants: queries, values and rows."""
    hits: list[tuple[Tensor, Tensor, Tensor]] = []
    for asked, cell in zip(wanted, targets, strict=True):
        rows, members = asked.nonzero()[:, 0], cells.members(cell)
        if not len(rows) or members.start == members.stop:
            continue
        block = product(queries[rows], cells.sorted[members])
        row, column = (block > worst[rows, None]).nonzero(as_tuple=True)
        hits.append((rows[row], block[row, column], cells.order[members][column.cpu()].int()))
    if not hits:
        return torch.empty(0).long(), torch.empty(0), torch.empty(0).int()
    rows, values, places = (torch.cat(parts) for parts in zip(*hits, strict=True))
    rows, order = rows.sort(stable=True)
    return rows, values[order], places[order.cpu()]


def _second_round(
    cells: Cells, found: Found, searched: Tensor, margin: float, block_bytes: int
) -> None:
    """Let each row search the other cells within the margin, and improve `found` in place."""
    count, device = len(found.values), cells.sorted.device
    inside = (cells.order >= found.start) & (cells.order < found.start + count)
    positions = inside.nonzero()[:, 0]  # rows of one cell side by side: they want the same cells
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    at_once = max(1, block_bytes // (8 * TARGETS * threads))
    bar = progress_bar(total=count, desc="neighbors, second round", unit="img")

    def work(blocks: Iterator[Tensor]) -> None:
        for block in blocks:
            queries, of = cells.sorted[block.to(device)], cells.of(block)
            rows = cells.order[block] - found.start
            part = Found(found.values[rows], found.places[rows], 0)
            # The K-th cosine of the first round counts, as it did when the margin was measured.
            least = part.values[:, -1].to(device) + margin
            for first in range(0, len(cells), TARGETS):
                targets = range(first, min(first + TARGETS, len(cells)))
                worst = part.values[:, -1].to(device)
                near = product(cells.centroids[targets.start : targets.stop], queries)
                near = (near >= least) & ~searched[of, targets.start : targets.stop].T.to(device)
                new = _search_targets(cells, queries, worst, near, targets)
                if len(new[0]):
                    _merge(part, *(x.cpu() for x in new))
            found.values[rows], found.places[rows] = part.values, part.places
            bar.update(len(block))

    with bar:
        in_parallel(work, positions.split(at_once), device)


def search_cells(
    features: Tensor, k: int, rows: slice, own_value: float, block_bytes: int | None = None
) -> tuple[Tensor, Tensor] | None:
    """Find approximate neighbors of `rows` among all rows; None where exact search would be faster.

    The answer for a row depends on the features (N x D unit vectors) and k, not on what other rows are asked
    for. `own_value` and `block_bytes` are those of `exact_search`.

    Returns:
        Cosines, falling, and rows, R x k each, on the CPU.
    """
    block_bytes = block_bytes or BLOCK_BYTES[features.device.type]
    centroids, nearest = _assign(features, CELLS_PER_ROOT)
    order = torch.argsort(nearest, stable=True)
    sizes = torch.bincount(nearest, minlength=len(centroids))
    starts = [0, *sizes.cumsum(0).tolist()]
    cells = Cells(features[order.to(features.device)], order, starts, centroids)
    margin, share = _choose_margin(cells, k, own_value, block_bytes)
    if share > WORTHWHILE:
        return None
    found, searched = _first_round(cells, k, rows, own_value, block_bytes)
    if margin < torch.inf:
        _second_round(cells, found, searched, margin, block_bytes)
    return found.values, found.places
