"""scripts/predict.py: the table of a classifier's answers to new pictures, and its refusals."""

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_ok, assert_refused, run_script
from PIL import Image
from runs import call, make_folder

from datasets import build_datasets
from datasets.transforms import Augmentation
from lib.cli.start import load_script
from lib.files import checkpoint
from lib.files.atomic import write_whole
from lib.report import page
from lib.runtime.devices import select
from lib.training import prediction
from models import build_model

predict = load_script("scripts/predict.py")
CLASSES = ("blue", "gray", "green", "red")


def classifier_file(path: Path, *, channels: int = 3, imagenet: bool = False, **options) -> Path:
    """A checkpoint as phase 3 writes it, of a network with random weights."""
    torch.manual_seed(1)
    name = "resnet18" if imagenet else "wrn-10-1"
    model = build_model(name, len(CLASSES), in_channels=channels, imagenet=imagenet)
    options = {"dataset": "folder", "image_size": 64 if imagenet else 16} | options
    state = {"net": model.state_dict(), "architecture": name, "classes": list(CLASSES), "step": 1}
    checkpoint.save(state | {"meta": {"options": options}}, path)
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """`pictures/` with train/ and test/, and the classifier `ckpt.pth.tar`."""
    root = tmp_path_factory.mktemp("world")
    make_folder(root / "pictures")
    classifier_file(root / "ckpt.pth.tar")
    return root


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def run(world: Path, output: Path, *words: object) -> list[dict[str, str]]:
    given = ("--checkpoint", world / "ckpt.pth.tar", "--images", world / "pictures" / "test")
    call(predict, *given, "--output", output, "--precision", "fp32", *words)
    return rows_of(output)


def test_the_table_holds_what_the_network_says_of_the_test_images(world, tmp_path):
    rows = run(world, tmp_path / "new" / "out.csv", "--top", 3)
    _, test = build_datasets("folder", world / "pictures", image_size=16)
    model = prediction.load_classifier(world / "ckpt.pth.tar").model.eval()
    with torch.no_grad():
        probabilities = model(Augmentation((), test.stats)(test.images)).softmax(dim=1)
    assert [f"test/{row['path']}" for row in rows] == list(test.paths)
    for row, expected in zip(rows, probabilities, strict=True):
        ranking = sorted(range(4), key=lambda c: -expected[c])[:3]
        assert [row["class"], row["class_2"], row["class_3"]] == [CLASSES[c] for c in ranking]
        shown = [float(row[k]) for k in ("confidence", "confidence_2", "confidence_3")]
        assert shown == pytest.approx([float(expected[c]) for c in ranking], abs=2e-5)


def test_as_many_classes_as_there_are_and_one_by_default(world, tmp_path):
    assert list(run(world, tmp_path / "a.csv")[0]) == ["path", "class", "confidence"]
    row = run(world, tmp_path / "b.csv", "--top", 99)[0]
    assert list(row)[-1] == "confidence_4"
    assert sum(float(v) for k, v in row.items() if "conf" in k) == pytest.approx(1, abs=1e-5)


def test_batches_and_blocks_change_nothing(world, tmp_path, monkeypatch):
    whole = run(world, tmp_path / "a.csv")
    monkeypatch.setattr(prediction, "BLOCK_BYTES", 1)  # three pictures in memory at a time
    parts = run(world, tmp_path / "b.csv", "-b", 3, "-j", 0)
    assert [r["path"] for r in parts] == [r["path"] for r in whole]
    assert [r["class"] for r in parts] == [r["class"] for r in whole]


def test_a_gray_classifier_reads_gray_pictures(world, tmp_path):
    file = classifier_file(tmp_path / "gray.pth.tar", channels=1)
    classifier = prediction.load_classifier(file)
    assert classifier.description.is_gray
    words = ("--checkpoint", file, "--images", world / "pictures", "--output", tmp_path / "o.csv")
    call(predict, *words)
    assert (
        len(rows_of(tmp_path / "o.csv")) == 40 + 12 + 20
    )  # train, unlabeled and test, at any depth


