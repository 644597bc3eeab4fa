"""Phase 3 as `cifar-semi.py` and `imagenet-semi.py` share it: what to train on, where to start, the run.

The scripts declare the options and say which images and networks these are about; everything here takes
plain values. Rank 0 alone prints and writes.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from datasets import UNKNOWN, DataSet
from datasets.files import FileSet
from datasets.transforms import Augmentation, Op
from lib.features import backbones
from lib.files import checkpoint, provenance
from lib.files.resume import newest_readable
from lib.files.weights import load_weights, model_weights
from lib.labels import pseudo_labels
from lib.labels.pseudo_labels import PseudoLabels
from lib.labels.split import expected_count, labeled_split
from lib.loading.batches import LOADERS, Batches, with_loader
from lib.loading.sampler import num_batches
from lib.runtime import interruption, profiling
from lib.runtime.devices import Device
from lib.runtime.distributed import (
    is_main,
    own_workers,
    print_main,
    progress_bar,
    share_buffers,
    wrap_ddp,
)
from lib.training import engine
from lib.training.log import Writer, main_log
from lib.training.meters import AverageMeter, Throughput, speed
from lib.training.schedule import Drops, learning_rate
from models import build_model

LAST, BEST = "ckpt.pth.tar", "ckpt.best.pth.tar"
AUTO = "auto"
OWN_KEYS = ("step", "acc", "best_acc", "net", "optimizer", "examples", "meta")


@dataclass(frozen=True)
class Settings:
    """The values of a run, under the names of their options.

    Attributes:
        batch_size: images of a batch over all processes; `iter_size` batches make an optimizer step.
        finetune: train the last layer alone.
        num_workers: processes that read image files or work for `loader`, on each machine.
        loader: one of `LOADERS`.
        stop_after: steps of this start after which to save and stop; 0: none.
        profile: steps to trace into the folder of the log; 0: none.
        compile: one of `profiling.COMPILE_MODES`; empty: the network as it is.
    """

    architecture: str
    input_gray: bool
    finetune: bool
    lr: float
    lr_scheduler: str
    batch_size: int
    iter_size: int
    weight_decay: float
    max_iters: int
    criterion: str
    rng_seed: int
    num_labeled: int | str
    pseudo_ratio: float
    pseudo_per_chunk: bool
    class_balanced: bool
    confidence_weighted: bool
    num_workers: int = 0
    loader: str = LOADERS[0]
    eval_freq: int = 500
    print_freq: int = 100
    stop_after: int = 0
    profile: int = 0
    compile: str = ""


# Options that make a run what it is: resuming with another value would be another run.
RESUME_INVARIANTS = (
    *("dataset", "image_size", "input_gray", "architecture", "lr", "lr_scheduler", "batch_size"),
    *("iter_size", "weight_decay", "max_iters", "rng_seed", "criterion", "finetune", "num_labeled"),
    *("pseudo_ratio", "pseudo_per_chunk", "confidence_weighted", "class_balanced", "loader"),
)


@dataclass(frozen=True)
class Files:
    """Where a run writes, and the command that continues it from there."""

    checkpoints: Path
    log: Path
    resume_command: str = ""


@dataclass(frozen=True)
class TrainingSet:
    """What to train on: images by index, their labels (true or pseudo), the weight of each one's loss.

    The first `num_labeled` of them have their true labels.
    """

    indexes: Tensor
    labels: Tensor
    weights: Tensor
    num_labeled: int

    def __str__(self) -> str:
        num_pseudo = len(self.labels) - self.num_labeled
        return f"{self.num_labeled} labeled and {num_pseudo} pseudo-labeled images"

    @property
    def digest(self) -> str:
        parts = (self.indexes, self.labels, self.weights)
        return hashlib.sha256(b"".join(p.numpy().tobytes() for p in parts)).hexdigest()[:16]


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: optimizer steps that are done.
        accuracy: percent at the last test, `best` the best so far.
        loss: of the examples since the last line of the log.
    """

    step: int = 0
    accuracy: float = float("nan")
    best: float = 0.0
    loss: AverageMeter = field(default_factory=AverageMeter)

    def count(self, step: engine.Step) -> None:
        self.step = step.number + 1
        self.loss.update(step.loss, step.batch_size)


