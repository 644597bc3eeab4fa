"""Diffusion of labels along the graph: label spreading and Poisson learning."""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lib.graph.filters import GraphOperator, Seeds, filter_each
from lib.propagation.checks import Labeling, check_every_class, check_labels

ROWS = 8192  # worked on at a time where a copy of all scores would not fit
LEAST_SIZE = 1e-20  # of scores that are divided by their size


def propagate_spreadings(
    operator: GraphOperator, labelings: list[Labeling], num_classes: int, *, alpha: float = 0.99
) -> list[Tensor]:
    """`propagate_spreading` for many sets of labels, whose columns share their products."""
    seeds = []
    for labeled, labels in labelings:
        check_labels(len(operator.null), labeled, labels, num_classes)
        seeds.append(Seeds(labeled, one_hot(labels, num_classes).float()))
    answers = filter_each(operator, seeds, "ppr", alpha=alpha)
    for (labeled, _), scores in zip(labelings, answers, strict=True):
        scores.clamp_min_(0)  # positive but for the solver's residual
        scores[~operator.reached(labeled)] = 0
    return answers


def propagate_spreading(
    operator: GraphOperator,
    labeled: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    alpha: float = 0.99,
) -> Tensor:
    """Label spreading F = (1 - a) (I - a S)^-1 Y (Zhou et al. 2004, "Learning with local and global
    consistency"), by conjugate gradients as in Iscen et al. 2019.

    Args:
        operator: of the graph of all images.
        labeled: L indexes of the labeled images.
        labels: their L class numbers.
        num_classes: C.
        alpha: share that goes on along the edges, in (0, 1).

    Returns:
        N x C float32, not negative; zero for an image that no label reaches.

    Raises:
        ValueError: for labels that do not fit, or alpha out of range.
    """
    one = [Labeling(labeled, labels)]
    return propagate_spreadings(operator, one, num_classes, alpha=alpha)[0]


def _poisson_sources(operator: GraphOperator, labeling: Labeling, num_classes: int) -> Tensor:
    """Right-hand sides y_j - mean(y), L x C, the mean over the labeled images of the component."""
    labeled, labels = labeling
    onehot = one_hot(labels, num_classes).float()
    component = operator.components[labeled]
    sums = torch.zeros(operator.num_components, num_classes).index_add_(0, component, onehot)
    mean = sums / sums.sum(dim=1, keepdim=True).clamp_min(1)
    return onehot - mean[component]


def _only_own_classes(operator: GraphOperator, scores: Tensor, labeling: Labeling) -> None:
    """In place: classes without a label in a component below all others there; 0 where there is no label."""
    labeled, labels = labeling
    present = torch.zeros(operator.num_components, scores.shape[1], dtype=torch.bool)
    present[operator.components[labeled], labels] = True
    low, high = torch.aminmax(scores)
    below = -2 * float(max(-low, high)) or -2.0
    for rows in torch.arange(len(scores)).split(ROWS):
        scores[rows] = torch.where(present[operator.components[rows]], scores[rows], below)
    scores[~operator.reached(labeled)] = 0


def propagate_poissons(
    operator: GraphOperator, labelings: list[Labeling], num_classes: int
) -> list[Tensor]:
    """`propagate_poisson` for many sets of labels, whose columns share their products."""
    root, seeds = operator.root_degrees[:, None], []
    for labeling in labelings:
        check_labels(len(root), *labeling, num_classes)
        check_every_class(labeling.labels, num_classes, "poisson learning")
        sources = _poisson_sources(operator, labeling, num_classes)
        seeds.append(Seeds(labeling.labeled, sources / root[labeling.labeled]))
    answers = filter_each(operator, seeds, "pseudo-inverse")
    for labeling, scores in zip(labelings, answers, strict=True):
        scores.div_(root).div_(torch.bincount(labeling.labels, minlength=num_classes))
        squares = sum(float(rows.square().sum()) for rows in scores.split(ROWS))
        scores.div_(max((squares / scores.numel()) ** 0.5, LEAST_SIZE))
        if operator.num_components > 1:
            _only_own_classes(operator, scores, labeling)
    return answers


def propagate_poisson(
    operator: GraphOperator, labeled: Tensor, labels: Tensor, num_classes: int
) -> Tensor:
    """Poisson learning (Calder et al. 2020, "Poisson learning: graph based semi-supervised learning at
    very low label rates").

    Solves (D - W) u = sum_j (y_j - mean y) delta_j, sum_i d_i u_i = 0, by conjugate gradients on the
    normalized Laplacian (u = D^-1/2 x), and divides u_c by the number of labels of class c. Every
    component has a mean of its own, so that its equation has a solution.

    Args:
        operator: of the graph of all images.
        labeled: L indexes of the labeled images.
        labels: their L class numbers.
        num_classes: C.

    Returns:
        N x C float32 of mean square 1. A class without a label in a component is below all others there;
        an image in a component without any label has 0 for every class.

    Raises:
        ValueError: for labels that do not fit, or a class without any.
    """
    return propagate_poissons(operator, [Labeling(labeled, labels)], num_classes)[0]
