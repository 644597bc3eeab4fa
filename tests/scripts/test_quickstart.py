"""The quickstart in small: 30 of its 70 epochs, two of its three draws, one of its three label counts."""

import itertools
import json
import statistics
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_ok, run_script
from runs import call

from datasets import build_datasets
from datasets.transforms import Augmentation
from lib.cli.start import load_script
from lib.labels import pseudo_files
from lib.loading.batches import in_order
from lib.runtime import devices
from lib.training.prediction import load_classifier

quickstart = load_script("scripts/quickstart.py")
ROWS = ("10, drawn from all", "10, chosen", "10")


@pytest.mark.slow
def test_the_method_beats_both_baselines_as_readme_says_and_every_file_is_left(tmp_path):
    words = ("--epochs", 30, "--splits", 2, "--num-labeled", 10, "--output", "my out")
    printed = assert_ok(run_script("scripts/quickstart.py", *words, cwd=tmp_path))
    output = tmp_path / "my out"
    record = json.loads((output / "results.json").read_text())
    check_table(record, printed)
    check_files(output)
    check_that_accuracies_are_those_of_the_unlabeled_images(record, output)
    check_that_other_splits_get_what_the_notebooks_write(output, tmp_path / "again")
    means = {
        column: statistics.fmean(record["results"][column]["10"]) for column in record["results"]
    }
    assert means["method"] > means["metric"] + 5
    assert means["method"] > means["scratch"] + 10
    assert means["method"] > means["nc-clamped"] - 1
    drawn, chosen = (statistics.fmean(record["results"]["method"][row]) for row in ROWS[:2])
    assert chosen > drawn + 5
    assert means["nc"] > means["knn"]
    assert (ROOT / "notebooks" / "pictures" / "quickstart.png").is_file()


def check_table(record: dict, printed: str) -> None:
    assert set(record["results"]) == set(quickstart.COLUMNS)
    assert set(record["test"]) == set(quickstart.TRAINED)
    assert record["meta"]["data_digest"]
    for results in (record["results"], record["test"]):
        for row in ROWS:
            cells = []
            for column in results:
                values = results[column][row]
                assert len(values) == 2
                cells.append(f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}")
            assert f"| {row} | " + " | ".join(cells) + " |" in printed


def check_files(output: Path) -> None:
    for name in ("results.png", "accuracy_coverage.png", "metric/ckpt.cifar.pth.tar"):
        assert (output / name).stat().st_size > 1000
    for algorithm in ("knn", "nc"):
        folder = output / "pseudos" / f"{algorithm}-split0"
        assert len(pseudo_files.load(folder / "10.pth.tar").labels) == 2990
        executed = json.loads((folder / f"{algorithm}.ipynb").read_text())
        assert any(cell.get("outputs") for cell in executed["cells"])
    clamped = quickstart.pseudo_file(output, "nc-clamped", 10, 0)
    assert pseudo_files.load(clamped).meta["propagation"] == {"method": "nc", "clamp": True}
    for kind, row in itertools.product(quickstart.TRAINED, ROWS):
        name = f"{kind}-{quickstart.file_name(row)}-split1"
        assert (output / "finetune" / name / "ckpt.pth.tar").is_file()
    assert (output / "chosen" / "maxherding-split0" / "chosen.html").is_file()


def check_that_accuracies_are_those_of_the_unlabeled_images(record: dict, output: Path) -> None:
    train, test = build_datasets("patches", "")
    file = output / "finetune" / "method-10-split0" / "ckpt.pth.tar"
    model = load_classifier(file).model.eval()
    right = []
    for data in (train, test):
        batches = in_order(data, Augmentation((), train.stats), devices.select("cpu"))
        with torch.no_grad():
            answers = torch.cat([model(batch.images).argmax(dim=1) for batch in batches])
        right.append(answers == data.targets)
    own = pseudo_files.load(quickstart.pseudo_file(output, "nc-clamped", 10, 0))
    assert len(own.labeled) == 10
    shares = [100 * r.double().mean().item() for r in (right[0][own.unlabeled], right[1])]
    found = [record[kind]["method"]["10"][0] for kind in ("results", "test")]
    assert found == pytest.approx(shares, abs=0.2)  # rounding of bf16


def check_that_other_splits_get_what_the_notebooks_write(output: Path, again: Path) -> None:
    metric = quickstart.load_or_extract(
        checkpoint_file=output / "metric" / "ckpt.cifar.pth.tar", dataset="patches"
    )
    quickstart.spread(metric, {"10": [10]}, again)
    for algorithm in ("knn", "nc"):
        first = pseudo_files.load(quickstart.pseudo_file(output, algorithm, 10, 0))
        own = pseudo_files.load(quickstart.pseudo_file(again, algorithm, 10, 0))
        assert first.indexes.tolist() == own.indexes.tolist()
        assert first.labels.tolist() == own.labels.tolist()


def test_impossible_numbers_are_refused_before_anything_is_deleted(tmp_path):
    kept = tmp_path / "metric" / "kept"
    kept.parent.mkdir()
    kept.write_text("x")
    with pytest.raises(ValueError, match="--num-labeled 15"):
        call(quickstart, "--num-labeled", 10, 15, "--output", tmp_path)
    assert kept.is_file()
