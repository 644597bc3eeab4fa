"""How good pseudo-labels are, where true labels are known. Nothing here feeds back into them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from datasets.images import UNKNOWN
from lib.labels.confidence import entropy, largest_confidence
from lib.labels.pseudo_labels import TOP, PseudoLabels

BINS = 15  # of the largest probability, as in Guo et al. 2017


@dataclass(frozen=True)
class Reliability:
    """How often labels are right in bins of their largest probability (Guo et al. 2017), of equal width."""

    count: Tensor  # of images in each bin
    probability: Tensor  # mean largest probability in each bin; 0 in an empty one, as the next
    accuracy: Tensor  # share of right labels in each bin

    @property
    def error(self) -> float:
        """Return the expected calibration error, the mean of |accuracy - probability|, in percent."""
        gap = (self.accuracy - self.probability).abs()
        return 100 * float((self.count * gap).sum() / self.count.sum())


def reliability(probability: Tensor, correct: Tensor, bins: int = BINS) -> Reliability:
    """Sort images into bins (a, b] by their largest probability, and average both in each.

    >>> reliability(torch.tensor([0.9, 1.0, 0.1]), torch.tensor([1.0, 0.0, 0.0]), bins=2).accuracy
    tensor([0.0000, 0.5000], dtype=torch.float64)
    """
    place = ((bins * probability.double()).ceil() - 1).clamp(0, bins - 1).long()
    count = torch.bincount(place, minlength=bins)
    sums = (torch.bincount(place, x.double(), bins) for x in (probability, correct))
    return Reliability(count, *(total / count.clamp_min(1) for total in sums))


@dataclass(frozen=True)
class Curve:
    """Accuracy-coverage curve: the precision of the first k of U pseudo-labels, k = 1 ... U, in two rankings.

    The published AUCs of the normalized cut on CIFAR-10 rank by entropy, those of nearest neighbors by their
    confidence, as the curves of the normalized cut on ImageNet do.
    """

    coverage: Tensor  # share of the pseudo-labels, k / U, in (0, 1]
    precision: Tensor  # share of correct labels among the k most confident, in [0, 1]
    # The same among the k whose probabilities have the least entropy; None where they are not known.
    precision_by_entropy: Tensor | None = None
    # Those of the published probabilities and of the calibrated ones; None where they are not known.
    published: Reliability | None = None
    calibrated: Reliability | None = None

    @property
    def overall(self) -> float:
        """Return the precision of all pseudo-labels, in percent."""
        return 100 * float(self.precision[-1])

    @property
    def auc(self) -> float:
        """Return the area under the curve by confidence, in percent: the mean precision over k."""
        return 100 * float(self.precision.mean())

    @property
    def auc_by_entropy(self) -> float:
        """Return the area under the curve by entropy, in percent; NaN where the entropy is not known."""
        known = self.precision_by_entropy is not None
        return 100 * float(self.precision_by_entropy.mean()) if known else math.nan

    def figures(self) -> list[str]:
        """Format overall precision, AUC by confidence and by entropy, in percent; ? where not known."""
        return _formatted(self.overall, self.auc, self.auc_by_entropy)

    def errors(self) -> list[str]:
        """Format the calibration errors of the published and the calibrated probabilities, in percent."""
        both = (self.published, self.calibrated)
        return _formatted(*(one.error if one else math.nan for one in both))


def _formatted(*figures: float) -> list[str]:
    return ["?" if math.isnan(figure) else f"{figure:.2f}" for figure in figures]


def accuracy_coverage(pseudo: PseudoLabels, targets: Tensor) -> Curve | None:
    """Compute the curve over the pseudo-labeled images whose true label is known; None if there are none.

    Entropy and largest probability are those of the pseudo-labels, or of their probabilities; the published
    exp(-entropy) ranks the same. `targets` are the N true labels of the training set, `UNKNOWN` where there
    is none.
    """
    true = targets[pseudo.indexes]
    known = true != UNKNOWN
    if not known.any():
        return None
    correct = (pseudo.labels[known] == true[known]).double()
    count = torch.arange(1, len(correct) + 1)
    uncertainty, largest = pseudo.entropy, pseudo.largest
    if pseudo.probabilities is not None and (uncertainty is None or largest is None):
        # The published probabilities of a file whose own ones are calibrated.
        logits, temperature = pseudo.probabilities.log(), 1 / pseudo.meta.get("calibration", 1.0)
        uncertainty = entropy(logits, temperature)
        before, after = largest_confidence(logits, temperature), pseudo.probabilities.amax(dim=1)
        largest = torch.stack([before, after], dim=1)
    by_entropy, both = None, ()
    if uncertainty is not None:
        by_entropy = correct[uncertainty[known].argsort(stable=True)].cumsum(0) / count
    if largest is not None:
        both = (reliability(one, correct) for one in largest[known].T)
    return Curve(count / len(correct), correct.cumsum(0) / count, by_entropy, *both)


def top_k_hits(pseudo: PseudoLabels, targets: Tensor, k: int = 5) -> Tensor:
    """Tell for each image with a true label whether that is among the k most probable classes.

    The pseudo-labels have probabilities, or at least k `top_classes`. The mean of these booleans, over all
    chunks of a set, is the top-k precision.
    """
    true = targets[pseudo.indexes]
    known = true != UNKNOWN
    if pseudo.probabilities is not None:
        probable = pseudo.probabilities[known].topk(min(k, pseudo.probabilities.shape[1])).indices
    else:
        assert pseudo.top_classes is not None
        assert k <= TOP
        probable = pseudo.top_classes[known, :k]
    return probable.eq(true[known][:, None]).any(dim=1)


HEADS = "labels  precision  AUC by confidence  AUC by entropy"  # of what `table_row` writes
ERROR_HEADS = "  ECE published     ECE"  # of what `error_cells` writes


def table_row(num_labels: int, curve: Curve | None) -> str:
    """Write a line of a text table; ? where a figure is not known."""
    overall, auc, by_entropy = curve.figures() if curve else "???"
    return f"{num_labels:6d}  {overall:>8}%  {auc:>16}%  {by_entropy:>13}%"


def error_cells(curve: Curve | None) -> str:
    """Write the calibration errors as further columns of a line; ? where one is not known."""
    published, calibrated = curve.errors() if curve else "??"
    return f"  {published:>12}%  {calibrated:>5}%"


def summary(curves: dict[int, Curve], top5: Mapping[int, Tensor] | None = None) -> str:
    """Write a text table of precision, AUC in both rankings and calibration errors, by number of labels.

    `top5`, what `top_k_hits` returns for each number of labels, adds a column. The errors, where the
    probabilities of a curve are known, are the last ones.
    """
    with_errors = any(curve.calibrated for curve in curves.values())
    heads = HEADS + ("  top-5 precision" if top5 else "")
    lines = [heads + (ERROR_HEADS if with_errors else "")]
    for n, curve in sorted(curves.items()):
        more = f"  {100 * float(top5[n].double().mean()):14.2f}%" if top5 else ""
        more += error_cells(curve) if with_errors else ""
        lines.append(table_row(n, curve) + more)
    return "\n".join(lines)
