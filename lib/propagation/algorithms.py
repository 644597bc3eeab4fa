"""Every algorithm by its name, on what all of them share: features, their graph and its spectrum."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import scipy.sparse as sp
import torch
from torch import Tensor

from lib.graph.affinity import GraphPreset, build_graph
from lib.graph.cells import near_order
from lib.graph.filters import (
    GraphOperator,
    Seeds,
    check_filter,
    filter_by_eigenvectors,
    filter_each,
    graph_operator,
)
from lib.graph.knn import classify
from lib.graph.neighbors import nearest_neighbors
from lib.graph.spectral import (
    Operator,
    Spectrum,
    csr_operator,
    laplacian_spectrum,
    normalized_affinity,
    reordered,
    reordered_operator,
    self_loop_choice,
)
from lib.propagation.cache import GraphCache, load_or_compute_spectrum
from lib.propagation.checks import Labeling
from lib.propagation.diffusion import propagate_poissons, propagate_spreadings
from lib.propagation.knn import MAX_NEIGHBORS, propagate_knn
from lib.propagation.normalized_cut import propagate_filters, propagate_normalized_cut
from lib.propagation.priors import match_prior
from lib.propagation.workers import Workers

NUM_EIGENVECTORS = 200  # published, the constant one included
FILTER_BY = ("auto", "products", "eigenvectors")
SPECTRUM_PRODUCTS = 50  # products with one column that an eigenvector costs, about; measured
MUCH_CHEAPER = 4  # times, so that trying is cheap where the eigenvectors do not do
EXACT_ENOUGH = 0.01  # share of a column that may be left out
SORTED_FROM = 200_000  # images from which products are made in an order of their own, on a CPU
ROWS = 8192  # worked on at a time where a copy of all scores would not fit
LEAST_PROBABILITY = 1e-6  # of a class whose score is 0, so that its logarithm is finite


@dataclass(frozen=True)
class EmbeddingGraph:
    """Features, and what is built from them: each once, however many algorithms and label counts ask.

    Attributes:
        features: N x D unit vectors, on the device of the work.
        graph: preset of the affinity matrix, see `lib.graph.affinity.build_graph`.
        num_neighbors: replaces the preset's.
        self_loops: a key of `lib.graph.spectral.SELF_LOOPS`.
        given: an affinity matrix made before, in place of a new one.
        search: options of `lib.graph.neighbors.nearest_neighbors`: `method`, `precision`, `block_bytes`.
        solver: of the eigenvectors: `solver`, `basis_bytes` of `lib.graph.spectral.laplacian_spectrum`.
        cache: files that graph and spectrum are kept in.
        workers: processes that share the work; None for this one alone.
    """

    features: Tensor
    graph: str | GraphPreset = "cifar"
    num_neighbors: int | None = None
    self_loops: str = "published"
    given: sp.csr_matrix | None = None
    search: Mapping[str, Any] = field(default_factory=dict)
    solver: Mapping[str, Any] = field(default_factory=dict)
    cache: GraphCache = field(default_factory=GraphCache)
    workers: Workers | None = None
    _largest: list[tuple[int, Spectrum]] = field(default_factory=list, repr=False, compare=False)

    @cached_property
    def affinity(self) -> sp.csr_matrix:
        """N x N affinity matrix."""
        if self.given is not None:
            return self.given
        return build_graph(
            self.features,
            self.graph,
            num_neighbors=self.num_neighbors,
            **self.search,
            path=self.cache.file("graph", self.features),
            reuse=self.cache.reuse,
            log=self.cache.log,
            search=self.workers.nearest_neighbors if self.workers else nearest_neighbors,
        )

    @cached_property
    def product(self) -> Operator:
        """Products with S = D^-1/2 W D^-1/2, for the filters and the eigenvectors."""
        in_laplacian, _ = self_loop_choice(self.self_loops)
        s = normalized_affinity(self.affinity, self_loops=in_laplacian)
        divide = self.workers.divide if self.workers else csr_operator
        if len(self.features) < SORTED_FROM or self.features.device.type != "cpu":
            return divide(s, self.features.device)
        order = near_order(self.features)  # neighbors' rows of x are then in the cache already
        return reordered_operator(divide(reordered(s, order.numpy()), "cpu"), order)

    @property
    def _shared(self) -> dict[str, Any]:
        product, device = self.product, self.features.device
        return {"self_loops": self.self_loops, "product": product, "device": device}

    @cached_property
    def operator(self) -> GraphOperator:
        """What the filters work on."""
        return graph_operator(self.affinity, **self._shared)

    def spectrum(self, num_vectors: int) -> Spectrum:
        """The first `num_vectors` eigenvectors: cut from those computed before, where they suffice."""
        # compared with what was asked for: the solver may have found fewer, and there are no more
        if not self._largest or self._largest[0][0] < num_vectors:
            path = self.cache.file("spectrum", self.features)
            key = {"self_loops": self.self_loops, **self.solver}
            compute = partial(self._compute_spectrum, num_vectors)
            found = load_or_compute_spectrum(
                self.cache, path, compute, self.affinity, num_vectors, **key
            )
            self._largest[:] = [(num_vectors, found)]
        whole = self._largest[0][1]
        return replace(
            whole, values=whole.values[:num_vectors], vectors=whole.vectors[:, :num_vectors]
        )

    def _compute_spectrum(self, num_vectors: int) -> Spectrum:
        return laplacian_spectrum(self.affinity, num_vectors, **self._shared, **self.solver)

    def votes(self, *labeled: Any, **options: Any) -> Tensor:
        """`lib.graph.knn.classify` of every image, or what does the same in several processes."""
        return (self.workers.classify if self.workers else classify)(*labeled, **options)


Labelings = Sequence[Labeling]


def log_shares(scores: Tensor) -> Tensor:
    """Non-negative scores, N x C, become the logarithms of their shares of the row, finite. In place.

    As Iscen et al. 2019 normalize the rows of label spreading. A row of zeros becomes uniform.
    """
    num_classes = scores.shape[1]
    for rows in scores.split(ROWS):
        sums = rows.sum(dim=1, keepdim=True)
        shares = torch.where(sums > 0, rows / sums.clamp_min(1e-37), 1 / num_classes)
        rows.copy_(((1 - num_classes * LEAST_PROBABILITY) * shares + LEAST_PROBABILITY).log())
    return scores


def _knn(
    metric: EmbeddingGraph,
    labelings: Labelings,
    num_classes: int,
    *,
    k: int = MAX_NEIGHBORS,
    temperature: float = 0.1,
) -> list[Tensor]:
    options = {"k": k, "temperature": temperature, "vote": metric.votes}
    return [
        log_shares(propagate_knn(metric.features, *one, num_classes, **options).cpu())
        for one in labelings
    ]


def _nc(
    metric: EmbeddingGraph,
    labelings: Labelings,
    num_classes: int,
    *,
    num_eigenvectors: int = NUM_EIGENVECTORS,
    clamp: bool = False,
) -> list[Tensor]:
    _check_num_eigenvectors(num_eigenvectors)
    spectrum = metric.spectrum(num_eigenvectors - 1)
    return [propagate_normalized_cut(spectrum, *one, num_classes, clamp=clamp) for one in labelings]


def _filter(
    metric: EmbeddingGraph,
    labelings: Labelings,
    num_classes: int,
    *,
    filter: str = "smoothed-step",
    filter_by: str = "products",
    num_eigenvectors: int = NUM_EIGENVECTORS,
    **parameters: float,
) -> list[Tensor]:
    """A filter of the family, by products with S or through eigenvectors.

    Products cost the same whatever the spectrum, and in proportion to the number of classes; eigenvectors
    cost the same for any number of classes, but hold the part of the answer before the last of them only.
    The smoothed step at 0.2 on N = 20,000 of `scripts/benchmark_propagation.py`'s mixture, one busy core,
    199 eigenvectors (their time in brackets), and the images that get the same label either way:

        classes    products    eigenvectors    same labels    left out, bound
             10      0.7 s     0.1 s (+ 7.5)        100.0%              0.06%
            100      1.8 s     0.1 s (+ 3.0)         99.9%              1.5%
           1000     28.8 s     1.6 s (+ 6.2)         93.6%              9.0%

    Where eigenvectors are cheaper, 199 of them are not the same mathematics. So "auto" takes them only where
    they are much cheaper *and* the bound of what they leave out is small, and it is not the default.
    """
    _check_num_eigenvectors(num_eigenvectors)
    if filter_by not in FILTER_BY:
        raise ValueError(f"unknown way {filter_by!r} to filter: take one of {', '.join(FILTER_BY)}")
    columns, apply = len(labelings) * num_classes, filter_each
    work = columns * check_filter(filter, **parameters).products(**parameters)
    if filter_by == "eigenvectors":
        apply = partial(_by_eigenvectors, metric, num_eigenvectors, torch.inf)
    elif filter_by == "auto" and work > MUCH_CHEAPER * SPECTRUM_PRODUCTS * num_eigenvectors:
        apply = partial(_by_eigenvectors, metric, num_eigenvectors, EXACT_ENOUGH)
    return propagate_filters(
        metric.operator, labelings, num_classes, filter=filter, apply=apply, **parameters
    )


def _check_num_eigenvectors(num_eigenvectors: int) -> None:
    if num_eigenvectors < 2:
        raise ValueError(f"{num_eigenvectors} eigenvectors: the first is constant, give 2 at least")


def _by_eigenvectors(
    metric: EmbeddingGraph,
    num_eigenvectors: int,
    tolerance: float,
    operator: GraphOperator,
    seeds: Sequence[Seeds],
    name: str,
    **parameters: float,
) -> list[Tensor]:
    """`filter_each` through eigenvectors, if they leave out no more than `tolerance` of any column."""
    spectrum = metric.spectrum(num_eigenvectors - 1)
    answers, bound = filter_by_eigenvectors(spectrum, seeds, name, **parameters)
    if bound <= tolerance:
        return answers
    metric.cache.log(
        f"{num_eigenvectors} eigenvectors may leave out {bound:.0%} of a column: by products instead"
    )
    return filter_each(operator, seeds, name, **parameters)


def _spreading(
    metric: EmbeddingGraph, labelings: Labelings, num_classes: int, *, alpha: float = 0.99
) -> list[Tensor]:
    scores = propagate_spreadings(metric.operator, labelings, num_classes, alpha=alpha)
    return [log_shares(one) for one in scores]


def _poisson(metric: EmbeddingGraph, labelings: Labelings, num_classes: int) -> list[Tensor]:
    return propagate_poissons(metric.operator, labelings, num_classes)


@dataclass(frozen=True)
class Algorithm:
    """How to run an algorithm.

    Attributes:
        run: (metric, labelings, num_classes, its own parameters) -> for each labelling N x C logits:
            their softmax are probabilities, and all are equal where no label reaches.
        confidence: published measure, a key of `lib.labels.pseudo_labels.CONFIDENCES`.
        class_prior: whether predicted class sizes are matched to equal ones where none are given.
        needs_graph: whether more counts than the distances to the labeled images.
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
    metric: EmbeddingGraph,
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
        labelings: labeled images and their classes, one pair for each answer.
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
    check_parameters(method, algorithm.run, parameters)
    answers = algorithm.run(metric, labelings, num_classes, **parameters)
    if class_prior is None and not algorithm.class_prior:
        return answers
    return [
        match_prior(logits, class_prior, others(len(logits), labeled))
        for logits, (labeled, _) in zip(answers, labelings, strict=True)
    ]


def check_parameters(method: str, run: Callable[..., Any], parameters: Mapping[str, Any]) -> None:
    """Raise ValueError naming the `parameters` that are no keywords of `run`, or not of its filter."""
    known = inspect.signature(run).parameters
    accepts_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    strange = [name for name in parameters if name not in known and not accepts_any]
    if strange:
        raise ValueError(f"{method} has no parameter {', '.join(strange)}")
    if run is _filter:
        own = {name: value for name, value in parameters.items() if name not in known}
        check_filter(parameters.get("filter", known["filter"].default), **own)


def others(num_images: int, labeled: Tensor) -> Tensor:
    """Indexes of the images that are not among `labeled`."""
    unlabeled = torch.ones(num_images, dtype=torch.bool)
    unlabeled[labeled] = False
    return unlabeled.nonzero()[:, 0]
