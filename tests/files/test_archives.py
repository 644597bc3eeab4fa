"""An archive holds exactly the files that it should, or nothing of it arrives; nothing lands elsewhere."""

import gzip
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.cli import download
from lib.cli.download import Published, unpack

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


def tar(entries, kind: int = tarfile.GNU_FORMAT) -> bytes:
    """Headers and data one after the other, whatever the headers claim."""
    packed = b""
    for info, data in entries:
        packed += info.tobuf(kind, "utf-8", "surrogateescape") + data + b"\0" * (-len(data) % 512)
    return packed + b"\0" * 1024


def unpacked(folder: Path, packed: bytes) -> dict[str, bytes]:
    (folder / "nc.tar").write_bytes(packed)
    unpack(folder / "nc.tar", folder / "new", MEMBERS)
    return {f.name: f.read_bytes() for f in (folder / "new").iterdir()}


@pytest.mark.parametrize("prefix", ["", "./", "nc/", "./nc/"])
@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_plain_files_arrive_directly_or_in_the_one_folder(tmp_path, prefix, kind):
    folders = [entry("nc", type=tarfile.DIRTYPE)] if "nc" in prefix else []
    folders += [entry(".", type=tarfile.DIRTYPE)] if "." in prefix else []
    files = [entry(prefix + name, data, mtime=1.5) for name, data in DATA.items()]
    assert unpacked(tmp_path, tar(folders + files, kind)) == DATA


EVIL = b"evil" * 10


def pax(**keywords: str) -> list[tuple[tarfile.TarInfo, bytes]]:
    """A member whose extended header says something else than its own header."""
    records = b""
    for name, value in keywords.items():
        text = f" {name.replace('__', '.')}={value}\n"
        length = len(text) + 2
        records += f"{length}{text}".encode()
    return [entry("header", records, type=tarfile.XHDTYPE), *good()]


def instead(**fields: object) -> bytes:
    """An archive whose first member is something else than a plain file."""
    return tar([entry(MEMBERS[0], **fields), *good()[1:]])


HOSTILE = {
    "a path upwards": tar([*good(), entry("../evil", EVIL)]),
    "a path upwards through the folder": tar([*good(), entry("nc/../../evil", EVIL)]),
    "an absolute path": tar([*good(), entry("/nowhere/evil", EVIL)]),
    "a symbolic link": instead(type=tarfile.SYMTYPE, linkname="../../target"),
    "a link in place of the folder": tar(
        [entry("nc", type=tarfile.SYMTYPE, linkname="../.."), *good("nc/")]
    ),
    "a hard link": instead(type=tarfile.LNKTYPE, linkname="../../target"),
    "a device": instead(type=tarfile.CHRTYPE, devmajor=1, devminor=3),
    "a pipe": instead(type=tarfile.FIFOTYPE),
    "the same name twice": tar([*good(), entry("50.pth.tar", EVIL)]),
    "a stranger": tar([*good(), entry("run.sh", EVIL)]),
    "a folder where a file belongs": instead(type=tarfile.DIRTYPE),
    "a member missing": tar(good()[:2]),
    "a claim of a terabyte": tar([(entry("50.pth.tar", size=1 << 40)[0], b"x" * 512)]),
    "a negative length": tar([entry("50.pth.tar", size=-512), *good()]),
    "a sparse file": instead(type=tarfile.GNUTYPE_SPARSE),
    "a sparse file of a terabyte": tar(pax(GNU__sparse__major="1", GNU__sparse__size="1" * 12)),
    "another path in an extended header": tar(pax(path="../../evil")),
    "another length in an extended header": tar(pax(size="9" * 12)),
    "a long name": tar([entry("@", b"../evil\0", type=tarfile.GNUTYPE_LONGNAME), *good()]),
    "a compressed bomb": gzip.compress(tar(good()) + b"\0" * 10_000_000),
    "a name that is no text": tar([entry("50.pth.tar\udcff", EVIL), *good()]),
    "cut off in the data": tar(good())[:1000],
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
    (tmp_path / "mirror" / "pseudos").mkdir(parents=True)
    (tmp_path / "mirror" / "pseudos" / "nc.tar").write_bytes(HOSTILE[name])
    (tmp_path / "in" / "pseudos").mkdir(parents=True)
    before = everything(tmp_path)
    file = Published("pseudos/nc.tar", "", "", members=MEMBERS)
    with pytest.raises(ValueError, match="nothing was unpacked"):
        download.obtain(file, tmp_path / "in", [(tmp_path / "mirror").as_uri()])
    assert everything(tmp_path) == before
    assert not Path("/nowhere").exists()


def test_modes_of_an_archive_give_nobody_else_a_right_to_write(tmp_path):
    fields = {"mode": 0o6777, "uid": 0, "gid": 0}
    unpacked(tmp_path, tar([entry(name, data, **fields) for name, data in DATA.items()]))
    modes = {f.stat().st_mode & 0o7022 for f in (tmp_path / "new").iterdir()}
    assert modes == {0}


def test_without_the_data_filter_nothing_is_unpacked_and_the_version_is_named(
    tmp_path, monkeypatch
):
    monkeypatch.delattr(tarfile, "data_filter")
    with pytest.raises(ValueError, match=r"use Python 3\.10\.12, 3\.11\.4 or newer"):
        unpacked(tmp_path, tar(good()))
    assert not (tmp_path / "new").exists()


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
        names = unpacked(folder, bytes(packed)).keys()
    except ValueError as error:
        names, message = set(), str(error)
    # A change is only passed over in what unpacking does not use, and no other file is written.
    assert names == set(MEMBERS) or "nothing was unpacked" in message
    written = {f.name for f in folder.rglob("*") if f.is_file()}
    assert written <= {"nc.tar", *MEMBERS}
