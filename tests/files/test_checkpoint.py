"""Checkpoints: all or nothing on the disk, and never executed."""

import errno
import os
import random
import resource
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from conftest import ROOT

from lib.files import checkpoint


def state(step=1):
    return {
        "net": OrderedDict(w=torch.full((40, 50), float(step))),
        "step": step,
        "meta": {"a": "b"},
    }


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_what_is_saved_is_read_back_as_plain_values(tmp_path):
    path = tmp_path / "new" / "folder" / "ckpt.pth.tar"
    checkpoint.save(state(7), path)
    back = checkpoint.load(path)
    assert torch.equal(back["net"]["w"], torch.full((40, 50), 7.0))
    assert (back["step"], back["meta"]) == (7, {"a": "b"})
    assert names(path.parent) == ["ckpt.pth.tar"]


KINDS = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128"


@pytest.mark.parametrize("legacy", [True, False])
def test_every_kind_of_tensor_and_plain_value_survives(tmp_path, legacy):
    rows = torch.arange(24.0).reshape(4, 6)
    image = torch.randn(2, 1, 3, 3).to(memory_format=torch.channels_last)
    wanted = {
        "kinds": [torch.tensor([0, 1]).to(getattr(torch, kind)) for kind in KINDS.split()],
        "views": [rows.T, rows[1:3, ::2], rows[0, 0], image, image[:0], torch.empty(0, 5)],
        "shared": [rows, rows],
        "plain": (1, -5, 2**40, 0.5, "\N{GREEK SMALL LETTER TAU}", b"\xff", None, True, {3, "x"}),
        7: {"nested": {"deep": [[], {}, ()]}},
    }
    checkpoint.save(wanted, path := tmp_path / "f", legacy=legacy)
    got = checkpoint.load(path)
    assert list(got) == list(wanted)
    assert (got["plain"], got[7]) == (wanted["plain"], wanted[7])
    for group in ("kinds", "views", "shared"):
        for a, b in zip(got[group], wanted[group], strict=True):
            assert (a.dtype, a.stride()) == (b.dtype, b.stride())
            assert torch.equal(a, b)
    first, second = got["shared"]
    assert first.data_ptr() == second.data_ptr()


@pytest.mark.parametrize("broken", ["os.replace", "os.fsync"])
def test_a_failing_disk_leaves_the_old_file_and_names_path_and_bytes(tmp_path, monkeypatch, broken):
    path = tmp_path / "ckpt.pth.tar"
    checkpoint.save(state(1), path)
    old = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(broken, full)
    with pytest.raises(ValueError, match="No space left") as caught:
        checkpoint.save(state(2), path)
    for word in (str(path), "bytes", "free", "intact"):
        assert word in str(caught.value)
    assert path.read_bytes() == old
    assert names(tmp_path) == ["ckpt.pth.tar"]


def test_only_what_is_soon_made_again_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    flushed, flush = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: flushed.append(number) or flush(number))
    checkpoint.save(state(1), tmp_path / "ckpt.pth.tar")
    assert len(flushed) == 2  # the file and its folder
    checkpoint.save(state(2), tmp_path / "ckpt.pth.tar", flush=False)
    assert len(flushed) == 2
    assert names(tmp_path) == ["ckpt.pth.tar"]
    assert checkpoint.load(tmp_path / "ckpt.pth.tar")["step"] == 2


