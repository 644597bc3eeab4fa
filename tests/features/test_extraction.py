"""Features: extracted in evaluation mode, row by row, kept while checkpoint and data stay the same."""

import pytest
import torch
from runs import load_embedding, make_folder
from torch import nn

from datasets import UNKNOWN
from datasets.images import GRAY_LUMA, GRAY_STATS, ImageSet
from datasets.transforms import Augmentation
from lib.features import extraction
from lib.files import checkpoint
from lib.loading import batches
from lib.runtime.devices import Device
from models import build_model

CPU = Device(torch.device("cpu"), bf16=False)
STATS = ((0.5,) * 3, (0.25,) * 3)


def images_of(n=23, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return ImageSet("noise", images, torch.arange(n) % 4, ("a", "b", "c", "d"), STATS)


def network(**keywords):
    """A small network whose running statistics are far from those of any batch."""
    model = build_model("wrn-10-1", 8, normalize=True, **keywords)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    return model


def one_by_one(model, data):
    """Each image alone through the network in evaluation mode."""
    model.eval()
    rows = [model((image[None].float() / 255 - 0.5) / 0.25) for image in data.images]
    return torch.cat(rows).detach()


@pytest.mark.parametrize("training", [True, False])
def test_features_are_extracted_in_evaluation_mode_and_batchnorm_stays_as_it_is(training):
    model, data = network(), images_of()
    expected = one_by_one(model, data)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train(training)
    rows = extraction.extract(model, data, CPU)
    assert torch.allclose(rows, expected, atol=1e-5)
    assert model.training is training
    assert not rows.requires_grad
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("batch_size", [1, 7, 10, 500])
def test_short_last_batch_is_written_to_its_own_rows(monkeypatch, batch_size):
    model, data = network(), images_of()
    in_order = batches.in_order
    monkeypatch.setattr(
        extraction,
        "in_order",
        lambda *words, **keywords: in_order(*words, **keywords | {"batch_size": batch_size}),
    )
    rows = extraction.extract(model, data, CPU)
    assert rows.shape == (23, 8)
    assert rows.dtype == torch.float32
    assert torch.allclose(rows, one_by_one(model, data), atol=1e-5)


def test_features_are_unit_vectors_of_a_network_without_normalization_and_in_bf16():
    model = network()
    model.normalize = False
    for device in (CPU, Device(torch.device("cpu"), bf16=True)):
        rows = extraction.extract(model, images_of(), device)
        assert torch.allclose(rows.norm(dim=1), torch.ones(23), atol=1e-5)


def test_gray_networks_get_gray_images():
    shown = Augmentation((), GRAY_STATS, luma=GRAY_LUMA)
    rows = extraction.extract(network(in_channels=1), images_of(), CPU, preprocessing=shown)
    assert rows.shape == (23, 8)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(5), "matrix"),
        (torch.zeros(5, 2).long(), "matrix"),
        ([[1.0]], "matrix"),
        (torch.zeros(0, 8), "no rows"),
        (torch.tensor([[1.0], [float("nan")]]), "first is row 1"),
        (torch.tensor([[float("inf")], [1.0]]), "first is row 0"),
        (torch.tensor([[1.0], [1e300]], dtype=torch.float64), "first is row 1"),
        (torch.ones(4, 2), "4 rows for a data set of 5"),
    ],
)
def test_bad_features_are_refused(bad, message):
    with pytest.raises(ValueError, match=message) as caught:
        extraction.check(bad, 5 if len(bad) == 4 else None, source="some.file")
    assert "some.file" in str(caught.value)


