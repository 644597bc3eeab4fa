"""Propagation by weighted nearest neighbors: every image asks the nearest labeled ones."""

from collections.abc import Callable, Sequence

from torch import Tensor

from lib.graph.knn import classify
from lib.propagation.embedding_graph import EmbeddingGraph
from lib.propagation.labelings import Labeling, check_labels
from lib.propagation.scores import log_shares

MAX_NEIGHBORS = 200


def knn_probabilities(
    features: Tensor,
    labeled: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    k: int = MAX_NEIGHBORS,
    temperature: float = 0.1,
    vote: Callable[..., Tensor] = classify,
) -> Tensor:
    """Compute P with P_ic proportional to the sum of exp(v_i . v_j / T) over the neighbors j of class c.

    The neighbors are the K nearest *labeled* images. A labeled image does not vote on itself: its row tells
    what the other labels say about it.

    Args:
        features: V, N x D, unit vectors for votes by cosine.
        labeled, labels: L indexes of the labeled images and their classes.
        k: neighbors that vote, cut down to the number of labels.
        vote: `lib.graph.knn.classify`, or a function that does the same in several processes.

    Returns:
        P, N x C, float32; uniform for a labeled image that is the only one.

    Raises:
        ValueError: for labels that do not fit, no neighbor, or a temperature that is not positive.
    """
    check_labels(len(features), labeled, labels, num_classes)
    bank, options = features[labeled], {"k": k, "temperature": temperature}
    probabilities = vote(features, bank, labels, num_classes, **options)
    if len(labeled) == 1:
        probabilities[labeled] = 1 / num_classes
    else:
        own = classify(bank, bank, labels, num_classes, **options, own_vote=False)
        probabilities[labeled] = own
    return probabilities


def propagate_knn(
    graph: EmbeddingGraph,
    labelings: Sequence[Labeling],
    num_classes: int,
    *,
    k: int = MAX_NEIGHBORS,
    temperature: float = 0.1,
) -> list[Tensor]:
    """Compute log P of `knn_probabilities` for each set of labels: N x C."""
    vote = graph.workers.classify if graph.workers else classify
    options = {"k": k, "temperature": temperature, "vote": vote}
    found = (knn_probabilities(graph.features, *one, num_classes, **options) for one in labelings)
    return [log_shares(probabilities) for probabilities in found]
