"""Benchmark of our input pipeline in images per second and core, against torchvision's in the same run.

    python scripts/benchmarks/input.py                     # photographs that ship inside scikit-image
    python scripts/benchmarks/input.py --data-dir DIR      # DIR/train/<class>/*

The baseline is torchvision.datasets.ImageFolder with the published transforms on Pillow images, in a
DataLoader with as many processes. Both sides work in one thread, in turns. Without workers, seconds are CPU
time, so that other programs on the machine matter little. Ratios are medians over the rounds. The pixels of
both sides are compared for the same random numbers.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import skimage.data
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional
from tqdm import tqdm

from datasets import FileSet, build_datasets
from datasets.images import IMAGENET_STATS
from datasets.transforms import Augmentation, RandomResizedCrop, instance_ops
from lib.cli import declared, start
from lib.files import provenance
from lib.loading.batches import Batches, in_order
from lib.runtime import devices
from lib.runtime.devices import Device
from lib.runtime.seeding import generator

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "retina", "rocket")
SHAPES = ((500, 375), (375, 500))  # width and height of a typical ImageNet photograph
QUALITY = 96  # JPEG quality that gives about as many bytes per pixel as ImageNet's files

Pass = Callable[[], Iterable]  # function that goes once over the images, in batches
RESIZED, SHOWN = 256, 224


def build_parser() -> argparse.ArgumentParser:
    parser = declared.parser(__doc__)
    parser.add_argument(
        "--data-dir", default="", metavar="DIR", help="photographs, DIR/train/<class>/*"
    )
    parser.add_argument(
        "--images",
        type=declared.positive_int,
        default=300,
        help="photographs to make without --data-dir",
    )
    parser.add_argument(
        "-b", "--batch-size", type=declared.batch_size, default=64, help="images at a time"
    )
    parser.add_argument(
        "-j",
        "--num-workers",
        type=declared.num_workers,
        default=0,
        help="processes on either side",
    )
    parser.add_argument(
        "--rounds",
        type=declared.positive_int,
        default=5,
        help="passes of each side, taken in turns",
    )
    parser.add_argument("--output", default="", metavar="FILE", help="JSON file for the numbers")
    return parser


def make_photographs(folder: Path, count: int) -> None:
    """Write `count` JPEG files of 500 x 375 pixels: crops of photographs, in landscape and portrait."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(getattr(skimage.data, name)()) for name in PHOTOGRAPHS]
    for i in range(count):
        name, picture = PHOTOGRAPHS[i % len(pictures)], pictures[i % len(pictures)]
        width, height = SHAPES[i // len(pictures) % 2]
        zoom = rng.uniform(0.6, 1) * min(picture.width / width, picture.height / height)
        left = rng.uniform(0, picture.width - width * zoom)
        top = rng.uniform(0, picture.height - height * zoom)
        box = (left, top, left + width * zoom, top + height * zoom)
        path = folder / "train" / name / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.resize((width, height), Image.Resampling.BICUBIC, box).save(path, quality=QUALITY)


def published_training() -> transforms.Compose:
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SHOWN, scale=(0.2, 1.0)),
            transforms.RandomGrayscale(p=0.2),
            transforms.ColorJitter(0.4, 0.4, 0.4, 0.4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(*IMAGENET_STATS),
        ]
    )


def published_evaluation() -> transforms.Compose:
    return transforms.Compose(
        [
            transforms.Resize(RESIZED),
            transforms.CenterCrop(SHOWN),
            transforms.ToTensor(),
            transforms.Normalize(*IMAGENET_STATS),
        ]
    )


def passes(folder: Path, data: FileSet, args: argparse.Namespace, device: Device) -> dict:
    """Return both sides of each comparison, as functions that go once over the images."""
    common = {"batch_size": args.batch_size, "num_workers": args.num_workers}
    theirs = {
        name: DataLoader(
            ImageFolder(folder / "train", transform),
            shuffle=name == "training",
            persistent_workers=args.num_workers > 0,
            **common,
        )
        for name, transform in [
            ("training", published_training()),
            ("evaluation", published_evaluation()),
        ]
    }
    whole = Augmentation(instance_ops(), data.stats)
    crop = Augmentation(whole.ops[:1], data.stats)
    training, cropping = (Batches(data, a, device, **common) for a in (whole, crop))
    plain = Augmentation((), data.stats)
    return {
        "training": (lambda: theirs["training"], lambda: training.epoch(0)),
        # the part of the CPU when a GPU does the colors
        "training, colors on a GPU": (lambda: theirs["training"], lambda: cropping.epoch(0)),
        "evaluation": (
            lambda: theirs["evaluation"],
            lambda: in_order(data, plain, device, **common),
        ),
    }


