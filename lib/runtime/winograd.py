"""Fewer multiplications on a CPU: 3x3 convolutions by Winograd's algorithm, BatchNorm and ReLU in one pass.

A 3x3 convolution of stride 1 takes 36 products for 2 x 2 outputs; Winograd's minimal filtering F(2x2, 3x3)
takes 16 (Lavin & Gray 2016, arXiv 1509.09308). It is the same sum in another order; as bfloat16 rounds the
transformed factors, the result is off by 1.9 times as much as that of factors rounded as they are (2.4 times
for the filters' gradient). PyTorch has no such kernels for a CPU; those in winograd.cpp are compiled when
they are first asked for, and kept.
"""

import hashlib
import logging
import os
import platform
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lib.files import atomic
from lib.runtime.distributed import main_first, print_main
from models.layers import BatchNormReLU

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-fopenmp", "-fno-math-errno", "-mfma")
# named one by one, for a home folder may be shared with a machine whose processor has others
FLAGS += tuple(f"-mavx512{extension}" for extension in ("f", "bw", "dq", "vl", "bf16"))
CHANNELS, ROWS, COLUMNS = 16, 2, 4  # of what the kernels take, and their multiples
OUTPUTS = 32  # of what the gradient of the filters takes, and their multiples
MOST_FILTERS = 2**16  # the gradient keeps 16 sums for each, which have to stay in the cache


def check_hardware(device: torch.device, *, bf16: bool) -> None:
    """Find out whether the kernels can work where a run computes.

    Raises:
        ValueError: saying what is missing.
    """
    if device.type != "cpu":
        raise ValueError(
            "--winograd is for a CPU (a GPU's own library takes Winograd's algorithm where that pays): "
            "leave it out, or take --gpus cpu"
        )
    if not torch.cpu._is_avx512_bf16_supported():
        raise ValueError(
            "--winograd needs a processor with AVX512-BF16, and this has none: leave it out"
        )
    if not bf16:
        raise ValueError("--winograd computes in bf16: leave out --precision fp32, or --winograd")


def build() -> None:
    """Load the kernels, the operators `torch.ops.winograd.*`; the first time, compile them with g++.

    They are kept in PyTorch's folder for extensions (TORCH_EXTENSIONS_DIR, or in ~/.cache), under a name that
    says of which source, flags and PyTorch they are.

    Raises:
        ValueError: with the compiler's words, where they cannot be made.
    """
    if hasattr(torch.ops.winograd, "convolution"):
        return
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # about GPUs
    from torch.utils import cpp_extension  # imported here: it takes a second

    made_of = SOURCE.read_bytes(), *FLAGS, torch.__version__, platform.machine()
    digest = hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    kept = Path(folder) / f"deep_metric_transfer_winograd_{digest}.so"
    with main_first():
        if not _loaded(kept):
            print_main("compiling the kernels of --winograd: a quarter of a minute, once")
            _compile(kept, cpp_extension)


def _loaded(kept: Path) -> bool:
    try:
        torch.ops.load_library(str(kept))
    except OSError:  # not there, or no library; it is written whole or not at all
        return False
    return True


def _compile(kept: Path, cpp_extension: ModuleType) -> None:
    """Make, load and keep the kernels; where that cannot be written, the next run makes them again."""
    # not in PyTorch's own cache: where a compiler was killed, it waits for it for ever
    with tempfile.TemporaryDirectory() as made, _own_programs_found():
        words = {"extra_cflags": list(FLAGS), "is_python_module": False, "build_directory": made}
        try:
            cpp_extension.load(kept.stem, [str(SOURCE)], **words)
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            raise ValueError(f"--winograd: its kernels could not be made: {error}") from error
        beside = kept.with_name(f"{kept.name}.{os.getpid()}")  # several runs may be at it
        try:
            atomic.write_whole((Path(made) / f"{kept.stem}.so").read_bytes(), beside)
            atomic.put_in_place(beside, kept)
        except OSError as error:
            print_main(f"these kernels are not kept for the next run: {error.strerror or error}")


