"""Nearest neighbors of every image by cosine: exact by blocks, approximate by cells, or by FAISS."""

import os
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib.graph.cells import CELLS_PER_ROOT, search_cells
from lib.graph.search import FIRST, exact_search
from lib.runtime.devices import has_fast_bf16
from lib.runtime.seeding import generator
from models.layers import off_unit_sphere

METHODS = ("auto", "exact", "ivf", "faiss")
PRECISIONS = ("auto", "fp32", "bf16")
EXACT_BELOW = {"cpu": 250_000, "cuda": 4_000_000}  # rows; beyond, exact search takes minutes
HALF_FROM = 20_000  # rows from which the faster products are worth the second ranking
LEAST_OF_HALF = 0.995  # recall below which "auto" does not take bfloat16
KEPT_BYTES = 2**30  # bound of the neighbors held if only the first and the last of them are wanted
SAMPLED_ROWS = 512  # rows whose exact neighbors the recall is measured against
FAISS_PROBES = 32
TIE = 1e-6  # products that differ by less, relative to those above 1, are equal in float32


@dataclass(frozen=True)
class Neighbors:
    """Nearest neighbors of the R rows that were asked for, by cosine (by product off the unit sphere)."""

    indexes: Tensor  # R x K, int32
    similarities: Tensor  # R x K, float32, falling
    scale_similarities: Tensor  # R, of the neighbor that sets the local scale; empty if none does
    recall: float = 1.0  # share of the exact neighbors found, on a sample of rows


def _by_faiss(
    features: Tensor, k: int, rows: slice, own_value: float | None
) -> tuple[Tensor, Tensor]:
    """Search by an inverted file of FAISS where there are many rows, by its flat index otherwise."""
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
    if own_value is not None:
        values[indexes == own] = own_value
    if own_value == FIRST:  # among many duplicates it may not be there
        missing = ~(indexes == own).any(dim=1)
        values[missing, -1], indexes[missing, -1] = own_value, own[missing, 0]
    values, order = values.topk(k, dim=1)
    return values, indexes.gather(1, order).clamp(min=0).int()


def _sampled(rows: slice) -> Tensor:
    """Draw a random sample of these rows, to measure recall on."""
    order = torch.randperm(rows.stop - rows.start, generator=generator(0, "sample", 2))
    return order[:SAMPLED_ROWS] + rows.start


def _recall(
    features: Tensor, ids: Tensor, values: Tensor, own_value: float | None, k: int
) -> float:
    """Measure the share of exact neighbors among the first k found for the rows `ids`, without themselves."""
    queries = features[ids.to(features.device)]
    exact, _ = exact_search(queries, features, k, own=ids, own_value=own_value)
    first = int(own_value == FIRST)
    if first == k:
        return 1.0
    # Cosines are compared, as equally near neighbors replace each other.
    least = exact[:, -1:] - TIE * exact[:, -1:].abs().clamp(min=1)
    return float((values[:, first:k] >= least).float().mean())


def _precision_for(precision: str, features: Tensor, k: int, own_value: float | None) -> str:
    """Choose the precision; `auto` tries bfloat16 on a sample of all rows, the same in every process."""
    if precision != "auto":
        return precision
    if len(features) < HALF_FROM or not has_fast_bf16(features.device):
        return "fp32"
    ids = _sampled(slice(0, len(features)))
    queries = features[ids.to(features.device)]
    values, _ = exact_search(queries, features, k, own=ids, own_value=own_value, precision="bf16")
    # The recall is low where there are crowds of images that bfloat16 cannot tell apart.
    return "bf16" if _recall(features, ids, values, own_value, k) >= LEAST_OF_HALF else "fp32"


