"""Label propagation. One contract for every algorithm:

    scores = algorithm(features or graph or spectrum, labeled, labels, num_classes, ...own parameters)

`labeled` are the indexes of the labeled images and `labels` their classes; scores are N x C, higher
means more likely. No algorithm sees a true label of an unlabeled image. `propagate` runs any of them
by its name, `lib.labels.pseudo_labels` turns scores into pseudo-labels.

    knn            lib/propagation/knn.py             nearest labeled images
    nc             lib/propagation/normalized_cut.py  normalized cut on eigenvectors, as published
    filter         lib/propagation/normalized_cut.py  the same seeds through a graph filter
    spreading      lib/propagation/diffusion.py       label spreading (Zhou et al. 2004)
    poisson        lib/propagation/diffusion.py       Poisson learning (Calder et al. 2020)
    poisson-prior  the same                           with predicted class sizes matched to a prior
    auto           lib/propagation/choose.py          the best of them by cross-validation
    ensemble       lib/propagation/choose.py          the mean of the best three
"""

from lib.propagation.diffusion import propagate_poisson, propagate_spreading
from lib.propagation.knn import propagate_knn
from lib.propagation.methods import METHODS, EmbeddingGraph, Propagation, propagate
from lib.propagation.normalized_cut import propagate_filter, propagate_normalized_cut

__all__ = [
    "METHODS",
    "EmbeddingGraph",
    "Propagation",
    "propagate",
    "propagate_filter",
    "propagate_knn",
    "propagate_normalized_cut",
    "propagate_poisson",
    "propagate_spreading",
]
