"""RandAugment of batches: each operation against Pillow; an image depends on its own numbers alone."""

import math

import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import functional

import datasets.transforms
from datasets.rand_augment import GRAY, OPERATIONS, RandAugment
from datasets.transforms import Augmentation, RandomHorizontalFlip

STATS = ((0.5,) * 3, (0.25,) * 3)
BILINEAR = Image.Resampling.BILINEAR


def pictures(n=6, size=24, seed=0):
    """Smooth random pictures as bytes, with one that is dark and one of a single color."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, size // 4, size // 4, generator=rng)
    images = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    images[0] *= 0.4
    images[1] = 0.3
    return (images * 255).round().byte()


def enhanced(kind):
    return lambda image, s: kind(image).enhance(0.05 + 0.9 * s)


def transformed(a, b, c, d, e, f):
    return lambda image: image.transform(
        image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), BILINEAR
    )


PILLOW = {
    "identity": lambda image, s: image,
    "auto contrast": lambda image, s: ImageOps.autocontrast(image),
    "equalize": lambda image, s: ImageOps.equalize(image),
    "brightness": enhanced(ImageEnhance.Brightness),
    "color": enhanced(ImageEnhance.Color),
    "contrast": enhanced(ImageEnhance.Contrast),
    "sharpness": enhanced(ImageEnhance.Sharpness),
    "posterize": lambda image, s: ImageOps.posterize(image, 8 - min(4, int(5 * s))),
    "solarize": lambda image, s: ImageOps.solarize(image, 256 * s),
    "rotate": lambda image, s: image.rotate(30 * (2 * s - 1), BILINEAR),
    "shear x": lambda image, s: transformed(1, 0.3 * (2 * s - 1), 0, 0, 1, 0)(image),
    "shear y": lambda image, s: transformed(1, 0, 0, 0.3 * (2 * s - 1), 1, 0)(image),
    "translate x": lambda image, s: transformed(1, 0, 0.3 * (2 * s - 1) * image.width, 0, 1, 0)(
        image
    ),
    "translate y": lambda image, s: transformed(1, 0, 0, 0, 1, 0.3 * (2 * s - 1) * image.height)(
        image
    ),
}
EXACT = ("identity", "equalize", "posterize")
GEOMETRIC = ("rotate", "shear x", "shear y", "translate x", "translate y")


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_pillows(name):
    change = OPERATIONS[name] or (lambda images, _: images)
    images = pictures()
    strengths = torch.tensor([0.05, 0.3, 0.5, 0.61, 0.77, 0.99])
    ours = (change(images / 255, strengths) * 255).round()
    for image, mine, s in zip(images, ours, strengths.tolist(), strict=True):
        theirs = functional.pil_to_tensor(PILLOW[name](functional.to_pil_image(image), s))
        difference = (mine - theirs.float()).abs()
        if name in GEOMETRIC:  # Pillow ends its pictures half a pixel later
            assert difference.median() <= 1, s
            assert (difference > 2).float().mean() < 0.2, s
            inner = difference[:, 9:15, 9:15]
            assert inner.max() <= 2, s
        else:
            assert difference.max() <= (0 if name in EXACT else 2), s


def test_the_pool_is_that_of_fixmatch():
    assert len(OPERATIONS) == 14
    assert [name for name, change in OPERATIONS.items() if change is None] == ["identity"]


def test_numbers_are_drawn_with_replacement_and_strengths_uniformly():
    rows = RandAugment().sample_params(4000, torch.Generator().manual_seed(0))
    assert rows.shape == (4000, 9)
    shares = torch.bincount(rows[:, :3].long().flatten(), minlength=14) / 12000
    assert shares.sub(1 / 14).abs().max() < 0.01
    twice = (rows[:, 0] == rows[:, 1]).float().mean()
    assert twice.item() == pytest.approx(1 / 14, abs=0.02)
    assert rows[:, 3:].mean(dim=0).sub(0.5).abs().max() < 0.03


def test_the_gray_square_covers_up_to_half_the_side():
    op, images = RandAugment(), torch.ones(3, 3, 20, 20)
    rows = torch.zeros(3, 9)
    rows[:, 6] = torch.tensor([0.0, 0.4, 1.0])
    rows[:, 7:] = 0.5
    gray = (op(images, rows) - torch.tensor(GRAY)[None, :, None, None]).abs().amax(dim=1) < 1e-6
    assert gray.sum(dim=(1, 2)).tolist() == [0, 16, 100]
    assert gray[2, 5:15, 5:15].all()


@pytest.mark.parametrize("size", [9, 24])
def test_what_an_image_becomes_depends_on_its_numbers_alone_and_selecting_is_the_same(
    monkeypatch, size
):
    augmentation = Augmentation([RandomHorizontalFlip(), RandAugment()], STATS)
    images = pictures(60, size=24)[:, :, :size, :size]
    rows = augmentation.sample_params(60, torch.Generator().manual_seed(1))
    whole = augmentation(images, rows)
    assert whole.isfinite().all()
    for i in range(0, 60, 7):
        alone = augmentation(images[i : i + 1], [r[i : i + 1] for r in rows])
        torch.testing.assert_close(alone, whole[i : i + 1], atol=1e-5, rtol=0)
    monkeypatch.setattr(datasets.transforms, "selects", lambda _: True)
    monkeypatch.setattr("datasets.rand_augment.selects", lambda _: True)
    torch.testing.assert_close(augmentation(images, rows), whole, atol=1e-5, rtol=0)


def test_a_rotation_by_nothing_and_a_quarter_of_the_range():
    images = pictures() / 255
    still = torch.full((6,), 0.5)
    for name in GEOMETRIC:
        torch.testing.assert_close(OPERATIONS[name](images, still), images, atol=1e-5, rtol=0)
    assert math.isclose(
        float(OPERATIONS["brightness"](torch.ones(1, 3, 2, 2), torch.ones(1)).max()),
        0.95,
        rel_tol=1e-6,
    )


def test_workers_cannot_augment_so():
    with pytest.raises(ValueError, match="leave out --loader workers"):
        RandAugment().pil_transform(32)
