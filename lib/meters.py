"""Running means that stay on the device until they are read."""

import torch
from torch import Tensor


class Mean:
    """Weighted mean of scalars. `update` never waits for the device, `value` does."""

    def __init__(self) -> None:
        self._total: Tensor | float = 0.0
        self._weight: Tensor | float = 0.0

    def update(self, value: Tensor | float, weight: Tensor | float = 1.0) -> None:
        value = value.detach().double() if isinstance(value, Tensor) else value
        self._total = self._total + value * weight
        self._weight = self._weight + weight

    @property
    def value(self) -> float:
        """The mean so far; NaN before the first update."""
        if float(self._weight) == 0:
            return float("nan")
        return float(torch.as_tensor(self._total / self._weight))
