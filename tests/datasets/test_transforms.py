"""Augmentation: the pixels of torchvision for the same parameters, and its distribution of them."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from runs import pictures
from skimage.color import rgb2gray
from torchvision import transforms
from torchvision.transforms import functional

import datasets.transforms
from datasets.images import GRAY_LUMA, GRAY_STATS
from datasets.transforms import (
    LUMA,
    Augmentation,
    ColorJitter,
    GaussianBlur,
    PadCrop,
    RandomApply,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Solarize,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    blend,
    finetune_ops,
    instance_ops,
    patch_ops,
    to_gray,
    two_view_ops,
)
from lib.cli.start import load_script

step = load_script("scripts/benchmarks/step.py")
STATS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def in_a_batch(op, images, rows):
    """Each image of the batch alone: what an image becomes must be a function of its row alone."""
    return torch.cat([op(images[i : i + 1], rows[i : i + 1]) for i in range(len(images))])


ADJUSTMENTS = (
    functional.adjust_brightness,
    functional.adjust_contrast,
    functional.adjust_saturation,
    functional.adjust_hue,
)


def pillow_images(n=100):
    """Half smooth, half noise; as Pillow's and as the same values in [0, 1]."""
    noise = torch.randint(0, 256, (n // 2, 3, 32, 32), dtype=torch.uint8, generator=generator(1))
    images = torch.cat([(pictures(n - n // 2) * 255).round().byte(), noise])
    return [functional.to_pil_image(image) for image in images], images / 255


def gray_levels(ours, theirs):
    """Differences of ours from Pillow images, in steps of 255."""
    return 255 * (ours - torch.stack([functional.to_tensor(image) for image in theirs]))


def crop_row(top, left, height, width):
    """A row of RandomResizedCrop whose first candidate is this, in fractions of a square image."""
    return torch.tensor([top, left, *[height] * 10, *[width] * 10])


SIZES = [(1, 1), (8, 8), (32, 32), (33, 33), (64, 64), (32, 47), (90, 61), (20, 90), (375, 500)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [0.05, 0.2, 1.0])
def test_boxes_of_many_rows_are_those_of_each_row(size, scale):
    op = RandomResizedCrop(scale)
    rows = op.sample_params(3000, generator())
    halves = torch.arange(20 * 80).view(80, 20) % 97 + 0.5  # sides that lie between two pixels
    rows[:80, 2:] = halves / math.sqrt(math.prod(size))
    rows[80] = crop_row(1 - 2**-24, 1 - 2**-24, 0.1, 0.1)
    rows[81] = crop_row(0.5, 0.5, 9.0, 9.0)  # none fits
    expected = torch.tensor([op.box(row, size) for row in rows.tolist()]).float()
    assert torch.equal(op.boxes(rows, size), expected)
    assert torch.equal(op.boxes(rows[75:85], size), expected[75:85])


@pytest.mark.parametrize("size", [32, 21])
def test_resized_crop_gives_the_pixels_of_torchvision_for_the_same_box(size):
    images, op = pictures(24, size=32)[:, :, :size, :size], RandomResizedCrop(0.05)
    rows = op.sample_params(len(images), generator())
    rows[0] = crop_row(0.0, 0.0, 1.0, 1.0)
    rows[1] = crop_row(0.9999, 0.9999, 0.1, 0.1)  # the last place, an edge of the picture
    ours = op(images, rows)
    assert torch.equal(ours[0].round(decimals=5), images[0].round(decimals=5))
    for image, got, box in zip(images, ours, op.boxes(rows, (size, size)).int(), strict=True):
        expected = functional.resized_crop(image, *box.tolist(), [size, size], antialias=True)
        assert torch.allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("scale", [0.2, 0.08])
def test_resized_crop_is_within_a_gray_level_of_pillows_for_the_same_box(scale):
    images, values = pillow_images()
    op = RandomResizedCrop(scale)
    rows = op.sample_params(len(images), generator())
    boxes = [op.box(row, (32, 32)) for row in rows.tolist()]
    theirs = [
        functional.resized_crop(image, *box, [32, 32])
        for image, box in zip(images, boxes, strict=True)
    ]
    difference = gray_levels(op(values, rows), theirs)
    assert difference.abs().max() < 1.01  # Pillow rounds after the columns and after the rows
    assert difference.mean().abs() < 0.1


@pytest.mark.parametrize("size", [(32, 32), (32, 47), (90, 61)])
def test_crop_boxes_lie_inside_the_image_and_reach_every_border(size):
    op = RandomResizedCrop(0.2)
    extremes = torch.stack([crop_row(1, 1, 1, 1), crop_row(1, 1, 0.3, 0.3)])
    rows = torch.cat([op.sample_params(20000, generator()), extremes])
    top, left, height, width = op.boxes(rows, size).unbind(1)
    for start, length, side in ((top, height, size[0]), (left, width, size[1])):
        assert start.min() == 0
        assert length.min() >= 1
        assert (start + length).max() == side
        assert torch.equal(start, start.round())


@pytest.mark.parametrize("size", [(32, 32), (48, 64), (90, 30)])
def test_crop_boxes_are_distributed_as_in_torchvision(size):
    op, image = RandomResizedCrop(0.2), torch.zeros(3, *size)
    torch.manual_seed(1)
    theirs = torch.tensor(
        [
            transforms.RandomResizedCrop.get_params(image, (0.2, 1), (3 / 4, 4 / 3))
            for _ in range(8000)
        ]
    ).float()
    ours = op.boxes(op.sample_params(40000, generator()), size)

    def moments(boxes):
        _, _, height, width = boxes.unbind(1)
        area, ratio = height * width / math.prod(size), (width / height).log()
        whole = ((height == size[0]) | (width == size[1])).float()
        columns = [*boxes.unbind(1), area, ratio, whole]
        return torch.stack([torch.stack([c.mean(), c.std()]) for c in columns])

    # the standard error of a mean over 8000 boxes is 0.3% of a side
    difference = (moments(ours) - moments(theirs)).abs()
    assert difference[:4].max() < 0.009 * max(size)
    assert difference[4:].max() < 0.03
    # a side is rounded before it is asked whether it fits; otherwise 3.5% fewer keep a whole one at 32 x 32
    assert difference[-1, 0] < 0.015


@pytest.mark.parametrize("size", [(32, 32), (40, 50), (20, 90), (90, 20)])
def test_where_no_candidate_fits_the_largest_central_crop_of_an_allowed_ratio_is_taken(size):
    op = RandomResizedCrop(1.0)
    boxes = op.boxes(op.sample_params(300, generator()), size)
    torch.manual_seed(0)  # torchvision draws ten that do not fit, either
    drawn = [
        transforms.RandomResizedCrop.get_params(torch.zeros(3, *size), (1, 1), (3 / 4, 4 / 3))
        for _ in range(9)
    ]
    assert boxes.mode(dim=0).values.tolist() == [*max(set(drawn), key=drawn.count)]
    assert (boxes == boxes.mode(dim=0).values).all(dim=1).float().mean() > 0.9


@pytest.mark.parametrize("scale", [0.0, -0.2, 1.5])
def test_an_impossible_crop_scale_is_refused(scale):
    with pytest.raises(ValueError, match="crop scale"):
        RandomResizedCrop(scale)


@pytest.mark.parametrize(("size", "pad"), [(32, 4), (64, 8), (8, 1)])
def test_pad_crop_cuts_from_a_reflection_of_an_eighth_of_the_side(size, pad):
    images, op = torch.rand(30, 3, size, size, generator=generator()), PadCrop()
    rows = op.sample_params(30, generator())
    rows[0], rows[1] = 0.0, 1 - 2**-24
    ours = op(images, rows)
    offsets = (rows * (2 * pad + 1)).long()
    assert offsets[:2].tolist() == [[0, 0], [2 * pad, 2 * pad]]
    for image, got, (top, left) in zip(images, ours, offsets.tolist(), strict=True):
        padded = functional.pad(image, [pad], padding_mode="reflect")
        assert torch.equal(got, functional.crop(padded, top, left, size, size))


def test_pad_crop_and_flip_move_bytes_as_pillow_does():
    images, values = pillow_images()
    rows = PadCrop().sample_params(len(images), generator())
    places = (rows * 9).long().tolist()
    theirs = [
        functional.crop(functional.pad(image, [4], padding_mode="reflect"), *place, 32, 32)
        for image, place in zip(images, places, strict=True)
    ]
    assert gray_levels(PadCrop()(values, rows), theirs).abs().max() == 0
    flipped = RandomHorizontalFlip()(values, torch.zeros(len(images), 1))
    assert gray_levels(flipped, [functional.hflip(image) for image in images]).abs().max() == 0


def test_pad_crop_takes_each_of_the_81_places_equally_often():
    offsets = (PadCrop().sample_params(81 * 200, generator()) * 9).long()
    counts = (offsets[:, 0] * 9 + offsets[:, 1]).bincount(minlength=81)
    statistic = ((counts - 200.0) ** 2 / 200).sum()
    assert statistic < 135  # 0.9999 quantile of chi-square with 80 degrees of freedom


@pytest.mark.parametrize(
    ("ours", "theirs", "factors"),
    [
        (adjust_brightness, functional.adjust_brightness, (0.6, 1.0, 1.4)),
        (adjust_contrast, functional.adjust_contrast, (0.6, 1.0, 1.4)),
        (adjust_saturation, functional.adjust_saturation, (0.6, 1.0, 1.4)),
        (adjust_hue, functional.adjust_hue, (-0.4, -0.1, 0.0, 0.25, 0.4)),
    ],
)
def test_color_adjustments_give_the_pixels_of_torchvision(ours, theirs, factors):
    images = pictures()
    for factor in factors:
        got = ours(images, torch.full((len(images),), factor))
        # 0.2989 against 0.299 in the weight of red is all that may differ
        assert torch.allclose(got, theirs(images, factor), atol=5e-4), factor


@pytest.mark.parametrize(("k", "most"), [(0, 1.01), (1, 1.5), (2, 1.5), (3, 20.0)])
def test_color_adjustments_are_pillows_up_to_its_whole_bytes_and_256_hues(k, most):
    images, values = pillow_images()
    factors = ColorJitter(0.4).sample_params(len(images), generator())[:, k]
    theirs = [
        ADJUSTMENTS[k](image, factor)
        for image, factor in zip(images, factors.tolist(), strict=True)
    ]
    difference = gray_levels(ColorJitter.adjustments[k](values, factors), theirs)
    assert difference.abs().max() < most
    assert difference.abs().mean() < 1
    if k < 3:  # Pillow cuts off what is beyond a whole byte, half a gray level in the mean
        assert difference.min() > -0.25  # and rounds the gray value that it blends with
        assert difference.mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("turn", [-0.9, -0.5, -1 / 3, -1 / 6, 0.0, 1 / 6, 1 / 3, 0.5, 0.77, 1.2])
def test_hue_turns_by_any_angle(turn):
    images = pictures()
    got = adjust_hue(images, torch.full((len(images),), turn))
    expected = functional.adjust_hue(images, (turn + 0.5) % 1 - 0.5)
    assert torch.allclose(got, expected, atol=5e-4)


def test_contrast_keeps_the_mean_of_each_image_not_of_the_batch():
    images = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 0.8)])
    flat = adjust_contrast(images, torch.tensor([0.6, 0.6]))
    assert torch.allclose(flat, images, atol=1e-6)


def test_each_image_of_a_batch_gets_its_own_color_factor():
    images, factors = pictures(3), torch.tensor([0.6, 1.0, 1.4])
    for adjust in ColorJitter.adjustments:
        alone = [
            adjust(images[i : i + 1], factors[i : i + 1] - 1 * (adjust is adjust_hue))
            for i in range(3)
        ]
        together = adjust(images, factors - 1 * (adjust is adjust_hue))
        assert torch.allclose(together, torch.cat(alone), atol=1e-6)


def test_color_jitter_applies_the_four_in_the_order_of_its_row():
    images, op = pictures(24), ColorJitter(0.4)
    rows = op.sample_params(24, generator())
    untouched = images.clone()
    ours = op(images, rows)
    assert torch.equal(images, untouched)
    for image, got, row in zip(images, ours, rows.tolist(), strict=True):
        for k in map(int, row[4:]):
            image = ADJUSTMENTS[k](image, row[k])
        assert torch.allclose(got, image, atol=2e-3)


def test_color_jitter_and_gray_are_pillows_up_to_two_gray_levels_in_the_mean():
    images, values = pillow_images()
    rows = ColorJitter(0.4).sample_params(len(images), generator())
    theirs = []
    for image, row in zip(images, rows.tolist(), strict=True):
        for k in map(int, row[4:]):
            image = ADJUSTMENTS[k](image, row[k])
        theirs.append(image)
    difference = gray_levels(ColorJitter(0.4)(values, rows), theirs).abs()
    assert difference.mean() < 2
    assert difference.flatten().quantile(0.99) < 12  # a color that the hue moved
    ours = RandomGrayscale(0.5)(values, torch.zeros(len(images), 1))
    gray = [functional.rgb_to_grayscale(image, 3) for image in images]
    assert gray_levels(ours, gray).abs().max() < 0.51  # half a step of rounding


def test_color_jitter_draws_the_distribution_of_torchvision():
    n = 24 * 500
    rows = ColorJitter(0.4).sample_params(n, generator())
    low, high = torch.tensor([0.6] * 3 + [-0.4]), torch.tensor([1.4] * 3 + [0.4])
    theirs = transforms.ColorJitter(0.4, 0.4, 0.4, 0.4)
    assert [*theirs.brightness, *theirs.hue] == pytest.approx([0.6, 1.4, -0.4, 0.4])
    factors = rows[:, :4]
    assert (factors >= low).all()
    assert (factors <= high).all()
    assert torch.allclose(factors.mean(0), (low + high) / 2, atol=0.01)
    assert torch.allclose(factors.std(0), (high - low) / math.sqrt(12), atol=0.01)
    assert factors.T.corrcoef().fill_diagonal_(0).abs().max() < 0.05
    orders = rows[:, 4:]
    assert torch.equal(orders.sort(dim=1).values, torch.arange(4.0).expand(n, 4))
    counts = (orders.long() * torch.tensor([64, 16, 4, 1])).sum(1).bincount()
    counts = counts[counts > 0]
    assert len(counts) == 24
    assert ((counts - 500.0) ** 2 / 500).sum() < 56  # 0.9999 quantile with 23 degrees of freedom


def test_grayscale_is_torchvisions_and_falls_on_its_share():
    images, op = pictures(200, size=32), RandomGrayscale(0.2)
    rows = op.sample_params(200, generator())
    ours = op(images, rows)
    gray = functional.rgb_to_grayscale(images, num_output_channels=3)
    chosen = rows[:, 0] < 0.2
    assert torch.allclose(ours[chosen], gray[chosen], atol=5e-4)
    assert torch.equal(ours[~chosen], images[~chosen])
    share = (op.sample_params(20000, generator())[:, 0] < 0.2).float().mean()
    assert share.item() == pytest.approx(0.2, abs=0.012)


def test_flip_mirrors_left_and_right_for_half_of_the_images():
    images, op = pictures(200), RandomHorizontalFlip()
    rows = op.sample_params(200, generator())
    ours, flipped = op(images, rows), rows[:, 0] < 0.5
    assert torch.equal(ours[flipped], functional.hflip(images[flipped]))
    assert torch.equal(ours[~flipped], images[~flipped])
    share = (op.sample_params(20000, generator())[:, 0] < 0.5).float().mean()
    assert share.item() == pytest.approx(0.5, abs=0.015)


@pytest.mark.parametrize("crop", ["RandomResizedCrop", "PadCrop"])
def test_what_an_image_becomes_depends_on_its_row_alone(crop):
    images = pictures(6)
    for op in (*instance_ops(crop), *two_view_ops(), *patch_ops()):
        rows = op.sample_params(6, generator())
        assert torch.allclose(op(images, rows), in_a_batch(op, images, rows), atol=1e-6)


@pytest.mark.parametrize(("size", "kernel"), [(32, 3), (64, 7), (224, 23)])
def test_blur_is_torchvisions(size, kernel):
    images, op = pictures(4, size=size), GaussianBlur()
    rows = op.sample_params(4, generator())
    assert bool((rows >= 0.1).all() & (rows <= 2).all())
    for image, ours, (sigma,) in zip(images, op(images, rows), rows.tolist(), strict=True):
        theirs = functional.gaussian_blur(image, [kernel, kernel], [sigma, sigma])
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_solarize_inverts_the_bright_half_of_the_bytes():
    values = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    ours = Solarize()(values / 255, torch.empty(1, 0))
    theirs = functional.solarize(values, 128)
    assert torch.equal((ours * 255).round().byte(), theirs)
    picture = functional.to_pil_image(values[0])
    assert torch.equal(functional.pil_to_tensor(Solarize().pil_transform(32)(picture)), theirs[0])


def test_an_operation_is_applied_to_its_share_of_the_images():
    images, op = pictures(200), RandomApply(ColorJitter(0.4, hue=0.1), 0.8)
    rows = op.sample_params(200, generator())
    assert rows[:, 4].abs().max() <= 0.1  # turns of the hue
    chosen = rows[:, 0] < 0.8
    ours = op(images, rows)
    assert torch.equal(ours[~chosen], images[~chosen])
    assert torch.equal(ours[chosen], op.op(images[chosen], rows[chosen, 1:]))
    share = (op.sample_params(20000, generator())[:, 0] < 0.8).float().mean()
    assert share.item() == pytest.approx(0.8, abs=0.012)


@pytest.mark.parametrize("size", [(32, 32), (20, 60)])
def test_crops_of_one_share_and_ratio_are_squares_of_that_area(size):
    crop = RandomResizedCrop(0.25, 0.25, ratio=1)
    _, _, height, width = RandomResizedCrop.boxes(crop.sample_params(50, generator()), size).T
    side = round((0.25 * size[0] * size[1]) ** 0.5)
    assert set(height.tolist()) == set(width.tolist()) == {side}


def test_the_published_chains():
    phase1 = instance_ops("RandomResizedCrop", 0.3)
    assert [type(op) for op in phase1] == [
        RandomResizedCrop,
        ColorJitter,
        RandomGrayscale,
        RandomHorizontalFlip,
    ]
    assert (phase1[0].min_scale, phase1[0].max_scale) == (0.3, 1.0)
    assert (phase1[1].strength, phase1[2].probability) == (0.4, 0.2)
    assert type(instance_ops("PadCrop")[0]) is PadCrop
    assert [type(op) for op in finetune_ops()] == [PadCrop, RandomHorizontalFlip]
    with pytest.raises(ValueError, match="CenterCrop"):
        instance_ops("CenterCrop")


CHAINS = {
    "phase 1": instance_ops(),
    "phase 1, gray first": instance_ops(gray_first=True),
    "phase 1, padded": instance_ops("PadCrop"),
    "two views": two_view_ops(),
    "patches": patch_ops(),
    "phase 3": finetune_ops(),
    "strong jitter": [ColorJitter(0.9), RandomGrayscale(0.5)],
}


@pytest.mark.parametrize("size", [8, 32, 33])
@pytest.mark.parametrize("ops", CHAINS.values(), ids=CHAINS)
def test_selecting_among_all_images_gives_what_changing_the_chosen_ones_does(
    monkeypatch, ops, size
):
    augmentation = Augmentation(ops, STATS)
    images = (pictures(200, size=max(size, 27))[:, :, :size, :size] * 255).byte()
    for seed in range(4):
        rows = augmentation.sample_params(len(images), generator(seed))
        expected = augmentation(images, rows)
        with monkeypatch.context() as patch:
            patch.setattr(datasets.transforms, "selects", lambda _: True)
            torch.testing.assert_close(augmentation(images, rows), expected, atol=1e-5, rtol=0)


def test_jitter_in_any_order_passes_through_the_same_stations(monkeypatch):
    monkeypatch.setattr(datasets.transforms, "selects", lambda _: True)
    images, op = pictures(24), ColorJitter(0.4)
    rows = op.sample_params(24, generator())
    rows[:, 4:] = torch.tensor([*itertools.permutations(range(4))])
    for image, got, row in zip(images, op(images, rows), rows.tolist(), strict=True):
        for k in map(int, row[4:]):
            image = ADJUSTMENTS[k](image, row[k])
        assert torch.allclose(got, image, atol=2e-3)
    nothing, everything = torch.zeros(24), torch.ones(24)
    assert torch.equal(blend(images, everything, nothing, nothing), images)


@pytest.mark.parametrize(
    ("chain", "most"),
    [
        ("phase 1", 150),
        ("phase 1, gray first", 150),
        ("phase 1, padded", 150),
        ("two views", 150),
        ("patches", 180),
        ("phase 3", 15),
    ],
)
def test_a_gpu_augments_with_few_launches_and_neither_waits_nor_copies(chain, most):
    augmentation = Augmentation(CHAINS[chain], STATS)
    shapes = [rows.shape for rows in augmentation.sample_params(128, generator())]
    with step.fake_gpu():  # an item() or a shape that depends on values raises here
        images = torch.empty(128, 3, 32, 32, dtype=torch.uint8, device="cuda")
        rows = [torch.empty(shape, device="cuda") for shape in shapes]
        augmentation(images, rows)  # makes the constants
        with step.Launches("cuda") as launches:
            augmented = augmentation(images, rows)
    assert 0 < launches.kernels.total() <= most
    assert launches.copies.total() == 0
    assert augmented.device.type == "cuda"
    assert augmented.is_contiguous(memory_format=torch.channels_last)


def spelled(chain):
    """Every transform with its settings, to four digits: these went through float32."""
    return re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.4f}", repr(chain))


ENDING = [transforms.ToTensor(), transforms.Normalize(*map(list, STATS))]
JITTER = transforms.ColorJitter(0.4, 0.4, 0.4, 0.4)
GRAY, FLIP = transforms.RandomGrayscale(0.2), transforms.RandomHorizontalFlip()


@pytest.mark.parametrize(
    ("ops", "size", "published"),
    [
        (
            instance_ops(),
            32,
            [transforms.RandomResizedCrop(32, scale=(0.2, 1.0)), JITTER, GRAY, FLIP],
        ),
        (
            instance_ops(scale=0.4, gray_first=True),
            224,
            [transforms.RandomResizedCrop(224, scale=(0.4, 1.0)), GRAY, JITTER, FLIP],
        ),
        (
            instance_ops("PadCrop"),
            32,
            [
                transforms.Compose(
                    [transforms.Pad(4, padding_mode="reflect"), transforms.RandomCrop(32)]
                ),
                JITTER,
                GRAY,
                FLIP,
            ],
        ),
        (
            two_view_ops(scale=0.3),
            32,
            [
                transforms.RandomResizedCrop(32, scale=(0.3, 1.0)),
                FLIP,
                transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
                transforms.RandomGrayscale(0.1),
            ],
        ),
        (
            patch_ops(0.25)[:-1],
            64,
            [
                transforms.RandomResizedCrop(64, scale=(0.25, 0.25), ratio=(1.0, 1.0)),
                FLIP,
                transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.2)], 0.8),
                GRAY,
                transforms.RandomApply([transforms.GaussianBlur(7, (0.1, 2.0))], 0.1),
            ],
        ),
        (
            [RandomResizedCrop(0.08), RandomHorizontalFlip()],
            224,
            [transforms.RandomResizedCrop(224, scale=(0.08, 1.0)), FLIP],
        ),
        ((), 32, []),
    ],
)
def test_the_classic_chain_is_torchvisions_with_the_published_settings(ops, size, published):
    expected = transforms.Compose([*published, *ENDING])
    assert spelled(Augmentation(ops, STATS).pil_transform(size)) == spelled(expected)


