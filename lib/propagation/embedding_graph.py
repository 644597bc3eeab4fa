"""Features with everything that is built from them once: affinity matrix, operator and spectrum."""

import contextlib
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from lib.files.cache import load_or_compute
from lib.graph import sparse
from lib.graph.affinity import GraphPreset, affinity_matrix, chosen_preset
from lib.graph.cells import near_order
from lib.graph.files import load_graph, load_spectrum, save_graph, save_spectrum
from lib.graph.laplacian import (
    GraphOperator,
    Operator,
    csr_operator,
    degrees,
    normalized_affinity,
    null_space,
    reordered_operator,
    self_loop_choice,
)
from lib.graph.neighbors import nearest_neighbors
from lib.graph.spectrum import Spectrum, laplacian_spectrum
from lib.propagation.workers import Workers

KINDS = ("graph", "spectrum")
SUFFIX = ".pth.tar"
SORTED_FROM = 200_000  # images from which products are made in an order of their own, on a CPU


@dataclass(frozen=True)
class GraphCache:
    """Files that keep graph and spectrum, so that a run that was killed continues with them.

    A file is read in place of computing while it was made from the same, and replaced otherwise. In
    `folder` there is one file of each kind for the same features.
    """

    folder: str | Path = ""  # of files named by the digest of the features; empty keeps nothing
    graph: str | Path = ""  # another file for the graph
    reuse: bool = True  # False computes anew, whatever is there
    log: Callable[[str], None] = lambda _: None  # receives a line about what was read or computed

    def file(self, kind: str, graph: "EmbeddingGraph") -> str | Path:
        """Name the file of a kind in `KINDS` for a graph; empty if it is not kept."""
        if kind == "graph" and self.graph:
            return self.graph
        if not self.folder:
            return ""
        return Path(self.folder) / f"{kind}-{graph.features_digest}{SUFFIX}"

    def discard(self) -> None:
        """Remove what is kept in `folder`, and the folder where nothing else lies in it."""
        if not self.folder:
            return
        for kind in KINDS:
            for file in Path(self.folder).glob(f"{kind}-*"):
                if file.name.removesuffix(".tmp").endswith(SUFFIX):
                    file.unlink()
        with contextlib.suppress(OSError):  # another file lies there, or nothing was kept
            Path(self.folder).rmdir()


@dataclass(frozen=True)
class EmbeddingGraph:
    """Features, and what is built from them: each once, however many algorithms and label counts ask."""

    features: Tensor  # N x D, unit vectors or not (`nearest_neighbors`), on the device of the work
    graph: str | GraphPreset = "cifar"  # a name in `lib.graph.affinity.PRESETS`, or choices
    num_neighbors: int | None = None  # replaces the preset's number
    self_loops: str = "published"  # a key of `lib.graph.laplacian.SELF_LOOPS`
    given: Tensor | None = None  # an affinity matrix made before, CSR, in place of a new one
    # Options of `nearest_neighbors` (`method`, `precision`, `block_bytes`) and of `laplacian_spectrum`
    # (`solver`, `basis_bytes`).
    search: Mapping[str, Any] = field(default_factory=dict)
    solver: Mapping[str, Any] = field(default_factory=dict)
    cache: GraphCache = field(default_factory=GraphCache)
    workers: Workers | None = None  # processes that share the work; None for this one alone
    # The number of eigenvectors asked for, and the largest spectrum so far; `replace` starts without one.
    _largest: list[tuple[int, Spectrum]] = field(
        init=False, default_factory=list, repr=False, compare=False
    )

    def __len__(self) -> int:
        return len(self.features)

    def subset(self, members: Tensor) -> "EmbeddingGraph":
        """Take the features of some images, with the same choices for a graph of their own."""
        return replace(self, features=self.features[members], given=None)

    @cached_property
    def features_digest(self) -> str:
        return digest(self.features)

    @cached_property
    def affinity(self) -> Tensor:
        """Affinity matrix W, N x N: symmetric, CSR, float32."""
        if self.given is not None:
            return self.given
        preset = chosen_preset(self.graph, self.num_neighbors)
        path = self.cache.file("graph", self)
        key = {"features_digest": self.features_digest} if path else {}
        key |= {"preset": asdict(preset)}
        key |= {name: self.search.get(name, "auto") for name in ("method", "precision")}

        def compute() -> tuple[Tensor, dict[str, Any]]:
            search = self.workers.nearest_neighbors if self.workers else nearest_neighbors
            found = search(
                self.features,
                preset.num_neighbors,
                include_self=preset.include_self,
                scale_rank=preset.scale_rank,
                **self.search,
            )
            return affinity_matrix(found, preset), {"recall": found.recall}

        reuse = self.cache.reuse
        loaded = load_or_compute(path, key, compute, load_graph, save_graph, reuse=reuse)
        graph, recall = loaded.value.to(self.features.device), loaded.meta.get("recall", 1.0)
        self.cache.log(
            f"graph of {len(self)} images: {loaded.origin('built')}; {len(graph.values())} entries, "
            f"recall {recall:.4f}"
        )
        return graph

    @cached_property
    def product(self) -> Operator:
        """Products with S = D^-1/2 W D^-1/2, for the filters and the eigenvectors."""
        in_laplacian, _ = self_loop_choice(self.self_loops)
        s = normalized_affinity(self.affinity, self_loops=in_laplacian)
        divide = self.workers.divide if self.workers else csr_operator
        if len(self) < SORTED_FROM or self.features.device.type != "cpu":
            return divide(s)
        order = near_order(self.features)  # the rows of x that neighbors need are then in the cache
        return reordered_operator(s, order, divide)

    @cached_property
    def operator(self) -> GraphOperator:
        """Operator that the filters and the solvers of eigenvectors work on."""
        in_laplacian, in_constraints = self_loop_choice(self.self_loops)
        return GraphOperator(
            self.product,
            *null_space(self.affinity, self_loops=in_laplacian),
            degrees(self.affinity, self_loops=in_laplacian).sqrt().float(),
            degrees(self.affinity, self_loops=in_constraints),
        )

    def spectrum(self, num_vectors: int) -> Spectrum:
        """Return the first `num_vectors` eigenvectors of L: cut from those computed before, where they do."""
        # The number that was asked for counts: the solver may have found fewer, and there are no more.
        if self._largest and self._largest[0][0] >= num_vectors:
            return self._largest[0][1].first(num_vectors)
        path = self.cache.file("spectrum", self)
        # A file of more eigenvectors does not do: the first of them differ in their last bits.
        key = {"num_vectors": num_vectors, "self_loops": self.self_loops, **self.solver}
        if path:
            key["graph_digest"] = digest(*sparse.arrays(self.affinity))

        loaded = load_or_compute(
            path,
            key,
            lambda: (laplacian_spectrum(self.operator, num_vectors, **self.solver), {}),
            load_spectrum,
            save_spectrum,
            reuse=self.cache.reuse,
        )
        found = loaded.value.to(self.features.device)
        self.cache.log(
            f"{len(found.values)} eigenvectors: {loaded.origin()}; residual {found.residual:.1e}"
        )
        self._largest[:] = [(num_vectors, found)]
        return found

    @property
    def residual(self) -> float:
        """Largest residual |L v - lambda v| of the eigenvectors made so far; NaN where there are none."""
        return self._largest[0][1].residual if self._largest else math.nan


def digest(*arrays: Tensor) -> str:
    """Digest arrays: 16 hexadecimal digits of the SHA-256 of their bytes."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(array.detach().cpu().contiguous().numpy())
    return found.hexdigest()[:16]
