"""One file from one address over HTTP: received into a part that can be continued, or refused.

The part `<name>.part` has a note `<name>.part.json` beside it: the address, what the server calls this
version of the file (its ETag or date), and how many bytes were flushed to the disk with what digest. Only
those bytes are continued, and only if the server says that its version is still that one.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import requests
import urllib3
from requests import Response

from lib.files.atomic import free_bytes, sha256_of, write_whole

PIECE_BYTES = 1 << 18
FLUSH_BYTES = 16 << 20  # so much is lost at most when the process is killed
MIN_BYTES_PER_S = 1024  # slower than this for a whole timeout is a stalled connection
MUCH_BYTES = 1 << 20  # an attempt that brought this much was worth it: the count starts again
MAX_WAIT_S = 60.0
HEALING = (408, 425, 429)  # and all of 5xx: the server may answer differently a moment later
PAGES = ("text/html", "application/xhtml+xml", "application/json", "application/xml", "text/xml")


class RefusedError(ValueError):
    """What the server sends is not the file; to ask again will not help."""


class StoppedError(Exception):
    """The user wants to stop; what has arrived is kept for the next run."""


class PassingError(Exception):
    """The transfer broke off in a way that may heal. `wait`: seconds the server asked for."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class NoConnectionError(PassingError):
    """The host was not reached at all."""


@dataclass(frozen=True)
class Rules:
    """How patient a transfer is.

    Attributes:
        timeout: seconds without a connection, or without data, that end an attempt.
        retries: further attempts after one that brought little, waiting 1, 2, 4 ... x `backoff` seconds.
        max_bytes: a longer file is refused.
        stopping: asked between pieces; True ends the transfer.
        gone: hosts that were not reached and why; shared, so that they are tried in vain only once.
    """

    timeout: float = 30.0
    retries: int = 4
    backoff: float = 1.0
    max_bytes: int = 4 << 30
    stopping: Callable[[], bool] = lambda: False
    gone: dict[str, str] = field(default_factory=dict)


Progress = Callable[[int, int | None], None]  # bytes there so far, bytes in all if known


@dataclass
class Note:
    """What is known of a part: `size` bytes with digest `sha256` are on the disk, of `total`."""

    url: str
    validator: str = ""
    total: int | None = None
    size: int = 0
    sha256: str = ""


class Part:
    """A file while it is received. As a context: whatever happens inside leaves it fit to continue."""

    def __init__(self, path: Path, url: str) -> None:
        self.path, self.note_path = path, path.with_name(path.name + ".json")
        self.note, self.running = self._continued(url) or (Note(url), hashlib.sha256())
        self.size = self.flushed = self.note.size
        self.whole = False
        self.file = open(path, "r+b" if self.size else "wb")  # noqa: SIM115
        self.file.truncate(self.size)
        self.file.seek(self.size)

    def _continued(self, url: str) -> "tuple[Note, hashlib._Hash] | None":
        """The note of an earlier run, if it is of this address and the bytes are what it says."""
        try:
            note = Note(**json.loads(self.note_path.read_text()))
            running = sha256_of(self.path, note.size)
        except (OSError, ValueError, TypeError):  # no note, or none that can be trusted: begin anew
            return None
        same = note.url == url and running.hexdigest() == note.sha256
        return (note, running) if same else None

    def restart(self, validator: str = "", total: int | None = None) -> None:
        """Forget all bytes; the file now begins as the version that `validator` names."""
        self.file.truncate(0)  # a note of other bytes is harmless: its digest does not match
        self.file.seek(0)
        self.note, self.running = Note(self.note.url, validator, total), hashlib.sha256()
        self.size = self.flushed = 0

    def write(self, piece: bytes) -> None:
        self.file.write(piece)
        self.running.update(piece)
        self.size += len(piece)
        if self.size - self.flushed >= FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Put the bytes on the disk, then the note that vouches for them."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.flushed = self.note.size = self.size
        self.note.sha256 = self.running.hexdigest()
        if self.note.validator:  # without one nobody could tell another version from this one
            write_whole(json.dumps(asdict(self.note)).encode(), self.note_path)

    def finish(self) -> str:
        """All is there: its sha256, in hexadecimal digits."""
        self.note.total, self.whole = self.size, True
        self.flush()
        return self.note.sha256

    def __enter__(self) -> "Part":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self.size > self.flushed:
                self.flush()
        finally:
            self.file.close()
            if not self.whole and not (self.size and self.note.validator):
                discard(self.path)  # nobody could continue it


