"""The kNN monitor measures at the temperature of the run, or of the file that it measures."""

import math

import pytest
import torch
from runs import CPU, TINY, call, last, log_lines, make_folder, pretraining

from datasets.images import CIFAR10_STATS, ImageSet
from lib.files import checkpoint, description
from lib.files.description import METRIC, Description
from lib.training.pretraining import Monitor
from models import build_model

# One neighbor of class 0 at cosine 0.9, three of class 1 at cosine 0.8: class 0 wins the vote where
# exp(0.9 / T) > 3 exp(0.8 / T), which is T < 0.1 / log(3).
COSINES, CLASSES, LIMIT = (0.9, 0.8, 0.8, 0.8), (0, 1, 1, 1), 0.1 / math.log(3)
BANK = torch.tensor([[c, (1 - c * c) ** 0.5] for c in COSINES])


def images(targets):
    pixels = torch.zeros(len(targets), 3, 32, 32, dtype=torch.uint8)
    return ImageSet("folder", pixels, torch.tensor(targets), ("a", "b"), CIFAR10_STATS)


def monitor(monkeypatch, temperature=0.5):
    """A monitor whose only test image lies at (1, 0) and is of class 0."""
    monkeypatch.setattr(Monitor, "_extracted", lambda *_: torch.tensor([[1.0, 0.0]]))
    return Monitor(images(CLASSES), images([0]), CPU, temperature)


@pytest.mark.parametrize("temperature", [0.07, 0.99 * LIMIT, 1.01 * LIMIT, 0.1])
def test_votes_are_weighted_at_the_temperature_of_the_monitor(monkeypatch, temperature):
    scores = monitor(monkeypatch, temperature)(torch.nn.Identity(), BANK)
    assert scores["top1"] == (100 if temperature < LIMIT else 0)


def published_cifar(model, *params):
    bank = {"memory": BANK, "params": torch.tensor(params)}
    return {"net": model.state_dict(), "epoch": 3, "lemniscate": bank}


def own(model, temperature):
    found = Description(
        METRIC, "wrn-10-1", {"out_features": 2}, *CIFAR10_STATS, 32, 32, temperature=temperature
    )
    return published_cifar(model) | {description.KEY: found.state()}


def before_descriptions(model, **options):
    bank = {"memory": BANK}
    return {"net": model.state_dict(), "lemniscate": bank, "meta": {"options": options}}


FILES = {
    "described": (own, (0.07,), 0.07),
    "described, too": (own, (0.2,), 0.2),
    "full softmax": (published_cifar, (0.08, 0.5), 0.08),
    "NCE": (published_cifar, (4096.0, 0.07, 28319.5, 0.5), 0.07),
    "bank without its parameters": (published_cifar, (), 0.1),
    "impossible parameters": (published_cifar, (-1.0, 0.5), 0.1),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_measured_at_the_temperature_recorded_in_it(monkeypatch, tmp_path, capsys, name):
    make, values, temperature = FILES[name]
    model = build_model("wrn-10-1", 2, normalize=True)
    checkpoint.save(make(model, *values), file := tmp_path / "f.pth.tar")
    scores = monitor(monkeypatch).measure_file(str(file), model, stored=True)
    assert scores["top1"] == (100 if temperature < LIMIT else 0)
    assert f"at temperature {temperature:g}" in capsys.readouterr().out


@pytest.mark.parametrize(("options", "temperature"), [({"nce_t": 0.07}, 0.07), ({}, 0.1)])
def test_a_file_from_before_descriptions_has_it_among_its_options(
    monkeypatch, tmp_path, options, temperature
):
    model = build_model("wrn-10-1", 2, normalize=True)
    checkpoint.save(before_descriptions(model, **options), file := tmp_path / "f.pth.tar")
    scores = monitor(monkeypatch).measure_file(str(file), model, stored=True)
    assert scores["top1"] == (100 if temperature < LIMIT else 0)


def test_a_published_imagenet_metric_without_any_record_has_the_published_one(
    monkeypatch, tmp_path, capsys
):
    model = build_model("resnet18", 2, imagenet=True, normalize=True)
    state = {"state_dict": model.state_dict(), "lemniscate": {"memory": BANK}}
    checkpoint.save(state, file := tmp_path / "f.pth.tar")
    scores = monitor(monkeypatch).measure_file(str(file), model, stored=True)
    assert scores["top1"] == 100
    assert "at temperature 0.07" in capsys.readouterr().out


def test_a_run_measures_at_its_own_temperature_and_records_it(monkeypatch, tmp_path, capsys):
    seen = []

    def watched(self, model, bank):
        seen.append(self.temperature)
        return {"top1": 50.0, "top5": 100.0, "nearest": 50.0}

    monkeypatch.setattr(Monitor, "__call__", watched)
    pictures = make_folder(tmp_path / "pictures")
    line = ("--dataset", "folder", "--data-dir", pictures, *TINY, "--model-dir", tmp_path)
    files = ("--log-dir", tmp_path / "log")
    call(pretraining, *line, *files, "--epochs", 1, "--nce-t", 0.3)
    assert log_lines(tmp_path / "log")[-1]["knn_top1"] == 50
    assert last(tmp_path)["description"]["temperature"] == 0.3
    measured = ("--test-only", "--resume", tmp_path / "ckpt.cifar.pth.tar")
    call(pretraining, *line, *files, *measured)
    assert "nce-t" not in capsys.readouterr().err
    call(pretraining, *line, *files, *measured, "--nce-t", 0.5)
    assert "--nce-t has no effect with --test-only" in capsys.readouterr().err
    assert seen == [0.3] * 3
