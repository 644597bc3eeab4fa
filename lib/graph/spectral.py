"""Spectrum of the normalized Laplacian of a sparse graph, its null space taken exactly.

L = I - S with S = D^-1/2 W D^-1/2. The smallest eigenvalues of L are the largest of S, and Lanczos
finds the largest ones without solving any linear system; both matrices have the same eigenvectors.
Small graphs are solved by ARPACK, large ones by a block Lanczos method in torch, on any device.
"""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import Tensor

Operator = Callable[[Tensor], Tensor]  # N x b, contiguous -> N x b
DENSE_BELOW = 400  # nodes; smaller problems are solved at once by LAPACK
SELF_LOOPS = {  # name: (self-loops in the Laplacian, self-loops in the degrees of the constraints)
    "published": (False, True),
    "keep": (True, True),
    "drop": (False, False),
}
TOLERANCE = 1e-4  # of Lanczos, relative to the eigenvalues of S (published: 1e-2)
SOLVERS = ("auto", "arpack", "block")
BLOCK_FROM = 5_000  # nodes from which "auto" takes the block solver
BLOCK = 32  # columns of a block
GROWTH = 12  # of the Chebyshev filter: log of its largest value, where the degree allows
DEGREES = (4, 40)  # least and largest degree of the filter
LEAST_WINDOW, LEAST_DAMPED = (
    0.01,
    0.1,
)  # of the spectrum's width: what a filter leaves, and what it damps
KEPT = 3.0  # times k: eigenvalues above the filter's damped interval
BASIS_FACTOR = 4  # times k: columns of the basis
BASIS_BYTES = 4 * 2**30
BLOCK_TOLERANCE = 1e-2  # leaves eigenvalues of L 1e-4 off on real features
RESTARTS = 10
LARGE_RESIDUAL = 0.02  # of an eigenvector; on real features it is below 1e-3
DENSITY_STEPS, DENSITY_COLUMNS = 20, 8  # of the Lanczos runs that show where the eigenvalues lie
ROUNDING = 1e-5  # norms below are rounding, in float32 products of operators of norm 1
ROWS = 8192  # of a basis turned in place at a time
NULL_BELOW = -1.5  # eigenvalues of S lie above, the null vectors that were moved to -2 below
SEEDED_RESTARTS = "rng" in inspect.signature(eigsh).parameters  # scipy 1.17 draws them at random


@dataclass(frozen=True)
class Spectrum:
    """The lower end of the spectrum of L, without its null space.

    Attributes:
        values: k eigenvalues of L, rising, all positive.
        vectors: N x k, float32, orthonormal columns.
        components: N, number of the connected component of each node.
        null: N, the null space: entry i belongs to the unit null vector of component[i], which is
            proportional to sqrt(degree) inside the component and zero outside.
        degrees: N, float64, all positive, the degrees that constraints on this graph are weighed with.
        residual: largest norm |L v - value v| of a vector.
    """

    values: np.ndarray
    vectors: np.ndarray
    components: np.ndarray
    null: np.ndarray
    degrees: np.ndarray
    residual: float = 0.0

    @property
    def num_components(self) -> int:
        return int(self.components.max()) + 1


def _without_self_loops(affinity: sp.csr_matrix) -> sp.csr_matrix:
    """W without its diagonal; W itself where it has none."""
    if not affinity.diagonal().any():
        return affinity
    plain = affinity.copy()
    for start in range(0, affinity.shape[0], ROWS):  # a row number for every entry would double it
        pointers = plain.indptr[start : start + ROWS + 1]
        rows = np.repeat(np.arange(start, start + len(pointers) - 1), np.diff(pointers))
        part = slice(pointers[0], pointers[-1])
        plain.data[part][plain.indices[part] == rows] = 0
    plain.eliminate_zeros()
    return plain