def discard(path: Path) -> None:
    """Remove a part and its note."""
    path.with_name(path.name + ".json").unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def fetch(
    url: str,
    path: Path,
    rules: Rules,
    *,
    expected_bytes: int | None = None,
    progress: Progress = lambda size, total: None,
) -> str:
    """Receive `url` into the part `path`, continuing what is there of it.

    Args:
        url: http or https.
        path: where the bytes go; whole and flushed when this returns.
        rules: limits and patience.
        expected_bytes: the length, where it is published.
        progress: called after every piece.

    Returns:
        The sha256 of the whole file.

    Raises:
        RefusedError: if the answer is not the file; none of its bytes are kept.
        PassingError: if retrying did not help; what has arrived is kept for the next run.
        StoppedError: if `rules.stopping()`.
    """
    host, tries = urlsplit(url).netloc, 0
    while True:
        if host in rules.gone:
            raise NoConnectionError(rules.gone[host])
        if rules.stopping():
            raise StoppedError
        before = 0
        try:
            with Part(path, url) as part:
                before = part.size
                return _attempt(part, rules, expected_bytes, progress)
        except PassingError as error:
            tries = 0 if part.size - before >= MUCH_BYTES else tries + 1
            if tries > rules.retries:
                if isinstance(error, NoConnectionError):
                    rules.gone[host] = str(error)
                raise
            _sleep(max(rules.backoff * 2 ** max(tries - 1, 0), error.wait), rules)


def _sleep(seconds: float, rules: Rules) -> None:
    end = time.monotonic() + min(seconds, MAX_WAIT_S)
    while (left := end - time.monotonic()) > 0 and not rules.stopping():
        time.sleep(min(left, 0.2))


def _attempt(part: Part, rules: Rules, expected_bytes: int | None, progress: Progress) -> str:
    """One request; the digest of the file if it brought all that was missing."""
    url = part.note.url
    if part.size and part.size == part.note.total:
        return part.finish()
    headers = {"Accept-Encoding": "identity"}
    if part.size:
        headers |= {"Range": f"bytes={part.size}-", "If-Range": part.note.validator}
    with requests.Session() as session:
        with _in_plain_words(url, rules.timeout):
            response = session.get(url, headers=headers, stream=True, timeout=rules.timeout)
        with response:
            _check_answer(response, url)
            total = _begin(response, part)
            _check_length(total, expected_bytes, part, rules, response)
            _receive(response, part, total, rules, progress)
    return part.finish()


@contextmanager
def _in_plain_words(url: str, timeout: float) -> Iterator[None]:
    """The many errors of the network as ours, each with a reason that fits on a line."""
    host = urlsplit(url).netloc
    try:
        yield
    except requests.exceptions.SSLError as error:
        raise RefusedError(f"{host}: its certificate is not accepted ({_root(error)})") from error
    except (requests.exceptions.ConnectTimeout, requests.exceptions.ProxyError) as error:
        raise NoConnectionError(f"{host} cannot be reached ({_root(error)})") from error
    except (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError) as error:
        raise PassingError(f"{host} sent nothing for {timeout:g} s") from error
    except requests.exceptions.ConnectionError as error:
        inner = getattr(error.args[0], "reason", None) if error.args else None
        if isinstance(inner, urllib3.exceptions.NewConnectionError):
            raise NoConnectionError(f"{host} cannot be reached ({_root(error)})") from error
        raise PassingError(f"{host} broke off the connection") from error
    except urllib3.exceptions.HTTPError as error:
        raise PassingError(f"{host} broke off in the middle of the file") from error
    except requests.exceptions.RequestException as error:  # malformed addresses, endless redirects
        raise RefusedError(f"{url} cannot be asked for ({error})") from error


