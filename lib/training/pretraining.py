"""Parts of phase 1: its objective, its kNN monitor, how a run resumes, and its progress lines."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from datasets import UNKNOWN, DataSet
from lib.features import extraction
from lib.files import checkpoint, provenance, weights
from lib.files.description import METRIC, Description
from lib.files.published import BANK, bank_rows, is_metric
from lib.files.resume import newest_readable
from lib.loading.batches import with_loader
from lib.objectives.instance import InstanceDiscrimination, instance_discrimination
from lib.runtime.devices import Device
from lib.runtime.distributed import print_main, world_size
from lib.runtime.option import resume_invariants
from lib.training.evaluation import knn_monitor
from lib.training.meters import speed
from lib.training.settings import PretrainingSettings as Settings
from lib.training.state import TrainState, naming, restore

Z_MOMENTUM = 0.99  # momentum of NCE's normalizer


RESUME_INVARIANTS = resume_invariants(Settings)


def check_images(num_images: int, nce_k: int) -> None:
    """Raise ValueError if there are fewer than two images, or not more images than negatives."""
    if num_images < 2:
        raise ValueError(f"{num_images} training images: instance discrimination needs at least 2")
    if nce_k >= num_images:
        raise ValueError(
            f"--nce-k {nce_k}: an image has only {num_images - 1} others to draw from; take fewer, "
            "or --nce-k 0, the softmax over all images"
        )


def build_objective(settings: Settings, num_images: int, device: Device) -> InstanceDiscrimination:
    """Build instance discrimination over `num_images` images with the options of a run."""
    objective = instance_discrimination(
        num_images,
        settings.low_dim,
        num_negatives=settings.nce_k,
        temperature=settings.nce_t,
        bank_momentum=settings.nce_m,
        loss=settings.nce_loss,
        z_momentum=Z_MOMENTUM if settings.nce_z == "moving-average" else None,
        seed=settings.rng_seed,
        bf16=device.bf16,
    )
    return objective.to(device.torch_device)


def describe_metric(settings: Settings, train: DataSet, *, imagenet: bool = False) -> Description:
    """Describe the network of a run, for the readers of its checkpoints."""
    mean, std = train.stats
    return Description(
        METRIC,
        settings.architecture,
        {
            "out_features": settings.low_dim,
            "in_channels": 3,
            "normalize": True,
            "imagenet": imagenet,
        },
        mean,
        std,
        train.image_size,
        train.evaluation_resize,
        train.classes,
    )


def load_weights(
    model: nn.Module, state: Mapping[str, Any], source: str, *, keep_head: bool = True
) -> None:
    """Load weights into the network, and print what was loaded."""
    tensors = weights.model_weights(state, source)
    report = weights.load_weights(model, tensors, source=source, keep_head=keep_head)
    print_main(f"{source}: {report}")


def load_pretrained(model: nn.Module, source: str) -> None:
    """Load the weights of another network, with the last layer of a metric if that has our shape."""
    state = checkpoint.load_dict(source)
    name = f"{model.head_name}.weight"
    head = weights.model_weights(state, source).get(name)
    same = head is not None and head.shape == model.state_dict()[name].shape
    load_weights(model, state, source, keep_head=same and is_metric(state))


def find_checkpoint(resume: str, folder: Path, names: Iterable[str], *, needed: bool) -> str:
    """Return the file that --resume names: with `auto` the newest readable one of the run, or none.

    Raises:
        ValueError: if one is needed and there is none; or as `newest_readable`.
    """
    source = newest_readable(folder, names) if resume == "auto" else resume
    if needed and not source:
        raise ValueError("there is no checkpoint to measure: name it with --resume FILE")
    return source


def resume(
    state: TrainState, source: str, steps_per_epoch: int, invariants: tuple[str, ...] = ()
) -> None:
    """Resume a pretraining run from the checkpoint `source`.

    A file without the record `meta` is taken for a published one: its weights, momenta, memory bank and
    epoch are used with the options of this run, and the rest of the state starts anew.

    Args:
        invariants: options that must be the same, besides those of every run of phase 1.

    Raises:
        ValueError: if it is not a checkpoint of phase 1, does not fit, or belongs to a run with other
            options or data.
    """
    entries = checkpoint.load_dict(source, "optimizer", "epoch")
    if not is_metric(entries):
        checkpoint.require_keys(entries, source, BANK)
    own = state.objective.checkpoint_entries()
    if {"meta", "criterion", "description"} & entries.keys():  # published files have none of these
        checkpoint.require_keys(entries, source, "meta", "best_acc")
        names = (*RESUME_INVARIANTS, *invariants)
        provenance.require_same(with_loader(entries["meta"]), state.meta, names)
        checkpoint.require_keys(entries, source, *own)
        provenance.say_precision(entries["meta"], state.meta)
        state.load_state_dict(_complete(entries, steps_per_epoch, state), source)
    else:
        _take_over(state, entries, source, steps_per_epoch)
    within = state.step - state.epoch * steps_per_epoch
    place = f" and {within} steps" if within else ""
    print_main(f"continuing after epoch {state.epoch}{place} (best so far {state.best:.2f}%)")


def _complete(
    entries: Mapping[str, Any], steps_per_epoch: int, state: TrainState
) -> dict[str, Any]:
    """Add the entries that older files of this project do not hold."""
    epoch = int(entries["epoch"]) + 1 - (state.names.first_epoch or 0)
    accuracy = entries.get("best_prec1", 0.0)
    return {"step": epoch * steps_per_epoch, "acc": accuracy, **entries}


def _take_over(
    state: TrainState, entries: Mapping[str, Any], source: str, steps_per_epoch: int
) -> None:
    """Load weights, momenta and memory bank of a published file; the optimizer keeps this run's options."""
    rows = bank_rows(entries, source)
    bank = state.objective.bank_rows
    if bank is None:
        raise ValueError(
            f"{source} is a published file, whose memory bank this objective has no use for"
        )
    if rows.shape != bank.shape:
        raise ValueError(
            f"{source} holds a memory bank of {_shape(rows)} numbers, this run needs "
            f"{_shape(bank)}: it was made with other images or another --low-dim"
        )
    state.load_network(entries, source)
    groups = [
        {k: v for k, v in group.items() if k != "params"} for group in state.optimizer.param_groups
    ]
    names = weights.model_weights(entries, source)
    momenta = _in_own_order(state.model, entries["optimizer"], names)
    restore(source, [(state.optimizer, momenta)])
    bank.copy_(rows)
    for group, own in zip(state.optimizer.param_groups, groups, strict=True):
        group.update(own)
    with naming(source):
        state.epoch = int(entries["epoch"]) + 1 - (state.names.first_epoch or 0)
        state.step = state.epoch * steps_per_epoch
        state.accuracy = float(entries.get("acc", entries.get("best_prec1", 0.0)))
        state.best = float(entries.get("best_acc", state.accuracy))
    print_main(
        f"{source} is a published file: it records no options to compare with those of this run"
    )


