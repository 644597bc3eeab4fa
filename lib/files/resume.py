"""Choice of the checkpoint that a run resumes from."""

import sys
from collections.abc import Iterable
from pathlib import Path

from lib.files import checkpoint
from lib.runtime import distributed


def newest_readable(folder: str | Path, names: Iterable[str]) -> str:
    """Return the newest readable file among folder/names (`--resume auto`), and print the choice.

    Returns:
        Its path, the same on every process; empty if the folder has none of the files.

    Raises:
        ValueError: if there are such files and none of them can be read.
    """
    chosen = ""
    if distributed.is_main():
        files = [Path(folder) / name for name in names if (Path(folder) / name).is_file()]
        for file in sorted(files, key=lambda f: f.stat().st_mtime_ns, reverse=True):
            try:
                checkpoint.load_dict(file)
            except ValueError as error:
                print(f"--resume auto passes over a file: {error}", file=sys.stderr)
                continue
            chosen = str(file)
            break
        if files and not chosen:
            raise ValueError(
                f"--resume auto: none of the checkpoints in {folder} can be read; move them away to start "
                "afresh"
            )
        nothing = f": no checkpoint in {folder} yet, starting afresh"
        print("--resume auto" + (f" takes {chosen}" if chosen else nothing))
    return distributed.broadcast_object(chosen)
