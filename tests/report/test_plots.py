"""What the pictures show, against loops over the published formulas."""

import numpy as np
import pytest
import torch
from conftest import blobs
from graphs import build_graph, laplacian_spectrum
from PIL import Image

from lib.report import plots
from lib.report.curves import Curve, reliability


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


def test_reliability_has_a_panel_for_each_number_of_labels():
    flat, steep = torch.full((10,), 0.3), torch.full((10,), 0.9)
    right = torch.tensor([1.0, 0.0] * 5)
    both = (reliability(flat, right), reliability(steep, right))
    curve = Curve(torch.ones(1), torch.ones(1), None, *both)
    figure = plots.reliability(dict.fromkeys((250, 50, 100, 500, 1000), curve))
    assert [axes.get_title() for axes in figure.axes] == [
        f"{n} labels" for n in (50, 100, 250, 500, 1000)
    ]
    _, published, calibrated = figure.axes[0].lines
    assert published.get_xydata().tolist() == [[pytest.approx(30), 50]]
    assert calibrated.get_xydata().tolist() == [[pytest.approx(90), 50]]
    assert published.get_label() == "published: ECE 20.0%"
