"""Cross-validation on the labeled images alone: choice of an algorithm, and calibrated probabilities."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from lib.labels.split import Split, others
from lib.propagation.algorithms import ALGORITHMS, run_algorithm
from lib.propagation.embedding_graph import EmbeddingGraph
from lib.propagation.labelings import Labeling
from lib.propagation.normalized_cut import NUM_EIGENVECTORS
from lib.propagation.scores import log_shares
from lib.runtime.seeding import generator

MAX_FOLDS = 5
FEW_LABELS = 200  # fewer labels are divided again until there are about FOLDS_OF_FEW folds
FOLDS_OF_FEW = 10
LEAST_HELD_OUT = 30  # images; fewer cannot tell a dozen candidates apart
COMMITTEE = 3  # members of an ensemble
FOLD_BYTES = 2**30  # bound of the logits of several folds at a time
TEMPERATURES = torch.logspace(-1, 1.5, 26)  # tried for every candidate
FINE_TEMPERATURES = torch.logspace(-2, 2, 161)  # tried for calibration
ENOUGH_HELD_OUT = 1000  # images, to fit this one number: further folds are left out
PULL = 30  # images that count as if the published probabilities were right; measured


@dataclass(frozen=True)
class Candidate:
    """Algorithm with its parameters."""

    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        given = ", ".join(f"{k}={v}" for k, v in self.parameters.items())
        return f"{self.method}({given})" if given else self.method


def _filter(name: str, **parameters: float) -> Candidate:
    return Candidate("filter", {"filter": name, **parameters})


# The order is that of preference: the smoothest solution first, as it errs least where labels are few.
CANDIDATES = (
    _filter("heat", time=20.0),
    _filter("smoothed-step", cutoff=0.2),
    _filter("heat", time=10.0),
    _filter("smoothed-step", cutoff=0.4),
    _filter("heat", time=5.0),
    *(Candidate("nc", {"num_eigenvectors": k}) for k in (50, 200, 500)),
    Candidate("poisson"),
    _filter("ppr", alpha=0.9),
    Candidate("spreading", {"alpha": 0.99}),
    *(Candidate("knn", {"k": k}) for k in (10, 50, 200)),
)
STANDARD_ERRORS = 1.5  # by which a candidate may be worse and still count as equal; measured


@dataclass(frozen=True)
class Verdict:
    """What cross-validation found for one candidate."""

    candidate: Candidate
    temperature: float  # makes the held-out labels most likely under its probabilities
    losses: Tensor  # of each held-out image


def make_folds(labels: Tensor, seed: int, most: int = MAX_FOLDS) -> list[Tensor]:
    """Divide the labeled images into folds: the positions to hold out, while every class keeps one or more.

    Each class is dealt out over the folds by itself; its only label is never held out. With m labels of the
    rarest class that has two or more there are min(m, most) folds. Fewer labels than `FEW_LABELS` are
    dealt out several times, each time in another order.
    """
    counts = torch.bincount(labels)
    divisible = counts[counts >= 2]
    if not len(divisible):
        return []
    num_folds = min(int(divisible.min()), most)
    repeats = FOLDS_OF_FEW // num_folds if len(labels) < FEW_LABELS else 1
    held = []
    for repeat in range(repeats):
        rng = generator(seed, "sample", repeat)
        fold = torch.full_like(labels, -1)
        for label in (counts >= 2).nonzero()[:, 0]:
            members = (labels == label).nonzero()[:, 0]
            members = members[torch.randperm(len(members), generator=rng)]
            fold[members] = torch.arange(len(members)) % num_folds
        held += [(fold == k).nonzero()[:, 0] for k in range(num_folds)]
    return held


def fit_temperature(
    logits: Tensor, labels: Tensor, temperatures: Tensor = TEMPERATURES, pull: float = 0.0
) -> float:
    """Find the one of `temperatures` that makes the labels most likely (Guo et al. 2017).

    With a `pull`, the softmax of the n x C logits counts as the classes of `pull` n further images. Few
    labels then move the temperature little away from 1, even where all of them are right, or none.
    """

    def loss(temperature: float) -> float:
        tempered = logits / temperature
        found = cross_entropy(tempered, labels)
        return float(found + pull * cross_entropy(tempered, logits.softmax(dim=1)))

    losses = torch.tensor([loss(temperature) for temperature in temperatures.tolist()])
    return float(temperatures[int(losses.argmin())])


def brier(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the squared distance of softmax(logits) from the true class (Brier 1950): n, in [0, 2]."""
    return (logits.softmax(dim=1) - one_hot(labels, logits.shape[1])).square().sum(dim=1)


