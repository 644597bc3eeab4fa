"""Which images to label, found from their features: for a first round without labels, and for later ones.

Below some tens of labels this choice is worth more than any loss. Only `stratified` sees a true label.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from datasets.images import UNKNOWN
from lib.graph.neighbors import nearest_neighbors
from lib.labels.split import labeled_split, others
from lib.runtime.distributed import progress_bar
from lib.runtime.seeding import generator

METHODS = ("maxherding", "typiclust", "random", "stratified")
# images that herding covers, and chooses from: drawn, where there are more; 400 MB
COVERED = 10_000
MOST_HERDED = 20_000  # images that it may choose, as it compares all pairs
ROWS = 1024  # rows of the kernel worked on at a time
CLUSTERED = 20_000  # images that k-means sees: drawn, where there are more
MOST_NEIGHBORS = 20  # of the typicality
MOST_CLUSTERS = 500  # TypiClust's own bound
KMEANS_STARTS, KMEANS_ROUNDS, KMEANS_TRIALS = 3, 20, 8


def choose(
    method: str,
    features: Tensor,
    budget: int,
    *,
    targets: Tensor,
    num_classes: int,
    labeled: Tensor | None = None,
    weights: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Choose `budget` images that are not among the `labeled` ones, by one of `METHODS`, most useful first.

    `maxherding` alone looks at the `weights`. `stratified` alone looks at the N `targets`: it takes equally
    many images of each class, which nobody can who does not know them, and is there to compare with.

    Raises:
        ValueError: if there are not that many images without a label.
    """
    labeled = _known(labeled)
    if method == "maxherding":
        return max_herding(features, budget, labeled=labeled, weights=weights, seed=seed)
    if method == "typiclust":
        return typiclust(features, budget, labeled=labeled, seed=seed)
    if method == "random":
        return _drawn(_others(len(features), labeled, budget), budget, seed)
    hidden = targets.clone()
    hidden[labeled] = UNKNOWN
    found = labeled_split(hidden, budget, num_classes, seed).labeled
    return found.view(num_classes, -1).T.flatten()  # so that every beginning holds all classes


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
    argmax_x sum_n w_n max(k(n, x) - m_n, 0). A choice raises m_n of the images nearest to it alone, about
    N / i of them at the i-th choice, and only their terms are computed anew. Of more than `COVERED` images
    without a label a sample is covered and chosen from.

    Args:
        features: N x D unit vectors, on any device.
        budget: number of images to choose.
        labeled: images that are covered already, and are not chosen.
        weights: N numbers, not negative: how much an image needs to be covered (None: all the same).
            UHerding (Bae et al. 2025, arXiv 2412.20644) takes the uncertainty of a classifier.
        seed: seed of the sample.

    Returns:
        `budget` indexes, int64 on the CPU, the most useful image first.

    Raises:
        ValueError: if there are not that many images without a label, or `MOST_HERDED` are not enough.
    """
    if budget > MOST_HERDED:
        raise ValueError(
            f"maxherding chooses {MOST_HERDED:,} images at most, not {budget:,}: take random"
        )
    labeled = _known(labeled)
    free = _others(len(features), labeled, budget)
    rows = _drawn(free, max(COVERED, budget), seed).sort().values
    points = features[rows.to(features.device)]
    needs = torch.ones(len(rows), device=points.device)
    if weights is not None:
        needs = weights[rows.to(weights.device)].to(points)
    covered = torch.zeros_like(needs)
    for own in labeled.to(features.device).split(ROWS) if len(labeled) else ():
        covered = torch.maximum(covered, _kernel(features[own], points).amax(dim=0))

    kernel = torch.empty(len(points), len(points), device=points.device)
    for start in range(0, len(points), ROWS):
        kernel[start : start + ROWS] = _kernel(points[start : start + ROWS], points)
    everywhere = torch.arange(len(points), device=points.device)
    gains = _gains(kernel, everywhere, needs, covered, torch.ones_like(covered))
    chosen: list[int] = []
    for _ in progress_bar(iterable=range(budget), desc="choosing", unit="img"):
        best = int(gains.argmax())
        chosen.append(best)
        now = torch.maximum(covered, kernel[best])
        gains -= _gains(kernel, (now > covered).nonzero()[:, 0], needs, covered, now)
        gains[best] = -math.inf
        covered = now
    return rows[torch.tensor(chosen)]


def _kernel(queries: Tensor, points: Tensor) -> Tensor:
    """Compute exp(-|x - y|^2) of unit vectors: Q x M."""
    return (queries @ points.T).sub_(1).mul_(2).exp_()


def _gains(kernel: Tensor, rows: Tensor, needs: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Compute sum_n w_n min(max(k(n, x) - low_n, 0), high_n - low_n) over some rows n, for every x."""
    total = torch.zeros(len(kernel), dtype=torch.float64, device=kernel.device)
    for n in rows.split(ROWS):
        rises = kernel[n].sub_(low[n, None]).clamp_min_(0).minimum((high - low)[n, None])
        total += needs[n] @ rises
    return total


