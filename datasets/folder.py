"""The user's own images: one folder per class, and optionally a folder without labels.

DIR/train/<class>/*          labelled training images
DIR/unlabeled/**             training images without a label, at any depth (optional)
DIR/test/<class>/*           or DIR/val/<class>/*: images to measure on (optional)
"""

import hashlib
import io
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import functional
from tqdm import tqdm

from datasets.images import IMAGENET_STATS, UNKNOWN, ImageSet

MEMORY_LIMIT = 8 * 2**30  # bytes of decoded images; more belongs to the ImageNet scripts
NO_IMAGES = ("Thumbs.db", "desktop.ini")  # what operating systems leave in folders of images
FEW_FILES = 2000  # below this, starting worker processes costs more than it saves


def _as_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB. Pillow's own conversion cuts deeper pixels off at 255: the picture would be white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no known range; save it with 8 or 16 bits")
    return image.convert("RGB")


def decode(data: bytes, image_size: int) -> np.ndarray:
    """One image file as 3 x S x S bytes: upright, RGB, shorter side resized to S, centre cropped."""
    with Image.open(io.BytesIO(data)) as file:
        image = _as_rgb(ImageOps.exif_transpose(file))
    if image.size != (image_size, image_size):
        image = functional.center_crop(functional.resize(image, image_size), image_size)
    return np.asarray(image).transpose(2, 0, 1).copy()


class _Decoder(Dataset):
    """Decodes one file an item; what cannot be read comes back as its message, never as an image."""

    def __init__(self, paths: list[str], image_size: int) -> None:
        self.paths, self.image_size = paths, image_size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray | str, bytes]:
        """Place in `paths`, the image or what is wrong with it, and the digest of the file."""
        try:
            data = Path(self.paths[index]).read_bytes()
            return index, decode(data, self.image_size), hashlib.sha256(data).digest()
        except Exception as error:  # whatever a broken file makes a decoder raise is reported
            return index, str(error) or type(error).__name__, b""


def _as_list(items: list) -> list:
    return items


def read_images(paths: list[str], image_size: int, num_workers: int) -> tuple[torch.Tensor, str]:
    """Decode files into N x 3 x S x S bytes, in the order of `paths`.

    Returns:
        The images, and a digest of the files' contents.

    Raises:
        ValueError: naming every unreadable file (the first ten), or when the set would not fit.
    """
    needed = len(paths) * 3 * image_size**2
    if needed > MEMORY_LIMIT:
        raise ValueError(
            f"{len(paths)} images at {image_size}x{image_size} need {needed / 2**30:.1f} GiB of memory;"
            " take a smaller --image-size"
        )
    images = torch.empty(len(paths), 3, image_size, image_size, dtype=torch.uint8)
    loader = DataLoader(
        _Decoder(paths, image_size),
        batch_size=64,
        num_workers=num_workers if len(paths) >= FEW_FILES else 0,
        collate_fn=_as_list,
    )
    problems, contents = [], [b""] * len(paths)
    with tqdm(
        total=len(paths), desc="reading images", unit="img", leave=False, disable=None
    ) as bar:
        for batch in loader:
            for index, image, contents[index] in batch:
                if isinstance(image, str):
                    problems.append(f"  {paths[index]}: {image}")
                else:
                    images[index] = torch.from_numpy(image)
            bar.update(len(batch))
    if problems:
        listed = "\n".join(problems[:10])
        raise ValueError(
            f"{len(problems)} of {len(paths)} images cannot be read; repair or remove them:\n{listed}"
        )
    return images, hashlib.sha256(b"".join(contents)).hexdigest()


def _image_files(folder: Path) -> list[str]:
    """Every image below `folder`, in an order that does not depend on the file system.

    Warns:
        UserWarning: about files that are passed over, because they have another extension.
    """
    found, others = [], []
    for parent, _, files in os.walk(folder, followlinks=True):
        for name in files:
            if name.lower().endswith(IMG_EXTENSIONS):
                found.append(os.path.join(parent, name))
            elif not name.startswith(".") and name not in NO_IMAGES:
                others.append(os.path.join(parent, name))
    if others:
        warnings.warn(
            f"{len(others)} files in {folder} are no images by their extension and are not used, "
            f"such as {min(others)}; known are {', '.join(IMG_EXTENSIONS)}",
            stacklevel=2,
        )
    return sorted(found)


def class_names(folder: Path) -> tuple[str, ...]:
    """Names of the class folders in `folder`, sorted: their place is the class number.

    Raises:
        ValueError: if the folder is missing or holds no class folder.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder} does not exist: --dataset folder needs --data-dir DIR with DIR/train/<class>/*"
        )
    names = sorted(f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    if not names:
        raise ValueError(f"{folder} holds no class folder: it needs one folder of images per class")
    return tuple(names)


def _labelled_files(folder: Path, classes: tuple[str, ...]) -> tuple[list[str], list[int]]:
    paths: list[str] = []
    targets: list[int] = []
    for name in class_names(folder):
        if name not in classes:
            raise ValueError(f"class {name!r} is in {folder} but not in the training folder")
        files = _image_files(folder / name)
        if not files:
            raise ValueError(
                f"class folder {folder / name} holds no image ({', '.join(IMG_EXTENSIONS)}); "
                "put images in or remove it"
            )
        paths += files
        targets += [classes.index(name)] * len(files)
    return paths, targets


def _image_set(root: Path, paths: list[str], targets: list[int], **keywords: Any) -> ImageSet:
    images, contents = read_images(paths, keywords["image_size"], keywords["num_workers"])
    relative = tuple(Path(p).relative_to(root).as_posix() for p in paths)
    labels = torch.tensor(targets, dtype=torch.int64)
    return ImageSet(
        "folder", images, labels, keywords["classes"], IMAGENET_STATS, relative, contents
    )


def load_folder(root: Path, image_size: int, num_workers: int) -> tuple[ImageSet, ImageSet | None]:
    """The training images (labelled ones first, then those of `unlabeled/`) and the test images.

    Returns:
        The training set and the test set; None where there is neither `test/` nor `val/`.

    Raises:
        ValueError: for a missing or empty folder, a class without images, a class that only the
            test folder has, or an unreadable image.
    """
    classes = class_names(root / "train")
    common = {"classes": classes, "image_size": image_size, "num_workers": num_workers}
    paths, targets = _labelled_files(root / "train", classes)
    unlabeled = _image_files(root / "unlabeled")
    if (root / "unlabeled").is_dir() and not unlabeled:
        raise ValueError(
            f"{root / 'unlabeled'} holds no image ({', '.join(IMG_EXTENSIONS)}); put images in or remove it"
        )
    tests = [root / name for name in ("test", "val") if (root / name).is_dir()]
    test_files = _labelled_files(tests[0], classes) if tests else None  # checked before decoding
    train = _image_set(root, paths + unlabeled, targets + [UNKNOWN] * len(unlabeled), **common)
    return train, None if test_files is None else _image_set(root, *test_files, **common)