def test_a_classifier_of_the_imagenet_kind_sees_the_center_of_a_larger_picture(world, tmp_path):
    file = classifier_file(tmp_path / "imagenet.pth.tar", imagenet=True)
    words = ("--checkpoint", file, "--images", world / "pictures" / "test", "--precision", "fp32")
    call(predict, *words, "--output", tmp_path / "o.csv", "-j", 0)
    classifier = prediction.load_classifier(file)
    assert (classifier.description.has_margin, classifier.description.image_size) == (True, 64)
    model = classifier.model.eval()
    mean, std = (np.array(s) for s in (classifier.description.mean, classifier.description.std))
    for row in rows_of(tmp_path / "o.csv")[:4]:
        with Image.open(world / "pictures" / "test" / row["path"]) as file:
            picture = file.resize((73, 73), Image.Resampling.BILINEAR).crop((4, 4, 68, 68))
        pixels = (np.asarray(picture) / 255 - mean) / std
        with torch.no_grad():
            inputs = torch.from_numpy(pixels).float().permute(2, 0, 1)[None]
            expected = model(inputs).softmax(dim=1)[0]
        assert CLASSES[expected.argmax()] == row["class"]
        assert float(row["confidence"]) == pytest.approx(float(expected.max()), abs=0.02)


@pytest.mark.parametrize(
    ("dataset", "first_mean"), [("cifar10", 0.4914), ("patches", 0.427), ("folder", 0.485)]
)
def test_pictures_are_normalized_as_those_of_the_training_set(tmp_path, dataset, first_mean):
    file = classifier_file(tmp_path / "ckpt.pth.tar", dataset=dataset)
    assert prediction.load_classifier(file).description.mean[0] == first_mean


def test_a_published_classifier_needs_the_name_of_its_network_only(world, tmp_path):
    state = checkpoint.load(world / "ckpt.pth.tar")
    bare = {"net": {f"module.{k}": v for k, v in state["net"].items()}, "step": 1, "best_acc": 1.0}
    checkpoint.save(bare, tmp_path / "bare.pth.tar")
    with pytest.raises(ValueError, match="--architecture"):
        prediction.load_classifier(tmp_path / "bare.pth.tar")
    classifier = prediction.load_classifier(tmp_path / "bare.pth.tar", "wrn-10-1")
    assert (classifier.description.classes, classifier.description.image_size) == (
        ("0", "1", "2", "3"),
        32,
    )


def test_names_that_need_quotes_come_back_from_the_table():
    answers = prediction.Predictions(torch.tensor([[1], [0]]), torch.tensor([[0.5], [1.0]]))
    names = ('a, "b"', "c\nd"), ("x,y", "z")
    rows = list(csv.reader(prediction.table(names[0], answers, names[1]).splitlines(True)))
    assert rows[1:] == [['a, "b"', "z", "0.500000"], ["c\nd", "x,y", "1.000000"]]


def test_a_file_name_that_is_no_utf_8_does_not_lose_the_table(world, tmp_path):
    shutil.copytree(world / "pictures" / "test", tmp_path / "new")
    picture = tmp_path / "new" / "red" / "2.png"
    picture.rename(picture.with_name("caf\udce9.png"))  # its name in Latin-1
    rows = run(world, tmp_path / "out.csv", "--images", tmp_path / "new")
    assert len(rows) == 20
    assert r"red/caf\udce9.png" in [row["path"] for row in rows]


def test_outputs_that_are_no_numbers_are_refused(world, tmp_path):
    state = checkpoint.load_dict(world / "ckpt.pth.tar")
    next(iter(state["net"].values())).fill_(torch.nan)
    checkpoint.save(state, tmp_path / "nan.pth.tar")
    with pytest.raises(ValueError, match="NaN or infinity"):
        run(world, tmp_path / "out.csv", "--checkpoint", tmp_path / "nan.pth.tar")
    assert not (tmp_path / "out.csv").exists()


