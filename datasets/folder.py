"""Images of the user (datasets/listing.py has the layout), decoded into memory or left in their files."""

import hashlib
import io
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datasets import decoded
from datasets.decoded import Decoded
from datasets.files import FileSet, as_rgb, surviving
from datasets.images import IMAGENET_STATS, ImageSet
from datasets.listing import Files, list_folder
from datasets.resizing import Resizing

MEMORY_LIMIT = 8 * 2**30  # bytes of decoded images; larger sets need the ImageNet scripts
FEW_FILES = 2000  # for fewer files, starting worker processes takes longer than it saves


def decode(data: bytes, image_size: int) -> np.ndarray:
    """Decode an image file into 3 x S x S bytes: upright, RGB, shorter side resized to S, center cropped."""
    with Image.open(io.BytesIO(data)) as file:
        image = as_rgb(ImageOps.exif_transpose(file))
    if image.size != (image_size, image_size):
        image = Resizing(image_size)(image, image_size)
    return np.asarray(image).transpose(2, 0, 1).copy()


class _Decoder(Dataset):
    """Decoder of one file for each item; a file that cannot be read gives a message in place of an image."""

    def __init__(self, paths: list[str], image_size: int) -> None:
        self.paths, self.image_size = paths, image_size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray | str, bytes]:
        """Return the place in `paths`, the image or the message, and the digest of the file."""
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
        ValueError: if files are unreadable, naming the first ten, or the images exceed `MEMORY_LIMIT`.
    """
    needed = len(paths) * 3 * image_size**2
    if needed > MEMORY_LIMIT:
        raise ValueError(
            f"{len(paths)} images at {image_size}x{image_size} need {needed / 2**30:.1f} GiB of memory;"
            " take a smaller --image-size, or unsupervised/imagenet.py and imagenet-semi.py, which leave the"
            " images in their files"
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
        for batch in surviving(loader):
            for index, image, contents[index] in batch:
                if isinstance(image, str):
                    problems.append(f"  image {index}, {paths[index]}: {image}")
                else:
                    images[index] = torch.from_numpy(image)
            bar.update(len(batch))
    if problems:
        listed = "\n".join(problems[:10])
        raise ValueError(
            f"{len(problems)} of {len(paths)} images cannot be read; repair or remove them:\n{listed}"
        )
    return images, hashlib.sha256(b"".join(contents)).hexdigest()


def read_or_load(paths: list[str], image_size: int, num_workers: int) -> Decoded:
    """Decode files as `read_images`, or load the copy that an earlier start left of the same files."""
    if len(paths) < FEW_FILES or len(paths) * 3 * image_size**2 > decoded.LARGEST:
        return Decoded(*read_images(paths, image_size, num_workers))
    key = decoded.key_of(paths, image_size)
    shape = len(paths), 3, image_size, image_size
    found = decoded.load(key, shape) if key else None
    if found is None:
        found = Decoded(*read_images(paths, image_size, num_workers))
        if key and decoded.key_of(paths, image_size) == key:  # nobody has changed a file meanwhile
            decoded.save(key, found)
    return found


def load_folder(
    root: Path, image_size: int, num_workers: int, in_memory: bool = True
) -> tuple[ImageSet | FileSet, ImageSet | FileSet | None]:
    """Load the training images (labeled ones first), and the test images or None.

    Args:
        in_memory: whether to decode all images now, or to read them when they are needed.

    Raises:
        ValueError: if `list_folder` refuses the folder, or an image is unreadable.
    """
    listing = list_folder(root)

    def build(files: Files) -> ImageSet | FileSet:
        targets, classes = torch.tensor(files.targets, dtype=torch.int64), listing.classes
        paths = tuple(path.removeprefix(f"{root}{os.sep}") for path in files.paths)
        if not in_memory:
            return FileSet("folder", root, paths, targets, classes, IMAGENET_STATS, image_size)
        images, contents = read_or_load(files.paths, image_size, num_workers)
        return ImageSet("folder", images, targets, classes, IMAGENET_STATS, paths, contents)

    return build(listing.train), None if listing.test is None else build(listing.test)
