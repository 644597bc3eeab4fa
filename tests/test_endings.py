"""How scripts end where their terminal goes away, and go on where their logs take no more."""

import errno
import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import assert_ok, run_script
from faults import block_logs
from forked import SCRIPTS, Running
from runs import assert_same, without_meta
from test_reliability import (
    LASTS,
    PREDICT,
    PROPAGATE,
    TRAINING,
    last,
    prepare,
    starts,
    words,
    world,
)

from lib.cli import start

__all__ = ["world"]  # the fixture

FULL = Path("/dev/full")  # takes no byte, as a file on a full disk


def endless(name):
    return ("--epochs" if name.startswith("unsupervised") else "--max-iters", 100_000)


def logs(name, folder):
    return folder / "log" / ("" if name.startswith("unsupervised") else "e")


def close_after_a_line(run, pipe):
    """Read the pipe until a line has come, as `head -1` does, and close it."""
    text = b""

    def read():
        nonlocal text
        try:
            text += os.read(pipe, 2**16)
        except BlockingIOError:
            return False
        return b"\n" in text

    run.wait_for(read)
    os.close(pipe)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING)
def test_a_terminal_that_goes_away_loses_nothing(name, world, tmp_path, capsys):
    folder, output = tmp_path / "cut", tmp_path / "output"
    line = [*words(name, world, folder), *endless(name), "--resume", "auto"]
    times = 2 if "imagenet" in name else 10  # of each: their networks are larger
    rng, steps = random.Random(0), [0]
    os.mkfifo(output)
    for i in range(2 * times):
        before = starts(folder)
        pipe = os.open(output, os.O_RDONLY | os.O_NONBLOCK)
        with Running(name, *line, output=output) as run:
            run.wait_for(lambda before=before: starts(folder) > before)
            time.sleep(rng.uniform(0, 0.3))
            if i % 2:
                run.send(signal.SIGHUP)
            close_after_a_line(run, pipe)
            code, _, seconds = run.end()
        assert code == (129 if i % 2 else 141)
        assert seconds < 60
        steps.append(last(name, folder)["step"])
    assert steps == sorted(set(steps))
    with capsys.disabled():
        print(f"\n{name}: {times} of {times} each, SIGHUP and an output closed after a line")
    whole = [*words(name, world, tmp_path / "whole"), *endless(name), "--stop-after", steps[-1]]
    with Running(name, *whole, output=tmp_path / "said") as run:
        assert run.end()[0] == 0, run.said
    both = [without_meta(last(name, tmp_path / each)) for each in ("whole", "cut")]
    assert_same(*both)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING)
def test_logs_without_room_neither_hang_a_run_nor_end_it(name, world, tmp_path):
    folder = tmp_path / "run"
    block_logs(logs(name, folder), "log.jsonl", "events")
    with Running(
        name, *words(name, world, folder), *endless(name), output=tmp_path / "said"
    ) as run:
        # TensorBoard's own thread has a queue of 10 numbers, and a run waits where that is full
        run.wait_for(lambda: re.search(r"epoch +3/|step +10/", run.said) is not None)
        run.send(signal.SIGTERM)
        code, said, seconds = run.end()
    assert code == 143, said
    assert seconds < 60
    assert said.count("goes on without this log") == 2
    assert f"after step {last(name, folder)['step']}" in said


@pytest.mark.slow
def test_a_folder_for_temporary_files_that_takes_none_is_no_obstacle(world, tmp_path):
    line = words("cifar-semi.py", world, tmp_path / "run")
    line += ["--gpus", "cpu,cpu", "--loader", "workers", "-j", 2, "--max-iters", 2]
    assert_ok(run_script("cifar-semi.py", *line, TMPDIR="/proc"))
    assert last("cifar-semi.py", tmp_path / "run")["step"] == 2


def test_without_any_folder_for_temporary_files_a_run_ends_in_one_message(monkeypatch, capsys):
    def nowhere(*_):
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "mkdtemp", nowhere)
    parser = SCRIPTS["cifar-semi.py"].build_parser()
    monkeypatch.setattr(sys, "argv", ["cifar-semi.py", "--gpus", "cpu,cpu"])
    with pytest.raises(SystemExit) as exit_:
        start.run(SCRIPTS["cifar-semi.py"].main, parser)
    assert exit_.value.code == 2
    assert capsys.readouterr().err.count("No usable temporary directory found") == 1


@pytest.mark.parametrize("name", ["cifar-semi.py", PREDICT])
def test_outputs_on_a_full_disk_cost_what_is_printed_and_nothing_else(name, world, tmp_path):
    folder = prepare(name, world, tmp_path / "run")
    with Running(name, *words(name, world, folder), output=FULL) as run:
        assert run.end()[0] == 0
    made = folder / "table.csv" if name == PREDICT else folder / LASTS[name]
    assert made.is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", [PROPAGATE, PREDICT])
def test_an_output_closed_after_a_line_ends_what_has_nothing_to_save(name, world, tmp_path):
    folder, output = prepare(name, world, tmp_path / "run"), tmp_path / "output"
    os.mkfifo(output)
    pipe = os.open(output, os.O_RDONLY | os.O_NONBLOCK)
    with Running(name, *words(name, world, folder), output=output) as run:
        close_after_a_line(run, pipe)
        assert run.end()[0] == 141
    assert not list(folder.rglob("*.tmp"))
