"""Pseudo-labels: what phase 2 writes and phase 3 reads, checked whenever one is made, saved or loaded.

The file has the published keys: `pseudo_indexes`, `pseudo_labels` (int64, U), `pseudo_probs` (float32,
U x C), `pseudo_weights` (float32, U: the confidence), `labeled_indexes`, `unlabeled_indexes` (int64);
and `meta`, which is ours. The `pseudo_*` arrays are sorted by falling confidence.

Between such a file and a table that every other tool reads:

    python -m lib.labels.pseudo_labels export checkpoint/pseudos/mine/250.pth.tar 250.csv
    python -m lib.labels.pseudo_labels import 250.csv checkpoint/pseudos/mine/250.pth.tar

The columns are index (into the training set), path, label (a class name where the file knows them, else a
number) and confidence. The images whose true labels were used have a row without confidence.
"""

import argparse
import csv
import io
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from datasets import build_datasets
from lib.cli import options
from lib.files import checkpoint
from lib.files.atomic import write_whole
from lib.labels.split import Split

SLACK = 1e-4  # rounding of float32 probabilities
EPSILON = 1e-9  # rounding of a ratio times a count: 0.29 * 100 is 28.999999999999996
SUFFIX = ".pth.tar"
CHUNK = re.compile(r"(\d+)_(\d+)\.pth\.tar")  # number of chunks, number of this one
SHOWN = 6  # names in a message
TILE = (
    2**24
)  # probabilities at a time, 64 MB: those of a million images and a thousand classes are 5 GB
TOP = 5  # classes of each image that stay where its probabilities do not
COLUMNS = ("index", "path", "label", "confidence")
CSV_META = "# meta "  # starts a first line that readers of CSV take for a comment


def _index_problems(name: str, indexes: Tensor) -> list[str]:
    if not isinstance(indexes, Tensor) or indexes.dtype != torch.int64 or indexes.ndim != 1:
        return [f"{name} is no int64 vector"]
    problems = []
    if len(indexes) and int(indexes.min()) < 0:
        problems.append(f"{name} holds the negative index {int(indexes.min())}")
    if len(torch.unique(indexes)) != len(indexes):
        problems.append(f"{name} holds an index twice")
    return problems


def differing_classes(theirs: Sequence[str], ours: Sequence[str]) -> str:
    """The first class numbers that stand for something else, `number theirs / ours`; - for none."""
    pairs = enumerate(itertools.zip_longest(theirs, ours, fillvalue="-"))
    different = [f"{number} {a} / {b}" for number, (a, b) in pairs if a != b]
    return listed(different) + " (number, theirs / this data set's)"


def class_names(meta: Mapping[str, Any]) -> list[str]:
    """The class names that a record knows, empty where it knows none.

    Raises:
        ValueError: if what stands there is no list of names.
    """
    names = meta.get("classes") or []
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError("the classes in meta are no list of names")
    return list(names)


def _table_names(meta: Mapping[str, Any]) -> list[str]:
    """The class names that stand for one number each, for a table; empty where two classes share one."""
    names = class_names(meta)
    return names if len(set(names)) == len(names) else []


