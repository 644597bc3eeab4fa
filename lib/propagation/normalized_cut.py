"""Constrained normalised cut: each class against the rest, in the spectral embedding or by a filter."""

import numpy as np
import torch
from torch import Tensor

from lib.filters import WITHOUT_NULL, GraphOperator, filter_each
from lib.propagation.checks import Labeling, check_every_class, check_labels
from lib.spectral import Spectrum, project

CLAMP_STRENGTH = 1000.0  # of smoothness, in labelled images, where seeds are clamped; measured


def seed_vectors(
    degree: np.ndarray, labeled: Tensor, labels: Tensor, num_classes: int
) -> np.ndarray:
    """One constraint vector per class, N x C, unit columns, float64.

    Class c against the other labels: with p the degrees at its labelled images, q those at the other
    labelled images and r = sum(p) / sum(q), s = sqrt(p / r) - sqrt(q r). It is orthogonal to
    sqrt(degree), the solution that separates nothing.

    Raises:
        ValueError: if a class has no labelled image, or all labels are of one class.
    """
    indexes, classes = labeled.numpy(), labels.numpy()
    check_every_class(labels, num_classes, "normalised cut")
    mass = degree[indexes]
    own = classes[:, None] == np.arange(num_classes)
    r = (mass @ own) / (mass @ ~own)
    values = np.where(own, np.sqrt(mass[:, None] / r), -np.sqrt(mass[:, None] * r))
    seeds = np.zeros((len(degree), num_classes))
    seeds[indexes] = values / np.linalg.norm(values, axis=0)
    return seeds


def between_components(
    graph: Spectrum | GraphOperator, seeds: np.ndarray, indexes: np.ndarray, gain: float
) -> np.ndarray:
    """Scores of whole components of a disconnected graph: N x C, zero where the graph is connected.

    The null vectors tell the components apart, and their eigenvalue 0 cannot be divided by. They get
    half the smallest positive eigenvalue instead (`gain` is its inverse): belonging to a component counts
    for more than any place inside it, and by a bounded amount. The direction sqrt(degree), which prefers
    no class, is projected out, as the first eigenvector is in a connected graph. Components without a
    label stay at 0.
    """
    components, null = np.asarray(graph.components), np.asarray(graph.null)
    weights = graph.degrees if isinstance(graph, Spectrum) else graph.seed_degrees
    coefficients = project(null, components, seeds)
    labelled = np.zeros(graph.num_components)
    labelled[components[indexes]] = 1
    everywhere = np.sqrt(np.bincount(components, weights=weights)) * labelled
    everywhere /= np.linalg.norm(everywhere)
    coefficients *= labelled[:, None]
    coefficients -= everywhere[:, None] * (everywhere @ coefficients)
    return gain * null[:, None] * coefficients[components]


def _finish(scores: np.ndarray, reached: np.ndarray) -> Tensor:
    """Columns of norm sqrt(N), then minus the row's largest; 0 where no label reaches."""
    scores[~reached] = 0
    norms = np.linalg.norm(scores, axis=0)
    scores = scores * np.divide(
        np.sqrt(len(scores)), norms, out=np.zeros_like(norms), where=norms > 0
    )
    return torch.from_numpy((scores - scores.max(axis=1, keepdims=True)).astype(np.float32))


def _coefficients(
    spectrum: Spectrum, seeds: np.ndarray, indexes: np.ndarray, clamp: bool
) -> np.ndarray:
    """Coordinates of the solution along the eigenvectors, k x C."""
    rows = spectrum.vectors[indexes].astype(np.float64)
    if not clamp:
        return (rows.T @ seeds[indexes]) / spectrum.values[:, None]
    # as functions of the images (D^-1/2 v), fitted to the seeds' values at the labelled ones
    root = np.sqrt(spectrum.degrees[indexes])[:, None]
    design, wanted = rows / root, seeds[indexes] / root
    typical = np.square(design).sum() / max(design.size, 1)
    # the floor keeps it solvable where no eigenvector reaches a labelled image
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
    """Scores Z = V diag(1/lambda) V^T s of the constrained normalised cut (section 3.2 of the paper).

    Args:
        spectrum: of the graph of all images; computed once for every number of labels.
        labeled: L indexes of the labelled images.
        labels: their L class numbers.
        num_classes: C.
        clamp: fit the seeds' values at the labelled images instead of adding the seeds up (ridge
            regression on the eigenvectors, penalty sum_k lambda_k a_k^2; after Belkin and Niyogi 2004), and
            give every labelled image its own label. Better with many labels, worse with few.

    Returns:
        N x C float32, each column scaled to norm sqrt(N), then minus the row's largest: the winner
        has 0. An image in a component without any label has 0 for every class.

    Raises:
        ValueError: for labels that do not fit, or a class without any.
    """
    check_labels(len(spectrum.vectors), labeled, labels, num_classes)
    seeds = seed_vectors(spectrum.degrees, labeled, labels, num_classes)
    indexes = labeled.numpy()
    # V^T s needs the labelled rows only: s is zero elsewhere
    coefficients = _coefficients(spectrum, seeds, indexes, clamp)
    scores = spectrum.vectors @ coefficients.astype(np.float32)
    reached = np.ones(len(scores), dtype=bool)
    if spectrum.num_components > 1:
        gain = 2 / spectrum.values[0] if len(spectrum.values) else 1.0
        scores = scores + between_components(spectrum, seeds, indexes, gain)
        reached = np.isin(spectrum.components, spectrum.components[indexes])
    answer = _finish(scores, reached)
    if clamp:
        answer[labeled] = answer.min()
        answer[labeled, labels] = 0
    return answer


def propagate_filters(
    operator: GraphOperator,
    labelings: list[Labeling],
    num_classes: int,
    *,
    filter: str = "smoothed-step",
    **parameters: float,
) -> list[Tensor]:
    """`propagate_filter` for many sets of labels, whose columns share their products."""
    for labeled, labels in labelings:
        check_labels(len(operator.null), labeled, labels, num_classes)
    seeds = [seed_vectors(operator.seed_degrees, *one, num_classes) for one in labelings]
    columns = [torch.from_numpy(s).float() for s in seeds]
    solved = filter_each(operator, columns, filter, **parameters)
    answers = []
    for (labeled, _), seed, answer in zip(labelings, seeds, solved, strict=True):
        scores = answer.numpy()
        if operator.num_components > 1 and filter in WITHOUT_NULL:
            gain = 2 / operator.smallest_eigenvalue
            scores = scores + between_components(operator, seed, labeled.numpy(), gain)
        answers.append(_finish(scores, operator.reached(labeled).numpy()))
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
    """Scores g(L) s with the seeds s of the normalised cut, without eigenvectors.

    Args:
        operator: of the graph of all images.
        labeled: L indexes of the labelled images.
        labels: their L class numbers.
        num_classes: C.
        filter: a key of `lib.filters.FILTERS`.
        parameters: of that filter.

    Returns:
        N x C float32, scaled as those of `propagate_normalized_cut`.

    Raises:
        ValueError: for labels that do not fit, a class without any, or an unknown filter.
    """
    one = [Labeling(labeled, labels)]
    return propagate_filters(operator, one, num_classes, filter=filter, **parameters)[0]
