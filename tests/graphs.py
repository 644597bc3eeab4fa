"""Shortcuts that the tests of lib/graph and lib/propagation share."""

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from lib.graph.filters import LabelVectors, apply_filter
from lib.graph.operator import GraphOperator
from lib.graph.spectrum import Spectrum
from lib.propagation import EmbeddingGraph, Labeling
from lib.propagation.normalized_cut import constrained_solution, constraint_vectors


def graph_of(affinity: np.ndarray | sp.csr_matrix, self_loops: str = "drop") -> EmbeddingGraph:
    """Graph of an affinity matrix; its features are empty."""
    given = sp.csr_matrix(affinity.astype(np.float32))
    return EmbeddingGraph(torch.zeros(given.shape[0], 2), given=given, self_loops=self_loops)


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
