"""Shortcuts that the tests of lib/graph and lib/propagation share."""

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from lib.graph import spectrum as graph_spectrum
from lib.graph.affinity import GraphPreset
from lib.graph.filters import LabelVectors, apply_filter
from lib.graph.laplacian import GraphOperator
from lib.graph.sparse import from_scipy, to_scipy
from lib.graph.spectrum import Spectrum
from lib.propagation import EmbeddingGraph, Labeling
from lib.propagation.normalized_cut import constrained_solution, constraint_vectors


def build_graph(
    features: Tensor,
    preset: str | GraphPreset = "cifar",
    num_neighbors: int | None = None,
    **more,
) -> sp.csr_matrix:
    """Affinity matrix of features."""
    return to_scipy(EmbeddingGraph(features, preset, num_neighbors, **more).affinity)


def laplacian_spectrum(
    affinity: sp.csr_matrix, *words, self_loops: str = "published", **more
) -> Spectrum:
    """Eigenvectors of the Laplacian of an affinity matrix."""
    operator = graph_operator(affinity, self_loops)
    return graph_spectrum.laplacian_spectrum(operator, *words, **more)


def graph_operator(affinity: sp.csr_matrix, self_loops: str = "published") -> GraphOperator:
    """Operator of an affinity matrix."""
    return graph_of(affinity, self_loops).operator


def graph_of(affinity: np.ndarray | sp.csr_matrix, self_loops: str = "drop") -> EmbeddingGraph:
    """Graph of an affinity matrix; its features are empty."""
    given = from_scipy(sp.csr_matrix(affinity.astype(np.float32)))
    return EmbeddingGraph(torch.zeros(len(given), 2), given=given, self_loops=self_loops)


def alone(propagate, graph, labeled: Tensor, labels: Tensor, num_classes: int, **more) -> Tensor:
    """Scores of one algorithm for one set of labels."""
    return propagate(graph, [Labeling(labeled, labels)], num_classes, **more)[0]


def normalized_cut(
    spectrum: Spectrum, labeled: Tensor, labels: Tensor, num_classes: int, **more
) -> Tensor:
    """Z of one set of labels."""
    constraints = constraint_vectors(spectrum.degrees, labeled, labels, num_classes)
    return constrained_solution(spectrum, constraints, **more)


def filter_columns(operator: GraphOperator, columns: Tensor, name: str, **parameters) -> Tensor:
    """g(L) x for every column x of an N x m matrix."""
    everywhere = torch.arange(len(columns))
    return apply_filter(operator, [LabelVectors(everywhere, columns)], name, **parameters)[0]
