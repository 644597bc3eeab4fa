"""An archive is unpacked whole into its own folder, or not at all."""

import gzip
import io
import os
import tarfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.files import archives

MEMBERS = ("50.pth.tar", "100.pth.tar", "250.pth.tar")
DATA = {name: name.encode() * 100 for name in MEMBERS}


def entry(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def good(prefix: str = "") -> list[tuple[tarfile.TarInfo, bytes]]:
    return [entry(prefix + name, data) for name, data in DATA.items()]


def tar(entries, kind: int = tarfile.GNU_FORMAT, end: bytes = b"\0" * 1024) -> bytes:
    """Headers and data one after the other, whatever the headers claim."""
    packed = b""
    for info, data in entries:
        packed += info.tobuf(kind, "utf-8", "surrogateescape") + data + b"\0" * (-len(data) % 512)
    return packed + end


def unpack(folder: Path, packed: bytes) -> dict[str, bytes]:
    (folder / "in").mkdir()
    (folder / "in" / "nc.tar").write_bytes(packed)
    archives.unpack(folder / "in" / "nc.tar", folder / "in" / "nc", MEMBERS)
    return {f.name: f.read_bytes() for f in (folder / "in" / "nc").iterdir()}


@pytest.mark.parametrize("prefix", ["", "./", "nc/", "./nc/"])
@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_plain_files_arrive_directly_or_in_the_one_folder(tmp_path, prefix, kind):
    folders = [entry("nc", type=tarfile.DIRTYPE)] if "nc" in prefix else []
    folders += [entry(".", type=tarfile.DIRTYPE)] if "." in prefix else []
    files = [entry(prefix + name, data, mtime=1.5) for name, data in DATA.items()]
    assert unpack(tmp_path, tar(folders + files, kind)) == DATA


def test_what_tar_programs_write_is_read(tmp_path):
    source = tmp_path / "nc"
    source.mkdir()
    for name, data in DATA.items():
        (source / name).write_bytes(data)
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w"
    ) as archive:  # times with fractions: extended headers
        archive.add(source, "nc")
    assert unpack(tmp_path, buffer.getvalue()) == DATA


EVIL = b"evil" * 10
LONG = entry("50.pth.tar", size=1 << 40)
CLAIM = [(LONG[0], b"x" * 512)]


def pax(**keywords: str) -> list[tuple[tarfile.TarInfo, bytes]]:
    """A member whose extended header says something else than its own header."""
    records = b""
    for name, value in keywords.items():
        text = f" {name.replace('__', '.')}={value}\n"
        length = len(text) + 2
        records += f"{length}{text}".encode()
    return [entry("header", records, type=tarfile.XHDTYPE), *good()]


HOSTILE = {
    "a path upwards": tar([*good(), entry("../evil", EVIL)]),
    "a path upwards through the folder": tar([*good(), entry("nc/../../evil", EVIL)]),
    "an absolute path": tar([*good(), entry("/nowhere/evil", EVIL)]),
    "a symbolic link": tar(
        [entry("50.pth.tar", type=tarfile.SYMTYPE, linkname="../../target"), *good()]
    ),
    "a link in place of the folder": tar(
        [entry("nc", type=tarfile.SYMTYPE, linkname="../.."), *good("nc/")]
    ),
    "a hard link": tar(
        [entry("50.pth.tar", type=tarfile.LNKTYPE, linkname="../../target"), *good()[1:]]
    ),
    "a device": tar([entry("50.pth.tar", type=tarfile.CHRTYPE, devmajor=1, devminor=3), *good()]),
    "a pipe": tar([entry("50.pth.tar", type=tarfile.FIFOTYPE), *good()]),
    "the same name twice": tar([*good(), entry("50.pth.tar", EVIL)]),
    "the same name in two forms": tar([*good(), entry("./nc/50.pth.tar", EVIL)]),
    "a stranger": tar([*good(), entry("run.sh", EVIL)]),
    "another folder": tar([entry("other", type=tarfile.DIRTYPE), *good()]),
    "a folder where a file belongs": tar([entry("50.pth.tar", type=tarfile.DIRTYPE), *good()[1:]]),
    "a member missing": tar(good()[:2]),
    "nothing in it": tar([]),
    "a claim of a terabyte": tar(CLAIM),
    "a negative length": tar([entry("50.pth.tar", size=-512), *good()]),
    "a sparse file": tar([entry("50.pth.tar", type=tarfile.GNUTYPE_SPARSE), *good()[1:]]),
    "a sparse file of a terabyte": tar(pax(GNU__sparse__major="1", GNU__sparse__size="1" * 12)),
    "another path in an extended header": tar(pax(path="../../evil")),
    "another length in an extended header": tar(pax(size="9" * 12)),
    "an endless extended header": tar([entry("h", b"x" * 70000, type=tarfile.XHDTYPE), *good()]),
    "a long name": tar([entry("@", b"../evil\0", type=tarfile.GNUTYPE_LONGNAME), *good()]),
    "thousands of headers": tar([entry("nc", type=tarfile.DIRTYPE)] * 1100 + good()),
    "a compressed bomb": gzip.compress(tar(good()) + b"\0" * 10_000_000),
    "a NUL in the name": tar([entry("50.pth.tar\0../evil", EVIL), *good()[1:]]),
    "a name that is no text": tar([entry("50.pth.tar\udcff", EVIL), *good()]),
    "a name with a line break": tar([entry("50.pth.tar\n", EVIL), *good()]),
    "a name with a backslash": tar([entry("..\\50.pth.tar", EVIL), *good()]),
    "cut off in the data": tar(good())[:1000],
    "cut off before the end": tar(good(), end=b"")[:-512],
    "no end": tar(good(), end=b""),
    "no archive": b"<html>" * 1000,
    "nothing": b"",
}


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        f.relative_to(folder).as_posix(): (
            f.lstat().st_mode,
            f.read_bytes() if f.is_file() else b"",
        )
        for f in folder.rglob("*")
    }


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_changes_nothing_on_the_disk(tmp_path, name):
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "in").mkdir()
    archive = tmp_path / "in" / "nc.tar"
    archive.write_bytes(HOSTILE[name])
    before = everything(tmp_path)
    with pytest.raises(ValueError, match="nothing was unpacked"):
        archives.unpack(archive, tmp_path / "in" / "nc", MEMBERS)
    assert everything(tmp_path) == before
    assert not Path("/nowhere").exists()


