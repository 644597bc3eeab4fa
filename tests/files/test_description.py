"""A checkpoint says what it is: what later phases read from it, and what they make of files that do not."""

import pytest
from runs import CPU, TINY, call, finetuning, last, make_folder, pretraining
from torch import Tensor, nn

from datasets import build_datasets
from lib.features import extraction, networks
from lib.files import checkpoint, description
from lib.files.description import CLASSIFIER, METRIC, Description
from lib.files.published import describe, is_metric
from lib.training import prediction
from models.layers import EmbeddingNet

FOUND = Description(
    METRIC,
    "wrn-10-1",
    {"out_features": 8, "in_channels": 3, "normalize": True, "imagenet": False},
    (0.4, 0.5, 0.6),
    (0.2, 0.2, 0.2),
    24,
    24,
    ("a", "b"),
)


class Pixels(EmbeddingNet):
    """A network of one linear layer on the mean colors: it has no `conv1`, `bn1` or `fc`."""

    head_name = "last"

    def __init__(self, out_features: int, *, normalize: bool) -> None:
        super().__init__()
        self.normalize = normalize
        self.last = nn.Linear(3, out_features)

    def pooled(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def metric(tmp_path_factory, pictures):
    folder = tmp_path_factory.mktemp("metric")
    data = ("--dataset", "folder", "--data-dir", pictures, *TINY, "--epochs", 1)
    call(pretraining, *data, "--model-dir", folder, "--log-dir", folder / "log")
    return folder


def test_a_description_is_read_back_as_it_was_written(tmp_path):
    checkpoint.save({"net": {}, description.KEY: FOUND.state()}, tmp_path / "f")
    assert describe(checkpoint.load_dict(tmp_path / "f"), "f") == FOUND
    assert (
        describe(checkpoint.load_dict(tmp_path / "f"), "f", "resnet18").architecture == "resnet18"
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kind", "something"),
        ("architecture", 3),
        ("arguments", {1: 2}),
        ("mean", 0.5),
        ("std", ["0.2"]),
        ("image_size", 0),
        ("resize", True),
        ("classes", "ab"),
        ("num_neighbors", -1),
        ("temperature", float("nan")),
    ],
)
def test_a_wrong_entry_of_a_description_is_named(name, value):
    with pytest.raises(ValueError, match=rf"a_file: description.{name} is .*, not "):
        description.read(FOUND.state() | {name: value}, "a_file")
    without = {k: v for k, v in FOUND.state().items() if k != name}
    with pytest.raises(ValueError, match=rf"a_file: description has no {name}"):
        description.read(without, "a_file")


def test_both_phases_say_what_they_trained(metric, pictures, tmp_path):
    train, _ = build_datasets("folder", pictures, image_size=16)
    found = describe(last(metric), "metric")
    assert (found.kind, found.architecture, found.image_size) == (METRIC, "wrn-10-1", 16)
    assert found.arguments == {
        "out_features": 128,
        "in_channels": 3,
        "normalize": True,
        "imagenet": False,
    }
    assert (found.mean, found.std) == train.stats
    assert (found.num_neighbors, found.temperature) == (200, 0.1)  # of the kNN monitor
    line = ("--dataset", "folder", "--data-dir", pictures, *TINY, "--num-labeled", 8)
    files = ("--model-root", tmp_path, "--log-root", tmp_path / "log")
    call(finetuning, *line, "--input-gray", "--max-iters", 1, *files)
    found = describe(checkpoint.load_dict(tmp_path / "exp" / "ckpt.pth.tar"), "classifier")
    assert (found.kind, found.classes) == (CLASSIFIER, train.classes)
    assert (found.arguments["out_features"], found.is_gray) == (4, True)


def without_description(path, target):
    """The file as this project wrote it before it described its networks."""
    state = checkpoint.load_dict(path)
    checkpoint.save({k: v for k, v in state.items() if k != description.KEY}, target)
    return target


def test_a_file_from_before_descriptions_is_described_alike(metric, pictures, tmp_path):
    new = checkpoint.load_dict(metric / "ckpt.cifar.pth.tar")
    old = checkpoint.load_dict(without_description(metric / "ckpt.cifar.pth.tar", tmp_path / "old"))
    assert describe(old, "old") == describe(new, "new")
    line = ("--dataset", "folder", "--data-dir", pictures, *TINY, "--num-labeled", 8)
    files = ("--model-root", tmp_path, "--log-root", tmp_path / "log")
    call(finetuning, *line, "--max-iters", 1, *files)
    file = tmp_path / "exp" / "ckpt.pth.tar"
    old = checkpoint.load_dict(without_description(file, tmp_path / "old3"))
    assert describe(old, "old") == describe(checkpoint.load_dict(file), "new")


def test_a_metric_needs_no_memory_bank_and_a_network_no_conv1(monkeypatch, pictures, tmp_path):
    built = []

    def build(architecture, out_features, *, normalize):
        built.append(architecture)
        return Pixels(out_features, normalize=normalize)

    monkeypatch.setattr(networks, "build_model", build)
    words = {"arguments": {"out_features": 5, "normalize": True}, "architecture": "pixels"}
    described = Description(**vars(FOUND) | words)
    state = {"net": Pixels(5, normalize=True).state_dict(), description.KEY: described.state()}
    checkpoint.save(state, tmp_path / "metric.pth.tar")
    assert is_metric(state)
    found = extraction.load_or_extract(
        checkpoint_file=tmp_path / "metric.pth.tar",
        dataset="folder",
        data_dir=str(pictures),
        num_workers=0,
        device=CPU,
    )
    assert found.features.shape == (52, 5)
    assert set(built) == {"pixels"}  # also once without memory, to compare its size with the file
    with pytest.raises(ValueError, match="is a metric of phase 1, no classifier"):
        prediction.load_classifier(tmp_path / "metric.pth.tar")


def test_a_classifier_of_an_unknown_kind_of_images_is_normalized_as_it_says(monkeypatch, tmp_path):
    monkeypatch.setattr(networks, "build_model", lambda _, **arguments: Pixels(**arguments))
    words = {"kind": CLASSIFIER, "arguments": {"out_features": 2, "normalize": False}}
    described = Description(**vars(FOUND) | words)
    state = {"net": Pixels(2, normalize=False).state_dict(), description.KEY: described.state()}
    checkpoint.save(state, tmp_path / "c.pth.tar")
    classifier = prediction.load_classifier(tmp_path / "c.pth.tar")
    assert classifier.description.classes == ("a", "b")
    assert classifier.description.mean == (0.4, 0.5, 0.6)
    assert classifier.model.last.out_features == 2


def test_a_network_that_no_longer_fits_its_description_is_refused(tmp_path):
    arguments = {"out_features": 8, "wings": 2}
    described = Description(**vars(FOUND) | {"arguments": arguments})
    state = {"net": Pixels(8, normalize=True).state_dict(), description.KEY: described.state()}
    with pytest.raises(ValueError, match=r"its network cannot be built .*wings"):
        networks.load_network(state, "a_file")
