"""Files of graphs and spectra: plain tensors with a meta record, checked when they are read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib.files import checkpoint, provenance
from lib.graph.sparse import arrays, csr, to_scipy
from lib.graph.spectrum import Spectrum

# entries of a spectrum file and their numbers of dimensions
SPECTRUM = {"values": 1, "vectors": 2, "components": 1, "null": 1, "degrees": 1}


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
    state = checkpoint.load_dict(path, "crow", "col", "values", "shape", "meta")
    problem = _graph_problem(state)
    if problem:
        raise ValueError(f"{path} holds no graph: {problem}; delete it to build it again")
    graph = csr(state["crow"], state["col"], state["values"], len(state["crow"]) - 1)
    # Both products read the same arrays, where a transposed copy would double them.
    probe = np.random.default_rng(0).random(len(state["crow"]) - 1, dtype=np.float32)
    matrix = to_scipy(graph)
    if not np.allclose(matrix @ probe, matrix.T @ probe, rtol=1e-3, atol=1e-30):
        raise ValueError(f"{path} holds no graph: it is not symmetric; delete it to build it again")
    return graph, state["meta"]


def _graph_problem(state: Mapping[str, Any]) -> str:
    """Say what keeps these entries from being a square CSR matrix of weights, if anything does."""
    crow, col, values, shape = (state[name] for name in ("crow", "col", "values", "shape"))
    for v in (crow, col, values):
        if not isinstance(v, Tensor) or v.layout != torch.strided or v.ndim != 1:
            return "crow, col and values must be vectors"
    whole = (torch.int32, torch.int64)
    if crow.dtype not in whole or col.dtype not in whole or values.dtype != torch.float32:
        return "crow and col must be integers, values float32"
    n = len(crow) - 1
    if n < 1 or not isinstance(shape, list) or shape != [n, n]:
        return f"a shape of {shape} for {n} rows"
    if int(crow[0]) != 0 or int(crow[-1]) != len(col) or (crow.diff() < 0).any():
        return "crow does not rise from 0 to the number of entries"
    if len(col) != len(values) or (len(col) and not (0 <= int(col.min()) <= int(col.max()) < n)):
        return "a column out of range, or not one per value"
    if not torch.isfinite(values).all() or (values < 0).any():
        return "a weight is negative, NaN or infinite"
    return "" if isinstance(state["meta"], dict) else "its meta is no record"


def save_spectrum(spectrum: Spectrum, path: str | Path, meta: Mapping[str, Any]) -> None:
    """Write a spectrum as plain tensors, `residual`, and the record `meta`."""
    tensors = {name: torch.as_tensor(getattr(spectrum, name)).cpu() for name in SPECTRUM}
    meta = provenance.made_by() | dict(meta)
    checkpoint.save({**tensors, "residual": spectrum.residual, "meta": meta}, path)


def load_spectrum(path: str | Path) -> tuple[Spectrum, dict[str, Any]]:
    """Read a spectrum of `save_spectrum`, on the CPU, and its `meta`.

    Raises:
        ValueError: if the file does not hold one.
    """
    state = checkpoint.load_dict(path, *SPECTRUM, "residual", "meta")
    problem = _spectrum_problem(state)
    if problem:
        raise ValueError(f"{path} holds no spectrum: {problem}; delete it to compute it again")
    entries = {name: state[name] for name in SPECTRUM}
    entries |= {"values": state["values"].numpy(), "components": state["components"].long()}
    return Spectrum(**entries, residual=float(state["residual"])), state["meta"]


def _spectrum_problem(state: Mapping[str, Any]) -> str:
    """Say what keeps these entries from being a spectrum, if anything does."""
    for name, dimensions in SPECTRUM.items():
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
