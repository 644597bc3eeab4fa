"""Data sets by name. `build_datasets` is the only entry the rest of the project uses."""

from dataclasses import replace
from pathlib import Path

from torchvision.transforms.v2 import functional

from datasets.cifar import CIFAR, load_cifar
from datasets.dummy import TEST, TRAIN, load_dummy
from datasets.files import FileSet
from datasets.folder import load_folder
from datasets.images import UNKNOWN, ImageSet
from datasets.patches import load_patches

__all__ = ["DATASETS", "UNKNOWN", "DataSet", "FileSet", "ImageSet", "build_datasets"]

DataSet = ImageSet | FileSet
DATASETS = (*CIFAR, "patches", "folder")  # what --dataset takes; `dummy` is for measuring only


def _resized(images: ImageSet, image_size: int) -> ImageSet:
    if images.image_size == image_size:
        return images
    size = [image_size, image_size]
    return replace(images, images=functional.resize(images.images, size, antialias=True))


def build_datasets(
    name: str,
    data_dir: str | Path,
    *,
    image_size: int = 32,
    num_workers: int = 2,
    in_memory: bool = True,
) -> tuple[DataSet, DataSet | None]:
    """The training and the test images of a data set.

    Args:
        name: one of `DATASETS`, or `dummy`: random images, nothing is read.
        data_dir: where it lies, or is downloaded to; not used by `patches` and `dummy`.
        image_size: side of the square images in pixels.
        num_workers: processes that decode image files (`folder` in memory only).
        in_memory: False leaves the images of a `folder` in their files, as a `FileSet`.

    Returns:
        Training set and test set; the latter is None where a folder has no test images.

    Raises:
        ValueError: for an unknown name, missing or unreadable data.
    """
    if name not in (*DATASETS, "dummy"):
        raise ValueError(f"unknown data set {name!r}: take one of {', '.join(DATASETS)}")
    if image_size < 8:
        raise ValueError(f"image size {image_size}: it must be 8 pixels at least")
    if name == "folder":
        return load_folder(Path(data_dir), image_size, num_workers, in_memory)
    if name == "dummy":
        return load_dummy(TRAIN, image_size, seed=0), load_dummy(TEST, image_size, seed=1)
    if name == "patches":
        pair = load_patches(train=True), load_patches(train=False)
    else:
        pair = load_cifar(name, Path(data_dir), True), load_cifar(name, Path(data_dir), False)
    return _resized(pair[0], image_size), _resized(pair[1], image_size)
