"""Check and measure everything on one GPU in some minutes: the first thing to run on a new machine.

    bash scripts/gpu_check.sh OUT            results into the folder OUT, which is made
    bash scripts/gpu_check.sh OUT CIFAR      also all three phases on real images: CIFAR is a folder with
                                             train/<class>/* and test/<class>/*, or a .tar.gz of one

Steps run in the order of their worth, each within its share of --minutes, and write their output to
OUT/<step>.log as it comes. After each step OUT/summary.md is written anew: the figures beside their goals on
one H100, then what became of every step. A step that is cut off, or fails, does not stop the others. The exit
code is 1 if a result is wrong, which tests decide, and 0 otherwise.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from lib.cli import declared, start

MINUTES = 9.0  # which the limits of the steps are made for
LEAST_S = 10.0  # no step begins with less time left
COUNTS = (50, 100, 250, 500, 1000, 2000, 4000, 8000)
PUBLISHED_KNN = 82.12  # kNN accuracy on CIFAR-10 of the published metric
PUBLISHED_ACCURACY = {50: 56.34, 250: 71.26, 4000: 84.52}  # of the published classifiers

# name of a figure: its goal on one H100, with the unit
GOALS = {
    "phase 1, batch 128": "25,000 images/s",
    "phase 3, batch 128": "30,000 images/s",
    "phase 1, batch 512": "45,000 images/s",
    "phase 1, batch 512, compiled": "67,500 images/s",
    "phase 1, times the published step": "",
    "phase 3, times the published step": "",
    "phase 2, 50,000 images, eight label counts": "2 s",
    "start to first step, files read before": "8 s",
    "phase 2, 1,280,000 images": "60 s",
    "phase 1, kNN accuracy": f"{PUBLISHED_KNN}% (1270 epochs)",
    **{f"phase 3, {n} labels": f"{best}%" for n, best in PUBLISHED_ACCURACY.items()},
}
Figures = dict[str, str]


@dataclass(frozen=True)
class Step:
    """A command with a time limit.

    Attributes:
        seconds: limit where --minutes is `MINUTES`.
        figures: function that reads figures from what the command has left, which may be nothing.
        is_test: whether its exit code 1 means a wrong result.
    """

    name: str
    seconds: float
    command: Sequence[object]
    figures: Callable[[], Figures] = dict
    is_test: bool = False


@dataclass
class Check:
    """The time, the figures so far, and the page that shows them."""

    out: Path
    minutes: float
    title: str
    figures: Figures = field(default_factory=dict)
    rows: list[str] = field(default_factory=list)
    wrong: bool = False
    begin: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.begin + 60 * self.minutes - time.monotonic()

    def run(self, step: Step) -> None:
        """Run a step within its time, read its figures, and write the page."""
        if self.left < LEAST_S:
            self.rows.append(f"| {step.name} | no time left | 0 | |")
            return self.write()
        log, begin = self.out / f"{step.name}.log", time.monotonic()
        print(f"== {step.name}: {' '.join(map(str, step.command))}", flush=True)
        limit = min(step.seconds * self.minutes / MINUTES, self.left)
        code = run_within(limit, step.command, log)
        result = {0: "ok", None: f"cut off after {limit:.0f} s"}.get(
            code, f"failed, exit code {code}"
        )
        self.wrong |= step.is_test and code == 1
        try:
            self.figures |= step.figures()
        except (OSError, ValueError, KeyError, IndexError) as error:
            result += f"; no figure ({type(error).__name__}: {error})"
        text = log.read_text(errors="replace").replace("\r", "\n").splitlines()
        said = next((line for line in reversed(text) if line.strip()), "")[:150].replace("|", "/")
        self.rows.append(f"| {step.name} | {result} | {time.monotonic() - begin:.0f} | {said} |")
        return self.write()

    def write(self) -> None:
        """Write the page whole."""
        names = [name for name in GOALS if name in self.figures or GOALS[name]]
        lines = [
            "# GPU check",
            "",
            self.title,
            "",
            "| figure | measured | goal, one H100 |",
            "|---|---:|---:|",
        ]
        lines += [f"| {name} | {self.figures.get(name, '')} | {GOALS[name]} |" for name in names]
        lines += [
            "",
            "| step | result | seconds | last line |",
            "|---|---|---:|---|",
            *self.rows,
            "",
        ]
        (self.out / "summary.md").write_text("\n".join(lines))


def run_within(limit_s: float, command: Sequence[object], log: Path) -> int | None:
    """Run a command with its output in `log`; return its exit code, None if it was ended for the time."""
    with open(log, "w") as output:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={
                **os.environ,
                "PYTHONUNBUFFERED": "1",
                "TEST_GPU": str(int(torch.cuda.is_available())),
            },
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def speeds(file: Path, batch_size: int) -> Figures:
    """Read the figures of scripts/benchmarks/training.py."""
    found: Figures = {}
    for phase, task in ((1, "pretrain-cifar"), (3, "finetune-cifar")):
        rounds = json.loads(file.read_text())["tasks"].get(task, {}).get("images_per_s", {})
        medians = {name: statistics.median(values) for name, values in rounds.items()}
        for variant, more in (("ours", ""), ("compiled", ", compiled")):
            if variant in medians:
                found[f"phase {phase}, batch {batch_size}{more}"] = (
                    f"{medians[variant]:,.0f} images/s"
                )
        if "literal" in medians:
            times = medians["ours"] / medians["literal"]
            found[f"phase {phase}, times the published step"] = f"{times:.1f}"
    return found


def propagation_s(file: Path, name: str) -> Figures:
    """Read a figure of scripts/benchmarks/propagation.py."""
    return {name: f"{json.loads(file.read_text())['variants']['nc']['total_s']:.1f} s"}


def events(folder: Path, event: str) -> list[dict]:
    """Read the lines of one event in the log of a training script."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == event]