def listed(names: Sequence[str]) -> str:
    """Names for a message, no more than a line of them."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class PseudoLabels:
    """Labels for unlabeled images, most confident first.

    Attributes:
        indexes: U, into the training set.
        labels: U class numbers.
        confidence: U, in [0, 1], falling.
        labeled: L indexes of the images whose true labels were used.
        unlabeled: indexes of the images to label.
        probabilities: U x C, or None (the published ImageNet files have none).
        meta: what made them.
        top_classes: U x min(5, C) class numbers, the most probable first, int32; None where they come from
            a file, which does not hold them.

    Raises:
        ValueError: listing every problem, on construction.
    """

    indexes: Tensor
    labels: Tensor
    confidence: Tensor
    labeled: Tensor
    unlabeled: Tensor
    probabilities: Tensor | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    top_classes: Tensor | None = None

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise ValueError("these pseudo-labels are not usable: " + "; ".join(problems))

    def problems(self) -> list[str]:
        """What is wrong with them in themselves, one sentence each; empty if nothing is."""
        found = _index_problems("pseudo_indexes", self.indexes)
        found += _index_problems("labeled_indexes", self.labeled)
        found += _index_problems("unlabeled_indexes", self.unlabeled)
        if found:
            return found
        if torch.isin(self.indexes, self.labeled).any():
            found.append("an image is both labeled and pseudo-labeled")
        if not torch.isin(self.indexes, self.unlabeled).all():
            found.append("a pseudo-labeled image is not among unlabeled_indexes")
        found += self._meta_problems()
        labels = self._label_problems()
        found += labels + self._confidence_problems()
        return found if labels else found + self._probability_problems()

    def _meta_problems(self) -> list[str]:
        if not isinstance(self.meta, Mapping):
            return [f"meta is a {type(self.meta).__name__}, not a record of names and values"]
        try:
            known = class_names(self.meta)
        except ValueError as error:
            return [str(error)]
        most = int(self.labels.max()) if self.labels.numel() else 0
        return [f"the label {most} of {len(known)} class names"] if 0 < len(known) <= most else []

    def _label_problems(self) -> list[str]:
        labels = self.labels
        if labels.dtype != torch.int64 or labels.shape != self.indexes.shape:
            return [
                f"pseudo_labels of shape {tuple(labels.shape)} and type {labels.dtype} for "
                f"{len(self.indexes)} indexes; int64 is expected"
            ]
        if len(labels) and int(labels.min()) < 0:
            return [f"the label {int(labels.min())} is negative"]
        return []

    def _confidence_problems(self) -> list[str]:
        weights = self.confidence
        if not weights.is_floating_point() or weights.shape != self.indexes.shape:
            return [
                f"pseudo_weights of shape {tuple(weights.shape)} and type {weights.dtype} for "
                f"{len(self.indexes)} indexes; floats are expected"
            ]
        if not torch.isfinite(weights).all():
            return ["pseudo_weights hold NaN or infinity"]
        if len(weights) and (weights.min() < -SLACK or weights.max() > 1 + SLACK):
            return ["pseudo_weights leave [0, 1]"]
        # against all before, not the one before: small steps add up to a ranking upside down
        if len(weights) and (weights - weights.cummin(0).values > SLACK).any():
            return ["pseudo_weights do not fall"]
        return []

    def _probability_problems(self) -> list[str]:
        """Of `probabilities`, beside `labels` that are fine."""
        probs = self.probabilities
        if probs is None:
            return []
        if probs.ndim != 2 or len(probs) != len(self.indexes) or not probs.is_floating_point():
            return [f"pseudo_probs of shape {tuple(probs.shape)} for {len(self.indexes)} indexes"]
        if not torch.isfinite(probs).all() or (probs < -SLACK).any():
            return ["pseudo_probs hold NaN, infinity or negative values"]
        if ((probs.sum(dim=1) - 1).abs() > 10 * SLACK).any():
            return ["rows of pseudo_probs do not sum to 1"]
        if len(self.labels) and int(self.labels.max()) >= probs.shape[1]:
            return [
                f"label {int(self.labels.max())} is out of range for {probs.shape[1]} probabilities"
            ]
        own = probs.gather(1, self.labels[:, None])[:, 0]
        if (probs.amax(dim=1) - own > SLACK).any():
            return ["a label is not the most probable one of its row"]
        return []

    def require_fit(
        self,
        num_images: int,
        num_classes: int,
        num_labeled: int,
        digest: str = "",
        classes: Sequence[str] = (),
    ) -> None:
        """Check them against a data set and the number of labels asked for.

        Args:
            num_images, num_classes, digest, classes: of the data set; the last two are compared where
                they are recorded.
            num_labeled: labeled images that the pseudo-labels must have been made with.

        Raises:
            ValueError: listing every problem.
        """
        problems = []
        everything = torch.cat([self.indexes, self.labeled, self.unlabeled])
        if len(everything) and int(everything.max()) >= num_images:
            problems.append(f"index {int(everything.max())} in a data set of {num_images} images")
        if len(self.labels) and int(self.labels.max()) >= num_classes:
            problems.append(
                f"label {int(self.labels.max())} in a data set of {num_classes} classes"
            )
        if self.probabilities is not None and self.probabilities.shape[1] != num_classes:
            problems.append(
                f"{self.probabilities.shape[1]} probabilities for {num_classes} classes"
            )
        if len(self.labeled) != num_labeled:
            problems.append(
                f"made with {len(self.labeled)} labeled images, but --num-labeled asks for {num_labeled}"
            )
        recorded = self.meta.get("data_digest", "")
        if recorded and digest and recorded != digest:
            problems.append(f"made for another data set (digest {recorded}, this one has {digest})")
        names = class_names(self.meta)
        if names and classes and names != list(classes):
            problems.append(f"made for other classes: {differing_classes(names, classes)}")
        if problems:
            raise ValueError("; ".join(problems))

    def select(self, ratio: float, *, class_balanced: bool = False) -> Tensor:
        """Positions of the most confident share, in the order of the file.

        Args:
            ratio: share to take, 0 to 1, rounded down.
            class_balanced: take this share of each pseudo-class instead of the whole ranking, rounded
                up, so that no class is left out. The most confident labels crowd into few classes;
                training on those alone forgets the others.

        Raises:
            ValueError: for a ratio outside of [0, 1].
        """
        if not 0 <= ratio <= 1:
            raise ValueError(f"pseudo ratio {ratio}: must lie in [0, 1]")
        if not class_balanced:
            return torch.arange(math.floor(ratio * len(self.indexes) + EPSILON))
        # rank of each image within its own class; stable, so that confidence still decides
        rank = torch.empty_like(self.labels)
        size = torch.bincount(self.labels)
        for label in range(len(size)):
            members = (self.labels == label).nonzero()[:, 0]
            rank[members] = torch.arange(len(members))
        quota = torch.ceil(ratio * size.double() - EPSILON)
        return (rank < quota[self.labels]).nonzero()[:, 0]

    def state(self) -> dict[str, Any]:
        """The published keys, and `meta`."""
        entries = {
            "pseudo_indexes": self.indexes,
            "pseudo_labels": self.labels,
            "pseudo_weights": self.confidence,
            "labeled_indexes": self.labeled,
            "unlabeled_indexes": self.unlabeled,
            "meta": dict(self.meta),
        }
        if self.probabilities is not None:
            entries["pseudo_probs"] = self.probabilities
        return entries


def save(pseudo: PseudoLabels, path: str | Path) -> None:
    """Write a pseudo-label file."""
    checkpoint.save(pseudo.state(), path)


def load(path: str | Path) -> PseudoLabels:
    """Read a pseudo-label file, ours or a published one.

    Where there are no `pseudo_weights` (the published kNN files), the largest probability is the
    confidence.

    Raises:
        ValueError: naming the file and everything that is wrong with it.
    """
    keys = ("pseudo_indexes", "pseudo_labels", "labeled_indexes", "unlabeled_indexes")
    state = checkpoint.load_dict(path, *keys)
    probs, weights = state.get("pseudo_probs"), state.get("pseudo_weights")
    if probs is None and weights is None:
        raise ValueError(f"{path} has neither pseudo_weights nor pseudo_probs")
    kinds = [key for key in (*keys, "pseudo_probs", "pseudo_weights") if key in state]
    wrong = [
        key
        for key in kinds
        if not isinstance(state[key], Tensor) or state[key].layout != torch.strided
    ]
    if wrong:
        raise ValueError(f"{path}: {', '.join(wrong)} must be dense tensors")
    if weights is None:
        weights = probs.amax(dim=1) if probs.ndim == 2 and probs.shape[1] else probs
    try:
        return PseudoLabels(
            state["pseudo_indexes"],
            state["pseudo_labels"],
            weights,
            state["labeled_indexes"],
            state["unlabeled_indexes"],
            probs,
            state.get("meta", {}),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_chunks(folder: str | Path) -> list[PseudoLabels]:
    """Read a folder of chunks, `n_0.pth.tar` ... `n_<n-1>.pth.tar`, in the order of their numbers.

    Raises:
        ValueError: if the folder does not hold the whole of one set and no other, listing the files that
            are missing and those that do not belong; if one of them is unusable; or if they were made
            with different labeled images or data sets.
    """
    files = _chunk_files(Path(folder))
    parts = [load(file) for file in files]
    checks = {
        "other labeled images": _sorted_labeled,
        "another data set": lambda p: p.meta.get("data_digest", ""),
    }
    problems = []
    for what, value in checks.items():
        first = value(parts[0])
        others = [f.name for f, part in zip(files, parts, strict=True) if value(part) != first]
        if others:
            problems.append(f"{listed(others)} made with {what} than {files[0].name}")
    if problems:
        raise ValueError(f"{folder} is no one set of chunks: {'; '.join(problems)}")
    return parts


def _sorted_labeled(pseudo: PseudoLabels) -> list[int]:
    return pseudo.labeled.sort().values.tolist()


def _chunk_files(folder: Path) -> list[Path]:
    """The files of the set of chunks that a folder holds; anything but .pth.tar may lie beside them."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is no folder; give one with chunks 10_0.pth.tar ... 10_9.pth.tar"
        )
    names = sorted(p.name for p in folder.iterdir() if p.name.endswith(SUFFIX))
    sizes = Counter(int(match[1]) for name in names if (match := CHUNK.fullmatch(name)))
    if not sizes:
        raise ValueError(
            f"{folder} holds no chunks such as 10_0.pth.tar; its files are: {listed(names) or 'none'}"
        )
    size = sizes.most_common(1)[0][0]
    foreign = [name for name in names if not _belongs(name, size)]
    wanted = (f"{size}_{number}{SUFFIX}" for number in range(size))  # lazy: a name can say 10^9
    missing = list(itertools.islice((n for n in wanted if n not in names), SHOWN))
    problems = []
    if missing:
        count = size - (len(names) - len(foreign))
        problems.append(f"{count} missing ({', '.join(missing)}{' ...' * (count > SHOWN)})")
    if foreign:
        problems.append(f"{len(foreign)} that do not belong to it ({listed(foreign)})")
    if problems:
        raise ValueError(
            f"{folder} must hold the {size} chunks of one set and no other {SUFFIX}: "
            + " and ".join(problems)
        )
    return [folder / f"{size}_{number}{SUFFIX}" for number in range(size)]


