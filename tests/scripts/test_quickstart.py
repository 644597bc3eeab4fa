"""The quickstart: small in the quick suite, whole in the slow one."""

import json
import statistics
from pathlib import Path

import pytest
from conftest import ROOT, assert_ok, assert_refused, run_script

from lib.cli.start import load_script
from lib.labels import pseudo_files

quickstart = load_script("scripts/quickstart.py")


def mean(results: dict, column: str, num_labeled: int) -> float:
    return statistics.fmean(results[column][str(num_labeled)])


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, str]:
    """What a small quickstart left, started from another folder; and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    words = ("--epochs", 1, "--max-iters", 2, "--splits", 1, "--num-labeled", 20)
    result = run_script("scripts/quickstart.py", *words, "--output", "my out", cwd=folder)
    return folder / "my out", assert_ok(result)


def test_the_table_shows_the_results(small):
    output, printed = small
    record = json.loads((output / "results.json").read_text())
    assert set(record["results"]) == set(quickstart.COLUMNS)
    row = [f"{mean(record['results'], name, 20):.1f} ± 0.0" for name in quickstart.COLUMNS]
    assert "| 20 | " + " | ".join(row) + " |" in printed
    assert record["meta"]["data_digest"]


def test_every_file_on_the_way_is_left(small):
    output, _ = small
    for name in ("results.png", "accuracy_coverage.png", "metric/ckpt.cifar.pth.tar"):
        assert (output / name).stat().st_size > 1000
    for algorithm in ("knn", "nc"):
        folder = output / "pseudos" / f"{algorithm}-split0"
        assert len(pseudo_files.load(folder / "20.pth.tar").labels) == 2980
        executed = json.loads((folder / f"{algorithm}.ipynb").read_text())
        assert any(cell.get("outputs") for cell in executed["cells"])
    clamped = quickstart.pseudo_file(output, "nc-clamped", 20, 0)
    assert pseudo_files.load(clamped).meta["propagation"] == {"method": "nc", "clamp": True}
    for kind in quickstart.TRAINED:
        assert (output / "finetune" / f"{kind}-20-split0" / "ckpt.pth.tar").is_file()


def test_the_other_splits_get_what_the_notebooks_write_for_the_first(small, tmp_path):
    output, _ = small
    metric = quickstart.load_or_extract(
        checkpoint_file=output / "metric" / "ckpt.cifar.pth.tar", dataset="patches"
    )
    quickstart.spread(metric, [20], range(1), tmp_path)
    for algorithm in ("knn", "nc"):
        first = pseudo_files.load(quickstart.pseudo_file(output, algorithm, 20, 0))
        again = pseudo_files.load(quickstart.pseudo_file(tmp_path, algorithm, 20, 0))
        assert first.indexes.tolist() == again.indexes.tolist()
        assert first.labels.tolist() == again.labels.tolist()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--epochs", 0), "--epochs: must be positive, not 0"),
        (("--num-labeled", 10, 15), "--num-labeled 15"),
    ],
)
def test_impossible_numbers_are_refused_before_anything_is_deleted(tmp_path, words, message):
    kept = tmp_path / "metric" / "kept"
    kept.parent.mkdir()
    kept.write_text("x")
    result = run_script("scripts/quickstart.py", *words, "--output", tmp_path)
    assert_refused(result, message)
    assert kept.is_file()


@pytest.mark.slow
def test_the_method_beats_both_baselines_as_readme_says(tmp_path):
    assert_ok(run_script("scripts/quickstart.py", "--output", tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    for n in (10, 20, 50, 100):
        method = mean(results, "method", n)
        assert method > mean(results, "metric", n)
        assert method > mean(results, "scratch", n)
    for n in (10, 20):
        assert mean(results, "method", n) >= mean(results, "scratch", n) + 10
    for n in (10, 20, 50):
        assert mean(results, "nc", n) > mean(results, "knn", n)
    assert (ROOT / "notebooks" / "pictures" / "quickstart.png").is_file()