def degrees(affinity: sp.csr_matrix, *, self_loops: bool) -> np.ndarray:
    """Row sums of W, with or without its diagonal; N, float64."""
    # off before the sum: weak edges beside a strong self-loop would be lost in the difference
    kept = affinity if self_loops else _without_self_loops(affinity)
    return np.asarray(kept.sum(axis=1, dtype=np.float64)).ravel()


def self_loop_choice(name: str) -> tuple[bool, bool]:
    """Whether self-loops count in the Laplacian, and in the degrees of the constraints.

    Raises:
        ValueError: for a name that is no key of `SELF_LOOPS`.
    """
    if name not in SELF_LOOPS:
        raise ValueError(f"unknown self-loops {name!r}: take one of {', '.join(SELF_LOOPS)}")
    return SELF_LOOPS[name]


def positive_degrees(affinity: sp.csr_matrix, *, self_loops: bool) -> np.ndarray:
    """`degrees`, with 1 at an isolated image: it weighs what its self-loop would."""
    found = degrees(affinity, self_loops=self_loops)
    found[found == 0] = 1
    return found


def normalized_affinity(affinity: sp.csr_matrix, *, self_loops: bool) -> sp.csr_matrix:
    """S = D^-1/2 W D^-1/2; the row and column of an isolated node are zero. One copy of W."""
    plain = affinity if self_loops else _without_self_loops(affinity)
    degree = degrees(plain, self_loops=True)
    s = plain.copy() if plain is affinity else plain
    inverse_root = np.divide(1, np.sqrt(degree), out=np.zeros_like(degree), where=degree > 0)
    inverse_root = inverse_root.astype(np.float32)
    for start in range(0, s.shape[0], ROWS):
        pointers = s.indptr[start : start + ROWS + 1]
        part = slice(pointers[0], pointers[-1])
        s.data[part] *= np.repeat(inverse_root[start : start + ROWS], np.diff(pointers))
        s.data[part] *= inverse_root[s.indices[part]]
    return s


def null_space(affinity: sp.csr_matrix, *, self_loops: bool) -> tuple[np.ndarray, np.ndarray]:
    """Component of each node, and each node's entry of its component's null vector."""
    _, components = connected_components(affinity, directed=False)
    degree = degrees(affinity, self_loops=self_loops)
    size = np.bincount(components)
    degree[size[components] == 1] = 1  # an isolated node: its null vector is its own unit vector
    mass = np.bincount(components, weights=degree)
    return components, np.sqrt(degree / mass[components])


