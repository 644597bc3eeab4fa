"""Downloads are verified or absent, against a server on this machine that fails in many ways."""

import hashlib
import io
import json
import os
import random
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script

from lib.cli import options
from lib.files import checkpoint, download, transfer
from lib.files.download import Published, Records, is_there, obtain
from lib.files.transfer import Rules

FAST = Rules(timeout=5, retries=2, backoff=0.01)
HASTY = Rules(timeout=0.4, retries=2, backoff=0.01)


def saved(seed: int, numbers: int = 2000) -> bytes:
    """A file of torch.save, in the old format for odd seeds."""
    buffer = io.BytesIO()
    rows = torch.randn(numbers, generator=torch.Generator().manual_seed(seed))
    torch.save({"x": rows}, buffer, _use_new_zipfile_serialization=seed % 2 == 0)
    return buffer.getvalue()


def packed(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def published_tree(numbers: int = 200) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Made-up bodies for every address of the manifest, and the files they must become."""
    bodies, results, seed = {}, {}, 0
    for file in download.read_manifest()[1]:
        made = {}
        for name in file.results:
            seed += 1
            made[name] = saved(seed, numbers)
        results |= made
        stem = Path(file.folder).name
        inside = {f"{stem}/{Path(name).name}": data for name, data in made.items()}
        bodies[file.path] = packed(inside) if file.members else made[file.path]
    return bodies, results


class Server(ThreadingHTTPServer):
    """Serves `bodies`; what else it does is told by `fault`, a function of the handler and the body.

    A fault returns True if it has answered. `asked` notes (path, Range) of each request, `sent` counts
    the bytes of bodies, `on_bytes` hears of them.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: dict[str, bytes] = {}
        self.fault = lambda handler, body: False
        self.asked: list[tuple[str, str | None]] = []
        self.sent, self.on_bytes = 0, lambda sent: None
        self.delay = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request, address) -> None:
        """A client that goes away is what many of these tests are about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.lstrip("/")
        self.server.asked.append((path, self.headers.get("Range")))
        body = self.server.bodies.get(path)
        if self.server.fault(self, body):
            return
        if body is None:
            self.answer(404, b"<html>no</html>", {"Content-Type": "text/html"})
        else:
            self.serve(body)

    def serve(self, body: bytes, etag: str = "") -> None:
        """A correct answer: the whole, or from where the client has it if its version is still this."""
        etag = etag or f'"{hashlib.md5(body).hexdigest()}"'
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        headers = {"ETag": etag, "Content-Type": "application/x-tar"}
        if start is None or self.headers.get("If-Range") != etag:
            return self.answer(200, body, headers)
        at = int(start[1])
        headers["Content-Range"] = f"bytes {at}-{len(body) - 1}/{len(body)}"
        return self.answer(206, body[at:], headers)

    def answer(self, status: int, body: bytes, headers: dict, *, length: int | None = None) -> None:
        self.head(status, headers | {"Content-Length": len(body) if length is None else length})
        self.send_body(body)
        if length is not None:
            self.close_connection = True

    def head(self, status: int, headers: dict) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def send_body(self, body: bytes) -> None:
        for at in range(0, len(body), 1 << 14):
            piece = body[at : at + (1 << 14)]
            self.wfile.write(piece)
            self.server.sent += len(piece)
            self.server.on_bytes(self.server.sent)
            time.sleep(self.server.delay)


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


BODY = saved(2, 60000)  # 240 kB
NET = Published("models/net.pth.tar", "a network", "python unsupervised/cifar.py")


def fetch(server: Server, folder: Path, file: Published = NET, rules: Rules = FAST) -> str:
    return obtain(file, folder, Records(folder), [server.url], rules)


def kept(folder: Path) -> dict[str, bytes]:
    """Every file but the records and the lock."""
    own = (download.RECORDS, download.LOCK)
    files = [f for f in folder.rglob("*") if f.is_file() and f.name not in own]
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in files}


# ---- what is served whole


def test_a_file_arrives_whole_and_its_digest_is_recorded(server, tmp_path):
    server.bodies[NET.path] = BODY
    assert fetch(server, tmp_path) == "fetched"
    assert kept(tmp_path) == {NET.path: BODY}
    entry = json.loads((tmp_path / download.RECORDS).read_text())[NET.path]
    assert entry["sha256"] == hashlib.sha256(BODY).hexdigest()
    assert entry["bytes"] == len(BODY)
    assert entry["url"] == server.url + NET.path


def test_a_second_run_asks_for_nothing(server, tmp_path):
    server.bodies[NET.path] = BODY
    fetch(server, tmp_path)
    asked = list(server.asked)
    assert fetch(server, tmp_path) == "there already"
    assert server.asked == asked


def test_chunked_transfer_tells_its_end_without_a_length(server, tmp_path):
    def chunked(handler, body, end=b"0\r\n\r\n"):
        handler.head(200, {"Transfer-Encoding": "chunked"})
        for at in range(0, len(body), 50000):
            piece = body[at : at + 50000]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        handler.wfile.write(end)
        handler.close_connection = True
        return True

    server.bodies[NET.path], server.fault = BODY, lambda h, b: chunked(h, b, end=b"")
    with pytest.raises(ValueError, match="broke off"):
        fetch(server, tmp_path)
    assert kept(tmp_path) == {}
    server.fault = chunked
    assert fetch(server, tmp_path) == "fetched"
    assert kept(tmp_path) == {NET.path: BODY}


def test_a_mirror_is_taken_where_the_first_address_fails(server, tmp_path):
    server.bodies["elsewhere/x"] = BODY
    file = Published(NET.path, "", "", mirrors=(server.url + "nowhere", server.url + "elsewhere/x"))
    assert fetch(server, tmp_path, file) == "fetched"
    assert [path for path, _ in server.asked] == [NET.path, "nowhere", "elsewhere/x"]
    assert kept(tmp_path) == {NET.path: BODY}


# ---- what is refused


def page(kind: str, body: bytes):
    return lambda handler, _: handler.answer(200, body, {"Content-Type": kind}) or True


def login(handler, _):
    if handler.path == "/login":
        handler.answer(200, b"<html>who are you?</html>", {"Content-Type": "text/html"})
    else:
        handler.answer(302, b"", {"Location": "/login"})
    return True


def stall(handler, body):
    handler.head(200, {"Content-Length": len(body)})
    handler.send_body(body[:1000])
    time.sleep(0.8)
    return True


def drip(handler, body):
    handler.head(200, {"Content-Length": len(body)})
    for at in range(60):  # never silent for a whole timeout
        handler.send_body(body[at : at + 1])
        time.sleep(0.02)
    return True


def without_length(handler, body):
    handler.protocol_version = "HTTP/1.0"
    handler.head(200, {"Connection": "close"})
    handler.send_body(body[: len(body) // 2])
    handler.close_connection = True
    return True


def status(number: int):
    return lambda handler, _: handler.answer(number, BODY, {"Retry-After": "0"}) or True


def hang_up(handler, _):
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True
    return True


FAULTS = {
    "an error page as 200": (page("text/html; charset=utf-8", b"<!DOCTYPE html>"), "a page"),
    "an error in JSON": (page("application/json", b'{"error": "gone"}'), "a page"),
    "an error in XML without its type": (
        page("application/x-tar", b"<?xml?><Error/>"),
        "login page",
    ),
    "bytes of another kind": (page("application/octet-stream", b"GIF89a" * 90), "no file of torch"),
    "an empty body": (page("application/x-tar", b""), "empty"),
    "a login page behind a redirect": (login, "leads to .*/login"),
    "a redirect to itself": (
        lambda h, _: h.answer(302, b"", {"Location": h.path}) or True,
        "redirects",
    ),
    "a truncated body": (
        lambda h, b: h.answer(200, b[:5000], {}, length=len(b)) or True,
        "broke off in the middle|of 2",
    ),
    "a length that is not told": (without_length, "how long"),
    "a compressed body": (
        lambda h, b: h.answer(200, b, {"Content-Encoding": "gzip"}) or True,
        "compressed",
    ),
    "a part that was not asked for": (
        lambda h, b: h.answer(206, b, {"Content-Range": f"bytes 0-{len(b) - 1}/{len(b)}"}) or True,
        "another version",
    ),
    "silence": (stall, "nothing for 0.4 s"),
    "a trickle": (drip, "less than 1 KiB"),
    "a closed connection": (hang_up, "broke off"),
    "not found": (status(404), "404"),
    "forbidden": (status(403), "403"),
    "an internal error": (status(500), "500"),
    "too many requests": (status(429), "429"),
}
HEALING = ("a trunc", "silence", "a trickle", "a closed", "an internal", "too many", "a part")


@pytest.mark.parametrize("name", FAULTS)
def test_nothing_wrong_is_kept_and_the_reason_is_told(server, tmp_path, name):
    fault, reason = FAULTS[name]
    server.bodies[NET.path], server.fault = BODY, fault
    rules = HASTY if name in ("silence", "a trickle") else FAST
    with pytest.raises(ValueError, match=reason):
        fetch(server, tmp_path, rules=rules)
    assert not (tmp_path / NET.path).exists()
    assert kept(tmp_path).keys() <= {NET.path + ".part", NET.path + ".part.json"}
    assert NET.path not in Records(tmp_path).entries
    tries = sum(path == NET.path for path, _ in server.asked)
    if "redirect to itself" not in name:
        assert tries == (1 + FAST.retries if name.startswith(HEALING) else 1)
    # and when the server is well again, whatever was left does no harm
    server.fault = lambda handler, body: False
    assert fetch(server, tmp_path) == "fetched"
    assert kept(tmp_path) == {NET.path: BODY}


def test_a_length_or_digest_other_than_published_is_refused(server, tmp_path):
    server.bodies[NET.path] = BODY
    for facts in ({"num_bytes": len(BODY) + 1}, {"sha256": "0" * 64}):
        with pytest.raises(ValueError, match="the published"):
            fetch(server, tmp_path, Published(NET.path, "", "", **facts))
        assert kept(tmp_path) == {}
    good = {"num_bytes": len(BODY), "sha256": hashlib.sha256(BODY).hexdigest()}
    assert fetch(server, tmp_path, Published(NET.path, "", "", **good)) == "fetched"


def test_a_file_longer_than_any_published_one_is_refused(server, tmp_path):
    server.bodies[NET.path] = BODY
    rules = Rules(max_bytes=len(BODY) - 1)
    with pytest.raises(ValueError, match="more than any"):
        fetch(server, tmp_path, rules=rules)
    assert kept(tmp_path) == {}


def test_a_file_that_does_not_fit_on_the_disk_is_refused_before_it_is_sent(
    server, tmp_path, monkeypatch
):
    server.bodies[NET.path] = BODY
    monkeypatch.setattr(transfer, "free_bytes", lambda folder: 1000)
    with pytest.raises(ValueError, match=f"1000 bytes free, {len(BODY)} needed"):
        fetch(server, tmp_path)
    assert kept(tmp_path) == {}


def test_a_disk_that_fills_up_at_the_last_bytes_is_noticed(server, tmp_path):
    server.bodies[NET.path] = BODY
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(BODY) - 1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            fetch(server, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / NET.path).exists()
    assert fetch(server, tmp_path) == "fetched"
    assert kept(tmp_path) == {NET.path: BODY}


def test_another_file_at_the_same_address_is_refused_the_next_time(server, tmp_path):
    server.bodies[NET.path] = BODY
    fetch(server, tmp_path)
    (tmp_path / NET.path).unlink()
    server.bodies[NET.path] = saved(4, 60000)
    with pytest.raises(ValueError, match="when first seen"):
        fetch(server, tmp_path)
    assert kept(tmp_path) == {}


# ---- what heals


def test_a_server_that_is_busy_is_asked_again(server, tmp_path):
    server.bodies[NET.path] = BODY
    server.fault = lambda handler, _: len(server.asked) < 3 and status(503)(handler, _)
    assert fetch(server, tmp_path) == "fetched"
    assert len(server.asked) == 3


def cut_after(num_bytes: int):
    """A server that breaks off after so many bytes of each answer, and knows how to continue."""

    def fault(handler, body):
        send, left = handler.send_body, [num_bytes]

        def some(data):
            send(data[: left[0]])
            handler.close_connection = True

        handler.send_body = some
        return False

    return fault


def test_a_broken_transfer_goes_on_where_it_stopped(server, tmp_path):
    server.bodies[NET.path], server.fault = BODY, cut_after(100_000)
    assert fetch(server, tmp_path) == "fetched"
    assert kept(tmp_path) == {NET.path: BODY}
    assert [r for _, r in server.asked] == [None, "bytes=100000-", "bytes=200000-"]
    assert server.sent == len(BODY)


def test_progress_makes_further_attempts_worth_while(server, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "MUCH_BYTES", 20_000)
    server.bodies[NET.path], server.fault = BODY, cut_after(30_000)
    rules = Rules(timeout=5, retries=0, backoff=0.01)
    assert fetch(server, tmp_path, rules=rules) == "fetched"
    assert len(server.asked) == -(-len(BODY) // 30_000)


def interrupted(server, folder, num_bytes=100_000) -> None:
    """Leave a part of the first version behind."""
    server.bodies[NET.path], server.fault = BODY, cut_after(num_bytes)
    with pytest.raises(ValueError, match=r"broke off|sent 1"):
        fetch(server, folder, rules=Rules(timeout=5, retries=0))
    assert kept(folder)[NET.path + ".part"] == BODY[:num_bytes]
    server.fault, server.asked = lambda handler, body: False, []


OTHER = saved(6, 60000)
assert len(OTHER) == len(BODY)


def lying(**changes: str):
    """Continues with the bytes of another version, as a server that looks at no If-Range does."""

    def fault(handler, _):
        at = handler.headers.get("Range")
        if at is None:
            return False
        at = int(at[6:-1])
        headers = {
            "ETag": handler.headers["If-Range"],
            "Content-Range": f"bytes {at}-{len(OTHER) - 1}/{len(OTHER)}",
        }
        headers |= {k.replace("_", "-"): v for k, v in changes.items()}
        handler.answer(206, OTHER[at:], headers)
        return True

    return fault


@pytest.mark.parametrize(
    "fault",
    {
        "another version under a new ETag": lambda handler, body: False,
        "no ETag in the continuation": lying(ETag=""),
        "another ETag in the continuation": lying(ETag='"other"'),
        "another length": lying(Content_Range="bytes 100000-999999/1000000"),
        "another start": lying(Content_Range="bytes 0-9/240000"),
        "a server that cannot continue": lambda h, b: h.answer(200, b, {}) or True,
        "a range it finds impossible": lambda h, b: (
            h.headers.get("Range") is not None and (h.answer(416, b"", {}) or True)
        ),
    }.values(),
)
def test_two_versions_are_never_glued_together(server, tmp_path, fault):
    interrupted(server, tmp_path)
    server.bodies[NET.path], server.fault = OTHER, fault
    assert fetch(server, tmp_path) == "fetched"
    assert kept(tmp_path) == {NET.path: OTHER}
    assert server.asked[0][1] == "bytes=100000-"


@pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"weak"', "Last-Modified": "yesterday"}])
def test_without_a_name_of_the_version_a_part_is_begun_anew(server, tmp_path, headers):
    server.bodies[NET.path] = BODY
    server.fault = lambda h, b: h.answer(200, b[:100_000], headers, length=len(b)) or True
    with pytest.raises(ValueError, match=r"broke off in the middle|sent 100000"):
        fetch(server, tmp_path)
    assert {r for _, r in server.asked} == {None}


def test_the_date_names_a_version_where_there_is_no_etag(server, tmp_path):
    date = "Wed, 01 May 2019 00:00:00 GMT"

    def dated(handler, body):
        headers = {"Last-Modified": date}
        if handler.headers.get("If-Range") != date:
            handler.answer(200, body[:100_000], headers, length=len(body))
        else:
            headers["Content-Range"] = f"bytes 100000-{len(body) - 1}/{len(body)}"
            handler.answer(206, body[100_000:], headers)
        return True

    server.bodies[NET.path], server.fault = BODY, dated
    assert fetch(server, tmp_path) == "fetched"
    assert [r for _, r in server.asked] == [None, "bytes=100000-"]
    assert kept(tmp_path) == {NET.path: BODY}


def test_a_part_whose_bytes_were_changed_is_begun_anew(server, tmp_path):
    interrupted(server, tmp_path)
    part = tmp_path / (NET.path + ".part")
    part.write_bytes(b"\0" * 100_000)  # what some file systems leave after a power failure
    assert fetch(server, tmp_path) == "fetched"
    assert kept(tmp_path) == {NET.path: BODY}
    assert server.asked[0][1] is None


def test_bytes_that_were_never_flushed_are_not_continued(server, tmp_path):
    interrupted(server, tmp_path)
    with open(tmp_path / (NET.path + ".part"), "ab") as part:
        part.write(
            b"\0" * len(BODY)
        )  # beyond the end of the whole file, where nothing overwrites it
    assert fetch(server, tmp_path) == "fetched"
    assert server.asked[0][1] == "bytes=100000-"
    assert kept(tmp_path) == {NET.path: BODY}


def test_a_page_in_place_of_the_rest_leaves_the_part_for_later(server, tmp_path):
    interrupted(server, tmp_path)
    server.fault = page("text/html", b"<html>come back tomorrow</html>")
    with pytest.raises(ValueError, match="a page"):
        fetch(server, tmp_path)
    server.fault, server.asked = lambda handler, body: False, []
    assert fetch(server, tmp_path) == "fetched"
    assert server.asked[0][1] == "bytes=100000-"


def test_a_host_that_is_gone_is_tried_in_vain_once(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/"
    rules = Rules(timeout=0.4, retries=1, backoff=0.3)
    times = []
    for name in ("a.pth.tar", "b.pth.tar"):
        start = time.monotonic()
        with pytest.raises(ValueError, match="cannot be reached"):
            obtain(Published(name, "", ""), tmp_path, Records(tmp_path), [url], rules)
        times.append(time.monotonic() - start)
    assert list(rules.gone) == [url[7:-1]]
    assert times[0] >= 0.3
    assert kept(tmp_path) == {}


# ---- what is there already


def test_a_file_put_there_by_hand_is_recorded_and_kept(server, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / NET.path).write_bytes(BODY)
    assert fetch(server, tmp_path) == "there already"
    assert server.asked == []
    assert Records(tmp_path).get(NET.path)["sha256"] == hashlib.sha256(BODY).hexdigest()


@pytest.mark.parametrize("data", [b"<html>saved by a browser</html>", b"", BODY[1:]])
def test_a_wrong_file_put_there_by_hand_is_named_and_not_touched(server, tmp_path, data):
    (tmp_path / "models").mkdir()
    (tmp_path / NET.path).write_bytes(data)
    with pytest.raises(ValueError, match="remove it"):
        fetch(server, tmp_path)
    assert kept(tmp_path) == {NET.path: data}


def test_a_changed_file_is_noticed_and_not_overwritten(server, tmp_path):
    server.bodies[NET.path] = BODY
    fetch(server, tmp_path)
    time.sleep(0.01)  # a change within one tick of the clock has the same time
    (tmp_path / NET.path).write_bytes(OTHER)
    with pytest.raises(ValueError, match="has changed"):
        fetch(server, tmp_path)
    assert kept(tmp_path) == {NET.path: OTHER}


def test_verify_finds_a_bit_that_the_quick_look_cannot_see(server, tmp_path):
    server.bodies[NET.path] = BODY
    fetch(server, tmp_path)
    path = tmp_path / NET.path
    before = path.stat()
    data = bytearray(BODY)
    data[70_000] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert is_there(NET, tmp_path, Records(tmp_path))
    with pytest.raises(ValueError, match="has changed"):
        is_there(NET, tmp_path, Records(tmp_path), thorough=True)


# ---- archives

PSEUDOS = Published("pseudos/nc.tar", "", "", members=("50.pth.tar", "100.pth.tar"))
INSIDE = {"50.pth.tar": saved(1), "100.pth.tar": saved(2)}
UNPACKED = {f"pseudos/nc/{name}": data for name, data in INSIDE.items()}


def test_an_archive_becomes_its_folder_and_is_not_kept(server, tmp_path):
    server.bodies[PSEUDOS.path] = packed(INSIDE)
    assert fetch(server, tmp_path, PSEUDOS) == "fetched"
    assert kept(tmp_path) == UNPACKED
    server.asked.clear()
    assert fetch(server, tmp_path, PSEUDOS) == "there already"
    assert server.asked == []


def test_an_archive_put_there_by_hand_is_unpacked_and_kept(server, tmp_path):
    (tmp_path / "pseudos").mkdir()
    (tmp_path / PSEUDOS.path).write_bytes(packed(INSIDE))
    assert fetch(server, tmp_path, PSEUDOS) == "unpacked"
    assert kept(tmp_path) == UNPACKED | {PSEUDOS.path: packed(INSIDE)}
    assert server.asked == []


def test_an_archive_with_a_stranger_in_it_leaves_nothing(server, tmp_path):
    server.bodies[PSEUDOS.path] = packed(INSIDE | {"../escaped.pth.tar": b"x"})
    with pytest.raises(ValueError, match="escaped"):
        fetch(server, tmp_path / "in", PSEUDOS)
    assert kept(tmp_path) == {}


def test_my_own_pseudo_labels_are_never_overwritten(server, tmp_path):
    server.bodies[PSEUDOS.path] = packed(INSIDE)
    own = tmp_path / "pseudos" / "nc" / "50.pth.tar"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"mine")
    with pytest.raises(ValueError, match="stands in the way"):
        fetch(server, tmp_path, PSEUDOS)
    assert kept(tmp_path) == {"pseudos/nc/50.pth.tar": b"mine"}
    assert server.asked == []


def test_a_whole_folder_of_my_own_does_not_pass_for_the_published_one(server, tmp_path):
    for name in PSEUDOS.results:
        checkpoint.save({"pseudo_labels": torch.zeros(2), "meta": {}}, tmp_path / name)
    before = kept(tmp_path)
    with pytest.raises(ValueError, match="was not unpacked by this script: move it away"):
        fetch(server, tmp_path, PSEUDOS)
    assert kept(tmp_path) == before
    assert Records(tmp_path).get(PSEUDOS.path) == {}
    assert server.asked == []


def test_a_whole_folder_unpacked_by_hand_is_recorded(server, tmp_path):
    (tmp_path / "pseudos" / "nc").mkdir(parents=True)
    for name, data in UNPACKED.items():
        (tmp_path / name).write_bytes(data)
    assert fetch(server, tmp_path, PSEUDOS) == "there already"
    assert set(Records(tmp_path).get(PSEUDOS.path)["files"]) == set(UNPACKED)


# ---- the command


def command(*words: object) -> int:
    """`python -m lib.files.download WORDS` in this process; its exit code."""
    args = download.build_parser().parse_args([str(word) for word in words])
    try:
        download.main(args)
    except SystemExit as end:
        return end.code
    return 0


def test_the_whole_published_tree_arrives_and_a_second_run_transfers_nothing(
    server, tmp_path, capsys
):
    server.bodies, results = published_tree()
    words = ("--dest", tmp_path, "--base-url", server.url)
    assert command(*words) == 0
    assert kept(tmp_path) == results
    assert len(results) == 9 + 3 + 7 * 8 + 3 * 10
    requests, sent = len(server.asked), server.sent
    assert requests == 22
    assert sent == sum(map(len, server.bodies.values()))
    assert command(*words) == 0
    assert (len(server.asked), server.sent) == (requests, sent)
    assert command(*words[:2], "--verify") == 0
    assert (len(server.asked), server.sent) == (requests, sent)
    assert "22 right" in capsys.readouterr().out


def test_only_takes_what_is_like_the_pattern(server, tmp_path):
    server.bodies, _ = published_tree()
    words = ("--dest", tmp_path, "--base-url", server.url)
    assert command(*words, "--only", "lemniscate*", "--only", "pseudos/*_knn_*") == 0
    assert {path for path, _ in server.asked} == {
        "pretrain_models/lemniscate_resnet18.pth.tar",
        "pretrain_models/lemniscate_resnet50.pth.tar",
        "pseudos/instance_knn_wrn-28-2.tar",
        "pseudos/colorization_knn_wrn-28-2.tar",
    }
    with pytest.raises(ValueError, match="no published file is like it"):
        command(*words, "--only", "vgg*")


def test_list_and_dry_run_ask_no_server_and_write_nothing(server, tmp_path, capsys):
    words = ("--dest", tmp_path / "new", "--base-url", server.url)
    assert command(*words, "--list") == 0
    listed = capsys.readouterr().out
    assert command(*words, "--dry-run") == 0
    planned = capsys.readouterr().out
    for file in download.read_manifest()[1]:
        assert file.path in listed
        assert file.purpose in listed
        assert server.url + file.path in planned
    assert server.asked == []
    assert not (tmp_path / "new").exists()


def test_a_host_that_is_gone_gives_one_line_a_file_and_the_command_that_makes_it(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/"
    words = ("--dest", tmp_path, "--base-url", url, "--retries", 0)
    result = run_script("-m", "lib.files.download", *words)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    lines = result.stderr.strip().splitlines()
    files = download.read_manifest()[1]
    assert len(lines) == len(files) == 22
    for file in files:
        (line,) = [line for line in lines if file.path + ":" in line]
        assert "cannot be reached (Connection refused)" in line
        assert file.make in line
    assert kept(tmp_path) == {}


def test_one_missing_file_does_not_keep_the_others_from_coming(server, tmp_path, capsys):
    server.bodies, results = published_tree()
    lost = "pretrain_models/lemniscate_resnet18.pth.tar"
    del server.bodies[lost]
    assert command("--dest", tmp_path, "--base-url", server.url) == 1
    assert kept(tmp_path).keys() == results.keys() - {lost}
    assert "21 fetched" in capsys.readouterr().out


def test_a_second_download_into_the_folder_waits_for_the_first(server, tmp_path):
    with download.alone_in(tmp_path), pytest.raises(ValueError, match="another download"):
        command("--dest", tmp_path, "--base-url", server.url)
    assert server.asked == []


def test_ctrl_c_keeps_the_part_and_ends_with_130(server, tmp_path, capsys):
    path = "pretrain_models/lemniscate_resnet18.pth.tar"
    server.bodies[path], server.delay = BODY, 0.02
    half = len(BODY) // 2
    sent = []
    server.on_bytes = lambda n: (
        n > half and not sent and (sent.append(1), os.kill(os.getpid(), signal.SIGINT))
    )
    words = ("--dest", tmp_path, "--base-url", server.url, "--only", "lemniscate_resnet18*")
    assert command(*words) == 130
    assert f"stopped        {path}" in capsys.readouterr().out
    server.delay = 0
    assert command(*words) == 0
    assert kept(tmp_path) == {path: BODY}
    assert server.asked[1][1] is not None


def test_mistakes_on_the_command_line_are_refused():
    mistakes = {"--jobs": 0, "--timeout": 0, "--retries": -1, "--base-url": "ftp://x/"}
    for words in mistakes.items():
        with pytest.raises(ValueError, match=words[0]):
            command(*words)


def test_damaged_records_are_named(tmp_path):
    for text in ("{", "[]", '{"a": 1}'):
        (tmp_path / download.RECORDS).write_text(text)
        with pytest.raises(ValueError, match="is damaged"):
            Records(tmp_path)


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
    assert log.read_text().splitlines()[-1] == "-m lib.files.download --only pseudos/*"


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
    options.load_script(script).build_parser().parse_args(words)


def test_no_command_writes_into_the_folder_of_another_published_file():
    files = download.read_manifest()[1]
    for file in files:
        for other in files:
            if other.path != file.path:
                assert f"--save-path checkpoint/{other.folder}" not in file.make, file.path


# ---- kills

DRIVER = (
    "from lib.cli import options; from lib.files import download, transfer\n"
    "transfer.FLUSH_BYTES = 50_000\n"
    "options.run(download.main, download.build_parser())\n"
)


@pytest.mark.slow
def test_ten_kills_at_random_points_leave_only_right_files(server, tmp_path):
    server.bodies, results = published_tree(numbers=25_000)
    total = sum(map(len, server.bodies.values()))
    draw = random.Random(0)
    words = ["-c", DRIVER, "--dest", str(tmp_path), "--base-url", server.url, "--jobs", "3"]
    killed = 0
    for _ in range(10):
        process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        goal = server.sent + draw.randrange(total // 10)
        server.on_bytes = lambda sent, p=process, g=goal: (
            sent > g and (time.sleep(draw.random() * 0.02), p.kill())
        )
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        found = {n: data for n, data in kept(tmp_path).items() if n in results}
        assert all(results[name] == data for name, data in found.items())
    assert killed == 10
    server.on_bytes = lambda sent: None
    end = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, check=False)
    assert end.returncode == 0, end.stderr.decode()
    assert kept(tmp_path) == results
    assert sum(r is not None for _, r in server.asked) >= 5  # parts were continued
