"""Count what one training step asks of a GPU, on any machine: kernels, copies from the host, waits.

    python scripts/benchmarks/step.py                         # phases 1 and 3 at their published settings
    python scripts/benchmarks/step.py --tasks pretrain-cifar --batch-size 512

A step of `lib/training/step.py` on a batch of `unsupervised/cifar.py`, and one of `cifar-semi.py`, run on
fake tensors, which have shapes and a device but no values. So they cannot look at a value or make a shape
depend on one, which would let the host wait for the device: the script then ends with exit code 1 and names
the operation. The second step is counted: with the first, the random numbers and indexes of 32 steps travel
to the device together. The meters, and the look at the loss that `train_steps` takes every 50 steps, are not
counted. Counted by part are

    kernels    operations that compute or copy on the device; views and empty tensors are none
    copies     those among them that read the host's memory

Fake tensors of a GPU have no backward pass without one. Backward and optimizer are counted on fake tensors of
the CPU, casts of autocast included.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from datasets import transforms
from datasets.images import CIFAR10_STATS, ImageSet
from datasets.transforms import Augmentation, finetune_ops, instance_ops
from lib.cli import declared, start
from lib.loading.batches import Batch, Batches
from lib.objectives.classification import Classification
from lib.objectives.instance import InstanceDiscrimination
from lib.objectives.memory_bank import MemoryBank, build_loss
from lib.objectives.objective import Objective
from lib.runtime.devices import Device
from lib.training.optimizer import sgd
from lib.training.step import LossWatch, train_steps
from models import build_model

TASKS = ("pretrain-cifar", "finetune-cifar")
NUM_IMAGES, NUM_CLASSES, DIM = 50_000, 10, 128
# "images" make the batch; the others are the blocks that `train_steps` marks for a profiler, and its rest.
PARTS = ("images", "forward", "objective", "backward", "optimizer", "after step", "rest")
# Operations beside those known as views that start no kernel.
VIEWS = ("aten::_unsafe_view", "prim::", "aten::empty", "aten::new_empty")
Parts = tuple[nn.Module, Objective, Iterator[Batch]]
WAITS = (DataDependentOutputException, DynamicOutputShapeException)


class Launches(TorchDispatchMode):
    """Counts, by part, the kernels that start on a device, and the copies from the host among them."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type, self.part = device_type, "rest"
        self.kernels: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.name()
        written = [x for x in tree_leaves((result, args[:1])) if isinstance(x, Tensor)]
        here = any(x.device.type == self.device_type for x in written)
        if here and not (function.is_view or name.startswith(VIEWS)):
            self.kernels[self.part] += 1
            read = (x for x in tree_leaves(args) if isinstance(x, Tensor))
            if self.device_type != "cpu" and any(x.device.type == "cpu" for x in read):
                self.copies[self.part] += 1
        return result

    def restart(self) -> None:
        self.kernels.clear()
        self.copies.clear()

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Count a block as one part."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Make fake tensors in a block, those of a GPU as if there were one: with bf16 and pinned memory."""
    transforms.constant.cache_clear()  # fake tensors and real ones must not meet
    with (
        patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        patch("torch.cuda.is_bf16_supported", lambda: True),
        patch.object(Tensor, "pin_memory", lambda x: x),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield
    transforms.constant.cache_clear()


def build(task: str, batch_size: int, device: Device) -> Parts:
    """Build the network, the objective and the batches of a task on a fake device."""
    first = task == "pretrain-cifar"
    images = torch.empty(NUM_IMAGES, 3, 32, 32, dtype=torch.uint8, device=device.torch_device)
    labels = torch.zeros(NUM_IMAGES, dtype=torch.int64)
    data = ImageSet("random", images, labels, ("a", "b"), CIFAR10_STATS)
    augmentation = Augmentation(instance_ops() if first else finetune_ops(), CIFAR10_STATS)
    batches = Batches(data, augmentation, device, batch_size=batch_size)
    with device.torch_device:
        model = build_model("wrn-28-2", DIM if first else NUM_CLASSES, normalize=first)
    if first:
        bank = MemoryBank(NUM_IMAGES, DIM)
        objective: Objective = InstanceDiscrimination(bank, build_loss(0, 0.1, bf16=True))
        items = batches.epoch(0)
    else:
        objective = Classification(labels, torch.ones(NUM_IMAGES))
        items = batches.repeat(torch.arange(NUM_IMAGES), 0, 2)
    return model, objective.to(device.torch_device), items


def count_step(task: str, batch_size: int, device: str) -> Launches:
    """Count a step of `train_steps`, on a GPU without its backward pass.

    On a CPU images are augmented as on a GPU. The check of the loss is left out, which comes at every step
    there because nothing waits for it.
    """
    left_out = patch.object(Tensor, "backward", lambda _: None)
    if device == "cpu":
        left_out = patch.object(LossWatch, "see", lambda *_: None)
    all_selected = patch("datasets.transforms.selects", lambda _: True)
    with fake_gpu(), left_out, all_selected, Launches(device) as launches:
        device = Device(torch.device(device), bf16=True)
        model, objective, batches = build(task, batch_size, device)
        optimizer = sgd(model.parameters(), 0.03, 5e-4)
        with (
            patch("lib.training.step.record_function", launches.during),
            patch("lib.loading.batches.record_function", launches.during),
        ):
            steps = train_steps(model, objective, optimizer, batches, lambda _: 0.03, device)
            next(steps)  # makes the momenta and constants, and uploads the first batches
            launches.restart()
            next(steps)
    return launches


def count(task: str, batch_size: int) -> dict[str, dict[str, int]]:
    """Count kernels and copies from the host of one step, by part.

    Raises:
        DataDependentOutputException, DynamicOutputShapeException: if the step reads a value, or has a shape
            that depends on one; they name the operation.
    """
    found, on_cpu = (count_step(task, batch_size, device) for device in ("cuda", "cpu"))
    kernels = Counter(found.kernels)
    for part in ("backward", "optimizer"):
        kernels[part] = on_cpu.kernels[part]
    return {part: {"kernels": kernels[part], "copies": found.copies[part]} for part in PARTS}


def table(task: str, parts: dict[str, dict[str, int]]) -> str:
    """Format the counts of a task in Markdown, the sum last."""
    lines = [f"| {task} | kernels | copies from the host |", "|---|---:|---:|"]
    for part, found in parts.items():
        lines.append(f"| {part} | {found['kernels']} | {found['copies']} |")
    sums = [sum(found[kind] for found in parts.values()) for kind in ("kernels", "copies")]
    return "\n".join([*lines, f"| one step | {sums[0]} | {sums[1]} |"])


def build_parser() -> argparse.ArgumentParser:
    parser = declared.parser(__doc__)
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=TASKS,
        default=list(TASKS),
        help="scripts whose step is counted",
    )
    parser.add_argument(
        "-b", "--batch-size", type=declared.batch_size, default=128, help="images of a step"
    )
    parser.add_argument("--output", default="", metavar="FILE", help="JSON file for the numbers")
    return parser


def main(args: argparse.Namespace) -> None:
    try:
        found = {task: count(task, args.batch_size) for task in args.tasks}
    except WAITS as error:
        sys.exit(f"the host would wait for the device, or a shape depends on a value: {error.func}")
    print("\n\n".join(table(task, parts) for task, parts in found.items()))
    print("\nThe host waits for no value, and no shape depends on one.")
    if args.output:
        Path(args.output).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    start.run(main, build_parser())
