"""Parts of phase 1: its objective, its kNN monitor, how a run resumes, and its progress lines."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from datasets import UNKNOWN, DataSet
from datasets.transforms import Op, patch_ops, two_view_ops
from lib.features.extraction import extract
from lib.files import checkpoint, published, weights
from lib.files.description import METRIC, NUM_NEIGHBORS, TEMPERATURE
from lib.files.published import BANK, bank_rows, is_metric
from lib.graph import knn
from lib.objectives.coding_rate import ManyPatches
from lib.objectives.instance import InstanceDiscrimination
from lib.objectives.memory_bank import MemoryBank, build_loss
from lib.objectives.objective import Objective
from lib.objectives.two_view import TwoViews
from lib.runtime.devices import Device
from lib.runtime.distributed import print_main, world_size
from lib.training.progress import speed
from lib.training.settings import INSTANCE, PATCHES_TCR, TWO_VIEW
from lib.training.settings import PretrainingSettings as Settings
from lib.training.state import TrainState, load_network, naming

Z_MOMENTUM = 0.99  # momentum of NCE's normalizer


def dimensions(settings: Settings) -> int:
    """Return the size of the embedding; 0, that of the network's activations, for a projection head."""
    return settings.low_dim if settings.objective == INSTANCE else 0


def temperature(settings: Settings) -> float:
    """Return the temperature of the kNN monitor."""
    return settings.nce_t if settings.objective == INSTANCE else TEMPERATURE


def build_objective(
    settings: Settings, num_images: int, device: Device, width: int = 0
) -> Objective:
    """Build the objective that the options of a run ask for.

    Args:
        width: size of the network's output, for an objective with a projection head.

    Raises:
        ValueError: if there are fewer than two images, not more images than negatives, or a number of views
            that the objective does not take.
    """
    if num_images < 2:
        raise ValueError(
            f"{num_images} training images: an image is compared with others, 2 at least"
        )
    if settings.objective == TWO_VIEW:
        if settings.views != 2:
            raise ValueError(f"--views {settings.views}: --objective two-view compares exactly 2")
        sizes = {"temperature": settings.nce_t, "batch_size": settings.batch_size}
        return TwoViews(width, device, **sizes).to(device.torch_device)
    if settings.objective == PATCHES_TCR:
        return ManyPatches(width, device, views=settings.views).to(device.torch_device)
    if settings.nce_k >= num_images:
        raise ValueError(
            f"--nce-k {settings.nce_k}: an image has only {num_images - 1} others to draw from; take "
            "fewer, or --nce-k 0, the softmax over all images"
        )
    loss = build_loss(
        settings.nce_k,
        settings.nce_t,
        kind=settings.nce_loss,
        z_momentum=Z_MOMENTUM if settings.nce_z == "moving-average" else None,
        seed=settings.rng_seed,
        bf16=device.bf16,
    )
    bank = MemoryBank(num_images, settings.low_dim, settings.nce_m, settings.rng_seed)
    return InstanceDiscrimination(bank, loss, settings.views).to(device.torch_device)


def augmentation(objective: str, published: Sequence[Op], *crop: Any) -> Sequence[Op]:
    """Return the operations on each view: the `published` ones for instance discrimination, or others.

    `crop` are the first arguments of `datasets.transforms.two_view_ops`.
    """
    if objective == TWO_VIEW:
        return two_view_ops(*crop)
    return patch_ops(*crop[1:]) if objective == PATCHES_TCR else published


def resume(state: TrainState, source: str, epochs: int, steps_per_epoch: int) -> None:
    """Resume a pretraining run from the checkpoint `source`.

    A file without the record `meta` is taken for a published one: its weights, momenta, memory bank and
    epoch are used with the options of this run, and the rest of the state starts anew.

    Raises:
        ValueError: if it is not a checkpoint of phase 1, does not fit, or belongs to a run with other
            options or data.
    """
    entries = published.load(source, "optimizer", "epoch")
    if not is_metric(entries):
        checkpoint.require_keys(entries, source, BANK)
    own = state.objective.checkpoint_entries()
    epochs_done = entries["epoch"] + 1 - (state.names.first_epoch or 0)
    progress = {"step": epochs_done * steps_per_epoch}  # files from before `step` lack it
    if {"meta", "criterion", "description"} & entries.keys():  # published files have none of these
        checkpoint.require_keys(entries, source, "meta", *own)
        state.require_own(entries["meta"])
        state.load_state_dict({**progress, **entries}, source)
    else:
        _take_over(state, entries, {**own, **progress}, source)
    within = state.step - state.epoch * steps_per_epoch
    fewest = 0 if "meta" in entries else 1  # the published scripts saved after whole epochs alone
    if not fewest <= state.epoch <= epochs or not 0 <= within <= steps_per_epoch:
        raise ValueError(
            f"{source} is of epoch {state.epoch} and step {state.step}, which do not fit a run of {epochs} "
            f"epochs of {steps_per_epoch} steps; it is damaged, or was made with other options (--epochs)"
        )
    place = f" and {within} steps" if within else ""
    print_main(f"continuing after epoch {state.epoch}{place} (best so far {state.best:.2f}%)")


