"""What pseudo-labels gain a classifier: phase 2 estimates it (`lib.propagation.gain`), phase 3 goes by it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lib.files.schema import Check, entries, list_of, number, whole

AUTO = "auto"  # value of --pseudo-ratio for the share that is estimated best
KEY = "gain"  # of the estimate in the `meta` of pseudo-labels
CHECK: Check = entries(
    {
        "ratios": list_of(number(0, 1)),
        "accuracies": list_of(number(0, 100)),
        "held_out": whole(),
    },
    required=True,
)


@dataclass(frozen=True)
class Gain:
    """Accuracy on held-out labels in percent, by the share of the pseudo-labels that is trained on.

    There is none where no class has two labels, so that none could be held out.
    """

    accuracy: Mapping[float, float]  # the share 0 is the other labels alone
    num_held_out: int  # images, each counted once

    @classmethod
    def read(cls, meta: Mapping[str, Any]) -> "Gain | None":
        """Take the estimate from the `meta` of pseudo-labels; None if phase 2 was not asked for one.

        Raises:
            ValueError: if it was damaged.
        """
        if KEY not in meta:
            return None
        found = meta[KEY]
        ratios, accuracies = found["ratios"], found["accuracies"]
        if len(ratios) != len(accuracies) or (ratios and 0 not in ratios):
            raise ValueError(
                f"the estimated gain has {len(accuracies)} accuracies for the shares {ratios}"
            )
        return cls(dict(zip(ratios, accuracies, strict=True)), found["held_out"])

    def entry(self) -> dict[str, Any]:
        """Return what `read` reads."""
        ratios = list(self.accuracy)
        accuracies = [self.accuracy[ratio] for ratio in ratios]
        return {"ratios": ratios, "accuracies": accuracies, "held_out": self.num_held_out}

    @property
    def ratio(self) -> float:
        """The share with the highest accuracy, the largest one of equals; 1 where nothing is known."""
        if not self.accuracy:
            return 1.0
        return max(self.accuracy, key=lambda ratio: (self.accuracy[ratio], ratio))

    def __str__(self) -> str:
        if not self.accuracy:
            return "no class has two labels, so none could be held out, and what they gain is not known"
        alone, best = self.accuracy[0.0], self.accuracy[self.ratio]
        text = f"of {self.num_held_out} labels, held out in turn, a linear classifier recognizes {alone:.1f}%"
        if self.ratio == 0:
            return f"{text} by the other labels alone, and no share of the pseudo-labels gains anything"
        return f"{text} by the other labels alone, {best:.1f}% with {self.ratio:.0%} of the pseudo-labels"


def parse_ratio(text: str | float) -> float | str:
    """Read a share of the pseudo-labels: a number or `auto`; anything else is a ValueError."""
    try:
        return text if text == AUTO else float(text)
    except ValueError:
        raise ValueError(f"must be a number or {AUTO}, not {text}") from None