def step_rate(figures: Figures, name: str) -> float:
    """Return a measured speed in images per second, or a careful guess."""
    return float(figures[name].split()[0].replace(",", "")) if name in figures else 3000.0


def measurements(out: Path, work: Path, *, small: bool) -> Iterator[Step]:
    """Yield the steps that need no images, the most telling first."""
    python, benchmarks = sys.executable, "scripts/benchmarks"
    tests = [python, "-m", "pytest", "-q", "-x", "-m", "gpu"]
    yield Step("captured", 60, [*tests, "tests/training/test_cuda_graph.py"], is_test=True)
    training = [python, f"{benchmarks}/training.py", "--rounds", 1 if small else 2]
    training += ["--arch", "wrn-10-1", "--steps", 1] if small else []
    for size, seconds, tasks, variants in (
        (128, 80, ("pretrain-cifar", "finetune-cifar"), ("ours", "eager", "literal")),
        (512, 75, ("pretrain-cifar",), ("ours", "compiled")),
    ):
        words = ["--tasks", *tasks, "-v", *variants, "-b", 4 if small else size]
        file = out / f"training-{size}.json"
        command = [*training, *words, "--output", file]
        yield Step(f"training-{size}", seconds, command, lambda f=file, n=size: speeds(f, n))
    spread = [python, f"{benchmarks}/propagation.py", "--variants", "nc", "--gpus", 0]
    file, million = out / "propagation.json", out / "million.json"
    name = "phase 2, 50,000 images, eight label counts"
    words = [
        "--images",
        2000 if small else 50_000,
        "--num-labeled",
        *COUNTS[: 2 if small else None],
    ]
    yield Step(
        "propagation", 45, [*spread, *words, "--output", file], lambda: propagation_s(file, name)
    )
    yield Step("agreement", 45, [*tests, "tests/training/test_devices_agree.py"], is_test=True)
    words = ["--images", 3000 if small else 1_280_000, "--classes", 10 if small else 1000]
    words += ["--num-neighbors", 51, "--num-labeled", 100 if small else 13_000, "--output", million]
    name_of_million = "phase 2, 1,280,000 images"
    yield Step("million", 60, [*spread, *words], lambda: propagation_s(million, name_of_million))
    yield Step("scripts", 75, [*tests, "tests/test_gpu.py"], is_test=True)
    loop = (
        ["--arch", "resnet18", "--image-size", 64, "-b", 8, "--nce-k", 16, "-j", 0] if small else []
    )
    loop += ["--stop-after", 7 if small else 60, "--profile", 2]
    folders = ["--model-dir", work / "dummy", "--log-dir", out / "loop"]
    yield Step("loop", 30, [python, "unsupervised/imagenet.py", "--dummy", *loop, *folders])


def start_times(out: Path, work: Path, data: Sequence[object]) -> Iterator[Step]:
    """Yield two starts of phase 1, of which the second finds the decoded images."""
    for number, name in enumerate(("start", "start-again")):
        folders = ["--model-dir", work / name, "--log-dir", out / name]
        command = [sys.executable, "unsupervised/cifar.py", *data, "--stop-after", 1, *folders]
        begin = time.monotonic()

        def taken(begin: float = begin, number: int = number) -> Figures:
            seconds = f"{time.monotonic() - begin:.1f} s"
            return {"start to first step, files read before": seconds} if number else {}

        yield Step(name, 45, command, taken)


