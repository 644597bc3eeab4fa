"""How good pseudo-labels are, where true labels are known. Nothing here feeds back into them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from datasets.images import UNKNOWN
from lib.labels.confidence import entropy
from lib.labels.pseudo_labels import TOP, PseudoLabels


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
        found = (self.overall, self.auc, self.auc_by_entropy)
        return ["?" if math.isnan(figure) else f"{figure:.2f}" for figure in found]


def accuracy_coverage(pseudo: PseudoLabels, targets: Tensor) -> Curve | None:
    """Compute the curve over the pseudo-labeled images whose true label is known; None if there are none.

    The entropy is that of the pseudo-labels, or of their probabilities; the published exp(-entropy) ranks the
    same. `targets` are the N true labels of the training set, `UNKNOWN` where there is none.
    """
    true = targets[pseudo.indexes]
    known = true != UNKNOWN
    if not known.any():
        return None
    correct = (pseudo.labels[known] == true[known]).double()
    count = torch.arange(1, len(correct) + 1)
    uncertainty = pseudo.entropy
    if uncertainty is None and pseudo.probabilities is not None:
        uncertainty = entropy(pseudo.probabilities.log())
    by_entropy = None
    if uncertainty is not None:
        by_entropy = correct[uncertainty[known].argsort(stable=True)].cumsum(0) / count
    return Curve(count / len(correct), correct.cumsum(0) / count, by_entropy)


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


def table_row(num_labels: int, curve: Curve | None) -> str:
    """Write a line of a text table; ? where a figure is not known."""
    overall, auc, by_entropy = curve.figures() if curve else "???"
    return f"{num_labels:6d}  {overall:>8}%  {auc:>16}%  {by_entropy:>13}%"


def summary(curves: dict[int, Curve], top5: Mapping[int, Tensor] | None = None) -> str:
    """Write a text table of precision and AUC, in both rankings, by number of labels.

    `top5`, what `top_k_hits` returns for each number of labels, adds a column.
    """
    lines = [HEADS + ("  top-5 precision" if top5 else "")]
    for n, curve in sorted(curves.items()):
        more = f"  {100 * float(top5[n].double().mean()):14.2f}%" if top5 else ""
        lines.append(table_row(n, curve) + more)
    return "\n".join(lines)