def read_pseudo_labels(file: str, folder: str) -> list[PseudoLabels]:
    """The pseudo-labels of one file, of a folder of chunks, or none.

    Raises:
        ValueError: as `lib.labels.pseudo_labels.load` and `load_chunks`.
    """
    if folder:
        return pseudo_labels.load_chunks(folder)
    return [pseudo_labels.load(file)] if file else []


def choose_training_set(
    train: DataSet, parts: Sequence[PseudoLabels], settings: Settings, *, source: str = ""
) -> TrainingSet:
    """Labeled images with their true labels, then the most confident pseudo-labeled ones with theirs.

    Args:
        parts: pseudo-labels, in chunks or whole; without any the labeled images are all there is.
        settings: `pseudo_per_chunk` takes the same share of every chunk, in place of one ranking of all.
        source: the file or folder of the pseudo-labels, for messages.

    Raises:
        ValueError: if they do not fit the data set and the number of labels asked for.
    """
    classes, count = train.num_classes, settings.num_labeled
    if not parts:
        indexes = labeled_split(train.targets, count, classes, settings.rng_seed).labeled
        chosen, labels, weights = torch.empty(0).long(), torch.empty(0).long(), torch.empty(0)
    else:
        try:
            whole = pseudo_labels.merged(parts)
            expected = expected_count(count, train.targets, classes)
            whole.require_fit(len(train), classes, expected, train.digest, train.classes)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        indexes = whole.labeled
        groups = parts if settings.pseudo_per_chunk else [whole]
        chosen, labels, weights = _most_confident(groups, settings)
    true = train.targets[indexes]
    if (true == UNKNOWN).any():
        raise ValueError(f"{source}: a labeled image has no label in this data set")
    if not settings.confidence_weighted:
        weights = torch.ones(len(labels))
    return TrainingSet(
        torch.cat([indexes, chosen]),
        torch.cat([true, labels]),
        torch.cat([torch.ones(len(true)), weights.float()]),
        len(true),
    )


