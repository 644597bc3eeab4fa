"""Pseudo-labels: the value that phase 2 makes and phase 3 reads, checked whenever one is made.

`lib.labels.confidence` makes it from scores, `lib.labels.pseudo_files` keeps it in files,
and `lib.labels.table` writes it as a CSV table.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lib.files.published import class_names

SLACK = 1e-4  # rounding of float32 probabilities
EPSILON = 1e-9  # rounding of a ratio times a count: 0.07 * 100 is 7.000000000000001
SHOWN = 6  # names in a message
KEYS = {  # names of the attributes in files; all but `meta` are the published ones
    "indexes": "pseudo_indexes",
    "labels": "pseudo_labels",
    "confidence": "pseudo_weights",
    "labeled": "labeled_indexes",
    "unlabeled": "unlabeled_indexes",
    "meta": "meta",
    "probabilities": "pseudo_probs",
}
TOP = 5  # classes of each image that are kept where its probabilities are not


def _index_problems(name: str, indexes: Tensor) -> Iterator[str]:
    if not isinstance(indexes, Tensor) or indexes.dtype != torch.int64 or indexes.ndim != 1:
        yield f"{name} is not an int64 vector"
        return
    if len(indexes) and int(indexes.min()) < 0:
        yield f"{name} holds the negative index {int(indexes.min())}"
    if len(torch.unique(indexes)) != len(indexes):
        yield f"{name} holds an index twice"


def _largest(numbers: Tensor) -> int:
    return int(numbers.max()) if numbers.numel() else -1


def differing_classes(theirs: Sequence[str], ours: Sequence[str]) -> str:
    """List the class numbers with two meanings, as `number theirs / ours`; - stands for no class."""
    pairs = enumerate(itertools.zip_longest(theirs, ours, fillvalue="-"))
    different = [f"{number} {a} / {b}" for number, (a, b) in pairs if a != b]
    return listed(different) + " (number, theirs / this data set's)"


def listed(names: Sequence[str]) -> str:
    """Join names for a message, and count those that would not fit on a line."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class PseudoLabels:
    """Labels for unlabeled images, most confident first; a ValueError lists every problem of wrong ones."""

    indexes: Tensor  # of the U pseudo-labeled images in the training set
    labels: Tensor  # their class numbers, U
    confidence: Tensor  # how sure each label is, U numbers in [0, 1] that fall
    labeled: Tensor  # indexes of the L images whose true labels were used
    unlabeled: Tensor  # indexes of all images that were to be labeled
    # U x C; the published ImageNet files have none. They are the published p, or, with T = `calibration` in
    # `meta`, calibrated: proportional to p^(1 / T).
    probabilities: Tensor | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)  # record of what made them
    # The most probable classes of each image, best first: U x min(5, C), int32. Files do not hold them.
    top_classes: Tensor | None = None
    # The entropy of the published probabilities of each image in nats, U. Files do not hold it.
    entropy: Tensor | None = None
    # The largest probability of each image, published and calibrated: U x 2. Files do not hold it.
    largest: Tensor | None = None

    def __post_init__(self) -> None:
        problems = [
            *_index_problems("pseudo_indexes", self.indexes),
            *_index_problems("labeled_indexes", self.labeled),
            *_index_problems("unlabeled_indexes", self.unlabeled),
        ] or list(self._problems())
        if problems:
            raise ValueError("these pseudo-labels are not usable: " + "; ".join(problems))

    def _problems(self) -> Iterator[str]:
        """Yield what is wrong with these pseudo-labels by themselves, given that all indexes are sound."""
        if torch.isin(self.indexes, self.labeled).any():
            yield "an image is both labeled and pseudo-labeled"
        if not torch.isin(self.indexes, self.unlabeled).all():
            yield "a pseudo-labeled image is not among unlabeled_indexes"
        labels = list(self._label_problems())
        yield from labels or self._meta_problems()
        yield from self._confidence_problems()
        if self.probabilities is not None and not labels:
            yield from self._probability_problems(self.probabilities)

    def _meta_problems(self) -> Iterator[str]:
        if not isinstance(self.meta, Mapping):
            yield f"meta is a {type(self.meta).__name__}, not a record of names and values"
            return
        try:
            known, label = class_names(self.meta), _largest(self.labels)
        except ValueError as error:
            yield str(error)
        else:
            if 0 < len(known) <= label:
                yield f"the label {label} of {len(known)} class names"

    def _unlike_indexes(self, name: str, values: Tensor, wanted: str) -> str:
        return (
            f"{name} of shape {tuple(values.shape)} and type {values.dtype} for {len(self.indexes)} "
            f"indexes; {wanted} expected"
        )

    def _label_problems(self) -> Iterator[str]:
        labels = self.labels
        if labels.dtype != torch.int64 or labels.shape != self.indexes.shape:
            yield self._unlike_indexes("pseudo_labels", labels, "int64 is")
        elif len(labels) and int(labels.min()) < 0:
            yield f"the label {int(labels.min())} is negative"

    def _confidence_problems(self) -> Iterator[str]:
        weights = self.confidence
        if not weights.is_floating_point() or weights.shape != self.indexes.shape:
            yield self._unlike_indexes("pseudo_weights", weights, "floats are")
        elif not torch.isfinite(weights).all():
            yield "pseudo_weights hold NaN or infinity"
        elif len(weights) and (weights.min() < -SLACK or weights.max() > 1 + SLACK):
            yield "pseudo_weights leave [0, 1]"
        # Against all values before it, not only the last: small steps add up to a ranking upside down.
        elif len(weights) and (weights - weights.cummin(0).values > SLACK).any():
            yield "pseudo_weights do not fall"

    def _probability_problems(self, probs: Tensor) -> Iterator[str]:
        """Yield what is wrong with the probabilities, given that the labels are sound."""
        if probs.ndim != 2 or len(probs) != len(self.indexes) or not probs.is_floating_point():
            yield f"pseudo_probs of shape {tuple(probs.shape)} for {len(self.indexes)} indexes"
        elif not torch.isfinite(probs).all() or (probs < -SLACK).any():
            yield "pseudo_probs hold NaN, infinity or negative values"
        elif ((probs.sum(dim=1) - 1).abs() > 10 * SLACK).any():
            yield "rows of pseudo_probs do not sum to 1"
        elif (label := _largest(self.labels)) >= probs.shape[1]:
            yield f"label {label} is out of range for {probs.shape[1]} probabilities"
        elif (probs.amax(dim=1) - probs.gather(1, self.labels[:, None])[:, 0] > SLACK).any():
            yield "a label is not the most probable one of its row"

    def require_fit(
        self,
        num_images: int,
        num_classes: int,
        num_labeled: int,
        digest: str = "",
        classes: Sequence[str] = (),
        labeled: Tensor | None = None,
    ) -> None:
        """Raise ValueError, listing every problem, if these pseudo-labels are not for a training set.

        They must have been made with `num_labeled` labeled images, or with exactly those in `labeled`.
        Digest and class names of the training set are compared where both are known.
        """
        index = _largest(torch.cat([self.indexes, self.labeled, self.unlabeled]))
        label, num_used = _largest(self.labels), len(self.labeled)
        width = num_classes if self.probabilities is None else self.probabilities.shape[1]
        made, names = self.meta.get("data_digest", ""), class_names(self.meta)
        other_names = names and classes and names != list(classes)
        others = 0 if labeled is None else int((~torch.isin(labeled, self.labeled)).sum())
        checks = [
            (index < num_images, f"index {index} in a data set of {num_images} images"),
            (label < num_classes, f"label {label} in a data set of {num_classes} classes"),
            (width == num_classes, f"{width} probabilities for {num_classes} classes"),
            (
                num_used == num_labeled,
                f"made with {num_used} labeled images, but --num-labeled asks for {num_labeled}",
            ),
            (
                not (made and digest) or made == digest,
                f"made for another data set (digest {made}, this one has {digest})",
            ),
            (not other_names, f"made for other classes: {differing_classes(names, classes)}"),
            (
                not others or num_used != num_labeled,
                f"made with other labeled images: {others} of the list of --num-labeled are not among them; "
                "run phase 2 with this list",
            ),
        ]
        problems = [problem for good, problem in checks if not good]
        if problems:
            raise ValueError("; ".join(problems))

    def _of_each_class(self, ratio: float) -> Tensor:
        """Return the positions of the most confident share of each pseudo-class, rounded up."""
        # The rank of each image within its own class: positions are already sorted by confidence.
        rank, size = torch.empty_like(self.labels), torch.bincount(self.labels)
        order = self.labels.argsort(stable=True)
        rank[order] = torch.arange(len(order)) - (size.cumsum(0) - size)[self.labels[order]]
        quota = torch.ceil(ratio * size.double() - EPSILON)
        return (rank < quota[self.labels]).nonzero()[:, 0]

    def state(self) -> dict[str, Any]:
        """Return these pseudo-labels under their `KEYS`: what a file holds."""
        entries = {key: getattr(self, name) for name, key in KEYS.items()}
        entries["meta"] = dict(self.meta)
        return {key: entry for key, entry in entries.items() if entry is not None}


