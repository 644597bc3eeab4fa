"""Lists of images to label, such as `chosen.csv`: the most useful image first. --num-labeled takes them."""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from datasets.images import UNKNOWN, DataSet
from lib.files.atomic import write_whole
from lib.labels.table import as_csv, csv_meta, csv_rows, number, read_text

COLUMNS = ("index", "path", "rank")
AGAIN = "give the images that it was made for, or choose anew with scripts/choose.py"


class Images(Protocol):
    """What tells images from others: a `DataSet` or a `FeatureSet`. All of it may be empty."""

    @property
    def digest(self) -> str: ...
    @property
    def paths(self) -> tuple[str, ...]: ...
    @property
    def classes(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Chosen:
    """A list of images, most useful first."""

    indexes: Tensor  # L, into the training images
    paths: tuple[str, ...]  # of these images; empty where they are not known
    meta: Mapping[str, Any]  # record of what made it


def write(path: str | Path, indexes: Tensor, paths: Sequence[str], meta: Mapping[str, Any]) -> None:
    """Write a list with the columns `COLUMNS`. `paths`, those of all training images, may be empty."""
    rows = (
        (index, paths[index] if paths else "", rank)
        for rank, index in enumerate(indexes.tolist(), start=1)
    )
    write_whole(as_csv(COLUMNS, rows, meta), Path(path))


def read(path: str | Path) -> Chosen:
    """Read a list that `write` or another tool wrote: rows in any order, with or without paths and ranks.

    Raises:
        ValueError: if it cannot be used, naming the file and each line that is wrong or what is missing.
    """
    text = read_text(path)
    try:
        rows = csv_rows(text, COLUMNS[:1], _row)
        if not rows:
            raise ValueError("it names no image")
        rows.sort(key=lambda row: row[2])
        indexes = [index for index, _, _ in rows]
        twice = [index for index, count in Counter(indexes).items() if count > 1]
        if min(indexes) < 0:
            raise ValueError(f"the index {min(indexes)} is negative")
        if twice:
            raise ValueError(f"the index {twice[0]} is there twice; keep one line")
        paths = tuple(path for _, path, _ in rows)
        known = paths if all(paths) else ()
        return Chosen(torch.tensor(indexes, dtype=torch.int64), known, csv_meta(text)[0])
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: {error}") from error


def find(path: str | Path, num_images: int, images: Images | None = None) -> Tensor:
    """Find the images of a list in a data set, and return their indexes there, most useful first.

    Where files are known their names count, because an image that gets a label may move to another index.

    Raises:
        ValueError: as `read`, or if it is a list of other images.
    """
    chosen, names = read(path), images.paths if images else ()
    if chosen.paths and names:
        places = {_in_table(name): place for place, name in enumerate(names)}
        missing = [name for name in chosen.paths if name not in places]
        if missing:
            raise ValueError(
                f"{path}: {len(missing)} of its {len(chosen.paths)} images are not in this data set, such "
                f"as {missing[0]}; {AGAIN}"
            )
        return torch.tensor([places[name] for name in chosen.paths])
    made, own = chosen.meta.get("data_digest", ""), images.digest if images else ""
    if made and own and made != own:
        raise ValueError(
            f"{path}: chosen among other images (digest {made}, these have {own}); {AGAIN}"
        )
    if int(chosen.indexes.max()) >= num_images:
        raise ValueError(
            f"{path}: index {int(chosen.indexes.max())} among {num_images} images; {AGAIN}"
        )
    return chosen.indexes


def table_to_fill_in(chosen: Tensor, train: DataSet, test: DataSet | None) -> bytes:
    """Make the `labels.csv` of a folder of images (`datasets/listing.py`), the `chosen` images first.

    Their column label is empty where no label is known. The other known labels and the test images follow, so
    that the table loses nothing where it replaces class folders or an earlier table.
    """
    names, targets = (*train.classes, ""), train.targets  # UNKNOWN is -1
    known = targets != UNKNOWN
    known[chosen] = False
    order = torch.cat([chosen, known.nonzero()[:, 0]]).tolist()
    rows = [(train.paths[index], names[targets[index]], "train") for index in order]
    if test is None:
        return as_csv(("path", "label"), (row[:2] for row in rows))
    labels = (test.classes[label] for label in test.targets.tolist())
    rows += [(path, label, "test") for path, label in zip(test.paths, labels, strict=True)]
    return as_csv(("path", "label", "split"), rows)


def _in_table(name: str) -> str:
    """Return a file name as a table holds it: it need not be UTF-8, but the table is."""
    return name.encode(errors="backslashreplace").decode()


def _row(line: Mapping[str, str | None]) -> tuple[int, str, int]:
    rank = line.get("rank") or "0"
    index = number(int, line["index"] or "", "index")
    return index, line.get("path") or "", number(int, rank, "rank")