@pytest.mark.parametrize("name", ["a claim of a terabyte", "a negative length"])
def test_a_length_that_cannot_be_is_refused_before_anything_is_written(tmp_path, name, monkeypatch):
    monkeypatch.setattr(archives, "_copy", lambda *_: pytest.fail("it was written"))
    with pytest.raises(ValueError, match="claims"):
        unpack(tmp_path, HOSTILE[name])


def test_modes_owners_and_times_are_not_taken_over(tmp_path):
    old = os.umask(0o022)
    try:
        fields = {"mode": 0o6777, "uid": 0, "gid": 0, "mtime": 0}
        unpack(tmp_path, tar([entry(name, data, **fields) for name, data in DATA.items()]))
    finally:
        os.umask(old)
    for file in (tmp_path / "in" / "nc").iterdir():
        assert file.stat().st_mode & 0o7777 == 0o644
        assert file.stat().st_uid == os.getuid()
        assert time.time() - file.stat().st_mtime < 60


def test_a_folder_that_is_there_is_not_touched(tmp_path):
    (tmp_path / "in" / "nc").mkdir(parents=True)
    (tmp_path / "in" / "nc.tar").write_bytes(tar(good()))
    with pytest.raises(ValueError, match="move it away"):
        archives.unpack(tmp_path / "in" / "nc.tar", tmp_path / "in" / "nc", MEMBERS)
    assert list((tmp_path / "in" / "nc").iterdir()) == []


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
    (tmp_path / "in" / "nc.unpacking").mkdir(parents=True)
    (tmp_path / "in" / "nc.unpacking" / "half").write_bytes(b"x")
    (tmp_path / "in" / "nc.tar").write_bytes(tar(good()))
    archives.unpack(tmp_path / "in" / "nc.tar", tmp_path / "in" / "nc", MEMBERS)
    assert {f.name for f in (tmp_path / "in").iterdir()} == {"nc", "nc.tar"}
    assert {f.name for f in (tmp_path / "in" / "nc").iterdir()} == set(MEMBERS)


def test_a_link_left_in_the_place_of_the_fresh_folder_is_not_followed(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "precious").write_bytes(b"x")
    (tmp_path / "in" / "nc.unpacking").symlink_to(tmp_path / "target")
    (tmp_path / "in" / "nc.tar").write_bytes(tar(good()))
    with pytest.raises(OSError, match="symbolic link"):
        archives.unpack(tmp_path / "in" / "nc.tar", tmp_path / "in" / "nc", MEMBERS)
    assert (tmp_path / "target" / "precious").read_bytes() == b"x"


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "nc.tar").write_bytes(tar(good()))
    monkeypatch.setattr(archives.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        archives.unpack(tmp_path / "nc.tar", tmp_path / "nc", MEMBERS)
    assert [f.name for f in tmp_path.iterdir()] == ["nc.tar"]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, len(tar(good())) - 1), st.integers(0, 255)), min_size=1, max_size=8
    )
)
def test_changed_bytes_give_the_members_or_one_error(tmp_path_factory, changes):
    packed = bytearray(tar(good("nc/")))
    for place, value in changes:
        packed[place] = value
    folder = tmp_path_factory.mktemp("fuzz")
    try:
        names = unpack(folder, bytes(packed)).keys()
    except ValueError as error:
        names, message = set(), str(error)
    # nothing but the members, and a change is only passed over in what unpacking does not use
    assert names == set(MEMBERS) or "nothing was unpacked" in message
    left = {"nc", "nc.tar"} if names else {"nc.tar"}
    assert {f.name for f in (folder / "in").iterdir()} == left
