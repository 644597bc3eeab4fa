"""The data sets: what is in them, and what happens when something is wrong with the files."""

import hashlib
import os
import pickle
import signal
from dataclasses import replace

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torchvision.transforms import functional

from datasets import UNKNOWN, build_datasets, patches
from datasets import cifar as cifar_module
from datasets.folder import decode, load_folder, read_images
from datasets.images import CIFAR10_STATS, CIFAR100_STATS, IMAGENET_STATS


def picture(seed=0, size=(20, 16), mode="RGB"):
    shape = (size[1], size[0], 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def write(path, image=None, **keywords):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture(len(str(path)))).save(path, **keywords)
    return path


def tree(root):
    """Two classes, images without labels at two depths, a test folder with one of the classes."""
    for name in ("train/cat/b.png", "train/cat/a.JPG", "train/dog/deep/er/c.png"):
        write(root / name)
    for name in ("unlabeled/z.png", "unlabeled/x/y/w.bmp", "test/dog/t.png"):
        write(root / name)
    return root


def test_patches_have_their_sizes_and_classes():
    train, test = build_datasets("patches", "nowhere")
    assert train.images.shape == (3000, 3, 32, 32)
    assert test.images.shape == (1000, 3, 32, 32)
    assert torch.equal(train.targets.bincount(), torch.full((10,), 300))
    assert torch.equal(test.targets.bincount(), torch.full((10,), 100))
    assert train.classes == test.classes == patches.PHOTOGRAPHS
    for data in (train, test):  # color gives nothing away
        assert torch.equal(data.images[:, 0], data.images[:, 1])
        assert torch.equal(data.images[:, 0], data.images[:, 2])


def test_patches_are_the_same_ones_every_time():
    first, again = patches.load_patches(True), patches.load_patches(True)
    assert torch.equal(first.images, again.images)
    assert first.digest == again.digest
    assert first.digest != patches.load_patches(False).digest


def test_patches_state_their_own_mean_and_deviation():
    values = patches.load_patches(True).images[:, 0].float() / 255
    assert values.mean().item() == pytest.approx(patches.STATS[0][0], abs=1e-3)
    assert values.std().item() == pytest.approx(patches.STATS[1][0], abs=1e-3)


def test_no_pixel_is_in_a_training_and_a_test_patch(monkeypatch):
    # the pictures become maps of their own columns, so that a patch tells where it was cut
    def columns(name):
        height, width = getattr(skimage.data, name)().shape[:2]
        sizes[name] = width
        return np.broadcast_to(np.arange(width, dtype=np.int64), (height, width))

    sizes = {}
    monkeypatch.setattr(patches, "_gray", columns)
    monkeypatch.setattr(patches, "ImageSet", lambda name, images, *rest: images[:, 0])
    train = patches.load_patches(True).split(300)
    test = patches.load_patches(False).split(100)
    for name, left, right in zip(patches.PHOTOGRAPHS, train, test, strict=True):
        border = sizes[name] * 3 // 4
        assert left.max() < border <= right.min(), name
        assert right.max() < sizes[name]
        assert left.min() < 32  # the whole of either part is used
        assert right.max() >= sizes[name] - 32


def test_patches_of_a_class_are_distinct_places():
    places = patches._cut(np.arange(40 * 50).reshape(40, 50), 0, 50, 100, np.random.default_rng(0))
    assert len({int(patch[0, 0]) for patch in places}) == 100