@contextmanager
def _own_programs_found() -> Iterator[None]:
    """ninja lies beside the interpreter, in an environment that need not be activated."""
    before = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = os.pathsep.join((sysconfig.get_path("scripts"), before))
    try:
        yield
    finally:
        os.environ["PATH"] = before


def install(model: nn.Module) -> int:
    """Let the layers of `model` that the kernels suit compute with them, in place.

    The names and values of its weights stay. At each call, what a layer gets decides: under bf16 autocast, on
    a CPU, maps whose height is a multiple of 2 and whose width one of 4; others it computes as before.

    Returns:
        How many convolutions the kernels suit.
    """
    build()
    number = 0
    for module in model.modules():
        if type(module) is nn.Conv2d and _suits(module):
            module.__class__ = WinogradConv2d
            number += 1
        elif type(module) is BatchNormReLU and module.num_features % CHANNELS == 0:
            module.__class__ = OnePassBatchNormReLU
    total = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    print_main(f"Winograd's algorithm suits {number} of {total} convolutions")
    return number


def _suits(conv: nn.Conv2d) -> bool:
    return (
        (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))
        and (conv.dilation, conv.groups, conv.padding_mode) == ((1, 1), 1, "zeros")
        and conv.bias is None
        and conv.in_channels % CHANNELS == conv.out_channels % CHANNELS == 0
    )


def _in_bf16(maps: Tensor, weight: Tensor) -> bool:
    autocast = (
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )
    return autocast and maps.device.type == "cpu" and weight.dtype == torch.float32


def _ready(maps: Tensor) -> Tensor:
    return maps.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)


class WinogradConv2d(nn.Conv2d):
    """A convolution with 3x3 filters, stride 1 and a border of zeros."""

    def forward(self, maps: Tensor) -> Tensor:
        height, width = maps.shape[-2:]
        if _in_bf16(maps, self.weight) and not (height % ROWS or width % COLUMNS):
            return _Convolution.apply(_ready(maps), self.weight)
        return super().forward(maps)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(maps, weight)
        return torch.ops.winograd.convolution(maps, weight, False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        maps, weight = ctx.saved_tensors
        gradient, of_maps, of_weight = _ready(gradient), None, None
        if ctx.needs_input_grad[0]:
            of_maps = torch.ops.winograd.convolution(gradient, weight, True)
        if ctx.needs_input_grad[1]:
            of_weight = _filter_gradient(maps, weight, gradient)
        return of_maps, of_weight


def _filter_gradient(maps: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    outputs, inputs = weight.shape[:2]
    if outputs % OUTPUTS == 0 and outputs * inputs <= MOST_FILTERS:
        return torch.ops.winograd.filter_gradient(maps, gradient)
    return torch.nn.grad.conv2d_weight(maps, weight.shape, gradient, padding=1).float()


class OnePassBatchNormReLU(BatchNormReLU):
    """Batch normalization and ReLU that read and write the maps once where PyTorch does twice."""

    def forward(self, maps: Tensor) -> Tensor:
        usual = self.affine and self.track_running_stats and self.momentum is not None
        if not (usual and self.training and maps.dim() == 4 and _in_bf16(maps, self.weight)):
            return super().forward(maps)
        count = maps.numel() // maps.shape[1]
        if count < 2:
            return super().forward(maps)  # which says that this is too little
        output, mean, variance = _BatchNormReLU.apply(
            _ready(maps), self.weight, self.bias, self.eps
        )
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return output


class _BatchNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        output, mean, variance = torch.ops.winograd.batch_norm_relu(maps, weight, bias, eps)
        ctx.save_for_backward(maps, weight, bias, mean, variance)
        ctx.mark_non_differentiable(mean, variance)
        ctx.eps = eps
        return output, mean, variance

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        found = torch.ops.winograd.batch_norm_relu_backward(
            _ready(gradient), *ctx.saved_tensors, ctx.eps
        )
        return *found, None
