"""Pseudo-labels of one split: on one graph, or in the chunks that the published ImageNet files come in."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lib.labels import pseudo_files, pseudo_labels
from lib.labels.pseudo_labels import PseudoLabels
from lib.labels.split import Split, cut_into_chunks
from lib.propagation.embedding_graph import EmbeddingGraph
from lib.propagation.methods import propagate


@dataclass(frozen=True)
class Chunk:
    """Part of the unlabeled images together with all labeled ones.

    Attributes:
        graph: their features and a graph of their own.
        split: which of them are labeled; indexes count the images of the chunk.
        members: indexes of its images in the whole data set; None for all images in their order.
    """

    graph: EmbeddingGraph
    split: Split
    members: Tensor | None = None

    def restored(self, part: PseudoLabels) -> PseudoLabels:
        """Let the indexes of the chunk's pseudo-labels count the whole data set."""
        return part if self.members is None else pseudo_labels.reindexed(part, self.members)


def cut_graph(
    graph: EmbeddingGraph, split: Split, chunks: int = 1, seed: int = 0
) -> Iterator[Chunk]:
    """Cut the unlabeled images into chunks, shuffled first; 1 is one graph of all images.

    Only one chunk is held at a time, so that the N x C scores of a large set never are.

    Args:
        graph: features and their graph.
        split: which images are labeled.
        chunks: number of chunks.
        seed: seed of the shuffling.

    Raises:
        ValueError: for fewer images than chunks.
    """
    if chunks == 1:
        yield Chunk(graph, split)
        return
    places = torch.arange(len(split.labeled))
    parts = cut_into_chunks(split, chunks, seed)
    for unlabeled in tqdm(parts, desc="chunks", unit="chunk", leave=False, disable=None):
        members = torch.cat([split.labeled, unlabeled])
        local = Split(places, torch.arange(len(places), len(members)))
        yield Chunk(graph.subset(members), local, members)


def pseudo_label(
    graph: EmbeddingGraph,
    method: str,
    split: Split,
    labels: Tensor,
    num_classes: int,
    *,
    parameters: Mapping[str, Any] | None = None,
    class_prior: Tensor | Sequence[float] | None = None,
    meta: Mapping[str, Any] | None = None,
    **keywords: Any,
) -> PseudoLabels:
    """Make pseudo-labels of all unlabeled images on one graph.

    Args:
        graph, method, split, labels, num_classes, class_prior: as in `lib.propagation.propagate`.
        parameters: parameters of the method.
        meta, keywords: as in `lib.propagation.methods.Propagation.pseudo_labels`.

    Raises:
        ValueError: as `propagate` and `from_scores`.
    """
    answer = propagate(
        graph, method, split, labels, num_classes, class_prior=class_prior, **(parameters or {})
    )
    return answer.pseudo_labels(split, meta, **keywords)


def pseudo_label_parts(
    graph: EmbeddingGraph,
    method: str,
    split: Split,
    labels: Tensor,
    num_classes: int,
    *,
    chunks: int = 1,
    seed: int = 0,
    **keywords: Any,
) -> Iterator[PseudoLabels]:
    """Make pseudo-labels chunk by chunk, their indexes counting the whole data set.

    Args:
        graph, method, split, labels, num_classes, keywords: as in `pseudo_label`.
        chunks, seed: as in `cut_graph`.

    Raises:
        ValueError: as `pseudo_label` and `cut_graph`.
    """
    for chunk in cut_graph(graph, split, chunks, seed):
        part = pseudo_label(chunk.graph, method, chunk.split, labels, num_classes, **keywords)
        yield chunk.restored(part)


def part_file(
    folder: str | Path, num_labeled: int | str, place: int = 0, num_parts: int = 1
) -> Path:
    """Name the file of pseudo-labels as published.

    One graph gives `<num_labeled>.pth.tar`, chunks give
    `num_labeled_<num_labeled>/<num_parts>_<place>.pth.tar`.
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
    """Write part number `place` of `num_parts`, and remove the chunks of an earlier run before the first.

    Args:
        part: what `pseudo_label_parts` yields.
        folder, num_labeled, place, num_parts: as in `part_file`.

    Returns:
        The file.
    """
    path = part_file(folder, num_labeled, place, num_parts)
    if place == 0 and num_parts > 1 and path.parent.is_dir():
        for old in path.parent.iterdir():
            if pseudo_files.CHUNK.fullmatch(old.name):
                old.unlink()  # chunks of two runs do not make a set
    pseudo_files.save(part, path)
    return path