def project(null: np.ndarray, components: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Coefficients of `columns` (N x m) along the null vectors: c x m."""
    count = int(components.max()) + 1
    basis = sp.csr_matrix((null, (components, np.arange(len(null)))), (count, len(null)))
    return np.asarray(basis @ columns)


def csr_operator(matrix: sp.csr_matrix, device: torch.device | str = "cpu") -> Operator:
    """Products with a sparse matrix in torch; on the CPU its arrays are shared, not copied."""
    with warnings.catch_warnings():
        # said once a process by some versions, whatever check_invariants is
        warnings.filterwarnings("ignore", message="Sparse (CSR tensor support|invariant checks)")
        held = torch.sparse_csr_tensor(
            torch.from_numpy(matrix.indptr),
            torch.from_numpy(matrix.indices),
            torch.from_numpy(matrix.data),
            matrix.shape,
            check_invariants=False,
        ).to(device)
    return lambda x: held @ x


def reordered(matrix: sp.csr_matrix, order: np.ndarray) -> sp.csr_matrix:
    """A square matrix with rows and columns in the order `order`; one copy of it."""
    place = np.empty(len(order), dtype=matrix.indices.dtype)
    place[order] = np.arange(len(order), dtype=place.dtype)
    answer = matrix[order]
    answer.indices = place[answer.indices]
    answer.has_sorted_indices = False
    answer.sort_indices()
    return answer


def reordered_operator(product: Operator, order: Tensor) -> Operator:
    """Products with a matrix, through those with `reordered(matrix, order)`."""
    place = torch.argsort(order)
    return lambda x: product(x[order])[place]


def null_projection(
    null: np.ndarray, components: np.ndarray, device: torch.device | str = "cpu"
) -> Operator:
    """The projection that takes the null vectors out of the columns of a matrix, in place."""
    count = int(components.max()) + 1
    entries = torch.from_numpy(null.astype(np.float32)).to(device)[:, None]
    of = torch.from_numpy(components.astype(np.int64)).to(device)

    def project_out(x: Tensor) -> Tensor:
        if count == 1:
            return x.addmm_(entries, entries.T @ x, alpha=-1)
        sums = torch.zeros(count, x.shape[1], device=x.device).index_add_(0, of, entries * x)
        return x.sub_(entries * sums[of])

    return project_out


def _density(operator: Operator, start: Tensor) -> tuple[np.ndarray, np.ndarray, float]:
    """Where the eigenvalues lie, by Lanczos from each column of `start` on its own.

    Returns:
        Ritz values, falling; the share of the spectrum above each (stochastic Lanczos quadrature,
        Ubaru, Chen & Saad 2017); and a lower bound of all eigenvalues.
    """
    x = start / start.norm(dim=0)
    previous, beta = torch.zeros_like(x), torch.zeros(x.shape[1], device=x.device)
    diagonal, off = [], []
    for _ in range(DENSITY_STEPS):
        y = operator(x).sub_(previous * beta)
        alpha = (x * y).sum(dim=0)
        y.sub_(x * alpha)
        previous, beta = x, y.norm(dim=0)
        x = y / beta.clamp(min=ROUNDING)  # a start inside an invariant space has nowhere to go
        diagonal.append(alpha)
        off.append(beta)
    sides = torch.stack(off, 1)
    t = torch.diag_embed(torch.stack(diagonal, 1)) + torch.diag_embed(sides[:, :-1], -1)
    nodes, vectors = np.linalg.eigh(t.double().cpu().numpy())  # reads the lower triangle
    shares = vectors[:, 0].ravel() ** 2 / len(nodes)
    lowest = nodes[:, 0] - np.abs(vectors[:, -1, 0]) * sides[:, -1].double().cpu().numpy()
    order = np.argsort(-nodes.ravel())
    shares = shares[order]
    # half of a node's own share lies above it
    above = np.cumsum(shares) - shares / 2
    return nodes.ravel()[order], above, float(max(lowest.min(), -1))


def _chebyshev_filter(operator: Operator, low: float, cut: float, high: float) -> Operator:
    """T_d of the operator with [low, cut] on [-1, 1], scaled to 1 at `high`.

    What lies between `low` and `cut` is damped, what lies above grows the faster the larger it is.
    """
    center, half = (cut + low) / 2, (cut - low) / 2
    growth = np.arccosh((high - center) / half)
    degree = int(np.clip(round(GROWTH / growth), *DEGREES))
    gain = np.cosh(degree * growth)

    def apply(x: Tensor) -> Tensor:
        before, now = x, operator(x).sub_(x, alpha=center).div_(half)
        for _ in range(degree - 1):
            after = operator(now).sub_(now, alpha=center).mul_(2 / half).sub_(before)
            before, now = now, after
        return now.div_(gain)

    return apply


def _orthonormal(
    block: Tensor, basis: Tensor, project_out: Operator, width: int, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Q with block = Q R, at most `width` columns, orthonormal to each other and to the basis; and R.

    At least twice by the eigenvectors of the block's Gram matrix (SVQB: Stathopoulos & Wu 2002). Directions
    that are rounding are replaced by random ones, which R does not count: an invariant space is left
    behind, and copies of a repeated eigenvalue are found.
    """
    total = torch.eye(block.shape[1], dtype=torch.float64, device=block.device)
    for attempt in range(4):
        squares, rotation = torch.linalg.eigh((block.T @ block).double())
        squares, rotation = squares.flip(0)[:width], rotation.flip(1)[:, :width]
        norms = squares.clamp(min=0).sqrt()
        lost = norms < ROUNDING
        norms[lost] = torch.inf
        block = block @ (rotation / norms).float()
        norms[lost] = 0
        total = norms[:, None] * (rotation.T @ total)
        if lost.any():
            fresh = torch.randn(len(block), int(lost.sum()), generator=rng).to(block.device)
            fresh = project_out(fresh / len(block) ** 0.5)
            block[:, lost] = fresh.sub_(basis @ (basis.T @ fresh))
        block = project_out(block - basis @ (basis.T @ block))
        if attempt and not lost.any():
            break
    return block, total


class _Krylov:
    """An orthonormal basis, grown by blocks and restarted thick, and the operator within it.

    Attributes:
        basis: N x `limit`, the first `size` columns in use.
        inner: basis^T A basis, float64.
        last: the columns of the newest block.
    """

    def __init__(self, start: Tensor, limit: int, project_out: Operator, seed: int) -> None:
        self.rng = torch.Generator().manual_seed(seed)
        self.project_out = project_out
        self.basis = torch.empty(len(start), limit, device=start.device)
        self.inner = np.zeros((limit, limit))
        self.size, self.width = 0, start.shape[1]
        self.append(self.next_block(start)[0])

    def next_block(self, block: Tensor, room: int | None = None) -> tuple[Tensor, Tensor]:
        width = self.width if room is None else min(self.width, room)
        used = self.basis[:, : self.size]
        return _orthonormal(block, used, self.project_out, width, self.rng)

    def append(self, block: Tensor) -> None:
        self.last = slice(self.size, self.size + block.shape[1])
        self.basis[:, self.last] = block
        self.size = self.last.stop

    def multiply(self, operator: Operator) -> Tensor:
        """The operator times the newest block, less its part inside of the basis, which is recorded."""
        used = self.basis[:, : self.size]
        block = self.project_out(operator(self.basis[:, self.last].contiguous()))
        inside = used.T @ block
        block.sub_(used @ inside)
        self.inner[: self.size, self.last] = inside.double().cpu().numpy()
        self.inner[self.last, : self.size] = self.inner[: self.size, self.last].T
        return block

    def ritz(self) -> tuple[np.ndarray, np.ndarray]:
        """Ritz values, falling, and their coordinates in the basis."""
        values, vectors = np.linalg.eigh(self.inner[: self.size, : self.size])
        return values[::-1], vectors[:, ::-1]

    def rotate(self, coordinates: np.ndarray) -> None:
        """Put the vectors with these coordinates in the place of the basis, some rows at a time."""
        turn = torch.from_numpy(coordinates.astype(np.float32)).to(self.basis.device)
        for rows in self.basis.split(ROWS):
            rows[:, : turn.shape[1]] = rows[:, : self.size] @ turn
        self.size = turn.shape[1]


def _invariant_space(
    operator: Operator, krylov: _Krylov, k: int, rank: int, tolerance: float
) -> None:
    """Grow the space until it holds the k largest eigenvectors of the operator, and keep these alone."""
    limit, restarts = krylov.basis.shape[1], 0
    exhausted, before = False, np.full(k, np.inf)
    while True:
        block = krylov.multiply(operator)
        following, coupling = krylov.next_block(block, rank - krylov.size)
        exhausted |= not coupling.any(dim=1).all()
        full = krylov.size + following.shape[1] > limit
        if krylov.size >= min(k + 2 * krylov.width, limit, rank) or full:
            values, vectors = krylov.ritz()
            outside = coupling.cpu().numpy() @ vectors[krylov.last, :k]
            size = np.maximum(np.abs(values[:k]), ROUNDING)
            error = (np.linalg.norm(outside, axis=0) / size).max()
            # after a random continuation, vectors that are exact need not be all there are
            settled = (np.abs(values[:k] - before) <= tolerance * size).all()
            before = values[:k].copy()
            converged = error <= tolerance and (settled or not exhausted)
            if converged or krylov.size >= rank or restarts == RESTARTS:
                return krylov.rotate(vectors[:, :k])
            if full:
                restarts += 1
                keep = min(k + krylov.width, limit - following.shape[1])
                krylov.rotate(vectors[:, :keep])
                krylov.inner[:] = np.diag(np.r_[values[:keep], np.zeros(limit - keep)])
        krylov.append(following)


def _rayleigh_ritz(operator: Operator, vectors: Tensor) -> tuple[Tensor, Tensor, float]:
    """Eigenpairs of the operator within the span of orthonormal columns, and their largest residual."""
    n, k = vectors.shape
    images = torch.empty(n, k, device=vectors.device)
    for start in range(0, k, BLOCK):
        tile = slice(start, start + BLOCK)
        images[:, tile] = operator(vectors[:, tile].contiguous())
    values, turn = torch.linalg.eigh((vectors.T @ images).double().cpu())
    values, turn = values.flip(0), turn.flip(1).float().to(vectors.device)
    found, squares = torch.empty_like(images), torch.zeros(k, device=vectors.device)
    scale = values.float().to(vectors.device)
    for start in range(0, n, ROWS):
        rows = slice(start, start + ROWS)
        found[rows] = vectors[rows] @ turn
        squares += (images[rows] @ turn - found[rows] * scale).square_().sum(dim=0)
    return values, found, float(squares.sqrt().max())


@torch.no_grad()
def largest_eigenvectors(
    operator: Operator,
    project_out: Operator,
    start: Tensor,
    k: int,
    *,
    rank: int,
    tolerance: float = BLOCK_TOLERANCE,
    basis_bytes: int = BASIS_BYTES,
    seed: int = 0,
) -> tuple[Tensor, Tensor, float]:
    """The k largest eigenvalues of a symmetric operator between -1 and 1, and their vectors.

    Block Lanczos on a Chebyshev filter of the operator, whose damped interval ends where about
    `KEPT` k eigenvalues lie above; restarted thick where its basis is full; at the end one Rayleigh-Ritz
    step with the operator itself. The basis takes 4 N min(BASIS_FACTOR k, basis_bytes / 4 N) bytes,
    but never less than k + 3 blocks; beside it there are 2 N k numbers at the end, and a few blocks of
    N x `BLOCK`.

    Args:
        operator: N x b -> N x b, contiguous; where the rows are divided among processes, it gathers them.
        project_out: takes out, in place, the eigenvectors that are known already.
        start: N x `BLOCK` random columns, on the device of the work.
        k: at most `rank`.
        rank: N minus the number of vectors that `project_out` takes out.
        tolerance: largest residual of a vector under the filter, relative to its eigenvalue there.
        basis_bytes: bound of the basis.

    Returns:
        Values, falling, float64 on the CPU; vectors N x k on the device of `start`; the largest residual
        norm |A v - value v|.
    """
    n = len(start)
    start = project_out(start[:, : min(BLOCK, rank)].clone())
    nodes, above, low = _density(operator, start[:, :DENSITY_COLUMNS].contiguous())
    high = float(nodes[0])
    # of few eigenvalues among very many, the share is too small for any node: between the first two
    cut = float(np.interp(KEPT * k / rank, np.r_[0, above], np.r_[high, nodes]))
    cut = min(cut, high - LEAST_WINDOW * (high - low))
    filtered = operator
    # a filter pays where most eigenvalues are damped, and needs an interval to damp
    if KEPT * k < rank and cut - low > LEAST_DAMPED * (high - low):
        filtered = _chebyshev_filter(operator, low, cut, high)
    columns = min(BASIS_FACTOR * k, basis_bytes // (4 * n))
    krylov = _Krylov(start, min(max(columns, k + 3 * BLOCK), rank), project_out, seed)
    _invariant_space(filtered, krylov, k, rank, tolerance)
    return _rayleigh_ritz(operator, krylov.basis[:, :k])


def laplacian_spectrum(
    affinity: sp.csr_matrix,
    num_vectors: int = 199,
    *,
    self_loops: str = "published",
    tolerance: float | None = None,
    seed: int = 0,
    solver: str = "auto",
    device: torch.device | str = "cpu",
    basis_bytes: int = BASIS_BYTES,
    product: Operator | None = None,
) -> Spectrum:
    """The eigenvectors of smallest positive eigenvalue of the normalized Laplacian.

    A graph with c components has c eigenvalues 0, whose vectors are known in closed form. They are
    moved to the other end of the spectrum before the solver starts, so that neither their number nor
    the solver's accuracy decides what counts as zero.

    Args:
        affinity: symmetric W, N x N.
        num_vectors: k, cut down to N - c. Published: 200 including the constant one, so 199. Fewer
            come back where an eigenvalue repeats so often that Lanczos does not find all its vectors.
        self_loops: a key of `SELF_LOOPS`. The published code leaves W's diagonal out of the Laplacian
            and counts it in the degrees of the constraints.
        tolerance: of "arpack", the relative accuracy of the eigenvalues of S (all at most 1), `TOLERANCE`
            if None; of "block", as in `largest_eigenvectors`, `BLOCK_TOLERANCE` if None.
        seed: of the start vectors; the same seed gives the same vectors.
        solver: "arpack" (Lanczos, CPU, one core), "block" (`largest_eigenvectors`), or "auto": block from
            `BLOCK_FROM` nodes on. Very small problems are dense whatever is chosen.
        device: of the products, and of the block solver.
        basis_bytes: bound of its basis.
        product: products with S on `device`, where they exist already or its rows are divided among
            processes; made here if None.

    Raises:
        ValueError: for an unknown choice of self-loops or solver, or where ARPACK fails (a graph in
            shreds).

    Warns:
        UserWarning: where the graph falls apart, naming the number of components; where the vectors are not
            accurate.
    """
    in_laplacian, in_degrees = self_loop_choice(self_loops)
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}: take one of {', '.join(SOLVERS)}")
    seed_degrees = positive_degrees(affinity, self_loops=in_degrees)
    components, null = null_space(affinity, self_loops=in_laplacian)
    n, count = len(null), int(components.max()) + 1
    _warn_of_components(components, count)
    num_vectors = min(num_vectors, n - count)
    if num_vectors < 1:
        empty = np.empty((n, 0), np.float32)
        return Spectrum(np.empty(0), empty, components, null, seed_degrees)
    if product is None:
        product = csr_operator(normalized_affinity(affinity, self_loops=in_laplacian), device)
    space = (product, null, components, num_vectors)
    solver = _solver_for(solver, n, num_vectors)
    if solver == "block":
        tolerance = tolerance or BLOCK_TOLERANCE
        values, vectors, residual = _by_blocks(*space, tolerance, seed, device, basis_bytes)
    else:
        on_host = _on_host(product, device)
        values, vectors = _deflated_eigh(
            on_host, *space[1:], solver == "dense", tolerance or TOLERANCE, seed
        )
        residual = _residual(on_host, values, vectors)
    # rounding can put an almost disconnected part at 0 or below
    laplacian_values = np.maximum(1 - values.astype(np.float64), np.finfo(np.float32).eps)
    if residual > LARGE_RESIDUAL:
        warnings.warn(
            f"the eigenvectors are known to a residual of {residual:.1e} only, for want of a gap between "
            "eigenvalues: take another number of eigenvectors, or a larger basis",
            stacklevel=2,
        )
    return Spectrum(laplacian_values, vectors, components, null, seed_degrees, residual)


def _warn_of_components(components: np.ndarray, count: int) -> None:
    if count > 1:
        warnings.warn(
            f"the graph has {count} components (the largest holds {np.bincount(components).max()} of "
            f"{len(components)} images); an image whose component holds no label gets confidence 0. More "
            "neighbors per image join them",
            stacklevel=3,
        )


def _on_host(product: Operator, device: torch.device | str) -> Callable[[np.ndarray], np.ndarray]:
    """The same products for a solver of scipy: N x m (or N) float32 arrays."""

    def apply(x: np.ndarray) -> np.ndarray:
        columns = torch.from_numpy(np.ascontiguousarray(x.reshape(len(x), -1), dtype=np.float32))
        return product(columns.to(device)).cpu().numpy().reshape(x.shape)

    return apply


def _solver_for(solver: str, n: int, k: int) -> str:
    if n < DENSE_BELOW or (k > n // 2 and (solver == "arpack" or n < BLOCK_FROM)):
        return "dense"
    if solver == "auto":
        return "block" if n >= BLOCK_FROM else "arpack"
    return solver


def _by_blocks(
    product: Operator,
    null: np.ndarray,
    components: np.ndarray,
    k: int,
    tolerance: float,
    seed: int,
    device: torch.device | str,
    basis_bytes: int,
) -> tuple[np.ndarray, np.ndarray, float]:
    rng = torch.Generator().manual_seed(seed)
    start = torch.randn(len(null), BLOCK, generator=rng).to(device)
    values, vectors, residual = largest_eigenvectors(
        product,
        null_projection(null, components, device),
        start,
        k,
        rank=len(null) - int(components.max()) - 1,
        tolerance=tolerance,
        basis_bytes=basis_bytes,
        seed=seed,
    )
    return values.numpy(), vectors.cpu().numpy(), residual


def _deflated_eigh(
    product: Callable[[np.ndarray], np.ndarray],
    null: np.ndarray,
    components: np.ndarray,
    k: int,
    exact: bool,
    tolerance: float,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Largest eigenvalues, falling, and their vectors, by LAPACK if `exact`, otherwise by ARPACK."""
    n, count = len(null), int(components.max()) + 1
    basis = sp.csr_matrix((null.astype(np.float32), (np.arange(n), components)), (n, count))

    def deflated(x: np.ndarray) -> np.ndarray:
        # eigenvalue 1 of the null vectors becomes -2, below every other one (they are >= -1)
        return product(x) - 3 * (basis @ (basis.T @ x))

    if exact:
        values, vectors = np.linalg.eigh(deflated(np.eye(n)))
    else:
        rng = np.random.default_rng(seed)
        start = rng.standard_normal(n).astype(np.float32)
        operator = LinearOperator((n, n), matvec=deflated, matmat=deflated, dtype=np.float32)
        restarts = {"rng": rng} if SEEDED_RESTARTS else {}
        try:
            values, vectors = eigsh(operator, k, which="LA", v0=start, tol=tolerance, **restarts)
        except ArpackError as error:
            raise ValueError(
                f"the eigenvectors of this graph of {count} components cannot be found ({error}); take "
                "more neighbors per image or fewer eigenvectors"
            ) from error
    order = np.argsort(-values)[:k]
    order = order[values[order] > NULL_BELOW]
    return values[order], vectors[:, order].astype(np.float32)


def _residual(
    product: Callable[[np.ndarray], np.ndarray], values: np.ndarray, vectors: np.ndarray
) -> float:
    tiles = range(0, len(values), BLOCK)
    parts = [vectors[:, t : t + BLOCK] for t in tiles]
    errors = [
        np.linalg.norm(product(part) - part * values[t : t + BLOCK], axis=0)
        for t, part in zip(tiles, parts, strict=True)
    ]
    return float(np.concatenate(errors).max()) if errors else 0.0
