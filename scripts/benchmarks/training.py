"""Benchmark of training in images per second, against a literal copy of the published step in the same run.

    python scripts/benchmarks/training.py                       # all four scripts
    python scripts/benchmarks/training.py --tasks pretrain-cifar finetune-cifar --rounds 9

Variants, each in a process of its own; they take turns, and while one works the others rest:

    literal    float32 in contiguous order, Pillow transforms in workers, the losses as published, six
               TensorBoard scalars and a wait for the device at every step
    ours       the script's default, with its meters and progress line
    eager      ours with --cuda-graph off
    compiled   ours with --compile
    bare       our forward, loss, backward and optimizer step on one batch that is already on the device

Small images are random bytes, large ones 500 x 375 JPEG files cut from photographs that ship inside
scikit-image. The script prints medians over the rounds, ratios within a round with the smallest and the
largest, MFU, and peak memory (resident, without that of the workers; on a GPU also the device's), and writes
them to --output as JSON.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.util import Finalize
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from PIL import Image
from tensorboardX import SummaryWriter
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from datasets import DataSet, build_datasets
from datasets.images import CIFAR10_STATS, IMAGENET_STATS, ImageSet
from datasets.transforms import (
    Augmentation,
    RandomHorizontalFlip,
    RandomResizedCrop,
    finetune_ops,
    instance_ops,
)
from lib.cli import declared, start
from lib.files import provenance
from lib.loading.batches import Batches
from lib.objectives.classification import Classification
from lib.objectives.instance import InstanceDiscrimination
from lib.objectives.memory_bank import MemoryBank, build_loss
from lib.runtime import devices, profiling
from lib.runtime.devices import Device
from lib.training.cuda_graph import WARM_UP, step_graph
from lib.training.optimizer import sgd
from lib.training.progress import Throughput
from lib.training.shared_settings import Compute
from lib.training.state import AverageMeter
from lib.training.step import Step, train_steps
from models import build_model

benchmark_input = start.load_script("scripts/benchmarks/input.py")
PHOTOGRAPHS = 256
PRINT_EVERY = 10  # steps
LAST_WORDS_S = 30.0  # time for a process to end by itself
NUM_CLASSES = {32: 10, 224: 1000}
BASELINE, OURS, BARE = "literal", "ours", "bare"

Advance = Callable[[int], None]  # function that trains a number of steps


@dataclass(frozen=True)
class Task:
    """One script with its published settings.

    Attributes:
        num_images: rows of the memory bank, 0 in phase 3.
        batch_size: published batch size; a CPU, whose speed per image hardly depends on it, gets `on_cpu`.
        steps: steps of one visit on a GPU; `steps_on_cpu` on a CPU.
    """

    script: str
    architecture: str
    image_size: int
    batch_size: int
    on_cpu: int
    steps: int
    steps_on_cpu: int
    num_images: int = 0
    nce_k: int = 0
    nce_t: float = 0.1

    @property
    def is_imagenet(self) -> bool:
        return self.image_size == 224


TASKS = {
    "pretrain-cifar": Task("unsupervised/cifar.py", "wrn-28-2", 32, 128, 128, 60, 10, 50_000),
    "finetune-cifar": Task("cifar-semi.py", "wrn-28-2", 32, 128, 128, 60, 10),
    "pretrain-imagenet": Task(
        "unsupervised/imagenet.py",
        "resnet18",
        224,
        256,
        32,
        10,
        2,
        num_images=1_281_167,
        nce_k=4096,
        nce_t=0.07,
    ),
    "finetune-imagenet": Task("imagenet-semi.py", "resnet50", 224, 256, 32, 10, 2),
}


def build_parser() -> argparse.ArgumentParser:
    parser = declared.parser(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="scripts")
    parser.add_argument(
        "--variants",
        "-v",
        nargs="+",
        choices=VARIANTS,
        default=[BASELINE, OURS, BARE],
        help="what to run",
    )
    parser.add_argument("--arch", default="", help="another network for all tasks")
    parser.add_argument(
        "-b",
        "--batch-size",
        type=declared.not_negative_int,
        default=0,
        help="0: as published, 32 for ImageNet on a CPU",
    )
    parser.add_argument(
        "--steps",
        type=declared.not_negative_int,
        default=0,
        help="steps of one visit; 0: chosen by the task",
    )
    parser.add_argument(
        "--rounds", type=declared.positive_int, default=5, help="visits of each variant, in turns"
    )
    parser.add_argument(
        "-j", "--num-workers", type=declared.num_workers, default=2, help="processes that read"
    )
    parser.add_argument("--output", default="", metavar="FILE", help="JSON file for the numbers")
    declared.add_options(parser, Compute)
    return parser


# ------------------------------------------------------------------ the published step, literally


class _Pictures(Dataset):
    """Small images, transformed one by one with Pillow."""

    def __init__(self, data: ImageSet, transform: Callable) -> None:
        self.pixels, self.targets = data.images.permute(0, 2, 3, 1).numpy(), data.targets.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.targets[index], index


class _Files(ImageFolder):
    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return *super().__getitem__(index), index


class _LinearAverage(torch.autograd.Function):
    """Similarities to all rows; backward updates the bank."""

    @staticmethod
    def forward(ctx, x, y, memory, temperature, momentum):
        ctx.save_for_backward(x, memory, y)
        ctx.numbers = temperature, momentum
        return torch.mm(x, memory.t()).div(temperature)

    @staticmethod
    def backward(ctx, grad):
        x, memory, y = ctx.saved_tensors
        temperature, momentum = ctx.numbers
        grad_x = torch.mm(grad.div(temperature), memory)
        _update(memory, x, y, momentum)
        return grad_x, None, None, None, None


class _NCEAverage(torch.autograd.Function):
    """Probabilities of drawn rows; backward gathers the rows once more."""

    @staticmethod
    def forward(ctx, x, y, memory, drawn, z, temperature, momentum):
        rows = memory.index_select(0, drawn.view(-1)).view(*drawn.shape, -1)
        out = torch.bmm(rows, x.unsqueeze(2)).squeeze(2).div(temperature).exp()
        if z[0] < 0:
            z[0] = out.mean() * len(memory)
        out = out / z
        ctx.save_for_backward(x, memory, y, drawn, out)
        ctx.numbers = temperature, momentum
        return out

    @staticmethod
    def backward(ctx, grad):
        x, memory, y, drawn, out = ctx.saved_tensors
        temperature, momentum = ctx.numbers
        rows = memory.index_select(0, drawn.view(-1)).view(*drawn.shape, -1)
        grad_x = torch.bmm((grad * out).div(temperature).unsqueeze(1), rows).squeeze(1)
        _update(memory, x, y, momentum)
        return grad_x, None, None, None, None, None, None


def _update(memory: Tensor, x: Tensor, y: Tensor, momentum: float) -> None:
    mixed = memory.index_select(0, y) * momentum + x * (1 - momentum)
    memory.index_copy_(0, y, mixed / mixed.pow(2).sum(1, keepdim=True).pow(0.5))


def _draw(prob: Tensor, alias: Tensor, count: int) -> Tensor:
    """Draw `count` numbers by the alias method, here with equal probabilities."""
    place = torch.randint(len(prob), (count,), device=prob.device)
    keep = torch.bernoulli(prob[place]).long()
    return place * keep + alias[place] * (1 - keep)


def _published_loss(task: Task, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    n, dim = task.num_images, 128
    memory = (
        torch.rand(n, dim, device=device).mul_(2 / (dim / 3) ** 0.5).add_(-1 / (dim / 3) ** 0.5)
    )
    if not task.nce_k:
        criterion = nn.CrossEntropyLoss()
        return lambda x, y: criterion(_LinearAverage.apply(x, y, memory, task.nce_t, 0.5), y)
    z = torch.tensor([-1.0], device=device)
    prob = torch.ones(n, device=device)
    alias = torch.zeros(n, dtype=torch.int64, device=device)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        drawn = _draw(prob, alias, len(x) * (task.nce_k + 1)).view(len(x), -1)
        drawn[:, 0] = y
        p = _NCEAverage.apply(x, y, memory, drawn, z, task.nce_t, 0.5)
        noise = task.nce_k / n
        positive = (p[:, 0] / (p[:, 0] + noise + 1e-7)).log().sum()
        negative = (noise / (p[:, 1:] + noise + 1e-7)).log().sum()
        return -(positive + negative) / len(x)

    return loss


def _classic_transform(task: Task) -> transforms.Compose:
    if task.is_imagenet:
        return benchmark_input.published_training() if task.num_images else _classic_finetuning()
    normalize = [transforms.ToTensor(), transforms.Normalize(*CIFAR10_STATS)]
    chain = [transforms.RandomCrop(32, padding=4, padding_mode="reflect")]
    if task.num_images:
        chain = [
            transforms.RandomResizedCrop(32, scale=(0.2, 1.0)),
            transforms.ColorJitter(0.4, 0.4, 0.4, 0.4),
            transforms.RandomGrayscale(0.2),
        ]
    return transforms.Compose([*chain, transforms.RandomHorizontalFlip(), *normalize])


def _classic_finetuning() -> transforms.Compose:
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(*IMAGENET_STATS),
        ]
    )


def literal(task: Task, folder: Path, args: argparse.Namespace, device: Device) -> Advance:
    """Build the published loop: float32, one image at a time, a wait and six scalars at every step."""
    transform = _classic_transform(task)
    data = _Files(folder / "train", transform) if task.is_imagenet else None
    loader = DataLoader(
        data or _Pictures(random_images(32), transform),
        batch_size=args.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.num_workers,
        persistent_workers=args.num_workers > 0,
        pin_memory=device.torch_device.type == "cuda",
    )
    items = itertools.chain.from_iterable(loader for _ in itertools.count())
    outputs = 128 if task.num_images else NUM_CLASSES[task.image_size]
    net = build_model(
        task.architecture,
        outputs,
        normalize=bool(task.num_images),
        imagenet=task.is_imagenet,
    ).to(device.torch_device)
    nesterov = not task.is_imagenet
    sgd = torch.optim.SGD(net.parameters(), 0.01, 0.9, weight_decay=5e-4, nesterov=nesterov)
    supervised = nn.CrossEntropyLoss()
    contrastive = _published_loss(task, device.torch_device) if task.num_images else None
    writer, counter = SummaryWriter(tempfile.mkdtemp(dir=folder)), itertools.count()
    Finalize(None, writer.close, exitpriority=100)  # the writer's thread must end before its queue
    net.train()
    if device.torch_device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # a fair baseline needs the fastest convolutions

    def advance(steps: int) -> None:
        end = time.time()
        for step, (images, targets, indexes) in zip(
            itertools.islice(counter, steps), items, strict=False
        ):
            waited = time.time() - end
            images, targets = images.to(device.torch_device), targets.to(device.torch_device)
            indexes = indexes.to(device.torch_device)
            out = net(images)
            loss = contrastive(out, indexes) if contrastive else supervised(out, targets)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            scalars = {"loss": loss.item(), "lr": 0.01, "waited": waited}
            if contrastive:
                scalars |= {"epoch": 0, "images_per_s": len(out) / (time.time() - end)}
            else:
                ranked = out.topk(5, dim=1).indices.eq(targets[:, None])
                scalars["top1"] = ranked[:, :1].float().sum().item() / len(out)
                scalars["top5"] = ranked.float().sum().item() / len(out)
            scalars["seconds"] = time.time() - end
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)
            end = time.time()

    return advance


# ------------------------------------------------------------------------------------------- ours


def random_images(size: int) -> ImageSet:
    """Return as many random images as CIFAR-10 has; the speed does not depend on their bytes."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50_000, 3, size, size), dtype=torch.uint8, generator=rng)
    targets = torch.randint(NUM_CLASSES[size], (len(images),), generator=rng)
    names = tuple(f"class{i}" for i in range(NUM_CLASSES[size]))
    return ImageSet("random", images, targets, names, CIFAR10_STATS)


