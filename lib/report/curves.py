"""How good pseudo-labels are, where true labels are known. Nothing here feeds back into them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from datasets.images import UNKNOWN
from lib.labels.pseudo_labels import TOP, PseudoLabels


@dataclass(frozen=True)
class Curve:
    """Accuracy-coverage curve: the precision of the k most confident of U pseudo-labels, k = 1 ... U."""

    coverage: Tensor  # share of the pseudo-labels, k / U, in (0, 1]
    precision: Tensor  # share of correct labels among the first k, in [0, 1]

    @property
    def overall(self) -> float:
        """Return the precision of all pseudo-labels, in percent."""
        return 100 * float(self.precision[-1])

    @property
    def auc(self) -> float:
        """Return the area under the curve, in percent: the mean precision over k."""
        return 100 * float(self.precision.mean())


def accuracy_coverage(pseudo: PseudoLabels, targets: Tensor) -> Curve | None:
    """Compute the curve over the pseudo-labeled images whose true label is known; None if there are none.

    `targets` are the N true labels of the training set, `UNKNOWN` where there is none.
    """
    true = targets[pseudo.indexes]
    known = true != UNKNOWN
    if not known.any():
        return None
    correct = (pseudo.labels[known] == true[known]).double()
    count = torch.arange(1, len(correct) + 1)
    return Curve(count / len(correct), correct.cumsum(0) / count)


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


def summary(curves: dict[int, Curve], top5: Mapping[int, Tensor] | None = None) -> str:
    """Write a text table of precision and AUC by number of labels.

    `top5`, what `top_k_hits` returns for each number of labels, adds a column.
    """
    lines = ["labels  precision     AUC" + ("  top-5 precision" if top5 else "")]
    for n, curve in sorted(curves.items()):
        more = f"  {100 * float(top5[n].double().mean()):14.2f}%" if top5 else ""
        lines.append(f"{n:6d}  {curve.overall:8.2f}%  {curve.auc:5.2f}%{more}")
    return "\n".join(lines)
