"""Stopping early: signals and --stop-after lose nothing, and what continues ends in the same bits."""

import io
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from runs import (
    TINY,
    assert_same,
    call,
    deterministic,
    last,
    log_lines,
    make_folder,
    pretraining,
    without_meta,
)

from lib.cli import start
from lib.files import checkpoint
from lib.files.checkpoint import newest_readable
from lib.runtime import interruption, terminal
from lib.training.state import Checkpoints

NAMES = ("ckpt.pth.tar", "best.pth.tar")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_signal_waits_for_the_step_to_end_and_decides_the_exit_code(number, code):
    before = signal.getsignal(number)
    with interruption.watch() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), number)
        assert stop.requested()
    assert stop.reason == number.name
    assert signal.getsignal(number) is before
    with pytest.raises(SystemExit) as exit_:
        stop.exit()
    assert exit_.value.code == code


def test_a_run_under_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruption.watch() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested()
    finally:
        signal.signal(signal.SIGHUP, before)


def print_to_a_pipe(patch):
    """Make standard output a pipe, and hand back its two ends."""
    reader, writer = os.pipe()
    file = terminal._Output(writer, "stdout")
    patch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(file)))
    return reader, writer


def test_an_output_that_nobody_reads_asks_a_run_to_end_once(monkeypatch, capsys):
    reader, _ = print_to_a_pipe(monkeypatch)
    with interruption.watch() as stop:
        print("read", flush=True)
        assert not stop.requested()
        os.close(reader)
        print("not read", flush=True)
        assert stop.requested()
        print("nor this", flush=True)
    assert stop.reason == "SIGPIPE"
    assert capsys.readouterr().err.count("stdout is lost") == 1
    with pytest.raises(SystemExit) as exit_:
        stop.exit()
    assert exit_.value.code == 141


def test_an_output_that_nobody_reads_ends_what_has_nothing_to_save(monkeypatch):
    reader, _ = print_to_a_pipe(monkeypatch)
    os.close(reader)
    with pytest.raises(terminal.ClosedOutputError):
        print("not read", flush=True)
    print("nor this", flush=True)  # as the interpreter does at its end


def test_an_output_on_a_full_disk_is_lost_and_the_run_goes_on(monkeypatch, capsys):
    _, writer = print_to_a_pipe(monkeypatch)
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), writer)
    with interruption.watch() as stop:
        for _ in range(3):
            print("lost", flush=True)
        assert not stop.requested()
    said = capsys.readouterr().err
    assert said == "stdout is lost (No space left on device); the run goes on without it\n"


def test_outputs_that_were_closed_from_the_start_or_are_not_pythons_own_are_no_obstacle(
    monkeypatch,
):
    own = io.StringIO()
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", own)
    terminal.guard_outputs()
    print("nowhere", flush=True)
    assert sys.stderr is own


def test_the_first_signal_decides_and_the_same_one_passed_on_is_no_second_one():
    with interruption.watch() as stop:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.requested()
    assert stop.reason == "SIGTERM"


def test_a_second_ctrl_c_a_while_later_ends_at_once(monkeypatch):
    monkeypatch.setattr(interruption, "IMPATIENCE_S", -1.0)
    with interruption.watch() as stop:
        stop.receive(signal.SIGINT)
        stop.receive(signal.SIGTERM)  # asks once more for what is under way
        with pytest.raises(KeyboardInterrupt):
            stop.receive(signal.SIGINT)


def test_stop_after_counts_steps_and_ends_without_a_code():
    with interruption.watch(after=3) as stop:
        assert [stop.requested() for _ in range(4)] == [False, False, True, False]
        assert stop.reason == "--stop-after 3"
    stop.exit()
    with interruption.watch() as endless:
        assert not any(endless.requested() for _ in range(50))


def test_resume_auto_takes_the_newest_file_and_says_so(tmp_path, capsys):
    assert newest_readable(tmp_path / "none", NAMES) == ""
    assert "starting afresh" in capsys.readouterr().out
    for age, name in enumerate(NAMES):
        checkpoint.save({"a": torch.ones(1)}, tmp_path / name)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    assert newest_readable(tmp_path, NAMES) == str(tmp_path / "ckpt.pth.tar")
    assert f"takes {tmp_path / 'ckpt.pth.tar'}" in capsys.readouterr().out


def test_resume_auto_passes_over_a_damaged_file_and_never_starts_afresh_in_silence(
    tmp_path, capsys
):
    best, newest = tmp_path / "best.pth.tar", tmp_path / "ckpt.pth.tar"
    checkpoint.save({"a": torch.ones(1)}, best)
    newest.write_bytes(best.read_bytes()[:-30])
    os.utime(best, (1000, 1000))
    assert newest_readable(tmp_path, NAMES) == str(best)
    assert "passes over" in (said := capsys.readouterr()).err
    assert str(best) in said.out
    best.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the checkpoints"):
        newest_readable(tmp_path, NAMES)


