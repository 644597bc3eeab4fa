"""Put known defects back, one patch at a time, and show that a test notices each of them.

    python tests/mutations/run.py                      every patch of this folder
    python tests/mutations/run.py 14 '4*' -j 4         some of them, four at a time
    python tests/mutations/run.py some/other.patch     or one that lies elsewhere

Every patch is applied to a copy of the repository in a temporary folder; the repository itself is never
touched. The tests that a patch names pass there without it (all are run once, first) and must fail with it.
README.md in this folder lists the defects. A patch begins with its defect in words, then names its tests:

    caught by: tests/graph/test_knn.py::test_top_5_is_not_top_2
    caught at import                                   where the tests cannot even be collected

About two minutes on one core. Exit code 1 if a patch survives or does not apply, 2 if nothing could be
measured.
"""

import argparse
import faulthandler
import fnmatch
import multiprocessing
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NOT_COPIED = shutil.ignore_patterns(
    *(
        ".git",
        ".venv",
        "checkpoint",
        "data",
        "tensorboard",
        "__pycache__",
        ".*_cache",
        ".hypothesis",
    )
)
CAUGHT_BY, AT_IMPORT = "caught by: ", "caught at import"
PASSED, FAILED, NOT_COLLECTED = 0, 1, 2  # exit codes of pytest
LIMIT_S = 150.0  # for the tests of one patch; where they hang, the log says in which line
# Imported once and shared by the processes that run tests: they take longer than most tests do.
SHARED_MODULES = (
    *("torch", "torchvision.transforms.v2", "scipy.sparse.linalg", "scipy.sparse.csgraph"),
    *(
        "pytest",
        "hypothesis",
        "tensorboardX",
        "tensorboard.backend.event_processing.event_accumulator",
    ),
)


@dataclass(frozen=True)
class Patch:
    """A defect, and the tests that notice it.

    Attributes:
        defect: in words.
        tests: names as pytest takes them.
        at_import: whether they may fail before any of them runs.
    """

    path: Path
    defect: str
    tests: tuple[str, ...]
    at_import: bool = False

    @property
    def name(self) -> str:
        return self.path.stem


@dataclass(frozen=True)
class Outcome:
    """What became of a patch: whether a test noticed it, what to say of it, and how long that took."""

    patch: Patch
    caught: bool
    message: str
    seconds: float


def read(path: Path) -> Patch:
    """A patch and its header.

    Raises:
        ValueError: if the header lacks the defect or the tests.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    starts = (n for n, line in enumerate(lines) if line.startswith(("diff ", "--- ")))
    header = [line.strip() for line in lines[: next(starts, len(lines))]]
    tests = tuple(x.removeprefix(CAUGHT_BY) for x in header if x.startswith(CAUGHT_BY))
    defect = " ".join(x for x in header if x and not x.startswith((CAUGHT_BY, AT_IMPORT)))
    if not (defect and tests):
        raise ValueError(f"{path}: must begin with its defect in words and '{CAUGHT_BY}TEST'")
    return Patch(path, defect, tests, AT_IMPORT in header)


def chosen(words: Sequence[str]) -> list[Patch]:
    """The patches that the command line asks for, in their order: files, numbers or patterns of names.

    Raises:
        ValueError: for a word that means none.
    """
    known, paths = sorted(HERE.glob("*.patch")), []
    for word in words or ["*"]:
        pattern = f"{int(word):02d}-*" if word.isdecimal() else word
        found = [path for path in known if fnmatch.fnmatch(path.stem, pattern)]
        if not found and not Path(word).is_file():
            raise ValueError(f"there is no patch {word}")
        paths += found or [Path(word).resolve()]
    return [read(path) for path in dict.fromkeys(paths)]


def files_of_repository() -> list[str] | None:
    """Paths of all files but ignored ones, those that are not committed yet too; None without git."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def copy_repository(target: Path) -> None:
    """The repository in the folder `target`, file times included: compiled modules stay valid."""
    names = files_of_repository()
    if names is None:
        shutil.copytree(ROOT, target, ignore=NOT_COPIED)
        return
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)


def git_apply(folder: Path, path: Path, *options: str) -> str:
    """Apply a patch to the files in `folder`, whatever repository that lies in.

    Returns:
        What is wrong, empty where nothing is.
    """
    ours = {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}  # of a git hook
    command = ["git", "apply", *options, str(path)]
    result = subprocess.run(
        command, cwd=folder, env=inherited | ours, capture_output=True, text=True, check=False
    )
    return "" if result.returncode == 0 else result.stderr.strip() or "git apply failed"


