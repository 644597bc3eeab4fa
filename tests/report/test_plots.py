"""What the pictures show, against loops over the published formulas."""

import numpy as np
import torch
from conftest import blobs
from graphs import build_graph, laplacian_spectrum
from PIL import Image

from lib.report import plots


def test_similarities_in_the_spectral_embedding_are_the_published_ones():
    features, targets = blobs(4, 30, spread=0.4)
    spectrum = laplacian_spectrum(build_graph(features), 20)
    images = torch.tensor([5, 3, 80, 41, 5])
    found = plots.spectral_cosines(spectrum, images)
    # the notebook nc: eigenvectors over the roots of their eigenvalues, the rows scaled to norm 1
    vectors, values = spectrum.vectors.double().numpy(), spectrum.values
    for a, i in enumerate(images.tolist()):
        for b, j in enumerate(images.tolist()):
            left, right = vectors[i] / np.sqrt(values), vectors[j] / np.sqrt(values)
            expected = left @ right / np.linalg.norm(left) / np.linalg.norm(right)
            assert abs(float(found[a, b]) - expected) < 1e-5
    same = targets[:, None] == targets
    every = plots.spectral_cosines(spectrum, torch.arange(120))
    assert every[same].mean() > every[~same].mean() + 0.2


def test_the_spectral_similarities_stand_beside_those_of_the_metric(tmp_path):
    features, targets = blobs(4, 30, spread=0.4)
    spectrum = laplacian_spectrum(build_graph(features), 20)
    figure = plots.similarity_matrix(features, targets, spectrum=spectrum)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["Similarity of the metric", "Similarity in the spectral embedding"]
    figure.savefig(tmp_path / "pair.png", dpi=120)
    plots.similarity_matrix(features, targets).savefig(tmp_path / "one.png", dpi=120)
    pair, one = (Image.open(tmp_path / f"{name}.png").size for name in ("pair", "one"))
    assert pair == (2 * one[0], one[1])
