"""Propagation by weighted nearest neighbours."""

import torch
from torch import Tensor

from lib.knn import classify
from lib.propagation.checks import check_labels

MAX_NEIGHBORS = 200


def propagate_knn(
    features: Tensor,
    labeled: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    k: int = MAX_NEIGHBORS,
    temperature: float = 0.1,
) -> Tensor:
    """Class probabilities from the K nearest *labelled* images, votes weighted by exp(cos / T).

    A labelled image has no vote on itself: its row tells what the other labels say about it.

    Args:
        features: N x D unit vectors.
        labeled: L indexes of the labelled images.
        labels: their L class numbers.
        num_classes: C.
        k: neighbours that vote, cut down to the number of labels.

    Returns:
        N x C probabilities, float32; uniform for a labelled image that is the only one.

    Raises:
        ValueError: for labels that do not fit.
    """
    check_labels(len(features), labeled, labels, num_classes)
    bank = features[labeled]
    scores = classify(features, bank, labels, num_classes, k=k, temperature=temperature)
    if len(labeled) == 1:
        scores[labeled] = 1 / num_classes
        return scores
    for row, index in enumerate(labeled.tolist()):
        others = torch.arange(len(labeled)) != row
        scores[index] = classify(
            features[index, None],
            bank[others],
            labels[others],
            num_classes,
            k=k,
            temperature=temperature,
        )[0]
    return scores
