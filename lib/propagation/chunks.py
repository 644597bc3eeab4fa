"""Pseudo-labels of one split: on one graph, or in the chunks that the published ImageNet files come in."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lib.labels import pseudo_labels
from lib.labels.pseudo_labels import PseudoLabels
from lib.labels.split import Split, cut_into_chunks
from lib.propagation.methods import EmbeddingGraph, propagate


def subset(metric: EmbeddingGraph, members: Tensor) -> EmbeddingGraph:
    """The metric of some images: their features, and the same choices for a graph of their own."""
    return replace(metric, features=metric.features[members], given=None, _largest=[])


def pseudo_label(
    metric: EmbeddingGraph,
    method: str,
    split: Split,
    labels: Tensor,
    num_classes: int,
    *,
    parameters: Mapping[str, Any] | None = None,
    class_prior: Tensor | Sequence[float] | None = None,
    temperature: float = 1.0,
    confidence: str | None = None,
    probabilities: bool = True,
    meta: Mapping[str, Any] | None = None,
) -> PseudoLabels:
    """Pseudo-labels of all unlabeled images on one graph.

    Args:
        metric, method, split, labels, num_classes, class_prior: as in `lib.propagation.propagate`.
        parameters: of the method.
        temperature: of the probabilities, as in `lib.labels.pseudo_labels.from_scores`.
        confidence: a key of `lib.labels.pseudo_labels.CONFIDENCES`; None for the method's own.
        probabilities: False leaves them out, as the published ImageNet files do.
        meta: what made them; the method's choices are added as `propagation` and `confidence`.

    Raises:
        ValueError: as `propagate` and `from_scores`.
    """
    answer = propagate(
        metric, method, split, labels, num_classes, class_prior=class_prior, **(parameters or {})
    )
    confidence = confidence or answer.confidence
    found = {"propagation": answer.meta, "confidence": confidence}
    return pseudo_labels.from_scores(
        answer.scores,
        split,
        {**(meta or {}), **found},
        temperature=temperature,
        confidence=confidence,
        probabilities=probabilities,
    )


def pseudo_label_parts(
    metric: EmbeddingGraph,
    method: str,
    split: Split,
    labels: Tensor,
    num_classes: int,
    *,
    chunks: int = 1,
    seed: int = 0,
    **keywords: Any,
) -> Iterator[PseudoLabels]:
    """Pseudo-labels in parts, each on a graph of its own together with all labeled images.

    Only one part is held at a time, so that the N x C scores of a large set never are.

    Args:
        metric, method, split, labels, num_classes, keywords: as in `pseudo_label`.
        chunks: parts to cut the unlabeled images into, shuffled first; 1 is one graph of all images.
        seed: of the shuffling.

    Yields:
        A part, its indexes counting the whole data set.

    Raises:
        ValueError: as `pseudo_label`, or for fewer images than chunks.
    """
    if chunks == 1:
        yield pseudo_label(metric, method, split, labels, num_classes, **keywords)
        return
    parts = cut_into_chunks(split, chunks, seed)
    for unlabeled in tqdm(parts, desc="chunks", unit="chunk", leave=False, disable=None):
        members = torch.cat([split.labeled, unlabeled])
        places = torch.arange(len(members))
        local = Split(places[: len(split.labeled)], places[len(split.labeled) :])
        part = pseudo_label(subset(metric, members), method, local, labels, num_classes, **keywords)
        yield pseudo_labels.reindexed(part, members)


def part_file(
    folder: str | Path, num_labeled: int | str, place: int = 0, num_parts: int = 1
) -> Path:
    """Where pseudo-labels go, under the published names.

    `<num_labeled>.pth.tar` of one graph, `num_labeled_<num_labeled>/<num_parts>_<place>.pth.tar` of chunks.
    """
    if num_parts == 1:
        return Path(folder) / f"{num_labeled}.pth.tar"
    return Path(folder) / f"num_labeled_{num_labeled}" / f"{num_parts}_{place}.pth.tar"


def save_part(
    part: PseudoLabels,
    folder: str | Path,
    num_labeled: int | str,
    place: int = 0,
    num_parts: int = 1,
) -> Path:
    """Write part number `place` of `num_parts`; chunks of an earlier run are removed before the first.

    Args:
        part: what `pseudo_label_parts` yields.
        folder, num_labeled, place, num_parts: as in `part_file`.

    Returns:
        The file.
    """
    path = part_file(folder, num_labeled, place, num_parts)
    if place == 0 and num_parts > 1 and path.parent.is_dir():
        for old in path.parent.iterdir():
            if pseudo_labels.CHUNK.fullmatch(old.name):
                old.unlink()  # a set of chunks from two runs is none
    pseudo_labels.save(part, path)
    return path