def _take_over(
    state: TrainState, entries: Mapping[str, Any], more: Mapping[str, Any], source: str
) -> None:
    """Resume from a published file with the entries that it lacks."""
    rows, bank = bank_rows(entries, source), state.objective.bank_rows
    if bank is None:
        raise ValueError(
            f"{source} is a published file, whose memory bank this objective has no use for"
        )
    if rows.shape != bank.shape:
        raise ValueError(
            f"{source} holds a memory bank of {_shape(rows)} numbers, this run needs "
            f"{_shape(bank)}: it was made with other images or another --low-dim"
        )
    names = weights.model_weights(entries, source)
    with naming(source):
        momenta = _in_own_order(state.model, entries["optimizer"], names)
    more = {**more, BANK: {"memory": rows}, "optimizer": momenta}
    state.load_state_dict({**entries, **more}, source)
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
        return optimizer  # loading it reports that it does not fit
    number = dict(zip(theirs, groups[0]["params"], strict=True))
    return {**optimizer, "param_groups": [{**groups[0], "params": [number[name] for name in own]}]}


def _shape(rows: Tensor) -> str:
    return " x ".join(map(str, rows.shape))


@dataclass(frozen=True)
class Monitor:
    """Measurement of a metric by the nearest neighbors of the test images among the training images.

    Votes are weighted by exp(cos / `temperature`). Images are read by `num_workers` of this process, in
    batches of `batch_size` over all processes.
    """

    train: DataSet
    test: DataSet | None
    device: Device
    temperature: float
    num_workers: int = 0
    batch_size: int = 500

    def __call__(self, model: nn.Module, bank: Tensor | None) -> dict[str, float]:
        """Measure kNN accuracies (`lib.graph.knn.accuracy`); {} without test images or without labels.

        `bank` are the N x D embeddings of the training images, which stay as they are; None computes them.
        """
        targets, test = self.train.targets, self.test
        unknown = test is None or bool((test.targets == UNKNOWN).all())
        if unknown or bool((targets == UNKNOWN).all()):
            return {}
        if bank is None:
            bank = self._extracted(model, self.train)
        bank = bank.to(self.device.torch_device)
        queries = self._extracted(model, test).to(self.device.torch_device)
        parameters = {"k": NUM_NEIGHBORS, "temperature": self.temperature}
        return knn.accuracy(queries, test.targets, bank, targets, test.num_classes, **parameters)

    def _extracted(self, model: nn.Module, data: DataSet) -> Tensor:
        size = max(1, self.batch_size // world_size())
        return extract(model, data, self.device, batch_size=size, num_workers=self.num_workers)

    def measure_file(
        self, source: str, model: nn.Module, *, stored: bool = False
    ) -> dict[str, float]:
        """Load the checkpoint `source` into the model, measure it at its own temperature, and print.

        With `stored`, the embeddings of the training images are the memory bank in it.

        Raises:
            ValueError: if there is no checkpoint or it does not fit, and without test images or labels.
        """
        if not source:
            raise ValueError("there is no checkpoint to measure: name it with --resume FILE")
        state = published.load(source)
        load_network(model, state, source)
        bank = self._stored_bank(state, source, model) if stored else None
        found = published.describe(state, source, unsaid=METRIC)
        scores = replace(self, temperature=found.temperature)(model, bank)
        if not scores:
            raise ValueError("measuring needs test images, and labels for the training images")
        print_main(f"{_accuracies(scores)} at temperature {found.temperature:g}")
        return scores

    def _stored_bank(self, state: Mapping[str, Any], source: str, model: nn.Module) -> Tensor:
        """Return the N x D memory bank in a checkpoint; ValueError if it holds none of these images."""
        bank, digest = bank_rows(state, source), self.train.digest
        recorded = state.get("meta", {}).get("data_digest", digest)
        dim = model.out_features
        if bank.shape != (len(self.train), dim) or recorded != digest:
            raise ValueError(
                f"{source} holds a memory bank of {_shape(bank)} numbers that is not of "
                f"the {len(self.train)} training images here; --test-only computes one from these"
            )
        return bank


def _accuracies(scores: dict[str, float]) -> str:
    text = f"kNN top-1 {scores['top1']:.2f}% top-5 {scores['top5']:.2f}%"
    return f"{text}  nearest neighbor {scores['nearest']:.2f}%"


def describe(epoch: int, epochs: int, values: dict[str, float], left: str = "") -> str:
    """Format the line of an epoch, counted from 1; `left` is that of `lib.training.progress.TimeLeft`."""
    line = f"epoch {epoch:4d}/{epochs}  loss {values['loss']:.4f}"
    line += f" (chance {values['chance']:.4f})" if math.isfinite(values["chance"]) else ""
    line += f"  lr {values['lr']:.5f}  {speed(values)}"
    if "knn_top1" in values:
        scores = {name[4:]: value for name, value in values.items() if name.startswith("knn_")}
        line += f"  {_accuracies(scores)} (best {values['best']:.2f}%)"
    return line + left


def epoch_values(
    state: TrainState, measured: Mapping[str, float], scores: Mapping[str, float]
) -> dict[str, float]:
    """Gather all numbers of an epoch for the log: those of its steps, and the kNN accuracies."""
    values = {**measured, "best": state.best, "chance": state.objective.chance}
    return values | {f"knn_{name}": score for name, score in scores.items()}
