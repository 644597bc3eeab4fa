"""Copies of decoded folders: used for the same files alone, written whole, and never needed."""

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import decoded, folder


@pytest.fixture
def paths(tmp_path, monkeypatch) -> list[str]:
    """Four pictures, and an empty cache folder."""
    monkeypatch.setattr(folder, "FEW_FILES", 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    names = [tmp_path / f"{i}.png" for i in range(4)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(name)
    return [str(name) for name in names]


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """The number of files of every decoding."""
    counts, read = [], folder.read_images
    counting = lambda paths, *more: (counts.append(len(paths)), read(paths, *more))[1]  # noqa: E731
    monkeypatch.setattr(folder, "read_images", counting)
    return counts


def copies() -> list[Path]:
    return sorted(decoded.cache_folder().iterdir())


def same(a: decoded.Decoded, b: decoded.Decoded) -> bool:
    return torch.equal(a.images, b.images) and a.contents == b.contents


def test_the_second_start_decodes_nothing_and_gets_the_same(paths, reads, tmp_path):
    first, second = (folder.read_or_load(paths, 16, 0) for _ in range(2))
    assert reads == [4]
    assert same(first, second)
    assert first.images.shape == (4, 3, 16, 16)
    (file,) = copies()
    assert file.is_relative_to(tmp_path / "cache")


@pytest.mark.parametrize("change", ["time", "size", "content", "order", "side", "decoder"])
def test_other_files_another_size_or_another_decoder_are_decoded(paths, reads, change, monkeypatch):
    before, side = folder.read_or_load(paths, 16, 0), 16
    if change == "time":
        os.utime(paths[0], (1, 1))
    elif change == "order":
        paths = paths[::-1]
    elif change == "side":
        side = 8
    elif change == "decoder":
        monkeypatch.setattr(decoded, "VERSION", 2)
    else:
        Image.new("RGB", (30, 30) if change == "size" else (20, 24)).save(paths[0])
    after = folder.read_or_load(paths, side, 0)
    assert reads == [4, 4]
    assert same(before, after) == (change in ("time", "decoder"))


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:200])


@pytest.mark.parametrize(
    "damage",
    [
        cut_off,
        lambda file: np.save(file, np.zeros((3, 3, 16, 16), np.uint8)),
        lambda file: np.save(file, np.zeros((4, 3, 16, 16), np.float32)),
        lambda file: np.save(file, np.array([{}] * 4, object)),
    ],
    ids=["cut off", "shape", "type", "objects"],
)
def test_a_damaged_copy_is_told_and_decoded_anew(damage, paths, reads, capsys):
    before = folder.read_or_load(paths, 16, 0)
    (file,) = copies()
    damage(file)
    assert same(folder.read_or_load(paths, 16, 0), before)
    assert f"{file} is damaged" in capsys.readouterr().err
    assert same(folder.read_or_load(paths, 16, 0), before)
    assert reads == [4, 4]


def test_a_file_that_changes_while_it_is_read_leaves_no_copy(paths, monkeypatch):
    read = folder.read_images

    def meanwhile(*words):
        found = read(*words)
        Image.new("RGB", (9, 9)).save(paths[1])
        return found

    monkeypatch.setattr(folder, "read_images", meanwhile)
    folder.read_or_load(paths, 16, 0)
    assert not decoded.cache_folder().exists()


def test_few_or_large_or_missing_files_are_not_copied(paths, reads, monkeypatch):
    folder.read_or_load(paths[:3], 16, 0)
    monkeypatch.setattr(decoded, "LARGEST", 4 * 3 * 16 * 16 - 1)
    folder.read_or_load(paths, 16, 0)
    assert not decoded.cache_folder().exists()
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"gone\.png"):
        folder.read_or_load([*paths, "gone.png"] * 500, 16, 0)


def test_the_copy_used_longest_ago_makes_room(paths):
    sides = range(8, 8 + decoded.KEPT)
    for age, side in enumerate(sides):
        folder.read_or_load(paths, side, 0)
        newest = max(copies(), key=lambda file: file.stat().st_mtime_ns)
        os.utime(newest, (1000 + age, 1000 + age))
    folder.read_or_load(paths, sides[0], 0)  # the oldest one is used again
    folder.read_or_load(paths, 16, 0)
    kept = {np.load(file).shape[-1] for file in copies()}
    assert kept == {sides[0], *sides[2:], 16}


def test_a_cache_folder_that_takes_no_file_is_told_and_the_images_are_there(
    paths, monkeypatch, capsys, tmp_path
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(folder.read_or_load(paths, 16, 0).images) == 4
    assert "decodes all images again" in capsys.readouterr().err


class Attack:
    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.folder,)


def header(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    described = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, described)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["objects", "pickle", "archive", "larger than memory"])
def test_a_copy_that_somebody_else_wrote_runs_nothing(paths, reads, tmp_path, kind):
    first = folder.read_or_load(paths, 16, 0)
    (file,) = copies()
    attack, buffer = Attack(tmp_path / "owned"), io.BytesIO()
    if kind == "objects":
        np.save(buffer, np.array([attack], dtype=object), allow_pickle=True)
    elif kind == "archive":
        np.savez(buffer, np.array([attack], dtype=object))
    written = {"pickle": pickle.dumps(attack), "larger than memory": header((2**50,))}
    file.write_bytes(written.get(kind, buffer.getvalue()))
    assert same(first, folder.read_or_load(paths, 16, 0))
    assert reads == [4, 4]
    assert not (tmp_path / "owned").exists()