def _belongs(name: str, size: int) -> bool:
    """Whether a file is named as one of the `size` chunks of a set."""
    match = CHUNK.fullmatch(name)
    number = int(match[2]) if match else size
    return number < size and name == f"{size}_{number}{SUFFIX}"


def reindexed(pseudo: PseudoLabels, members: Tensor) -> PseudoLabels:
    """Pseudo-labels of a subset of a data set as those of the whole.

    Args:
        pseudo: with indexes that count `members`.
        members: indexes into the whole data set.
    """
    return replace(
        pseudo,
        indexes=members[pseudo.indexes],
        labeled=members[pseudo.labeled],
        unlabeled=members[pseudo.unlabeled],
    )


def merged(parts: Sequence[PseudoLabels]) -> PseudoLabels:
    """Chunks with one set of labeled images as one ranking by confidence.

    Raises:
        ValueError: if the labeled images differ, or an image is in two of them.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if any(_sorted_labeled(part) != _sorted_labeled(first) for part in parts):
        raise ValueError("these chunks belong to different sets of labeled images")
    confidence = torch.cat([part.confidence for part in parts])
    order = confidence.argsort(descending=True, stable=True)
    probabilities = None
    if all(part.probabilities is not None for part in parts):
        probabilities = torch.cat([part.probabilities for part in parts])[order]
    return PseudoLabels(
        torch.cat([part.indexes for part in parts])[order],
        torch.cat([part.labels for part in parts])[order],
        confidence[order],
        first.labeled,
        torch.cat([part.unlabeled for part in parts]),
        probabilities,
        first.meta,
    )


def _build(
    scores: Tensor,
    split: Split,
    meta: Mapping[str, Any] | None,
    weigh: Callable[[Tensor], Tensor],
    as_probabilities: Callable[[Tensor], Tensor] | None,
) -> PseudoLabels:
    """The unlabeled images ranked by confidence, `TILE` numbers at a time.

    Args:
        scores: N x C, the higher the more likely.
        weigh: rows of scores -> their confidence.
        as_probabilities: rows of scores -> their probabilities; None leaves these out.
    """
    count, num_classes = len(split.unlabeled), scores.shape[1]
    height = max(1, TILE // num_classes)
    tiles = [slice(start, start + height) for start in range(0, count, height)]
    confidence = scores.new_empty(count)
    top_classes = torch.empty(count, min(TOP, num_classes), dtype=torch.int32)
    labels = torch.empty_like(split.unlabeled)
    for tile in tiles:
        rows = scores[split.unlabeled[tile]]
        confidence[tile], labels[tile] = weigh(rows), rows.argmax(dim=1)
        top_classes[tile] = rows.topk(top_classes.shape[1], dim=1).indices
    order = confidence.argsort(descending=True, stable=True)
    indexes, probabilities = split.unlabeled[order], None
    if as_probabilities is not None:
        probabilities = scores.new_empty(count, num_classes)
        for tile in tiles:  # made anew in their order: sorting them would take a second copy
            probabilities[tile] = as_probabilities(scores[indexes[tile]])
    return PseudoLabels(
        indexes,
        labels[order],
        confidence[order],
        split.labeled,
        split.unlabeled,
        probabilities,
        meta or {},
        top_classes[order],
    )


def margin_confidence(probabilities: Tensor) -> Tensor:
    """1 - p2 / p1 of the two largest probabilities of each row: N, in [0, 1].

    Of p = softmax(z / T) this is 1 - exp(-(z1 - z2) / T), the published confidence of the normalized cut.
    """
    first, second = probabilities.topk(2, dim=1).values.unbind(1)
    return 1 - second / first


def entropy_confidence(probabilities: Tensor) -> Tensor:
    """1 - H(p) / log C of each row (Iscen et al. 2019, "Label propagation for deep semi-supervised
    learning", eq. 11): N, in [0, 1]; 1 for a certain row, 0 for a uniform one.

    Args:
        probabilities: N x C, C at least 2.
    """
    entropy = torch.special.entr(probabilities).sum(dim=1)
    return (1 - entropy / math.log(probabilities.shape[1])).clamp(0, 1)


def largest_confidence(probabilities: Tensor) -> Tensor:
    """The largest probability of each row, the published confidence of nearest neighbors: N."""
    return probabilities.amax(dim=1)


CONFIDENCES = {
    "margin": margin_confidence,
    "entropy": entropy_confidence,
    "largest": largest_confidence,
}


def _confidence(name: str) -> Callable[[Tensor], Tensor]:
    if name not in CONFIDENCES:
        raise ValueError(f"unknown confidence {name!r}: take one of {', '.join(CONFIDENCES)}")
    return CONFIDENCES[name]


def from_probabilities(
    probabilities: Tensor,
    split: Split,
    meta: Mapping[str, Any] | None = None,
    *,
    confidence: str = "largest",
) -> PseudoLabels:
    """Pseudo-labels from N x C probabilities (nearest neighbors).

    Args:
        confidence: a key of `CONFIDENCES`; published: the largest probability of each row.

    Raises:
        ValueError: for an unknown confidence.
    """
    return _build(probabilities, split, meta, _confidence(confidence), lambda rows: rows)


def from_scores(
    scores: Tensor,
    split: Split,
    meta: Mapping[str, Any] | None = None,
    *,
    temperature: float = 1.0,
    confidence: str = "margin",
    probabilities: bool = True,
) -> PseudoLabels:
    """Pseudo-labels from N x C scores (normalized cut).

    Probabilities are softmax(z / T), and confidence is made with the same temperature.

    Args:
        temperature: T.
        confidence: a key of `CONFIDENCES`; published: 1 - exp(-(z1 - z2) / T) with the two largest
            scores of a row.
        probabilities: False leaves them out, which saves as much memory as the scores take.

    Raises:
        ValueError: for a temperature that is not positive, or an unknown confidence.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}: must be positive")
    measure = _confidence(confidence)

    def as_probabilities(rows: Tensor) -> Tensor:
        return (rows / temperature).softmax(dim=1)

    def weigh(rows: Tensor) -> Tensor:
        if confidence != "margin":
            return measure(as_probabilities(rows))
        # of the scores: exact where probabilities are rounded to 1 or 0
        first, second = rows.topk(2, dim=1).values.unbind(1)
        return -torch.expm1(-(first - second) / temperature)

    return _build(scores, split, meta, weigh, as_probabilities if probabilities else None)