def make_cifar(family, folder, per_file=3, seed=0):
    """A batch folder in CIFAR's own layout, with the checksums that torchvision compares."""
    rng = np.random.default_rng(seed)
    base = folder / family.base_folder
    base.mkdir(parents=True)
    labels = "labels" if family.base_folder.startswith("cifar-10-") else "fine_labels"
    sums = {}
    for name, _ in family.train_list + family.test_list:
        data = rng.integers(0, 256, (per_file, 3072), dtype=np.uint8)
        (base / name).write_bytes(
            pickle.dumps({"data": data, labels: rng.integers(0, 10, per_file).tolist()})
        )
        sums[name] = hashlib.md5((base / name).read_bytes()).hexdigest()
    meta = family.meta["filename"]
    (base / meta).write_bytes(pickle.dumps({family.meta["key"]: [f"c{i}" for i in range(10)]}))
    sums[meta] = hashlib.md5((base / meta).read_bytes()).hexdigest()
    return sums


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_in_its_order_with_its_labels(name, monkeypatch, tmp_path):
    family, _ = cifar_module.CIFAR[name]
    sums = make_cifar(family, tmp_path)
    for attribute in ("train_list", "test_list"):
        listed = [[file, sums[file]] for file, _ in getattr(family, attribute)]
        monkeypatch.setattr(family, attribute, listed)
    meta = family.meta | {"md5": sums[family.meta["filename"]]}
    monkeypatch.setattr(family, "meta", meta)
    train, test = build_datasets(name, tmp_path)
    base, rows, labels = tmp_path / family.base_folder, [], []
    for file, _ in family.train_list:
        entry = pickle.loads((base / file).read_bytes())
        rows.append(entry["data"])
        labels += entry.get("labels", entry.get("fine_labels"))
    expected = torch.from_numpy(np.concatenate(rows)).view(-1, 3, 32, 32)
    assert torch.equal(train.images, expected)
    assert train.targets.tolist() == labels
    assert train.classes == tuple(f"c{i}" for i in range(10))
    assert len(test) == 3
    assert train.stats == (CIFAR10_STATS if name == "cifar10" else CIFAR100_STATS)

    (base / family.train_list[0][0]).write_bytes(b"damaged")
    monkeypatch.setattr(family, "download", no_network)
    with pytest.raises(ValueError, match="damaged"):
        build_datasets(name, tmp_path)


def no_network(*_):
    raise OSError("Network is unreachable")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_without_files_or_network_says_what_to_do(name, monkeypatch, tmp_path):
    family, _ = cifar_module.CIFAR[name]
    monkeypatch.setattr(family, "download", no_network)
    with pytest.raises(ValueError, match="could not be downloaded") as caught:
        build_datasets(name, tmp_path / "data")
    for word in (name, "Network is unreachable", family.base_folder, "patches", "folder", "data"):
        assert word in str(caught.value)


def test_published_means_and_deviations():
    assert CIFAR10_STATS == ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    assert IMAGENET_STATS == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize(("name", "size"), [("imagenet", 32), ("patches", 4)])
def test_an_unknown_data_set_or_size_is_refused(name, size):
    with pytest.raises(ValueError, match=r"unknown data set|image size"):
        build_datasets(name, "x", image_size=size)


def test_another_image_size_resizes_every_image():
    small, _ = build_datasets("patches", "x", image_size=16)
    assert small.images.shape == (3000, 3, 16, 16)
    assert small.images.dtype == torch.uint8
    whole = patches.load_patches(True)
    exact = functional.resize(whole.images[:50].double(), [16, 16], antialias=True)
    assert (small.images[:50] - exact).abs().max() <= 1  # bytes are computed in whole numbers
    assert small.digest != whole.digest


def test_folder_gives_labeled_images_first_and_then_those_without_a_label(tmp_path):
    train, test = build_datasets("folder", tree(tmp_path), image_size=16)
    assert train.classes == test.classes == ("cat", "dog")
    assert train.paths == (
        *("train/cat/a.JPG", "train/cat/b.png", "train/dog/deep/er/c.png"),
        *("unlabeled/x/y/w.bmp", "unlabeled/z.png"),
    )
    assert train.targets.tolist() == [0, 0, 1, UNKNOWN, UNKNOWN]
    assert not train.has_all_targets
    assert test.has_all_targets
    assert (test.paths, test.targets.tolist()) == (("test/dog/t.png",), [1])
    for row, path in zip(train.images, train.paths, strict=True):
        assert torch.equal(row, torch.from_numpy(decode((tmp_path / path).read_bytes(), 16)))
    assert train[4][1:] == (UNKNOWN, 4)


def test_folder_takes_val_where_there_is_no_test_and_none_without_either(tmp_path):
    root = tree(tmp_path)
    (root / "test").rename(root / "val")
    assert load_folder(root, 16, 0)[1].paths == ("val/dog/t.png",)
    (root / "val").rename(root / "elsewhere")
    assert load_folder(root, 16, 0)[1] is None


