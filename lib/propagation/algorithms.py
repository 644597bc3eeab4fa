"""Table of the algorithms: the function of each, its parameters and its published confidence."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lib.graph.filters import FILTERS
from lib.labels.split import others
from lib.propagation.diffusion import propagate_poisson, propagate_spreading
from lib.propagation.embedding_graph import EmbeddingGraph
from lib.propagation.knn import propagate_knn
from lib.propagation.labelings import Labeling, check_labels
from lib.propagation.normalized_cut import propagate_filter, propagate_normalized_cut
from lib.propagation.scores import class_shares, match_prior, of_all_classes

OF_FILTERS = tuple(name for found in FILTERS.values() for name in found.parameters)


@dataclass(frozen=True)
class Algorithm:
    """How to run an algorithm."""

    # (graph, labelings, num_classes, its parameters) -> for each labeling N x C logits: their softmax are
    # probabilities, and all are equal where no label reaches.
    propagate: Callable[..., list[Tensor]]
    parameters: tuple[str, ...] = ()
    confidence: str = "margin"  # published measure, a key of `lib.labels.confidence.CONFIDENCES`
    class_prior: bool = False  # whether predicted class sizes are equal where none are given
    needs_graph: bool = True  # whether more counts than the distances to the labeled images
    # Folds of calibration at most: with more, each has nearly all labels, but costs a propagation.
    folds: int = 5


ALGORITHMS = {
    "knn": Algorithm(
        propagate_knn, ("k", "temperature"), confidence="largest", needs_graph=False, folds=10
    ),
    "nc": Algorithm(propagate_normalized_cut, ("num_eigenvectors", "clamp"), folds=10),
    "filter": Algorithm(propagate_filter, ("filter", "filter_by", "num_eigenvectors", *OF_FILTERS)),
    "spreading": Algorithm(propagate_spreading, ("alpha",), confidence="entropy"),
    "poisson": Algorithm(propagate_poisson),
    "poisson-prior": Algorithm(propagate_poisson, class_prior=True),
}


def run_algorithm(
    graph: EmbeddingGraph,
    method: str,
    labelings: Sequence[Labeling],
    num_classes: int,
    *,
    class_prior: Tensor | Sequence[float] | None = None,
    **parameters: Any,
) -> list[Tensor]:
    """Run one algorithm, a key of `ALGORITHMS`, for many sets of labels at once: N x C logits for each.

    They lie on the device of the graph; the labels may lie anywhere. A class without a label is
    `scores.NEVER` for every image, and the others are told apart as if there were no more.

    Args:
        class_prior: C shares that the predicted classes of the images without a label take up, among the
            classes with a label; None for no constraint (equal ones for `poisson-prior`).
        parameters: parameters of the algorithm.

    Raises:
        ValueError: for a parameter out of range, labels that do not fit, or fewer than two classes with a
            label where the algorithm needs two.
    """
    algorithm, device = ALGORITHMS[method], graph.features.device
    labelings = [Labeling(*(x.to(device) for x in labeling)) for labeling in labelings]
    for labeled, labels in labelings:
        check_labels(len(graph), labeled, labels, num_classes)
    present = [labels.unique() for _, labels in labelings]
    classes, options = present[0], {"class_prior": class_prior, **parameters}
    if any(not torch.equal(classes, other) for other in present):
        return [run_algorithm(graph, method, [x], num_classes, **options)[0] for x in labelings]
    if 1 < len(classes) < num_classes:
        narrow = [Labeling(own, torch.searchsorted(classes, y)) for own, y in labelings]
        if class_prior is not None:
            options["class_prior"] = class_shares(class_prior, num_classes)[classes.cpu()]
        answers = run_algorithm(graph, method, narrow, len(classes), **options)
        return [of_all_classes(scores, classes, num_classes) for scores in answers]
    answers = algorithm.propagate(graph, labelings, num_classes, **parameters)
    if class_prior is None and not algorithm.class_prior:
        return answers
    return [
        match_prior(logits, class_prior, others(len(logits), labeled))
        for logits, (labeled, _) in zip(answers, labelings, strict=True)
    ]
