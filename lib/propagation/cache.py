"""Graph and spectrum in files, so that a run that was killed continues from what is on the disk."""

import contextlib
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from lib.files import checkpoint
from lib.files.provenance import made_by
from lib.graph.affinity import features_digest
from lib.graph.spectral import Spectrum

KINDS = ("graph", "spectrum")
SUFFIX = ".pth.tar"
ENTRIES = {  # of a spectrum file: name and number of dimensions
    "values": 1,
    "vectors": 2,
    "components": 1,
    "null": 1,
    "degrees": 1,
}


def _ignore(_: str) -> None:
    pass


@dataclass(frozen=True)
class GraphCache:
    """Where the graph and the spectrum of a metric are kept.

    A file is read in place of computing while it was made from the same, and replaced otherwise. In
    `folder` there is one of each kind for the same features.

    Attributes:
        folder: of files named by the digest of the features; empty keeps nothing.
        graph: another file for the graph.
        reuse: False computes anew whatever is there.
        log: is told in one line what was read or computed.
    """

    folder: str | Path = ""
    graph: str | Path = ""
    reuse: bool = True
    log: Callable[[str], None] = _ignore

    def file(self, kind: str, features: Tensor) -> str | Path:
        """Where the `kind` ("graph", "spectrum") of N x D features lies; empty if it is not kept."""
        if kind == "graph" and self.graph:
            return self.graph
        if not self.folder:
            return ""
        return Path(self.folder) / f"{kind}-{features_digest(features)}{SUFFIX}"

    def discard(self) -> None:
        """Remove what is kept in `folder`, and the folder where nothing else lies in it."""
        if not self.folder:
            return
        for kind in KINDS:
            for file in Path(self.folder).glob(f"{kind}-*"):
                if file.name.removesuffix(".tmp").endswith(SUFFIX):
                    file.unlink()
        with contextlib.suppress(OSError):  # it holds what is not ours, or nothing was kept
            Path(self.folder).rmdir()


def load_or_compute_spectrum(
    cache: GraphCache,
    path: str | Path,
    compute: Callable[[], Spectrum],
    affinity: sp.csr_matrix,
    num_vectors: int,
    **choices: Any,
) -> Spectrum:
    """What `compute` gives, or what it gave before and is still in the file.

    Args:
        cache: whether to use it.
        path: the file; empty keeps none.
        compute: called only where the file does not do.
        affinity, num_vectors, choices: arguments of `laplacian_spectrum` that change its result; the key of
            the file.

    Raises:
        ValueError: as `compute`, or for a file that holds no spectrum or cannot be written.
    """
    key = _spectrum_key(affinity, num_vectors, choices) if path else {}
    if path and cache.reuse and Path(path).is_file():
        found, meta = load_spectrum(path)
        if all(meta.get(name) == value for name, value in key.items()):
            cache.log(f"{len(found.values)} eigenvectors: read from {path}")
            return found
    start = time.perf_counter()
    spectrum = compute()
    seconds = time.perf_counter() - start
    if path:
        save_spectrum(spectrum, path, key)
    cache.log(
        f"{len(spectrum.values)} eigenvectors: computed in {seconds:.1f} s, residual "
        f"{spectrum.residual:.1e}" + (f", kept in {path}" if path else "")
    )
    return spectrum


def _spectrum_key(affinity: sp.csr_matrix, num_vectors: int, choices: dict) -> dict[str, Any]:
    digest = hashlib.sha256()
    for part in (affinity.indptr, affinity.indices, affinity.data):
        digest.update(np.ascontiguousarray(part))
    # as many as are asked for, not as many at least: the first of a larger number are other bytes
    return {"graph_digest": digest.hexdigest()[:16], "num_vectors": num_vectors, **choices}


def save_spectrum(spectrum: Spectrum, path: str | Path, meta: dict[str, Any]) -> None:
    """Write a spectrum as plain tensors, `residual`, and the record `meta`.

    Raises:
        ValueError: if the file cannot be written; an old one stays.
    """
    tensors = {name: torch.from_numpy(getattr(spectrum, name)) for name in ENTRIES}
    checkpoint.save({**tensors, "residual": spectrum.residual, "meta": made_by() | meta}, path)


def load_spectrum(path: str | Path) -> tuple[Spectrum, dict[str, Any]]:
    """A spectrum of `save_spectrum` and its `meta`.

    Raises:
        ValueError: if the file is missing or holds no spectrum.
    """
    state = checkpoint.load_dict(path, *ENTRIES, "residual", "meta")
    problem = _spectrum_problem(state)
    if problem:
        raise ValueError(f"{path} holds no spectrum: {problem}; delete it to compute it again")
    arrays = {name: state[name].numpy() for name in ENTRIES}
    return Spectrum(**arrays, residual=float(state["residual"])), state["meta"]


def _spectrum_problem(state: dict[str, Any]) -> str:
    """What keeps these entries from being a spectrum; empty if nothing does."""
    for name, dimensions in ENTRIES.items():
        entry = state[name]
        if not isinstance(entry, Tensor) or entry.ndim != dimensions:
            return f"{name} is no tensor of {dimensions} dimensions"
        if entry.is_floating_point() and not torch.isfinite(entry).all():
            return f"{name} holds NaN or infinity"
    n, k = state["vectors"].shape
    if len(state["values"]) != k or any(len(state[e]) != n for e in ("components", "null")):
        return f"its entries are not those of {n} images and {k} eigenvectors"
    if len(state["degrees"]) != n or state["components"].is_floating_point():
        return "degrees or components do not fit"
    if (state["values"] <= 0).any() or (state["degrees"] <= 0).any():
        return "an eigenvalue or a degree is not positive"
    if not isinstance(state["residual"], float) or not isinstance(state["meta"], dict):
        return "residual or meta is of the wrong kind"
    return ""