def _held_out_logits(
    graph: EmbeddingGraph,
    candidate: Candidate,
    labeling: Labeling,
    held: list[Tensor],
    **common: Any,
) -> Tensor:
    """Compute the logits of the held-out images of every fold, in that order, on the CPU."""
    labeled, labels = labeling
    if not ALGORITHMS[candidate.method].needs_graph:  # the other images have no say
        graph, labeled = EmbeddingGraph(graph.features[labeled]), torch.arange(len(labeled))
    size = max(1, FOLD_BYTES // (4 * len(graph) * common["num_classes"]))
    logits = []
    for first in range(0, len(held), size):
        batch = held[first : first + size]
        kept = [others(len(labeled), out) for out in batch]
        labelings = [Labeling(labeled[k], labels[k]) for k in kept]
        answers = run_algorithm(
            graph, candidate.method, labelings, **common, **candidate.parameters
        )
        logits += [answer[labeled[out]].cpu() for answer, out in zip(answers, batch, strict=True)]
    return torch.cat(logits)


def cross_validate(
    graph: EmbeddingGraph,
    labeling: Labeling,
    num_classes: int,
    *,
    candidates: Sequence[Candidate] = CANDIDATES,
    class_prior: Tensor | Sequence[float] | None = None,
    least_held_out: int = 0,
    seed: int = 0,
) -> list[Verdict]:
    """Measure every candidate on labeled images that it was not told of; `labeling` is all that is known.

    Where fewer than `least_held_out` images can be held out, only the first candidate is measured.

    Returns:
        A verdict for each candidate, in their order; the same for all where no class has two labels.
    """
    labels = labeling.labels
    held = make_folds(labels, seed)
    if not held:
        return [Verdict(candidate, 1.0, torch.zeros(1)) for candidate in candidates]
    positions = torch.cat(held)
    count = torch.bincount(positions, minlength=len(labels)).clamp_min(1)
    if len(positions.unique()) < least_held_out:
        candidates = candidates[:1]
    cuts = [candidate.parameters for candidate in candidates if candidate.method == "nc"]
    if cuts:  # the spectra of all of them are the beginning of the largest one
        graph.spectrum(max(p.get("num_eigenvectors", NUM_EIGENVECTORS) for p in cuts) - 1)
    verdicts, common = [], {"num_classes": num_classes, "class_prior": class_prior}
    for candidate in candidates:
        logits = _held_out_logits(graph, candidate, labeling, held, **common)
        temperature = fit_temperature(logits, labels[positions])
        loss = brier(logits / temperature, labels[positions])
        sums = torch.zeros(len(labels)).index_add_(0, positions, loss)
        verdicts.append(Verdict(candidate, temperature, (sums / count)[positions.unique()]))
    return verdicts


def calibrate(
    graph: EmbeddingGraph,
    method: str,
    split: Split,
    labels: Tensor,
    num_classes: int,
    *,
    class_prior: Tensor | Sequence[float] | None = None,
    at: float = 1.0,
    seed: int = 0,
    **parameters: Any,
) -> float | None:
    """Find the temperature that calibrates what `propagate` says with the same arguments.

    Labeled images are held out in turn, and their labels are compared with what the others say of them. No
    other label is ever read.

    Args:
        at: temperature of the pseudo-labels, on top of which the fitted one comes.

    Returns:
        T: softmax(z / (at T)) are the calibrated probabilities. None where no class has two labels,
        so that nothing can be held out, and for `auto` and `ensemble`, whose scores are calibrated already.
    """
    if method not in ALGORITHMS:
        return None
    held = make_folds(labels, seed, ALGORITHMS[method].folds)
    if not held:
        return None
    enough = min(ENOUGH_HELD_OUT, len(torch.cat(held).unique()))  # and each image once
    sizes = torch.tensor([len(out) for out in held]).cumsum(0)
    held = held[: int((sizes < enough).sum()) + 1]
    candidate, labeling = Candidate(method, parameters), Labeling(split.labeled, labels)
    common = {"num_classes": num_classes, "class_prior": class_prior}
    logits = _held_out_logits(graph, candidate, labeling, held, **common) / at
    positions = torch.cat(held)
    return fit_temperature(logits, labels[positions], FINE_TEMPERATURES, PULL / len(positions))


def best(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the first candidate, in order of preference, that is not significantly worse than the best.

    A candidate is as good as the one of smallest loss where the mean of their differences over the
    held-out images is within `STANDARD_ERRORS` standard errors (after the one-standard-error rule of
    Breiman et al. 1984, with the errors of paired differences). With few labels preference decides.
    """
    leader = min(verdicts, key=lambda v: float(v.losses.mean()))
    for verdict in verdicts:
        worse = verdict.losses - leader.losses
        error = float(worse.std()) / len(worse) ** 0.5 if len(worse) > 1 else float("inf")
        if float(worse.mean()) <= STANDARD_ERRORS * error:
            return verdict
    return leader


def choose(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the best verdict; the first where fewer than `LEAST_HELD_OUT` images could be held out."""
    return best(verdicts) if len(verdicts[0].losses) >= LEAST_HELD_OUT else verdicts[0]


def committee(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Return the best verdict of each algorithm, `COMMITTEE` of them at most, the smallest losses first."""
    members: dict[str, Verdict] = {}
    for verdict in sorted(verdicts, key=lambda v: float(v.losses.mean())):
        members.setdefault(verdict.candidate.method, verdict)
    return list(members.values())[:COMMITTEE]


def average(logits: Sequence[Tensor], temperatures: Sequence[float]) -> Tensor:
    """Average softmax(z / T) over several N x C logits, each with its temperature; return the logarithm."""
    total = torch.zeros_like(logits[0])
    for one, temperature in zip(logits, temperatures, strict=True):
        total += (one / temperature).softmax(dim=1)
    return log_shares(total)
