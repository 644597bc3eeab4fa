"""What a network needs, what the hardware gives, traces, compiled kernels; and loops that never wait."""

import gzip
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import assert_ok, assert_refused, run_script
from torch import nn
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.utils._python_dispatch import TorchDispatchMode

from datasets.images import CIFAR10_STATS, ImageSet
from datasets.transforms import Augmentation, finetune_ops, instance_ops
from lib.cli import start
from lib.loading.batches import Batches
from lib.objectives.classification import Classification
from lib.objectives.instance import InstanceDiscrimination
from lib.objectives.memory_bank import MemoryBank, build_loss
from lib.runtime import profiling
from lib.runtime.devices import Device
from lib.training.optimizer import sgd, trainable
from lib.training.progress import Throughput, TimeLeft, speed
from lib.training.state import AverageMeter
from lib.training.step import LossWatch, train_steps
from models import build_model

CPU = Device(torch.device("cpu"), bf16=False)
SMALL = ("--dataset", "patches", "--image-size", 16, "--arch", "wrn-10-1", "-b", 64)


def naive_flops(model: nn.Module, size: int) -> int:
    """Two operations per multiplication: forward, gradient of weights and, but for the first, of input."""
    layers = []

    def count(layer, inputs, output):
        weights = layer.weight.numel()
        places = output.shape[-1] * output.shape[-2] if output.ndim == 4 else 1
        layers.append(2 * weights * places)

    hooks = [
        layer.register_forward_hook(count)
        for layer in model.modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    model.eval()(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return 3 * sum(layers) - layers[0]


@pytest.mark.parametrize(("name", "imagenet"), [("wrn-10-1", False), ("resnet18", True)])
def test_operations_of_training_are_counted_by_hand_alike(name, imagenet):
    model = build_model(name, 10, imagenet=imagenet)
    assert profiling.training_flops(model, (3, 64, 64)) == naive_flops(model, 64)


def test_counting_leaves_the_network_as_it_is():
    model = build_model("wrn-10-1", 10).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    profiling.training_flops(model, (3, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.device.type == "cpu" for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.training


def test_frozen_layers_in_front_of_the_head_have_no_backward():
    model = build_model("wrn-10-1", 10)
    whole = profiling.training_flops(model, (3, 32, 32))
    trainable(model, head_only=True)
    forward = profiling.training_flops(model, (3, 32, 32)) - 2 * model.fc.weight.numel()
    assert 0.3 * whole < forward < 0.4 * whole


def test_the_matrix_rate_is_operations_over_seconds(monkeypatch):
    times = iter(range(100))
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: float(next(times)))
    # a clock that moves a second between two looks
    assert profiling.matrix_rate(CPU) == 2 * 512**3


def test_the_share_of_the_rate_goes_into_the_line(monkeypatch):
    times = iter([0.0, 2.0, 2.0])
    monkeypatch.setattr("lib.training.progress.time.perf_counter", lambda: next(times))
    work = profiling.Arithmetic(per_image=5e6, rate=1e9)
    clock = Throughput(lambda: 0.0, work.mfu)
    clock.count(100)
    lap = clock.lap()
    assert lap == {"images_per_s": 50.0, "data_wait": 0.0, "mfu": 0.25}
    assert speed(lap) == "50 img/s (0% of the time waiting for images, 25% MFU)"


def test_the_time_left_is_that_of_the_steps_since_this_start(monkeypatch):
    times = iter([100.0, 120.0])
    monkeypatch.setattr("lib.training.progress.time.perf_counter", lambda: next(times))
    left = TimeLeft(10, 4010)
    assert left(10) == left(4010) == ""
    assert left(30) == "  1:06:20 left"  # 20 steps took 20 seconds, 3,980 are left


@pytest.mark.parametrize(
    ("k", "operations"), [(0, 4 * 1000 * 16), (4, 4 * 5 * 16), (40, 4 * 1000 * 16)]
)
def test_the_operations_of_the_loss_are_those_of_its_products(k, operations):
    assert build_loss(k, 0.1).flops(1000, 16) == operations


class _Waits(TorchDispatchMode):
    """Counts the reads of single numbers: on a GPU each one waits for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def small_set(n: int = 64) -> ImageSet:
    images = torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8)
    names = ("a", "b")
    return ImageSet("random", images, torch.arange(n) % 2, names, CIFAR10_STATS)


def loop(phase: int, data: ImageSet):
    model = build_model("wrn-10-1", 8, normalize=phase == 1)
    optimizer = sgd(model.parameters(), 0.1, 5e-4)
    ops = instance_ops() if phase == 1 else finetune_ops()
    batches = Batches(data, Augmentation(ops, data.stats), CPU, batch_size=16)
    if phase == 1:
        objective = InstanceDiscrimination(MemoryBank(len(data), 8), build_loss(0, 0.1))
        return train_steps(model, objective, optimizer, batches.epoch(0), lambda _: 0.1, CPU)
    items = batches.repeat(torch.arange(len(data)), 0, 4)
    objective = Classification(data.targets, torch.ones(len(data)))
    return train_steps(model, objective, optimizer, items, lambda _: 0.1, CPU)


@pytest.mark.parametrize("phase", [1, 3])
def test_no_step_waits_for_the_device(phase, monkeypatch):
    # as on a GPU, where losses are looked at now and then
    monkeypatch.setattr(LossWatch, "see", lambda *_: None)
    loss = AverageMeter()
    with _Waits() as waits:
        for _, step in zip(range(3), loop(phase, small_set()), strict=False):
            loss.update(step.loss, step.batch_size)
        assert waits.count == 0
        assert loss.value > 0  # reading it is what waits
    assert waits.count == 1


def traced_steps(folder) -> list[str]:
    with gzip.open(folder / profiling.TRACE, "rt") as file:
        events = json.load(file)["traceEvents"]
    return [event["name"] for event in events if event.get("cat") == "user_annotation"]


@pytest.mark.parametrize(("steps", "found"), [(20, 3), (profiling.WARM_UP + 2, 2)])
def test_a_trace_holds_the_steps_that_were_asked_for(tmp_path, capsys, steps, found):
    data = small_set()
    epochs = (step for _ in range(10) for step in loop(1, data))
    with profiling.traced(3, tmp_path / "log", CPU) as after_step:
        for _ in zip(range(steps), epochs, strict=False):
            after_step()
    names = traced_steps(tmp_path / "log")
    for part in ("forward", "objective", "backward", "after step", "optimizer"):
        assert names.count(part) == found
    assert f"trace: {tmp_path / 'log' / profiling.TRACE}" in capsys.readouterr().out


def test_a_run_too_short_for_a_trace_says_so(tmp_path, capsys):
    with profiling.traced(3, tmp_path / "log", CPU) as after_step:
        after_step()
    assert "no trace: the run ended" in capsys.readouterr().out
    assert not (tmp_path / "log").exists()


def test_a_map_of_one_place_is_counted_too():
    model = build_model("wrn-10-1", 10).train()  # 4 pixels end as one
    assert profiling.training_flops(model, (3, 4, 4)) == naive_flops(model, 4)


def test_without_profile_there_is_no_trace(tmp_path):
    with profiling.traced(0, tmp_path, CPU) as after_step:
        after_step()
    assert not list(tmp_path.iterdir())


def test_both_phases_write_a_trace_beside_their_log(tmp_path, capsys):
    lines = {
        "unsupervised/cifar.py": (
            "--epochs",
            1,
            "--model-dir",
            tmp_path,
            "--log-dir",
            tmp_path / "1",
        ),
        "cifar-semi.py": ("--max-iters", 8, "--model-root", tmp_path, "--log-root", tmp_path / "3"),
    }
    folders = tmp_path / "1", tmp_path / "3" / "exp"
    for (name, more), folder in zip(lines.items(), folders, strict=True):
        script = start.load_script(name)
        words = (*SMALL, *more, "--profile", 2)
        script.main(script.build_parser().parse_args([str(word) for word in words]))
        steps = [name for name in traced_steps(folder) if name.startswith("ProfilerStep")]
        assert len(set(steps)) == 2
        assert "% MFU)" in capsys.readouterr().out


def test_without_a_compiler_compile_is_refused_before_anything_else(tmp_path):
    words = (*SMALL, "--compile", "--model-dir", tmp_path / "new")
    result = run_script("unsupervised/cifar.py", *words, PATH=str(tmp_path), CXX="")
    assert_refused(result, "--compile", "g++")
    assert not (tmp_path / "new").exists()


def test_compiled_code_is_loaded_from_a_folder_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "given back after the test")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    profiling.prepare_training(nn.Linear(2, 2), "default")
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folder.is_relative_to(tmp_path)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert cache_dir() == str(folder)  # torch agrees
    for mode in (0o777, 0o1777, 0o770, 0o702):  # /tmp is 1777
        folder.chmod(mode)
        with pytest.raises(ValueError, match=f"loads code from {folder}, which others can write"):
            profiling.prepare_training(nn.Linear(2, 2), "default")
    folder.chmod(0o755)
    monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)  # somebody else made it
    with pytest.raises(ValueError, match="name a folder of your own in TORCHINDUCTOR_CACHE_DIR"):
        profiling.prepare_training(nn.Linear(2, 2), "default")


@pytest.mark.slow
def test_compiled_kernels_train_the_same_network(tmp_path):
    runs = []
    for more in ((), ("--compile",)):
        folder = tmp_path / f"run{len(more)}"
        words = (*SMALL, "--stop-after", 1, "--precision", "fp32", "--model-dir", folder)
        assert_ok(run_script("unsupervised/cifar.py", *words, "--log-dir", folder, *more))
        state = torch.load(folder / "ckpt.cifar.pth.tar", weights_only=True)
        assert state["net"].keys() == build_model("wrn-10-1", 128).state_dict().keys()
        runs.append(state["optimizer"]["state"])
    # After one step the momenta are the gradients; later ones differ more, as rounding turns ReLUs on or off.
    assert len(runs[0]) > 20
    for eager, compiled in zip(*(run.values() for run in runs), strict=True):
        difference = (eager["momentum_buffer"] - compiled["momentum_buffer"]).norm()
        assert difference < 1e-4 * eager["momentum_buffer"].norm()
