"""Random images with random labels, to measure the speed of training without reading files."""

from dataclasses import dataclass

import torch

from datasets.images import IMAGENET_STATS, ImageSet

CLASSES = 1000
TRAIN = 50_000
TEST = 1_000
DISTINCT = 256  # pictures held in memory; they stand for all images in turn


@dataclass(frozen=True)
class DummySet(ImageSet):
    """A set that holds only its first images: number i is `images[i % len(images)]`."""

    def __post_init__(self) -> None:
        assert len(self.targets) >= len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        return self.images[index % len(self.images)], int(self.targets[index]), index


def load_dummy(num_images: int, image_size: int, *, seed: int) -> DummySet:
    """Build `num_images` random images of `CLASSES` classes, always the same for a seed."""
    rng = torch.Generator().manual_seed(seed)
    shape = (min(num_images, DISTINCT), 3, image_size, image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng)
    targets = torch.randint(CLASSES, (num_images,), generator=rng)
    names = tuple(f"class{i:03d}" for i in range(CLASSES))
    return DummySet("dummy", images, targets, names, IMAGENET_STATS)
