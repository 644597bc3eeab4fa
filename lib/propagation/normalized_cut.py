"""Constrained normalized cut: each class against the rest, in the spectral embedding or by a filter."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lib.graph.filters import WITHOUT_NULL, GraphOperator, Seeds, filter_each
from lib.graph.spectral import Spectrum
from lib.propagation.checks import Labeling, check_every_class, check_labels

ROWS = 8192  # finished at a time: a float64 copy of all scores would not fit
CLAMP_STRENGTH = 1000.0  # of smoothness, in labeled images, where seeds are clamped; measured


def constraint_vectors(
    degree: np.ndarray, labeled: Tensor, labels: Tensor, num_classes: int
) -> np.ndarray:
    """One constraint vector per class, unit columns, float64: its values at the labeled images, L x C.

    Elsewhere it is zero. Class c against the other labels: with p the degrees at its labeled images, q
    those at the other labeled images and r = sum(p) / sum(q), s = sqrt(p / r) - sqrt(q r). It is
    orthogonal to sqrt(degree), the solution that separates nothing.

    Raises:
        ValueError: if a class has no labeled image, or all labels are of one class.
    """
    indexes, classes = labeled.numpy(), labels.numpy()
    check_every_class(labels, num_classes, "normalized cut")
    mass = degree[indexes]
    own = classes[:, None] == np.arange(num_classes)
    r = (mass @ own) / (mass @ ~own)
    values = np.where(own, np.sqrt(mass[:, None] / r), -np.sqrt(mass[:, None] * r))
    return values / np.linalg.norm(values, axis=0)


def between_components(
    graph: Spectrum | GraphOperator, seeds: np.ndarray, indexes: np.ndarray, gain: float
) -> np.ndarray:
    """Scores of whole components of a disconnected graph: components x C, to be multiplied with `null`.

    The null vectors tell the components apart, and their eigenvalue 0 cannot be divided by. They get
    half the smallest positive eigenvalue instead (`gain` is its inverse): belonging to a component counts
    for more than any place inside it, and by a bounded amount. The direction sqrt(degree), which prefers
    no class, is projected out, as the first eigenvector is in a connected graph. Components without a
    label stay at 0.
    """
    components, null = np.asarray(graph.components), np.asarray(graph.null)
    weights = graph.degrees if isinstance(graph, Spectrum) else graph.seed_degrees
    inside = torch.from_numpy(null[indexes, None] * seeds)
    of = torch.from_numpy(components[indexes]).long()
    coefficients = inside.new_zeros(graph.num_components, seeds.shape[1])
    coefficients = coefficients.index_add_(0, of, inside).numpy()
    labeled = np.zeros(graph.num_components)
    labeled[components[indexes]] = 1
    everywhere = np.sqrt(np.bincount(components, weights=weights)) * labeled
    everywhere /= np.linalg.norm(everywhere)
    coefficients *= labeled[:, None]
    coefficients -= everywhere[:, None] * (everywhere @ coefficients)
    return gain * coefficients


def _finish(
    scores: Tensor,
    graph: Spectrum | GraphOperator,
    indexes: np.ndarray,
    between: np.ndarray | None = None,
) -> Tensor:
    """Columns of norm sqrt(N), then minus the row's largest; 0 where no label reaches. In place.

    Args:
        scores: N x C float32.
        graph: whose components and null vectors count.
        indexes: of the labeled images.
        between: of `between_components`, to be added.
    """
    components, null = torch.as_tensor(graph.components), torch.as_tensor(graph.null)
    holds = torch.zeros(graph.num_components, dtype=torch.bool)
    holds[components[indexes]] = True
    squares = torch.zeros(scores.shape[1], dtype=torch.float64)
    for start in range(0, len(scores), ROWS):
        part, own = scores[start : start + ROWS], components[start : start + ROWS]
        if between is not None:
            part += null[start : start + ROWS, None] * torch.from_numpy(between)[own]
        part[~holds[own]] = 0
        squares += part.double().square().sum(dim=0)
    scale = torch.where(squares > 0, (len(scores) / squares).sqrt(), 0.0)
    for part in scores.split(ROWS):
        part.copy_(part * scale)
        part -= part.amax(dim=1, keepdim=True)
    return scores


def _coefficients(
    spectrum: Spectrum, seeds: np.ndarray, indexes: np.ndarray, clamp: bool
) -> np.ndarray:
    """Coordinates of the solution along the eigenvectors, k x C."""
    rows = spectrum.vectors[indexes].astype(np.float64)
    if not clamp:
        return (rows.T @ seeds) / spectrum.values[:, None]
    # as functions of the images (D^-1/2 v), fitted to the seeds' values at the labeled ones
    root = np.sqrt(spectrum.degrees[indexes])[:, None]
    design, wanted = rows / root, seeds / root
    typical = np.square(design).sum() / max(design.size, 1)
    # the floor keeps it solvable where no eigenvector reaches a labeled image
    penalty = np.diag(spectrum.values) * max(CLAMP_STRENGTH * typical, np.finfo(np.float64).tiny)
    return np.linalg.solve(design.T @ design + penalty, design.T @ wanted)


def propagate_normalized_cut(
    spectrum: Spectrum,
    labeled: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    clamp: bool = False,
) -> Tensor:
    """Scores Z = V diag(1/lambda) V^T s of the constrained normalized cut (section 3.2 of the paper).

    Args:
        spectrum: of the graph of all images; computed once for every number of labels.
        labeled: L indexes of the labeled images.
        labels: their L class numbers.
        num_classes: C.
        clamp: fit the seeds' values at the labeled images instead of adding the seeds up (ridge
            regression on the eigenvectors, penalty sum_k lambda_k a_k^2; after Belkin and Niyogi 2004), and
            give every labeled image its own label. Better with many labels, worse with few.

    Returns:
        N x C float32, each column scaled to norm sqrt(N), then minus the row's largest: the winner
        has 0. An image in a component without any label has 0 for every class.

    Raises:
        ValueError: for labels that do not fit, or a class without any.
    """
    check_labels(len(spectrum.vectors), labeled, labels, num_classes)
    seeds = constraint_vectors(spectrum.degrees, labeled, labels, num_classes)
    indexes = labeled.numpy()
    # V^T s needs the labeled rows only: s is zero elsewhere
    coefficients = _coefficients(spectrum, seeds, indexes, clamp)
    scores = torch.from_numpy(spectrum.vectors @ coefficients.astype(np.float32))
    between = None
    if spectrum.num_components > 1:
        gain = 2 / spectrum.values[0] if len(spectrum.values) else 1.0
        between = between_components(spectrum, seeds, indexes, gain)
    answer = _finish(scores, spectrum, indexes, between)
    if clamp:
        answer[labeled] = answer.min()
        answer[labeled, labels] = 0
    return answer


def propagate_filters(
    operator: GraphOperator,
    labelings: Sequence[Labeling],
    num_classes: int,
    *,
    filter: str = "smoothed-step",
    apply: Callable[..., list[Tensor]] = filter_each,
    **parameters: float,
) -> list[Tensor]:
    """`propagate_filter` for many sets of labels, whose columns share their products.

    Args:
        operator, num_classes, filter, parameters: as there.
        labelings: labeled images and their classes, for each answer.
        apply: `lib.graph.filters.filter_each`, or what gives the same answers.
    """
    for labeled, labels in labelings:
        check_labels(len(operator.null), labeled, labels, num_classes)
    seeds = [constraint_vectors(operator.seed_degrees, *one, num_classes) for one in labelings]
    columns = [
        Seeds(labeled, torch.from_numpy(values))
        for (labeled, _), values in zip(labelings, seeds, strict=True)
    ]
    answers = apply(operator, columns, filter, **parameters)
    for (labeled, _), values, scores in zip(labelings, seeds, answers, strict=True):
        between = None
        if operator.num_components > 1 and filter in WITHOUT_NULL:
            gain = 2 / operator.smallest_eigenvalue
            between = between_components(operator, values, labeled.numpy(), gain)
        _finish(scores, operator, labeled.numpy(), between)
    return answers


def propagate_filter(
    operator: GraphOperator,
    labeled: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    filter: str = "smoothed-step",
    **parameters: float,
) -> Tensor:
    """Scores g(L) s with the seeds s of the normalized cut, without eigenvectors.

    Args:
        operator: of the graph of all images.
        labeled: L indexes of the labeled images.
        labels: their L class numbers.
        num_classes: C.
        filter: a key of `lib.graph.filters.FILTERS`.
        parameters: of that filter.

    Returns:
        N x C float32, scaled as those of `propagate_normalized_cut`.

    Raises:
        ValueError: for labels that do not fit, a class without any, or an unknown filter.
    """
    one = [Labeling(labeled, labels)]
    return propagate_filters(operator, one, num_classes, filter=filter, **parameters)[0]
