"""Parts of phase 3: its network and initial weights, its tests, and how a run resumes and ends.

Rank 0 alone prints and writes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from datasets import DataSet
from lib.features import backbones
from lib.files import checkpoint, provenance, weights
from lib.files.description import CLASSIFIER, Description
from lib.files.published import class_names, is_metric
from lib.files.resume import newest_readable
from lib.labels import pseudo_labels
from lib.loading.batches import with_loader
from lib.loading.sampler import num_batches
from lib.objectives.classification import Classification
from lib.runtime.devices import Device
from lib.runtime.distributed import own_workers, print_main
from lib.runtime.option import resume_invariants
from lib.training.evaluation import evaluate
from lib.training.log import Writer
from lib.training.schedule import Drops, learning_rate
from lib.training.settings import FinetuningSettings as Settings
from lib.training.state import Checkpoints, TrainState
from lib.training.training_set import TrainingSet
from models import build_model

LAST, BEST = "ckpt.pth.tar", "ckpt.best.pth.tar"
AUTO = "auto"
OWN_KEYS = ("step", "acc", "best_acc", "net", "optimizer", "examples", "meta")


RESUME_INVARIANTS = resume_invariants(Settings)


def build_classifier(
    settings: Settings,
    num_classes: int,
    device: Device,
    *,
    imagenet: bool = False,
    weights: str | None = None,
) -> nn.Module:
    """Build the network on its device, initialized from the seed.

    Args:
        weights: local weight file of a library's network (`lib.features.backbones`), "" for the library's
            own weights, None for random ones. The networks of `models` ignore it.

    Raises:
        ValueError: if the network is unknown, or a library's network is to read gray images.
    """
    torch.manual_seed(settings.rng_seed)
    name = settings.architecture
    if not backbones.is_external(name):
        channels = 1 if settings.input_gray else 3
        model = build_model(name, num_classes, in_channels=channels, imagenet=imagenet)
        return device.prepare(model)
    if settings.input_gray:
        raise ValueError(f"--arch {name} reads color images: leave out --input-gray")
    model = backbones.classifier(name, num_classes, weights or "", weighted=weights is not None)
    return device.prepare(model)


def starting_weights(
    architecture: str, resume: str, pretrained: str, *, evaluating: bool
) -> tuple[str | None, str]:
    """Return the part of `--pretrained` that the network is built with, and the one loaded afterwards.

    A library's network is built with its weights, unless they come from a checkpoint of phase 3.
    """
    if not backbones.is_external(architecture):
        return None, pretrained
    fresh = not evaluating and not (resume and is_own_run(read_start(resume)))
    return (pretrained if fresh else None), ""


def require_classes(path: str, state: Mapping[str, Any], classes: Sequence[str]) -> None:
    """Raise ValueError, naming the differences, if a classifier records other class names."""
    names = class_names(state)
    if names and names != list(classes):
        different = pseudo_labels.differing_classes(names, classes)
        raise ValueError(f"{path} was trained for other classes than these: {different}")


def load_weights(
    path: str, state: Mapping[str, Any], model: nn.Module, classes: Sequence[str]
) -> None:
    """Load the weights of another network, with its last layer if that classifies the same classes.

    The last layer of phase 1 is an embedding and is left out. That of a classifier is loaded if it has as
    many outputs and records no other classes.

    Raises:
        ValueError: if anything but the last layer does not fit.
    """
    tensors = weights.model_weights(state, path)
    head = f"{model.head_name}.weight"
    fits = head in tensors and tensors[head].shape == model.state_dict()[head].shape
    same = class_names(state) in ([], list(classes))
    keep = fits and same and not is_metric(state)
    report = weights.load_weights(model, tensors, source=path, keep_head=keep)
    print_main(f"{path}: {report}; the last layer is {'its own' if keep else 'a new one'}")


@dataclass(frozen=True)
class Tester:
    """Measurement of a classifier on test images.

    Attributes:
        num_workers: processes that read image files, on each machine.
    """

    test: DataSet | None
    device: Device
    gray: bool = False
    num_workers: int = 0

    @property
    def _images(self) -> DataSet:
        if self.test is None:
            raise ValueError("--eval needs test images: DIR/test/<class>/* or DIR/val/<class>/*")
        return self.test

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Measure `top1` and `top5` in percent and the mean cross-entropy `loss`.

        Raises:
            ValueError: if there are no test images, or none has a label.
        """
        workers = own_workers(self.num_workers)
        return evaluate(model, self._images, self.device, gray=self.gray, num_workers=workers)

    def measure_file(self, path: str, model: nn.Module) -> dict[str, float]:
        """Measure the finished classifier in the checkpoint `path`, and print its accuracy.

        Raises:
            ValueError: if there are no test images, or the file is no classifier of their classes.
        """
        if not path:
            raise ValueError("--eval measures a checkpoint, and this run has none yet")
        classes = self._images.classes
        state = checkpoint.load_dict(path)
        if is_metric(state):
            raise ValueError(
                f"{path} is a metric of phase 1, no classifier: --test-only of the scripts in "
                "unsupervised/ measures it, this script without --eval trains a classifier from it"
            )
        require_classes(path, state, classes)
        tensors = weights.model_weights(state, path)
        print_main(f"{path}: {weights.load_weights(model, tensors, source=path)}")
        scores = self(model)
        print_main(f"test accuracy top-1 {scores['top1']:.2f}% top-5 {scores['top5']:.2f}%")
        return scores

    def measure_run(self, state: TrainState, write: Writer) -> bool:
        """Measure, print and log the accuracy of a run, and return whether it is the best so far.

        Without test images the accuracy stays NaN, and each one is the best.
        """
        if self.test is None:
            return not state.accuracy < state.best
        scores = self(state.model)
        is_best = state.measure(scores["top1"])
        write("test", state.step, **scores, best=state.best)
        accuracies = f"test accuracy {state.accuracy:.2f}% (best {state.best:.2f}%)"
        print_main(f"step {state.step:6d}  {accuracies}")
        return is_best


