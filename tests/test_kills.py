"""A kill between any two file operations of a run: what continues ends as if nothing had happened."""

import shutil
import signal
from functools import partial

import pytest
from faults import keep_states, kill_at
from forked import Running
from runs import assert_same, call, without_meta
from test_reliability import LASTS, SCRIPTS, TRAINING, last, words, world

from lib.files import checkpoint

__all__ = ["world"]  # the fixture

BESTS = {name: file.replace(".pth", ".best.pth") for name, file in LASTS.items()}
BESTS["unsupervised/imagenet.py"] = "model_best.pth.tar"
SHORT = {  # two saves, or one and the file that the slow tests of ImageNet come after
    "unsupervised/cifar.py": ("--epochs", 2, "--rng-seed", 1),  # the second epoch is the best one
    "unsupervised/imagenet.py": ("--epochs", 1, "--save-freq", 1),
    "cifar-semi.py": ("--max-iters", 2, "--eval-freq", 1),
    "imagenet-semi.py": ("--max-iters", 1, "--eval-freq", 1),
}


def checkpoints(folder):
    """What its checkpoints hold, by name."""
    files = folder.rglob("*.pth.tar")
    return {file.name: without_meta(checkpoint.load_dict(file)) for file in files}


def run_whole(name, world, folder, output, fault=None, more=()):
    line = (*words(name, world, folder), *SHORT[name], *more)
    with Running(name, *line, output=output, fault=fault) as run:
        return run.end()


def continue_in(name, world, folder, more=()):
    line = (*words(name, world, folder), *SHORT[name], *more)
    call(SCRIPTS[name], *line, "--resume", "auto")
    return checkpoints(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING)
def test_whatever_a_kill_leaves_continues_to_the_same_files(name, world, tmp_path, capsys):
    whole, kept = tmp_path / "whole", tmp_path / "kept"
    code, said, _ = run_whole(
        name, world, whole, tmp_path / "said", partial(keep_states, whole, kept)
    )
    assert code == 0, said
    expected = checkpoints(whole)
    assert last(name, whole)["step"] == checkpoint.load_dict(whole / BESTS[name])["step"]
    states = sorted(kept.iterdir(), key=lambda folder: int(folder.name))
    for folder in states:
        assert_same(expected, continue_in(name, world, folder))
        shutil.rmtree(folder)
    with capsys.disabled():
        print(f"\n{name}: {len(states)} states that a kill may leave, the same files in the end")


@pytest.mark.slow
def test_a_run_killed_at_each_of_its_file_operations_ends_in_the_same_files(
    world, tmp_path, capsys
):
    name, more, kills = "cifar-semi.py", ("--max-iters", 1), 0
    assert run_whole(name, world, tmp_path / "whole", tmp_path / "said", more=more)[0] == 0
    expected = checkpoints(tmp_path / "whole")
    while True:
        folder, fault = tmp_path / str(kills), partial(kill_at, kills + 1)
        code, said, _ = run_whole(name, world, folder, tmp_path / "said", fault, more)
        if code == 0:
            break
        assert code == -signal.SIGKILL, said
        assert_same(expected, continue_in(name, world, folder, more))
        kills += 1
    assert kills >= 12  # six for each of two files
    with capsys.disabled():
        print(f"\n{name}: killed at {kills} operations, the same files in the end")
