"""Parts of phase 3: its training images, network, initial weights and tests, and how a run resumes and ends.

Rank 0 alone prints and writes.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets import UNKNOWN, DataSet
from datasets.rand_augment import RandAugment
from datasets.transforms import Augmentation, Op
from lib.features import backbones
from lib.files import checkpoint, published
from lib.files.description import Description
from lib.files.published import class_names, is_metric
from lib.graph.knn import topk_correct
from lib.labels import pseudo_files, pseudo_labels
from lib.labels.gain import AUTO, Gain
from lib.labels.pseudo_labels import PseudoLabels
from lib.labels.split import expected_count, is_list, labeled_split
from lib.loading.batches import Batch, Batches, Streams, in_order
from lib.objectives.classification import Classification
from lib.objectives.consistency import Consistency
from lib.objectives.objective import Objective, at_least_float32
from lib.runtime.devices import Device
from lib.runtime.distributed import (
    all_gather_rows,
    all_reduce_sum,
    evaluation_mode,
    own_workers,
    print_main,
)
from lib.training.log import Writer
from lib.training.settings import RAND_AUGMENT
from lib.training.settings import FinetuningSettings as Settings
from lib.training.state import Checkpoints, TrainState, load_network
from models import build_model

LAST, BEST = "ckpt.pth.tar", "ckpt.best.pth.tar"
MOST_TEMPERATURE, HALVINGS = 1e4, 40
LEAST = 1e-6  # of what is divided by
OWN_KEYS = ("step", "best_acc", "net", "optimizer", "examples", "meta")


@dataclass(frozen=True)
class TrainingSet:
    """The training images by index, their labels and the weights of their losses."""

    indexes: Tensor
    labels: Tensor
    weights: Tensor
    num_labeled: int  # so many have their true labels, the others after them have pseudo-labels
    unlabeled: Tensor | None = None  # images for consistency training, U
    posteriors: Tensor | None = None  # and their probabilities, U x C

    def __str__(self) -> str:
        num_pseudo = len(self.labels) - self.num_labeled
        others = f"{num_pseudo} pseudo-labeled"
        if self.unlabeled is not None:
            others = f"{len(self.unlabeled)} unlabeled"
        return f"{self.num_labeled} labeled and {others} images"

    @property
    def digest(self) -> str:
        parts = [self.indexes, self.labels, self.weights]
        parts += [p for p in (self.unlabeled, self.posteriors) if p is not None]
        return hashlib.sha256(b"".join(p.numpy().tobytes() for p in parts)).hexdigest()[:16]


def read_pseudo_labels(file: str, folder: str) -> list[PseudoLabels]:
    """Read the pseudo-labels of one file or of a folder of chunks, or none."""
    if folder:
        return pseudo_files.load_chunks(folder)
    return [pseudo_files.load(file)] if file else []


def choose_training_set(
    train: DataSet, parts: Sequence[PseudoLabels], settings: Settings, *, source: str = ""
) -> TrainingSet:
    """Choose the labeled images with their true labels, then the most confident of the pseudo-labeled ones.

    Pseudo-labels are in `parts` or whole; without any, only the labeled images are chosen. With
    `pseudo_per_chunk` each part is ranked by itself and gives the same number.

    Raises:
        ValueError: if they do not fit the data set and the requested number of labels.
    """
    classes, count = train.num_classes, settings.num_labeled
    given = None
    if not parts or is_list(count):
        seed = settings.rng_seed
        given = labeled_split(train.targets, count, classes, seed, images=train).labeled
    labeled, groups = given, []
    if parts:
        try:
            whole = pseudo_labels.merged(parts)
            expected = expected_count(count, train.targets, classes)
            fit = len(train), classes, expected, train.digest, train.classes
            whole.require_fit(*fit, labeled=given)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        labeled = whole.labeled
        groups = parts if settings.pseudo_per_chunk else [whole]
    true = train.targets[labeled]
    if (true == UNKNOWN).any():
        raise ValueError(f"{source}: a labeled image has no label in this data set")
    indexes, labels, weights = [labeled], [true], [torch.ones(len(true))]
    if settings.consistency:
        posteriors = need_probabilities(whole, "--consistency", source).float()
        return TrainingSet(labeled, true, weights[0], len(true), whole.indexes, posteriors)
    ratio = settings.pseudo_ratio
    if groups and ratio == AUTO:
        ratio = best_ratio(whole, source)
    choice = {"ratio": ratio, "class_balanced": settings.class_balanced}
    for group, best in zip(groups, pseudo_labels.most_confident(groups, **choice), strict=True):
        indexes.append(group.indexes[best])
        labels.append(group.labels[best])
        weights.append(loss_weights(group, settings, source)[best])
    return TrainingSet(torch.cat(indexes), torch.cat(labels), torch.cat(weights), len(true))


def best_ratio(pseudo: PseudoLabels, source: str) -> float:
    """Return the share of the pseudo-labels that phase 2 estimated best, and say what they gain."""
    gain = Gain.read(pseudo.meta)
    if gain is None:
        raise ValueError(
            f"{source}: --pseudo-ratio auto needs an estimate of what the pseudo-labels gain, which phase 2 "
            "makes with --estimate-gain; without one name a share, such as 0.2"
        )
    print_main(f"pseudo-labels: {gain}; {gain.ratio:.0%} of them are taken")
    return gain.ratio


def loss_weights(pseudo: PseudoLabels, settings: Settings, source: str) -> Tensor:
    """Return how much the loss of each pseudo-labeled image counts."""
    if settings.confidence_weighted:
        return pseudo.confidence.float()
    if settings.calibrated_weights:
        return need_probabilities(pseudo, "--calibrated-weights", source).amax(dim=1).float()
    return torch.ones(len(pseudo.indexes))


def need_probabilities(pseudo: PseudoLabels, option: str, source: str) -> Tensor:
    """Return the probabilities, or raise ValueError naming the `option` that reads them."""
    if pseudo.probabilities is None:
        raise ValueError(
            f"{source}: it holds no probabilities (pseudo_probs), which {option} needs; make it without "
            "--no-probabilities"
        )
    return pseudo.probabilities


def described_as_before(described: Description, settings: Settings, resume: str) -> Description:
    """Give a gray network the input of the classifier that is continued or measured.

    A file may be from before gray input became the published one. A run that only starts from the weights of
    another network keeps the published input.
    """
    path = resume or (settings.pretrained if settings.eval else "")
    state = read_start(path) if described.is_gray and path else {}
    if not is_own_run(state):
        return described
    found = published.describe(state, path)
    return replace(described, mean=found.mean, std=found.std, luma=found.luma)


def build_classifier(
    settings: Settings, described: Description, resume: str, device: Device
) -> nn.Module:
    """Build the described network on its device, initialized from the seed.

    A library's network (`lib.features.backbones`) gets the weights of `--pretrained` or the library's own,
    unless they come from a checkpoint of phase 3, which is measured or which `resume` names.

    Raises:
        ValueError: if the network is unknown, or a library's network is to read gray images.
    """
    torch.manual_seed(settings.rng_seed)
    name = described.architecture
    if not backbones.is_external(name):
        return device.prepare(build_model(name, **described.arguments))
    if described.is_gray:
        raise ValueError(f"--arch {name} reads color images: leave out --input-gray")
    stored = settings.eval or (resume and is_own_run(read_start(resume)))
    num_classes = described.arguments["out_features"]
    model = backbones.classifier(name, num_classes, settings.pretrained, weighted=not stored)
    return device.prepare(model)


def require_classes(path: str, state: Mapping[str, Any], classes: Sequence[str]) -> None:
    """Raise ValueError, naming the differences, if a classifier records other class names."""
    names = class_names(state)
    if names and names != list(classes):
        different = pseudo_labels.differing_classes(names, classes)
        raise ValueError(f"{path} was trained for other classes than these: {different}")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: DataSet,
    device: Device,
    *,
    preprocessing: Augmentation | None = None,
    num_workers: int = 0,
) -> dict[str, Any]:
    """Measure accuracies and the mean cross-entropy on the labeled images of `data`.

    Each process works on its shard, with BatchNorm's running statistics of rank 0. `preprocessing` of None
    normalizes the images by the data set's mean and std.

    Returns:
        `top1` and `top5` in percent, `loss`, and `recall`: for each class the percentage of its images that
        are recognized, NaN for a class without images.

    Raises:
        ValueError: if no image has a label.
    """
    num_classes = data.num_classes
    sums = torch.zeros(4, dtype=torch.float64, device=device.torch_device)
    by_class = torch.zeros(2, num_classes, dtype=torch.float64, device=device.torch_device)
    targets = data.targets.to(device.torch_device)
    augmentation = preprocessing or Augmentation((), data.stats)
    with evaluation_mode(model):
        for batch in in_order(data, augmentation, device, num_workers=num_workers):
            with device.autocast():
                outputs = at_least_float32(model(batch.images))
            own = targets[batch.indexes]
            known = own != UNKNOWN
            outputs, own = outputs[known], own[known]
            loss = F.cross_entropy(outputs.double(), own, reduction="sum")
            sums += torch.stack([*topk_correct(outputs, own), loss, known.sum()])
            classes = F.one_hot(own, num_classes)
            right = outputs.argmax(dim=1) == own
            by_class += torch.stack([classes[right].sum(dim=0), classes.sum(dim=0)])
    top1, top5, loss, count = all_reduce_sum(sums).tolist()
    if not count:
        raise ValueError("there is no labeled image to measure the accuracy on")
    hits, sizes = all_reduce_sum(by_class)
    found = {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count}
    return found | {"recall": (100 * hits / sizes).tolist()}


def worst_class(recall: Sequence[float], classes: Sequence[str]) -> str:
    """Name the class of which the smallest percentage is recognized."""
    lowest, name = min((r, name) for r, name in zip(recall, classes, strict=True) if r == r)
    return f"lowest recall {lowest:.1f}% ({name})"


@dataclass(frozen=True)
class Tester:
    """Measurement of a classifier on test images, read by `num_workers` processes of each machine."""

    test: DataSet | None
    device: Device
    preprocessing: Augmentation
    num_workers: int = 0

    def measure_file(self, path: str, model: nn.Module) -> dict[str, Any]:
        """Measure and print the accuracy of a checkpoint; ValueError if it does not fit the test images."""
        if not path:
            raise ValueError("--eval measures a checkpoint, and this run has none yet")
        if self.test is None:
            raise ValueError("--eval needs test images: DIR/test/<class>/* or DIR/val/<class>/*")
        state = published.load(path)
        if is_metric(state):
            raise ValueError(
                f"{path} is a metric of phase 1, no classifier: --test-only of the scripts in "
                "unsupervised/ measures it, this script without --eval trains a classifier from it"
            )
        require_classes(path, state, self.test.classes)
        load_network(model, state, path)
        scores = self._measured(self.test, model)
        lowest = worst_class(scores["recall"], self.test.classes)
        print_main(
            f"test accuracy top-1 {scores['top1']:.2f}% top-5 {scores['top5']:.2f}%, {lowest}"
        )
        return scores

    def measure_run(self, state: TrainState, write: Writer) -> bool:
        """Measure, print and log the accuracy of a run, and return whether it is the best so far.

        Without test images it stays NaN, and each one is the best.
        """
        if self.test is None:
            return not state.accuracy < state.best
        scores = self._measured(self.test, state.network)
        is_best = state.measure(scores["top1"])
        write("test", state.step, **scores, best=state.best)
        accuracies = f"test accuracy {state.accuracy:.2f}% (best {state.best:.2f}%)"
        lowest = worst_class(scores["recall"], self.test.classes)
        print_main(f"step {state.step:6d}  {accuracies}  {lowest}")
        return is_best

    def was_killed(self, state: TrainState, eval_freq: int, max_iters: int) -> bool:
        """Return whether a resumed run ended while it was tested: saved at a test, without an accuracy."""
        due = state.step > 0 and (state.step % eval_freq == 0 or state.step == max_iters)
        return due and self.test is not None and math.isnan(state.accuracy)

    def _measured(self, test: DataSet, model: nn.Module) -> dict[str, Any]:
        workers = own_workers(self.num_workers)
        shown = self.preprocessing
        return evaluate(model, test, self.device, preprocessing=shown, num_workers=workers)


def build_objective(chosen: TrainingSet, settings: Settings, device: Device) -> Objective:
    """Build the weighted loss on the labels of the chosen images, or that of consistency training."""
    if chosen.posteriors is None:
        plain = Classification(chosen.labels, chosen.weights, settings.criterion)
        return plain.to(device.torch_device)
    return Consistency(
        chosen.labels,
        chosen.posteriors,
        ratio=settings.unlabeled_ratio,
        num_batches=settings.max_iters * settings.iter_size,
        weights=settings.consistency,
        seed=settings.rng_seed,
    ).to(device.torch_device)


def build_streams(
    train: DataSet,
    ops: Sequence[Op],
    described: Description,
    device: Device,
    settings: Settings,
    num_workers: int,
) -> Streams:
    """Build the batches of a run: labeled images and, for consistency training, unlabeled ones.

    `ops` augment weakly; the strong view goes through `settings.strong_augmentation`, too.
    """
    shown = {"stats": described.stats, "luma": described.luma}
    given = {"seed": settings.rng_seed, "num_workers": num_workers, "loader": settings.loader}
    weak, size = Augmentation(ops, **shown), settings.batch_size
    labeled = Batches(train, weak, device, batch_size=size, **given)
    if not settings.consistency:
        return Streams(labeled)
    added = [RandAugment()] if settings.strong_augmentation == RAND_AUGMENT else []
    views = [weak, Augmentation([*ops, *added], **shown)]
    size *= settings.unlabeled_ratio
    return Streams(labeled, Batches(train, views, device, batch_size=size, stream=1, **given))


def run_batches(
    streams: Streams, chosen: TrainingSet, settings: Settings, first: int, stop: int
) -> Iterator[Batch]:
    """Yield batches number first ... stop - 1 of the chosen images."""
    share = {"labeled": chosen.num_labeled, "share": settings.labeled_share}
    return streams.repeat(chosen.indexes, first, stop, others=chosen.unlabeled, **share)


@torch.no_grad()
def start_from_class_means(
    model: nn.Module,
    train: DataSet,
    chosen: TrainingSet,
    device: Device,
    preprocessing: Augmentation,
    num_workers: int,
) -> None:
    """Set the last layer to the linear discriminant analysis of the activations before it.

    For activations f with means m_c and one covariance S within all classes, the logits are those of
    Gaussians, (m_c' S^-1 f - m_c' S^-1 m_c / 2) / T. The temperature T, at least 1, makes them no surer, on
    average, than the labels that they are made from. An image counts for its likeliest class by that
    probability: counted for every class by theirs, it draws the means together. S is shrunk toward the
    variance of all images, alike in every direction: by D / (D + N) for D activations and N images, which
    is nearly all of it where there are few labels.
    """
    rows = []
    with evaluation_mode(model):
        for batch in in_order(train, preprocessing, device, num_workers=num_workers):
            with device.autocast():
                rows.append(at_least_float32(model.pooled(batch.images)))
    features = all_gather_rows(torch.cat(rows), len(train))
    center, spread = features.mean(dim=0), features.var(dim=0).mean().clamp_min(LEAST)
    head = getattr(model, model.head_name)
    indexes, labels, weights = chosen.indexes, chosen.labels, chosen.weights
    if chosen.unlabeled is not None and chosen.posteriors is not None:
        confidence, likeliest = chosen.posteriors.max(dim=1)
        indexes = torch.cat([indexes, chosen.unlabeled])
        labels, weights = torch.cat([labels, likeliest]), torch.cat([weights, confidence])
    indexes, labels, weights = (x.to(center.device) for x in (indexes, labels, weights))
    features = features[indexes] - center
    shares = F.one_hot(labels, head.out_features) * weights[:, None]
    sizes = shares.sum(dim=0)
    means = (shares.T @ features) / sizes.clamp_min(LEAST)[:, None]
    within = features.T @ (features * weights[:, None]) - means.T @ (means * sizes[:, None])
    unit = spread * torch.eye(len(within), device=within.device)
    shrinkage = float(len(within) / (len(within) + sizes.sum()))
    weight = torch.linalg.solve((within / sizes.sum()).lerp(unit, shrinkage), means.T).T
    bias = -(weight * means).sum(dim=1) / 2
    logits = features @ weight.T + bias
    wanted = weights.mean()
    low, high = 1.0, MOST_TEMPERATURE
    for _ in range(HALVINGS):  # the larger the temperature, the less sure
        middle = math.sqrt(low * high)
        sure = (logits / middle).softmax(dim=1).amax(dim=1).mean()
        low, high = (middle, high) if sure > wanted else (low, middle)
    head.weight.copy_(weight / high)
    head.bias.copy_((bias - weight @ center) / high)


def is_own_run(state: Mapping[str, Any]) -> bool:
    """Return whether a file holds a run of phase 3 to resume, and not just a network's weights."""
    return "step" in state and not is_metric(state)