def test_a_disk_that_fills_up_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "ckpt.pth.tar"
    checkpoint.save(state(1), path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2, hard))
    try:
        with pytest.raises(ValueError, match="cannot write") as caught:
            checkpoint.save(state(2), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    needed = path.stat().st_size
    assert f"{path} ({needed} bytes, " in str(caught.value)
    assert " free): " in str(caught.value)
    assert checkpoint.load(path)["step"] == 1
    assert names(tmp_path) == ["ckpt.pth.tar"]


def test_checkpoints_are_not_written_in_place(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pth.tar"
    checkpoint.save(state(1), path)
    old, seen = path.read_bytes(), []
    replace = os.replace

    def watched(source, target):
        seen.append((path.read_bytes(), torch.load(source)["step"]))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    checkpoint.save(state(2), path)
    assert seen == [(old, 2)]
    assert checkpoint.load(path)["step"] == 2


def test_a_target_that_cannot_be_a_file_is_a_message(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="cannot write"):
        checkpoint.save(state(), tmp_path / "file" / "ckpt.pth.tar")
    with pytest.raises(ValueError, match="cannot write"):
        checkpoint.save(state(), tmp_path)


# Forked children share the import of torch: a kill costs milliseconds.
KILLER = """
import os, random, signal, sys, time
import torch
from lib.files import checkpoint

path, kills = sys.argv[1], int(sys.argv[2])
chance, last = random.Random(0), 0
def written():
    return os.stat(path).st_mtime_ns if os.path.exists(path) else 0

for _ in range(kills):
    before = written()
    child = os.fork()
    if child == 0:
        step = last
        while True:
            step += 1
            checkpoint.save({"step": step, "w": torch.full((200_000,), float(step))}, path)
    while written() == before:  # at least one save, however busy the machine is
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the writer ended by itself"
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    state = checkpoint.load(path)
    assert state["step"] > last, "a save was lost"
    assert (state["w"] == state["step"]).all(), "a mixture of two saves"
    last = state["step"]
    assert len(os.listdir(os.path.dirname(path))) <= 2, "more than one temporary file"
print("kills", kills)
"""


def kill_writers(folder, kills):
    result = subprocess.run(
        [sys.executable, "-c", KILLER, str(folder / "ckpt.pth.tar"), str(kills)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["kills", str(kills)]


def test_a_killed_writer_leaves_a_whole_checkpoint(tmp_path):
    kill_writers(tmp_path, 10)


@pytest.mark.slow
def test_five_hundred_killed_writers_leave_a_whole_checkpoint(tmp_path):
    kill_writers(tmp_path, 500)
    print("500 kills: nothing unreadable, no step backwards, one temporary file at most")


class Attack:
    """Unpickled without care, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("place", ["alone", "in a dict", "after tensors"])
def test_a_pickle_that_runs_code_is_refused_and_never_executed(tmp_path, legacy, place):
    attack = Attack(tmp_path / "executed")
    payload = {
        "alone": attack,
        "in a dict": {"net": attack},
        "after tensors": {"net": {"w": torch.zeros(3)}, "lemniscate": [attack]},
    }[place]
    path = tmp_path / "evil.pth.tar"
    torch.save(payload, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"refused.*mkdir") as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value)
    assert not attack.folder.exists()
    torch.load(path, weights_only=False)  # the attack is real
    assert attack.folder.exists()


def test_a_pickled_module_is_refused_with_its_class(tmp_path):
    torch.save({"net": torch.nn.Linear(2, 2)}, path := tmp_path / "m.pth.tar")
    with pytest.raises(ValueError, match=r"refused.*torch\.nn\.modules\.linear\.Linear"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"PK\x03\x04 not really", b"\x80\x02.", b"\0" * 99]
)
def test_a_file_that_is_no_checkpoint_is_a_message_with_its_path(tmp_path, content):
    path = tmp_path / "ckpt.pth.tar"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read|refused") as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_or_a_folder_is_a_message_with_its_path(tmp_path):
    for path in (tmp_path / "nowhere.pth.tar", tmp_path):
        with pytest.raises(ValueError, match="check the path") as caught:
            checkpoint.load(path)
        assert str(path) in str(caught.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [True, False])
def test_truncated_and_mutated_files_give_value_errors_only(tmp_path, legacy):
    path = tmp_path / "whole"
    torch.save(state(), path, _use_new_zipfile_serialization=not legacy)
    whole, chance = path.read_bytes(), random.Random(int(legacy))
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        if chance.random() < 0.4:
            damaged = damaged[: chance.randrange(len(whole) - 1)]
        # most bytes of a file are numbers, where any value is a good one: the structure is in front
        for _ in range(chance.randrange(4)):
            if damaged:
                damaged[chance.randrange(min(len(damaged), 600))] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            checkpoint.load(path)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error)  # noqa: PT017
    assert refused > 60


def test_a_dict_must_hold_the_entries_asked_for(tmp_path):
    checkpoint.save({"net": {}, "epoch": 3}, path := tmp_path / "c")
    assert checkpoint.load_dict(path, "net")["epoch"] == 3
    with pytest.raises(ValueError, match="has no optimizer, meta; it holds: net, epoch"):
        checkpoint.load_dict(path, "net", "optimizer", "meta")
    torch.save(torch.zeros(3), path)
    with pytest.raises(ValueError, match="Tensor where a dict"):
        checkpoint.load_dict(path)
