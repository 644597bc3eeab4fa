"""From features to a sparse affinity matrix: nearest neighbours, weights, symmetry.

The three graphs in use differ in four choices only, so that they are presets of one function.
Nothing here is larger than N x K, but for one block of similarities at a time.
"""

from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor
from tqdm import tqdm

BLOCK_BYTES = 256 * 2**20  # of similarities held at a time
LEAST_SCALE = 1e-5  # of a local scale: below, distances of float32 vectors are rounding
GROUP = 32  # columns whose maximum stands for them in the first round of the top-K


@dataclass(frozen=True)
class GraphPreset:
    """How an affinity matrix is made. With d = (1 - cos) / 2, a weight is exp(-factor d / scale).

    Attributes:
        num_neighbors: K, counting the image itself where `include_self`.
        include_self: whether an image is its own first neighbour (a self-loop of weight 1).
        factor: multiplies the distance.
        scale: a constant, or None for the distance of the `scale_rank`-th neighbour.
        scale_rank: 1-based rank of that neighbour, the image itself never counted.
        symmetrize: "mean" is (W + W^T) / 2, "max" the elementwise maximum.
    """

    num_neighbors: int
    include_self: bool
    factor: float
    scale: float | None
    scale_rank: int
    symmetrize: str


PRESETS = {
    "cifar": GraphPreset(20, True, 2.0, 0.2, 0, "mean"),
    "local-scale": GraphPreset(20, False, 2.0, None, 20, "max"),
    "imagenet": GraphPreset(500, False, 1.0, None, 5000, "mean"),
}


@dataclass(frozen=True)
class Neighbors:
    """Exact nearest neighbours by cosine, falling.

    Attributes:
        indexes: N x K, int64.
        similarities: N x K, float32.
        scale_similarities: N, cosine of the neighbour that sets the local scale; empty if none does.
    """

    indexes: Tensor
    similarities: Tensor
    scale_similarities: Tensor


def _top_k(similarities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, falling, and their columns.

    They lie in the k groups of columns with the largest maxima: taking those maxima reads every
    column once, and the selection proper sees N / GROUP of them, then k GROUP candidates.
    """
    n = similarities.shape[1]
    groups = n // GROUP
    if k * GROUP * 2 >= n or n % GROUP:
        return similarities.topk(k, dim=1)
    maxima = similarities.view(-1, groups, GROUP).amax(dim=2)
    members = maxima.topk(k, dim=1, sorted=False).indices
    columns = (members[:, :, None] * GROUP + torch.arange(GROUP, device=members.device)).flatten(1)
    values, places = similarities.gather(1, columns).topk(k, dim=1)
    return values, columns.gather(1, places)


@torch.no_grad()
def nearest_neighbors(
    features: Tensor,
    k: int,
    *,
    include_self: bool,
    scale_rank: int = 0,
    block_bytes: int = BLOCK_BYTES,
) -> Neighbors:
    """The exact k nearest neighbours of every row among all rows, by blocks.

    Args:
        features: N x D unit vectors (float32), on any device.
        k: neighbours per row, at most N (N - 1 without the row itself).
        include_self: put each row first among its own neighbours, whatever duplicates there are;
            otherwise it is left out.
        scale_rank: also report the cosine of this neighbour (1-based, the row itself not counted).
        block_bytes: bound of the similarities in memory.

    Raises:
        ValueError: for fewer than two rows, or no neighbour.
    """
    n = len(features)
    if n < 2:
        raise ValueError(f"a graph needs two images at least, not {n}")
    if k < 1:
        raise ValueError(f"a graph needs one neighbour per image at least, not {k}")
    k = min(k, n if include_self else n - 1)
    rank = min(scale_rank, n - 1)
    # padded to whole groups: rows of -inf similarity that no row ever picks
    padding = -n % GROUP
    columns = torch.nn.functional.pad(features, (0, 0, 0, padding)).T.contiguous()
    indexes, values, scales = [], [], []
    rows_at_once = max(1, block_bytes // (4 * (n + padding)))
    own = 2.0 if include_self else -torch.inf  # 2 is above every cosine
    with tqdm(total=n, desc="neighbours", unit="img", leave=False, disable=None) as bar:
        for start in range(0, n, rows_at_once):
            block = features[start : start + rows_at_once] @ columns
            block[:, n:] = -torch.inf
            diagonal = torch.arange(len(block), device=block.device)
            block[diagonal, diagonal + start] = own
            top, places = _top_k(block, max(k, rank + include_self))
            if rank:
                scales.append(top[:, rank - 1 + include_self].cpu())
            top, places = top[:, :k], places[:, :k]
            if include_self:
                top[:, 0] = 1.0
            values.append(top.clamp(-1, 1).cpu())
            indexes.append(places.cpu())
            bar.update(len(block))
    return Neighbors(
        torch.cat(indexes), torch.cat(values), torch.cat(scales) if scales else torch.empty(0)
    )


def affinity(neighbors: Neighbors, preset: GraphPreset) -> sp.csr_matrix:
    """Symmetric N x N affinity matrix in CSR format, float32, with at most 2 N K entries."""
    n, k = neighbors.indexes.shape
    distances = (1 - neighbors.similarities.numpy()) / 2
    if preset.scale is None:
        scale = (1 - neighbors.scale_similarities.numpy()[:, None]) / 2
    else:
        scale = np.float32(preset.scale)
    # where even the scale's own neighbour is a duplicate, all distances are about 0 and all weights 1
    weights = np.exp(-preset.factor * distances / np.maximum(scale, LEAST_SCALE))
    pointers = np.arange(0, n * k + 1, k)
    directed = sp.csr_matrix(
        (weights.ravel().astype(np.float32), neighbors.indexes.numpy().ravel(), pointers), (n, n)
    )
    if preset.symmetrize == "max":
        graph = directed.maximum(directed.T).tocsr()
    elif preset.symmetrize == "mean":
        graph = ((directed + directed.T) * np.float32(0.5)).tocsr()
    else:
        raise ValueError(f"unknown symmetrisation {preset.symmetrize!r}: take mean or max")
    graph.eliminate_zeros()  # a weight that underflowed is no edge
    return graph


def build_graph(
    features: Tensor, preset: str | GraphPreset = "cifar", *, num_neighbors: int | None = None
) -> sp.csr_matrix:
    """Features (N x D unit vectors) -> symmetric sparse affinity matrix.

    Args:
        preset: a name in `PRESETS`, or choices of your own.
        num_neighbors: replaces the preset's K (and the rank of its scale, where that is K).

    Raises:
        ValueError: for an unknown preset, fewer than two images, or no neighbour.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"unknown graph {preset!r}: take one of {', '.join(PRESETS)}")
        preset = PRESETS[preset]
    if num_neighbors is not None:
        rank = num_neighbors if preset.scale_rank == preset.num_neighbors else preset.scale_rank
        preset = replace(preset, num_neighbors=num_neighbors, scale_rank=rank)
    found = nearest_neighbors(
        features,
        preset.num_neighbors,
        include_self=preset.include_self,
        scale_rank=preset.scale_rank,
    )
    return affinity(found, preset)