def test_gray_input_is_that_of_the_published_colorization_networks():
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    picture = functional.to_pil_image(image)
    published = torch.from_numpy(rgb2gray(np.array(picture)))[None].float()
    augmentation = Augmentation((), GRAY_STATS, luma=GRAY_LUMA)
    assert published.min() >= 0
    assert published.max() <= 1
    torch.testing.assert_close(augmentation(image[None])[0], published, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        augmentation.pil_transform(32)(picture), published, rtol=0, atol=1e-6
    )


def test_normalization_is_torchvisions():
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    ours = Augmentation((), STATS)(images)
    expected = functional.normalize(images.float() / 255, *STATS)
    assert ours.dtype == torch.float32
    assert torch.allclose(ours, expected, atol=1e-6)
    assert ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("luma", [(), GRAY_LUMA])
def test_many_large_images_become_what_each_becomes_alone(luma):
    augmentation = Augmentation(instance_ops(), STATS, luma=luma)
    images = (pictures(5, size=224) * 255).byte()  # more than are worked on at once
    rows = augmentation.sample_params(5, generator())
    together = augmentation(images, rows)
    alone = [augmentation(images[i : i + 1], [r[i : i + 1] for r in rows]) for i in range(5)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    assert together.is_contiguous(memory_format=torch.channels_last)


def test_a_batch_of_no_images_stays_one():
    augmentation = Augmentation(instance_ops(), STATS)
    empty = augmentation(
        torch.empty(0, 3, 16, 16, dtype=torch.uint8), augmentation.sample_params(0, generator())
    )
    assert empty.shape == (0, 3, 16, 16)
    for op in (*instance_ops(), PadCrop()):
        assert op(torch.empty(0, 3, 16, 16), op.sample_params(0, generator())).shape == (
            0,
            3,
            16,
            16,
        )


def test_readers_of_files_take_over_a_first_crop_and_nothing_else():
    for ops, taken in ((instance_ops(), 1), (finetune_ops(), 0), ((), 0)):
        whole = Augmentation(ops, STATS, luma=GRAY_LUMA)
        rest = whole.without_crop()
        assert whole.starts_with_crop is bool(taken)
        assert (rest.ops, rest.luma) == (tuple(ops[taken:]), GRAY_LUMA)
        assert len(whole.ops) == len(ops)


def test_gray_input_of_older_runs_is_normalized_luminance():
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    ours = Augmentation((), STATS, luma=LUMA)(images)
    assert ours.shape == (5, 1, 8, 8)
    mean, std = (sum(values) / 3 for values in STATS)
    gray = functional.rgb_to_grayscale(images.float() / 255)
    assert torch.allclose(ours, (gray - mean) / std, atol=1e-3)
    assert torch.allclose(to_gray(torch.ones(1, 3, 2, 2)), torch.ones(1, 1, 2, 2))


def test_augmentation_draws_on_the_cpu_from_the_given_generator_alone():
    augmentation = Augmentation(instance_ops(), STATS)
    images = (pictures(4) * 255).byte()
    before = torch.get_rng_state()
    first = augmentation(images, augmentation.sample_params(4, generator(7)))
    again = augmentation(images, augmentation.sample_params(4, generator(7)))
    other = augmentation(images, augmentation.sample_params(4, generator(8)))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.isfinite(first).all()


def test_rows_that_do_not_match_the_operations_are_refused():
    augmentation = Augmentation(finetune_ops(), STATS)
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="zip"):
        augmentation(images, augmentation.sample_params(2, generator())[:1])
