"""Running means that stay on the device until they are read, and how fast images go by."""

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
        """The two sums, to continue from them in another process to the last bit."""
        return float(self._total), float(self._weight)

    def load_state(self, state: tuple[float, float]) -> None:
        self._total, self._weight = state

    @property
    def value(self) -> float:
        """The mean so far; NaN before the first update."""
        weight = float(self._weight)
        return float(self._total) / weight if weight else float("nan")


class Throughput:
    """How fast training goes, and what share of the time it waits for images; pauses do not count.

    Args:
        waited: gives the seconds spent waiting for images so far.
        mfu: images per second -> the part of the hardware's matrix rate that they use.
    """

    def __init__(
        self,
        waited: Callable[[], float],
        mfu: Callable[[float], float] | None = None,
    ) -> None:
        self._waited_so_far, self._mfu = waited, mfu
        self._restart()

    def _restart(self) -> None:
        self._images, self._since = 0, time.perf_counter()
        self._waited = self._waited_so_far()

    def count(self, images: int) -> None:
        self._images += images

    def lap(self) -> dict[str, float]:
        """Since the last lap `images_per_s`, `data_wait`, the share of waiting, and `mfu`."""
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
    """The end of a progress line, from what `Throughput.lap` gave."""
    parts = [f"{100 * values['data_wait']:.0f}% of the time waiting for images"]
    if "mfu" in values:
        parts.append(f"{100 * values['mfu']:.0f}% MFU")
    return f"{values['images_per_s']:.0f} img/s ({', '.join(parts)})"
