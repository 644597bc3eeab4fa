"""Constrained normalized cut: each class against the rest, in the spectral embedding or by a filter."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lib.graph.filters import LabelVectors, apply_filter, filter_by_eigenvectors, find_filter
from lib.graph.laplacian import GraphOperator
from lib.graph.spectrum import Spectrum
from lib.propagation.embedding_graph import EmbeddingGraph
from lib.propagation.labelings import Labeling, check_every_class, check_labels

NUM_EIGENVECTORS = 200  # published, the constant one included
CLAMP_STRENGTH = 1000.0  # weight of smoothness against clamped constraints, in labels; measured
DEFAULT_FILTER = "smoothed-step"
FILTER_BY = ("auto", "products", "eigenvectors")
SPECTRUM_PRODUCTS = 50  # products with one column that an eigenvector costs, about; measured
MUCH_CHEAPER = 4  # times, so that trying is cheap where the eigenvectors do not do
EXACT_ENOUGH = 0.01  # share of a column that may be left out
ROWS = 8192  # rows finished at a time: a float64 copy of all scores would not fit


def constraint_vectors(
    degrees: Tensor, labeled: Tensor, labels: Tensor, num_classes: int
) -> LabelVectors:
    """Compute the constraint vector s of each class: unit columns, zero outside of the labeled images.

    Class c stands against the other labels. With p the degrees at its labeled images, q those at the other
    labeled images and r = sum(p) / sum(q), s = sqrt(p / r) - sqrt(q r), scaled to norm 1. It is orthogonal
    to sqrt(degree), the solution that separates nothing.

    Returns:
        S at the labeled images, L x C, float64, on the device of the degrees.

    Raises:
        ValueError: for labels that do not fit, a class without any, or a single class.
    """
    labeled, labels = labeled.to(degrees.device), labels.to(degrees.device)
    check_labels(len(degrees), labeled, labels, num_classes)
    check_every_class(labels, num_classes, "normalized cut")
    d, own = degrees[labeled], one_hot(labels, num_classes).double()
    r = (d @ own) / (d @ (1 - own))
    s = torch.where(own > 0, (d[:, None] / r).sqrt(), -(d[:, None] * r).sqrt())
    return LabelVectors(labeled, s / s.norm(dim=0))


def constrained_solution(
    spectrum: Spectrum, constraints: LabelVectors, *, clamp: bool = False
) -> Tensor:
    """Compute Z = U diag(1 / lambda) U^T S, the constrained normalized cut (section 3.2 of the paper).

    With `clamp`, fit the values of S at the labeled images instead of adding its columns up (ridge regression
    on the eigenvectors, penalty sum_k lambda_k a_k^2; after Belkin and Niyogi 2004), and give every labeled
    image its own label. This is better with many labels, worse with few.

    Returns:
        Z, N x C float32, each column scaled to norm sqrt(N), then minus the maximum of its row: the winner
        has 0. An image in a component without any label has 0 for every class.
    """
    labeled, s = constraints
    u = spectrum.vectors[labeled].double()  # S is zero in all other rows
    values = torch.from_numpy(spectrum.values).to(u.device)
    if clamp:
        # Both are fitted as functions of images: D^-1/2 u.
        root = spectrum.degrees[labeled].sqrt()[:, None]
        design, wanted = u / root, s / root
        typical = design.square().sum() / max(design.numel(), 1)
        # The floor keeps the system solvable where no eigenvector reaches a labeled image.
        strength = (CLAMP_STRENGTH * typical).clamp(min=torch.finfo(u.dtype).tiny)
        penalty = (values * strength).diag()
        coefficients = torch.linalg.solve(design.T @ design + penalty, design.T @ wanted)
    else:
        coefficients = (u.T @ s) / values[:, None]
    z = spectrum.vectors @ coefficients.float()
    gain = 2 / spectrum.values[0] if len(spectrum.values) else 1.0
    _finish(z, spectrum, constraints, gain)
    if clamp:
        z[labeled] = z.min()
        z[labeled, s.argmax(dim=1)] = 0
    return z


def between_components(
    graph: Spectrum | GraphOperator, constraints: LabelVectors, gain: float
) -> Tensor:
    """Compute scores of whole components of a disconnected graph: components x C, to multiply `null` with.

    The null vectors tell the components apart, and their eigenvalue 0 cannot be divided by. They get
    half the smallest positive eigenvalue instead (`gain` is its inverse): belonging to a component counts
    for more than any place inside it, and by a bounded amount. The direction sqrt(degree), which prefers
    no class, is projected out, as the first eigenvector is in a connected graph. Components without a
    label stay at 0.
    """
    nodes, s = constraints
    components, count = graph.components, graph.num_components
    entries = graph.null[nodes, None].double() * s
    coefficients = s.new_zeros(count, s.shape[1]).index_add_(0, components[nodes], entries)
    labeled = s.new_zeros(count)
    labeled[components[nodes]] = 1
    mass = s.new_zeros(count).index_add_(0, components, graph.degrees)
    everywhere = mass.sqrt() * labeled
    everywhere /= everywhere.norm()
    coefficients *= labeled[:, None]
    coefficients -= everywhere[:, None] * (everywhere @ coefficients)
    return gain * coefficients


def _finish(
    scores: Tensor, graph: Spectrum | GraphOperator, constraints: LabelVectors, gain: float | None
) -> None:
    """Scale columns of N x C to norm sqrt(N), subtract row maxima, put 0 where no label reaches; in place."""
    components, null = graph.components, graph.null
    holds, between = torch.zeros_like(components[: graph.num_components], dtype=torch.bool), None
    holds[components[constraints.nodes]] = True
    if gain is not None and graph.num_components > 1:
        # scores of whole components, which are added first
        between = between_components(graph, constraints, gain)
    squares = scores.new_zeros(scores.shape[1], dtype=torch.float64)
    for start in range(0, len(scores), ROWS):
        part, own = scores[start : start + ROWS], components[start : start + ROWS]
        if between is not None:
            part += null[start : start + ROWS, None] * between[own]
        part[~holds[own]] = 0
        squares += part.double().square().sum(dim=0)
    scale = torch.where(squares > 0, (len(scores) / squares).sqrt(), 0.0)
    for part in scores.split(ROWS):
        part.copy_(part * scale)
        part -= part.amax(dim=1, keepdim=True)


def propagate_normalized_cut(
    graph: EmbeddingGraph,
    labelings: Sequence[Labeling],
    num_classes: int,
    *,
    num_eigenvectors: int = NUM_EIGENVECTORS,
    clamp: bool = False,
) -> list[Tensor]:
    """Compute Z of the constrained normalized cut for each set of labels, as published.

    `num_eigenvectors` counts the constant one, so 2 at least; `clamp` is that of `constrained_solution`.
    """
    _check_num_eigenvectors(num_eigenvectors)
    spectrum = graph.spectrum(num_eigenvectors - 1)
    constraints = (constraint_vectors(spectrum.degrees, *one, num_classes) for one in labelings)
    return [constrained_solution(spectrum, one, clamp=clamp) for one in constraints]


def propagate_filter(
    graph: EmbeddingGraph,
    labelings: Sequence[Labeling],
    num_classes: int,
    *,
    filter: str = DEFAULT_FILTER,
    filter_by: str = "products",
    num_eigenvectors: int = NUM_EIGENVECTORS,
    **parameters: float,
) -> list[Tensor]:
    """Compute Z = g(L) S for each set of labels: the constraints of the normalized cut, filtered.

    Products with S cost the same whatever the spectrum, and in proportion to the number of classes;
    eigenvectors cost the same for any number of classes, but hold only the part of the answer before the
    last of them (figures: scripts/benchmarks/README.md). So "auto" takes them only where they are much
    cheaper *and* what they leave out is little, and it is not the default.

    Args:
        filter, parameters: a key of `lib.graph.filters.FILTERS`, and what that filter takes.
        filter_by: a name in `FILTER_BY`.
        num_eigenvectors: how many to filter by, with the constant one.

    Returns:
        N x C float32 for each set, scaled as in `constrained_solution`.

    Raises:
        ValueError: as `constraint_vectors` and `find_filter`, or for an unknown way to filter.
    """
    _check_num_eigenvectors(num_eigenvectors)
    if filter_by not in FILTER_BY:
        raise ValueError(f"unknown way {filter_by!r} to filter: take one of {', '.join(FILTER_BY)}")
    found, complete = find_filter(filter, **parameters)
    operator = graph.operator
    constraints = [constraint_vectors(operator.degrees, *one, num_classes) for one in labelings]
    work = len(labelings) * num_classes * found.num_products(**complete)
    much_work = work > MUCH_CHEAPER * SPECTRUM_PRODUCTS * num_eigenvectors
    answers, gain = None, None
    if filter_by == "eigenvectors" or (filter_by == "auto" and much_work):
        spectrum = graph.spectrum(num_eigenvectors - 1)
        answers, bound = filter_by_eigenvectors(spectrum, constraints, filter, **complete)
        if filter_by == "auto" and bound > EXACT_ENOUGH:
            answers = None
            graph.cache.log(
                f"{num_eigenvectors} eigenvectors may leave out {bound:.0%} of a column: by products instead"
            )
    if answers is None:
        answers = apply_filter(operator, constraints, filter, **complete)
    if operator.num_components > 1 and not found.keeps_null:
        gain = 2 / operator.smallest_eigenvalue
    for one, scores in zip(constraints, answers, strict=True):
        _finish(scores, operator, one, gain)
    return answers


def _check_num_eigenvectors(num_eigenvectors: int) -> None:
    if num_eigenvectors < 2:
        raise ValueError(f"{num_eigenvectors} eigenvectors: the first is constant, give 2 at least")
