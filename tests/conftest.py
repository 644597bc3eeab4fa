"""What the tests share: the repository on the path, and scripts run as a user runs them."""

import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

# Tests compute on the CPU, so that they mean the same on every machine. scripts/test.sh repeats those marked
# `gpu` with TEST_GPU=1 where there is one. CUDA reads this variable when it is first asked for its devices.
ON_GPU = os.environ.get("TEST_GPU") == "1"
if ON_GPU:
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # bits are compared; read as CUDA starts
else:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Where these are set, pytest explains a failed comparison of any length, and difflib takes hours for two
# files of some kilobytes. The comparison has failed just the same.
for name in ("CI", "BUILD_NUMBER"):
    os.environ.pop(name, None)

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# The only reasons to skip a test, and whether they hold in this session. Any other skip, an expected
# failure included, fails: what a Linux CPU can run, it runs.
ALLOWED_SKIPS = {
    "needs CUDA": not ON_GPU,
}


def _refuse_other_skips(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a report of a skip that is not allowed into one of a failure."""
    if not report.skipped:
        return
    where = report.longrepr
    reason = str(where[2] if isinstance(where, tuple) else where).removeprefix("Skipped: ")
    reason = getattr(report, "wasxfail", reason)
    if hasattr(report, "wasxfail") or not ALLOWED_SKIPS.get(reason, False):
        vars(report).pop("wasxfail", None)
        report.outcome = "failed"
        report.longrepr = (
            f"{report.nodeid} was skipped ({reason}); conftest.ALLOWED_SKIPS lists why one may be"
        )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_other_skips(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_other_skips(report)
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the longest test of the slow suite come first, so that the other workers need not wait for it."""
    items.sort(key=lambda item: "test_quickstart" not in item.nodeid)


def pytest_sessionstart() -> None:
    if ON_GPU and not torch.cuda.is_available():
        raise pytest.UsageError("TEST_GPU=1, but torch finds no GPU")


def run_script(*words: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run `python WORDS...` from the folder `cwd` and hand back its exit code and output.

    Words ending in .py are scripts of this repository.
    """
    command = [str(ROOT / w) if str(w).endswith(".py") else str(w) for w in words]
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def assert_ok(result: subprocess.CompletedProcess) -> str:
    """The output of a script that must have succeeded."""
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def assert_refused(result: subprocess.CompletedProcess, *words: str) -> None:
    """A user's mistake: exit code 2, one message naming `words`, no traceback."""
    assert result.returncode == 2, result.stdout[-2000:] + result.stderr[-4000:]
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error:") == 1, result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


@pytest.fixture(autouse=True)
def _same_global_random_numbers() -> None:
    torch.manual_seed(0)


def blobs(
    num_classes: int = 5, per_class: int = 40, dim: int = 16, spread: float = 0.25, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors around one random direction per class, in shuffled order, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(num_classes, dim, generator=generator)
    centers = centers / centers.norm(dim=1, keepdim=True)
    targets = torch.arange(num_classes).repeat_interleave(per_class)
    targets = targets[torch.randperm(len(targets), generator=generator)]
    points = centers[targets] + spread * torch.randn(len(targets), dim, generator=generator)
    return points / points.norm(dim=1, keepdim=True), targets