def training_data(task: Task, folder: Path, args: argparse.Namespace) -> DataSet:
    if not task.is_imagenet:
        return random_images(task.image_size)
    train, _ = build_datasets(
        "folder",
        str(folder),
        image_size=task.image_size,
        num_workers=args.num_workers,
        in_memory=False,
    )
    return train


def augmentation_of(task: Task, data: DataSet) -> Augmentation:
    if task.num_images:
        ops = instance_ops(gray_first=task.is_imagenet)
    elif task.is_imagenet:
        ops = [RandomResizedCrop(0.08), RandomHorizontalFlip()]
    else:
        ops = finetune_ops()
    return Augmentation(ops, data.stats)


def _classifier(task: Task, device: Device) -> nn.Module:
    classes = NUM_CLASSES[task.image_size]
    return device.prepare(build_model(task.architecture, classes, imagenet=task.is_imagenet))


def _metric(task: Task, device: Device) -> tuple[nn.Module, InstanceDiscrimination]:
    model = build_model(task.architecture, 128, normalize=True, imagenet=task.is_imagenet)
    loss = build_loss(task.nce_k, task.nce_t, z_momentum=0.99, bf16=device.bf16)
    objective = InstanceDiscrimination(MemoryBank(task.num_images, 128), loss)
    return device.prepare(model), objective.to(device.torch_device)