def test_the_report_shows_every_class_that_was_found(world, tmp_path):
    rows = run(world, tmp_path / "out.csv", "--report")
    html = (tmp_path / "out.html").read_text()
    for name in {row["class"] for row in rows}:
        count = sum(row["class"] == name for row in rows)
        file = f"out_sheets/class_{CLASSES.index(name):04d}.png"
        assert f"{name} ({count} images)" in html
        assert f'src="{file}"' in html
        pixels = np.asarray(Image.open(tmp_path / file), dtype=float)
        assert pixels.std() > 20
        assert (pixels == page.UNCLEAR).all(axis=2).any()  # framed as unknown
    assert len(list((tmp_path / "out_sheets").iterdir())) == len({row["class"] for row in rows})


def test_large_pictures_are_small_on_a_contact_sheet(world):
    classifier = prediction.load_classifier(world / "ckpt.pth.tar")
    large = replace(classifier, description=replace(classifier.description, image_size=224))
    data = prediction.pictures(world / "pictures" / "test", large)
    everything = prediction.Predictions(torch.zeros(20, 1).long(), torch.ones(20, 1))
    sheet = page.contact_sheet(everything.as_pseudo_labels(), data, 0)
    side = page.MOST_SIDE + 6 + 2  # its frame, and the gap to the next
    assert sheet.size == (10 * side + 2, 2 * side + 2)
    first = np.asarray(sheet, dtype=float)[30:70, 30:70].mean(axis=(0, 1))
    assert first.argmax() == 2  # test/blue/0.png


@pytest.mark.slow
def test_two_processes_write_the_table_of_one(world, tmp_path):
    one = run(world, tmp_path / "one.csv")
    given = ("--checkpoint", world / "ckpt.pth.tar", "--images", world / "pictures" / "test")
    words = (*given, "--output", tmp_path / "two.csv", "--precision", "fp32", "--gpus", "cpu,cpu")
    printed = assert_ok(run_script("scripts/predict.py", *words, "-b", 7))
    assert printed.count("20 pictures, 4 classes") == 1
    two = rows_of(tmp_path / "two.csv")
    assert [(r["path"], r["class"]) for r in two] == [(r["path"], r["class"]) for r in one]


def test_an_unreadable_picture_is_named_and_no_table_is_written(world, tmp_path):
    shutil.copytree(world / "pictures" / "test", tmp_path / "new")
    (tmp_path / "new" / "red" / "2.png").write_bytes(b"no picture")
    words = ("--checkpoint", world / "ckpt.pth.tar", "--images", tmp_path / "new")
    result = run_script("scripts/predict.py", *words, "--output", tmp_path / "out.csv")
    assert_refused(result, str(tmp_path / "new" / "red" / "2.png"))
    assert not (tmp_path / "out.csv").exists()


def test_bad_words_end_in_one_message(world, tmp_path):
    (tmp_path / "empty").mkdir()
    metric = tmp_path / "metric.pth.tar"
    checkpoint.save({"net": {}, "lemniscate": {}}, metric)
    other = tmp_path / "other.pth.tar"
    checkpoint.save({"net": {"a": torch.zeros(1)}}, other)
    write_whole(b"x", tmp_path / "broken.pth.tar")
    given = {"--checkpoint": world / "ckpt.pth.tar", "--images": world / "pictures"}
    for words, message in [
        ({"--images": tmp_path / "missing"}, "is no folder"),
        ({"--images": tmp_path / "empty"}, "holds no picture"),
        ({"--checkpoint": metric}, "metric of phase 1"),
        ({"--checkpoint": other}, "holds no network that this project builds"),
        ({"--checkpoint": tmp_path / "broken.pth.tar"}, "cannot be read"),
        ({"--output": tmp_path}, "is a folder"),
    ]:
        options = {"--output": tmp_path / "out.csv"} | given | words
        with pytest.raises(ValueError, match=message):
            call(predict, *(word for pair in options.items() for word in pair))


def test_the_device_is_said(world, tmp_path, capsys):
    run(world, tmp_path / "out.csv", "--rng-seed", 3)
    said = capsys.readouterr()
    assert str(select(precision="fp32")) in said.out
    assert "--rng-seed has no effect" in said.err
