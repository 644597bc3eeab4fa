"""The classic loader: torchvision's own bytes for its seeds, and the distribution of the batched one."""

import math

import numpy as np
import pytest
import torch
from conftest import assert_ok, assert_refused, run_script
from PIL import Image
from runs import assert_same, call, load_script, pictures, pretraining, without_meta
from scipy.stats import ks_2samp
from torchvision import transforms

from datasets.files import FileSet, random_view
from datasets.images import GRAY_LUMA, ImageSet
from datasets.resizing import Resizing
from datasets.transforms import (
    Augmentation,
    ColorJitter,
    PadCrop,
    RandomHorizontalFlip,
    RandomResizedCrop,
    finetune_ops,
    instance_ops,
    to_gray,
)
from lib.files import checkpoint, provenance
from lib.loading.batches import LOADERS, Batches
from lib.runtime.devices import Device
from lib.runtime.seeding import generator

CPU = Device(torch.device("cpu"), bf16=False)
STATS = ((0.0,) * 3, (1.0,) * 3)
DRAWS = 3000  # of each loader, wherever distributions are compared
ALPHA = 1e-3  # of each two-sample Kolmogorov-Smirnov test
ERRORS = 4  # standard errors that two means may lie apart
SIDE = 32


def image_set(images):
    return ImageSet("made", images, torch.zeros(len(images)).long(), ("a",), STATS)


def drawn(loader, ops, image, *, luma=()):
    """`DRAWS` augmented copies of one image, N x C x S x S whole bytes in [0, 1]: Pillow has no others."""
    data = image_set(image[None].expand(DRAWS, -1, -1, -1))
    augmentation = Augmentation(ops, STATS, luma=luma)
    batches = Batches(data, augmentation, CPU, batch_size=500, seed=7, loader=loader)
    return torch.cat([(255 * batch.images).round() / 255 for batch in batches.epoch(0)])


def seeds_of(step, total, seed=0):
    return torch.randint(2**63 - 1, (total,), generator=generator(seed, "augmentation", step))


def assert_same_distribution(ours, theirs, *, bias=0.0):
    """Columns of two N x K samples: one distribution each, means no more apart than chance and `bias`."""
    for a, b in zip(ours.T, theirs.T, strict=True):
        assert ks_2samp(a.numpy(), b.numpy()).pvalue > ALPHA
        error = math.sqrt(a.var() / len(a) + b.var() / len(b))
        assert (a.mean() - b.mean()).abs() < ERRORS * error + bias


def coordinates():
    """An image that tells where each of its pixels was: 8 y in red, 8 x in green."""
    along = 8 * torch.arange(SIDE, dtype=torch.uint8)
    rows, columns = along[:, None].expand(SIDE, SIDE), along.expand(SIDE, SIDE)
    return torch.stack([rows, columns, torch.zeros(SIDE, SIDE, dtype=torch.uint8)])


def places_of(images):
    """Where the pixels of crops of `coordinates` come from: y by row, x by column, and the flips."""
    y, x = images[:, 0, :, 16] * 255 / 8, images[:, 1, 16] * 255 / 8
    flipped = x[:, 16] < x[:, 15]
    return y, torch.where(flipped[:, None], x.flip(1), x), flipped.float()


def ranges_of(places):
    """First pixel and number of pixels that were resized to `SIDE`: N each."""
    first, last = places[:, 2], places[:, SIDE - 3]  # the crop's border is not within their reach
    lengths = (last - first) * SIDE / (SIDE - 5)
    starts = first - (2.5 * lengths / SIDE - 0.5)
    assert (lengths - lengths.round()).abs().max() < 0.4  # bytes are fine enough to tell
    return starts.round(), lengths.round()