def ours(
    task: Task,
    folder: Path,
    args: argparse.Namespace,
    device: Device,
    *,
    compiled: bool = False,
    graph: str = "auto",
) -> Advance:
    """Build the script's own loop, with its meters and its line every few steps."""
    data = training_data(task, folder, args)
    batches = Batches(
        data,
        augmentation_of(task, data),
        device,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
    )
    if task.num_images:
        model, objective = _metric(task, device)
        endless = itertools.chain.from_iterable(map(batches.epoch, itertools.count()))
    else:
        model = _classifier(task, device)
        objective = Classification(data.targets, torch.ones(len(data))).to(device.torch_device)
        endless = batches.repeat(torch.arange(len(data)), 0, 10**6)
    optimizer = sgd(model.parameters(), 0.01, 5e-4)
    captured = step_graph(graph, batches)
    steps = train_steps(model, objective, optimizer, endless, _constant, device, graph=captured)
    if compiled:
        model.compile(mode=profiling.COMPILE_MODES[0], dynamic=False)
    return partial(_advance, steps, AverageMeter(), Throughput(lambda: batches.waited_s))


def _constant(_: int) -> float:
    return 0.01


def _advance(steps: Iterator[Step], loss: AverageMeter, clock: Throughput, number: int) -> None:
    for step in itertools.islice(steps, number):
        loss.update(step.loss, step.batch_size)
        clock.count(step.batch_size)
        if step.number % PRINT_EVERY == 0:
            _ = f"{loss.value:.4f} {clock.lap()}"