def test_checked_features_are_unit_float32():
    rows = extraction.check(torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64))
    assert torch.allclose(rows, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    assert rows.dtype == torch.float32


@pytest.mark.parametrize("prefix", ["train_", "", "val_"])
def test_every_published_kind_of_feature_file_is_read(tmp_path, prefix):
    path, rows = tmp_path / "f.pth.tar", torch.randn(6, 4)
    state = {f"{prefix}features": rows, f"{prefix}labels": torch.arange(6).int()}
    checkpoint.save(state, path)
    got, labels, meta = extraction.read(path)
    assert torch.allclose(got, rows / rows.norm(dim=1, keepdim=True), atol=1e-6)
    assert torch.equal(labels, torch.arange(6))
    assert meta == {}


@pytest.mark.parametrize("normalize", [True, False])
def test_rows_off_the_unit_sphere_are_reported_and_scaled_unless_they_shall_stay(
    tmp_path, capsys, normalize
):
    rows = torch.tensor([[0.6, 0.8], [1.5, 2.0], [0.0, 0.0], [0.0, 0.5], [1.0005, 0.0]])
    path = tmp_path / "f.pth.tar"
    checkpoint.save({"train_features": rows, "train_labels": torch.arange(5)}, path)
    found = extraction.load_or_extract(features=path, normalize=normalize).features
    said = capsys.readouterr().out
    assert f"{path}: 2 of 5 rows are off the unit sphere, of norms 0.5 to 2.5; " in said
    assert said.count("\n") == 1
    if normalize:
        expected = torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        torch.testing.assert_close(found, expected)
        assert "scaled to unit length" in said
    else:
        assert torch.equal(found, rows)
        assert "left as they are" in said
    checkpoint.save({"train_features": found, "train_labels": torch.arange(5)}, path)
    extraction.load_or_extract(features=path, normalize=normalize)
    assert bool(capsys.readouterr().out) != normalize  # nothing to report of unit vectors


@pytest.mark.parametrize("legacy", [True, False])
def test_a_bare_tensor_of_features_is_read_without_labels(tmp_path, legacy):
    path, rows = tmp_path / "colorization_embedding_128.t7", torch.randn(6, 4)
    torch.save(rows, path, _use_new_zipfile_serialization=not legacy)
    got, labels, _ = extraction.read(path)
    assert got.shape == (6, 4)
    assert labels is None


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"net": {}}, "holds no features"),
        ({"train_labels": torch.arange(3)}, "holds no features"),
        ({"train_features": torch.ones(3, 2), "train_labels": torch.arange(4)}, "4 labels for 3"),
        ({"train_features": torch.ones(3, 2), "train_labels": [0, 1, 2]}, "tensor"),
        (
            {"train_features": torch.ones(3, 2), "train_labels": torch.ones(3, 1)},
            "of 1 dimensions",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path, state, message):
    checkpoint.save(state, path := tmp_path / "f.pth.tar")
    with pytest.raises(ValueError, match=message) as caught:
        extraction.read(path)
    assert str(path) in str(caught.value)


def test_a_written_feature_file_has_the_published_keys(tmp_path):
    rows, targets = torch.eye(4), torch.tensor([0, 2, UNKNOWN, 1])
    names = ("ant", "bee", "cat", "dog", "elk")
    checkpoint.save(extraction.FeatureSet(rows, targets, 5, "d", names).state(), tmp_path / "f")
    state = checkpoint.load(tmp_path / "f")
    assert state["train_features"].dtype == torch.float32
    assert state["train_labels"].dtype == torch.int64
    back = extraction.load_or_extract(features=tmp_path / "f")
    assert torch.equal(back.features, rows)
    assert torch.equal(back.targets, targets)
    assert (back.num_classes, back.digest, back.classes) == (5, "d", names)


@pytest.fixture
def phase1(tmp_path, monkeypatch):
    """A checkpoint of phase 1, a data set that `load_or_extract` finds, and a count of the extractions."""
    data = {"set": images_of(), "extractions": 0}
    monkeypatch.setattr(extraction, "build_datasets", lambda *_, **__: (data["set"], None))
    extract = extraction.extract

    def counted(*words, **keywords):
        data["extractions"] += 1
        return extract(*words, **keywords)

    monkeypatch.setattr(extraction, "extract", counted)
    data["file"] = tmp_path / "ckpt.cifar.pth.tar"
    data["model"] = network()
    save_network(data["file"], data["model"])
    return data


def save_network(path, model):
    checkpoint.save({"net": model.state_dict(), "architecture": "wrn-10-1"}, path)


def load_or_extract(phase1, **keywords):
    return extraction.load_or_extract(checkpoint_file=phase1["file"], device=CPU, **keywords)


def test_an_extraction_is_kept_and_used_again_bit_for_bit(phase1):
    first, second = load_or_extract(phase1), load_or_extract(phase1)
    assert phase1["extractions"] == 1
    assert torch.equal(first.features, second.features)
    assert torch.equal(second.targets, phase1["set"].targets)
    assert first.digest == second.digest == phase1["set"].digest
    assert second.num_classes == 4
    assert first.classes == second.classes == ("a", "b", "c", "d")
    assert torch.allclose(first.features, one_by_one(phase1["model"], phase1["set"]), atol=1e-5)


