"""The embedded data set: 32x32 gray patches cut from ten photographs that ship inside scikit-image.

It needs no download, so that every script, notebook and test of this repository runs anywhere. Pictures are
converted to gray, so that color does not reveal the class. Training patches lie in the left three quarters
of a picture, test patches in the right quarter: they share no pixel.
"""

import numpy as np
import skimage.data
import torch
from skimage.color import rgb2gray
from skimage.util import img_as_ubyte
from torch import Tensor

from datasets.images import ImageSet, Stats

PHOTOGRAPHS = (
    "brick",
    "grass",
    "gravel",
    "coins",
    "page",
    "hubble_deep_field",
    "immunohistochemistry",
    "retina",
    "chelsea",
    "coffee",
)
SIZE = 32
TRAIN_PER_CLASS = 300
TEST_PER_CLASS = 100
STATS: Stats = ((0.427,) * 3, (0.222,) * 3)  # mean and std of the training patches


def _gray(name: str) -> np.ndarray:
    picture = getattr(skimage.data, name)()
    return picture if picture.ndim == 2 else img_as_ubyte(rgb2gray(picture))


def _cut(
    picture: np.ndarray, left: int, right: int, count: int, rng: np.random.Generator
) -> Tensor:
    """Cut `count` patches at distinct random places of the columns left ... right - 1."""
    rows, columns = picture.shape[0] - SIZE + 1, right - left - SIZE + 1
    places = rng.choice(rows * columns, size=count, replace=False)
    patches = [
        picture[r : r + SIZE, left + c : left + c + SIZE]
        for r, c in zip(*np.divmod(places, columns), strict=True)
    ]
    return torch.from_numpy(np.stack(patches))


def load_patches(train: bool) -> ImageSet:
    """Cut the 3,000 training or 1,000 test patches, always the same ones."""
    images, targets = [], []
    for label, name in enumerate(PHOTOGRAPHS):
        picture = _gray(name)
        border = picture.shape[1] * 3 // 4
        rng = np.random.default_rng([label, int(train)])
        if train:
            cut = _cut(picture, 0, border, TRAIN_PER_CLASS, rng)
        else:
            cut = _cut(picture, border, picture.shape[1], TEST_PER_CLASS, rng)
        images.append(cut)
        targets.append(torch.full((len(cut),), label))
    gray = torch.cat(images)[:, None].expand(-1, 3, -1, -1).contiguous()
    return ImageSet("patches", gray, torch.cat(targets), PHOTOGRAPHS, STATS)
