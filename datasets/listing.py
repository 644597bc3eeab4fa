"""List of the image files of a folder, and the class of each: by folders, or by a table beside them.

DIR/train/<class>/**         labeled training images
DIR/test/<class>/**          or DIR/val/<class>/**: test images (optional)
DIR/unlabeled/**             training images without a label (optional); alone where no label is known yet

DIR/labels.csv               path,label[,split] with a path from DIR, an empty label where none is known, and
                             train (or nothing), test or val; images that it leaves out have no label
"""

import csv
import os
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from datasets.images import UNKNOWN

TABLE = "labels.csv"
TESTS = ("test", "val")  # names of the test set; the first that exists is used
NO_IMAGES = ("Thumbs.db", "desktop.ini", TABLE)  # other files that are common in image folders


@dataclass
class Files:
    """Paths of image files, and the class number of each or `UNKNOWN`."""

    paths: list[str] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)

    def add(self, paths: Iterable[str], target: int) -> None:
        for path in paths:
            self.paths.append(path)
            self.targets.append(target)


@dataclass
class Listing:
    """The content of a folder: class names, training files (labeled ones first), test files if any."""

    classes: tuple[str, ...]
    train: Files
    test: Files | None


def image_files(folder: Path) -> list[str]:
    """List every image below `folder`, in an order that does not depend on the file system.

    Warns:
        UserWarning: about files that are left out because they have another extension.
    """
    found, others = [], []
    for parent, _, files in os.walk(folder, followlinks=True):
        for name in files:
            if name.lower().endswith(IMG_EXTENSIONS):
                found.append(os.path.join(parent, name))
            elif not name.startswith(".") and name not in NO_IMAGES:
                others.append(os.path.join(parent, name))
    if others:
        warnings.warn(
            f"{len(others)} files in {folder} are not used, because their extension is none of "
            f"{', '.join(IMG_EXTENSIONS)}, such as {min(others)}",
            stacklevel=2,
        )
    return sorted(found)


def class_names(folder: Path) -> tuple[str, ...]:
    """Return the sorted names of the class folders in `folder`; their place is the class number.

    Raises:
        ValueError: if the folder is missing or holds no class folder.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder} does not exist: --dataset folder needs --data-dir DIR with DIR/train/<class>/*, or "
            f"DIR/{TABLE} (path,label) beside images; DIR/unlabeled/** alone where no label is known yet"
        )
    names = sorted(f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    if not names:
        raise ValueError(
            f"{folder} holds no class folder: it needs one folder of images per class, or {TABLE} in "
            f"{folder.parent}"
        )
    return tuple(names)


def _labeled_files(folder: Path, classes: tuple[str, ...]) -> Files:
    files = Files()
    for name in class_names(folder):
        if name not in classes:
            raise ValueError(
                f"class {name!r} is in {folder} but not in the training folder; add it there or remove it"
            )
        members = image_files(folder / name)
        if not members:
            raise ValueError(
                f"class folder {folder / name} holds no image ({', '.join(IMG_EXTENSIONS)}); "
                "put images in or remove it"
            )
        files.add(members, classes.index(name))
    return files


def _from_folders(root: Path) -> Listing:
    unlabeled = image_files(root / "unlabeled")
    if unlabeled and not (root / "train").exists():
        return Listing((), Files(unlabeled, [UNKNOWN] * len(unlabeled)), None)
    classes = class_names(root / "train")
    train = _labeled_files(root / "train", classes)
    if (root / "unlabeled").is_dir() and not unlabeled:
        raise ValueError(
            f"{root / 'unlabeled'} holds no image ({', '.join(IMG_EXTENSIONS)}); put images in or remove it"
        )
    train.add(unlabeled, UNKNOWN)
    tests = [root / name for name in TESTS if (root / name).is_dir()]
    return Listing(classes, train, _labeled_files(tests[0], classes) if tests else None)


def _rows(table: Path) -> list[tuple[str, str, str]]:
    """Read and check path, label and split of each line of the table; the files may be missing."""
    with table.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, restval="")
        names = [name.strip() for name in reader.fieldnames or ()]
        if names not in (["path", "label"], ["path", "label", "split"]):
            raise ValueError(f"{table}: the first line must be path,label or path,label,split")
        reader.fieldnames = names
        rows = []
        for entry in reader:
            path, label, split = (
                entry.get(name, "").strip() for name in ("path", "label", "split")
            )
            if None in entry or not path or split not in ("", "train", *TESTS):
                raise ValueError(
                    f"{table}, line {reader.line_num}: needs a path, a label or nothing, and where there is "
                    "a third column train, test, val or nothing"
                )
            if split in TESTS and not label:
                raise ValueError(
                    f"{table}, line {reader.line_num}: the test image {path} has no label"
                )
            rows.append((os.path.normpath(path), label, split or "train"))
    return rows


def _check_paths(table: Path, rows: list[tuple[str, str, str]], found: set[str]) -> None:
    listed = [path for path, _, _ in rows]
    missing = [path for path in listed if path not in found]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(rows)} paths in {table} are not images below {table.parent}, such as "
            f"{missing[0]}; write paths relative to that folder"
        )
    twice = [path for path, count in Counter(listed).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} is in {table} more than once; keep one line")


def _from_table(root: Path) -> Listing:
    table = root / TABLE
    rows = _rows(table)
    found = {os.path.relpath(path, root) for path in image_files(root)}
    _check_paths(table, rows, found)
    classes = tuple(sorted({label for _, label, split in rows if split == "train" and label}))
    if not classes:
        raise ValueError(f"{table} labels no training image")
    only_tested = {label for _, label, split in rows if split != "train"} - set(classes)
    if only_tested:
        raise ValueError(f"class {min(only_tested)!r} in {table} has no training image")
    unlisted = found - {path for path, _, _ in rows}
    if unlisted:
        warnings.warn(
            f"{len(unlisted)} images below {root} are not in {TABLE}, such as {min(unlisted)}: they become "
            "training images without a label",
            stacklevel=2,
        )
    splits = {split: Files() for split in ("train", *TESTS)}
    for path, label, split in sorted(rows, key=lambda row: (row[1] == "", row[1], row[0])):
        splits[split].add([str(root / path)], classes.index(label) if label else UNKNOWN)
    splits["train"].add((str(root / path) for path in sorted(unlisted)), UNKNOWN)
    tests = [splits[name] for name in TESTS if splits[name].paths]
    return Listing(classes, splits["train"], tests[0] if tests else None)


def list_folder(root: Path) -> Listing:
    """List the files of the user's data set, by its table if there is one, else by its folders.

    Raises:
        ValueError: if something is missing, empty or contradictory, or only test images have a class.
    """
    return _from_table(root) if (root / TABLE).is_file() else _from_folders(root)
