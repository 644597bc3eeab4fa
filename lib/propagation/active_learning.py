"""Which images to label, found from their features: for a first round without labels, and for later ones.

Below some tens of labels this choice is worth more than any loss. Nothing here sees a true label.
"""

import math
from collections.abc import Callable

import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from lib.graph.neighbors import nearest_neighbors
from lib.runtime.distributed import progress_bar
from lib.runtime.seeding import generator

SAMPLE = 50_000  # images that can be chosen, and images to be covered: drawn, where there are more
CANDIDATES = 512  # whose gains are computed together
MOST_NEIGHBORS = 20  # of the typicality
MOST_CLUSTERS = 500  # TypiClust's own bound
KMEANS_STARTS = 5


def max_herding(
    features: Tensor,
    budget: int,
    *,
    labeled: Tensor | None = None,
    weights: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Choose images that cover all others best (MaxHerding, Bae et al. 2024, arXiv 2407.12212).

    With k(x, y) = exp(-|x - y|^2) and m_n, the largest k of image n to a chosen one, each further image is
    argmax_x sum_n w_n max(k(n, x) - m_n, 0). Gains only fall, so that those computed before bound them from
    above, and few have to be computed anew. Of more than `SAMPLE` images a sample is covered and chosen from.

    Args:
        features: N x D unit vectors, on any device.
        budget: number of images to choose.
        labeled: images that are covered already.
        weights: N numbers, not negative: how much an image needs to be covered (None: all the same).
            UHerding (Bae et al. 2025) takes the uncertainty of a classifier.
        seed: seed of the sample.

    Returns:
        `budget` indexes, int64 on the CPU, the most useful image first.

    Raises:
        ValueError: if there are not that many images without a label.
    """
    labeled = torch.empty(0, dtype=torch.int64) if labeled is None else labeled.cpu()
    free = _without(len(features), labeled)
    _check_budget(budget, free)
    rows = free[torch.randperm(len(free), generator=generator(seed, "sample"))]
    rows = rows[: max(SAMPLE, budget)].sort().values
    points = features[rows.to(features.device)]
    needs = torch.ones(len(rows), device=points.device)
    if weights is not None:
        needs = weights[rows.to(weights.device)].to(points.device).float()
    covered = torch.zeros(len(rows), device=points.device)
    for part in features[labeled.to(features.device)].split(CANDIDATES) if len(labeled) else ():
        covered = torch.maximum(covered, _kernel(part, points).amax(dim=0))

    def gains(candidates: Tensor) -> Tensor:
        rises = (_kernel(points[candidates], points) - covered).clamp_min_(0)
        return (rises * needs).sum(dim=1, dtype=torch.float64)

    bounds = torch.full((len(rows),), math.inf, dtype=torch.float64, device=points.device)
    chosen = []
    with progress_bar(total=budget, desc="choosing", unit="img") as bar:
        for _ in range(budget):
            best = _best(bounds, gains)
            chosen.append(best)
            covered = torch.maximum(covered, _kernel(points[best][None], points)[0])
            bounds[best] = -math.inf
            bar.update(1)
    return rows[torch.tensor(chosen)]


def _kernel(queries: Tensor, points: Tensor) -> Tensor:
    """Compute exp(-|x - y|^2) of unit vectors: Q x M."""
    return (queries @ points.T).sub_(1).mul_(2).exp_()


def _best(bounds: Tensor, gains: Callable[[Tensor], Tensor]) -> int:
    """Find the candidate of largest gain, and put the gains that this takes in the place of their bounds."""
    fresh = torch.zeros_like(bounds, dtype=torch.bool)
    while True:
        candidates = bounds.masked_fill(fresh, -math.inf).topk(min(CANDIDATES, len(bounds))).indices
        bounds[candidates] = torch.where(
            bounds[candidates].isneginf(), bounds[candidates], gains(candidates)
        )
        fresh[candidates] = True
        best = int(bounds.masked_fill(~fresh, -math.inf).argmax())
        rest = bounds.masked_fill(fresh, -math.inf).max()
        if bounds[best] >= rest:
            return best


def typiclust(
    features: Tensor, budget: int, *, labeled: Tensor | None = None, seed: int = 0
) -> Tensor:
    """Choose the most typical image of each cluster (TypiClust, Hacohen et al. 2022, arXiv 2202.02794).

    k-means makes as many clusters as there are labeled and chosen images, `MOST_CLUSTERS` at most. From the
    largest one without a labeled image on, the image with the smallest mean distance to its
    min(20, size / 2) nearest neighbors in the cluster is taken; then comes the next round of clusters.

    Arguments, result and errors are those of `max_herding`.
    """
    labeled = torch.empty(0, dtype=torch.int64) if labeled is None else labeled.cpu()
    free = _without(len(features), labeled)
    _check_budget(budget, free)
    rows = free[torch.randperm(len(free), generator=generator(seed, "sample"))]
    rows = torch.cat([labeled, rows[: max(SAMPLE, budget)]])
    points = features[rows.to(features.device)]
    num_clusters = min(len(labeled) + budget, MOST_CLUSTERS, len(rows))
    cluster = _clusters(points.cpu(), num_clusters, seed)
    taken = torch.zeros(len(rows), dtype=torch.bool)
    taken[: len(labeled)] = True
    chosen = []
    while len(chosen) < budget:
        sizes = torch.bincount(cluster[~taken], minlength=num_clusters)
        held = torch.bincount(cluster[taken], minlength=num_clusters)
        # the fewest chosen so far first, of these the largest
        order = sorted(range(num_clusters), key=lambda c: (int(held[c]), -int(sizes[c])))
        members = next(((cluster == c) & ~taken).nonzero()[:, 0] for c in order if int(sizes[c]))
        best = members[_most_typical(points[members.to(points.device)])]
        taken[best] = True
        chosen.append(int(rows[best]))
    return torch.tensor(chosen)


def _clusters(points: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Find the cluster of each point by k-means, the best of `KMEANS_STARTS` random starts."""
    found = []
    for start in range(KMEANS_STARTS):
        given = points.numpy(), num_clusters
        centroids, cluster = kmeans2(*given, minit="++", seed=seed + start, missing="warn")
        spread = (points - torch.from_numpy(centroids)[cluster]).square().sum()
        found.append((float(spread), torch.from_numpy(cluster).long()))
    return min(found, key=lambda pair: pair[0])[1]


def _most_typical(points: Tensor) -> int:
    if len(points) < 3:
        return 0
    k = min(MOST_NEIGHBORS, len(points) // 2)
    found = nearest_neighbors(points, k, include_self=False)
    distances = (2 - 2 * found.similarities).clamp_min(0).sqrt()
    return int(distances.mean(dim=1).argmin())


def _without(num_images: int, labeled: Tensor) -> Tensor:
    keep = torch.ones(num_images, dtype=torch.bool)
    keep[labeled] = False
    return keep.nonzero()[:, 0]


def _check_budget(budget: int, free: Tensor) -> None:
    if not 1 <= budget <= len(free):
        raise ValueError(f"{budget} images to choose among {len(free)} without a label")
