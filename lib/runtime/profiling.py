"""Speed of the hardware, cost of a network, and traces of where a training step spends its time."""

import copy
import math
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, schedule
from torch.utils.flop_counter import FlopCounterMode

from datasets.decoded import cache_folder
from lib.runtime.devices import Device
from lib.runtime.distributed import is_main, print_main, wrap_ddp
from lib.runtime.seeding import generator

LONG_ENOUGH_S = 0.01  # the start of a product that takes this long does not distort its time
SMALLEST, LARGEST = 512, 8192  # sides of the matrices tried
REPEATS = 6
WARM_UP = 4  # steps before a trace: the first ones allocate memory and choose algorithms
TABLE_ROWS = 12  # operations listed beside a trace
TRACE = "trace.json.gz"
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")  # modes of torch.compile


@dataclass(frozen=True)
class Arithmetic:
    """The cost of training, and the speed of the hardware."""

    per_image: float  # floating point operations of forward and backward
    rate: float  # operations per second of a large matrix product, over all processes

    def mfu(self, images_per_s: float) -> float:
        """Return the model FLOPs utilization (MFU) of training at that speed."""
        return images_per_s * self.per_image / self.rate


def matrix_rate(device: Device) -> float:
    """Measure the operations per second (2 n^3 a product) of matrix products in the forward pass's format.

    This process is measured alone. Squares grow until a product takes `LONG_ENOUGH_S`, a fraction of a
    second in all. The fastest of several counts, because other programs only slow them down.
    """
    dtype = torch.bfloat16 if device.bf16 else torch.float32
    best, size = 0.0, SMALLEST
    while True:
        square = torch.rand(size, size, generator=generator(0, "sample"))
        square = square.to(device.torch_device, dtype)
        seconds = math.inf
        for _ in range(REPEATS):
            device.synchronize()
            start = time.perf_counter()
            torch.mm(square, square)
            device.synchronize()
            seconds = min(seconds, time.perf_counter() - start)
        best = max(best, 2 * size**3 / seconds)
        if seconds > LONG_ENOUGH_S or size >= LARGEST:
            return best
        size *= 2


def training_flops(model: nn.Module, image_shape: tuple[int, int, int]) -> float:
    """Count the floating point operations of matrix products in forward and backward for one C x H x W image.

    A copy on the meta device is counted: nothing is computed, and the network stays as it is. Layers in
    front of all trainable parameters have no backward.
    """
    ghost = copy.deepcopy(model).to("meta").eval()  # BatchNorm cannot train on a single value
    with FlopCounterMode(display=False) as counter:
        ghost(torch.empty(1, *image_shape, device="meta")).sum().backward()
    return float(counter.get_total_flops())


@contextmanager
def traced(number: int, folder: Path, device: Device) -> Iterator[Callable[[], None]]:
    """Trace `number` training steps of rank 0 after `WARM_UP` steps; 0 traces none.

    Yields a function to call after each step. After the traced steps, or at the end of the block, the trace
    is written to `folder` and a table of the costliest operations is printed.
    """
    if not number or not is_main():
        yield lambda: None
        return
    on_gpu, done_at_all = device.torch_device.type == "cuda", []
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]

    def report(done: profile) -> None:
        done_at_all.append(done)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            done.export_chrome_trace(str(folder / TRACE))
        except OSError as error:
            print_main(f"warning: no trace, {folder / TRACE} cannot be written: {error.strerror}")
            return
        key = f"self_{'device' if on_gpu else 'cpu'}_time_total"
        print_main(done.key_averages().table(sort_by=key, row_limit=TABLE_ROWS))
        print_main(f"trace: {folder / TRACE}; https://ui.perfetto.dev shows it")

    plan = schedule(wait=WARM_UP - 1, warmup=1, active=number, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=report) as profiler:
        yield profiler.step
    if not done_at_all:
        print_main(f"no trace: the run ended within the {WARM_UP} steps that come before it")


def keep_compiled_code_private() -> None:
    """Have torch.compile keep its code in a folder that nobody else can write to, and loads it from there.

    By default it takes a folder in TMPDIR under a name that everybody knows, and may create first. Here it is
    `TORCHINDUCTOR_CACHE_DIR`, or one in the user's cache folder.

    Raises:
        ValueError: if the folder belongs to somebody else, or others may write to it.
    """
    own = str(cache_folder() / "compiled")
    folder = Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", own))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(
            f"--compile loads code from {folder}, which others can write to; remove it, or name a folder of "
            "your own in TORCHINDUCTOR_CACHE_DIR"
        )


def prepare_training(model: nn.Module, compile_mode: str = "") -> nn.Module:
    """Compile `model` if `compile_mode` names one of `COMPILE_MODES`, and return it wrapped for DDP.

    It is compiled in place, so that its weights keep their names, and each batch size gets its own kernels:
    there are two or three sizes, and kernels for any size are slower.

    While a GPU trains, the host only fills small tensors with random numbers, and gets one thread for that:
    with 16 threads it took 9 ms for the square roots of 5,120 numbers (beside an H100, 2026-11-27).
    """
    if next(model.parameters()).is_cuda:
        torch.set_num_threads(1)
    if compile_mode:
        keep_compiled_code_private()
        model.compile(mode=compile_mode, dynamic=False)
    return wrap_ddp(model)