def to_csv(pseudo: PseudoLabels, path: str | Path, *, paths: Sequence[str] = ()) -> None:
    """Write pseudo-labels as a table with the columns `COLUMNS`, most confident first.

    Labels are class names where `meta` records them and no two are the same, else numbers. An image that
    is labeled has no confidence, one that got no pseudo-label has no label and the confidence 0. A first
    line that starts with # holds `meta`. Probabilities and the order of `unlabeled` are not kept; all
    else comes back by `from_csv`.

    Args:
        paths: file of each image of the training set, for the column path; none: empty.

    Raises:
        ValueError: if it cannot be written, or the paths are fewer than the images.
    """
    names = _table_names(pseudo.meta)
    places = pseudo.indexes.tolist()
    labels = [str(names[label] if names else label) for label in pseudo.labels.tolist()]
    confidence = [f"{value:.9g}" for value in pseudo.confidence.tolist()]  # all of a float32
    rest = pseudo.unlabeled[~torch.isin(pseudo.unlabeled, pseudo.indexes)].tolist()
    places += rest + pseudo.labeled.tolist()
    labels += [""] * (len(places) - len(labels))
    confidence += ["0"] * len(rest) + [""] * len(pseudo.labeled)
    if paths and max(places, default=0) >= len(paths):
        raise ValueError(f"{len(paths)} paths for the image with index {max(places)}")
    buffer = io.StringIO()
    if pseudo.meta:
        buffer.write(CSV_META + json.dumps(dict(pseudo.meta), default=str) + "\n")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    files = [paths[place] for place in places] if paths else [""] * len(places)
    writer.writerows(zip(places, files, labels, confidence, strict=True))
    try:
        # a file name need not be UTF-8, the table is
        write_whole(buffer.getvalue().encode(errors="backslashreplace"), Path(path))
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error