@pytest.mark.parametrize("scale", [0.2, 0.08])
def test_both_loaders_draw_the_same_distribution_of_crops_and_flips(scale):
    found, shares = [], []
    for loader in LOADERS:
        ops = [RandomResizedCrop(scale), RandomHorizontalFlip()]
        y, x, flipped = places_of(drawn(loader, ops, coordinates()))
        (top, height), (left, width) = ranges_of(y), ranges_of(x)
        columns = [top, left, height, width, height * width, width / height, flipped]
        columns += [top + height / 2, left + width / 2, top * left, height * left]
        whole = (height == SIDE) | (width == SIDE)
        found.append(torch.stack(columns, dim=1))
        shares.append(whole.float().mean().item())
    assert_same_distribution(*found)
    # sides are rounded before it is asked whether they fit: without that one crop in 28 or 43 differs
    assert abs(shares[1] - shares[0]) < 4 * math.sqrt(2 * shares[0] / len(found[0]))


def test_crops_are_recovered_from_their_pixels():
    op = RandomResizedCrop(0.2)
    y, x, _ = places_of(drawn("device", [op], coordinates()))
    found = torch.stack([*ranges_of(y), *ranges_of(x)], dim=1)[:500]
    rows = op.sample_params(500, generator(7, "augmentation", 0))
    assert torch.equal(found[:, [0, 2, 1, 3]], op.boxes(rows, (SIDE, SIDE)))


def test_both_loaders_draw_the_same_distribution_of_padded_crops_and_flips():
    found = []
    for loader in LOADERS:
        y, x, flipped = places_of(drawn(loader, finetune_ops(), coordinates()))
        top, left = y[:, 16] - 12, x[:, 16] - 12
        assert torch.equal(top.round().unique(), torch.arange(9.0))
        found.append(torch.stack([top.round(), left.round(), flipped, top * left], dim=1))
    assert_same_distribution(*found)


def moments(images):
    """Of each image: means and standard deviations of its channels, covariances of pairs of them."""
    pixels = images.flatten(2)
    centered = pixels - pixels.mean(dim=2, keepdim=True)
    covariance = centered @ centered.mT / pixels.shape[2]
    pairs = torch.triu_indices(*covariance.shape[1:], offset=1)
    stds = covariance.diagonal(dim1=1, dim2=2).sqrt()
    return torch.cat([pixels.mean(dim=2), stds, covariance[:, pairs[0], pairs[1]]], dim=1)


@pytest.mark.parametrize(
    ("ops", "luma"),
    [
        (instance_ops(), ()),
        (instance_ops("PadCrop"), ()),
        (instance_ops(gray_first=True), ()),
        (finetune_ops(), ()),
        (finetune_ops(), GRAY_LUMA),
        ([RandomResizedCrop(0.08), RandomHorizontalFlip()], ()),
    ],
    ids=["phase 1", "PadCrop", "ImageNet", "phase 3", "gray input", "ImageNet phase 3"],
)
def test_both_loaders_draw_the_same_distribution_of_colors(ops, luma):
    image = (pictures(1)[0] * 255).byte()
    ours, theirs = (drawn(loader, ops, image, luma=luma) for loader in LOADERS)
    # Pillow loses half a gray level in each of three adjustments of the colors
    jitters = any(isinstance(op, ColorJitter) for op in ops)
    assert_same_distribution(moments(ours), moments(theirs), bias=1.5 / 255 if jitters else 0.0)
    if jitters:
        shares = [
            (x.amax(dim=1) - x.amin(dim=1)).flatten(1).amax(dim=1) < 1e-3 for x in (ours, theirs)
        ]
        assert_same_distribution(*(share.float()[:, None] for share in shares))
        assert 0.15 < shares[1].float().mean() < 0.25


def factors_of(images):
    """What tells the factors of a jitter apart: brightness, contrast, saturation, hue in revolutions."""
    luminance = to_gray(images).flatten(1)
    red, green, blue = images.mean(dim=(2, 3)).unbind(1)
    mean = torch.stack([red, green, blue])
    contrast = luminance.std(dim=1) / luminance.mean(dim=1)
    hue = torch.atan2(3**0.5 * (green - blue), 2 * red - green - blue) / (2 * math.pi)
    return torch.stack([luminance.mean(dim=1), contrast, 1 - mean.amin(0) / mean.amax(0), hue], 1)


