"""Batches of an in-memory data set, augmented on the device."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from datasets.images import ImageSet
from datasets.transforms import Augmentation
from lib.devices import Compute
from lib.sampler import Stream, num_batches, permutation
from lib.seeding import generator


@dataclass(frozen=True)
class Batch:
    """images: B x C x S x S float32 on the device; indexes: B, into the data set, same device."""

    images: Tensor
    indexes: Tensor


class Batches:
    """The images of a set as augmented batches; all that is random is a function of (seed, step).

    Row r of batch `step` gets row r of the random numbers drawn for `step`, so that augmentation
    depends neither on the device nor on when the run was interrupted.
    """

    def __init__(
        self,
        data: ImageSet,
        augmentation: Augmentation,
        compute: Compute,
        *,
        batch_size: int,
        seed: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch size {batch_size}: must be positive")
        self.augmentation, self.compute = augmentation, compute
        self.batch_size, self.seed = batch_size, seed
        self.images = data.images.to(compute.device)

    def at(self, indexes: Tensor, step: int) -> Batch:
        """The images `indexes` as batch number `step`."""
        rows = self.augmentation.draw(len(indexes), generator(self.seed, "augmentation", step))
        indexes = indexes.to(self.images.device)
        return Batch(self.augmentation(self.images[indexes], rows), indexes)

    @property
    def per_epoch(self) -> int:
        return num_batches(len(self.images), self.batch_size)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Every image once, in an order drawn for the epoch; the last batch may be short."""
        order = permutation(len(self.images), self.seed, epoch)
        for place, indexes in enumerate(order.split(self.batch_size)):
            yield self.at(indexes, epoch * self.per_epoch + place)

    def stream(self, indexes: Tensor, first: int, stop: int) -> Iterator[tuple[Batch, Tensor]]:
        """Full batches number first ... stop - 1 of the given images, repeated without end.

        Yields:
            The batch, and each row's position in `indexes` (for labels and weights kept beside it).
        """
        stream = Stream(len(indexes), self.batch_size, self.seed)
        for step in range(first, stop):
            positions = stream.batch(step)
            yield self.at(indexes[positions], step), positions


@torch.no_grad()
def in_order(
    data: ImageSet, augmentation: Augmentation, compute: Compute, batch_size: int = 500
) -> Iterator[Batch]:
    """Every image once, unaugmented, in the order of the set."""
    assert not augmentation.ops, "evaluation must not augment"
    for indexes in torch.arange(len(data)).split(batch_size):
        images = data.images[indexes].to(compute.device)
        yield Batch(augmentation(images), indexes.to(compute.device))
