"""Downloads are verified or absent, against a server on this machine that fails in several ways."""

import hashlib
import io
import os
import re
import shlex
import socket
import subprocess
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import published
import pytest
import torch
from conftest import ROOT, run_script

from lib.cli import download, start
from lib.cli.download import Published, obtain


def saved(state, *, legacy: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def packed(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def pseudo_labels(folder: Path, num_labeled: int) -> bytes:
    labeled, unlabeled = torch.arange(num_labeled), torch.arange(num_labeled, num_labeled + 30)
    published.pseudo_labels(folder / "p", labeled, unlabeled, 4, nc=True)
    return (folder / "p").read_bytes()


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Made-up bodies for every address of the manifest, and the files that they must become."""
    folder, bodies, results = tmp_path_factory.mktemp("tree"), {}, {}
    for i, file in enumerate(download.read_manifest()[1]):
        if file.members:
            made = {name: pseudo_labels(folder, 8 + j) for j, name in enumerate(file.members)}
            stem = Path(file.result).name
            bodies[file.path] = packed({f"{stem}/{name}": data for name, data in made.items()})
            results |= {f"{file.result}/{name}": data for name, data in made.items()}
        else:
            rows = torch.randn(40, 5)
            state = {"net": {"w": rows}} if "models" in file.path else {"train_features": rows}
            bodies[file.path] = results[file.path] = saved(state, legacy=i % 2 == 1)
    return bodies, results


class Server(ThreadingHTTPServer):
    """Serves `bodies`; `fault(handler, body)` returns True where it has answered in their place."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: dict[str, bytes] = {}
        self.fault = lambda handler, body: False
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request, address) -> None:
        """Keep quiet about clients that go away."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.lstrip("/")
        self.server.asked.append(path)
        body = self.server.bodies.get(path)
        if self.server.fault(self, body):
            return
        if body is None:
            self.answer(404, b"<html>no</html>")
        else:
            self.answer(200, body)

    def answer(self, status: int, body: bytes, length: int | None = None, **headers: str) -> bool:
        self.send_response(status)
        headers["Content-Length"] = str(len(body) if length is None else length)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True
        return True


@pytest.fixture(autouse=True)
def _same_timeout():
    before = socket.getdefaulttimeout()
    yield
    socket.setdefaulttimeout(before)


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


BODY = saved({"net": {"w": torch.zeros(6000)}}, legacy=False)
NET = Published("pretrain_models/net.pth.tar", "a network", "python unsupervised/cifar.py")


def kept(folder: Path) -> dict[str, bytes]:
    files = [f for f in folder.rglob("*") if f.is_file()]
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in files}


def silence(handler, _) -> bool:
    time.sleep(0.8)
    return True


def hang_up(handler, _) -> bool:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True
    return True


def login(handler, _) -> bool:
    if handler.path == "/login":
        return handler.answer(200, b"<html>who are you?</html>")
    return handler.answer(302, b"", Location="/login")


LEGACY = saved({"net": {"w": torch.zeros(6000)}}, legacy=True)
FAULTS = {
    "an error page as 200": (lambda h, _: h.answer(200, b"<!DOCTYPE html>"), "does not start"),
    "a login page behind a redirect": (login, "cannot be read"),
    "a redirect to itself": (lambda h, _: h.answer(302, b"", Location=h.path), "infinite loop"),
    "an empty body": (lambda h, _: h.answer(200, b""), "cannot be read"),
    "a truncated archive": (lambda h, b: h.answer(200, b[:9000], len(b)), "cannot be read"),
    "a truncated stream": (
        lambda h, _: h.answer(200, LEGACY[:9000], len(LEGACY)),
        "larger than the file",
    ),
    "a file of another kind": (
        lambda h, _: h.answer(200, saved({"epoch": 3}, legacy=False)),
        "no network weights",
    ),
    "silence": (silence, "timed out"),
    "a closed connection": (hang_up, "closed connection|reset"),
    "not found": (lambda h, _: h.answer(404, BODY), "404"),
    "an internal error": (lambda h, _: h.answer(500, BODY), "500"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_nothing_wrong_is_kept_and_the_reason_is_told(server, tmp_path, name):
    fault, reason = FAULTS[name]
    server.bodies[NET.path], server.fault = BODY, fault
    socket.setdefaulttimeout(0.4 if fault is silence else 5)
    with pytest.raises(ValueError, match=reason):
        obtain(NET, tmp_path, [server.url])
    assert kept(tmp_path) == {}
    server.fault = lambda handler, body: False
    assert obtain(NET, tmp_path, [server.url]) == "fetched"
    assert kept(tmp_path) == {NET.path: BODY}


def test_a_digest_other_than_the_published_one_is_refused(server, tmp_path):
    server.bodies[NET.path] = BODY
    with pytest.raises(ValueError, match="invalid hash"):
        obtain(Published(NET.path, "", "", "0" * 64), tmp_path, [server.url])
    assert kept(tmp_path) == {}
    right = Published(NET.path, "", "", hashlib.sha256(BODY).hexdigest())
    assert obtain(right, tmp_path, [server.url]) == "fetched"


def test_a_full_disk_is_named_and_nothing_is_kept(server, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(torch.hub, "download_url_to_file", full)
    with pytest.raises(ValueError, match="No space left"):
        obtain(NET, tmp_path, [server.url])
    assert kept(tmp_path) == {}


def test_a_mirror_is_taken_where_the_first_address_fails(server, tmp_path):
    server.bodies["mirror/" + NET.path] = BODY
    assert obtain(NET, tmp_path, [server.url, server.url + "mirror/"]) == "fetched"
    assert server.asked == [NET.path, "mirror/" + NET.path]
    assert kept(tmp_path) == {NET.path: BODY}


@pytest.mark.parametrize("data", [b"<html>saved by a browser</html>", b"", BODY[1:]])
def test_a_wrong_file_put_there_by_hand_is_named_and_not_touched(server, tmp_path, data):
    (tmp_path / NET.path).parent.mkdir()
    (tmp_path / NET.path).write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / NET.path))):
        obtain(NET, tmp_path, [server.url])
    assert kept(tmp_path) == {NET.path: data}
    assert server.asked == []


def test_what_a_killed_run_left_is_cleared_away(server, tmp_path):
    server.bodies[NET.path] = BODY
    left = tmp_path / (NET.path + ".downloading") / "half"
    left.parent.mkdir(parents=True)
    left.write_bytes(BODY[:100])
    assert obtain(NET, tmp_path, [server.url]) == "fetched"
    assert kept(tmp_path) == {NET.path: BODY}


# ---- archives

PSEUDOS = Published("pseudos/nc.tar", "", "", members=("8.pth.tar", "9.pth.tar"))


def test_an_archive_with_a_wrong_member_leaves_nothing(server, tmp_path):
    good, wrong = pseudo_labels(tmp_path, 8), saved({"pseudo_labels": 3}, legacy=True)
    server.bodies[PSEUDOS.path] = packed({"8.pth.tar": good, "9.pth.tar": wrong})
    with pytest.raises(ValueError, match=r"9\.pth\.tar has no pseudo_indexes"):
        obtain(PSEUDOS, tmp_path / "in", [server.url])
    assert kept(tmp_path / "in") == {}
    server.bodies[PSEUDOS.path] = packed({"8.pth.tar": good, "9.pth.tar": good})
    assert obtain(PSEUDOS, tmp_path / "in", [server.url]) == "fetched"
    assert kept(tmp_path / "in") == {f"pseudos/nc/{n}.pth.tar": good for n in (8, 9)}


def test_my_own_pseudo_labels_are_never_overwritten(server, tmp_path):
    own = tmp_path / "pseudos" / "nc" / "8.pth.tar"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"mine")
    with pytest.raises(ValueError, match=re.escape(str(own))):
        obtain(PSEUDOS, tmp_path, [server.url])
    assert kept(tmp_path) == {"pseudos/nc/8.pth.tar": b"mine"}
    assert server.asked == []


# ---- the command


def command(*words: object) -> int:
    """`python -m lib.cli.download WORDS` in this process; its exit code."""
    args = download.build_parser().parse_args([str(word) for word in words])
    try:
        download.main(args)
    except SystemExit as end:
        return end.code
    return 0


def test_the_whole_published_tree_arrives_and_a_second_run_transfers_nothing(
    server, tmp_path, tree, capsys
):
    server.bodies, results = tree
    words = ("--dest", tmp_path, "--base-url", server.url)
    assert command(*words) == 0
    assert kept(tmp_path) == results
    assert len(results) == 9 + 3 + 7 * 8 + 3 * 10
    assert sorted(server.asked) == sorted(server.bodies)
    assert command(*words) == 0
    assert len(server.asked) == 22
    assert kept(tmp_path) == results
    printed = capsys.readouterr().out
    assert (printed.count("fetched  "), printed.count("there already")) == (22, 22)


def test_only_takes_what_matches_the_pattern(server, tmp_path, tree):
    server.bodies, _ = tree
    words = ("--dest", tmp_path, "--base-url", server.url)
    assert command(*words, "--only", "lemniscate*", "--only", "pseudos/*_knn_*") == 0
    assert set(server.asked) == {
        "pretrain_models/lemniscate_resnet18.pth.tar",
        "pretrain_models/lemniscate_resnet50.pth.tar",
        "pseudos/instance_knn_wrn-28-2.tar",
        "pseudos/colorization_knn_wrn-28-2.tar",
    }
    with pytest.raises(ValueError, match="no published file matches it"):
        command(*words, "--only", "vgg*")


def test_list_asks_no_server_and_writes_nothing(server, tmp_path, capsys):
    words = ("--dest", tmp_path / "new", "--base-url", server.url)
    assert command(*words, "--list") == 0
    listed = capsys.readouterr().out
    for file in download.read_manifest()[1]:
        for text in (file.path, file.purpose, file.make):
            assert text in listed
    assert server.asked == []
    assert not (tmp_path / "new").exists()


def test_a_host_that_is_gone_is_tried_once_and_one_message_says_what_to_do(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/"
    result = run_script("-m", "lib.cli.download", "--dest", tmp_path, "--base-url", url)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    failed, hint = result.stderr.strip().splitlines()
    assert "Connection refused" in failed
    for word in ("--base-url URL", "--list"):
        assert word in hint
    assert kept(tmp_path) == {}


def test_one_missing_file_does_not_keep_the_others_from_coming(server, tmp_path, tree, capsys):
    bodies, results = tree
    lost = "pretrain_models/lemniscate_resnet18.pth.tar"
    server.bodies = {path: body for path, body in bodies.items() if path != lost}
    assert command("--dest", tmp_path, "--base-url", server.url) == 1
    assert kept(tmp_path).keys() == results.keys() - {lost}
    assert f"failed         {lost}: " in capsys.readouterr().err


def test_a_folder_of_this_machine_is_a_mirror_even_if_a_file_is_missing_there(tmp_path):
    wanted = "pretrain_models/lemniscate_resnet50.pth.tar"
    (tmp_path / "mirror" / "pretrain_models").mkdir(parents=True)
    (tmp_path / "mirror" / wanted).write_bytes(BODY)
    words = ("--dest", tmp_path / "in", "--base-url", (tmp_path / "mirror").as_uri())
    assert command(*words, "--only", "lemniscate*") == 1
    assert kept(tmp_path / "in") == {wanted: BODY}


def test_an_address_that_is_none_is_refused():
    with pytest.raises(ValueError, match="--base-url ftp://x/: write https"):
        command("--base-url", "ftp://x/")


@pytest.mark.parametrize("word", ["--jobs", "--retries", "--timeout", "--dry-run", "--verify"])
def test_options_without_a_meaning_any_more_are_errors(word, capsys):
    with pytest.raises(SystemExit):
        download.build_parser().parse_args([word])
    assert "unrecognized arguments" in capsys.readouterr().err


def test_the_shell_script_explains_itself_and_passes_its_words_on(tmp_path):
    log, python = tmp_path / "log", tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/usr/bin/env bash\necho "$*" >> {log}\n')
    python.chmod(0o755)
    result = subprocess.run(
        ["bash", str(ROOT / "scripts" / "download_model.sh"), "--only", "pseudos/*"],
        env=os.environ | {"VENV": str(tmp_path / "venv"), "PYTHON": str(python)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert log.read_text().splitlines()[-1] == "-m lib.cli.download --only pseudos/*"


# ---- the manifest


def test_the_manifest_names_every_published_file():
    base_urls, files = download.read_manifest()
    assert base_urls == ["https://frontiers.blob.core.windows.net/metric-transfer/"]
    by_folder: dict[str, list[Published]] = {}
    for file in files:
        by_folder.setdefault(str(Path(file.path).parent), []).append(file)
    assert {folder: len(files) for folder, files in by_folder.items()} == {
        "pretrain_models": 9,
        "train_features_labels_cache": 3,
        "pseudos": 7,
        "pseudos_imagenet/instance_imagenet_nc_resnet50": 3,
    }
    counts = [50, 100, 250, 500, 1000, 2000, 4000, 8000]
    for file in files:
        assert not Path(file.path).is_absolute()
        assert ".." not in Path(file.path).parts
        is_archive = not file.path.endswith((".pth.tar", ".t7"))
        chunks = "imagenet_nc" in file.path
        inside = [f"10_{i}" for i in range(10)] if chunks else counts
        assert file.members == tuple(f"{n}.pth.tar" for n in inside) * is_archive
        assert file.purpose


@pytest.mark.parametrize("make", sorted({file.make for file in download.read_manifest()[1]}))
def test_the_commands_that_make_such_files_are_ours(make):
    python, script, *words = shlex.split(make)
    assert python == "python"
    start.load_script(script).build_parser().parse_args(words)


def test_no_command_writes_into_the_folder_of_another_published_file():
    files = download.read_manifest()[1]
    for file in files:
        for other in files:
            if other.path != file.path:
                assert f"--save-path checkpoint/{other.result}" not in file.make, file.path
