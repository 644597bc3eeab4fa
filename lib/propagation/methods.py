"""Label propagation by the name of a method: one algorithm, the best one, or several together."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lib.labels.split import Split
from lib.propagation.algorithms import ALGORITHMS, EmbeddingGraph, check_parameters, run_algorithm
from lib.propagation.checks import Labeling
from lib.propagation.choose import LEAST_HELD_OUT, average, choose, committee, cross_validate

METHODS = (*ALGORITHMS, "auto", "ensemble")


@dataclass(frozen=True)
class Propagation:
    """What a method says of every image.

    Attributes:
        scores: N x C logits, for `lib.labels.pseudo_labels.from_scores`: softmax makes probabilities of them.
        confidence: the measure published for the method, a key of `lib.labels.pseudo_labels.CONFIDENCES`.
        meta: the method and what it chose, plain types.
    """

    scores: Tensor
    confidence: str
    meta: dict[str, Any] = field(default_factory=dict)


def propagate(
    metric: EmbeddingGraph,
    method: str,
    split: Split,
    labels: Tensor,
    num_classes: int,
    *,
    class_prior: Tensor | Sequence[float] | None = None,
    **parameters: Any,
) -> Propagation:
    """Scores of every image from the labeled ones.

    Args:
        metric: features and graph; hand the same one in for every method and number of labels.
        method: one of `METHODS`. `auto` is the candidate that cross-validation on the labeled images
            prefers, `ensemble` the mean of the calibrated probabilities of the best three algorithms.
        split: which images are labeled.
        labels: their L class numbers; no other label is ever read.
        num_classes: C.
        class_prior: C shares that the predicted classes shall take up.
        parameters: of the algorithm; for `auto` and `ensemble` those of `cross_validate`.

    Raises:
        ValueError: for an unknown method or parameter, or labels that do not fit.
    """
    labeling = Labeling(split.labeled, labels)
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: take one of {', '.join(METHODS)}")
    if method in ALGORITHMS:
        scores = run_algorithm(
            metric, method, [labeling], num_classes, class_prior=class_prior, **parameters
        )[0]
        return Propagation(scores, ALGORITHMS[method].confidence, {"method": method, **parameters})
    check_parameters(method, cross_validate, parameters)
    common = {"class_prior": class_prior, **parameters}
    if method == "auto":
        common.setdefault("least_held_out", LEAST_HELD_OUT)
    verdicts = cross_validate(metric, labeling, num_classes, **common)
    chosen = [choose(verdicts)] if method == "auto" else committee(verdicts)
    answers = [
        run_algorithm(
            metric,
            verdict.candidate.method,
            [labeling],
            num_classes,
            class_prior=class_prior,
            **verdict.candidate.parameters,
        )[0]
        for verdict in chosen
    ]
    temperatures = [verdict.temperature for verdict in chosen]
    scores = answers[0] / temperatures[0] if method == "auto" else average(answers, temperatures)
    meta = {"method": method, "chosen": [str(verdict.candidate) for verdict in chosen]}
    return Propagation(scores, "margin", meta)


__all__ = ["METHODS", "EmbeddingGraph", "Labeling", "Propagation", "propagate"]
