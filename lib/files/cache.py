"""Results kept in files, and read in place of computing while they are of the same key."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Meta = dict[str, Any]


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """Result and where it came from."""

    value: T
    meta: Meta  # of its file, or what computing reported
    path: str | Path  # empty where it is not kept
    seconds: float | None = None  # that computing took; None where it was read

    def origin(self, verb: str = "computed") -> str:
        """Say in a few words where the result came from, for a log line."""
        if self.seconds is None:
            return f"read from {self.path}"
        return f"{verb} in {self.seconds:.1f} s" + (f", kept in {self.path}" if self.path else "")


def load_or_compute(
    path: str | Path,
    key: Mapping[str, Any],
    compute: Callable[[], tuple[T, Meta]],
    read: Callable[[str | Path], tuple[T, Meta]],
    write: Callable[[T, str | Path, Meta], None],
    *,
    reuse: bool = True,
) -> Loaded[T]:
    """Read a result from its file while it was made from `key`; compute and write it otherwise.

    Args:
        path: the file; empty keeps nothing.
        key: everything that changes the result, as plain values, which the file's meta record must hold.
        compute: () -> result and facts to record beside the key.
        read: path -> result and meta record.
        write: writes a result with its meta record to a path.
        reuse: False computes anew, whatever the file holds.
    """
    if reuse and path and Path(path).is_file():
        value, meta = read(path)
        if all(meta.get(name) == wanted for name, wanted in key.items()):
            return Loaded(value, meta, path)
    start = time.perf_counter()
    value, facts = compute()
    seconds = time.perf_counter() - start
    meta = {**key, **facts}
    if path:
        write(value, path, meta)
    return Loaded(value, meta, path, seconds)
