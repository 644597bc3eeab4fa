"""One graph of all images, or the chunks that the published ImageNet files come in."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lib.labels import pseudo_files, pseudo_labels
from lib.labels.pseudo_labels import PseudoLabels
from lib.labels.split import Split, cut_into_chunks, name_of
from lib.propagation.embedding_graph import EmbeddingGraph


@dataclass(frozen=True)
class Chunk:
    """Part of the unlabeled images together with all labeled ones."""

    graph: EmbeddingGraph  # of their own
    split: Split  # its indexes count the images of the chunk
    members: Tensor | None = None  # their indexes in the whole data set; None for all images

    def restored(self, part: PseudoLabels) -> PseudoLabels:
        """Let the indexes of the chunk's pseudo-labels count the whole data set."""
        return part if self.members is None else pseudo_labels.reindexed(part, self.members)


def cut_graph(
    graph: EmbeddingGraph, split: Split, chunks: int = 1, seed: int = 0
) -> Iterator[Chunk]:
    """Cut the unlabeled images into chunks, shuffled first; 1 is one graph of all images.

    Only one chunk is held at a time, so that the N x C scores of a large set never are.

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


def save_part(
    part: PseudoLabels,
    folder: str | Path,
    num_labeled: int | str,
    place: int = 0,
    num_parts: int = 1,
) -> Path:
    """Write part number `place` of `num_parts` under its published name, and return the file.

    One graph gives `<num_labeled>.pth.tar`, chunks give
    `num_labeled_<num_labeled>/<num_parts>_<place>.pth.tar`; those of an earlier run go before the first. The
    name of a list of labeled images, without .csv, stands for their number.
    """
    name = name_of(num_labeled)
    path = Path(folder) / f"{name}.pth.tar"
    if num_parts > 1:
        path = Path(folder) / f"num_labeled_{name}" / f"{num_parts}_{place}.pth.tar"
        if place == 0 and path.parent.is_dir():
            for old in path.parent.iterdir():
                if pseudo_files.CHUNK.fullmatch(old.name):
                    old.unlink()  # chunks of two runs do not make a set
    pseudo_files.save(part, path)
    return path
