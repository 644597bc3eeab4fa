"""Files of graphs and spectra: plain tensors with a meta record, checked when they are read."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib.files import checkpoint, provenance
from lib.files.schema import list_of, number, problems, record, tensor, whole
from lib.graph.sparse import arrays, csr, to_scipy
from lib.graph.spectrum import Spectrum

_INDEXES = (torch.int32, torch.int64)
_FLOATS = (torch.float32, torch.float64)
_META = record({"recall": number(0, 1)})
GRAPH = {
    "crow": tensor(1, _INDEXES, 0),
    "col": tensor(1, _INDEXES, 0),
    "values": tensor(1, (torch.float32,), 0),
    "shape": list_of(whole(), 2),
    "meta": _META,
}
TENSORS = {  # of a spectrum
    "values": tensor(1, _FLOATS, 0),
    "vectors": tensor(2, _FLOATS),
    "components": tensor(1, _INDEXES, 0),
    "null": tensor(1, _FLOATS),
    "degrees": tensor(1, _FLOATS, 0),
}
SPECTRUM = {**TENSORS, "residual": number(0, 2), "meta": _META}


def save_graph(affinity: Tensor, path: str | Path, meta: Mapping[str, Any]) -> None:
    """Write a graph as plain tensors: `crow`, `col`, `values`, `shape`, and the record `meta`."""
    crow, col, values = (x.cpu() for x in arrays(affinity))
    state = {
        "crow": crow,
        "col": col,
        "values": values,
        "shape": list(affinity.shape),
        "meta": provenance.made_by() | dict(meta),
    }
    checkpoint.save(state, path)


def load_graph(path: str | Path) -> tuple[Tensor, dict[str, Any]]:
    """Read a graph of `save_graph`, as torch's CSR on the CPU, and its `meta`.

    Raises:
        ValueError: if the file does not hold a square, symmetric CSR matrix of finite, non-negative float32
            weights.
    """
    state = checkpoint.load_dict(path, *GRAPH)
    if wrong := problems(state, GRAPH) or list(_graph_problems(state)):
        raise ValueError(f"{path} holds no graph: {'; '.join(wrong)}; delete it to build it again")
    graph = csr(state["crow"], state["col"], state["values"], len(state["crow"]) - 1)
    # Both products read the same arrays, where a transposed copy would double them.
    probe = np.random.default_rng(0).random(len(state["crow"]) - 1, dtype=np.float32)
    matrix = to_scipy(graph)
    if not np.allclose(matrix @ probe, matrix.T @ probe, rtol=1e-3, atol=1e-30):
        raise ValueError(f"{path} holds no graph: it is not symmetric; delete it to build it again")
    return graph, state["meta"]


def _graph_problems(state: Mapping[str, Any]) -> Iterator[str]:
    """Yield what keeps entries of sound kinds from being a square CSR matrix."""
    crow, col, n = state["crow"], state["col"], len(state["crow"]) - 1
    if n < 1 or list(state["shape"]) != [n, n]:
        yield f"a shape of {state['shape']} for {n} rows"
    elif int(crow[0]) != 0 or int(crow[-1]) != len(col) or (crow.diff() < 0).any():
        yield "crow does not rise from 0 to the number of entries"
    elif len(col) != len(state["values"]) or (len(col) and int(col.max()) >= n):
        yield "a column out of range, or not one per value"


def save_spectrum(spectrum: Spectrum, path: str | Path, meta: Mapping[str, Any]) -> None:
    """Write a spectrum as plain tensors, `residual`, and the record `meta`."""
    tensors = {name: torch.as_tensor(getattr(spectrum, name)).cpu() for name in TENSORS}
    meta = provenance.made_by() | dict(meta)
    checkpoint.save({**tensors, "residual": spectrum.residual, "meta": meta}, path)


def load_spectrum(path: str | Path) -> tuple[Spectrum, dict[str, Any]]:
    """Read a spectrum of `save_spectrum`, on the CPU, and its `meta`.

    Raises:
        ValueError: if the file does not hold one.
    """
    state = checkpoint.load_dict(path, *SPECTRUM)
    if wrong := problems(state, SPECTRUM) or list(_spectrum_problems(state)):
        raise ValueError(
            f"{path} holds no spectrum: {'; '.join(wrong)}; delete it to compute it again"
        )
    entries = {name: state[name] for name in TENSORS}
    entries |= {"values": state["values"].numpy(), "components": state["components"].long()}
    return Spectrum(**entries, residual=float(state["residual"])), state["meta"]


def _spectrum_problems(state: Mapping[str, Any]) -> Iterator[str]:
    """Yield what keeps entries of sound kinds from being a spectrum."""
    n, k = state["vectors"].shape
    if len(state["values"]) != k or any(
        len(state[e]) != n for e in ("components", "null", "degrees")
    ):
        yield f"its entries are not those of {n} images and {k} eigenvectors"
    elif (state["values"] == 0).any() or (state["degrees"] == 0).any():
        yield "an eigenvalue or a degree is not positive"
    elif n == 0 or int(state["components"].max()) >= n:
        yield "a component that none of the images begins"