def most_confident(
    rankings: Sequence[PseudoLabels], ratio: float, *, class_balanced: bool = False
) -> list[Tensor]:
    """Return the positions of the most confident share in each of several rankings, in their order there.

    The share `ratio` lies between 0 and 1, else a ValueError. As published, all rankings give equally many:
    that share of all pseudo-labels, divided by the number of rankings, and rounded down as it is in floating
    point, where 0.29 * 100 is just below 29. `class_balanced` takes the share of each pseudo-class of a
    ranking instead, rounded up so that no class is left out. The most confident labels crowd into few
    classes, and training on those alone forgets the others.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"pseudo ratio {ratio}: must lie in [0, 1]")
    if class_balanced:
        return [ranking._of_each_class(ratio) for ranking in rankings]
    total = sum(len(ranking.indexes) for ranking in rankings)
    return [torch.arange(len(r.indexes))[: int(total * ratio / len(rankings))] for r in rankings]


def reindexed(pseudo: PseudoLabels, members: Tensor) -> PseudoLabels:
    """Return pseudo-labels, whose indexes are positions in `members`, as ones of the whole data set."""
    return replace(
        pseudo,
        indexes=members[pseudo.indexes],
        labeled=members[pseudo.labeled],
        unlabeled=members[pseudo.unlabeled],
    )


def merged(parts: Sequence[PseudoLabels]) -> PseudoLabels:
    """Merge chunks into one ranking by confidence; a ValueError if they do not belong together."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if any(sorted_labeled(part) != sorted_labeled(first) for part in parts):
        raise ValueError("these chunks belong to different sets of labeled images")
    confidence = torch.cat([part.confidence for part in parts])
    order = confidence.argsort(descending=True, stable=True)

    def together(name: str) -> Tensor | None:
        found = [getattr(part, name) for part in parts]
        return None if any(one is None for one in found) else torch.cat(found)[order]

    return PseudoLabels(
        torch.cat([part.indexes for part in parts])[order],
        torch.cat([part.labels for part in parts])[order],
        confidence[order],
        first.labeled,
        torch.cat([part.unlabeled for part in parts]),
        together("probabilities"),
        first.meta,
        entropy=together("entropy"),
        largest=together("largest"),
    )


def sorted_labeled(pseudo: PseudoLabels) -> list[int]:
    """Return the indexes of the labeled images in order, to compare two sets of them."""
    return pseudo.labeled.sort().values.tolist()
