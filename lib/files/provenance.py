"""Provenance of a file: options, versions, commit, seed and digest of the data."""

import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import scipy
import torch
import torchvision

from lib.runtime.distributed import print_main

ROOT = Path(__file__).resolve().parents[2]


def git_commit() -> str:
    """Return the commit of this checkout, with `+changes` if files differ from it; `unknown` without git."""
    words = ("--always", "--abbrev=12", "--exclude=*", "--dirty=+changes")  # no name of a tag
    command = ["git", "-C", str(ROOT), "describe", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def record(options: Mapping[str, Any], data_digest: str = "") -> dict[str, Any]:
    """Return the dict of plain values that every file of this project stores under `meta`."""
    plain = {k: v if isinstance(v, bool | int | float) else str(v) for k, v in options.items()}
    return {"options": plain, "data_digest": data_digest, **made_by()}


def made_by() -> dict[str, Any]:
    """Return commit and versions, for files that record data and options under keys of their own."""
    return {
        "git_commit": git_commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),  # its own type is one that a safe loader refuses
            "torchvision": str(torchvision.__version__),
            "numpy": numpy.__version__,
            "scipy": scipy.__version__,
        },
    }


def require_same(
    saved: Mapping[str, Any], now: Mapping[str, Any], invariants: Mapping[str, Any]
) -> None:
    """Raise ValueError, listing the differences, if a run would be resumed with other options or data.

    `saved` and `now` are the `meta` records of the checkpoint and of this run. `invariants` are the options
    that must be the same, with their defaults, which a file older than an option was made with.
    """
    before, after = {**invariants, **saved.get("options", {})}, now["options"]
    different = [
        f"--{name.replace('_', '-')} was {before[name]}, is {after[name]}"
        for name in invariants
        if before[name] != after[name]
    ]
    if saved.get("data_digest", now["data_digest"]) != now["data_digest"]:
        different.append("the images or labels of the data set are not the same")
    if different:
        raise ValueError("this checkpoint belongs to another run: " + "; ".join(different))


def say_precision(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Print a line if a run resumes with other rounding: allowed, but not to the same bits."""
    before, after = saved.get("options", {}), now["options"]
    # Defaults for files older than these options.
    for name, default in (("precision", after.get("precision", "")), ("compile", "")):
        was, is_now = before.get(name, default), after.get(name, default)
        if was != is_now:
            print_main(
                f"--{name} was {was or 'off'}, is {is_now or 'off'}: the run continues with the new value, "
                "but not to the same bits"
            )
