"""Running means that stay on the device until they are read."""

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

    def state(self) -> tuple[float, float]:
        """The two sums, to continue from them in another process to the last bit."""
        return float(self._total), float(self._weight)

    def load_state(self, state: tuple[float, float]) -> None:
        self._total, self._weight = state

    @property
    def value(self) -> float:
        """The mean so far; NaN before the first update."""
        weight = float(self._weight)
        return float(self._total) / weight if weight else float("nan")