def images_per_second(once: Pass, count: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in once():
        pass
    return count / (clock() - start)


def measure(pair: tuple[Pass, Pass], count: int, args: argparse.Namespace, name: str) -> dict:
    """Measure both sides in turns; return the medians of images per second and of their ratio."""
    clock = time.perf_counter if args.num_workers else time.process_time
    for once in pair:  # warm-up: the first pass starts workers and fills caches
        images_per_second(once, count, clock)
    rates = [
        [images_per_second(once, count, clock) for once in pair]
        for _ in tqdm(range(args.rounds), desc=name, leave=False, disable=None)
    ]
    theirs, ours = zip(*rates, strict=True)
    ratios = [b / a for a, b in rates]
    return {
        "torchvision": statistics.median(theirs),
        "ours": statistics.median(ours),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def _crop(path: Path, params: list[float]) -> Image.Image:
    with Image.open(path) as file:
        image = file.convert("RGB")
    top, left, height, width = RandomResizedCrop.box(params, image.size[::-1])
    return functional.resized_crop(image, top, left, height, width, [SHOWN, SHOWN])


def _colors(
    image: Image.Image | torch.Tensor, params: list[list[float]]
) -> Image.Image | torch.Tensor:
    """Apply torchvision's operations to a crop, with the parameters of ours."""
    jitter, gray, flip = params
    adjust = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    )
    for k in map(int, jitter[4:]):
        image = adjust[k](image, jitter[k])
    image = functional.rgb_to_grayscale(image, 3) if gray[0] < 0.2 else image
    return functional.hflip(image) if flip[0] < 0.5 else image


def compare_pixels(data: FileSet, device: Device, count: int = 32) -> dict[str, dict[str, float]]:
    """Measure differences of one batch for the same random numbers, in steps of 1/255.

    Pillow rounds down to whole bytes after every operation, and to 256 hues; torchvision's operations on
    float tensors, applied to the same crop, do not.
    """
    count, ops, ones = min(count, len(data)), instance_ops(), ((0.0,) * 3, (1.0,) * 3)
    whole, cropping = (Augmentation(chosen, ones) for chosen in (ops, ops[:1]))
    batch, crops = (
        next(Batches(data, a, device, batch_size=count).epoch(0)) for a in (whole, cropping)
    )
    drawn = whole.sample_params(count, generator(0, "augmentation", 0))
    found: dict[str, list[torch.Tensor]] = {}
    for k, index in enumerate(batch.indexes.tolist()):
        crop, *params = (values[k].tolist() for values in drawn)
        image, ours = _crop(data.root / data.paths[index], crop), batch.images[k]
        floats = _colors(crops.images[k], params)
        found.setdefault("crop", []).append(crops.images[k] - functional.to_tensor(image))
        found.setdefault("colors", []).append(ours - functional.to_tensor(_colors(image, params)))
        found.setdefault("colors in floats", []).append(ours - floats)
    shown = next(in_order(data, Augmentation((), ones), device, batch_size=count))
    central = transforms.Compose(published_evaluation().transforms[:3])
    for image, path in zip(shown.images, data.paths, strict=False):
        with Image.open(data.root / path) as file:
            found.setdefault("evaluation", []).append(image - central(file.convert("RGB")))
    return {name: _summary(255 * torch.stack(values)) for name, values in found.items()}


def _summary(difference: torch.Tensor) -> dict[str, float]:
    size = difference.abs()
    return {"mean": size.mean().item(), "max": size.max().item(), "bias": difference.mean().item()}


def benchmark(folder: Path, args: argparse.Namespace) -> dict:
    device = devices.select("cpu")
    data, _ = build_datasets("folder", folder, image_size=SHOWN, in_memory=False)
    known = len(ImageFolder(folder / "train"))
    if known != len(data):
        raise ValueError(f"{folder}: give a folder without unlabeled/ and labels.csv to compare on")
    unit = "of wall clock" if args.num_workers else "of one core"
    print(f"{len(data)} photographs, {args.num_workers} workers; images per second {unit}:")
    found = {}
    for name, pair in passes(folder, data, args, device).items():
        one = found[name] = measure(pair, len(data), args, name)
        print(
            f"{name:27s} torchvision {one['torchvision']:7.1f}   ours {one['ours']:7.1f}   ratio "
            f"{one['ratio']:.2f} ({one['ratio_min']:.2f} to {one['ratio_max']:.2f})"
        )
    pixels = compare_pixels(data, device)
    for name, one in pixels.items():
        print(
            f"pixels, {name:20s} ours - torchvision, in steps of 255: mean {one['bias']:+.3f}, absolute "
            f"{one['mean']:.3f}, at most {one['max']:.2f}"
        )
    return {"photographs": len(data), "speed": found, "pixels": pixels}


def main(args: argparse.Namespace) -> dict:
    torch.set_num_threads(1)
    if args.data_dir:
        found = benchmark(Path(args.data_dir), args)
    else:
        with tempfile.TemporaryDirectory() as folder:
            make_photographs(Path(folder), args.images)
            found = benchmark(Path(folder), args)
    if args.output:
        record = found | {"meta": provenance.record(vars(args))}
        Path(args.output).write_text(json.dumps(record, indent=1))
    return found


if __name__ == "__main__":
    start.run(main, build_parser())
