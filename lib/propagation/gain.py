"""What pseudo-labels would gain a classifier, by cross-validation on the labeled images alone.

A linear classifier on the features stands for the one of phase 3. It is trained on the labels that are not
held out and on the most confident share of the pseudo-labels that these labels give, and tested on the labels
that are. The share 0 is the labels alone: where the metric is poor, no other one is better.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lib.labels.confidence import from_scores
from lib.labels.gain import Gain
from lib.labels.pseudo_labels import PseudoLabels, most_confident
from lib.labels.split import Split, others
from lib.propagation.choose import make_folds
from lib.propagation.embedding_graph import EmbeddingGraph
from lib.propagation.methods import propagate

RATIOS = (0.0, 0.1, 0.2, 0.5, 1.0)
LABELED_SHARE = 0.5  # of the weight of all images, if there are pseudo-labels
RIDGE = 0.01  # penalty on the squared weights, relative to the weight of all images


def estimate_gain(
    graph: EmbeddingGraph,
    method: str,
    split: Split,
    labels: Tensor,
    num_classes: int,
    *,
    ratios: Sequence[float] = RATIOS,
    confidence: str | None = None,
    calibration: float | None = None,
    seed: int = 0,
    **options: Any,
) -> Gain:
    """Measure each share of the pseudo-labels that `propagate` makes with the same arguments.

    Shares are taken of each pseudo-class, ranked by `confidence`, and pseudo-labels count by their
    probabilities at the temperature `calibration`.
    """
    held = make_folds(labels, seed)
    right = dict.fromkeys((0.0, *ratios), 0.0)
    for out in held:
        keep = others(len(labels), out)
        fold = Split(split.labeled[keep], others(len(graph), split.labeled))
        answer = propagate(graph, method, fold, labels[keep], num_classes, **options)
        ranked = {"confidence": confidence or answer.confidence, "calibration": calibration or 1.0}
        pseudo = from_scores(answer.scores, fold, probabilities=False, **ranked)
        test = split.labeled[out]
        answers = classify(graph.features, pseudo, labels[keep], test, num_classes, right)
        for ratio, found in answers.items():
            right[ratio] += float((found == labels[out]).sum())
    count = sum(map(len, held))
    if not count:
        return Gain({}, 0)
    accuracy = {ratio: 100 * hits / count for ratio, hits in right.items()}
    return Gain(accuracy, len(torch.cat(held).unique()))


def classify(
    features: Tensor,
    pseudo: PseudoLabels,
    labels: Tensor,
    test: Tensor,
    num_classes: int,
    ratios: Iterable[float],
) -> dict[float, Tensor]:
    """Train the linear classifier on each share of the pseudo-labels, and predict the images `test`.

    `labels` are those of the labeled images of `pseudo`, whose `largest` are known.
    """
    assert pseudo.largest is not None
    found, ones = {}, torch.ones(len(labels))
    for ratio in ratios:
        (best,) = most_confident([pseudo], ratio, class_balanced=True)
        rows = torch.cat([pseudo.labeled, pseudo.indexes[best]])
        classes = torch.cat([labels, pseudo.labels[best]])
        sure = pseudo.largest[best, 1]
        true = _share(ones) * (LABELED_SHARE / (1 - LABELED_SHARE))
        weights = torch.cat([true, _share(sure)])
        found[ratio] = _ridge(features, rows, classes, weights, test, num_classes)
    return found


def _share(weights: Tensor) -> Tensor:
    return weights / weights.sum().clamp_min(1e-6)


def _ridge(
    features: Tensor, rows: Tensor, classes: Tensor, weights: Tensor, test: Tensor, num_classes: int
) -> Tensor:
    """Predict the classes of `test` by weighted ridge regression on the classes of `rows`."""
    device = features.device
    x, y = features[rows.to(device)], one_hot(classes, num_classes).to(device, features.dtype)
    weighted = x * weights.to(device, features.dtype)[:, None]
    penalty = RIDGE * float(weights.sum()) * torch.eye(x.shape[1], device=device)
    solution = torch.linalg.solve(x.T @ weighted + penalty, weighted.T @ y)
    return (features[test.to(device)] @ solution).argmax(dim=1).cpu()
