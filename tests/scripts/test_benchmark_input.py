"""The benchmark of the input pipeline runs through its command line; pixels are compared, never the time."""

import json

import pytest
from conftest import assert_ok, assert_refused, run_script

SCRIPT = "scripts/benchmarks/input.py"


@pytest.mark.slow
def test_the_benchmark_of_the_input_compares_speed_and_pixels_with_torchvision(tmp_path):
    output = tmp_path / "numbers.json"
    words = ("--images", 12, "--rounds", 1, "--batch-size", 6, "--output", output)
    printed = assert_ok(run_script(SCRIPT, *words))
    record = json.loads(output.read_text())
    assert record["photographs"] == 12
    assert list(record["speed"]) == ["training", "training, colors on a GPU", "evaluation"]
    for name, one in record["speed"].items():
        assert f"{name} " in printed
        assert one["ratio"] > 0
    pixels = record["pixels"]
    assert pixels["crop"]["max"] < 1.01  # of 255 steps
    assert pixels["evaluation"]["max"] < 1.01
    assert pixels["colors in floats"]["max"] < 0.5
    assert (
        pixels["colors"]["mean"] < 4
    )  # Pillow cuts down to bytes after every step, and to 256 hues
    assert 0 < pixels["colors"]["bias"] < 3
    assert record["meta"]["options"]["images"] == 12


@pytest.mark.slow
def test_a_folder_that_is_missing_cannot_be_measured(tmp_path):
    result = run_script(SCRIPT, "--data-dir", tmp_path / "missing")
    assert_refused(result, "missing", "does not exist")