def _most_confident(
    groups: Sequence[PseudoLabels], settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Indexes, labels and confidence of the share to use of each ranking."""
    ratio, balanced = settings.pseudo_ratio, settings.class_balanced
    chosen = [(group, group.select(ratio, class_balanced=balanced)) for group in groups]
    return (
        torch.cat([group.indexes[positions] for group, positions in chosen]),
        torch.cat([group.labels[positions] for group, positions in chosen]),
        torch.cat([group.confidence[positions] for group, positions in chosen]),
    )


def build_classifier(
    settings: Settings,
    num_classes: int,
    device: Device,
    *,
    imagenet: bool = False,
    weights: str | None = None,
) -> nn.Module:
    """The network, initialized from the seed, on its device.

    Args:
        weights: of a network from elsewhere (`lib.features.backbones`): a local file, "" for the library's
            own; None leaves it at random ones. Not used by the networks of `models`.

    Raises:
        ValueError: for an unknown network, or one from elsewhere that shall read gray images.
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
    """Which of `--pretrained` the network is built with, and which is loaded into it afterwards.

    A network from elsewhere is built with its weights, unless a checkpoint of phase 3 brings them.
    """
    if not backbones.is_external(architecture):
        return None, pretrained
    fresh = not evaluating and not (resume and is_own_run(read_start(resume)))
    return (pretrained if fresh else None), ""


def require_classes(path: str, state: Mapping[str, Any], classes: Sequence[str]) -> None:
    """Refuse a classifier whose class numbers stand for other classes, where it records their names.

    Raises:
        ValueError: naming the file and the classes that differ.
    """
    names = pseudo_labels.class_names(state)
    if names and names != list(classes):
        different = pseudo_labels.differing_classes(names, classes)
        raise ValueError(f"{path} was trained for other classes than these: {different}")


def load_pretrained(
    path: str, state: Mapping[str, Any], model: nn.Module, classes: Sequence[str]
) -> None:
    """Take the weights of another network, and its last layer where that classifies the same classes.

    The last layer of phase 1 is an embedding, that of a classifier is used if it has as many outputs and
    records no other classes.

    Raises:
        ValueError: if anything but the last layer does not fit.
    """
    weights = model_weights(state, path)
    head = f"{model.head_name}.weight"
    fits = head in weights and weights[head].shape == model.state_dict()[head].shape
    same = pseudo_labels.class_names(state) in ([], list(classes))
    keep = fits and same and not checkpoint.is_metric(state)
    report = load_weights(model, weights, source=path, keep_head=keep)
    print_main(f"{path}: {report}; the last layer is {'its own' if keep else 'a new one'}")


def evaluate_file(
    path: str,
    model: nn.Module,
    test: DataSet | None,
    device: Device,
    settings: Settings,
) -> dict[str, float]:
    """Accuracy of a finished classifier on test images; prints it.

    Raises:
        ValueError: if there are none, or the file is no classifier of their classes.
    """
    if not path:
        raise ValueError("--eval measures a checkpoint, and this run has none yet")
    if test is None:
        raise ValueError("--eval needs test images: DIR/test/<class>/* or DIR/val/<class>/*")
    state = checkpoint.load_dict(path)
    if checkpoint.is_metric(state):
        raise ValueError(
            f"{path} is a metric of phase 1, no classifier: --test-only of the scripts in unsupervised/ "
            "measures it, this script without --eval trains a classifier from it"
        )
    require_classes(path, state, test.classes)
    weights = model_weights(state, path)
    print_main(f"{path}: {load_weights(model, weights, source=path)}")
    scores = _evaluate(model, test, device, settings)
    print_main(f"test accuracy top-1 {scores['top1']:.2f}% top-5 {scores['top5']:.2f}%")
    return scores


def _evaluate(
    model: nn.Module, test: DataSet, device: Device, settings: Settings
) -> dict[str, float]:
    workers = own_workers(settings.num_workers)
    return engine.evaluate(model, test, device, gray=settings.input_gray, num_workers=workers)


def find_start(resume: str, folder: Path) -> str:
    """The file that --resume means: with `auto` the newest readable checkpoint of the run, or none.

    Raises:
        ValueError: if there is no such file, or there are checkpoints and none can be read.
    """
    if resume == AUTO:
        return newest_readable(folder, (LAST, BEST))
    if resume and not Path(resume).is_file():
        raise ValueError(f"--resume {resume}: there is no such file")
    return resume


def is_own_run(state: Mapping[str, Any]) -> bool:
    """Whether a file holds a checkpoint of phase 3, to be continued, and not just a network's weights."""
    return "step" in state and not checkpoint.is_metric(state)


def read_start(path: str) -> dict[str, Any]:
    """What --resume names.

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


@dataclass
class Run:
    """A run of phase 3: what it trains, on what, and where it stands."""

    settings: Settings
    device: Device
    model: nn.Module
    train: DataSet
    test: DataSet | None
    examples: TrainingSet
    meta: Mapping[str, Any]
    progress: Progress = field(default_factory=Progress)
    optimizer: Optimizer = field(init=False)

    def __post_init__(self) -> None:
        parameters = engine.trainable(self.model, head_only=self.settings.finetune)
        self.optimizer = engine.sgd(parameters, self.settings.lr, self.settings.weight_decay)

    def state(self) -> dict[str, Any]:
        """Everything there is to save, under the published names (`step`, `best_acc`, `net`, `optimizer`)."""
        progress = self.progress
        return {
            "step": progress.step,
            "acc": progress.accuracy,
            "best_acc": progress.best,
            "net": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "architecture": self.settings.architecture,
            "classes": list(self.train.classes),
            "examples": self.examples.digest,
            "loss_sums": progress.loss.state(),
            "meta": dict(self.meta),
        }


def begin(run: Run, resume: str, pretrained: str = "", *, own_only: bool = False) -> None:
    """Take the weights of another network, or put the run back where it stopped.

    Args:
        resume: a checkpoint of this run; or another network, as `pretrained`.
        pretrained: another network, not used where `resume` continues a run.
        own_only: refuse another network as `resume`.

    Raises:
        ValueError: if a file does not fit, or names another run: listing what differs.
    """
    state = read_start(resume) if resume else {}
    if is_own_run(state):
        continue_run(run, resume, state)
    elif resume and own_only:
        raise ValueError(
            f"--resume {resume}: this is no run of phase 3 (it has no step); --pretrained takes the weights "
            "of another network"
        )
    elif resume and pretrained:
        raise ValueError(
            f"{resume} and {pretrained} both hold weights to start from; name one of them"
        )
    elif resume or pretrained:
        state = state if resume else checkpoint.load_dict(pretrained)
        load_pretrained(resume or pretrained, state, run.model, run.train.classes)


def continue_run(run: Run, path: str, state: Mapping[str, Any]) -> None:
    """Put a run back where it stopped, from what the file `path` holds.

    Raises:
        ValueError: if it does not fit or belongs to another run, listing what differs.
    """
    if "meta" not in state:
        raise ValueError(
            f"{path} was written by other scripts and does not say what run it is; --pretrained takes its "
            "weights"
        )
    checkpoint.require_keys(state, path, *OWN_KEYS)
    require_classes(path, state, run.train.classes)
    provenance.require_same(with_loader(state["meta"]), run.meta, RESUME_INVARIANTS)
    provenance.say_precision(state["meta"], run.meta)
    if state["examples"] != run.examples.digest:
        raise ValueError(f"{path} was trained on other images or labels than these")
    weights = model_weights(state, path)
    print_main(f"{path}: {load_weights(run.model, weights, source=path)}")
    engine.restore(path, [(run.optimizer, state["optimizer"])])
    print_main(
        f"continuing at step {state['step']} (best accuracy so far {state['best_acc']:.2f}%)"
    )
    run.progress = Progress(state["step"], state["acc"], state["best_acc"])
    run.progress.loss.load_state(state.get("loss_sums", (0.0, 0.0)))


def report_training(run: Run, write: Writer, lr: float, clock: Throughput) -> None:
    """A line of the log and the terminal about the steps since the last one."""
    done, loss = run.progress.step, run.progress.loss.value  # waits for the device: then the clock
    lap, run.progress.loss = clock.lap(), AverageMeter()
    write("train", done, loss=loss, lr=lr, **lap)
    line = f"step {done:6d}/{run.settings.max_iters}  loss {loss:.4f}  lr {lr:.5f}"
    print_main(f"{line}  {speed(lap)}")


def measure(run: Run, write: Writer) -> None:
    """Test accuracy and the best so far; NaN where there are no test images."""
    if run.test is None:
        return
    progress = run.progress
    scores = _evaluate(run.model, run.test, run.device, run.settings)
    progress.accuracy = scores["top1"]
    progress.best = max(progress.best, progress.accuracy)
    write("test", progress.step, **scores, best=progress.best)
    print_main(
        f"step {progress.step:6d}  test accuracy {progress.accuracy:.2f}% (best {progress.best:.2f}%)"
    )


def save(run: Run, folder: Path, *, is_best: bool) -> None:
    """The best one first: a run cut off in between repeats its last steps and writes both again.

    Raises:
        FloatingPointError: if a weight is not finite; nothing is written then.
    """
    share_buffers(run.model)
    engine.require_finite(run.progress.step, run.model)
    if not is_main():
        return
    state = run.state()
    if is_best:
        checkpoint.save(state, folder / BEST)
    checkpoint.save(state, folder / LAST)


def batches_of(run: Run, ops: Sequence[Op]) -> Batches:
    """The training images, augmented by `ops`."""
    settings = run.settings
    return Batches(
        run.train,
        Augmentation(ops, run.train.stats, gray=settings.input_gray),
        run.device,
        batch_size=settings.batch_size,
        seed=settings.rng_seed,
        num_workers=own_workers(settings.num_workers),
        loader=settings.loader,
    )


def steps_left(run: Run, batches: Batches, drops: Drops | None = None) -> Iterator[engine.Step]:
    """The optimizer steps that are left of a run."""
    settings, examples, first = run.settings, run.examples, run.progress.step
    per_epoch = num_batches(len(examples.indexes), settings.batch_size * settings.iter_size)
    schedule = learning_rate(
        settings.lr_scheduler,
        base=settings.lr,
        total=settings.max_iters,
        steps_per_epoch=per_epoch,
        drops=drops,
    )
    first_batch, stop = first * settings.iter_size, settings.max_iters * settings.iter_size
    return engine.finetune(
        wrap_ddp(run.model),
        getattr(nn, settings.criterion)(reduction="none"),
        run.optimizer,
        batches.stream(examples.indexes, first_batch, stop),
        *(examples.labels, examples.weights, schedule, run.device),
        first_step=first,
        iter_size=settings.iter_size,
        head_only=settings.finetune,
    )


def train(
    run: Run, files: Files, ops: Sequence[Op], *, drops: Drops | None = None
) -> dict[str, float]:
    """Train to the end, or until asked to stop; test and save on the way.

    Args:
        ops: augmentation.
        drops: of the schedule `multi-step`; None: those of CIFAR.

    Returns:
        Accuracy in percent after the `last` step, and the `best` one.

    Raises:
        FloatingPointError: naming the first step whose loss or weights are not finite.
        SystemExit: with 143 or 130, when SIGTERM or Ctrl-C ended the run and all is saved.
    """
    settings, progress = run.settings, run.progress
    batches = batches_of(run, ops)
    bar = progress_bar(total=settings.max_iters, initial=progress.step, unit="step")
    work = _arithmetic(run)
    if settings.compile:
        profiling.compile_network(run.model, settings.compile)
    with (
        main_log(files.log) as write,
        bar,
        interruption.watch(settings.stop_after) as stop,
        profiling.traced(settings.profile, files.log, run.device) as after_step,
    ):
        write("start", first_step=progress.step, meta=run.meta)
        clock = Throughput(lambda: batches.waited_s, work.mfu)
        for step in steps_left(run, batches, drops):
            progress.count(step)
            clock.count(step.batch_size)
            bar.update()
            after_step()
            stopping, is_last = stop.requested(), progress.step == settings.max_iters
            if is_last or progress.step % settings.print_freq == 0:
                report_training(run, write, step.lr, clock)
            with clock.paused():
                if is_last or progress.step % settings.eval_freq == 0:
                    if isinstance(run.test, FileSet):  # may outlast the grace after a SIGTERM
                        save(run, files.checkpoints, is_best=False)
                    measure(run, write)
                    save(run, files.checkpoints, is_best=not progress.accuracy < progress.best)
                elif stopping:
                    save(run, files.checkpoints, is_best=False)
            if stopping:
                break
        finish(run, write, files, stop)
    stop.exit()
    return {"last": progress.accuracy, "best": progress.best}


def _arithmetic(run: Run) -> profiling.Arithmetic:
    size = run.train.image_size
    shape = (1 if run.settings.input_gray else 3, size, size)
    return profiling.arithmetic(run.model, shape, run.device)


def finish(run: Run, write: Writer, files: Files, stop: interruption.Stop) -> None:
    """Both accuracies, or how to go on. The best one is chosen on the test images, the last one is not."""
    progress, last = run.progress, files.checkpoints / LAST
    if progress.step < run.settings.max_iters:
        write("stop", progress.step, reason=stop.reason)
        print_main(
            f"stopped by {stop.reason} after step {progress.step}; continue: {files.resume_command}"
        )
        return
    write("end", progress.step, last=progress.accuracy, best=progress.best)
    accuracies = f"last accuracy {progress.accuracy:.2f}%, best accuracy {progress.best:.2f}%; "
    print_main(f"{accuracies if run.test is not None else ''}checkpoint: {last}")
