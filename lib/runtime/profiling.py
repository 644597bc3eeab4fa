"""What the hardware could compute, what a network needs, and where the time of a training step goes."""

import copy
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, schedule
from torch.utils.flop_counter import FlopCounterMode

from lib.runtime.devices import Device
from lib.runtime.distributed import is_main, print_main, share
from lib.runtime.seeding import generator

LONG_ENOUGH_S = 0.01  # a product that takes this long is not ruled by what it costs to start one
SMALLEST, LARGEST = 512, 8192  # sides of the products tried
REPEATS = 6
WARM_UP = 4  # steps before a trace: the first ones allocate memory and choose algorithms
TABLE_ROWS = 12  # operations listed beside a trace
TRACE = "trace.json.gz"
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")  # of torch.compile


@dataclass(frozen=True)
class Arithmetic:
    """What a training step asks of the hardware.

    Attributes:
        per_image: floating point operations of forward and backward, per image.
        rate: the hardware's operations per second in a large matrix product, all processes together.
    """

    per_image: float
    rate: float

    def mfu(self, images_per_s: float) -> float:
        """The part of the rate that training uses at that speed."""
        return images_per_s * self.per_image / self.rate


def matrix_rate(device: Device) -> float:
    """Operations per second of a matrix product in the format of the forward pass, 2 n^3 being counted.

    Measured on squares of growing size until one takes `LONG_ENOUGH_S`: a fraction of a second in all. The
    fastest of several counts: other programs only make them slower.
    """
    dtype = torch.bfloat16 if device.bf16 else torch.float32
    best, size = 0.0, SMALLEST
    while True:
        square = torch.rand(size, size, generator=generator(0, "sample"))
        square = square.to(device.torch_device, dtype)
        seconds = min(_product_s(square, device) for _ in range(REPEATS))
        best = max(best, 2 * size**3 / seconds)
        if seconds > LONG_ENOUGH_S or size >= LARGEST:
            return best
        size *= 2


def _product_s(square: Tensor, device: Device) -> float:
    device.synchronize()
    start = time.perf_counter()
    torch.mm(square, square)
    device.synchronize()
    return time.perf_counter() - start


def training_flops(model: nn.Module, image_shape: tuple[int, int, int]) -> float:
    """Floating point operations of forward and backward for one image, those of matrix products alone.

    Counted on a copy whose storage is let go: nothing is computed, and the network stays as it is. Layers in
    front of all trainable parameters have no backward.

    Args:
        image_shape: C, H, W.
    """
    ghost = copy.deepcopy(model).to("meta").eval()  # BatchNorm trains on no single value
    with FlopCounterMode(display=False) as counter:
        ghost(torch.empty(1, *image_shape, device="meta")).sum().backward()
    return float(counter.get_total_flops())


def arithmetic(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    device: Device,
    *,
    more_per_image: float = 0.0,
) -> Arithmetic:
    """What training `model` asks for, with the rate measured now.

    Args:
        more_per_image: operations of the loss.
    """
    needed = training_flops(model, image_shape) + more_per_image
    return Arithmetic(needed, matrix_rate(device) * share().size)


def require_compiler() -> None:
    """Find out before anything else whether --compile can make kernels: PyTorch calls CXX, else g++.

    Raises:
        ValueError: saying what to install.
    """
    if not shutil.which(
        os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    ):
        raise ValueError(
            "--compile needs a C++ compiler, and none was found: install g++ (on Debian and Ubuntu with "
            "apt install g++), or leave --compile out"
        )


@contextmanager
def traced(number: int, folder: Path, device: Device) -> Iterator[Callable[[], None]]:
    """Trace `number` training steps of rank 0 after a few to warm up; 0: none.

    Gives a function to be called after each step. At the end of the traced steps, or of the block, the trace
    lies in `folder` and a table of the costliest operations is printed.
    """
    if not number or not is_main():
        yield lambda: None
        return
    on_gpu, done_at_all = device.torch_device.type == "cuda", []
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]

    def report(done: profile) -> None:
        done_at_all.append(done)
        folder.mkdir(parents=True, exist_ok=True)
        done.export_chrome_trace(str(folder / TRACE))
        key = f"self_{'device' if on_gpu else 'cpu'}_time_total"
        print_main(done.key_averages().table(sort_by=key, row_limit=TABLE_ROWS))
        print_main(f"trace: {folder / TRACE}; https://ui.perfetto.dev shows it")

    plan = schedule(wait=WARM_UP - 1, warmup=1, active=number, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=report) as profiler:
        yield profiler.step
    if not done_at_all:
        print_main(f"no trace: the run ended within the {WARM_UP} steps that come before it")


def compile_network(model: nn.Module, mode: str) -> None:
    """Let torch.compile make the kernels of `model`, in place: the names of its weights stay.

    For each size of batch kernels of its own: those for any size are slower, and there are two or three.
    """
    model.compile(mode=mode, dynamic=False)