def _in_own_order(
    model: nn.Module, optimizer: dict[str, Any], names: Iterable[str]
) -> dict[str, Any]:
    """Renumber the state of an optimizer from the order of `names` to the order of the model's parameters.

    Momenta are assigned by position: a mistake among equally shaped weights would not be noticed.
    """
    own = [name for name, _ in model.named_parameters()]
    theirs = [name for name in names if name in set(own)]
    groups = optimizer["param_groups"]
    if len(groups) != 1 or len(theirs) != len(own) or len(groups[0]["params"]) != len(own):
        return optimizer  # `restore` reports that it does not fit
    number = dict(zip(theirs, groups[0]["params"], strict=True))
    return {**optimizer, "param_groups": [{**groups[0], "params": [number[name] for name in own]}]}


def _shape(rows: Tensor) -> str:
    return " x ".join(map(str, rows.shape))


@dataclass(frozen=True)
class Monitor:
    """Measurement of a metric by the nearest neighbors of the test images among the training images.

    Attributes:
        num_workers: workers of this process that read image files.
        batch_size: images at a time, over all processes.
    """

    train: DataSet
    test: DataSet | None
    device: Device
    num_workers: int = 0
    batch_size: int = 500

    def __call__(self, model: nn.Module, bank: Tensor | None) -> dict[str, float]:
        """Measure kNN accuracies; {} without test images or without labels.

        Args:
            bank: N x D embeddings of the training images; None computes them.
        """
        targets, test = self.train.targets, self.test
        unknown = test is None or bool((test.targets == UNKNOWN).all())
        if unknown or bool((targets == UNKNOWN).all()):
            return {}
        if bank is None:
            bank = extraction.extract(model, self.train, self.device, **self._reading)
        bank = bank.to(self.device.torch_device)
        return knn_monitor(model, bank, targets, test, self.device, **self._reading)

    @property
    def _reading(self) -> dict[str, int]:
        batch_size = max(1, self.batch_size // world_size())
        return {"batch_size": batch_size, "num_workers": self.num_workers}

    def measure(self, model: nn.Module, bank: Tensor | None = None) -> dict[str, float]:
        """Measure and print accuracies on `bank`, or on one recomputed from all training images.

        Raises:
            ValueError: if there are no test images or no labels.
        """
        scores = self(model, bank)
        if not scores:
            raise ValueError("measuring needs test images, and labels for the training images")
        print_main(_accuracies(scores))
        return scores


def stored_bank(source: str, num_images: int, dim: int, digest: str) -> Tensor:
    """Read the N x D memory bank in a checkpoint of phase 1.

    Raises:
        ValueError: if it holds none, or one of other images.
    """
    state = checkpoint.load_dict(source)
    bank = bank_rows(state, source)
    recorded = state.get("meta", {}).get("data_digest", digest)
    if bank.shape != (num_images, dim) or recorded != digest:
        raise ValueError(
            f"{source} holds a memory bank of {_shape(bank)} numbers that is not of "
            f"the {num_images} training images here; --test-only computes one from these"
        )
    return bank


def _accuracies(scores: dict[str, float]) -> str:
    text = f"kNN top-1 {scores['top1']:.2f}% top-5 {scores['top5']:.2f}%"
    return f"{text}  nearest neighbor {scores['nearest']:.2f}%"


def describe(epoch: int, epochs: int, values: dict[str, float]) -> str:
    """Format the line of an epoch, counted from 1."""
    line = f"epoch {epoch:4d}/{epochs}  loss {values['loss']:.4f}"
    line += f" (chance {values['chance']:.4f})" if math.isfinite(values["chance"]) else ""
    line += f"  lr {values['lr']:.5f}  {speed(values)}"
    if "knn_top1" in values:
        scores = {name[4:]: value for name, value in values.items() if name.startswith("knn_")}
        line += f"  {_accuracies(scores)} (best {values['best']:.2f}%)"
    return line


def epoch_values(
    state: TrainState, measured: Mapping[str, float], scores: Mapping[str, float]
) -> dict[str, float]:
    """Gather all numbers of an epoch for the log: those of its steps, and the kNN accuracies."""
    values = {**measured, "best": state.best, "chance": state.objective.chance}
    return values | {f"knn_{name}": score for name, score in scores.items()}
