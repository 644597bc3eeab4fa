"""Every algorithm by its name, on what all of them share: features, their graph and its spectrum."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import scipy.sparse as sp
import torch
from torch import Tensor

from lib.filters import GraphOperator, graph_operator
from lib.graph import GraphPreset, build_graph
from lib.propagation.checks import Labeling
from lib.propagation.diffusion import propagate_poissons, propagate_spreadings
from lib.propagation.knn import MAX_NEIGHBORS, propagate_knn
from lib.propagation.normalized_cut import propagate_filters, propagate_normalized_cut
from lib.propagation.priors import match_prior
from lib.spectral import Spectrum, laplacian_spectrum

NUM_EIGENVECTORS = 200  # published, the constant one included
LEAST_PROBABILITY = 1e-6  # of a class whose score is 0, so that its logarithm is finite


@dataclass(frozen=True)
class Metric:
    """Features, and what is built from them: each once, however many algorithms and label counts ask.

    Attributes:
        features: N x D unit vectors.
        graph: preset of the affinity matrix, see `lib.graph.build_graph`.
        num_neighbors: replaces the preset's.
        self_loops: a key of `lib.spectral.SELF_LOOPS`.
        given: an affinity matrix made before, in place of a new one.
    """

    features: Tensor
    graph: str | GraphPreset = "cifar"
    num_neighbors: int | None = None
    self_loops: str = "published"
    given: sp.csr_matrix | None = None
    _largest: list[tuple[int, Spectrum]] = field(default_factory=list, repr=False, compare=False)

    @cached_property
    def affinity(self) -> sp.csr_matrix:
        """N x N affinity matrix."""
        if self.given is not None:
            return self.given
        return build_graph(self.features, self.graph, num_neighbors=self.num_neighbors)

    @cached_property
    def operator(self) -> GraphOperator:
        """What the filters work on."""
        return graph_operator(self.affinity, self_loops=self.self_loops)

    def spectrum(self, num_vectors: int) -> Spectrum:
        """The first `num_vectors` eigenvectors: cut from those computed before, where they suffice."""
        # compared with what was asked for: the solver may have found fewer, and there are no more
        if not self._largest or self._largest[0][0] < num_vectors:
            found = laplacian_spectrum(self.affinity, num_vectors, self_loops=self.self_loops)
            self._largest[:] = [(num_vectors, found)]
        whole = self._largest[0][1]
        return replace(
            whole, values=whole.values[:num_vectors], vectors=whole.vectors[:, :num_vectors]
        )


Labelings = Sequence[Labeling]


def log_shares(scores: Tensor) -> Tensor:
    """Logarithms of the rows of non-negative scores, each normalised to sum 1: N x C, finite.

    As Iscen et al. 2019 normalise the rows of label spreading. A row of zeros becomes uniform.
    """
    num_classes = scores.shape[1]
    sums = scores.sum(dim=1, keepdim=True)
    shares = torch.where(sums > 0, scores / sums.clamp_min(1e-37), 1 / num_classes)
    return ((1 - num_classes * LEAST_PROBABILITY) * shares + LEAST_PROBABILITY).log()


def _knn(
    metric: Metric,
    labelings: Labelings,
    num_classes: int,
    *,
    k: int = MAX_NEIGHBORS,
    temperature: float = 0.1,
) -> list[Tensor]:
    return [
        log_shares(
            propagate_knn(metric.features, *one, num_classes, k=k, temperature=temperature).cpu()
        )
        for one in labelings
    ]


def _nc(
    metric: Metric,
    labelings: Labelings,
    num_classes: int,
    *,
    num_eigenvectors: int = NUM_EIGENVECTORS,
    clamp: bool = False,
) -> list[Tensor]:
    if num_eigenvectors < 2:
        raise ValueError(f"{num_eigenvectors} eigenvectors: the first is constant, give 2 at least")
    spectrum = metric.spectrum(num_eigenvectors - 1)
    return [propagate_normalized_cut(spectrum, *one, num_classes, clamp=clamp) for one in labelings]


def _filter(
    metric: Metric,
    labelings: Labelings,
    num_classes: int,
    *,
    filter: str = "smoothed-step",
    **parameters: float,
) -> list[Tensor]:
    return propagate_filters(metric.operator, labelings, num_classes, filter=filter, **parameters)


def _spreading(
    metric: Metric, labelings: Labelings, num_classes: int, *, alpha: float = 0.99
) -> list[Tensor]:
    scores = propagate_spreadings(metric.operator, labelings, num_classes, alpha=alpha)
    return [log_shares(one) for one in scores]


def _poisson(metric: Metric, labelings: Labelings, num_classes: int) -> list[Tensor]:
    return propagate_poissons(metric.operator, labelings, num_classes)


@dataclass(frozen=True)
class Algorithm:
    """How to run an algorithm.

    Attributes:
        run: (metric, labelings, num_classes, its own parameters) -> for each labelling N x C logits:
            their softmax are probabilities, and all are equal where no label reaches.
        confidence: published measure, a key of `lib.pseudo_labels.CONFIDENCES`.
        class_prior: whether predicted class sizes are matched to equal ones where none are given.
        needs_graph: whether more counts than the distances to the labelled images.
    """

    run: Callable[..., list[Tensor]]
    confidence: str
    class_prior: bool = False
    needs_graph: bool = True


ALGORITHMS = {
    "knn": Algorithm(_knn, "largest", needs_graph=False),
    "nc": Algorithm(_nc, "margin"),
    "filter": Algorithm(_filter, "margin"),
    "spreading": Algorithm(_spreading, "entropy"),
    "poisson": Algorithm(_poisson, "margin"),
    "poisson-prior": Algorithm(_poisson, "margin", class_prior=True),
}


def run_algorithm(
    metric: Metric,
    method: str,
    labelings: Labelings,
    num_classes: int,
    *,
    class_prior: Tensor | Sequence[float] | None = None,
    **parameters: Any,
) -> list[Tensor]:
    """Logits of one algorithm for many sets of labels at once, N x C each.

    Args:
        metric: features and graph.
        method: a key of `ALGORITHMS`.
        labelings: labelled images and their classes, one pair for each answer.
        num_classes: C.
        class_prior: C shares that the predicted classes of the images without a label take up; None
            for no constraint (equal ones for `poisson-prior`).
        parameters: of the algorithm.

    Raises:
        ValueError: for an unknown algorithm or parameter, labels that do not fit, or a class without any.
    """
    if method not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {method!r}: take one of {', '.join(ALGORITHMS)}")
    algorithm = ALGORITHMS[method]
    known = inspect.signature(algorithm.run).parameters
    accepts_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    strange = [name for name in parameters if name not in known and not accepts_any]
    if strange:
        raise ValueError(f"{method} has no parameter {', '.join(strange)}")
    answers = algorithm.run(metric, labelings, num_classes, **parameters)
    if class_prior is None and not algorithm.class_prior:
        return answers
    return [
        match_prior(logits, class_prior, others(len(logits), labeled))
        for logits, (labeled, _) in zip(answers, labelings, strict=True)
    ]


def others(num_images: int, labeled: Tensor) -> Tensor:
    """Indexes of the images that are not among `labeled`."""
    unlabeled = torch.ones(num_images, dtype=torch.bool)
    unlabeled[labeled] = False
    return unlabeled.nonzero()[:, 0]
