"""The ImageNet notebooks: chunks and a single graph, from a feature file, run headless."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_ok, blobs
from PIL import Image
from runs import call, fake_venv, run_shell
from test_notebooks import assert_picture, defaults, outputs, printed, run_notebook

from datasets.patches import PHOTOGRAPHS
from lib.cli.start import load_script
from lib.files import checkpoint
from lib.graph.knn import classify
from lib.labels import pseudo_files, pseudo_labels
from lib.labels.split import labeled_split
from lib.propagation import EmbeddingGraph, propagate
from lib.report import plots

imagenet = load_script("unsupervised/imagenet.py")
classifier = load_script("imagenet-semi.py")
predict = load_script("scripts/predict.py")
make_pictures = load_script("scripts/make_pictures.py")
CLASSES, LABELS = 12, 24
QUICK = {"num_neighbors": 8, "num_eigenvectors": 14}  # of nc, for 480 images


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> dict[str, Path]:
    """Feature files with the published keys: training images, validation images."""
    folder = tmp_path_factory.mktemp("cache")
    rows, targets = blobs(CLASSES, 45, spread=0.35)
    train = {"features": rows[:480], "labels": targets[:480]}
    checkpoint.save(train, folder / "train.pth.tar")
    val = {"val_features": rows[480:], "val_labels": targets[480:]}
    checkpoint.save(val, folder / "val.pth.tar")
    return {name: folder / f"{name}.pth.tar" for name in ("train", "val")}


def run(name: str, cache: dict[str, Path], output: Path, **parameters: Any) -> dict[str, Any]:
    parameters = {"features": str(cache["train"]), "num_labeled": [LABELS]} | parameters
    return run_notebook(name, output / "out.ipynb", save_path=str(output), **parameters)


@pytest.fixture(scope="module")
def in_chunks(cache, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("chunks")
    return output, run("nc-imagenet", cache, output, chunks=3, probabilities=True, **QUICK)


def test_the_defaults_are_the_published_settings():
    for name in ("knn-imagenet", "nc-imagenet"):
        given = defaults(name)
        assert given["num_labeled"] == [13000, 26000, 51000]
        assert (given["chunks"], given["probabilities"]) == (10, False)
        assert (given["dataset"], given["image_size"]) == ("folder", 224)
    knn, nc = defaults("knn-imagenet"), defaults("nc-imagenet")
    assert (knn["method"], knn["k"], knn["temperature"]) == ("knn", 200, 0.1)
    assert (nc["method"], nc["graph"], nc["num_neighbors"]) == ("nc", "imagenet", None)
    assert (nc["num_eigenvectors"], nc["temperature"]) == (200, 1)


def test_chunks_hold_every_unlabeled_image_once_in_no_order_of_classes(cache, in_chunks):
    folder = in_chunks[0] / f"num_labeled_{LABELS}"
    assert {p.name for p in folder.iterdir()} == {f"3_{i}.pth.tar" for i in range(3)}
    targets = checkpoint.load(cache["train"])["labels"]
    split = labeled_split(targets, LABELS, CLASSES)
    parts = [pseudo_files.load(folder / f"3_{i}.pth.tar") for i in range(3)]
    assert sorted(torch.cat([p.indexes for p in parts]).tolist()) == sorted(
        split.unlabeled.tolist()
    )
    for part in parts:
        assert torch.equal(part.labeled, split.labeled)
        # cut in the order of the true classes, a chunk would hold four of the twelve
        assert len(targets[part.unlabeled].unique()) == CLASSES
        assert part.meta["options"]["chunks"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["knn-imagenet", "nc-imagenet"])
def test_the_same_parameters_give_the_same_bytes(cache, tmp_path, monkeypatch, name):
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # somebody may commit meanwhile, and that is recorded
    written = set()
    for place in ("a", "b", "c"):
        (tmp_path / place).mkdir()
        run(name, cache, tmp_path / place, chunks=2, **(QUICK if name[0] == "n" else {}))
        parts = sorted((tmp_path / place).rglob("2_*.pth.tar"))
        written.add(b"".join(path.read_bytes() for path in parts))
    assert len(written) == 1
    meta = pseudo_files.load(parts[-1]).meta
    assert {"options", "versions", "git_commit", "data_digest"} <= meta.keys()
    assert meta["options"]["seed"] == 0


def test_the_table_holds_top_1_and_top_5_precision_of_all_chunks(cache, in_chunks):
    folder, notebook = in_chunks
    targets = checkpoint.load(cache["train"])["labels"]
    top1, top5 = [], []
    for place in range(3):
        state = checkpoint.load(folder / f"num_labeled_{LABELS}" / f"3_{place}.pth.tar")
        for index, row in zip(state["pseudo_indexes"], state["pseudo_probs"], strict=True):
            ranking = sorted(range(CLASSES), key=lambda c: -row[c])
            top1.append(int(targets[index]) == ranking[0])
            top5.append(int(targets[index]) in ranking[:5])
    assert sum(top5) > sum(top1) > 0.5 * len(top1)
    (row,) = (x for x in printed(notebook).splitlines() if x.split()[:1] == [str(LABELS)])
    assert row.split()[1] == f"{100 * sum(top1) / len(top1):.2f}%"
    assert row.split()[4] == f"{100 * sum(top5) / len(top5):.2f}%"


def test_pictures_are_written_and_shown(in_chunks):
    folder, notebook = in_chunks
    pictures = {p.name for p in folder.glob("*.png")}
    assert pictures == {"similarity.png", "accuracy_coverage.png"}
    assert_picture(folder / "similarity.png")
    curve = np.asarray(Image.open(folder / "accuracy_coverage.png").convert("RGB"))
    assert (curve == (31, 119, 180)).all(axis=2).sum() > 300  # a line in matplotlib's first color
    assert len([o for o in outputs(notebook) if "image/png" in o.get("data", {})]) == 2


@pytest.mark.slow
def test_one_graph_of_everything_gives_one_file_and_shows_its_spectrum(cache, tmp_path):
    run("nc-imagenet", cache, tmp_path, chunks=1, **QUICK)
    assert_picture(tmp_path / "spectral.png")
    state = checkpoint.load(tmp_path / f"{LABELS}.pth.tar")
    assert "pseudo_probs" not in state  # as published, unless asked for
    train = checkpoint.load(cache["train"])
    metric = EmbeddingGraph(train["features"], "imagenet", QUICK["num_neighbors"])
    split = labeled_split(train["labels"], LABELS, CLASSES)
    labels = train["labels"][split.labeled]
    answer = propagate(metric, "nc", split, labels, CLASSES, num_eigenvectors=14)
    assert torch.equal(state["pseudo_labels"], answer.scores.argmax(1)[state["pseudo_indexes"]])


@pytest.mark.slow
def test_nearest_neighbors_and_what_they_say_of_validation_images(cache, tmp_path):
    notebook = run("knn-imagenet", cache, tmp_path, chunks=2, val_features=str(cache["val"]), k=5)
    train, val = checkpoint.load(cache["train"]), checkpoint.load(cache["val"])
    votes = classify(val["val_features"], train["features"], train["labels"], CLASSES, k=5)
    right = (votes.argmax(dim=1) == val["val_labels"]).double().mean()
    assert f"kNN accuracy of 60 other images: top-1 {100 * right:.2f}%" in printed(notebook)
    folder = tmp_path / f"num_labeled_{LABELS}"
    pseudo = pseudo_labels.merged([pseudo_files.load(folder / f"2_{i}.pth.tar") for i in (0, 1)])
    assert pseudo.meta["propagation"] == {"method": "knn", "k": 5, "temperature": 0.1}
    assert pseudo.meta["classes"] == []  # the feature file names none
    votes = classify(
        *(train["features"][pseudo.indexes], train["features"][pseudo.labeled]),
        *(train["labels"][pseudo.labeled], CLASSES),
        k=5,
    )
    assert torch.equal(pseudo.labels, votes.argmax(dim=1))


def walk(data: Path, output: Path, size: int, steps: int, chunks: int, **parameters: Any) -> Path:
    """The ImageNet path over a folder of pictures: metric, chunks, classifier, predictions; their table."""
    words = ("--data-dir", data, "--image-size", size, "-j", 0, "-b", 16, "--log-dir", output)
    metric = output / "metric" / "model_best.pth.tar"
    call(imagenet, *words, "--epochs", 1, "--nce-k", 16, "--model-dir", metric.parent)
    run_notebook(
        *("nc-imagenet", output / "out.ipynb"),
        checkpoint=str(metric),
        data_dir=str(data),
        image_size=size,
        num_workers=0,
        save_path=str(output),
        num_labeled=["all"],
        chunks=chunks,
        **parameters,
    )
    words = (*words[:-2], "--num-labeled", "all", "--pretrained", metric, "--max-iters", steps)
    folders = ("--model-root", output, "--log-root", output / "log")
    pseudo = ("--pseudo-dir", output / "num_labeled_all", "--pseudo-ratio", 0.5)
    accuracy = call(classifier, *words, *folders, *pseudo, "--gpus", "cpu")["last"]
    given = ("--checkpoint", output / "exp" / "ckpt.pth.tar", "--images", data / "test", "-j", 0)
    call(predict, *given, "--output", output / "out.csv")
    with open(output / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    right = sum(row["path"].split("/")[0] == row["class"] for row in rows)
    # bfloat16, and batches of another size: an image between two classes may fall on either side
    assert 100 * right / len(rows) == pytest.approx(accuracy, abs=100 / len(rows))
    return output


def test_with_many_classes_pictures_show_a_few_of_them():
    targets = torch.arange(300).repeat(30)
    chosen, borders = plots._sample_by_class(targets)
    assert len(targets[chosen].unique()) == plots.SAMPLE_CLASSES
    assert len(chosen) == plots.SAMPLE_CLASSES * 30
    assert len(borders) == plots.SAMPLE_CLASSES - 1


def test_the_shell_script_hands_paths_and_settings_to_the_notebook(tmp_path):
    log = tmp_path / "log"
    venv = str(fake_venv(tmp_path / "venv", log))
    out, file = tmp_path / "out", tmp_path / "features.pth.tar"
    file.touch()
    words = ("--features", file, "--save-path", out, "--single", "-y", "num_labeled: [5]")
    output = assert_ok(run_shell("propagate_imagenet.sh", *words, VENV=venv))
    assert f"are in {out}" in output
    words = ("knn", "--checkpoint", file, "--data-dir", tmp_path, "--save-path", out)
    assert_ok(run_shell("propagate_imagenet.sh", *words, VENV=venv))
    first, second = (line for line in log.read_text().splitlines() if "papermill" in line)
    assert f"notebooks/nc-imagenet.ipynb {out}/nc-imagenet.ipynb -r features {file}" in first
    assert first.endswith(f"-p chunks 1 -y num_labeled: [5] -r save_path {out}")
    assert f"notebooks/knn-imagenet.ipynb {out}/knn-imagenet.ipynb" in second
    assert f"-r checkpoint {file} -r data_dir {tmp_path} -r save_path {out}" in second
    assert "chunks" not in second


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("poisson",), "no algorithm poisson"),
        (("--features", "missing.pth.tar"), "missing.pth.tar: there is no such file"),
        (("--save-path",), "--save-path needs a path"),
    ],
)
def test_the_shell_script_refuses_what_it_cannot_run(tmp_path, words, message):
    log = tmp_path / "log"
    result = run_shell("propagate_imagenet.sh", *words, VENV=str(fake_venv(tmp_path / "venv", log)))
    assert result.returncode == 2
    assert message in result.stderr
    assert not log.exists()


@pytest.mark.parametrize("script", ["propagate_imagenet.sh", "own_images.sh", "notebook.sh"])
def test_shell_scripts_show_their_header_as_manual(tmp_path, script):
    result = run_shell(script, "--help", VENV=str(tmp_path / "none"))
    assert f"bash scripts/{script}" in assert_ok(result)
    assert result.stdout.rstrip().endswith("(scripts/setup.sh).")
    assert "set -euo" not in result.stdout
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_from_pictures_to_predictions_at_224_pixels_in_ten_chunks_and_in_one_graph(tmp_path):
    data = tmp_path / "pictures"
    call(make_pictures, "--output", data, "--labeled", 2, "--unlabeled", 10, "--test", 3)
    few = {"num_neighbors": 5, "num_eigenvectors": 12}
    walk(data, tmp_path, 224, 4, 10, **few)
    chunks = [pseudo_files.load(p) for p in (tmp_path / "num_labeled_all").iterdir()]
    assert len(chunks) == 10
    assert all(chunk.meta["data_digest"] for chunk in chunks)
    assert all(chunk.meta["classes"] == sorted(PHOTOGRAPHS) for chunk in chunks)
    run_notebook(
        *("nc-imagenet", tmp_path / "one.ipynb"),
        checkpoint=str(tmp_path / "metric" / "model_best.pth.tar"),
        data_dir=str(data),
        num_workers=0,
        num_labeled=["all"],
        chunks=1,
        save_path=str(tmp_path),
        **few,
    )
    whole = pseudo_files.load(tmp_path / "all.pth.tar")
    assert sorted(whole.indexes.tolist()) == sorted(torch.cat([c.indexes for c in chunks]).tolist())
