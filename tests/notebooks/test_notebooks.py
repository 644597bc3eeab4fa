"""Phase 2 through its notebooks: run headless, and what they write."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_ok
from PIL import Image
from runs import (
    CPU,
    call,
    fake_venv,
    finetuning,
    load_embedding,
    make_folder,
    pretraining,
    run_shell,
)

from datasets import build_datasets
from lib.features.extraction import extract, load_or_extract
from lib.files import checkpoint
from lib.labels import pseudo_files
from lib.labels.split import labeled_split
from lib.propagation import EmbeddingGraph, propagate
from lib.report.curves import accuracy_coverage

NOTEBOOKS = ("knn", "nc")
COMMON = {"dataset", "data_dir", "checkpoint", "architecture", "features", "save_path"}
COMMON |= {"num_labeled", "seed", "method"}


def code_cells(name: str) -> list[dict[str, Any]]:
    notebook = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def defaults(name: str) -> dict[str, Any]:
    """The values of the parameters cell: assignments of plain values, nothing imported."""
    given: dict[str, Any] = {}
    exec("".join(code_cells(name)[0]["source"]), {"__builtins__": {}}, given)
    return given


def run_notebook(name: str, output: Path, **parameters: object) -> dict[str, Any]:
    """Execute a notebook as papermill's command line does; the executed one."""
    words = [f"{key}: {json.dumps(value)}" for key, value in parameters.items()]
    result = subprocess.run(
        [
            *(sys.executable, "-m", "papermill", "--no-progress-bar"),
            *(str(ROOT / "notebooks" / f"{name}.ipynb"), str(output)),
            *(word for parameter in words for word in ("-y", parameter)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert_ok(result)
    return json.loads(output.read_text())


def outputs(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [out for cell in notebook["cells"] for out in cell.get("outputs", [])]


def printed(notebook: dict[str, Any]) -> str:
    return "".join("".join(o["text"]) for o in outputs(notebook) if o["output_type"] == "stream")


def assert_picture(path: Path) -> None:
    pixels = np.asarray(Image.open(path).convert("L"), dtype=float)
    assert min(pixels.shape) > 200
    assert pixels.std() > 10  # a blank page has no contrast
    # something is drawn in the middle, inside of the axes
    h, w = pixels.shape
    assert pixels[h // 3 : h // 2, w // 4 : w // 2].std() > 5


@pytest.fixture(scope="session")
def metric(tmp_path_factory) -> Path:
    """A checkpoint of phase 1 on the embedded data set."""
    folder = tmp_path_factory.mktemp("metric")
    words = ("--dataset", "patches", "--arch", "wrn-10-1", "--epochs", 1, "--lr", 0.1)
    call(pretraining, *words, "--model-dir", folder, "--log-dir", folder / "log")
    return folder / "ckpt.cifar.pth.tar"


@pytest.fixture(scope="session")
def executed(metric, tmp_path_factory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Both notebooks on the embedded data set: folder and executed notebook by name."""
    done = {}
    for name in NOTEBOOKS:
        folder = tmp_path_factory.mktemp(name)
        parameters = {"dataset": "patches", "num_labeled": [10, 50], "save_path": str(folder)}
        notebook = run_notebook(
            name, folder / f"{name}.ipynb", checkpoint=str(metric), **parameters
        )
        done[name] = (folder, notebook)
    return done


@pytest.mark.parametrize("name", [p.stem for p in (ROOT / "notebooks").glob("*.ipynb")])
def test_notebooks_hold_calls_and_plots_only(name):
    code = code_cells(name)
    lines = [line for cell in code for line in "".join(cell["source"]).splitlines()]
    assert not [line for line in lines if line.lstrip().startswith(("def ", "class ", "async "))]
    assert "lambda" not in "".join(lines)
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    tagged = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
    assert tagged == code[:1]
    assert set(defaults(name)) >= COMMON
    assert defaults(name)["seed"] == 0


def test_the_defaults_are_the_published_settings():
    knn, nc = defaults("knn"), defaults("nc")
    assert (knn["method"], knn["k"], knn["temperature"]) == ("knn", 200, 0.1)
    assert (nc["graph"], nc["num_neighbors"], nc["num_eigenvectors"]) == ("cifar", None, 200)
    assert (nc["method"], nc["temperature"]) == ("nc", 1)
    assert knn["num_labeled"] == nc["num_labeled"] == [50, 100, 250, 500, 1000, 2000, 4000, 8000]
    model_dir = pretraining.build_parser().get_default("model_dir")
    assert knn["checkpoint"] == nc["checkpoint"] == f"{model_dir}/{pretraining.LAST}"


@pytest.mark.parametrize("name", NOTEBOOKS)
@pytest.mark.parametrize("count", [10, 50])
def test_files_have_the_published_keys_and_kinds(executed, name, count):
    file = executed[name][0] / f"{count}.pth.tar"
    state = checkpoint.load_dict(file)
    unknown = 3000 - count
    expected = {
        "pseudo_indexes": ((unknown,), torch.int64),
        "pseudo_labels": ((unknown,), torch.int64),
        "pseudo_probs": ((unknown, 10), torch.float32),
        "pseudo_weights": ((unknown,), torch.float32),
        "labeled_indexes": ((count,), torch.int64),
        "unlabeled_indexes": ((unknown,), torch.int64),
    }
    assert {k: (tuple(state[k].shape), state[k].dtype) for k in expected} == expected
    train, _ = build_datasets("patches", "")
    pseudo = pseudo_files.load(file)
    pseudo.require_fit(3000, 10, count, train.digest)
    assert pseudo.meta["options"]["algorithm"] == name
    assert pseudo.meta["classes"] == list(train.classes)
    assert torch.equal(pseudo.labeled, labeled_split(train.targets, count, 10).labeled)
    assert {"options", "versions", "git_commit", "data_digest"} <= pseudo.meta.keys()
    assert pseudo.meta["options"]["seed"] == 0
    precision = (pseudo.labels == train.targets[pseudo.indexes]).float().mean()
    assert precision > 0.2  # twice of guessing, after one epoch


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_table_holds_the_precision_of_the_files(executed, name):
    folder, notebook = executed[name]
    train, _ = build_datasets("patches", "")
    for count in (10, 50):
        pseudo = pseudo_files.load(folder / f"{count}.pth.tar")
        correct = (pseudo.labels == train.targets[pseudo.indexes]).double()
        # the file has calibrated probabilities, in proportion to published^(1 / T)
        published = pseudo.probabilities.double() ** pseudo.meta.get("calibration", 1.0)
        published /= published.sum(dim=1, keepdim=True)
        # the only label of a class is never held out
        assert ("calibration" in pseudo.meta) == (count == 50)
        entropy = -(published * (published + 1e-7).log()).sum(dim=1)
        rankings = correct, correct[entropy.argsort()]
        counts = torch.arange(1, len(correct) + 1)
        aucs = [100 * (found.cumsum(0) / counts).mean() for found in rankings]
        row = rf"{count:6d}  {100 * correct.mean():8.2f}%  +{aucs[0]:.2f}%"
        found = re.search(row + 3 * r"  +(\d+\.\d+)%" + "\n", printed(notebook))
        # images of equal entropy may lie in another order
        assert float(found[1]) == pytest.approx(float(aucs[1]), abs=0.02)
        for place, probabilities in enumerate((published, pseudo.probabilities.double()), 2):
            largest, error = probabilities.amax(dim=1), 0.0
            for upper in torch.arange(1, 16) / 15:
                own = (largest > upper - 1 / 15) & (largest <= upper)
                error += abs(float((correct - largest)[own].sum())) / len(correct)
            # an image on the border of two bins may lie in either
            assert float(found[place]) == pytest.approx(100 * error, abs=0.02)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_pictures_are_written_and_shown(executed, name):
    folder, notebook = executed[name]
    expected = {"similarity.png", "accuracy_coverage.png"}
    expected |= {"spectral.png", "similarity_spectral.png"} if name == "nc" else set()
    assert {path.name for path in folder.glob("*.png")} == expected
    for path in folder.glob("*.png"):
        assert_picture(path)
    # without a renderer a figure is shown as the text <Figure size ...>
    shown = [out for out in outputs(notebook) if "image/png" in out.get("data", {})]
    assert len(shown) == len(expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_another_method_spreads_the_labels_of_the_same_images(executed, metric, tmp_path, name):
    words = {"dataset": "patches", "checkpoint": str(metric), "num_labeled": [50]}
    words |= {"method": "poisson", "save_path": str(tmp_path)}
    notebook = run_notebook(name, tmp_path / "out.ipynb", **words)
    pseudo = pseudo_files.load(tmp_path / "50.pth.tar")
    published = pseudo_files.load(executed[name][0] / "50.pth.tar")
    assert pseudo.meta["propagation"]["method"] == "poisson"
    assert torch.equal(pseudo.labeled, published.labeled)
    assert not torch.equal(pseudo.labels, published.labels)
    found = load_or_extract(checkpoint_file=metric, dataset="patches")
    labels = found.targets[pseudo.labeled]
    split = labeled_split(found.targets, 50, 10, 0)
    answer = propagate(EmbeddingGraph(found.features), "poisson", split, labels, 10)
    assert torch.equal(pseudo.labels, answer.scores.argmax(dim=1)[pseudo.indexes])
    curve = accuracy_coverage(pseudo, found.targets)
    assert f"{curve.overall:.2f}%" in printed(notebook)


def test_the_votes_of_the_knn_notebook_are_those_of_its_parameters(metric, executed):
    pseudo = pseudo_files.load(executed["knn"][0] / "50.pth.tar")
    found = load_or_extract(checkpoint_file=metric, dataset="patches")
    similarities = (
        found.features[pseudo.indexes].double() @ found.features[pseudo.labeled].double().T
    )
    votes = (similarities / 0.1).exp() @ torch.eye(10).double()[found.targets[pseudo.labeled]]
    expected = votes / votes.sum(dim=1, keepdim=True)
    torch.testing.assert_close(pseudo.confidence.double(), expected.amax(1), rtol=0, atol=2e-5)
    calibrated = expected ** (1 / pseudo.meta["calibration"])
    calibrated /= calibrated.sum(dim=1, keepdim=True)
    torch.testing.assert_close(pseudo.probabilities.double(), calibrated, rtol=0, atol=2e-5)


def test_features_are_extracted_in_evaluation_mode_and_kept(executed, metric):
    kept = metric.with_name("ckpt.cifar.patches.features.pth.tar")
    train, _ = build_datasets("patches", "")
    model = load_embedding(metric)
    features = checkpoint.load_dict(kept)["train_features"]
    expected = extract(model, train, CPU)
    # the notebook computes in bf16 where the hardware has it
    assert (features * expected).sum(dim=1).min() > 0.99
    mean, std = (torch.tensor(s).view(1, 3, 1, 1) for s in train.stats)
    images = (train.images[:50] / 255 - mean) / std
    with torch.no_grad():
        torch.testing.assert_close(expected[:50], model.eval()(images), rtol=0, atol=1e-5)
        in_training_mode = model.train()(images)
    assert (in_training_mode * expected[:50]).sum(dim=1).min() < 0.98


def test_a_classifier_can_be_trained_on_what_a_notebook_wrote(executed, metric, tmp_path, capsys):
    words = ("--dataset", "patches", "--arch", "wrn-10-1", "--num-labeled", 10, "--resume", metric)
    call(
        *(finetuning, *words, "--pseudo-file", executed["nc"][0] / "10.pth.tar"),
        *("--pseudo-ratio", 0.1, "--max-iters", 1, "--model-root", tmp_path, "-b", 8),
        *("--log-root", tmp_path / "log"),
    )
    assert "10 labeled and 299 pseudo-labeled images of 3000" in capsys.readouterr().out


@pytest.fixture(scope="session")
def unlabeled(tmp_path_factory) -> tuple[Path, Path]:
    """A folder with 8 labeled and 60 unlabeled pictures, and a feature file for them."""
    root = tmp_path_factory.mktemp("unlabeled")
    data = make_folder(root / "data", unlabeled=60, test=False)
    for path in data.glob("train/*/*.png"):
        if int(path.stem) >= 2:
            path.unlink()
    train, _ = build_datasets("folder", data, image_size=16)
    features = train.images.flatten(1).float() - 128
    file = root / "features.pth.tar"
    checkpoint.save({"train_features": features, "train_labels": train.targets}, file)
    return data, file


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_without_true_labels_curves_are_left_out_and_files_written(unlabeled, tmp_path, name):
    # through the shell script; `features` skips the extraction: there is no checkpoint at all here
    data, features = unlabeled
    venv = fake_venv(tmp_path / "venv", tmp_path / "log")
    (venv / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    out = tmp_path / "out"
    parameters = {"dataset": "folder", "data_dir": data, "features": features, "checkpoint": "none"}
    words = [w for pair in (parameters | {"save_path": out}).items() for w in ("-p", *pair)]
    words += ["-y", "num_labeled: [8, all]"]
    output = assert_ok(run_shell("propagate_cifar10.sh", name, *words, VENV=str(venv)))
    assert f"{name}: pseudo-labels, pictures and the executed notebook are in {out}" in output
    pictures = {"similarity.png"}
    pictures |= {"spectral.png", "similarity_spectral.png"} if name == "nc" else set()
    files = {"8.pth.tar", "all.pth.tar", f"{name}.ipynb"}
    assert {path.name for path in out.iterdir()} == files | pictures
    notebook = json.loads((out / f"{name}.ipynb").read_text())
    assert "68 images" in printed(notebook)
    assert "no true label is known" in printed(notebook)
    # four colors: any propagation worth the name tells them apart
    train, _ = build_datasets("folder", data, image_size=16)
    colors = [train.classes.index(Path(p).parent.name) for p in train.paths]
    for count in ("8", "all"):
        pseudo = pseudo_files.load(out / f"{count}.pth.tar")
        assert sorted(pseudo.indexes.tolist()) == list(range(8, 68))
        assert pseudo.labels.tolist() == [colors[i] for i in pseudo.indexes.tolist()]


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_same_parameters_give_the_same_bytes(unlabeled, tmp_path, monkeypatch, name):
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # somebody may commit meanwhile, and that is recorded
    data, features = unlabeled
    written = set()
    for run in ("a", "b", "c"):
        run_notebook(
            *(name, tmp_path / f"{run}.ipynb"),
            dataset="folder",
            data_dir=str(data),
            features=str(features),
            num_labeled=[8],
            save_path=str(tmp_path / run),
        )
        written.add((tmp_path / run / "8.pth.tar").read_bytes())
    assert len(written) == 1


def test_the_shell_script_runs_the_notebooks_it_is_asked_for(tmp_path):
    log = tmp_path / "log"
    venv = str(fake_venv(tmp_path / "venv", log))
    mine = tmp_path / "mine"
    words = ("-p", "dataset", "patches", "-p", "save_path", mine, "-y", "num_labeled: [10, 50]")
    assert_ok(run_shell("propagate_cifar10.sh", "nc", *words, VENV=venv))
    assert_ok(run_shell("propagate_cifar10.sh", *words, VENV=venv))
    runs = [line for line in log.read_text().splitlines() if "papermill" in line]
    places = [("nc", mine), ("knn", mine / "knn"), ("nc", mine / "nc")]
    assert len(runs) == 3
    for line, (name, folder) in zip(runs, places, strict=True):
        assert f"notebooks/{name}.ipynb {folder}/{name}.ipynb" in line
        assert "-p dataset patches -y num_labeled: [10, 50]" in line
        assert line.endswith(f"-r save_path {folder}")
        assert folder.is_dir()


def test_the_shell_script_refuses_an_unknown_algorithm(tmp_path):
    log = tmp_path / "log"
    venv = str(fake_venv(tmp_path / "venv", log))
    result = run_shell("propagate_cifar10.sh", "spectral", VENV=venv)
    assert result.returncode == 2
    assert "no algorithm spectral" in result.stderr
    assert not log.exists()