def test_both_loaders_draw_the_same_distribution_of_jitters():
    image = torch.tensor([140, 95, 90]).byte()[:, None, None].repeat(1, SIDE, SIDE)
    image[:, :, 16:] -= 30  # bright and dark, but too little of both for anything to be cut off
    ours, theirs = (factors_of(drawn(loader, [ColorJitter(0.4)], image)) for loader in LOADERS)
    assert_same_distribution(ours, theirs, bias=1.5 / 255)


def test_images_become_what_torchvision_makes_of_them_after_each_ones_seed():
    images = (pictures(7) * 255).byte()
    chain = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIDE, scale=(0.2, 1.0)),
            transforms.ColorJitter(0.4, 0.4, 0.4, 0.4),
            transforms.RandomGrayscale(0.2),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
        ]
    )
    data, augmentation = image_set(images), Augmentation(instance_ops(), STATS)
    batches = Batches(data, augmentation, CPU, batch_size=3, seed=5, loader="workers")
    for place, batch in enumerate(batches.epoch(2)):
        seeds = seeds_of(2 * batches.per_epoch + place, batch.total, seed=5)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        rows = zip(batch.images, batch.indexes.tolist(), seeds.tolist(), strict=True)
        for image, index, seed in rows:
            torch.manual_seed(seed)
            pixels = Image.fromarray(images[index].permute(1, 2, 0).numpy())
            assert torch.equal(image, chain(pixels))


