"""How good pseudo-labels are, where the true labels are known. Nothing here feeds back into them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from datasets.images import UNKNOWN
from lib.pseudo_labels import PseudoLabels


@dataclass(frozen=True)
class Curve:
    """Precision of the k most confident pseudo-labels, k = 1 ... U.

    Attributes:
        coverage: k / U, in (0, 1].
        precision: share of correct labels among the first k, in [0, 1].
    """

    coverage: Tensor
    precision: Tensor

    @property
    def overall(self) -> float:
        """Precision over all of them, in percent."""
        return 100 * float(self.precision[-1])

    @property
    def auc(self) -> float:
        """Area under precision over coverage, in percent: the mean over k."""
        return 100 * float(self.precision.mean())


def confidence_precision(pseudo: PseudoLabels, targets: Tensor) -> Curve | None:
    """The curve over the pseudo-labelled images whose true label is known; None if there are none.

    Args:
        targets: N true labels of the training set, `UNKNOWN` where there is none.
    """
    true = targets[pseudo.indexes]
    known = true != UNKNOWN
    if not known.any():
        return None
    correct = (pseudo.labels[known] == true[known]).double()
    count = torch.arange(1, len(correct) + 1)
    return Curve(count / len(correct), correct.cumsum(0) / count)


def summary(curves: dict[int, Curve]) -> str:
    """A text table of precision and AUC by number of labels."""
    lines = ["labels  precision     AUC"]
    lines += [f"{n:6d}  {c.overall:8.2f}%  {c.auc:5.2f}%" for n, c in sorted(curves.items())]
    return "\n".join(lines)
