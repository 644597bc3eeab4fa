"""The device that a run computes on, and the precision of its forward pass."""

import ctypes
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib.runtime import distributed

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # numbers of parameters in malloc.h
PRECISIONS = ("auto", "fp32", "bf16")


def has_fast_bf16(device: torch.device) -> bool:
    """Return whether the hardware multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@dataclass(frozen=True)
class Device:
    """The device that holds the tensors, and the number format of the forward pass."""

    torch_device: torch.device
    bf16: bool  # whether the forward pass runs under bf16 autocast; weights stay float32

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.torch_device.type, torch.bfloat16, enabled=self.bf16)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move a model to the device, with its weights in channels-last order (fastest everywhere)."""
        return model.to(self.torch_device, memory_format=torch.channels_last)

    def to_device(self, x: Tensor) -> Tensor:
        """Return `x` on the device. A GPU copies it while it works on earlier tasks."""
        if self.torch_device.type != "cuda" or x.is_cuda:
            return x.to(self.torch_device)
        return x.pin_memory().to(self.torch_device, non_blocking=True)

    def scalar(self, value: float) -> float | Tensor:
        """Return a number as kernels take it: on a GPU, in memory of the device, filled without a copy.

        A captured optimizer step reads a new value from there, and an eager one has the same bits.
        """
        if self.torch_device.type != "cuda":
            return value
        return torch.full((), value, dtype=torch.float32, device=self.torch_device)

    def synchronize(self) -> None:
        """Wait until the device has finished its work, before a clock is read."""
        if self.torch_device.type == "cuda":
            torch.cuda.synchronize(self.torch_device)

    def __str__(self) -> str:
        precision = "bf16 autocast" if self.bf16 else "fp32"
        size = distributed.world_size()
        precision += f", {size} processes" if size > 1 else ""
        if self.torch_device.type == "cpu":
            return f"CPU, {torch.get_num_threads()} threads, {precision}"
        return f"{torch.cuda.get_device_name(self.torch_device)} ({self.torch_device}), {precision}"


def _keep_freed_memory() -> None:
    """Let glibc keep the memory that a step frees for the next one, instead of handing it back to the system.

    Else the pages of every step are mapped anew: 12,000 page faults a step of `cifar-semi.py` with WRN-10-1
    at batch 128, 12% of its processor time (2 cores of an AMD EPYC, 2026-11-28). Other C libraries are left
    as they are.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the largest that it takes


def select(gpus: str = "0", precision: str = "auto", *, deterministic: bool = False) -> Device:
    """Return the device of this process among those that `--gpus` names, by index of the visible ones.

    `CUDA_VISIBLE_DEVICES` is respected and never written. Without CUDA every choice is the CPU. A device
    that does not exist, and several devices for a single process, are a ValueError.

    Args:
        gpus: as in `device_names`; of several devices, the one at this process's local rank is taken.
        precision: one of `PRECISIONS`; `auto` takes bf16 where the hardware has it.
        deterministic: make GPUs compute the same bits every time, at some loss of speed.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: take one of {', '.join(PRECISIONS)}")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # CUDA reads this as it starts
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)
    names = distributed.device_names(gpus)
    if len(names) > 1 and distributed.world_size() == 1:
        raise ValueError(f"--gpus {gpus}: name one device here")
    device = torch.device("cpu")
    if names[0] != "cpu":
        place = 0 if distributed.under_torchrun() else distributed.local_rank()
        device = torch.device("cuda", int(names[place]))
        torch.cuda.set_device(device)  # else pinned memory and the like would go to device 0
        # batches of one size: cuDNN tries every algorithm once
        torch.backends.cudnn.benchmark = not deterministic
    else:
        _keep_freed_memory()
    bf16 = precision == "bf16" or (precision == "auto" and has_fast_bf16(device))
    return Device(device, bf16)
