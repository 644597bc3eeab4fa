"""The GPU check's own work: time limits, the page, and what counts as wrong."""

import json
import sys
import time
from itertools import product

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from lib.cli.start import load_script

gpu_check = load_script("scripts/gpu_check.py")
Step = gpu_check.Step


def command(text: str) -> list[str]:
    return [sys.executable, "-c", text]


@pytest.fixture
def check(tmp_path):
    return gpu_check.Check(tmp_path, 1.0, "a GPU")


def page(check) -> str:
    return (check.out / "summary.md").read_text()


def test_a_step_that_is_cut_off_leaves_its_output_and_its_children_end(check, tmp_path):
    spawn = "import subprocess, sys, time; print('half'); sys.stdout.flush(); "
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    spawn += f"subprocess.run([sys.executable, '-c', {child!r}])"
    check.run(Step("slow", 9 * 2.0, command(spawn)))  # two of this minute's seconds
    assert (check.out / "slow.log").read_text().startswith("half")
    assert "| slow | cut off after 2 s | 2 | half |" in page(check)
    assert not check.wrong
    time.sleep(3)
    assert not (tmp_path / "late").exists()


def test_figures_stand_beside_their_goals_and_a_failure_stops_nothing(check):
    name = "phase 1, batch 128"
    check.run(Step("broken", 90, command("print('no'); raise SystemExit(3)"), lambda: {}["x"]))
    check.run(Step("measured", 90, command("print('a | b')"), lambda: {name: "31 images/s"}))
    text = page(check)
    assert f"| {name} | 31 images/s | 25,000 images/s |" in text
    assert "| broken | failed, exit code 3; no figure (KeyError: 'x') |" in text
    assert "| measured | ok |" in text
    assert "| a / b |" in text
    assert not check.wrong


@pytest.mark.parametrize(
    ("code", "is_test", "wrong"), [(1, True, True), (1, False, False), (2, True, False)]
)
def test_only_a_test_that_fails_is_a_wrong_result(check, code, is_test, wrong):
    check.run(Step("x", 90, command(f"raise SystemExit({code})"), is_test=is_test))
    assert check.wrong == wrong


def test_a_step_for_which_no_time_is_left_is_told(check):
    check.minutes = 0.1
    check.run(Step("late", 9, command("print('ran')")))
    assert "| late | no time left | 0 | |" in page(check)
    assert not (check.out / "late.log").exists()


def test_speeds_are_medians_and_compared_with_the_published_step(tmp_path):
    file = tmp_path / "t.json"
    rounds = {"ours": [900.0, 1200.0, 1000.0], "literal": [90.0, 100.0, 110.0]}
    file.write_text(json.dumps({"tasks": {"pretrain-cifar": {"images_per_s": rounds}}}))
    assert gpu_check.speeds(file, 128) == {
        "phase 1, batch 128": "1,000 images/s",
        "phase 1, times the published step": "10.0",
    }
    assert gpu_check.step_rate(gpu_check.speeds(file, 128), "phase 1, batch 128") == 1000


def test_the_three_phases_fit_the_time_that_is_left(check, tmp_path):
    check.minutes, check.figures = 9.0, {"phase 1, batch 128": "30,000 images/s"}
    steps = list(gpu_check.three_phases(check, tmp_path, [], 50_000, small=False))
    assert [step.name for step in steps] == [
        "phase1",
        "phase2",
        "phase3-50",
        "phase3-250",
        "phase3-4000",
    ]
    words = list(map(str, steps[0].command))
    epochs = int(words[words.index("--epochs") + 1])
    assert 0.7 * 0.55 * 540 < epochs * 50_000 / 30_000 < 0.8 * 0.55 * 540
    assert steps[0].seconds == pytest.approx(0.55 * 540, abs=1)


@pytest.mark.slow
def test_the_three_phases_give_their_figures(check, tmp_path):
    check.minutes, root = 9.0, tmp_path / "images"
    pixels = torch.Generator().manual_seed(0)
    for part, number in product(("train", "test"), range(120)):
        file = root / part / ("dark", "bright")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        shown = torch.randint(128, (3, 32, 32), generator=pixels) + 128 * (number % 2)
        to_pil_image(shown.to(torch.uint8)).save(file)
    data = ["--dataset", "folder", "--data-dir", root]
    for step in gpu_check.three_phases(check, tmp_path, data, 120, small=True):
        check.run(step)
    text = page(check)
    assert not check.wrong
    assert text.count("| ok |") == 3
    for name in ("phase 1, kNN accuracy", "phase 3, 50 labels"):
        assert "%" in check.figures[name], text


def test_a_folder_with_an_earlier_check_is_refused(check):
    check.write()
    args = gpu_check.build_parser().parse_args([str(check.out)])
    with pytest.raises(ValueError, match="holds an earlier check"):
        gpu_check.main(args)


def test_goals_are_shown_before_anything_is_measured(check):
    check.write()
    assert "| phase 2, 50,000 images, eight label counts |  | 2 s |" in page(check)