def from_csv(path: str | Path) -> PseudoLabels:
    """Read a table as `to_csv` writes it, or another tool: in any order, with or without paths.

    Raises:
        ValueError: naming the file, and the lines that are wrong or what the whole lacks.
    """
    try:
        text = Path(path).read_text(
            encoding="utf-8-sig"
        )  # with the mark that spreadsheets put first
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a table: {error}") from error
    try:
        meta, table = _csv_meta(text)
        rows = _csv_rows(table, _table_names(meta), first_line=text.count("\n") - table.count("\n"))
        labeled = [row.index for row in rows if row.confidence is None]
        given = [row for row in rows if row.confidence is not None and row.label is not None]
        given.sort(key=lambda row: -row.confidence)
        rest = [row.index for row in rows if row.confidence is not None and row.label is None]
        indexes = [row.index for row in given]
        return PseudoLabels(
            torch.tensor(indexes, dtype=torch.int64),
            torch.tensor([row.label for row in given], dtype=torch.int64),
            torch.tensor([row.confidence for row in given], dtype=torch.float32),
            torch.tensor(labeled, dtype=torch.int64),
            torch.tensor(indexes + rest, dtype=torch.int64),
            meta=meta,
        )
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: {error}") from error


class _Row(NamedTuple):
    """A line of a table: pseudo-labeled; without label: not; without confidence: labeled."""

    index: int
    label: int | None
    confidence: float | None


