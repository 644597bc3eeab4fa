"""Label propagation. One contract for every algorithm:

    scores = algorithm(features or spectrum, labeled, labels, num_classes, ...parameters of its own)

`labeled` are the indexes of the labelled images and `labels` their classes; scores are N x C, higher
means more likely. No algorithm sees a true label of an unlabelled image. `lib.pseudo_labels` turns
scores into pseudo-labels.
"""

from lib.propagation.knn import propagate_knn
from lib.propagation.normalized_cut import propagate_normalized_cut

__all__ = ["propagate_knn", "propagate_normalized_cut"]
