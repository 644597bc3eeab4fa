"""Label propagation. One form for every algorithm:

    list of scores = algorithm(graph, labelings, num_classes, *, its parameters)

`graph` is an `EmbeddingGraph`: features, with the affinity matrix, operator and spectrum made of them when an
algorithm asks. A labeling holds the indexes of labeled images and their classes; there is one N x C matrix
of scores for each, higher means more likely. No algorithm sees a true label of an unlabeled image.
`propagate` runs any of them by its name and gives a `Propagation`, which makes pseudo-labels. `calibrate`
finds the temperature at which their probabilities are right as often as they say, and `estimate_gain` what
they are worth to a classifier.

    knn            lib/propagation/knn.py             nearest labeled images
    nc             lib/propagation/normalized_cut.py  normalized cut on eigenvectors, as published
    filter         lib/propagation/normalized_cut.py  the same constraints through a graph filter
    spreading      lib/propagation/diffusion.py       label spreading (Zhou et al. 2004)
    poisson        lib/propagation/diffusion.py       Poisson learning (Calder et al. 2020)
    poisson-prior  lib/propagation/diffusion.py       the same, predicted class sizes matched to a prior
    auto           lib/propagation/choose.py          the best of them by cross-validation
    ensemble       lib/propagation/choose.py          the mean of the best three

A new algorithm is one such function and one line of the table in lib/propagation/algorithms.py.
"""

from lib.propagation.choose import calibrate
from lib.propagation.embedding_graph import EmbeddingGraph
from lib.propagation.gain import estimate_gain
from lib.propagation.labelings import Labeling
from lib.propagation.methods import METHODS, Propagation, propagate

__all__ = [
    "METHODS",
    "EmbeddingGraph",
    "Labeling",
    "Propagation",
    "calibrate",
    "estimate_gain",
    "propagate",
]
