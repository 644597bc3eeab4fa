"""Label propagation by the name of a method: one algorithm, the best one, or several together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lib.graph.filters import find_filter
from lib.labels.confidence import from_scores
from lib.labels.gain import KEY, Gain
from lib.labels.pseudo_labels import PseudoLabels
from lib.labels.split import Split
from lib.propagation.algorithms import ALGORITHMS, OF_FILTERS, run_algorithm
from lib.propagation.choose import LEAST_HELD_OUT, average, choose, committee, cross_validate
from lib.propagation.embedding_graph import EmbeddingGraph
from lib.propagation.labelings import Labeling
from lib.propagation.normalized_cut import DEFAULT_FILTER

METHODS = (*ALGORITHMS, "auto", "ensemble")
OF_CROSS_VALIDATION = ("candidates", "least_held_out", "seed")


@dataclass(frozen=True)
class Propagation:
    """What a method says of every image."""

    scores: Tensor  # N x C logits, whose softmax are probabilities
    confidence: str = "margin"  # the method's own, a key of `lib.labels.confidence.CONFIDENCES`
    meta: Mapping[str, Any] = field(default_factory=dict)  # the method and what it chose

    def pseudo_labels(
        self,
        split: Split,
        meta: Mapping[str, Any] | None = None,
        *,
        confidence: str | None = None,
        calibration: float | None = None,
        gain: Gain | None = None,
        **options: Any,
    ) -> PseudoLabels:
        """Turn the scores into pseudo-labels of the unlabeled images, as `from_scores` does with `options`.

        `meta` says what made the features; the choices of the method are added to it as `propagation` and
        `confidence`, and, unless they are None, the temperature `calibration` that `calibrate` found and the
        `gain` that `estimate_gain` did.
        """
        confidence = confidence or self.confidence
        meta = {**(meta or {}), "propagation": dict(self.meta), "confidence": confidence}
        if calibration is not None:
            meta["calibration"] = calibration
        if gain is not None:
            meta[KEY] = gain.entry()
        options["calibration"] = calibration or 1.0
        return from_scores(self.scores, split, meta, confidence=confidence, **options)


def check_parameters(method: str, parameters: Mapping[str, Any]) -> None:
    """Raise ValueError for an unknown method, or naming the parameters that it does not have."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: take one of {', '.join(METHODS)}")
    known = ALGORITHMS[method].parameters if method in ALGORITHMS else OF_CROSS_VALIDATION
    strange = [name for name in parameters if name not in known]
    if strange:
        raise ValueError(f"{method} has no parameter {', '.join(strange)}")
    if method == "filter":
        own = {name: value for name, value in parameters.items() if name in OF_FILTERS}
        find_filter(parameters.get("filter", DEFAULT_FILTER), **own)


def propagate(
    graph: EmbeddingGraph,
    method: str,
    split: Split,
    labels: Tensor,
    num_classes: int,
    *,
    class_prior: Tensor | Sequence[float] | None = None,
    **parameters: Any,
) -> Propagation:
    """Spread a few labels to every image.

    Args:
        graph: features and their graph; hand in the same one for every method and number of labels.
        method: one of `METHODS`. `auto` is the candidate that cross-validation on the labeled images
            prefers, `ensemble` the mean of the calibrated probabilities of the best three algorithms.
        split, labels: which images are labeled, and their L class numbers; no other label is ever read.
        class_prior: C shares that the predicted classes shall take up.
        parameters: parameters of the algorithm; for `auto` and `ensemble` those of `cross_validate`.

    Raises:
        ValueError: for an unknown method or parameter, or labels that do not fit.
    """
    check_parameters(method, parameters)
    labeling = Labeling(split.labeled, labels)

    def run(name: str, given: Mapping[str, Any]) -> Tensor:
        return run_algorithm(
            graph, name, [labeling], num_classes, class_prior=class_prior, **given
        )[0]

    if method in ALGORITHMS:
        scores = run(method, parameters)
        return Propagation(scores, ALGORITHMS[method].confidence, {"method": method, **parameters})
    if method == "auto":
        parameters = {"least_held_out": LEAST_HELD_OUT, **parameters}
    verdicts = cross_validate(graph, labeling, num_classes, class_prior=class_prior, **parameters)
    chosen = [choose(verdicts)] if method == "auto" else committee(verdicts)
    answers = [run(v.candidate.method, v.candidate.parameters) for v in chosen]
    temperatures = [verdict.temperature for verdict in chosen]
    scores = answers[0] / temperatures[0] if method == "auto" else average(answers, temperatures)
    meta = {"method": method, "chosen": [str(verdict.candidate) for verdict in chosen]}
    return Propagation(scores, meta=meta)
