"""Tiny runs of the scripts, and how tests look at what they leave behind."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_ok, run_script
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datasets import build_datasets
from lib.cli.start import load_script
from lib.features.networks import load_network
from lib.files import checkpoint
from lib.files.description import METRIC
from lib.labels import confidence, pseudo_files
from lib.labels.split import labeled_split
from lib.runtime.devices import Device

TINY = ("--image-size", 16, "--arch", "wrn-10-1", "-b", 16, "--precision", "fp32")


pretraining = load_script("unsupervised/cifar.py")


def call(script: ModuleType, *words: object) -> dict[str, float]:
    return script.main(script.build_parser().parse_args([str(w) for w in words]))


def make_folder(root: Path, *, unlabeled: int = 12, test: bool = True) -> Path:
    """A data set of 16x16 pictures: four colors, 10 labeled pictures and 5 test pictures of each."""
    rng = np.random.default_rng(0)
    colors = {
        "red": (200, 40, 40),
        "green": (40, 200, 40),
        "blue": (40, 40, 200),
        "gray": (90,) * 3,
    }
    wanted = [(f"train/{name}", c, 10) for name, c in colors.items()]
    wanted += [(f"unlabeled/{name}", c, unlabeled // 4) for name, c in colors.items()]
    wanted += [(f"test/{name}", c, 5) for name, c in colors.items() if test]
    for folder, color, count in wanted:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            noise = rng.integers(-40, 56, (16, 16, 3))
            pixels = np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{i}.png")
    return root


def last(folder: Path) -> dict[str, Any]:
    return checkpoint.load_dict(folder / "ckpt.cifar.pth.tar")


def log_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def deterministic(lines: list[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    """The lines of one event, without what the clock decides."""
    clock = ("time", "images_per_s", "data_wait", "mfu")
    return [{k: v for k, v in x.items() if k not in clock} for x in lines if x["event"] == event]


def assert_same(a: Any, b: Any, where: str = "state") -> None:
    """Bit for bit the same nested state."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for place, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{place}]")
    else:
        assert a == b, where


def without_meta(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != "meta"}


@contextlib.contextmanager
def interrupted(script: ModuleType, function: str, call_number: int) -> Iterator[None]:
    """Press Ctrl-C as `script` calls one of its functions for the nth time."""
    original, calls = getattr(script, function), 0

    def counting(*args: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call_number:
            raise KeyboardInterrupt
        return original(*args, **keywords)

    setattr(script, function, counting)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        setattr(script, function, original)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    board = EventAccumulator(str(folder))
    board.Reload()
    return {t: [(e.step, e.value) for e in board.Scalars(t)] for t in board.Tags()["scalars"]}


def load_embedding(path: str | Path, architecture: str = "") -> torch.nn.Module:
    """The network of a checkpoint of phase 1; the published ones for CIFAR are taken for WRN-28-2."""
    return load_network(checkpoint.load_dict(path), path, architecture, unsaid=METRIC)[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def kill_until_finished(script: str, *words: object, file: Path, kills: int) -> int:
    """Start a run, SIGKILL it soon after it saved `file`, resume, and so on; how often it was killed."""
    rng, done = np.random.default_rng(0), 0
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    while done < kills:
        resume = ["--resume", str(file)] if file.is_file() else []
        old = file.stat().st_mtime_ns if resume else 0
        process = subprocess.Popen(command + resume, stdout=subprocess.DEVNULL)
        while process.poll() is None and (not file.is_file() or file.stat().st_mtime_ns == old):
            time.sleep(0.005)
        time.sleep(float(rng.uniform(0, 0.15)))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        done += 1
        checkpoint.load_dict(file)  # readable after every kill
    assert_ok(run_script(script, *words, "--resume", file))
    return done


finetuning = load_script("cifar-semi.py")


CPU = Device(torch.device("cpu"), bf16=False)


LABELS = 8
# options that both scripts of phase 3 have with one default, beside the published ones
PHASE_3 = {
    "--calibrated-weights": False,
    "--labeled-share": 0.0,
    "--consistency": "",
    "--unlabeled-ratio": 4,
    "--strong-augmentation": "rand-augment",
    "--ema": False,
    "--head-init": "random",
    "--warmup": 0,
}


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """`pictures/`, a metric of phase 1 (`metric.pth.tar`) and pseudo-labels (`pseudo.pth.tar`)."""
    root = tmp_path_factory.mktemp("world")
    data = ("--dataset", "folder", "--data-dir", make_folder(root / "pictures"), *TINY)
    call(pretraining, *data, "--epochs", 2, "--model-dir", root / "m", "--log-dir", root / "l")
    (root / "m" / "ckpt.cifar.pth.tar").rename(root / "metric.pth.tar")
    train, _ = build_datasets("folder", root / "pictures", image_size=16)
    split = labeled_split(train.targets, LABELS, 4)
    votes = torch.rand(len(train), 4, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    meta = {"data_digest": train.digest}
    pseudo = confidence.from_scores(votes.log(), split, meta, confidence="largest")
    pseudo_files.save(pseudo, root / "pseudo.pth.tar")
    return root


def fake_venv(root: Path, log: Path) -> Path:
    """An environment whose python notes its words instead of running them, and lacks nothing."""
    (root / "bin").mkdir(parents=True)
    python = root / "bin" / "python"
    python.write_text(f'#!/usr/bin/env bash\necho "$@" >>"{log}"\n')
    python.chmod(0o755)
    lists = (ROOT / "requirements.txt").read_bytes() + (
        ROOT / "tests" / "requirements.txt"
    ).read_bytes()
    digest = subprocess.run(["cksum"], input=lists, capture_output=True, check=True).stdout
    (root / ".installed-requirements.txt").write_bytes(digest)
    return root


def run_shell(script: str, *words: object, **environment: str) -> Any:
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / script), *map(str, words)],
        env=os.environ | environment,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )


def actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {name: a for a in parser._actions for name in a.option_strings}


def pictures(n=8, size=32, seed=0):
    """Smooth noise, plus the colors that a hue formula gets wrong: grays and equal channels."""
    generator = torch.Generator().manual_seed(seed)
    images = F.interpolate(torch.rand(n, 3, 8, 8, generator=generator), size, mode="bilinear")
    corners = [[r, g, b] for r in (0.0, 0.5, 1.0) for g in (0.0, 0.5, 1.0) for b in (0.0, 0.5, 1.0)]
    images[:, :, 0, :27] = torch.tensor(corners).T
    return images


def ranks_of(launcher):
    """Process numbers of the ranks that a launcher started."""
    found = []
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
            found.append(int(child))
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
