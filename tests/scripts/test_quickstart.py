"""The quickstart in small: 30 of its 70 epochs, two of its eight draws, one of its four label counts."""

import json
import statistics
from pathlib import Path

import pytest
from conftest import ROOT, assert_ok, run_script
from runs import call

from lib.cli.start import load_script
from lib.labels import pseudo_files

quickstart = load_script("scripts/quickstart.py")


@pytest.mark.slow
def test_the_method_beats_both_baselines_as_readme_says_and_every_file_is_left(tmp_path):
    words = ("--epochs", 30, "--splits", 2, "--num-labeled", 10, "--output", "my out")
    printed = assert_ok(run_script("scripts/quickstart.py", *words, cwd=tmp_path))
    output = tmp_path / "my out"
    record = json.loads((output / "results.json").read_text())
    check_table(record, printed)
    check_files(output)
    check_that_other_splits_get_what_the_notebooks_write(output, tmp_path / "again")
    means = {
        column: statistics.fmean(record["results"][column]["10"]) for column in record["results"]
    }
    assert means["method"] > means["metric"]
    assert means["method"] > means["scratch"] + 10
    assert means["nc"] > means["knn"]
    assert (ROOT / "notebooks" / "pictures" / "quickstart.png").is_file()


def check_table(record: dict, printed: str) -> None:
    assert set(record["results"]) == set(quickstart.COLUMNS)
    assert record["meta"]["data_digest"]
    cells = []
    for column in quickstart.COLUMNS:
        values = record["results"][column]["10"]
        assert len(values) == 2
        cells.append(f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}")
    assert "| 10 | " + " | ".join(cells) + " |" in printed


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
    for kind in quickstart.TRAINED:
        assert (output / "finetune" / f"{kind}-10-split0" / "ckpt.pth.tar").is_file()


def check_that_other_splits_get_what_the_notebooks_write(output: Path, again: Path) -> None:
    metric = quickstart.load_or_extract(
        checkpoint_file=output / "metric" / "ckpt.cifar.pth.tar", dataset="patches"
    )
    quickstart.spread(metric, [10], range(1), again)
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