def bare(task: Task, folder: Path, args: argparse.Namespace, device: Device) -> Advance:
    """Build a loop that only computes: nothing is read, augmented, counted or stored."""
    images = torch.randn(args.batch_size, 3, task.image_size, task.image_size)
    images = images.to(device.torch_device, memory_format=torch.channels_last)
    indexes = torch.arange(args.batch_size, device=device.torch_device)
    if task.num_images:
        model, objective = _metric(task, device)

        def loss(v: Tensor) -> Tensor:
            drawn = map(device.to_device, objective.draw(len(v), 0))
            return objective.loss(v, indexes, objective.bank.memory, *drawn)

    else:
        model = _classifier(task, device)
        loss = lambda z: F.cross_entropy(z.float(), indexes % z.shape[1])  # noqa: E731
    optimizer = sgd(model.parameters(), 0.01, 5e-4)
    model.train()

    def advance(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            with device.autocast():
                outputs = model(images)
            loss(outputs).backward()
            optimizer.step()

    return advance


VARIANTS = {
    BASELINE: literal,
    OURS: ours,
    "eager": partial(ours, graph="off"),
    "compiled": partial(ours, compiled=True),
    BARE: bare,
}


# ---------------------------------------------------------------------------------- taking turns


def _worker(variant: str, task: Task, folder: Path, args: argparse.Namespace, pipe) -> None:
    """Train as many steps as the pipe asks for and send the seconds; at the end send peak memory in MiB."""
    torch.manual_seed(0)
    device = devices.select(args.gpus, args.precision)
    advance = VARIANTS[variant](task, folder, args, device)
    while steps := _order(pipe):
        start = time.perf_counter()
        advance(steps)
        device.synchronize()
        pipe.send(time.perf_counter() - start)
    peaks = {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if device.torch_device.type == "cuda":
        peaks["device"] = torch.cuda.max_memory_allocated(device.torch_device) / 2**20
    with contextlib.suppress(BrokenPipeError):  # the parent is gone if another process failed
        pipe.send(peaks)


def _order(pipe: multiprocessing.connection.Connection) -> int | None:
    with contextlib.suppress(EOFError):
        return pipe.recv()
    return None


@dataclass
class Runner:
    """A process that trains one variant."""

    process: multiprocessing.Process
    pipe: multiprocessing.connection.Connection

    def ask(self, what: int | None) -> float | dict[str, float]:
        try:
            self.pipe.send(what)
            return self.pipe.recv()
        except (EOFError, OSError):
            raise ValueError(
                f"the process of {self.process.name} ended; its error is printed above"
            ) from None


def start_runners(task: Task, folder: Path, args: argparse.Namespace) -> dict[str, Runner]:
    context, runners = multiprocessing.get_context("spawn"), {}
    for variant in args.variants:
        here, there = context.Pipe()
        process = context.Process(
            target=_worker, args=(variant, task, folder, args, there), name=variant
        )
        process.start()
        there.close()
        runners[variant] = Runner(process, here)
    return runners


def measure(task: Task, folder: Path, args: argparse.Namespace, device: Device, bar: tqdm) -> dict:
    """Measure images/s of each variant by round, and its peak memory."""
    on_cpu = device.torch_device.type == "cpu"
    args = argparse.Namespace(**vars(args))
    args.batch_size = args.batch_size or (task.on_cpu if on_cpu else task.batch_size)
    steps = args.steps or (task.steps_on_cpu if on_cpu else task.steps)
    runners = start_runners(task, folder, args)
    speeds: dict[str, list[float]] = {variant: [] for variant in runners}
    try:
        for runner in runners.values():
            # the first steps allocate memory, choose algorithms, compile kernels and capture a graph
            runner.ask(2 if on_cpu else WARM_UP + 2)
        for _ in range(args.rounds):
            for variant, runner in runners.items():
                speeds[variant].append(steps * args.batch_size / runner.ask(steps))
                bar.update()
        peaks = {variant: runner.ask(None) for variant, runner in runners.items()}
    finally:
        for runner in runners.values():
            runner.pipe.close()  # ends a process that still waits for orders
            runner.process.join(LAST_WORDS_S)
            runner.process.terminate()
            runner.process.join()
    return {
        "batch_size": args.batch_size,
        "steps": steps,
        "images_per_s": speeds,
        "peak_mib": peaks,
    }


def ratio(found: dict, variant: str, over: str) -> tuple[float, float, float]:
    """Return the median, smallest and largest ratio over the rounds."""
    pairs = zip(found["images_per_s"][variant], found["images_per_s"][over], strict=True)
    ratios = [one / other for one, other in pairs]
    return statistics.median(ratios), min(ratios), max(ratios)


def with_share(task: Task, found: dict, rate: float, device: Device) -> dict:
    """Add the network's operations per image, and the MFU of each variant.

    `rate` is measured in our format, bfloat16 on new hardware, also for the literal step in float32.
    """
    if task.num_images:
        model, objective = _metric(task, device)
        more = objective.flops_per_image()
    else:
        model, more = _classifier(task, device), 0.0
    per_image = more + profiling.training_flops(model, (3, task.image_size, task.image_size))
    shares = {
        variant: statistics.median(speeds) * per_image / rate
        for variant, speeds in found["images_per_s"].items()
    }
    return found | {"flops_per_image": per_image, "mfu": shares}


def table(results: dict[str, dict], variants: list[str]) -> str:
    """Format the results in Markdown, one row for each task and variant."""
    lines = [
        "| task | variant | images/s | against literal | against bare | MFU | peak MiB |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, found in results.items():
        for variant in variants:
            cells = [name, variant, f"{statistics.median(found['images_per_s'][variant]):.0f}"]
            for other in (BASELINE, BARE):
                cells.append("")
                if other in variants and variant != other:
                    median, least, largest = ratio(found, variant, other)
                    cells[-1] = f"{median:.2f} ({least:.2f}, {largest:.2f})"
            cells.append(f"{100 * found['mfu'][variant]:.0f}%")
            cells.append(" / ".join(f"{peak:.0f}" for peak in found["peak_mib"][variant].values()))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    device = devices.select(args.gpus, args.precision)
    rate = profiling.matrix_rate(device)
    print(f"{device}; matrix rate {rate / 1e9:.0f} GFLOP/s")
    tasks = {name: TASKS[name] for name in args.tasks}
    if args.arch:
        tasks = {name: replace(task, architecture=args.arch) for name, task in tasks.items()}
    results = {}
    total = len(tasks) * len(args.variants) * args.rounds
    with tempfile.TemporaryDirectory() as made, tqdm(total=total, unit="visit") as bar:
        if any(task.is_imagenet for task in tasks.values()):
            benchmark_input.make_photographs(Path(made), PHOTOGRAPHS)
        for name, task in tasks.items():
            bar.set_description(name)
            found = measure(task, Path(made), args, device, bar)
            results[name] = with_share(task, found, rate, device)
            if (
                args.output
            ):  # written after each task, so that an interrupted run leaves its numbers
                record = {"device": str(device), "matrix_rate": rate, "tasks": results}
                record["meta"] = provenance.record(vars(args))
                Path(args.output).write_text(json.dumps(record, indent=1) + "\n")
    print(table(results, args.variants))


if __name__ == "__main__":
    start.run(main, build_parser())
