"""Progress lines, progress bars and the speed of a run."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta

from torch import nn

from lib.loading.batches import Batches
from lib.objectives.objective import Objective
from lib.runtime import profiling
from lib.runtime.devices import Device
from lib.runtime.distributed import print_main, progress_bar, world_size
from lib.training.log import Writer
from lib.training.state import TrainState
from lib.training.step import Step

BAR_EVERY = 50  # steps between losses on the progress bar: each one waits for the device


def step_arithmetic(
    model: nn.Module, objective: Objective, image_shape: tuple[int, int, int], device: Device
) -> profiling.Arithmetic:
    """Count the operations of training on one image, and measure the hardware's rate."""
    network = objective.views * profiling.training_flops(model, image_shape)
    needed = network + objective.flops_per_image()
    return profiling.Arithmetic(needed, profiling.matrix_rate(device) * world_size())


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
        """Exclude the time of a block."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start


class TimeLeft:
    """The time to the end of a run, as long per step as since this start: tests and pauses included."""

    def __init__(self, step: int, total: int) -> None:
        self._first, self._total, self._start = step, total, time.perf_counter()

    def __call__(self, step: int) -> str:
        """Return text for the end of a progress line after `step` steps."""
        if not self._first < step < self._total:
            return ""
        per_step = (time.perf_counter() - self._start) / (step - self._first)
        return f"  {timedelta(seconds=round(per_step * (self._total - step)))} left"


def speed(values: dict[str, float]) -> str:
    """Format the values of `Throughput.lap` for the end of a progress line."""
    parts = [f"{100 * values['data_wait']:.0f}% of the time waiting for images"]
    if "mfu" in values:
        parts.append(f"{100 * values['mfu']:.0f}% MFU")
    return f"{values['images_per_s']:.0f} img/s ({', '.join(parts)})"


class _Progress(AbstractContextManager):
    """A progress bar that ends with its block, and the speed so far."""

    def __init__(
        self, batches: Batches, arithmetic: profiling.Arithmetic, **bar: str | int
    ) -> None:
        self.throughput = Throughput(lambda: batches.waited_s, arithmetic.mfu)
        self.bar = progress_bar(unit="step", **bar)

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def count(self, step: Step) -> None:
        """Count a step, after `TrainState.count`."""
        self.throughput.count(step.batch_size)
        self.bar.update()


class EpochProgress(_Progress):
    """Progress within one epoch: a bar, and a line every `print_freq` steps."""

    def __init__(
        self,
        state: TrainState,
        steps_per_epoch: int,
        batches: Batches,
        arithmetic: profiling.Arithmetic,
        print_freq: int = 0,
    ) -> None:
        self.state, self.total, self.print_freq = state, steps_per_epoch, print_freq
        self.start = state.epoch * steps_per_epoch
        self._line = Throughput(lambda: batches.waited_s, arithmetic.mfu)
        bar = {"initial": state.step - self.start, "total": steps_per_epoch}
        super().__init__(batches, arithmetic, desc=f"epoch {state.epoch + 1}", **bar)

    def count(self, step: Step) -> None:
        super().count(step)
        state = self.state
        self._line.count(step.batch_size)
        done = state.step - self.start
        if self.print_freq and done % self.print_freq == 0:
            line = f"epoch {state.epoch + 1:4d}  step {done:5d}/{self.total}"
            line += f"  loss {state.means()['loss']:.4f}  lr {step.lr:.5f}"
            print_main(f"{line}  {speed(self._line.lap())}")
        elif state.step % BAR_EVERY == 0 and not self.bar.disable:
            self.bar.set_postfix(loss=f"{state.means()['loss']:.3f}")

    def finish(self) -> dict[str, float]:
        """Return the means of the epoch by name, and the speed since this start."""
        means = self.state.means()  # waits for the device, before the clock is read
        return means | self.throughput.lap()


class RunProgress(_Progress):
    """Progress of a run that is counted in steps: a bar, and lines on request."""

    def __init__(
        self,
        state: TrainState,
        max_iters: int,
        batches: Batches,
        arithmetic: profiling.Arithmetic,
        write: Writer,
    ) -> None:
        self.state, self.max_iters, self.write = state, max_iters, write
        self._left = TimeLeft(state.step, max_iters)
        super().__init__(batches, arithmetic, total=max_iters, initial=state.step)

    def report(self, step: Step) -> None:
        """Print and log the means and the speed since the last report."""
        means = self.state.take_means()  # waits for the device, before the clock is read
        lap = self.throughput.lap()
        self.write("train", self.state.step, **means, lr=step.lr, **lap)
        line = f"step {self.state.step:6d}/{self.max_iters}  loss {means['loss']:.4f}"
        line += f"  training accuracy {means['top1']:.2f}%" if "top1" in means else ""
        print_main(f"{line}  lr {step.lr:.5f}  {speed(lap)}{self._left(self.state.step)}")