@pytest.fixture(scope="module")
def in_files(tmp_path_factory):
    """Smooth pictures of different sizes; the last one lies on its side, and says so."""
    root = tmp_path_factory.mktemp("pictures")
    for i, picture in enumerate(pictures(4, size=96)):
        pixels = (picture[:, : 96 - i, : 70 + i] * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(root / f"{i}.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(pixels).copy()).save(root / "4.png", exif=exif)
    paths = tuple(f"{i}.png" for i in range(5))
    return FileSet("files", root, paths, torch.zeros(5).long(), ("a",), STATS, SIDE)


def test_files_are_cut_whole_and_upright_as_torchvision_does_after_each_ones_seed(in_files):
    ops = [RandomResizedCrop(0.08), RandomHorizontalFlip()]
    chain = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIDE, scale=(0.08, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
        ]
    )
    words = {"batch_size": 5, "loader": "workers"}
    (batch,) = Batches(in_files, Augmentation(ops, STATS), CPU, **words).epoch(0)
    seeds = seeds_of(0, 5).tolist()
    for image, index, seed in zip(batch.images, batch.indexes.tolist(), seeds, strict=True):
        torch.manual_seed(seed)
        with Image.open(in_files.root / f"{min(index, 3)}.png") as picture:
            assert torch.equal(image, chain(picture))


def test_a_crop_of_a_file_is_within_two_gray_levels_of_pillows_for_the_same_box(in_files):
    op = RandomResizedCrop(0.08)
    for row in op.sample_params(40, generator(0, "sample")).tolist():
        with Image.open(in_files.root / "0.png") as picture:
            size = picture.size[::-1]
            top, left, height, width = op.box(row, size)
            box = (left, top, left + width, top + height)
            theirs = picture.crop(box).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            ours = random_view(row, size, SIDE).cut(picture).permute(1, 2, 0).numpy()
        assert np.abs(ours.astype(int) - np.asarray(theirs)).max() <= 2


def test_files_without_a_crop_are_cut_as_in_evaluation(in_files):
    words = {"batch_size": 5, "loader": "workers"}
    (batch,) = Batches(in_files, Augmentation((), STATS), CPU, **words).epoch(0)
    chain = transforms.Compose(
        [transforms.Resize(37), transforms.CenterCrop(SIDE), transforms.ToTensor()]
    )
    for image, index in zip(batch.images, batch.indexes.tolist(), strict=True):
        with Image.open(in_files.root / f"{min(index, 3)}.png") as picture:
            assert torch.equal(image, chain(picture))
            squashed = Resizing(40, squash=True)(picture, SIDE)
            assert squashed == transforms.CenterCrop(SIDE)(transforms.Resize((40, 40))(picture))


@pytest.mark.parametrize("luma", [(), GRAY_LUMA])
def test_a_batch_of_no_images_has_the_shape_of_others(luma):
    data, augmentation = image_set((pictures(2) * 255).byte()), Augmentation([PadCrop()], STATS)
    augmentation = Augmentation([PadCrop()], STATS, luma=luma)
    batches = Batches(data, augmentation, CPU, batch_size=2, loader="workers")
    (batch,) = batches.epoch(0)
    images, problems = batches._views[0].source.loader.dataset[torch.empty(0), torch.empty(0)]
    assert images.shape[1:] == batch.images.shape[1:] == (1 if luma else 3, SIDE, SIDE)
    assert (len(images), problems) == (0, [])


def test_an_operation_that_fails_is_not_taken_for_a_file_that_cannot_be_read(in_files, monkeypatch):
    batches = Batches(in_files, Augmentation((), STATS), CPU, batch_size=2, loader="workers")

    def fail(_):
        raise KeyError("of the operation")

    monkeypatch.setattr(batches._views[0].source.loader.dataset, "transform", fail)
    with pytest.raises(KeyError, match="of the operation"):
        next(batches.epoch(0))


PATCHES = ("--dataset", "patches", "--image-size", 8, "--arch", "wrn-10-1", "--precision", "fp32")
finetuning = load_script("cifar-semi.py")


@pytest.mark.slow
def test_pretraining_with_the_classic_loader_from_the_command_line(tmp_path):
    words = (*PATCHES, "-b", 64, "--loader", "workers", "--stop-after", 2)

    def files(name):
        return ("--model-dir", tmp_path / name, "--log-dir", tmp_path / name / "log")

    assert_ok(run_script("unsupervised/cifar.py", *words, *files("two"), "-j", 2))
    call(pretraining, *words, *files("none"), "-j", 0)
    call(pretraining, *words, *files("device"), "--loader", "device")
    two, none, device = (
        without_meta(checkpoint.load_dict(tmp_path / name / "ckpt.cifar.pth.tar"))
        for name in ("two", "none", "device")
    )
    assert_same(two, none)
    assert not torch.equal(two["lemniscate"]["memory"], device["lemniscate"]["memory"])
    other = run_script(
        "unsupervised/cifar.py", *words, "--loader", "device", *files("two"), "--resume", "auto"
    )
    assert_refused(other, "another run", "--loader was workers, is device")


def test_finetuning_with_the_classic_loader_goes_on_with_it_alone(tmp_path):
    def finetune(name, *words):
        files = ("--model-root", tmp_path / name, "--log-root", tmp_path / "log", "--exp-name", "e")
        labels = ("--num-labeled", 20, "-b", 16, "--max-iters", 4, "--resume", "auto")
        call(finetuning, *PATCHES, *labels, *files, *words)
        return checkpoint.load_dict(tmp_path / name / "e" / "ckpt.pth.tar")

    whole = finetune("whole", "--loader", "workers", "-j", 2, "--stop-after", 3)
    finetune("parts", "--loader", "workers", "-j", 0, "--stop-after", 1)
    with pytest.raises(ValueError, match="--loader was workers, is device"):
        finetune("parts", "--stop-after", 2)
    again = finetune("parts", "--loader", "workers", "-j", 1, "--stop-after", 2)
    for name in ("step", "net", "optimizer", "sums"):  # the accuracy is not a number yet
        assert_same(again[name], whole[name])


def test_a_file_from_before_there_was_a_choice_was_made_with_the_batched_loader():
    before, declared = {"options": {"lr": 0.1}}, {"loader": finetuning.RESUME_INVARIANTS["loader"]}
    device, workers = ({"options": {"loader": name}, "data_digest": ""} for name in LOADERS)
    provenance.require_same(before, device, declared)
    with pytest.raises(ValueError, match="--loader was device, is workers"):
        provenance.require_same(before, workers, declared)
    provenance.require_same(workers, workers, declared)
