"""Phase 3 in two processes: the same run as in one, one writer, and no process that outlives another."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, assert_ok, assert_refused, run_script
from runs import LABELS, TINY, assert_same, contents, log_lines, world
from torch import Tensor, nn

from datasets.images import CIFAR10_STATS, UNKNOWN, ImageSet
from datasets.rand_augment import RandAugment
from datasets.transforms import Augmentation, finetune_ops
from lib.files import checkpoint
from lib.loading.batches import Batches, Streams
from lib.objectives.classification import Classification
from lib.objectives.consistency import Consistency
from lib.objectives.objective import Objective
from lib.runtime import distributed
from lib.runtime.devices import Device
from lib.training.finetuning import evaluate
from lib.training.optimizer import sgd
from lib.training.step import train_steps
from models import build_model

__all__ = ["world"]  # the fixture

CPU = Device(torch.device("cpu"), bf16=False)
NUM_IMAGES, NUM_CLASSES, STEPS = 103, 7, 20
EQUAL = {torch.float32: {"rtol": 1e-5, "atol": 1e-7}, torch.float64: {"rtol": 1e-12, "atol": 1e-14}}


class Network(nn.Module):
    """A small network in the precision `dtype` whose BatchNorm keeps the statistics that it has."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = build_model("wrn-10-1", NUM_CLASSES).to(dtype)
        self.dtype = dtype
        for module in self.net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 2)
                module.eval()
                module.train = lambda _=True, module=module: module

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images.to(self.dtype))


def images() -> ImageSet:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (NUM_IMAGES, 3, 16, 16), generator=generator, dtype=torch.uint8)
    targets = torch.randint(0, NUM_CLASSES, (NUM_IMAGES,), generator=generator)
    names = tuple(map(str, range(NUM_CLASSES)))
    return ImageSet("made up", pixels, targets, names, CIFAR10_STATS)


