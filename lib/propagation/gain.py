"""What pseudo-labels would gain a classifier, by cross-validation on the labeled images alone.

A linear classifier on the features stands for the one of phase 3. It is trained on the labels that are not
held out and on the most confident share of the pseudo-labels that these labels give, and tested on the labels
that are. The share 0 is the labels alone: where the metric is poor, no other one is better.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax
from torch import Tensor

from lib.labels.gain import Gain
from lib.labels.pseudo_labels import PseudoLabels, most_confident
from lib.labels.split import Split, others
from lib.propagation.choose import make_folds
from lib.propagation.embedding_graph import EmbeddingGraph
from lib.propagation.methods import propagate

RATIOS = (0.0, 0.1, 0.2, 0.5, 1.0)
LABELED_SHARE = 0.5  # of the weight of all images, if there are pseudo-labels
PENALTY = 1e-3  # on the squared coefficients
STEPS = 100  # of L-BFGS, at most
MOST = 10_000  # pseudo-labels that are learned, evenly from the ranking
LEAST = 1e-6  # of what is divided by


def estimate_gain(
    graph: EmbeddingGraph,
    method: str,
    split: Split,
    labels: Tensor,
    num_classes: int,
    *,
    ratios: Sequence[float] = RATIOS,
    confidence: str | None = None,
    temperature: float = 1.0,
    calibration: float | None = None,
    seed: int = 0,
    **options: Any,
) -> Gain:
    """Measure each share of the pseudo-labels that `propagate` makes with the same arguments.

    Shares are taken of each pseudo-class, and pseudo-labels count by their probabilities, both with
    `confidence`, `temperature` and `calibration` as in `Propagation.pseudo_labels`.
    """
    ranked = {"confidence": confidence, "temperature": temperature, "calibration": calibration}
    held = make_folds(labels, seed)
    right = dict.fromkeys((0.0, *ratios), 0.0)
    for out in held:
        keep = others(len(labels), out)
        fold = Split(split.labeled[keep], others(len(graph), split.labeled))
        answer = propagate(graph, method, fold, labels[keep], num_classes, **options)
        pseudo = answer.pseudo_labels(fold, probabilities=False, **ranked)
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
    center, scale = features.mean(dim=0), features.var(dim=0).mean().sqrt().clamp_min(LEAST)
    for ratio in ratios:
        (best,) = most_confident([pseudo], ratio, class_balanced=True)
        if len(best) > MOST:
            best = best[torch.linspace(0, len(best) - 1, MOST).long()]
        rows = torch.cat([pseudo.labeled, pseudo.indexes[best]])
        classes = torch.cat([labels, pseudo.labels[best]])
        true = _share(ones) * (LABELED_SHARE / (1 - LABELED_SHARE))
        weights = torch.cat([true, _share(pseudo.largest[best, 1])])
        train, tested = (
            ((features[x.to(center.device)] - center) / scale).cpu().double().numpy()
            for x in (rows, test)
        )
        given = classes.numpy(), _share(weights).double().numpy()
        found[ratio] = torch.from_numpy(logistic_regression(train, *given, num_classes)(tested))
    return found


def logistic_regression(
    points: np.ndarray, classes: np.ndarray, weights: np.ndarray, num_classes: int
) -> Callable[[np.ndarray], np.ndarray]:
    """Fit multinomial logistic regression, and return a function from points to their classes.

    It minimizes the cross-entropy, weighted by numbers whose sum is 1, plus `PENALTY` times the squared
    coefficients without those of the constant.
    """
    columns, places = np.column_stack([np.ones(len(points)), points]), np.arange(len(points))

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        coefficients = flat.reshape(-1, num_classes)
        log_p = log_softmax(columns @ coefficients, axis=1)
        penalized = coefficients.copy()
        penalized[0] = 0
        value = PENALTY * np.square(penalized).sum() - weights @ log_p[places, classes]
        errors = np.exp(log_p)
        errors[places, classes] -= 1
        slope = columns.T @ (errors * weights[:, None]) + 2 * PENALTY * penalized
        return value, slope.ravel()

    start = np.zeros(columns.shape[1] * num_classes)
    options = {"maxiter": STEPS}
    best = minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x
    constant, coefficients = np.split(best.reshape(-1, num_classes), [1])
    return lambda x: (x @ coefficients + constant).argmax(axis=1)


def _share(weights: Tensor) -> Tensor:
    return weights / weights.sum().clamp_min(LEAST)
