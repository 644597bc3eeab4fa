"""scripts/choose.py: which images to label, all the way to a classifier."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from conftest import blobs
from runs import call, make_folder

from datasets import build_datasets
from lib.cli.start import load_script
from lib.features.extraction import FeatureSet, read
from lib.files import checkpoint
from lib.labels import chosen, pseudo_files
from lib.propagation.active_learning import METHODS, max_herding

choose = load_script("scripts/choose.py")
propagate = load_script("scripts/propagate.py")
finetuning = load_script("cifar-semi.py")
COLORS = ("red", "green", "blue", "gray")


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Path:
    """Features of the patches: a direction for each class, and noise."""
    data, _ = build_datasets("patches", "")
    rng = torch.Generator().manual_seed(0)
    centers = torch.randn(10, 32, generator=rng)
    rows = centers[data.targets] + torch.randn(3000, 32, generator=rng)
    path = tmp_path_factory.mktemp("features") / "features.pth.tar"
    found = FeatureSet(rows, data.targets, 10, data.digest, data.classes)
    checkpoint.save(found.state(), path)
    return path


@pytest.fixture
def world(tmp_path) -> tuple[Path, Path]:
    """Pictures of four colors, none with a label, and features that tell the colors apart."""
    make_folder(tmp_path / "made", unlabeled=40)
    shutil.move(tmp_path / "made" / "unlabeled", tmp_path / "data" / "unlabeled")
    data, _ = build_datasets("folder", tmp_path / "data", image_size=16)
    colors = torch.tensor([COLORS.index(Path(path).parent.name) for path in data.paths])
    rows = torch.eye(8)[colors] + 0.1 * torch.randn(len(data), 8)
    checkpoint.save(rows, tmp_path / "rows.pth.tar")
    return tmp_path / "data", tmp_path / "rows.pth.tar"


def fill_in(table: Path) -> None:
    """Write the color, which is the folder of each picture, as its label."""
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert all(row["label"] == "" for row in rows)
    with table.open("w") as file:
        file.write("path,label\n")
        file.writelines(f"{row['path']},{Path(row['path']).parent.name}\n" for row in rows)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_a_list_and_a_page(features, tmp_path, method):
    words = ("--features", features, "--dataset", "patches", "--method", method)
    new = call(choose, *words, "--budget", 20, "--save-path", tmp_path)
    found = chosen.read(tmp_path / "chosen.csv")
    assert torch.equal(found.indexes, new)
    assert len(new.unique()) == 20
    assert found.meta["options"]["method"] == method
    assert found.meta["data_digest"] == build_datasets("patches", "")[0].digest
    page = (tmp_path / "chosen.html").read_text()
    assert "1 to 20 of 20" in page
    assert (tmp_path / "chosen_01.png").stat().st_size > 1000
    assert not (tmp_path / "labels.csv").exists()  # the patches are not files
    again = call(choose, *words, "--budget", 20, "--save-path", tmp_path)
    assert torch.equal(again, new)
    if method == "stratified":
        targets = build_datasets("patches", "")[0].targets
        assert sorted(targets[new[:10]].tolist()) == list(range(10))


def test_a_beginning_of_the_default_choice_is_the_choice_of_fewer(features, tmp_path):
    words = ("--features", features, "--dataset", "patches", "--save-path", tmp_path)
    many = call(choose, *words, "--budget", 12)
    assert torch.equal(call(choose, *words, "--budget", 5), many[:5])
    assert torch.equal(many, max_herding(read(features)[0], 12))


def test_later_images_are_chosen_where_the_labels_are_uncertain(features, tmp_path):
    words = ("--features", features, "--dataset", "patches")
    lists = [tmp_path / name / "chosen.csv" for name in ("first", "covered", "uncertain")]
    first = call(choose, *words, "--budget", 6, "--save-path", lists[0].parent)
    with pytest.warns(UserWarning, match="holds no image of class"):
        call(
            propagate, *words, "--method", "knn", "--num-labeled", lists[0], "--save-path", tmp_path
        )
    pseudo = pseudo_files.load(tmp_path / "chosen.pth.tar")
    assert torch.equal(pseudo.labeled, first)
    given = ("--labeled", lists[0], "--save-path", lists[1].parent)
    with pytest.warns(UserWarning, match="holds no image of class"):
        covered = call(choose, *words, "--budget", 4, *given)
    given = ("--pseudo-file", tmp_path / "chosen.pth.tar", "--save-path", lists[2].parent)
    uncertain = call(choose, *words, "--budget", 4, *given)
    weights = torch.zeros(3000)
    weights[pseudo.indexes] = 1 - pseudo.confidence
    rows = read(features)[0]
    assert torch.equal(covered, max_herding(rows, 4, labeled=first))
    assert torch.equal(uncertain, max_herding(rows, 4, labeled=first, weights=weights))
    for file, new in zip(lists[1:], (covered, uncertain), strict=True):
        assert torch.equal(chosen.read(file).indexes, torch.cat([first, new]))


def test_the_spectral_embedding_is_another_place_to_choose_from(tmp_path):
    rows, targets = blobs(4, 30, spread=0.3)
    checkpoint.save(FeatureSet(rows, targets, 4).state(), tmp_path / "rows.pth.tar")
    words = ("--features", tmp_path / "rows.pth.tar", "--dataset", "patches", "--num-neighbors", 10)
    new = call(choose, *words, "--space", "spectral", "--budget", 4, "--save-path", tmp_path)
    assert sorted(targets[new].tolist()) == [0, 1, 2, 3]
    assert list((tmp_path / "work").glob("spectrum-*"))


def test_from_images_without_any_label_to_a_classifier(world, tmp_path, capsys):
    data, rows = world
    own = ("--dataset", "folder", "--data-dir", data, "--image-size", 16)
    words = (*own, "--features", rows)
    call(choose, *words, "--budget", 4, "--save-path", tmp_path / "c")
    given = ("--num-labeled", tmp_path / "c" / "chosen.csv")
    with pytest.raises(ValueError, match="no image has a label"):
        call(propagate, *words, "--num-labeled", 4, "--save-path", tmp_path / "p")

    fill_in(tmp_path / "c" / "labels.csv")
    with pytest.raises(ValueError, match=r"labels\.csv holds labels that are not to be lost"):
        call(choose, *words, "--budget", 4, "--save-path", tmp_path / "c")
    shutil.copy(tmp_path / "c" / "labels.csv", data)
    # the labeled images come first now, and the rows of a feature file have to follow them
    with pytest.warns(UserWarning, match="not in labels.csv"):
        train, _ = build_datasets("folder", data, image_size=16)
    colors = [train.classes.index(Path(path).parent.name) for path in train.paths]
    checkpoint.save(torch.eye(8)[colors] + 0.1 * torch.randn(len(train), 8), rows)
    with pytest.warns(UserWarning, match="not in labels.csv"):
        call(propagate, *words, *given, "--num-neighbors", 6, "--save-path", tmp_path / "p")
    pseudo = pseudo_files.load(tmp_path / "p" / "chosen.pth.tar")
    assert {Path(train.paths[i]).parent.name for i in pseudo.labeled.tolist()} == set(COLORS)
    assert pseudo.labels.tolist() == [colors[i] for i in pseudo.indexes.tolist()]

    runs = ("--model-root", tmp_path / "m", "--log-root", tmp_path / "l", "--gpus", "cpu")
    train_words = (*own, "--arch", "wrn-10-1", "-b", 8, "--max-iters", 2, *runs)
    with pytest.warns(UserWarning, match="not in labels.csv"):
        call(finetuning, *train_words, *given, "--pseudo-file", tmp_path / "p" / "chosen.pth.tar")
    assert "4 labeled and 36 pseudo-labeled images of 40, 4 classes" in capsys.readouterr().out


def test_the_table_keeps_the_labels_that_are_known_and_the_test_images(tmp_path):
    make_folder(tmp_path / "data", unlabeled=12)
    data, test = build_datasets("folder", tmp_path / "data", image_size=16)
    new = torch.tensor([45, 50])
    shutil.copytree(tmp_path / "data", tmp_path / "table")
    lines = chosen.table_to_fill_in(new, data, test).decode().splitlines()
    assert lines[:2] == ["path,label,split", f"{data.paths[45]},,train"]
    (tmp_path / "table" / "labels.csv").write_text("\n".join(lines))
    with pytest.warns(UserWarning, match="become training images without a label"):
        same, same_test = build_datasets("folder", tmp_path / "table", image_size=16)
    for before, after in ((data, same), (test, same_test)):
        assert dict(zip(before.paths, before.targets.tolist(), strict=True)) == dict(
            zip(after.paths, after.targets.tolist(), strict=True)
        )


def test_a_changed_list_is_noticed_on_resuming(features, tmp_path):
    words = ("--dataset", "patches", "--gpus", "cpu", "--arch", "wrn-10-1", "-b", 4)
    words += ("--model-root", tmp_path / "m", "--log-root", tmp_path / "l", "--max-iters", 2)
    given = ("--features", features, "--dataset", "patches", "--method", "stratified")
    call(choose, *given, "--budget", 20, "--save-path", tmp_path)
    words += ("--num-labeled", tmp_path / "chosen.csv")
    call(finetuning, *words, "--stop-after", 1)
    call(choose, *given, "--budget", 20, "--rng-seed", 1, "--save-path", tmp_path)
    with pytest.raises(ValueError, match="trained on other images or labels"):
        call(finetuning, *words, "--resume", "auto")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give --checkpoint FILE"),
        (("--budget", "3001"), "3001 images to choose among 3000 without a label"),
        (("--labeled", "missing.csv"), "missing.csv cannot be read"),
        (("--labeled", "all"), "40 images to choose among 0 without a label"),
        (("--labeled", "all", "--pseudo-file", "x"), "name one"),
        (("--pseudo-file", "missing.pth.tar"), "missing.pth.tar"),
    ],
)
def test_a_choice_that_cannot_be_made_says_why(features, tmp_path, words, said):
    source = ("--features", features, "--dataset", "patches") if words else ()
    with pytest.raises(ValueError, match=said):
        call(choose, *source, *words, "--save-path", tmp_path)


def test_lists_are_checked_before_any_work(tmp_path):
    (tmp_path / "a.csv").write_text("index\n1\n")
    words = ("--features", "missing.pth.tar", "--save-path", tmp_path, "--num-labeled")
    with pytest.raises(
        ValueError, match=r"b\.csv: there is no such file; scripts/choose\.py makes"
    ):
        call(propagate, *words, tmp_path / "b.csv")
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a.csv", tmp_path / "b")
    with pytest.raises(ValueError, match=r"would both write a\.pth\.tar"):
        call(propagate, *words, tmp_path / "a.csv", tmp_path / "b" / "a.csv")