def trained(model: Network, iter_size: int, *, consistent: bool) -> list[tuple[float, float]]:
    """Losses and training accuracies of the steps of this process's part of the training."""
    data = images()
    augmentation = Augmentation(finetune_ops(), data.stats)
    batches = Streams(Batches(data, augmentation, CPU, batch_size=12 // iter_size))
    objective: Objective = Classification(data.targets, torch.linspace(0.2, 1, NUM_IMAGES))
    if consistent:
        views = [augmentation, Augmentation([*finetune_ops(), RandAugment()], data.stats)]
        others = Batches(data, views, CPU, batch_size=24 // iter_size, stream=1)
        batches = Streams(batches.labeled, others)
        posteriors = torch.nn.functional.one_hot(data.targets) * 0.3 + 0.1
        sizes = {"ratio": 2, "num_batches": STEPS * iter_size}
        objective = Consistency(data.targets, posteriors / posteriors.sum(1)[:, None], **sizes)
    every = torch.arange(NUM_IMAGES)
    steps = train_steps(
        distributed.wrap_ddp(model),
        objective.to(model.dtype),
        sgd(model.parameters(), 0.05, 5e-4),
        batches.repeat(every, 0, STEPS * iter_size, others=every if consistent else None),
        lambda step: 0.05 / (1 + step),
        CPU,
        iter_size=iter_size,
    )
    return [(float(step.loss), float(step.means["top1"])) for step in steps]


def experiment() -> dict[str, Any]:
    """What one process, or all of them together, arrive at."""
    found: dict[str, Any] = {}
    for name, dtype, iter_size in (
        ("float32", torch.float32, 1),
        ("float64", torch.float64, 1),
        ("accumulated", torch.float64, 2),
        ("consistent", torch.float64, 1),
    ):
        model = Network(dtype)
        means = trained(model, iter_size, consistent=name == "consistent")
        parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
        everywhere = distributed.all_gather_rows(parameters[None], distributed.world_size())
        found[name] = {"means": means, "parameters": parameters, "everywhere": everywhere}
    # as training leaves it: a network whose statistics are each process's own
    model = build_model("wrn-10-1", NUM_CLASSES)
    model.load_state_dict(
        {k: v.float() for k, v in Network(torch.float64).net.state_dict().items()}
    )
    if not distributed.is_main():
        model.bn1.running_mean.fill_(3.0)
    data = images()
    found["test"] = evaluate(model, data, CPU)
    data.targets[::2] = UNKNOWN
    found["half"] = evaluate(model, data, CPU)
    mean = model.bn1.running_mean[None]
    found["statistics"] = distributed.all_gather_rows(mean, distributed.world_size())
    one = ImageSet("one", data.images[1:2], data.targets[1:2], data.classes, data.stats)
    found["one image"] = evaluate(model, one, CPU)
    return found


def work(path: Path) -> int:
    found = experiment()
    if distributed.is_main():
        torch.save(found, path)
    return 0


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[dict[str, Any], dict[str, Any]]:
    """The experiment in one process and in two."""
    path = tmp_path_factory.mktemp("both") / "two.pt"
    assert distributed.run(partial(work, path), "cpu,cpu") == 0
    return experiment(), torch.load(path)


@pytest.mark.parametrize("name", ["float32", "float64", "accumulated", "consistent"])
def test_two_processes_end_with_the_parameters_of_one(both, name):
    one, two = (found[name] for found in both)
    assert torch.equal(two["everywhere"][0], two["everywhere"][1])
    start = torch.cat([p.detach().flatten() for p in Network(one["parameters"].dtype).parameters()])
    assert (one["parameters"] - start).abs().max() > 1e-2  # there was something to learn
    torch.testing.assert_close(two["parameters"], one["parameters"], **EQUAL[start.dtype])
    torch.testing.assert_close(
        torch.tensor(two["means"]), torch.tensor(one["means"]), rtol=1e-5, atol=0
    )


def test_the_gradients_of_two_batches_make_the_step_of_their_union():
    # the stream hands out the same images either way; only the augmentation is drawn batch by batch
    data = images()
    plain = Augmentation((), data.stats)
    results = []
    for iter_size in (1, 2, 3):
        model = Network(torch.float64)
        batches = Batches(data, plain, CPU, batch_size=12 // iter_size)
        steps = train_steps(
            model,
            Classification(data.targets, torch.ones(NUM_IMAGES)),
            sgd(model.parameters(), 0.05, 5e-4),
            batches.repeat(torch.arange(NUM_IMAGES), iter_size * 2, iter_size * 6),
            lambda _: 0.05,
            CPU,
            first_step=2,
            iter_size=iter_size,
        )
        found = [
            (step.number, step.batch_size, float(step.loss), float(step.means["top1"]))
            for step in steps
        ]
        results.append((found, torch.cat([p.detach().flatten() for p in model.parameters()])))
    for found, parameters in results[1:]:
        assert (
            [x[:2] for x in found]
            == [x[:2] for x in results[0][0]]
            == [(n, 12) for n in range(2, 6)]
        )
        for part in (2, 3):
            expected = [x[part] for x in results[0][0]]
            assert [x[part] for x in found] == pytest.approx(expected, rel=1e-6)
        torch.testing.assert_close(parameters, results[0][1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["test", "half", "one image"])
def test_evaluation_counts_every_image_once_on_any_number_of_processes(both, name):
    one, two = (found[name] for found in both)
    assert (two["top1"], two["top5"]) == (one["top1"], one["top5"])
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)


def test_evaluation_uses_and_leaves_the_statistics_of_rank_0(both):
    one, two = (found["statistics"] for found in both)
    assert torch.equal(two[0], one[0])
    assert torch.equal(two[1], one[0])


def words(folder: Path, world: Path, *more: object) -> list[object]:
    """A run that trains the last layer alone, so that BatchNorm keeps its statistics."""
    data = ("--dataset", "folder", "--data-dir", world / "pictures", *TINY)
    start = ("--pretrained", world / "metric.pth.tar", "--finetune", "--num-labeled", LABELS)
    rest = ("--max-iters", 20, "--eval-freq", 10, "--print-freq", 5, "--lr", 0.1)
    files = ("--model-root", folder, "--log-root", folder / "log", "--exp-name", "e")
    pseudo = ("--pseudo-file", world / "pseudo.pth.tar", "--confidence-weighted")
    return [*data, *start, *rest, *files, *pseudo, *more]


def state(folder: Path) -> dict[str, Any]:
    return checkpoint.load_dict(folder / "e" / "ckpt.pth.tar")


def logged(folder: Path) -> list[dict[str, Any]]:
    """The lines of the log without what the clock and rounding decide."""
    left_out = ("time", "images_per_s", "data_wait", "mfu", "meta", "loss")
    return [
        {k: v for k, v in x.items() if k not in left_out} for x in log_lines(folder / "log" / "e")
    ]


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    assert_ok(run_script("cifar-semi.py", *words(folder, world)))
    return folder


def assert_same_run(folder: Path, alone: Path) -> None:
    one, two = state(alone), state(folder)
    for name, value in one["net"].items():
        torch.testing.assert_close(two["net"][name], value, rtol=1e-5, atol=1e-7)
    assert not torch.equal(one["net"]["fc.bias"], torch.zeros(4))
    assert two.keys() == one.keys()
    for key in ("step", "accuracies", "best_acc", "examples", "classes"):
        assert_same(two[key], one[key])


@pytest.mark.slow
def test_two_processes_of_the_script_make_the_run_of_one_and_rank_0_alone_writes(
    world, alone, tmp_path
):
    output = assert_ok(run_script("cifar-semi.py", *words(tmp_path, world, "--gpus", "cpu,cpu")))
    assert_same_run(tmp_path, alone)
    assert logged(tmp_path) == logged(alone)
    assert {p.name for p in (tmp_path / "e").iterdir()} == {"ckpt.pth.tar", "ckpt.best.pth.tar"}
    assert len(list((tmp_path / "log" / "e").glob("events*"))) == 1
    lines = output.splitlines()
    assert len([x for x in lines if x.startswith("step     10  test accuracy")]) == 1
    assert len([x for x in lines if x.startswith("last accuracy")]) == 1
    assert not [name for name in state(tmp_path)["net"] if name.startswith("module.")]


@pytest.mark.slow
def test_a_run_stopped_in_two_processes_under_torchrun_goes_on_in_one(world, alone, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    line = words(tmp_path, world, "--gpus", "cpu")
    output = assert_ok(run_script(*torchrun, "cifar-semi.py", *line, "--stop-after", 7))
    assert "stopped by --stop-after 7 after step 7; continue: torchrun ... " in output
    assert state(tmp_path)["step"] == 7
    assert_ok(run_script("cifar-semi.py", *line, "--resume", "auto"))
    assert_same_run(tmp_path, alone)
    lines = [x for x in logged(tmp_path) if x["event"] in ("train", "test")]
    assert lines == [x for x in logged(alone) if x["event"] in ("train", "test")]


@pytest.mark.slow
def test_a_number_of_processes_that_does_not_divide_the_batch_is_refused(world, tmp_path):
    line = words(tmp_path, world, "--gpus", "cpu,cpu", "-b", 15)
    assert_refused(run_script("cifar-semi.py", *line), "--batch-size 15", "2 processes", "take 14")
    assert not contents(tmp_path)


def children(pid: int) -> Iterator[int]:
    """The working processes that a launcher started."""
    for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
            yield child


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def endless(world, tmp_path) -> Iterator[subprocess.Popen]:
    """Two processes that have saved their first checkpoint and train on."""
    line = words(tmp_path, world, "--gpus", "cpu,cpu", "--max-iters", 10**6, "--eval-freq", 2)
    command = [sys.executable, str(ROOT / "cifar-semi.py"), *map(str, line)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "e" / "ckpt.pth.tar").is_file():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "no checkpoint"
            time.sleep(0.1)
        yield process
        process.kill()


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_and_leaves_the_checkpoint_whole(endless, tmp_path):
    started = list(children(endless.pid))
    assert len(started) == 2
    os.kill(started[1], signal.SIGKILL)
    endless.communicate(timeout=60)
    assert endless.returncode not in (0, None)
    assert state(tmp_path)["step"] >= 2
    deadline = time.monotonic() + 10
    while any(map(alive, started)):
        assert time.monotonic() < deadline, "a process outlives the run"
        time.sleep(0.1)


def test_a_signal_to_the_launcher_saves_the_step_at_hand(endless, tmp_path):
    before = state(tmp_path)["step"]
    endless.send_signal(signal.SIGTERM)
    output, errors = endless.communicate(timeout=60)
    assert endless.returncode == 143, errors
    step = state(tmp_path)["step"]
    assert f"stopped by SIGTERM after step {step}; continue: python " in output
    assert step >= before


@pytest.mark.slow
def test_ctrl_c_to_the_launcher_saves_the_step_at_hand(endless, tmp_path):
    endless.send_signal(signal.SIGINT)
    output, errors = endless.communicate(timeout=60)
    assert endless.returncode == 130, errors
    assert f"after step {state(tmp_path)['step']}; continue: python " in output
