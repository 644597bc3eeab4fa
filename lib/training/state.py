"""The state of a training run: everything that a checkpoint holds, under published names."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lib.files import checkpoint, description, weights
from lib.files.description import Description
from lib.files.published import Names
from lib.objectives.objective import Objective
from lib.runtime.distributed import is_main, print_main, share_buffers
from lib.training.meters import AverageMeter
from lib.training.step import Step, require_finite


@dataclass
class TrainState:
    """The parts of a run that learn, and its progress.

    Attributes:
        description: description of the network, for the readers of the checkpoint.
        names: published names of the entries.
        meta: provenance of the run (`lib.files.provenance.record`).
        facts: further entries of the checkpoint.
        step: optimizer steps done.
        epoch: epochs done and measured.
        accuracy: percentage at the last test; `best` is the highest so far.
        loss: mean over the epoch so far in phase 1, over the steps since the last line in phase 3.
    """

    model: nn.Module
    objective: Objective
    optimizer: Optimizer
    description: Description
    names: Names
    meta: Mapping[str, Any]
    facts: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
    epoch: int = 0
    accuracy: float = float("nan")
    best: float = 0.0
    loss: AverageMeter = field(default_factory=AverageMeter)

    def count(self, step: Step) -> None:
        """Count an optimizer step and its loss."""
        self.step = step.number + 1
        self.loss.update(step.loss, step.batch_size)

    def take_loss(self) -> float:
        """Return the mean loss since the last call and begin a new mean; this waits for the device."""
        value, self.loss = self.loss.value, AverageMeter()
        return value

    def measure(self, accuracy: float) -> bool:
        """Record an accuracy in percent, and return whether it is the best so far; NaN (unknown) is."""
        is_best = not accuracy < self.best
        self.accuracy, self.best = accuracy, max(self.best, accuracy)
        return is_best

    def finish_epoch(self, accuracy: float) -> bool:
        """Count an epoch with its accuracy in percent, and return whether it is the best so far."""
        self.epoch, self.loss = self.epoch + 1, AverageMeter()
        return self.measure(accuracy)

    def state_dict(self) -> dict[str, Any]:
        """Return the entries of a checkpoint, the published ones and our own."""
        names = self.names
        state = {
            names.network: self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "acc": self.accuracy,
            "best_acc": self.best,
            names.best: self.best,
            "loss_sums": self.loss.state(),
            "architecture": self.description.architecture,
            names.architecture: self.description.architecture,
            "classes": list(self.description.classes),
            description.KEY: self.description.state(),
            "meta": dict(self.meta),
        }
        if names.first_epoch is not None:
            state["epoch"] = self.epoch - 1 + names.first_epoch
        return state | self.objective.checkpoint_entries() | dict(self.facts)

    def load_state_dict(self, state: Mapping[str, Any], source: str | Path) -> None:
        """Restore the run from the entries of the checkpoint `source`.

        Raises:
            ValueError: if an entry does not fit this run, naming the file.
        """
        self.load_network(state, source)
        restore(source, [(self.optimizer, state["optimizer"])])
        with naming(source):
            self.objective.load_entries(state)
            self.step = int(state["step"])
            if self.names.first_epoch is not None:
                self.epoch = int(state["epoch"]) + 1 - self.names.first_epoch
            self.loss.load_state(state.get("loss_sums", (0.0, 0.0)))
            self.accuracy, self.best = float(state["acc"]), float(state["best_acc"])

    def load_network(self, state: Mapping[str, Any], source: str | Path) -> None:
        """Load the network's weights, and print what was loaded."""
        tensors = weights.model_weights(state, source)
        print_main(f"{source}: {weights.load_weights(self.model, tensors, source=source)}")


@contextmanager
def naming(source: str | Path) -> Iterator[None]:
    """Turn an error of a block into a ValueError that names the checkpoint `source`."""
    try:
        yield
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{source} cannot be continued, its content does not fit this run: {error}"
        ) from error


def restore(source: str | Path, parts: Iterable[tuple[Any, Mapping[str, Any]]]) -> None:
    """Restore parts of a run (optimizer, memory bank ...) from their states in the file `source`.

    Raises:
        ValueError: if a state does not fit, naming the file.
    """
    with naming(source):
        for part, state in parts:
            part.load_state_dict(state)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoint files of a run.

    Attributes:
        last, best: file names in `folder`.
        numbered: name of a copy that stays, with `{epoch}` for the epochs done; every `save_freq` epochs.
    """

    folder: Path
    last: str
    best: str
    numbered: str = ""
    save_freq: int = 0

    def save(self, state: TrainState, *, is_best: bool = False, end_of_epoch: bool = False) -> None:
        """Write the files that are due on rank 0, whose BatchNorm statistics all processes take over.

        The last one is written at the end: a run that is killed in between repeats its last steps.

        Args:
            end_of_epoch: whether the copy that stays may be due.

        Raises:
            FloatingPointError: if a weight or buffer is not finite; nothing is written then.
            ValueError: if a file cannot be written; the old one stays.
        """
        share_buffers(state.model)
        require_finite(state.step, state.model, state.objective)
        if not is_main():
            return
        entries = state.state_dict()
        if is_best:
            checkpoint.save(entries, self.folder / self.best)
        if end_of_epoch and self.save_freq and state.epoch % self.save_freq == 0:
            name = self.numbered.format(epoch=state.epoch)
            checkpoint.save(entries, self.folder / name)
        checkpoint.save(entries, self.last_file)

    @property
    def last_file(self) -> Path:
        return self.folder / self.last
