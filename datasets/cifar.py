"""CIFAR-10 and CIFAR-100, downloaded and checked by torchvision."""

from pathlib import Path

import torch
from torchvision.datasets import CIFAR10, CIFAR100

from datasets.images import CIFAR10_STATS, CIFAR100_STATS, ImageSet

CIFAR = {"cifar10": (CIFAR10, CIFAR10_STATS), "cifar100": (CIFAR100, CIFAR100_STATS)}


def load_cifar(name: str, data_dir: Path, train: bool) -> ImageSet:
    """Read `cifar10` or `cifar100` below `data_dir`, and download it the first time.

    Raises:
        ValueError: if it is neither there nor can be downloaded.
    """
    family, stats = CIFAR[name]
    try:
        raw = family(str(data_dir), train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{name} is not in {data_dir.resolve()}, or is damaged there, and could not be downloaded "
            f"({error}). Put the unpacked folder {family.base_folder} there, or take --dataset patches, "
            "which needs no download, or --dataset folder for images of your own"
        ) from error
    images = torch.from_numpy(raw.data).permute(0, 3, 1, 2).contiguous()
    return ImageSet(name, images, torch.tensor(raw.targets), tuple(raw.classes), stats)