def _by_blocks(
    features: Tensor, wanted: int, k: int, column: int, rows: slice, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Find cosines and places of the first k of `wanted` neighbors, and all cosines of one `column`."""
    count = rows.stop - rows.start
    values, scales = features.new_empty(count, k), features.new_empty(count)
    places = features.new_empty((count, k), dtype=torch.int32)
    size = max(1, KEPT_BYTES // (12 * wanted)) if wanted > k else count
    for first in range(0, count, size):
        part = slice(first, first + size)
        own = torch.arange(rows.start, rows.stop)[part]
        found, where = exact_search(
            features[rows][part], features, wanted, own=own, progress="neighbors", **options
        )
        values[part], places[part], scales[part] = found[:, :k], where[:, :k], found[:, column]
    return values, places, scales


def _checked(
    features: Tensor, k: int, method: str, precision: str, rows: slice | None, unit: bool
) -> tuple[str, slice]:
    """Refuse what cannot be searched; return the method, and the rows to find neighbors for."""
    n = len(features)
    if n < 2:
        raise ValueError(f"a graph needs two images at least, not {n}")
    if k < 1:
        raise ValueError(f"a graph needs one neighbor per image at least, not {k}")
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: take one of {', '.join(PRECISIONS)}")
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: take one of {', '.join(METHODS)}")
    start, stop, step = (rows or slice(None)).indices(n)
    if step != 1 or stop <= start:
        raise ValueError(f"rows {rows} of {n} images: take a slice of one row at least, step 1")
    if method == "auto":
        least = EXACT_BELOW.get(features.device.type, EXACT_BELOW["cpu"])
        method = "exact" if n < least or not unit else "ivf"
    if method == "ivf" and not unit:
        raise ValueError("the search ivf needs features of unit length: take exact, or normalize")
    return method, slice(start, stop)


def nearest_neighbors(
    features: Tensor,
    k: int,
    *,
    include_self: bool,
    scale_rank: int = 0,
    block_bytes: int | None = None,
    method: str = "auto",
    precision: str = "auto",
    rows: slice | None = None,
) -> Neighbors:
    """Find the k nearest neighbors of every row among all rows, on the device of the features.

    Rows off the unit sphere (`off_unit_sphere`) are compared by their products, as the published code does:
    these may leave [-1, 1], and a row that is not among its own nearest is not its own neighbor.

    Args:
        features: N x D (float32), on any device.
        k: neighbors per row, at most N (N - 1 without the row itself).
        include_self: put each unit vector first among its own neighbors, whatever duplicates there are, and
            let a row off the sphere compete; otherwise it is left out.
        scale_rank: also report the cosine of this neighbor (1-based, the row itself not counted).
        block_bytes: bound of the similarities that all threads hold together; None: `BLOCK_BYTES`.
        method: "exact"; "ivf", k-means cells of which each row searches the nearest (`lib.graph.cells`), or
            exact where that is faster, for unit vectors; "faiss"; "auto", exact below `EXACT_BELOW` rows and
            off the sphere.
        precision: of the products of the exact search: "fp32"; "bf16", with half as many candidates more,
            ranked in float32; "auto", bf16 from `HALF_FROM` rows on where the hardware multiplies it.
        rows: rows to find neighbors for, a slice of step 1; all if None.

    Raises:
        ValueError: for fewer than two rows, no neighbor, an unknown method or precision, no rows asked
            for, more neighbors than memory holds, ivf off the sphere, or FAISS where it is not installed.

    Warns:
        UserWarning: where the measured recall stays below 0.95.
    """
    unit = not off_unit_sphere(features).any()
    method, rows = _checked(features, k, method, precision, rows, unit)
    features = features.detach()  # threads do not inherit no_grad
    most = len(features) - 1
    k, rank = min(k, most + include_self), min(scale_rank, most)
    wanted, column = max(k, rank + include_self), rank - 1 + include_self
    own_value = -torch.inf if not include_self else FIRST if unit else None
    found, compared = None, wanted
    if method != "exact":
        needed = 8 * (rows.stop - rows.start) * wanted
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        if needed > free:
            raise ValueError(
                f"{wanted} neighbors of each image take {needed / 2**30:.0f} GiB, and {free / 2**30:.0f} "
                "are free: take a graph without a scale of so many neighbors (cifar), or chunks"
            )
    if method == "faiss":
        found = _by_faiss(features, wanted, rows, own_value)
    elif method == "ivf":
        found = search_cells(features, wanted, rows, own_value, block_bytes)
    if found is not None:
        values, indexes = (x.to(features.device) for x in found)
        scales = values[:, column].clone()
    else:  # exact search was asked for, or is faster
        chosen = _precision_for(precision, features, k, own_value)
        method, compared = "exact", 0 if chosen == "fp32" else k
        options = {"own_value": own_value, "precision": chosen, "block_bytes": block_bytes}
        values, indexes, scales = _by_blocks(features, wanted, k, column, rows, **options)
    recall = 1.0
    if compared:
        ids = _sampled(rows)
        recall = _recall(features, ids, values[ids - rows.start], own_value, compared)
        if recall < 0.95:
            warnings.warn(
                f"{method} search found {recall:.1%} of the nearest neighbors", stacklevel=2
            )
    scales = scales if rank else scales[:0]
    values, indexes = values[:, :k].contiguous(), indexes[:, :k].contiguous()
    if unit:
        scales, values = scales.clamp_(-1, 1), values.clamp_(-1, 1)  # FIRST becomes 1 here
    return Neighbors(indexes, values, scales, recall)