def read_start(path: str) -> dict[str, Any]:
    """Read the checkpoint that --resume names; a ValueError names the best checkpoint beside it."""
    try:
        return published.load(path)
    except ValueError as error:
        other = Path(path).with_name(BEST)
        if not other.is_file() or other.name == Path(path).name:
            raise
        raise ValueError(f"{error}; the best checkpoint of that run is {other}") from error


def begin(state: TrainState, settings: Settings, resume: str, *, own_only: bool = False) -> None:
    """Resume a run, or else load the weights of another network: `resume` unless `own_only`, or --pretrained.

    Raises:
        ValueError: if a file does not fit or belongs to another run, listing the differences.
    """
    # an external network was built with those weights
    external = backbones.is_external(state.description.architecture)
    pretrained = "" if external else settings.pretrained
    entries = read_start(resume) if resume else {}
    if is_own_run(entries):
        _resume(state, resume, entries, settings.max_iters)
    elif resume and own_only:
        raise ValueError(
            f"--resume {resume}: this is not a run of phase 3 (it has no step); --pretrained takes the "
            "weights of another network"
        )
    elif resume and pretrained:
        raise ValueError(
            f"{resume} and {pretrained} both hold weights to start from; name one of them"
        )
    elif resume or pretrained:
        entries = entries if resume else published.load(pretrained)
        load_network(state.model, entries, resume or pretrained, start_of=state.description)


