"""Block Lanczos solver for the largest eigenvalues of a symmetric operator, in torch, on any device.

It works on a Chebyshev filter of the operator, chosen so that the wanted eigenvalues lie far above the
others. On large graphs it was measured to be 2 to 4 times as fast as library solvers.
"""

import warnings

import numpy as np
import torch
from torch import Tensor

from lib.graph.laplacian import Operator

BLOCK = 32  # columns of a block
GROWTH = 12  # logarithm of the filter's largest value, where its degree allows it
DEGREES = (4, 40)  # least and largest degree of the filter
LEAST_WINDOW = 0.01  # share of the spectrum's width that a filter leaves, at least
LEAST_DAMPED = 0.1  # share of the spectrum's width that a filter must damp to be worth it
WINDOW_FACTOR = 3.0  # times k: number of eigenvalues above the filter's damped interval
BASIS_FACTOR = 4  # times k: columns of the basis
BASIS_BYTES = 4 * 2**30  # bound of the basis
# Largest residual of a vector under the filter, relative to its eigenvalue there; leaves eigenvalues of L
# 1e-4 off on real features.
TOLERANCE = 1e-2
# Largest mixing with vectors beyond the last one (`_mixing`): on a flat spectrum 99.9% of the labels are then
# the exact ones, without this bound 68% (tests/graph/test_spectrum.py); on real features it costs nothing.
MIXING = 0.05
# Eigenvalues of the filter that differ by less count as one, whose vectors need not be told apart.
LEAST_GAP = 1e-4
RESTARTS = 10  # largest number of restarts
DENSITY_STEPS = 20  # Lanczos steps that show where the eigenvalues lie
DENSITY_COLUMNS = 8  # random starts of those steps
ROUNDING = 1e-5  # norms below are rounding, in float32 products of operators of norm 1
ROWS = 8192  # rows of a basis turned in place at a time


