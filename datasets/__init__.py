"""Data sets by name. `build_datasets` is the only entry the rest of the project uses."""

from dataclasses import replace
from pathlib import Path

from datasets.cifar import CIFAR, load_cifar
from datasets.dummy import TEST, TRAIN, load_dummy
from datasets.files import FileSet
from datasets.folder import load_folder
from datasets.images import UNKNOWN, DataSet, ImageSet
from datasets.patches import load_patches
from datasets.resizing import Resizing

__all__ = ["DATASETS", "UNKNOWN", "DataSet", "FileSet", "ImageSet", "build_datasets"]

DATASETS = (*CIFAR, "patches", "folder")  # choices of --dataset; `dummy` is for measuring only


def _resized(images: ImageSet, image_size: int) -> ImageSet:
    if images.image_size == image_size:
        return images
    resize = Resizing(image_size, squash=True)
    return replace(images, images=resize(images.images, image_size))


def build_datasets(
    name: str,
    data_dir: str | Path,
    *,
    image_size: int = 32,
    num_workers: int = 2,
    in_memory: bool = True,
) -> tuple[DataSet, DataSet | None]:
    """Build the training set and the test set of a data set.

    Args:
        name: one of `DATASETS`, or `dummy` for random images.
        data_dir: folder that holds the data or receives the download; `patches` and `dummy` ignore it.
        image_size: side of the square images in pixels.
        num_workers: processes that decode image files (only for a `folder` in memory).
        in_memory: False leaves the images of a `folder` in their files, as a `FileSet`.

    Returns:
        The training set, and the test set or None if a folder has no test images.

    Raises:
        ValueError: if the name is unknown, or data is missing or unreadable.
    """
    if name not in (*DATASETS, "dummy"):
        raise ValueError(f"unknown data set {name!r}: take one of {', '.join(DATASETS)}")
    if image_size < 8:
        raise ValueError(f"image size {image_size}: must be at least 8 pixels")
    if name == "folder":
        return load_folder(Path(data_dir), image_size, num_workers, in_memory)
    if name == "dummy":
        return load_dummy(TRAIN, image_size, seed=0), load_dummy(TEST, image_size, seed=1)
    if name == "patches":
        pair = load_patches(train=True), load_patches(train=False)
    else:
        pair = load_cifar(name, Path(data_dir), True), load_cifar(name, Path(data_dir), False)
    return _resized(pair[0], image_size), _resized(pair[1], image_size)