def touched_files(path: Path) -> list[str]:
    """The files that a patch changes; each of them exists before and afterwards."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("--- a/") for line in lines if line.startswith("--- a/")]


@contextmanager
def applied(folder: Path, path: Path) -> Iterator[str]:
    """The patch applied inside the block; gives what is wrong. Restores files with their times."""
    before = {folder / name: (folder / name).stat() for name in touched_files(path)}
    contents = {file: file.read_bytes() for file in before}
    try:
        yield git_apply(folder, path)
    finally:
        for file, stat in before.items():
            file.write_bytes(contents[file])
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _pytest(folder: str, tests: Sequence[str], log: str, compiles: bool) -> None:
    """Run tests of a copy in this process, its output in the file `log`; ends the process."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    sys.dont_write_bytecode = not compiles
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() not in (HERE, ROOT)]
    import pytest

    faulthandler.dump_traceback_later(LIMIT_S - 10, file=output)
    sys.exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "", *tests])))


def run_tests(
    folder: Path, tests: Sequence[str], *, compiles: bool = False
) -> tuple[int | None, str]:
    """Run tests of a copy of the repository in a process of their own.

    Args:
        compiles: leave compiled modules behind, for the next ones.

    Returns:
        The exit code of pytest, None where it took too long; what it printed.
    """
    log = folder.with_name(f"{folder.name}.log")
    context = multiprocessing.get_context("forkserver")
    arguments = (str(folder), tests, str(log), compiles)
    process = context.Process(target=_pytest, args=arguments)
    process.start()
    process.join(LIMIT_S)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    return code, log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""


def check(patch: Patch, folder: Path) -> Outcome:
    """Whether the tests that a patch names fail with it, in a copy of the repository."""
    start = time.perf_counter()
    try:
        with applied(folder, patch.path) as problem:
            code, output = (None, "") if problem else run_tests(folder, patch.tests)
    except OSError as error:  # a file that it changes is gone
        problem = str(error)
    seconds = time.perf_counter() - start
    if problem:
        return Outcome(patch, False, f"DOES NOT APPLY: {problem}", seconds)
    if code == FAILED or (patch.at_import and code == NOT_COLLECTED):
        failed = (
            x.split(" - ")[0] for x in output.splitlines() if x.startswith(("FAILED", "ERROR"))
        )
        return Outcome(patch, True, next(failed, patch.tests[0]).split(" ", 1)[-1], seconds)
    why = "SURVIVED" if code == PASSED else f"NO TEST FAILED, exit code {code}: {output[-500:]}"
    return Outcome(patch, False, why, seconds)


def check_all(patches: Sequence[Patch], folders: Sequence[Path]) -> list[Outcome]:
    """The outcome of each patch, as many at a time as there are copies of the repository."""
    free: queue.Queue[Path] = queue.Queue()
    for folder in folders:
        free.put(folder)

    def one(patch: Patch) -> Outcome:
        folder = free.get()
        try:
            return check(patch, folder)
        finally:
            free.put(folder)

    with ThreadPoolExecutor(len(folders)) as pool:
        waiting = [pool.submit(one, patch) for patch in patches]
        for _ in tqdm(as_completed(waiting), total=len(waiting), unit="patch", disable=None):
            pass
    return [outcome.result() for outcome in waiting]


def table(outcomes: Sequence[Outcome]) -> str:
    """A line per patch, and the share that was caught."""
    lines = ["patch | defect | caught by | seconds", "--- | --- | --- | ---"]
    for one in outcomes:
        lines.append(f"{one.patch.name} | {one.patch.defect} | {one.message} | {one.seconds:.1f}")
    caught = sum(one.caught for one in outcomes)
    return "\n".join([*lines, f"{caught} of {len(outcomes)} caught ({caught / len(outcomes):.0%})"])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "patches",
        nargs="*",
        metavar="PATCH",
        help="number, pattern of names, or file (default: all)",
    )
    parser.add_argument(
        *("-j", "--jobs"), type=int, default=1, metavar="N", help="patches at a time (default: 1)"
    )
    return parser


def main(args: argparse.Namespace) -> int:
    """Measure, print the table, and give the exit code."""
    if args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs}: must be positive")
    patches = chosen(args.patches)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(SHARED_MODULES))
    with tempfile.TemporaryDirectory(prefix="mutations-") as scratch:
        folders = [
            Path(scratch).resolve() / f"copy{n}" for n in range(min(args.jobs, len(patches)))
        ]
        for folder in folders:
            copy_repository(folder)
        tests = list(dict.fromkeys(test for patch in patches for test in patch.tests))
        code, output = run_tests(folders[0], tests, compiles=True)
        if code != PASSED:
            raise ValueError(f"these tests must pass without a patch; exit code {code}\n{output}")
        outcomes = check_all(patches, folders)
    print(table(outcomes))
    return 0 if all(one.caught for one in outcomes) else 1


if __name__ == "__main__":
    parser = build_parser()
    try:
        sys.exit(main(parser.parse_args()))
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