def typiclust(
    features: Tensor, budget: int, *, labeled: Tensor | None = None, seed: int = 0
) -> Tensor:
    """Choose the most typical image of each cluster (TypiClust, Hacohen et al. 2022, arXiv 2202.02794).

    k-means makes as many clusters as there are labeled and chosen images, `MOST_CLUSTERS` at most. From the
    largest one without a labeled image on, the image with the smallest mean distance to its
    min(20, size / 2) nearest neighbors in the cluster is taken; then comes the next round of clusters.

    Arguments, result and errors are those of `max_herding`.
    """
    labeled = _known(labeled)
    free = _others(len(features), labeled, budget)
    rows = torch.cat([labeled, _drawn(free, max(CLUSTERED, budget), seed)])
    points = features[rows.to(features.device)]
    num_clusters = min(len(labeled) + budget, MOST_CLUSTERS)
    cluster = _clusters(points, num_clusters, seed)
    taken = torch.zeros(len(rows), dtype=torch.bool)
    taken[: len(labeled)] = True
    chosen: list[int] = []
    for _ in progress_bar(iterable=range(budget), desc="choosing", unit="img"):
        sizes = torch.bincount(cluster[~taken], minlength=num_clusters).tolist()
        held = torch.bincount(cluster[taken], minlength=num_clusters).tolist()
        # the fewest chosen so far first, of these the largest
        largest = min(
            (c for c in range(num_clusters) if sizes[c]), key=lambda c: (held[c], -sizes[c])
        )
        members = ((cluster == largest) & ~taken).nonzero()[:, 0]
        best = members[_most_typical(points[members.to(points.device)])]
        taken[best] = True
        chosen.append(int(rows[best]))
    return torch.tensor(chosen)


def _clusters(points: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Find the cluster of each point by spherical k-means, the best of `KMEANS_STARTS` starts."""
    found = []
    for start in range(KMEANS_STARTS):
        centroids = _far_points(points, num_clusters, generator(seed, "sample", 1, start))
        for _ in range(KMEANS_ROUNDS):
            nearest = _nearest(points, centroids)[1]
            sums = torch.zeros_like(centroids).index_add_(0, nearest, points)
            full = sums.norm(dim=1) > 0  # a cluster that lost all its points keeps its centroid
            centroids[full] = normalize(sums[full])
        cosines, nearest = _nearest(points, centroids)
        found.append((float(cosines.sum(dtype=torch.float64)), nearest.cpu()))
    return max(found, key=lambda pair: pair[0])[1]


def _far_points(points: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Draw centroids to start from, the far points more often: greedy k-means++."""
    chosen = points[torch.randint(len(points), (1,), generator=rng).to(points.device)]
    farness = 1 - points @ chosen[0]
    while len(chosen) < count:
        # where all points are chosen already, any may come again
        odds = farness.clamp_min(1e-12).cpu()
        drawn = points[
            torch.multinomial(odds, KMEANS_TRIALS, True, generator=rng).to(points.device)
        ]
        left = torch.minimum(farness[:, None], 1 - points @ drawn.T)
        best = int(left.sum(dim=0).argmin())
        chosen, farness = torch.cat([chosen, drawn[best : best + 1]]), left[:, best]
    return chosen


def _nearest(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Find the cosine and the number of the nearest centroid of each point."""
    parts = [(rows @ centroids.T).max(dim=1) for rows in points.split(ROWS)]
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


def _most_typical(points: Tensor) -> int:
    if len(points) < 3:
        return 0
    k = min(MOST_NEIGHBORS, len(points) // 2)
    found = nearest_neighbors(points, k, include_self=False)
    distances = (2 - 2 * found.similarities).clamp_min(0).sqrt()
    return int(distances.mean(dim=1).argmin())


def _known(labeled: Tensor | None) -> Tensor:
    return torch.empty(0, dtype=torch.int64) if labeled is None else labeled.cpu()


def _others(num_images: int, labeled: Tensor, budget: int) -> Tensor:
    """Return the indexes that are not among `labeled`; ValueError if they are fewer than the budget."""
    free = others(num_images, labeled)
    if not 1 <= budget <= len(free):
        raise ValueError(f"{budget} images to choose among {len(free)} without a label")
    return free


def _drawn(indexes: Tensor, count: int, seed: int) -> Tensor:
    order = torch.randperm(len(indexes), generator=generator(seed, "sample"))
    return indexes[order[:count]]