def _resume(state: TrainState, path: str, entries: Mapping[str, Any], max_iters: int) -> None:
    if "meta" not in entries:
        raise ValueError(
            f"{path} was written by other scripts and does not say what run it is; --pretrained takes its "
            "weights"
        )
    checkpoint.require_keys(entries, path, *OWN_KEYS)
    require_classes(path, entries, state.description.classes)
    state.require_own(entries["meta"])
    if entries["examples"] != state.facts["examples"]:
        raise ValueError(f"{path} was trained on other images or labels than these")
    state.load_state_dict(entries, path)
    if state.step > max_iters:
        raise ValueError(
            f"{path} is of step {state.step}, and this run has {max_iters}; it is damaged"
        )
    print_main(f"continuing at step {state.step} (best accuracy so far {state.best:.2f}%)")


def finish(
    state: TrainState, max_iters: int, write: Writer, files: Checkpoints, reason: str, command: str
) -> None:
    """Print and log both accuracies, or the `command` that continues a run that `reason` stopped early.

    The best accuracy is chosen on the test images, the last one is not.
    """
    if state.step < max_iters:
        write("stop", state.step, reason=reason)
        print_main(f"stopped by {reason} after step {state.step}; continue: {command}")
        return
    write("end", state.step, last=state.accuracy, best=state.best)
    accuracies = f"last accuracy {state.accuracy:.2f}%, best accuracy {state.best:.2f}%; "
    measured = state.accuracy == state.accuracy  # NaN where there were no test images
    print_main(f"{accuracies if measured else ''}checkpoint: {files.last_file}")
