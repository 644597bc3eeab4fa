"""Pseudo-labels as a CSV table, which every other tool reads."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from lib.files.atomic import write_whole
from lib.files.published import class_names
from lib.labels.pseudo_labels import PseudoLabels, listed

T = TypeVar("T")
# Index, label and confidence: a labeled image has no confidence, one without any label has no label.
Row = tuple[int, int | None, float | None]
COLUMNS = ("index", "path", "label", "confidence")
CSV_META = "# meta "  # starts a first line that readers of CSV take for a comment


def to_csv(pseudo: PseudoLabels, path: str | Path, *, paths: Sequence[str] = ()) -> None:
    """Write pseudo-labels as a table with the columns `COLUMNS`, most confident first.

    Labels are class names where `meta` has them and no two are the same, else numbers. A labeled image has
    no confidence; an image that got no pseudo-label has no label and the confidence 0. `meta` stands in a
    first line that starts with #. `from_csv` brings back everything but the probabilities and the order of
    `unlabeled`. `paths`, the files of all training images, fill the column path; too few are a ValueError.
    """
    names = _table_names(pseudo.meta)
    values = (pseudo.indexes.tolist(), pseudo.labels.tolist(), pseudo.confidence.tolist())
    rows = [  # nine digits give a float32 back exactly
        (index, names[label] if names else label, f"{confidence:.9g}")
        for index, label, confidence in zip(*values, strict=True)
    ]
    rest = pseudo.unlabeled[~torch.isin(pseudo.unlabeled, pseudo.indexes)]
    rows += [(index, "", "0") for index in rest.tolist()]
    rows += [(index, "", "") for index in pseudo.labeled.tolist()]
    last = max((index for index, _, _ in rows), default=0)
    if paths and last >= len(paths):
        raise ValueError(f"{len(paths)} paths for the image with index {last}")
    lines = ((index, paths[index] if paths else "", *more) for index, *more in rows)
    write_whole(as_csv(COLUMNS, lines, pseudo.meta), Path(path))


def from_csv(path: str | Path) -> PseudoLabels:
    """Read a table that `to_csv` or another tool wrote: rows in any order, with or without paths.

    Raises:
        ValueError: if it cannot be used, naming the file and each line that is wrong or what is missing.
    """
    text = read_text(path)
    try:
        meta = csv_meta(text)[0]
        numbers = {name: number for number, name in enumerate(_table_names(meta))}
        rows = csv_rows(
            text, ("index", "label", "confidence"), lambda line: _csv_row(line, numbers)
        )
        labeled = [index for index, _, confidence in rows if confidence is None]
        rest = [index for index, label, weight in rows if label is None and weight is not None]
        given = sorted((row for row in rows if row[1] is not None), key=lambda row: -row[2])
        indexes = [index for index, _, _ in given]
        return PseudoLabels(
            torch.tensor(indexes, dtype=torch.int64),
            torch.tensor([label for _, label, _ in given], dtype=torch.int64),
            torch.tensor([confidence for _, _, confidence in given], dtype=torch.float32),
            torch.tensor(labeled, dtype=torch.int64),
            torch.tensor(indexes + rest, dtype=torch.int64),
            meta=meta,
        )
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: {error}") from error


def _table_names(meta: Mapping[str, Any]) -> list[str]:
    """Return the class names of a record, or [] where two classes share one and a name is no number."""
    names = class_names(meta)
    return names if len(set(names)) == len(names) else []


def as_csv(
    columns: Sequence[str], rows: Iterable[Sequence[object]], meta: Mapping[str, Any] | None = None
) -> bytes:
    """Write a table as CSV. A record `meta` stands in a first line that starts with #."""
    buffer = io.StringIO()
    if meta:
        buffer.write(CSV_META + json.dumps(dict(meta), default=str) + "\n")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    # The name of an image need not be UTF-8, but the table is.
    return buffer.getvalue().encode(errors="backslashreplace")


def read_text(path: str | Path) -> str:
    """Read a table as text; ValueError if there is none or it is not text."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # spreadsheets put a mark first
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a table: {error}") from error


def csv_meta(text: str) -> tuple[dict[str, Any], str]:
    """Split a table into the record in its first line, {} where there is none, and the rest."""
    if not text.startswith("#"):
        return {}, text
    line, _, table = text.partition("\n")
    if not line.startswith(CSV_META):
        return {}, table
    try:
        meta = json.loads(line.removeprefix(CSV_META))
    except json.JSONDecodeError as error:
        raise ValueError(f"the record in its first line is damaged ({error})") from error
    if not isinstance(meta, dict):
        raise ValueError("the record in its first line does not hold names and values")
    return meta, table


def csv_rows(
    text: str, needed: Sequence[str], parse: Callable[[Mapping[str, str | None]], T]
) -> list[T]:
    """Parse the rows of a table, which has the columns `needed`; one ValueError lists all that are wrong."""
    table = csv_meta(text)[1]
    first_line = text.count("\n") - table.count("\n")
    reader = csv.DictReader(io.StringIO(table))
    lacking = [name for name in needed if name not in (reader.fieldnames or ())]
    if lacking:
        raise ValueError(f"it has no column {', '.join(lacking)}; expected: {','.join(needed)}")
    rows, wrong = [], []
    for line in reader:
        try:
            rows.append(parse(line))
        except ValueError as error:
            wrong.append(f"line {reader.line_num + first_line}: {error}")
    if wrong:
        raise ValueError(f"{len(wrong)} lines cannot be understood: {listed(wrong)}")
    return rows


def _csv_row(line: Mapping[str, str | None], numbers: Mapping[str, int]) -> Row:
    index, label, confidence = (line[name] or "" for name in ("index", "label", "confidence"))
    place = number(int, index, "index")
    if not confidence:
        return place, None, None
    weight = number(float, confidence, "confidence")
    if not label:
        if weight:
            raise ValueError(f"there is a confidence {confidence} but no label")
        return place, None, weight
    if not numbers:
        return place, number(int, label, "label"), weight
    if label not in numbers:
        raise ValueError(f"{label!r} is not among the classes in the first line")
    return place, numbers[label], weight


def number(kind: Callable[[str], Any], text: str, what: str) -> Any:
    """Read a number of a table; the ValueError names `what` it should be."""
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"the {what} {text!r} is not a number") from None
