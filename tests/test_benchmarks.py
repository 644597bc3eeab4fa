"""The benchmark scripts run through their command lines; what they print is compared, never the time."""

import json

import pytest
from conftest import assert_ok, assert_refused, run_script


@pytest.mark.slow
def test_the_benchmark_of_propagation_compares_with_the_literal_steps(tmp_path):
    words = ("--images", 450, 900, "--classes", 3, "--num-labeled", 30, 90)
    output, picture = tmp_path / "numbers.json", tmp_path / "growth.png"
    words += ("--output", output, "--picture", picture)
    printed = assert_ok(run_script("scripts/benchmark_propagation.py", *words))
    record = json.loads(output.read_text())
    variants = record["variants"]
    assert list(variants) == ["literal", "nc", "filter", "knn"]
    for n in ("30", "90"):
        literal, ours = (variants[name]["precision"][n] for name in ("literal", "nc"))
        assert abs(literal - ours) < 2  # of 810 images, at the published tolerance of 1e-2
        assert literal > 50
    assert variants["nc"]["agreement"]["90"] > 90
    assert set(record["growth"]) == set(variants)
    assert picture.stat().st_size > 10_000
    assert all(floor["floor_s"] > 0 for floor in record["floors"].values())
    assert "nc: " in printed
    assert "times as fast as literal" in printed
    assert printed.index("nc: ") < printed.index("filter: ")


def test_features_without_labels_cannot_be_measured(tmp_path):
    result = run_script("scripts/benchmark_propagation.py", "--features", tmp_path / "missing")
    assert_refused(result, "missing", "does not exist")