def test_the_command_that_resumes_is_the_one_that_was_typed(monkeypatch):
    typed = ["s.py", "--lr", "0.1", "--resume", "old", "--stop-after=3", "--auto-resume", "-b", "8"]
    monkeypatch.setattr(sys, "argv", typed)
    expected = "python s.py --lr 0.1 -b 8 --resume 'my file'"
    assert start.resume_command("my file") == expected


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def pretrain(tmp_path, pictures):
    """Run phase 1 in this process, everything under tmp_path/NAME."""

    def run(*words, name):
        folder = tmp_path / name
        files = ("--model-dir", folder, "--log-dir", folder / "log")
        call(pretraining, "--dataset", "folder", "--data-dir", pictures, *TINY, *files, *words)
        return folder

    return run


def assert_same_run(whole, cut):
    assert_same(without_meta(last(whole)), without_meta(last(cut)))
    best = "ckpt.cifar.best.pth.tar"
    both = [without_meta(checkpoint.load_dict(folder / best)) for folder in (whole, cut)]
    assert_same(*both)
    lines = [deterministic(log_lines(folder / "log"), "epoch") for folder in (whole, cut)]
    assert lines[0] == lines[1]


def continue_until_done(pretrain, words, epochs, steps):
    """Start again and again, for `steps` steps each; how often."""
    starts, done = 0, False
    while not done:
        folder = pretrain(*words, "--resume", "auto", "--stop-after", next(steps), name="cut")
        starts += 1
        done = last(folder)["epoch"] == epochs - 1
    return starts


@pytest.mark.parametrize(
    "words",
    [(), ("--nce-k", 8), ("--nce-k", 8, "--iter-size", 3)],
    ids=["softmax", "nce", "accumulated"],
)
def test_a_run_stopped_within_its_epochs_ends_in_the_same_bits(pretrain, words):
    # 52 images in batches of 16 are 4 batches an epoch: 3 + 1 with --iter-size 3
    words = ("--epochs", 3, *words)
    whole = pretrain(*words, name="whole")
    assert continue_until_done(pretrain, words, 3, iter([1, 4, 2, 1, 3, 1, 9])) >= 3
    assert_same_run(whole, whole.parent / "cut")


def test_a_run_stopped_after_the_last_step_of_an_epoch_still_measures_it(pretrain, capsys):
    words = ("--epochs", 2)
    whole = pretrain(*words, name="whole")
    cut = pretrain(*words, "--stop-after", 4, name="cut")
    assert last(cut)["epoch"] == -1  # none measured yet
    assert last(cut)["step"] == 4
    assert "stopped by --stop-after 4 after step 4" in capsys.readouterr().out
    pretrain(*words, "--resume", "auto", name="cut")
    assert "continuing after epoch 0 and 4 steps" in capsys.readouterr().out
    assert_same_run(whole, cut)


@pytest.mark.slow
def test_twenty_random_interruptions_end_in_the_same_bits(pretrain):
    words = ("--epochs", 12, "--nce-k", 8, "--lr-scheduler", "cosine-with-restart")
    whole, rng = pretrain(*words, name="whole"), random.Random(0)
    lengths = iter(lambda: rng.choice([1, 1, 2, 2, 3, 4]), None)
    assert continue_until_done(pretrain, words, 12, lengths) >= 20
    assert_same_run(whole, whole.parent / "cut")


def test_a_checkpoint_from_before_steps_were_recorded_still_continues(pretrain):
    whole = pretrain("--epochs", 2, name="whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            pretrain("--epochs", 2, name="cut")
    file = whole.parent / "cut" / "ckpt.cifar.pth.tar"
    state = checkpoint.load_dict(file)
    new = ("step", "sums", "classes", "description")
    checkpoint.save({key: value for key, value in state.items() if key not in new}, file)
    cut = pretrain("--epochs", 2, "--resume", file, name="cut")
    assert_same(without_meta(last(whole)), without_meta(last(cut)))


original_save = Checkpoints.save


def save_and_interrupt(*words, **keywords):
    original_save(*words, **keywords)
    raise KeyboardInterrupt


def stop_by_signal(command, file, number, delay):
    """Start, wait until it saved `file` and a moment more, send a signal; code, output, seconds."""
    old = file.stat().st_mtime_ns if file.is_file() else 0
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (file.is_file() and file.stat().st_mtime_ns > old):
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(number)
    start = time.monotonic()
    output, errors = process.communicate(timeout=60)
    return process.returncode, output + errors, time.monotonic() - start


def command_of(pictures, folder, *more):
    data = ("--dataset", "folder", "--data-dir", pictures, *TINY)
    files = ("--model-dir", folder, "--log-dir", folder / "log")
    return (ROOT / "unsupervised" / "cifar.py", *data, *files, *more)


def test_sigterm_saves_says_how_to_continue_and_exits_143(pretrain, pictures, tmp_path):
    words = ("--epochs", 2000, "--resume", "auto")
    folder = tmp_path / "cut"
    file = folder / "ckpt.cifar.pth.tar"
    code, said, _ = stop_by_signal(command_of(pictures, folder, *words), file, signal.SIGTERM, 0.3)
    assert code == 143, said
    step = last(folder)["step"]
    assert f"stopped by SIGTERM after step {step}; to continue: python " in said
    assert f"--resume {file}" in said
    assert log_lines(folder / "log")[-1]["reason"] == "SIGTERM"
    assert "Traceback" not in said
    whole = pretrain("--epochs", 2000, "--stop-after", step, name="whole")
    assert_same(without_meta(last(whole)), without_meta(last(folder)))
