"""The published input pipeline: torchvision's transforms on one Pillow image at a time, in workers.

It serves to compare with batches that are augmented on the device. Each operation of datasets/transforms.py
names its counterpart in the chain.
"""

from functools import partial

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision import transforms

from datasets.files import UnreadableImageError
from datasets.images import DataSet
from datasets.resizing import Resizing
from datasets.transforms import Augmentation


class PilReader(Dataset):
    """Reader that augments a set's images in the workers of a DataLoader, many images for each item.

    A request is (indexes, seeds): the images, and a seed for the random numbers of each. Its item is the
    images, B x C x S x S float32, and a message for each image that cannot be read.
    """

    def __init__(self, data: DataSet, augmentation: Augmentation) -> None:
        size = data.image_size
        self.data = data.for_workers()
        self.transform = augmentation.pil_transform(size)
        if not (data.in_memory or augmentation.starts_with_crop):
            resizing = data.resizing or Resizing(data.evaluation_resize)
            cut = partial(resizing, image_size=size)
            self.transform = transforms.Compose([cut, self.transform])
        self.nothing = torch.empty(0, len(augmentation.mean), size, size)

    def __getitem__(self, request: tuple[Tensor, Tensor]) -> tuple[Tensor, list[str]]:
        indexes, seeds = request
        images, problems = [], []
        with torch.random.fork_rng(devices=[]):
            for index, seed in zip(indexes.tolist(), seeds.tolist(), strict=True):
                try:
                    image = self.data.pil_image(index)
                except UnreadableImageError as error:
                    problems.append(str(error))
                    continue
                torch.default_generator.manual_seed(seed)  # leaves the GPUs' generators alone
                images.append(self.transform(image))
        if problems or not images:
            return self.nothing, problems
        return default_collate(images), problems
