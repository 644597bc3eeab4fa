"""Images left in their files: the pixels of torchvision, whatever the file; bad ones are named."""

import io

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from datasets import UNKNOWN, FileSet, build_datasets, files
from datasets.files import Reader, central_view, random_view, read_image
from datasets.resizing import Resizing
from datasets.transforms import RandomResizedCrop


def photograph(size=(100, 75)):
    return Image.fromarray(skimage.data.coffee()).resize(size)


def encoded(image, kind="JPEG", **keywords):
    file = io.BytesIO()
    image.save(file, kind, **keywords)
    return file.getvalue()


def pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def rows(n=6, scale=0.2):
    return RandomResizedCrop(scale).sample_params(n, torch.Generator().manual_seed(0)).tolist()


@pytest.fixture
def folder(tmp_path):
    """Two classes of three pictures, each in a format of its own, one picture without a label."""
    names = ("train/cat/0.jpg", "train/cat/1.png", "train/dog/a/2.JPEG", "unlabeled/3.jpg")
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        kind = "PNG" if name.endswith("png") else "JPEG"
        (tmp_path / name).write_bytes(encoded(photograph((60 + i, 45)), kind))
    return tmp_path


def files_of(folder, image_size=16):
    return build_datasets("folder", folder, image_size=image_size, in_memory=False)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(100, 75), (75, 100), (64, 64), (20, 300)])
def test_a_crop_has_the_pixels_of_torchvision_for_the_same_box(kind, size):
    data = encoded(photograph(size), kind)
    image = Image.open(io.BytesIO(data)).convert("RGB")
    for row in rows():
        box = RandomResizedCrop.box(row, size[::-1])
        assert random_view(row, size[::-1], 32).box == box
        seen = read_image(data, 32, row)
        assert torch.equal(
            seen, functional.resized_crop(pixels(image), *box, [32, 32], antialias=True)
        )
        by_pillow = pixels(functional.resized_crop(image, *box, [32, 32]))
        assert (
            seen.int() - by_pillow.int()
        ).abs().max() <= 1  # torchvision rounds them differently


@pytest.mark.parametrize("size", [(100, 75), (75, 100), (64, 64), (40, 300), (20, 31)])
@pytest.mark.parametrize(("image_size", "shorter"), [(224, 256), (32, 37), (28, 32)])
def test_the_central_view_is_resize_and_center_crop(size, image_size, shorter):
    data = encoded(photograph(size))
    published = transforms.Compose([transforms.Resize(shorter), transforms.CenterCrop(image_size)])
    expected = pixels(published(Image.open(io.BytesIO(data)))).int()
    assert (read_image(data, image_size).int() - expected).abs().max() <= 1


@pytest.mark.parametrize("size", [(90, 75), (75, 90), (700, 530)])
@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("mode", [InterpolationMode.BILINEAR, InterpolationMode.BICUBIC])
def test_another_network_has_another_central_view(size, squash, mode):
    resizing = Resizing(60, mode, squash)
    steps = transforms.Resize([60, 60] if squash else 60, mode), transforms.CenterCrop(48)
    image = Image.fromarray(np.asarray(photograph(size).resize((9, 7)).resize(size)))  # smooth
    expected = pixels(transforms.Compose(steps)(image)).int()
    seen = read_image(encoded(image, "PNG"), 48, None, resizing).int()
    assert (seen - expected).abs().max() <= 2
    close = read_image(encoded(image, "JPEG"), 48, None, resizing).int()  # decoded at a fraction
    assert (close - expected).abs().float().mean() <= 2


def test_the_box_of_the_central_view_is_what_it_shows():
    gradient = np.broadcast_to(np.arange(240, dtype=np.uint8)[None, :, None], (100, 240, 3))
    view = central_view((100, 240), 56)
    shown = view.cut(Image.fromarray(gradient.copy()))[0, 0].float()
    top, left, height, width = view.box
    centers = left + (torch.arange(56) + 0.5) * width / 56 - 0.5
    assert (shown - centers).abs().max() <= 0.6
    assert top == pytest.approx((100 - height) / 2, abs=1)


@pytest.mark.parametrize("view", ["random", "central"])
def test_a_large_jpeg_decoded_at_a_fraction_of_its_size_looks_the_same(view, monkeypatch):
    # measured on photographs: 0.2-0.4 of 255 steps in the mean, a third of what bilinear or bicubic matters
    data = encoded(Image.fromarray(skimage.data.retina()), quality=92)
    reduced = []
    monkeypatch.setattr(
        files, "_shrunk_view", lambda *w, f=files._shrunk_view: reduced.append(w[2]) or f(*w)
    )
    for row in rows(8) if view == "random" else [None]:
        close = read_image(data, 64, row).float()
        with monkeypatch.context() as context:
            context.setattr(files, "SURPLUS", 1e9)
            exact = read_image(data, 64, row).float()
        assert (close - exact).abs().mean() < 1
        assert (close - exact).mean().abs() < 0.2  # neither lighter nor moved
    assert len(set(reduced)) >= (1 if view == "central" else 2)


