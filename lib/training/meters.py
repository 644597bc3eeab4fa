"""Running means that stay on the device until they are read, and the throughput of training."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor


class AverageMeter:
    """Weighted mean of scalars. `update` never waits for the device, `value` does."""

    def __init__(self) -> None:
        self._total: Tensor | float = 0.0
        self._weight: Tensor | float = 0.0

    def update(self, value: Tensor | float, weight: Tensor | float = 1.0) -> None:
        value = value.detach().double() if isinstance(value, Tensor) else value
        self._total = self._total + value * weight
        self._weight = self._weight + weight

    def state(self) -> tuple[float, float]:
        """Return the two sums, from which a resumed run continues to the last bit."""
        return float(self._total), float(self._weight)

    def load_state(self, state: tuple[float, float]) -> None:
        self._total, self._weight = state

    @property
    def value(self) -> float:
        """Mean so far; NaN before the first update."""
        weight = float(self._weight)
        return float(self._total) / weight if weight else float("nan")


class Throughput:
    """The speed of training; pauses do not count.

    Args:
        waited: function that returns the seconds spent waiting for images so far.
        mfu: function from images per second to model FLOPs utilization.
    """

    def __init__(
        self, waited: Callable[[], float], mfu: Callable[[float], float] | None = None
    ) -> None:
        self._waited_so_far, self._mfu = waited, mfu
        self._restart()

    def _restart(self) -> None:
        self._images, self._since = 0, time.perf_counter()
        self._waited = self._waited_so_far()

    def count(self, images: int) -> None:
        self._images += images

    def lap(self) -> dict[str, float]:
        """Return `images_per_s`, `data_wait` (fraction of waiting) and `mfu` since the last lap."""
        seconds = time.perf_counter() - self._since
        waited = self._waited_so_far() - self._waited
        speed = {"images_per_s": self._images / seconds, "data_wait": waited / seconds}
        if self._mfu:
            speed["mfu"] = self._mfu(speed["images_per_s"])
        self._restart()
        return speed

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start


def speed(values: dict[str, float]) -> str:
    """Format the values of `Throughput.lap` for the end of a progress line."""
    parts = [f"{100 * values['data_wait']:.0f}% of the time waiting for images"]
    if "mfu" in values:
        parts.append(f"{100 * values['mfu']:.0f}% MFU")
    return f"{values['images_per_s']:.0f} img/s ({', '.join(parts)})"
