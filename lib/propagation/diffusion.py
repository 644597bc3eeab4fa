"""Diffusion of labels along the graph: label spreading and Poisson learning."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lib.graph.filters import LabelVectors, apply_filter
from lib.propagation.embedding_graph import EmbeddingGraph
from lib.propagation.labelings import Labeling, check_every_class, check_labels
from lib.propagation.scores import log_shares

ROWS = 8192  # rows worked on at a time where a copy of all scores would not fit
LEAST_SIZE = 1e-20  # least root mean square that scores are divided by


def propagate_spreading(
    graph: EmbeddingGraph, labelings: Sequence[Labeling], num_classes: int, *, alpha: float = 0.99
) -> list[Tensor]:
    """Compute F = (1 - a) (I - a S)^-1 Y for each set of labels, where Y holds one-hot rows.

    Zhou et al. 2004, "Learning with local and global consistency"; by conjugate gradients, as in Iscen et
    al. 2019.

    Returns:
        Logarithms of the shares in F, N x C for each set; uniform for an image that no label reaches.

    Raises:
        ValueError: for labels that do not fit, or alpha out of (0, 1).
    """
    operator, vectors = graph.operator, []
    for labeled, labels in labelings:
        check_labels(len(operator), labeled, labels, num_classes)
        vectors.append(LabelVectors(labeled, one_hot(labels, num_classes).float()))
    answers = apply_filter(operator, vectors, "ppr", alpha=alpha)
    for (labeled, _), scores in zip(labelings, answers, strict=True):
        scores.clamp_min_(0)  # only the residual of the solver is negative
        scores[~operator.reached(labeled)] = 0
    return [log_shares(scores) for scores in answers]


def propagate_poisson(
    graph: EmbeddingGraph, labelings: Sequence[Labeling], num_classes: int
) -> list[Tensor]:
    """Compute the scores of Poisson learning for each set of labels.

    Calder et al. 2020, "Poisson learning: graph based semi-supervised learning at very low label rates".
    It solves (D - W) u = sum_j (y_j - mean y) delta_j, sum_i d_i u_i = 0, by conjugate gradients on the
    normalized Laplacian (u = D^-1/2 x), and divides u_c by the number of labels of class c. Every component
    has its own mean, so that its equation has a solution.

    Returns:
        N x C float32 of mean square 1 for each set. A class without a label in a component is below all
        others there; an image in a component without any label has 0 for every class.

    Raises:
        ValueError: for labels that do not fit, or a class without any.
    """
    operator = graph.operator
    root, vectors = operator.root_degrees[:, None], []
    for labeled, labels in labelings:
        check_labels(len(root), labeled, labels, num_classes)
        check_every_class(labels, num_classes, "poisson learning")
        onehot, component = one_hot(labels, num_classes).float(), operator.components[labeled]
        sums = onehot.new_zeros(operator.num_components, num_classes)
        sums.index_add_(0, component, onehot)
        mean = sums / sums.sum(dim=1, keepdim=True).clamp_min(1)
        vectors.append(LabelVectors(labeled, (onehot - mean[component]) / root[labeled]))
    answers = apply_filter(operator, vectors, "pseudo-inverse")
    for (labeled, labels), scores in zip(labelings, answers, strict=True):
        scores.div_(root).div_(torch.bincount(labels, minlength=num_classes))
        squares = sum(float(rows.square().sum()) for rows in scores.split(ROWS))
        scores.div_(max((squares / scores.numel()) ** 0.5, LEAST_SIZE))
        if operator.num_components > 1:
            present = labels.new_zeros(operator.num_components, num_classes, dtype=torch.bool)
            present[operator.components[labeled], labels] = True
            low, high = torch.aminmax(scores)
            below = -2 * float(max(-low, high)) or -2.0
            for rows in torch.arange(len(scores)).split(ROWS):
                scores[rows] = torch.where(present[operator.components[rows]], scores[rows], below)
            scores[~operator.reached(labeled)] = 0
    return answers
