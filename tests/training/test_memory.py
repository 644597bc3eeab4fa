"""Memory does not grow with the number of steps: 6,000 of a tiny network, watched from outside."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

STEPS = 6_000
TINY = (
    "--dataset",
    "patches",
    "--image-size",
    8,
    "--arch",
    "wrn-10-1",
    "-b",
    4,
    "--precision",
    "fp32",
)
PRETRAIN = ("unsupervised/cifar.py", "--epochs", 1000, "--low-dim", 8, "--stop-after", STEPS)
FINETUNE = ("cifar-semi.py", "--max-iters", STEPS, "--print-freq", 100, "--eval-freq", 5000)


def resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def last_step(log: Path) -> int:
    """The last step that a run has told of."""
    lines = log.read_text().splitlines() if log.exists() else []
    return max((json.loads(line).get("step", 0) for line in lines if line.endswith("}")), default=0)


def watched(command: list[str], log: Path) -> dict[int, list[float]]:
    """Resident memory of a process, MiB, by the thousand steps that it was seen in."""
    seen: dict[int, list[float]] = {}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "cwd": ROOT, "text": True}
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **quiet) as process:
        while process.poll() is None:
            time.sleep(0.25)
            try:
                memory = resident_mib(process.pid)
            except (FileNotFoundError, IndexError, ProcessLookupError):
                break  # it ended between two looks
            seen.setdefault(last_step(log) // 1000, []).append(memory)
        assert process.wait() == 0, process.stderr.read()[-2000:]
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("line", [PRETRAIN, FINETUNE], ids=["pretraining", "finetuning"])
def test_resident_memory_is_flat_over_six_thousand_steps(line, tmp_path, capsys):
    script, *words = map(str, (*line, *TINY))
    folders = {
        PRETRAIN: ("--model-dir", tmp_path / "made", "--log-dir", tmp_path / "log"),
        FINETUNE: ("--model-root", tmp_path, "--log-root", tmp_path, "--exp-name", "log"),
    }[line]
    command = [sys.executable, script, *words, *map(str, folders)]
    seen = watched(command, tmp_path / "log" / "log.jsonl")
    early, late = (
        statistics.median(value for thousand in part for value in seen.get(thousand, []))
        for part in ((1, 2), (4, 5))
    )
    with capsys.disabled():
        print(f"\n{script}: {early:.1f} MiB at 1,000 to 3,000 steps, {late:.1f} at 4,000 to 6,000")
    assert abs(late - early) < 0.01 * early