def test_features_that_another_process_lacks_are_extracted_with_it(phase1, monkeypatch):
    load_or_extract(phase1)
    asked = []

    def of_two(missing):  # as if the other process saw no file
        asked.append(missing)
        return True

    monkeypatch.setattr(extraction, "any_process", of_two)
    load_or_extract(phase1)
    assert asked == [False]
    assert phase1["extractions"] == 2


def test_kept_features_are_not_used_for_another_checkpoint(phase1):
    first = load_or_extract(phase1)
    other = network()
    save_network(phase1["file"], other)
    second = load_or_extract(phase1)
    assert phase1["extractions"] == 2
    assert not torch.allclose(first.features, second.features, atol=1e-3)
    assert torch.allclose(second.features, one_by_one(other, phase1["set"]), atol=1e-5)


def test_kept_features_are_not_used_for_other_images_labels_or_sizes(phase1):
    first = load_or_extract(phase1)
    phase1["set"] = images_of(seed=1)
    assert not torch.allclose(first.features, load_or_extract(phase1).features, atol=1e-3)
    assert phase1["extractions"] == 2
    phase1["set"] = images_of(n=22, seed=1)
    assert len(load_or_extract(phase1).features) == 22
    load_or_extract(phase1, image_size=40)
    assert phase1["extractions"] == 4


def test_labels_are_those_of_the_data_set_at_hand_not_a_cached_global(phase1):
    load_or_extract(phase1)
    before = phase1["set"]
    phase1["set"] = ImageSet("noise", before.images, before.targets.flip(0), before.classes, STATS)
    assert torch.equal(load_or_extract(phase1).targets, before.targets.flip(0))


def test_features_that_are_not_finite_never_reach_the_disk(phase1, tmp_path):
    phase1["model"].fc.bias.data[3] = float("nan")
    save_network(phase1["file"], phase1["model"])
    with pytest.raises(ValueError, match="NaN"):
        load_or_extract(phase1)
    assert [f.name for f in tmp_path.iterdir()] == [phase1["file"].name]


def test_a_file_without_labels_takes_those_of_the_data_set_of_its_length(phase1, tmp_path):
    torch.save(torch.randn(23, 4), tmp_path / "bare.t7")
    assert torch.equal(
        extraction.load_or_extract(features=tmp_path / "bare.t7").targets, phase1["set"].targets
    )
    torch.save(torch.randn(20, 4), tmp_path / "short.t7")
    with pytest.raises(ValueError, match="20 rows for a data set of 23"):
        extraction.load_or_extract(features=tmp_path / "short.t7")


def test_labels_of_a_folder_are_taken_without_decoding_an_image(tmp_path, monkeypatch):
    make_folder(tmp_path / "pictures")
    monkeypatch.setattr("datasets.folder.read_images", None)
    torch.save(torch.randn(52, 4), tmp_path / "bare.t7")
    words = {"dataset": "folder", "data_dir": str(tmp_path / "pictures")}
    found = extraction.load_or_extract(features=tmp_path / "bare.t7", **words)
    assert found.targets.tolist() == [*torch.arange(4).repeat_interleave(10), *[UNKNOWN] * 12]
    assert found.classes == ("blue", "gray", "green", "red")
    assert found.digest == ""  # phase 3 may hold the images in memory or in files


def test_a_backbone_without_head_is_no_metric(tmp_path):
    weights = {"0.weight": torch.randn(16, 1, 3, 3)}
    checkpoint.save(weights, tmp_path / "colorization.pth.tar")
    with pytest.raises(ValueError, match=r"colorization\.pth\.tar holds no network"):
        load_embedding(tmp_path / "colorization.pth.tar")


def test_neither_features_nor_checkpoint_is_a_mistake_with_a_message():
    with pytest.raises(ValueError, match="give features"):
        extraction.load_or_extract()


@pytest.mark.parametrize(("channels", "dims"), [(3, 16), (1, 128)])
def test_an_embedding_network_is_rebuilt_from_its_weights(tmp_path, channels, dims):
    model = build_model("resnet18", dims, in_channels=channels, normalize=True)
    weights = {f"module.{k}": v for k, v in model.state_dict().items()}
    checkpoint.save({"net": weights}, path := tmp_path / "published.pth.tar")
    loaded = load_embedding(path, "resnet18")
    assert loaded.normalize
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    with pytest.raises(ValueError, match="does not fit"):
        load_embedding(path, "wrn-10-1")