def _root(error: BaseException) -> str:
    """The innermost cause, which alone says what happened."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return str(getattr(error, "strerror", None) or error)


def _check_answer(response: Response, url: str) -> None:
    """Refuse what cannot be the file by its status and headers."""
    where = f"{urlsplit(url).netloc} "
    if response.history:
        where += f"leads to {response.url.split('?')[0]}, which "
        if url.startswith("https:") and not response.url.startswith("https:"):
            raise RefusedError(f"{where}is not encrypted")
    status = response.status_code
    if status in HEALING or status >= 500:
        wait = response.headers.get("Retry-After", "")
        words = f"{where}answers {status} {response.reason}"
        raise PassingError(words, float(wait) if wait.isdecimal() else 0.0)
    if status not in (200, 206, 416):
        raise RefusedError(f"{where}answers {status} {response.reason}")
    kind = response.headers.get("Content-Type", "").split(";")[0].strip().lower()
    if kind in PAGES and status != 416:
        raise RefusedError(f"{where}sends a page ({kind}) in place of the file")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise RefusedError(f"{where}sends it compressed, which was not asked for")


def _validator(response: Response) -> str:
    """What tells this version of the file from others: a strong ETag, or else the date."""
    etag = response.headers.get("ETag", "")
    if etag:
        return "" if etag.startswith("W/") else etag
    return response.headers.get("Last-Modified", "")


def _begin(response: Response, part: Part) -> int | None:
    """Make `part` stand where the answer goes on; the length of the whole file, if it is told."""
    validator, length = _validator(response), response.headers.get("Content-Length", "")
    if response.status_code == 200:
        total = int(length) if length.isdecimal() else None
        part.restart(validator, total)
        return total
    told = response.headers.get("Content-Range", "")
    total = part.note.total
    known = "*" if total is None else total
    continues = told.startswith(f"bytes {part.size}-") and told.endswith(f"/{known}")
    if response.status_code == 206 and part.size and continues and validator == part.note.validator:
        return total
    part.restart()
    raise PassingError("the server has another version by now than the one begun")


def _check_length(
    total: int | None, expected: int | None, part: Part, rules: Rules, response: Response
) -> None:
    if total is None and "chunked" not in response.headers.get("Transfer-Encoding", ""):
        raise RefusedError("the server does not tell how long the file is: it may be cut off")
    if total == 0:
        raise RefusedError("the server sends an empty file")
    if total is not None and expected is not None and total != expected:
        raise RefusedError(f"the server's file has {total} bytes, the published one {expected}")
    if total is not None and total > rules.max_bytes:
        raise RefusedError(f"the server's file has {total} bytes, more than any published one")
    free = free_bytes(part.path.parent)
    if total is not None and total - part.size > free:
        raise RefusedError(f"{part.path.parent} has {free} bytes free, {total - part.size} needed")


def _receive(
    response: Response, part: Part, total: int | None, rules: Rules, progress: Progress
) -> None:
    url, since, mark = part.note.url, time.monotonic(), part.size
    progress(part.size, total)
    while piece := _read(response, url, rules.timeout):
        part.write(piece)
        progress(part.size, total)
        if part.size > rules.max_bytes:
            part.restart()
            raise RefusedError(f"the server sends more than {rules.max_bytes} bytes")
        if rules.stopping():
            raise StoppedError
        if (seconds := time.monotonic() - since) >= rules.timeout:
            if part.size - mark < MIN_BYTES_PER_S * seconds:
                raise PassingError(f"{urlsplit(url).netloc} sends less than 1 KiB a second")
            since, mark = time.monotonic(), part.size
    if total is not None and part.size != total:
        raise PassingError(f"{urlsplit(url).netloc} sent {part.size} of {total} bytes")
    if not part.size:
        raise RefusedError("the server sends an empty file")


def _read(response: Response, url: str, timeout: float) -> bytes:
    """What has arrived, at once: a slow sender must not keep us from looking at the clock."""
    with _in_plain_words(url, timeout):
        return response.raw.read1(PIECE_BYTES, decode_content=False)