def describe_classifier(
    settings: Settings, train: DataSet, *, imagenet: bool = False
) -> Description:
    """Describe the network of a run, for the readers of its checkpoints."""
    mean, std = train.stats
    arguments = {
        "out_features": train.num_classes,
        "in_channels": 1 if settings.input_gray else 3,
        "normalize": False,
        "imagenet": imagenet,
    }
    return Description(
        CLASSIFIER,
        settings.architecture,
        arguments,
        mean,
        std,
        train.image_size,
        train.evaluation_resize,
        train.classes,
    )


def build_objective(chosen: TrainingSet, criterion: str, device: Device) -> Classification:
    """Build the weighted loss on the labels of the chosen images."""
    return Classification(chosen.labels, chosen.weights, criterion).to(device.torch_device)


def schedule_of(
    settings: Settings, num_images: int, drops: Drops | None = None
) -> Callable[[int], float]:
    """Return the learning rate as a function of the step; `drops` as in `learning_rate`.

    Args:
        num_images: number of training images.
    """
    return learning_rate(
        settings.lr_scheduler,
        base=settings.lr,
        total=settings.max_iters,
        steps_per_epoch=num_batches(num_images, settings.batch_size * settings.iter_size),
        drops=drops,
    )


def find_start(resume: str, folder: Path) -> str:
    """Return the file that --resume names: with `auto` the newest readable checkpoint of the run, or none.

    Raises:
        ValueError: if the file does not exist, or there are checkpoints and none can be read.
    """
    if resume == AUTO:
        return newest_readable(folder, (LAST, BEST))
    if resume and not Path(resume).is_file():
        raise ValueError(f"--resume {resume}: there is no such file")
    return resume


def is_own_run(state: Mapping[str, Any]) -> bool:
    """Return whether a file holds a run of phase 3 to resume, and not just a network's weights."""
    return "step" in state and not is_metric(state)


def read_start(path: str) -> dict[str, Any]:
    """Read the checkpoint that --resume names.

    Raises:
        ValueError: if it cannot be read, naming the best checkpoint beside it.
    """
    try:
        return checkpoint.load_dict(path)
    except ValueError as error:
        other = Path(path).with_name(BEST)
        if not other.is_file() or other.name == Path(path).name:
            raise
        raise ValueError(f"{error}; the best checkpoint of that run is {other}") from error


def begin(state: TrainState, resume: str, pretrained: str = "", *, own_only: bool = False) -> None:
    """Load the weights of another network, or resume a run.

    Args:
        resume: checkpoint of this run, or another network as in `pretrained`.
        pretrained: checkpoint of another network, not used if `resume` is a run.
        own_only: whether to refuse another network as `resume`.

    Raises:
        ValueError: if a file does not fit or belongs to another run, listing the differences.
    """
    entries = read_start(resume) if resume else {}
    if is_own_run(entries):
        resume_run(state, resume, entries)
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
        entries = entries if resume else checkpoint.load_dict(pretrained)
        load_weights(resume or pretrained, entries, state.model, state.description.classes)


def resume_run(state: TrainState, path: str, entries: Mapping[str, Any]) -> None:
    """Resume a finetuning run from the entries of the checkpoint `path`.

    Raises:
        ValueError: if it does not fit or belongs to another run, listing the differences.
    """
    if "meta" not in entries:
        raise ValueError(
            f"{path} was written by other scripts and does not say what run it is; --pretrained takes its "
            "weights"
        )
    checkpoint.require_keys(entries, path, *OWN_KEYS)
    require_classes(path, entries, state.description.classes)
    provenance.require_same(with_loader(entries["meta"]), state.meta, RESUME_INVARIANTS)
    provenance.say_precision(entries["meta"], state.meta)
    if entries["examples"] != state.facts["examples"]:
        raise ValueError(f"{path} was trained on other images or labels than these")
    state.load_state_dict(entries, path)
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