def test_worker_processes_give_the_same_images_in_the_same_order(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.folder.FEW_FILES", 1)
    root = tree(tmp_path)
    paths = [str(p) for p in sorted(root.rglob("*.*"))] * 30
    assert torch.equal(read_images(paths, 16, 2)[0], read_images(paths, 16, 0)[0])


def test_a_process_that_dies_while_it_decodes_is_told_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.folder.FEW_FILES", 1)
    monkeypatch.setattr("datasets.folder.decode", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ValueError, match=r"a process that reads images has ended.*\(-j\)"):
        read_images([str(write(tmp_path / "a.png"))], 16, 1)


def test_a_class_that_only_the_test_folder_has_is_refused(tmp_path):
    root = tree(tmp_path)
    write(root / "test/bird/q.png")
    with pytest.raises(ValueError, match="'bird'"):
        load_folder(root, 16, 0)


def test_an_empty_class_folder_is_refused_by_name(tmp_path):
    root = tree(tmp_path)
    (root / "train/emu").mkdir()
    (root / "train/emu/notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="train/emu holds no image"):
        load_folder(root, 16, 0)


@pytest.mark.parametrize("missing", ["", "train"])
def test_a_missing_or_empty_training_folder_says_what_is_needed(tmp_path, missing):
    (tmp_path / missing).mkdir(exist_ok=True)
    with pytest.raises(ValueError, match="train"):
        load_folder(tmp_path, 16, 0)


@pytest.mark.parametrize("place", ["train/cat/bad.png", "unlabeled/k/bad.jpg", "test/dog/bad.png"])
@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty"])
def test_an_unreadable_image_is_named_and_never_skipped_or_replaced(tmp_path, place, damage):
    root = tree(tmp_path)
    path = write(root / place, picture(size=(64, 64)))
    whole = path.read_bytes()
    content = {"garbage": b"GIF89 no", "truncated": whole[: len(whole) // 2], "empty": b""}
    path.write_bytes(content[damage])
    with pytest.raises(ValueError, match="1 of") as caught:
        load_folder(root, 16, 0)
    assert str(path) in str(caught.value)


def test_every_unreadable_image_is_counted_and_the_first_ten_named(tmp_path):
    paths = []
    for i in range(12):
        paths.append(tmp_path / f"{i:02d}.png")
        paths[-1].write_bytes(b"no image")
    with pytest.raises(ValueError, match="12 of 12") as caught:
        read_images([str(p) for p in paths], 16, 0)
    assert [p.name in str(caught.value) for p in paths] == [True] * 10 + [False] * 2


def test_whatever_a_decoder_raises_becomes_a_message_with_the_path(tmp_path, monkeypatch):
    def broken(*_):
        raise IndexError

    monkeypatch.setattr("datasets.folder.decode", broken)
    with pytest.raises(ValueError, match=r"file\.png: IndexError"):
        read_images([str(write(tmp_path / "file.png", picture(0, (8, 8))))], 16, 0)


def test_more_images_than_memory_holds_are_refused_before_reading():
    with pytest.raises(ValueError, match=r"--image-size.*imagenet-semi\.py"):
        read_images(["nowhere.png"] * 100, 8192, 0)


def test_exif_orientation_is_applied(tmp_path):
    upright = Image.new("RGB", (16, 16), "black")
    upright.paste("white", (0, 0, 16, 8))  # the sky is above
    exif = Image.Exif()
    exif[274] = 6  # stored lying on its side: turn clockwise to see it
    path = write(tmp_path / "p.png", upright.transpose(Image.Transpose.ROTATE_90), exif=exif)
    seen = decode(path.read_bytes(), 16)
    assert (seen[:, :8] == 255).all()
    assert (seen[:, 8:] == 0).all()


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_gray_transparent_and_palette_images_become_rgb(tmp_path, mode):
    image = picture(3, (16, 16), "RGB").convert(mode)
    suffix = "tif" if mode == "CMYK" else "png"
    seen = decode(write(tmp_path / f"p.{suffix}", image).read_bytes(), 16)
    assert seen.shape == (3, 16, 16)
    assert np.array_equal(seen.transpose(1, 2, 0), np.asarray(image.convert("RGB")))


def test_sixteen_bit_gray_is_scaled_not_cut_off_to_white(tmp_path):
    deep = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    path = write(tmp_path / "p.png", Image.fromarray(deep))
    assert np.array_equal(decode(path.read_bytes(), 16)[0], deep >> 8)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pixels_of_unknown_range_are_refused_by_path(tmp_path, kind):
    path = write(tmp_path / "p.tif", Image.fromarray(np.full((16, 16), 0.5, dtype=kind)))
    with pytest.raises(ValueError, match=r"p\.tif.*32-bit"):
        read_images([str(path)], 16, 0)


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (16, 16), (5, 9)])
def test_any_shape_is_resized_by_its_shorter_side_and_cut_in_the_center(tmp_path, size):
    image = picture(1, size)
    short = min(size)
    scaled = image.resize((size[0] * 16 // short, size[1] * 16 // short), Image.Resampling.BILINEAR)
    left, top = round((scaled.width - 16) / 2), round((scaled.height - 16) / 2)
    expected = np.asarray(scaled.crop((left, top, left + 16, top + 16))).transpose(2, 0, 1)
    assert np.array_equal(decode(write(tmp_path / "p.png", image).read_bytes(), 16), expected)


@pytest.mark.parametrize("paths", [(), tuple(f"train/{i}.png" for i in range(3000))])
def test_digest_changes_with_a_label_an_image_their_order_and_the_classes(paths):
    data = replace(patches.load_patches(True), paths=paths)
    labels = data.targets.clone()
    labels[17] = UNKNOWN
    order = torch.arange(3000).roll(1)
    pixels = data.images.clone()
    pixels[5, 0, 3, 3] ^= 1
    changed = [
        replace(data, targets=labels),
        replace(data, classes=("bricks", *data.classes[1:])),
        replace(data, images=data.images[order], paths=tuple(paths[i] for i in order if paths)),
        replace(data, images=data.images[:-1], targets=data.targets[:-1], paths=paths[:-1]),
    ]
    changed.append(replace(data, contents="other bytes") if paths else replace(data, images=pixels))
    digests = {data.digest, *(other.digest for other in changed)}
    assert len(digests) == len(changed) + 1
    assert replace(data).digest == data.digest


def test_another_picture_under_the_same_name_is_another_data_set(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / "train" / name / "1.png", picture(0, (16, 16)))
    before = load_folder(tmp_path, 16, 0)[0].digest
    assert load_folder(tmp_path, 16, 0)[0].digest == before
    write(tmp_path / "train" / "a" / "1.png", picture(3, (16, 16)))
    assert load_folder(tmp_path, 16, 0)[0].digest != before


def test_files_of_other_kinds_are_named_in_a_warning(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / "train" / name / "1.png", picture(0, (16, 16)))
    (tmp_path / "train" / "a" / "2.heic").write_bytes(b"x")
    (tmp_path / "train" / "a" / "Thumbs.db").write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"1 files .*2\.heic"):
        assert len(load_folder(tmp_path, 16, 0)[0]) == 2


def test_an_unlabeled_folder_without_images_is_an_error(tmp_path):
    write(tmp_path / "train" / "a" / "1.png", picture(0, (16, 16)))
    (tmp_path / "unlabeled").mkdir()
    with pytest.raises(ValueError, match="unlabeled holds no image"):
        load_folder(tmp_path, 16, 0)


def table(root, *lines):
    (root / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def flat(root, count=6):
    """Pictures at two depths beside which a table can lie."""
    for i in range(count):
        write(root / ("deep/er" if i % 2 else "") / f"{i}.png", picture(i, (16, 16)))
    return root


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_table_beside_the_images_labels_them(tmp_path, in_memory):
    rows = ("4.png,dog,", "deep/er/5.png,,train", "0.png,cat,train", "./deep/er/1.png,cat,")
    table(flat(tmp_path), "path,label,split", *rows, "2.png,dog,val", "deep/er/3.png,cat,val")
    train, test = build_datasets("folder", tmp_path, image_size=16, in_memory=in_memory)
    assert train.classes == test.classes == ("cat", "dog")
    assert train.paths == ("0.png", "deep/er/1.png", "4.png", "deep/er/5.png")
    assert train.targets.tolist() == [0, 0, 1, UNKNOWN]
    assert test.paths == ("deep/er/3.png", "2.png")
    assert test.targets.tolist() == [0, 1]
    if in_memory:
        expected = decode((tmp_path / "deep/er/1.png").read_bytes(), 16)
        assert np.array_equal(train.images[1], expected)


def test_a_table_takes_test_before_val_and_needs_neither(tmp_path):
    table(flat(tmp_path), "path,label,split", *(f"{i}.png,a," for i in (0, 2)), "4.png,a,test")
    with pytest.warns(UserWarning, match="3 images"):
        assert load_folder(tmp_path, 16, 0)[1].paths == ("4.png",)
    with (tmp_path / "labels.csv").open("a") as file:
        file.write("deep/er/1.png,a,val\n")
    with pytest.warns(UserWarning, match="2 images"):
        assert load_folder(tmp_path, 16, 0)[1].paths == ("4.png",)
    table(tmp_path, "path,label", "0.png,a")
    with pytest.warns(UserWarning, match="5 images"):
        assert load_folder(tmp_path, 16, 0)[1] is None


def test_images_that_a_table_leaves_out_have_no_label_and_that_is_said(tmp_path):
    table(flat(tmp_path), "path,label", "2.png,x", "0.png,y")
    with pytest.warns(UserWarning, match=r"4 images below .* such as 4\.png"):
        train, _ = load_folder(tmp_path, 16, 0)
    assert train.paths[:2] == ("2.png", "0.png")
    assert train.targets.tolist() == [0, 1, *[UNKNOWN] * 4]


def test_a_table_may_come_from_a_spreadsheet_and_names_may_hold_commas(tmp_path):
    write(tmp_path / "a, b.png", picture(1, (16, 16)))
    content = '\ufeffpath, label\r\n"a, b.png", "big, red"\r\n'
    (tmp_path / "labels.csv").write_bytes(content.replace(', "big', ',"big').encode("utf-8"))
    train, _ = load_folder(tmp_path, 16, 0)
    assert (train.paths, train.classes) == (("a, b.png",), ("big, red",))


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["file,class", "0.png,a"], ["path,label"]),
        ([""], ["path,label"]),
        (["path,label", "0.png,a", "9.png,a"], ["1 of 2", "9.png"]),
        (["path,label", "0.png,a", "2.png,b", "./0.png,b"], ["0.png", "more than once"]),
        (["path,label", "0.png,a,extra"], ["line 2"]),
        (["path,label,split", "0.png,a,", "2.png,a,tset"], ["line 3"]),
        (["path,label,split", "0.png,a,", "2.png,,test"], ["line 3", "2.png", "no label"]),
        (["path,label,split", "0.png,a,", "2.png,b,val"], ["'b'", "no training image"]),
        (["path,label", "0.png,", "2.png,"], ["labels no training image"]),
        (["path,label", ",a"], ["line 2"]),
    ],
)
def test_a_table_that_contradicts_itself_or_the_files_is_refused(tmp_path, lines, words):
    table(flat(tmp_path), *lines)
    with pytest.raises(ValueError, match=r"labels\.csv") as caught:
        load_folder(tmp_path, 16, 0)
    for word in words:
        assert word in str(caught.value)


def test_without_class_folders_both_layouts_are_named(tmp_path):
    for folder in (tmp_path, tmp_path / "train"):
        folder.mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=r"labels\.csv"):
            load_folder(tmp_path, 16, 0, False)


def test_files_are_listed_alike_in_memory_and_not(tmp_path):
    in_memory = load_folder(tree(tmp_path), 16, 0)
    left = load_folder(tmp_path, 16, 0, False)
    for one, other in zip(in_memory, left, strict=True):
        assert (one.paths, one.classes, one.stats) == (other.paths, other.classes, other.stats)
        assert torch.equal(one.targets, other.targets)


@pytest.mark.parametrize("fault", ["class", "empty"])
def test_a_set_of_files_is_checked_before_anything_is_read(tmp_path, fault):
    root = tree(tmp_path)
    if fault == "class":
        write(root / "test/bird/q.png")
    else:
        (root / "train/emu").mkdir()
    with pytest.raises(ValueError, match=r"bird|emu"):
        build_datasets("folder", root, image_size=16, in_memory=False)
