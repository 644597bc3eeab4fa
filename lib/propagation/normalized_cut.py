"""Constrained normalised cut: each class against the rest, in the spectral embedding."""

import numpy as np
import torch
from torch import Tensor

from lib.propagation.checks import check_labels
from lib.spectral import Spectrum, project


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
    empty = np.setdiff1d(np.arange(num_classes), classes)
    if len(empty) or num_classes < 2:
        raise ValueError(
            f"normalised cut needs two classes, and a labelled image of each; none of class {list(empty)}"
        )
    mass = degree[indexes]
    own = classes[:, None] == np.arange(num_classes)
    r = (mass @ own) / (mass @ ~own)
    values = np.where(own, np.sqrt(mass[:, None] / r), -np.sqrt(mass[:, None] * r))
    seeds = np.zeros((len(degree), num_classes))
    seeds[indexes] = values / np.linalg.norm(values, axis=0)
    return seeds


def _between_components(spectrum: Spectrum, seeds: np.ndarray, indexes: np.ndarray) -> np.ndarray:
    """Scores of whole components of a disconnected graph: N x C, zero where the graph is connected.

    The null vectors tell the components apart, and their eigenvalue 0 cannot be divided by. They get
    half the smallest positive eigenvalue instead: belonging to a component counts for more than any
    place inside it, and by a bounded amount. The direction sqrt(degree), which prefers no class, is
    projected out, as the first eigenvector is in a connected graph. Components without a label stay at 0.
    """
    coefficients = project(spectrum.null, spectrum.components, seeds)
    labelled = np.zeros(spectrum.num_components)
    labelled[spectrum.components[indexes]] = 1
    mass = np.bincount(spectrum.components, weights=spectrum.degrees)
    everywhere = np.sqrt(mass) * labelled
    everywhere /= np.linalg.norm(everywhere)
    coefficients *= labelled[:, None]
    coefficients -= everywhere[:, None] * (everywhere @ coefficients)
    gain = 2 / spectrum.values[0] if len(spectrum.values) else 1.0
    return gain * spectrum.null[:, None] * coefficients[spectrum.components]


def propagate_normalized_cut(
    spectrum: Spectrum, labeled: Tensor, labels: Tensor, num_classes: int
) -> Tensor:
    """Scores Z = V diag(1/lambda) V^T s of the constrained normalised cut (section 3.2 of the paper).

    Args:
        spectrum: of the graph of all images; computed once for every number of labels.
        labeled: L indexes of the labelled images.
        labels: their L class numbers.
        num_classes: C.

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
    coefficients = spectrum.vectors[indexes].T.astype(np.float64) @ seeds[indexes]
    scores = spectrum.vectors @ (coefficients / spectrum.values[:, None]).astype(np.float32)
    if spectrum.num_components > 1:
        scores = scores + _between_components(spectrum, seeds, indexes)
        reached = np.isin(spectrum.components, spectrum.components[indexes])
        scores[~reached] = 0
    norms = np.linalg.norm(scores, axis=0)
    scores = scores * np.divide(
        np.sqrt(len(scores)), norms, out=np.zeros_like(norms), where=norms > 0
    )
    scores = scores - scores.max(axis=1, keepdims=True)
    return torch.from_numpy(scores.astype(np.float32))