def _csv_meta(text: str) -> tuple[dict[str, Any], str]:
    """The record in a first line that starts with #, if there is one, and the lines behind it."""
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
        raise ValueError("the record in its first line is none of names and values")
    return meta, table


def _csv_rows(table: str, classes: Sequence[str], *, first_line: int) -> list[_Row]:
    """The lines of a table without its record, all that are wrong in one ValueError."""
    reader = csv.DictReader(io.StringIO(table))
    lacking = [name for name in COLUMNS if name not in (reader.fieldnames or ()) and name != "path"]
    if lacking:
        raise ValueError(f"it has no column {', '.join(lacking)}; expected: {','.join(COLUMNS)}")
    numbers = {name: number for number, name in enumerate(classes)}
    rows, wrong = [], []
    for line in reader:
        try:
            rows.append(_csv_row(line, numbers))
        except ValueError as error:
            wrong.append(f"line {reader.line_num + first_line}: {error}")
    if wrong:
        raise ValueError(f"{len(wrong)} lines cannot be understood: {listed(wrong)}")
    return rows


def _csv_row(line: Mapping[str, str | None], numbers: Mapping[str, int]) -> _Row:
    index, label, confidence = (line[name] or "" for name in ("index", "label", "confidence"))
    place = _number(int, index, "index")
    if not confidence:
        return _Row(place, None, None)
    weight = _number(float, confidence, "confidence")
    if not label:
        if weight:
            raise ValueError(f"the confidence {confidence} of no label")
        return _Row(place, None, weight)
    if not numbers:
        return _Row(place, _number(int, label, "label"), weight)
    if label not in numbers:
        raise ValueError(f"{label!r} is none of the classes in the first line")
    return _Row(place, numbers[label], weight)


def _number(kind: Callable[[str], Any], text: str, what: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"the {what} {text!r} is no number") from None


def build_parser() -> argparse.ArgumentParser:
    parser = options.parser(__doc__)
    parser.add_argument("action", choices=("export", "import"), help="to or from a table")
    parser.add_argument("source", metavar="IN", help="export: .pth.tar; import: .csv")
    parser.add_argument("target", metavar="OUT", help="file to write")
    parser.add_argument(
        "--data-dir",
        default="",
        metavar="DIR",
        help="export: the folder data set (DIR/train/<class>/* ...) whose paths to write; none: no paths",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    if args.action == "export":
        pseudo, paths = load(args.source), ()
        if args.data_dir:
            paths = build_datasets("folder", args.data_dir, in_memory=False)[0].paths
        to_csv(pseudo, args.target, paths=paths)
    else:
        pseudo = from_csv(args.source)
        save(pseudo, args.target)
    print(
        f"{args.target}: {len(pseudo.indexes)} pseudo-labeled and {len(pseudo.labeled)} labeled images"
    )


if __name__ == "__main__":
    options.run(main, build_parser())
