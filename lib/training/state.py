"""The state of a training run: everything that a checkpoint holds, under published names."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from datasets import DataSet
from datasets.images import GRAY_LUMA, GRAY_STATS
from lib.files import checkpoint, description, provenance, weights
from lib.files.description import CLASSIFIER, METRIC, TEMPERATURE, Description
from lib.files.published import IN_TRAINING, Names, accuracies, class_names, is_metric
from lib.objectives.objective import Objective
from lib.runtime.distributed import broadcast_object, is_main, print_main, share_buffers
from lib.training.ema import MovingAverage
from lib.training.step import DIVERGED, Step


def describe(
    kind: str,
    architecture: str,
    train: DataSet,
    out_features: int,
    *,
    imagenet: bool,
    gray: bool = False,
    temperature: float = TEMPERATURE,
) -> Description:
    """Describe the network of a run, for `models.build_model` and the readers of its checkpoints.

    `gray` takes the published gray input; `temperature` is that of a metric's kNN monitor.
    """
    stats, luma = (GRAY_STATS, GRAY_LUMA) if gray else (train.stats, ())
    arguments = {
        "out_features": out_features,
        "in_channels": 1 if gray else 3,
        "normalize": kind == METRIC,
        "imagenet": imagenet,
    }
    sizes = train.image_size, train.evaluation_resize
    found = Description(kind, architecture, arguments, *stats, *sizes, train.classes)
    return replace(found, temperature=temperature, luma=luma)


def load_network(
    model: nn.Module,
    state: Mapping[str, Any],
    source: str | Path,
    *,
    start_of: Description | None = None,
) -> None:
    """Load the weights of a checkpoint into a network, and print what was loaded.

    Args:
        start_of: description of our network, if the file holds another one to start from. Its last layer is
            then loaded only where it means the same: an embedding of that size, or these classes.

    Raises:
        ValueError: if there are no weights, or any but those of the last layer do not fit.
    """
    tensors, said, keep = weights.model_weights(state, source), "", True
    if start_of is not None:
        name, own = f"{model.head_name}.weight", model.state_dict()
        fits = name in tensors and name in own and tensors[name].shape == own[name].shape
        keep = fits and is_metric(state) == (start_of.kind == METRIC)
    if start_of is not None and start_of.kind == CLASSIFIER:
        keep = class_names(state) in ([], list(start_of.classes)) and keep
        said = f"; the last layer is {'its own' if keep else 'a new one'}"
    report = weights.load_weights(model, tensors, source=source, keep_head=keep)
    print_main(f"{source}: {report}{said}")


@dataclass
class AverageMeter:
    """Weighted mean of scalars. `update` never waits for the device, `value` does."""

    total: Tensor | float = 0.0
    weight: Tensor | float = 0.0

    def update(self, value: Tensor | float, weight: Tensor | float = 1.0) -> None:
        value = value.detach().double() if isinstance(value, Tensor) else value
        self.total = self.total + value * weight
        self.weight = self.weight + weight

    def state(self) -> tuple[float, float]:
        """Return the two sums, from which a resumed run continues to the last bit."""
        return float(self.total), float(self.weight)

    @property
    def value(self) -> float:
        """Mean so far; NaN before the first update."""
        weight = float(self.weight)
        return float(self.total) / weight if weight else float("nan")


@dataclass
class TrainState:
    """The parts of a run that learn, and its progress."""

    model: nn.Module
    objective: Objective
    optimizer: Optimizer
    description: Description
    names: Names
    meta: Mapping[str, Any]  # provenance of the run (`lib.files.provenance.record`)
    # options that a resumed run must not change, with their defaults
    invariants: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)  # further entries of the checkpoint
    average: MovingAverage | None = None  # of the weights: what is tested and saved as the network
    step: int = 0  # optimizer steps done
    epoch: int = 0  # epochs done and measured
    accuracy: float = float("nan")  # percentage at the last test
    best: float = 0.0  # and the highest so far
    # means by name over the epoch so far in phase 1, over the steps since the last line in phase 3
    meters: dict[str, AverageMeter] = field(default_factory=dict)
    checked: int = -1  # step after which the weights were last found finite

    @property
    def network(self) -> nn.Module:
        """The network to test and to keep."""
        return self.model if self.average is None else self.average.model

    def count(self, step: Step) -> None:
        """Count an optimizer step, its loss and what else it measured; average the weights."""
        self.step = step.number + 1
        if self.average is not None:
            self.average.update(self.model, step.number)
        for name, mean in step.means.items():
            self.meters.setdefault(name, AverageMeter()).update(mean, step.batch_size)

    def means(self) -> dict[str, float]:
        """Return all means so far by name, the loss NaN before the first step; this waits for the device."""
        return {"loss": math.nan} | {name: meter.value for name, meter in self.meters.items()}

    def take_means(self) -> dict[str, float]:
        """Return `means` and begin new ones."""
        means = self.means()
        self.meters.clear()
        return means

    def measure(self, accuracy: float) -> bool:
        """Record an accuracy in percent, and return whether it is the best so far; NaN (unknown) is."""
        is_best = not accuracy < self.best
        self.accuracy, self.best = accuracy, max(self.best, accuracy)
        return is_best

    def finish_epoch(self, accuracy: float) -> bool:
        """Count an epoch with its accuracy in percent, and return whether it is the best so far."""
        self.epoch += 1
        self.meters.clear()
        return self.measure(accuracy)

    def require_finite(self) -> None:
        """Check weights and buffers, once after each step; FloatingPointError names the first bad one."""
        if self.checked == self.step:
            return
        parts = self.model, self.objective, self.network
        for name, value in chain.from_iterable(part.state_dict().items() for part in parts):
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise FloatingPointError(f"{name} is not finite after step {self.step}; {DIVERGED}")
        self.checked = self.step

    def require_own(self, saved: Mapping[str, Any]) -> None:
        """Raise ValueError if the record `saved` is of another run; print what changes this one's bits."""
        provenance.require_same(saved, self.meta, self.invariants)
        provenance.say_precision(saved, self.meta)

    def state_dict(self) -> dict[str, Any]:
        """Return the entries of a checkpoint, the published ones and our own."""
        names = self.names
        state = {
            names.network: self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "sums": {name: meter.state() for name, meter in self.meters.items()},
            "architecture": self.description.architecture,
            names.architecture: self.description.architecture,
            "classes": list(self.description.classes),
            description.KEY: self.description.state(),
            "meta": dict(self.meta),
        }
        if names.first_epoch is not None:
            state["epoch"] = self.epoch - 1 + names.first_epoch
        if self.average is not None:
            state[IN_TRAINING] = self.model.state_dict()
        state |= names.accuracies(self.accuracy, self.best)
        return state | self.objective.checkpoint_entries() | dict(self.facts)

    def load_state_dict(self, state: Mapping[str, Any], source: str | Path) -> None:
        """Restore the run from the entries of the checkpoint `source`; ValueError if one does not fit."""
        load_network(self.network, state, source)
        with naming(source):
            if self.average is not None:
                weights.load_weights(self.model, state[IN_TRAINING], source=source)
            has_momenta = any(group["momentum"] for group in self.optimizer.param_groups)
            self._load_momenta(state["optimizer"], expected=has_momenta and state["step"] > 0)
            self.objective.load_entries(state)
        self.step = state["step"]
        if self.names.first_epoch is not None:
            self.epoch = state["epoch"] + 1 - self.names.first_epoch
        # older files have the sums of the loss alone, or none
        sums = state.get("sums", {"loss": state.get("loss_sums", ())})
        self.meters = {name: AverageMeter(*pair) for name, pair in sums.items()}
        self.accuracy, self.best = accuracies(state, self.names)

    def _load_momenta(self, saved: Mapping[str, Any], *, expected: bool) -> None:
        """Restore the momenta alone, each in the memory order of its weight, as a fused optimizer needs them.

        Weight decay and all other options stay those of this run; the learning rate is set at every step.
        """
        options = [
            {k: v for k, v in group.items() if k not in ("params", "lr")}
            for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(saved)
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)
        if expected and not self.optimizer.state:
            raise ValueError("the optimizer's momenta are missing")
        for parameter, kept in self.optimizer.state.items():
            momentum = kept.get("momentum_buffer")
            if momentum is None or momentum.shape != parameter.shape:
                found = "none" if momentum is None else f"one of shape {list(momentum.shape)}"
                wanted = f"a weight of shape {list(parameter.shape)}"
                raise ValueError(f"{wanted} needs a momentum and has {found}")
            kept["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum)


@contextmanager
def naming(source: str | Path) -> Iterator[None]:
    """Turn an error of a block into a ValueError that names the checkpoint `source`."""
    try:
        yield
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{source} cannot be continued, its content does not fit this run: {' '.join(str(error).split())}"
        ) from error


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoint files `last` and `best` of a run in `folder`.

    After every `save_freq` epochs a copy stays, `numbered` with `{epoch}` for the epochs done.
    """

    folder: Path
    last: str
    best: str
    numbered: str = ""
    save_freq: int = 0

    def save(self, state: TrainState, *, is_best: bool = False, end_of_epoch: bool = False) -> None:
        """Write the files that are due on rank 0, whose BatchNorm statistics all processes take over.

        The last one is written at the end: a run that is killed in between repeats its last steps. The copy
        that stays may be due at an `end_of_epoch` alone. Nothing is written if a number is not finite.
        """
        share_buffers(state.model)
        share_buffers(state.network)
        state.require_finite()
        if not is_main():
            return
        entries = state.state_dict()
        if is_best:
            checkpoint.save(entries, self.folder / self.best)
        if end_of_epoch and self.save_freq and state.epoch % self.save_freq == 0:
            name = self.numbered.format(epoch=state.epoch)
            checkpoint.save(entries, self.folder / name)
        checkpoint.save(entries, self.last_file)

    def complete(self, state: TrainState, source: str | Path) -> None:
        """Write what a save that was killed between its files had not come to.

        `state` was resumed from `source`. If that is the best or the numbered copy, and the last one is
        older or cannot be read, then the other files that were due with it are written at once: the run may
        be finished, and would never write them.
        """
        file = Path(source)
        own = file.name in (self.best, self.numbered.format(epoch=state.epoch))
        in_folder = file.resolve().parent == self.folder.resolve()
        cut_short = is_main() and own and in_folder and self._last_is_behind(file)
        if broadcast_object(cut_short):
            print_main(f"{self.last_file} is behind {file}: a save was cut short, and is completed")
            self.save(state, end_of_epoch=True)

    def _last_is_behind(self, other: Path) -> bool:
        try:
            checkpoint.load_dict(self.last_file)
        except ValueError:  # missing or damaged; `newest_readable` says so
            return True
        return self.last_file.stat().st_mtime_ns <= other.stat().st_mtime_ns

    @property
    def last_file(self) -> Path:
        return self.folder / self.last