def _density(operator: Operator, start: Tensor) -> tuple[np.ndarray, np.ndarray, float]:
    """Find Ritz values, falling, the share of the spectrum above each, and a bound below all eigenvalues.

    By stochastic Lanczos quadrature (Ubaru, Chen & Saad 2017) from each column of `start` on its own.
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
    # Half of the share of a node lies above it.
    above = np.cumsum(shares) - shares / 2
    return nodes.ravel()[order], above, float(max(lowest.min(), -1))


def _chebyshev_filter(operator: Operator, low: float, cut: float, high: float) -> Operator:
    """Return T_d of the operator: damped on [low, cut], which goes to [-1, 1], and 1 at `high`."""
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


class _Krylov:
    """Orthonormal basis, grown by blocks and restarted thick, and the operator within it."""

    def __init__(self, start: Tensor, limit: int, project_out: Operator) -> None:
        self.rng = torch.Generator().manual_seed(0)
        self.project_out = project_out
        self.basis = torch.empty(len(start), limit, device=start.device)
        self.inner = np.zeros((limit, limit))  # basis^T A basis
        self.size, self.width = 0, start.shape[1]  # columns of the basis in use, and of a block
        self.append(self.next_block(start)[0])

    def next_block(self, block: Tensor, room: int | None = None) -> tuple[Tensor, Tensor]:
        """Factor block = Q R; the columns of Q, `room` at most, are orthonormal, also to the basis.

        It divides at least twice by the eigenvectors of the block's Gram matrix (SVQB: Stathopoulos & Wu
        2002).
        """
        width = self.width if room is None else min(self.width, room)
        used = self.basis[:, : self.size]
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
                # Random directions take the place of rounding, and R does not count them: so the solver
                # leaves an invariant space, and finds the copies of a repeated eigenvalue.
                fresh = torch.randn(len(block), int(lost.sum()), generator=self.rng)
                fresh = self.project_out(fresh.to(block.device) / len(block) ** 0.5)
                block[:, lost] = fresh.sub_(used @ (used.T @ fresh))
            block = self.project_out(block - used @ (used.T @ block))
            if attempt and not lost.any():
                break
        return block, total

    def append(self, block: Tensor) -> None:
        self.last = slice(self.size, self.size + block.shape[1])  # the columns of the newest block
        self.basis[:, self.last] = block
        self.size = self.last.stop

    def multiply(self, operator: Operator) -> Tensor:
        """Multiply the newest block by the operator; record and remove the part inside of the basis."""
        used = self.basis[:, : self.size]
        block = self.project_out(operator(self.basis[:, self.last].contiguous()))
        inside = used.T @ block
        block.sub_(used @ inside)
        self.inner[: self.size, self.last] = inside.double().cpu().numpy()
        self.inner[self.last, : self.size] = self.inner[: self.size, self.last].T
        return block

    def rotate(self, coordinates: np.ndarray) -> None:
        """Replace the basis by the vectors with these coordinates, some rows at a time."""
        turn = torch.from_numpy(coordinates.astype(np.float32)).to(self.basis.device)
        for rows in self.basis.split(ROWS):
            rows[:, : turn.shape[1]] = rows[:, : self.size] @ turn
        self.size = turn.shape[1]


def _mixing(values: np.ndarray, norms: np.ndarray) -> float:
    """Bound how much the first k Ritz vectors hold of unwanted directions, from 0 to 1.

    It is the root mean square of the sines of their angles to the wanted space; a residual over the gap to
    the first unwanted value bounds each (Davis & Kahan 1970). Where many eigenvalues lie close to the k-th,
    small residuals alone leave another space, and other labels.

    Args:
        values: all Ritz values, falling.
        norms: residual norms of the first k.
    """
    k = len(norms)
    gaps = np.maximum(values[:k] - values[k : k + 1].max(initial=-1), LEAST_GAP)
    return float(np.sqrt(np.minimum((norms / gaps) ** 2, 1).mean()))


def _invariant_space(operator: Operator, krylov: _Krylov, k: int, rank: int) -> None:
    """Grow the space until it holds the k largest eigenvectors of the operator, and keep only these."""
    limit, restarts = krylov.basis.shape[1], 0
    exhausted, before = False, np.full(k, np.inf)
    while True:
        block = krylov.multiply(operator)
        following, coupling = krylov.next_block(block, rank - krylov.size)
        exhausted |= not coupling.any(dim=1).all()
        full = krylov.size + following.shape[1] > limit
        if krylov.size >= min(k + 2 * krylov.width, limit, rank) or full:
            values, vectors = np.linalg.eigh(krylov.inner[: krylov.size, : krylov.size])
            values, vectors = values[::-1], vectors[:, ::-1]  # of Ritz: falling, and coordinates
            outside = coupling.cpu().numpy() @ vectors[krylov.last, :k]
            size = np.maximum(np.abs(values[:k]), ROUNDING)
            norms = np.linalg.norm(outside, axis=0)
            error, mixed = (norms / size).max(), _mixing(values, norms)
            # After a random continuation, exact vectors need not be all that there are.
            settled = (np.abs(values[:k] - before) <= TOLERANCE * size).all()
            before = values[:k].copy()
            converged = error <= TOLERANCE and mixed <= MIXING and (settled or not exhausted)
            if converged or krylov.size >= rank or restarts == RESTARTS:
                if mixed > MIXING and krylov.size < rank:
                    warnings.warn(
                        f"the eigenvectors were not told from those beyond the last one (mixing {mixed:.2f}, "
                        f"wanted {MIXING}): take another number of them, or the solver arpack",
                        stacklevel=2,
                    )
                return krylov.rotate(vectors[:, :k])
            if full:
                restarts += 1
                keep = min(k + krylov.width, limit - following.shape[1])
                krylov.rotate(vectors[:, :keep])
                krylov.inner[:] = np.diag(np.r_[values[:keep], np.zeros(limit - keep)])
        krylov.append(following)


def _rayleigh_ritz(operator: Operator, vectors: Tensor) -> tuple[Tensor, Tensor, float]:
    """Find the eigenpairs within the span of orthonormal columns, and their largest residual."""
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
    basis_bytes: int = BASIS_BYTES,
) -> tuple[Tensor, Tensor, float]:
    """Find the k largest eigenvalues of a symmetric operator between -1 and 1, and their vectors.

    Block Lanczos on a Chebyshev filter of the operator, whose damped interval ends where about
    `WINDOW_FACTOR` k eigenvalues lie above; it restarts thick when the basis is full, and ends with one
    Rayleigh-Ritz step of the operator itself.

    Args:
        operator: N x m -> N x m, contiguous; where the rows are divided among processes, it gathers them.
        project_out: takes the eigenvectors that are known already out of columns, in place.
        start: N x `BLOCK` random columns, on the device of the work.
        k: number of eigenvalues, at most `rank`.
        rank: N minus the number of vectors that `project_out` takes out.
        basis_bytes: bound of the basis, which takes 4 N BASIS_FACTOR k bytes if it may, and never less than
            k + 3 blocks. Beside it there are 2 N k numbers at the end, and a few blocks.

    Returns:
        Values, falling, float64 on the CPU; vectors N x k on the device of `start`; the largest residual
        norm |A v - value v|.
    """
    n = len(start)
    start = project_out(start[:, : min(BLOCK, rank)].clone())
    nodes, above, low = _density(operator, start[:, :DENSITY_COLUMNS].contiguous())
    high = float(nodes[0])
    # Few eigenvalues among very many have a share below that of any node: the cut lies before the first.
    cut = float(np.interp(WINDOW_FACTOR * k / rank, np.r_[0, above], np.r_[high, nodes]))
    cut = min(cut, high - LEAST_WINDOW * (high - low))
    filtered = operator
    # A filter pays where it damps most eigenvalues, and needs an interval to damp.
    if WINDOW_FACTOR * k < rank and cut - low > LEAST_DAMPED * (high - low):
        filtered = _chebyshev_filter(operator, low, cut, high)
    columns = min(BASIS_FACTOR * k, basis_bytes // (4 * n))
    krylov = _Krylov(start, min(max(columns, k + 3 * BLOCK), rank), project_out)
    _invariant_space(filtered, krylov, k, rank)
    return _rayleigh_ritz(operator, krylov.basis[:, :k])