def three_phases(
    check: Check, work: Path, data: Sequence[object], num_images: int, *, small: bool
) -> Iterator[Step]:
    """Yield the three phases, as long as the time that is left allows."""
    python, out = sys.executable, check.out
    arch = ["--arch", "wrn-10-1"] if small else []
    labels = (50,) if small else tuple(PUBLISHED_ACCURACY)
    metric = work / "metric" / "ckpt.cifar.pth.tar"
    rate = step_rate(check.figures, "phase 1, batch 128")
    seconds = 0.55 * max(check.left, LEAST_S)
    epochs = 1 if small else max(1, int(0.8 * seconds * rate / num_images))
    words = ["--epochs", epochs, "--lr", 0.06, "--lr-scheduler", "one-cycle"]
    folders = ["--model-dir", metric.parent, "--log-dir", out / "phase1"]

    def accuracy() -> Figures:
        done = events(out / "phase1", "epoch")
        return {"phase 1, kNN accuracy": f"{done[-1]['knn_top1']:.2f}% ({len(done)} epochs)"}

    limit = seconds * MINUTES / check.minutes
    yield Step(
        "phase1", limit, [python, "unsupervised/cifar.py", *data, *arch, *words, *folders], accuracy
    )
    words = ["--checkpoint", metric, "--num-labeled", *labels, "--save-path", work / "pseudo"]
    yield Step("phase2", 40, [python, "scripts/propagate.py", *data, *words])
    seconds = max(check.left, LEAST_S) / len(labels)
    rate = step_rate(check.figures, "phase 3, batch 128")
    steps = 5 if small else min(10_000, max(100, int(0.6 * (seconds - 10) * rate / 128)))
    for n in labels:
        words = [
            "--num-labeled",
            n,
            "--resume",
            metric,
            "--pseudo-file",
            work / "pseudo" / f"{n}.pth.tar",
        ]
        words += ["--pseudo-ratio", 0.2, "--max-iters", steps, "--eval-freq", steps, "--lr", 0.03]
        words += ["--lr-scheduler", "one-cycle", "--print-freq", max(1, steps // 10)]
        folders = ["--model-root", work, "--log-root", out, "--exp-name", f"phase3-{n}"]
        command = [python, "cifar-semi.py", *data, *arch, *words, *folders]

        def tested(n: int = n) -> Figures:
            return {
                f"phase 3, {n} labels": f"{events(out / f'phase3-{n}', 'test')[-1]['top1']:.2f}%"
            }

        yield Step(f"phase3-{n}", seconds * MINUTES / check.minutes, command, tested)


def unpacked(cifar: Path, work: Path) -> Path:
    """Return the folder that holds train/ and test/, of an archive if it is one."""
    if cifar.is_file():
        with tarfile.open(cifar) as archive:
            archive.extractall(work / "cifar", filter="data")
        cifar = work / "cifar"
    found = next((p.parent for p in sorted(cifar.glob("**/train")) if p.is_dir()), None)
    if found is None:
        raise ValueError(f"{cifar}: there is no folder train/ in it")
    return found


def build_parser() -> argparse.ArgumentParser:
    parser = declared.parser(__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for everything")
    parser.add_argument("cifar", type=Path, nargs="?", metavar="CIFAR", help="real images")
    parser.add_argument(
        "--minutes",
        type=declared.positive_float,
        default=MINUTES,
        help="time for all steps together",
    )
    parser.add_argument(
        "--small", action="store_true", help="everything tiny, to try this script itself"
    )
    return parser


def main(args: argparse.Namespace) -> None:
    out = args.out.resolve()
    if (out / "summary.md").exists():
        raise ValueError(f"{out} holds an earlier check, whose figures would mix with these")
    out.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    title = f"{now}; {gpu}, {os.cpu_count()} CPU cores; {versions}"
    title += "; --small: the figures say nothing" if args.small else ""
    check = Check(out, args.minutes, title)
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        for step in measurements(out, work, small=args.small):
            check.run(step)
        if args.cifar is not None:
            root = unpacked(args.cifar.resolve(), work)
            data = ["--dataset", "folder", "--data-dir", root, "-j", os.cpu_count() or 1]
            num_images = sum(1 for _ in (root / "train").glob("*/*"))
            for step in start_times(out, work, data):
                check.run(step)
            for step in three_phases(check, work, data[:-2], num_images, small=args.small):
                check.run(step)
    print((out / "summary.md").read_text())
    if check.wrong:
        sys.exit(1)


if __name__ == "__main__":
    start.run(main, build_parser())