def test_a_jpeg_is_never_decoded_smaller_than_twice_what_is_asked_for(monkeypatch):
    sizes = []

    def spy(image, view, scale, image_size):
        sizes.append(min(view.box[2:]) / scale / image_size)
        return torch.zeros(3, image_size, image_size, dtype=torch.uint8)

    monkeypatch.setattr(files, "_shrunk_view", spy)
    data = encoded(photograph((800, 600)))
    for row in rows(30):
        read_image(data, 48, row)
    assert sizes
    assert min(sizes) >= 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(90, 60), (900, 600), (960, 640)])
def test_images_are_upright_and_cropped_upright(orientation, size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = photograph(size)
    turns = [None, 0, 3, 1, 5, 2, 6, 4]  # what undoes what the viewer is told to do
    turn = turns[orientation - 1]
    stored = upright if turn is None else upright.transpose(Image.Transpose(turn))
    row = rows(1)[0]
    seen = read_image(encoded(stored, exif=exif, quality=95), 32, row)
    expected = read_image(encoded(upright, quality=95), 32, row)
    assert (seen.float() - expected.float()).abs().mean() < 2


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "JPEG"), ("CMYK", "JPEG"), ("L", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("1", "PNG")],
)
def test_any_kind_of_pixels_becomes_rgb(mode, kind):
    data = encoded(photograph((64, 64)).convert(mode), kind)
    expected = pixels(Image.open(io.BytesIO(data)).convert("RGB"))
    assert torch.equal(read_image(data, 64, [0.0, 0.0, *[1.0] * 20]), expected)


def test_a_set_of_files_describes_itself(folder):
    data, test = files_of(folder)
    assert isinstance(data, FileSet)
    assert test is None
    assert data.paths == (
        *("train/cat/0.jpg", "train/cat/1.png", "train/dog/a/2.JPEG", "unlabeled/3.jpg"),
    )
    assert data.targets.tolist() == [0, 0, 1, UNKNOWN]
    assert (data.classes, data.num_classes, len(data)) == (("cat", "dog"), 2, 4)
    assert (data.image_size, data.has_all_targets, data.name) == (16, False, "folder")
    in_memory, _ = build_datasets("folder", folder, image_size=16)
    assert in_memory.paths == data.paths
    assert torch.equal(in_memory.targets, data.targets)


def test_the_digest_of_files_changes_with_names_sizes_and_labels_and_reads_no_image(folder):
    before = files_of(folder)[0].digest
    assert (
        files_of(folder, 32)[0].digest == before
    )  # the size of the crops is no property of the files
    path = folder / "train/cat/0.jpg"
    content = path.read_bytes()
    path.write_bytes(b"x" * len(content))
    assert files_of(folder)[0].digest == before
    path.write_bytes(content + b"x")
    changed = {before, files_of(folder)[0].digest}
    path.write_bytes(content)
    path.rename(folder / "train/cat/00.jpg")
    changed.add(files_of(folder)[0].digest)
    (folder / "train/cat/00.jpg").rename(path)
    (folder / "train/cat/1.png").rename(folder / "train/dog/1.png")
    changed.add(files_of(folder)[0].digest)
    assert len(changed) == 4


def test_a_reader_gives_the_images_asked_for_in_their_order(folder):
    data, _ = files_of(folder)
    reader, crops = Reader(data), torch.tensor(rows(3))
    images, problems = reader[torch.tensor([2, 0, 3]), crops]
    assert not problems
    assert images.dtype == torch.uint8
    for image, index, row in zip(images, (2, 0, 3), crops.tolist(), strict=True):
        assert torch.equal(image, read_image((folder / data.paths[index]).read_bytes(), 16, row))
    whole, _ = reader[torch.tensor([1]), None]
    assert torch.equal(whole[0], read_image((folder / data.paths[1]).read_bytes(), 16))
    none, problems = reader[torch.empty(0, dtype=torch.int64), crops[:0]]
    assert (none.shape, problems) == ((0, 3, 16, 16), [])


@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty", "missing", "deep"])
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_every_image_that_cannot_be_read_is_named_with_path_and_index(folder, damage, kind):
    data, _ = files_of(folder)
    index = {"jpg": 0, "png": 1}[kind]
    path = folder / data.paths[index]
    whole = path.read_bytes()
    deep = encoded(Image.fromarray(np.zeros((9, 9), np.float32)), "TIFF")
    contents = {"truncated": whole[: len(whole) // 2], "empty": b"", "deep": deep}
    path.write_bytes(contents.get(damage, b"no image"))
    if damage == "missing":
        path.unlink()
    images, problems = Reader(data)[torch.tensor([2, index, 3]), torch.tensor(rows(3))]
    assert len(images) == 0  # nothing that could be taken for a whole batch
    assert len(problems) == 1
    assert problems[0].startswith(f"image {index}, {path}: ")
    assert len(problems[0]) > len(f"image {index}, {path}: ") + 3
