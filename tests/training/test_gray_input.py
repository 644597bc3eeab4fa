"""Gray input is the published one in new runs, and what it was in files from before that."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import CPU, TINY, call, finetuning, make_folder
from skimage.color import rgb2gray

from datasets import build_datasets
from lib.features import extraction
from lib.files import checkpoint, description
from lib.files.description import METRIC, Description
from lib.files.published import describe
from lib.training import prediction
from models import build_model

PUBLISHED = ((0.2125, 0.7154, 0.0721), (0.0,) * 3, (1.0,) * 3)
LUMA_BEFORE = (0.299, 0.587, 0.114)


def published_input(images):
    """B x 3 x S x S bytes as the published code shows them, by scikit-image."""
    pictures = images.permute(0, 2, 3, 1).numpy()
    return torch.from_numpy(np.stack([rgb2gray(p) for p in pictures]))[:, None].float()


def input_before(images, stats):
    """The same as this project showed them before: other weights, and normalized."""
    gray = sum(w * images[:, i : i + 1] / 255 for i, w in enumerate(LUMA_BEFORE))
    mean, std = (sum(values) / 3 for values in stats)
    return (gray - mean) / std


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    make_folder(root / "pictures")
    line = ("--dataset", "folder", "--data-dir", root / "pictures", *TINY, "--input-gray")
    words = [*line, "--num-labeled", 8, "--model-root", root, "--log-root", root / "log"]
    call(finetuning, *words, "--max-iters", 4)
    new = root / "exp" / "ckpt.pth.tar"
    state, (train, test) = checkpoint.load_dict(new), sets(root)
    mean, std = map(list, train.stats)
    entry = state[description.KEY] | {"mean": mean, "std": std}
    entry.pop("luma")
    checkpoint.save(state | {description.KEY: entry}, before := root / "before.pth.tar")
    bare = {k: v for k, v in state.items() if k != description.KEY}
    checkpoint.save(bare, older := root / "older.pth.tar")  # from before there were descriptions
    published = {k: state[k] for k in ("net", "optimizer", "step", "best_acc")}
    checkpoint.save(published, theirs := root / "published.pth.tar")
    model = build_model("wrn-10-1", 4, in_channels=1).eval()
    model.load_state_dict(state["net"])
    files = {"new": new, "before": before, "older": older, "published": theirs}
    return {"root": root, "words": words, "files": files, "model": model, "test": test}


def sets(root):
    return build_datasets("folder", root / "pictures", image_size=16)


def expected_outputs(world, name):
    test = world["test"]
    is_published = name in ("new", "published")
    shown = published_input(test.images) if is_published else input_before(test.images, test.stats)
    with torch.no_grad():
        return world["model"](shown)


FILES = ("new", "before", "older", "published")


@pytest.mark.parametrize("name", FILES)
def test_a_classifier_is_evaluated_on_the_input_that_it_was_trained_on(world, name):
    precision = ("--precision", "fp32")
    file = ("--eval", "--resume", world["files"][name])
    loss = call(finetuning, *world["words"], *precision, *file)["loss"]
    naive = F.cross_entropy(expected_outputs(world, name).double(), world["test"].targets)
    assert loss == pytest.approx(naive.item(), rel=1e-4)
    other = expected_outputs(world, "before" if name in ("new", "published") else "new")
    assert loss != pytest.approx(F.cross_entropy(other, world["test"].targets).item(), rel=1e-3)


@pytest.mark.parametrize("name", ["new", "before", "older"])  # the published one is for 32 pixels
def test_predictions_show_it_the_same_input(world, name):
    classifier = prediction.load_classifier(world["files"][name])
    data = prediction.pictures(world["root"] / "pictures" / "test", classifier)
    found = prediction.predict(classifier, data, CPU, top=4)
    expected = expected_outputs(world, name).softmax(dim=1).sort(dim=1, descending=True)
    assert torch.equal(found.labels, expected.indices)
    torch.testing.assert_close(found.confidence, expected.values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FILES)
def test_its_features_are_of_the_same_input(world, tmp_path, name):
    copy = tmp_path / "copy.pth.tar"
    copy.write_bytes(world["files"][name].read_bytes())
    reading = {"dataset": "folder", "data_dir": str(world["root"] / "pictures"), "num_workers": 0}
    words = {"architecture": "wrn-10-1", "image_size": 16, "device": CPU}
    found = extraction.load_or_extract(checkpoint_file=copy, **reading, **words)
    train, _ = sets(world["root"])
    is_published = name in ("new", "published")
    shown = (
        published_input(train.images) if is_published else input_before(train.images, train.stats)
    )
    with torch.no_grad():
        expected = F.normalize(world["model"](shown), dim=1)
    torch.testing.assert_close(found.features, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["new", "before", "older"])
def test_a_resumed_run_goes_on_with_the_input_that_it_began_with(
    world, tmp_path, monkeypatch, name
):
    seen = []

    class Watched(finetuning.Augmentation):
        def __call__(self, images, params=()):
            seen.append(super().__call__(images, params))
            return seen[-1]

    monkeypatch.setattr(finetuning, "Augmentation", Watched)
    words = [*world["words"], "--max-iters", 4, "--resume", world["files"][name]]
    state = checkpoint.load_dict(world["files"][name])
    checkpoint.save(state | {"step": 3}, file := tmp_path / "at3.pth.tar")
    words[words.index("--model-root") + 1] = tmp_path
    words[-1] = file
    call(finetuning, *words)
    found = describe(checkpoint.load_dict(tmp_path / "exp" / "ckpt.pth.tar"), "resumed")
    if name == "new":
        assert (found.luma, found.mean, found.std) == PUBLISHED
        assert all(x.min() >= 0 and x.max() <= 1 for x in seen)
    else:
        assert (found.luma, *found.stats) == (LUMA_BEFORE, *world["test"].stats)
        assert all(x.min() < 0 for x in seen)


def test_a_new_run_from_weights_of_before_has_the_published_input(world, tmp_path):
    words = [*world["words"], "--max-iters", 1, "--pretrained", world["files"]["before"]]
    words[words.index("--model-root") + 1] = tmp_path
    call(finetuning, *words)
    found = describe(checkpoint.load_dict(tmp_path / "exp" / "ckpt.pth.tar"), "new")
    assert (found.luma, found.mean, found.std) == PUBLISHED


def test_files_without_weights_of_colors_are_read_as_before_and_impossible_ones_are_named():
    arguments = {"out_features": 2, "in_channels": 1}
    gray = Description(METRIC, "wrn-10-1", arguments, (0.4,) * 3, (0.2,) * 3, 16, 16)
    entry = {k: v for k, v in gray.state().items() if k != "luma"}
    assert description.read(entry, "f") == replace(gray, luma=LUMA_BEFORE)
    color = entry | {"arguments": {"out_features": 2, "in_channels": 3}}
    assert description.read(color, "f").luma == ()
    for luma in ((0.5,), 0.5, (0.1, 0.2, float("nan"))):
        with pytest.raises(ValueError, match=r"f: description\.luma.* is .*not "):
            description.read(entry | {"luma": luma}, "f")
    with pytest.raises(ValueError, match="luma is not the three weights of a gray network"):
        description.read(color | {"luma": LUMA_BEFORE}, "f")
