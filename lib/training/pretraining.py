"""Phase 1 as unsupervised/cifar.py and unsupervised/imagenet.py run it: one loop, one kind of state."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from datasets import UNKNOWN, DataSet
from datasets.transforms import Augmentation, Op
from lib.features import extraction
from lib.files import checkpoint, provenance
from lib.files.resume import newest_readable
from lib.files.weights import load_weights, model_weights
from lib.loading.batches import LOADERS, Batches, with_loader
from lib.loading.sampler import num_batches
from lib.objectives import memory_bank
from lib.runtime import interruption, profiling
from lib.runtime.devices import Device
from lib.runtime.distributed import is_main, print_main, progress_bar, share, wrap_ddp
from lib.training import engine
from lib.training.log import Writer, main_log
from lib.training.meters import AverageMeter, Throughput, speed
from lib.training.schedule import IMAGENET_INSTANCE_DROPS, learning_rate
from models import build_model

Z_MOMENTUM = 0.99  # of the moving average of NCE's normalizer
BAR_EVERY = 50  # steps between losses on the progress bar: each one waits for the device


@dataclass(frozen=True)
class Settings:
    """What a run computes; the attributes are named and meant as the options.

    `iter_size` batches of `batch_size` images have their gradients averaged for one step.
    """

    architecture: str
    low_dim: int
    lr: float
    lr_scheduler: str
    momentum: float
    weight_decay: float
    batch_size: int
    iter_size: int
    epochs: int
    rng_seed: int
    nce_k: int
    nce_t: float
    nce_m: float
    nce_loss: str
    nce_z: str

    def steps_per_epoch(self, num_images: int) -> int:
        return num_batches(num_batches(num_images, self.batch_size), self.iter_size)

    def schedule(self, num_images: int, *, imagenet: bool) -> Callable[[int], float]:
        """The learning rate as a function of the step."""
        steps = self.steps_per_epoch(num_images)
        words = {"base": self.lr, "total": self.epochs * steps, "steps_per_epoch": steps}
        drops = IMAGENET_INSTANCE_DROPS if imagenet else None
        return learning_rate(self.lr_scheduler, drops=drops, **words)


# Options that make a run what it is: resuming with another value would be another run.
RESUME_INVARIANTS = ("dataset", "image_size", "loader", *(field.name for field in fields(Settings)))


@dataclass(frozen=True)
class Images:
    """What to train and to measure on, how it is augmented and read (`num_workers` of each process).

    `loader` is one of `lib.loading.batches.LOADERS`.
    """

    train: DataSet
    test: DataSet | None
    ops: list[Op]
    num_workers: int = 0
    val_batch_size: int = 500
    loader: str = LOADERS[0]

    @property
    def reading(self) -> dict[str, int]:
        """Keywords of evaluation; every process takes its part of `val_batch_size`."""
        batch_size = max(1, self.val_batch_size // share().size)
        return {"batch_size": batch_size, "num_workers": self.num_workers}


@dataclass(frozen=True)
class Files:
    """Where a run leaves what.

    Attributes:
        folder, last, best: checkpoints and their names.
        log_folder: TensorBoard events and `log.jsonl`.
        imagenet: it is a run as published for ImageNet. Its keys are `state_dict`, `arch`, `best_prec1`,
            and `epoch` as the next one; those for CIFAR are `net`, and `epoch` as the last one done.
        numbered: name of a copy that stays, `{epoch}` being the epochs done; every `save_freq` epochs.
        meta: what made them (`lib.files.provenance.record`), written into each.
    """

    folder: Path
    last: str
    best: str
    log_folder: Path
    meta: dict[str, Any]
    imagenet: bool = False
    numbered: str = ""
    save_freq: int = 0


@dataclass
class Run:
    """What learns, and how far it is.

    Attributes:
        epoch: epochs done and measured.
        step: optimizer steps done.
        loss: of the images of the epoch at hand so far.
        scores: accuracies after the last epoch.
        best: highest top-1 accuracy so far.
    """

    model: nn.Module
    bank: memory_bank.MemoryBank
    criterion: nn.Module
    optimizer: Optimizer
    epoch: int = 0
    step: int = 0
    loss: AverageMeter = field(default_factory=AverageMeter)
    scores: dict[str, float] = field(default_factory=dict)
    best: float = 0.0

    def finish_epoch(self, scores: dict[str, float]) -> bool:
        """Count an epoch with its accuracies; whether they are the best so far."""
        is_best = scores.get("top1", 0.0) >= self.best
        self.best = max(self.best, scores.get("top1", 0.0))
        self.epoch, self.scores, self.loss = self.epoch + 1, scores, AverageMeter()
        return is_best


def check_images(num_images: int, nce_k: int) -> None:
    """Instance discrimination tells images apart: there must be some, and more than negatives.

    Raises:
        ValueError: if there are too few.
    """
    if num_images < 2:
        raise ValueError(f"{num_images} training images: there is nothing to tell apart")
    if nce_k >= num_images:
        raise ValueError(
            f"--nce-k {nce_k}: an image has only {num_images - 1} others to draw from; take fewer, "
            "or --nce-k 0, the softmax over all images"
        )


def build_network(settings: Settings, device: Device, *, imagenet: bool = False) -> nn.Module:
    """The network with the start values of the run's seed; for ImageNet one of torchvision's."""
    torch.manual_seed(settings.rng_seed)
    words = {"normalize": True, "imagenet": imagenet}
    return device.prepare(build_model(settings.architecture, settings.low_dim, **words))


def start(
    model: nn.Module,
    settings: Settings,
    num_images: int,
    device: Device,
    *,
    imagenet: bool = False,
) -> Run:
    """A run at its first step; momentum is Nesterov's but for ImageNet, as published."""
    bank = memory_bank.MemoryBank(num_images, settings.low_dim, settings.nce_m, settings.rng_seed)
    criterion = memory_bank.build_loss(
        *(settings.nce_k, settings.nce_t),
        kind=settings.nce_loss,
        z_momentum=Z_MOMENTUM if settings.nce_z == "moving-average" else None,
        seed=settings.rng_seed,
        bf16=device.bf16,
    )
    optimizer = engine.sgd(
        *(model.parameters(), settings.lr, settings.weight_decay),
        momentum=settings.momentum,
        nesterov=not imagenet and settings.momentum > 0,
    )
    return Run(model, bank.to(device.torch_device), criterion.to(device.torch_device), optimizer)


def state_of(run: Run, files: Files, classes: Iterable[str]) -> dict[str, Any]:
    """Everything a run is, under the published names (`net` or `state_dict` ...) and our own."""
    weights, name = run.model.state_dict(), files.meta["options"]["architecture"]
    if files.imagenet:
        published = {
            "state_dict": weights,
            "epoch": run.epoch,
            "arch": name,
            "best_prec1": run.best,
        }
    else:
        published = {"net": weights, "epoch": run.epoch - 1}
    return published | {
        "optimizer": run.optimizer.state_dict(),
        "acc": run.scores.get("top1", 0.0),
        "lemniscate": {"memory": run.bank.memory},
        "criterion": run.criterion.state_dict(),
        "best_acc": run.best,
        "step": run.step,
        "loss_sums": run.loss.state(),
        "architecture": name,
        "classes": list(classes),
        "meta": files.meta,
    }


def load_network(
    model: nn.Module, state: dict[str, Any], source: str, *, keep_head: bool = True
) -> None:
    """Weights into the network; one line says what was loaded."""
    weights = model_weights(state, source)
    report = load_weights(model, weights, source=source, keep_head=keep_head)
    print_main(f"{source}: {report}")


def load_backbone(model: nn.Module, source: str) -> None:
    """`--pretrained`: weights of another network; of phase 1 the last layer too, where it has our shape."""
    state = checkpoint.load_dict(source)
    name = f"{model.head_name}.weight"
    head = model_weights(state, source).get(name)
    same = head is not None and head.shape == model.state_dict()[name].shape
    load_network(model, state, source, keep_head=same and checkpoint.is_metric(state))


def find_checkpoint(resume: str, folder: Path, names: Iterable[str], *, needed: bool) -> str:
    """The file that --resume means: with `auto` the newest readable one of the run, or none.

    Raises:
        ValueError: if one is needed, to be measured, and there is none; or as `newest_readable`.
    """
    source = newest_readable(folder, names) if resume == "auto" else resume
    if needed and not source:
        raise ValueError("there is no checkpoint to measure: name it with --resume FILE")
    return source


def resume(
    run: Run,
    source: str,
    files: Files,
    steps_per_epoch: int,
    invariants: tuple[str, ...] = RESUME_INVARIANTS,
) -> None:
    """Continue the run that left the file `source`, one that `files` describes.

    A file without the record `meta` is taken for a published one: its weights, momenta, memory bank and
    epoch go on under the options of this run, and what it does not hold starts anew.

    Args:
        invariants: options that must be the same.

    Raises:
        ValueError: if it is no checkpoint of phase 1, does not fit, or is of a run with other options or
            data.
    """
    state = checkpoint.load_dict(source, "optimizer", "epoch", "lemniscate")
    if {"meta", "criterion"} & state.keys():  # what we write and published files lack
        checkpoint.require_keys(state, source, "meta", "criterion", "best_acc")
        provenance.require_same(with_loader(state["meta"]), files.meta, invariants)
        provenance.say_precision(state["meta"], files.meta)
        load_network(run.model, state, source)
        parts = {"optimizer": run.optimizer, "lemniscate": run.bank, "criterion": run.criterion}
        engine.restore(source, ((part, state[name]) for name, part in parts.items()))
    else:
        _take_over(run, state, source)
    run.epoch = int(state["epoch"]) + (0 if files.imagenet else 1)
    run.step = state.get("step", run.epoch * steps_per_epoch)
    run.loss.load_state(state.get("loss_sums", (0.0, 0.0)))
    accuracy = float(state.get("acc", state.get("best_prec1", 0.0)))
    run.scores, run.best = {"top1": accuracy}, float(state.get("best_acc", accuracy))
    within = run.step - run.epoch * steps_per_epoch
    place = f" and {within} steps" if within else ""
    print_main(f"continuing after epoch {run.epoch}{place} (best so far {run.best:.2f}%)")


def _take_over(run: Run, state: dict[str, Any], source: str) -> None:
    """Weights, momenta and memory bank of a published file; the optimizer keeps this run's options."""
    rows = checkpoint.bank_rows(state, source)
    if rows.shape != run.bank.memory.shape:
        raise ValueError(
            f"{source} holds a memory bank of {_shape(rows)} numbers, this run needs "
            f"{_shape(run.bank.memory)}: it was made with other images or another --low-dim"
        )
    load_network(run.model, state, source)
    groups = [
        {k: v for k, v in group.items() if k != "params"} for group in run.optimizer.param_groups
    ]
    names = model_weights(state, source)
    momenta = _in_own_order(run.model, state["optimizer"], names)
    engine.restore(source, [(run.optimizer, momenta), (run.bank, {"memory": rows})])
    for group, own in zip(run.optimizer.param_groups, groups, strict=True):
        group.update(own)
    print_main(
        f"{source} is a published file: it records no options that these could be compared with"
    )


def _in_own_order(
    model: nn.Module, optimizer: dict[str, Any], names: Iterable[str]
) -> dict[str, Any]:
    """The state of an optimizer whose parameters were numbered in the order of `names`, in the model's.

    Momenta are handed over by place: among equally shaped weights a wrong one would not be noticed.
    """
    own = [name for name, _ in model.named_parameters()]
    theirs = [name for name in names if name in set(own)]
    groups = optimizer["param_groups"]
    if len(groups) != 1 or len(theirs) != len(own) or len(groups[0]["params"]) != len(own):
        return optimizer  # does not fit, as will be said
    number = dict(zip(theirs, groups[0]["params"], strict=True))
    return {**optimizer, "param_groups": [{**groups[0], "params": [number[name] for name in own]}]}


def _shape(rows: Tensor) -> str:
    return " x ".join(map(str, rows.shape))


def monitor(model: nn.Module, bank: Tensor, images: Images, device: Device) -> dict[str, float]:
    """kNN accuracy of the test images, {} where there are none or no training image has a label."""
    targets, test = images.train.targets, images.test
    if test is None or bool((targets == UNKNOWN).all()) or bool((test.targets == UNKNOWN).all()):
        return {}
    return engine.knn_monitor(model, bank, targets, test, device, **images.reading)


def stored_bank(source: str, num_images: int, dim: int, digest: str) -> Tensor:
    """The memory bank in a checkpoint of phase 1, N x D.

    Raises:
        ValueError: if it holds none, or one of other images.
    """
    state = checkpoint.load_dict(source)
    bank = checkpoint.bank_rows(state, source)
    recorded = state.get("meta", {}).get("data_digest", digest)
    if bank.shape != (num_images, dim) or recorded != digest:
        raise ValueError(
            f"{source} holds a memory bank of {_shape(bank)} numbers that is not of "
            f"the {num_images} training images here; --test-only computes one from these"
        )
    return bank


def measure(
    model: nn.Module, images: Images, device: Device, bank: Tensor | None = None
) -> dict[str, float]:
    """kNN accuracy on `bank`, or on one recomputed in evaluation mode from all training images.

    Raises:
        ValueError: if there is nothing to measure on.
    """
    if bank is None:
        bank = extraction.extract(model, images.train, device, **images.reading)
    scores = monitor(model, bank.to(device.torch_device), images, device)
    if not scores:
        raise ValueError("measuring needs test images, and labels for the training images")
    print_main(_accuracies(scores))
    return scores


def _accuracies(scores: dict[str, float]) -> str:
    text = f"kNN top-1 {scores['top1']:.2f}% top-5 {scores['top5']:.2f}%"
    return f"{text}  nearest neighbor {scores['nearest']:.2f}%"


def describe(epoch: int, epochs: int, values: dict[str, float]) -> str:
    """The line of an epoch, counted from 1."""
    line = f"epoch {epoch:4d}/{epochs}  loss {values['loss']:.4f} (chance {values['chance']:.4f})"
    line += f"  lr {values['lr']:.5f}  {speed(values)}"
    if "knn_top1" in values:
        scores = {name[4:]: value for name, value in values.items() if name.startswith("knn_")}
        line += f"  {_accuracies(scores)} (best {values['best']:.2f}%)"
    return line


def save(state: dict[str, Any], files: Files, *, is_best: bool, epoch: int = 0) -> None:
    """The last one at the end: a run cut off in between repeats its epoch and writes all again."""
    if is_best:
        checkpoint.save(state, files.folder / files.best)
    if files.save_freq and epoch and epoch % files.save_freq == 0:
        checkpoint.save(state, files.folder / files.numbered.format(epoch=epoch))
    checkpoint.save(state, files.folder / files.last)


def _train_epoch(
    run: Run,
    steps: Iterator[engine.Step],
    per_epoch: int,
    new_clock: Callable[[], Throughput],
    after_step: Callable[[], None],
    stop: interruption.Stop,
    print_freq: int,
) -> dict[str, float] | None:
    """What is left of the epoch at hand: its mean loss and speed, or None where the run shall stop."""
    start = run.epoch * per_epoch
    words = {"desc": f"epoch {run.epoch + 1}", "unit": "step"}
    clock, line_clock = new_clock(), new_clock()
    with progress_bar(initial=run.step - start, total=per_epoch, **words) as bar:
        for step in steps:
            run.loss.update(step.loss, step.batch_size)
            run.step = step.number + 1
            clock.count(step.batch_size)
            line_clock.count(step.batch_size)
            bar.update()
            after_step()
            if print_freq and (run.step - start) % print_freq == 0:
                line = f"epoch {run.epoch + 1:4d}  step {run.step - start:5d}/{per_epoch}"
                line += f"  loss {run.loss.value:.4f}  lr {step.lr:.5f}"
                print_main(f"{line}  {speed(line_clock.lap())}")
            elif run.step % BAR_EVERY == 0 and not bar.disable:
                bar.set_postfix(loss=f"{run.loss.value:.3f}")
            if stop.requested():
                return None
    loss = run.loss.value  # waits for the device: the clock is read after it
    return {"loss": loss} | clock.lap()


def train(
    run: Run,
    settings: Settings,
    images: Images,
    files: Files,
    device: Device,
    *,
    stop_after: int = 0,
    print_freq: int = 0,
    profile: int = 0,
    compile_mode: str = "",
    command: Callable[[Path], str] = str,
) -> dict[str, float]:
    """Train to the end, measuring and saving after each epoch, or until a signal or `stop_after` steps.

    Args:
        stop_after: steps of this start; 0: all.
        print_freq: steps between lines within an epoch; 0: none.
        profile: steps to trace into the folder of the log; 0: none.
        compile_mode: one of `profiling.COMPILE_MODES`; empty: the network as it is.
        command: how to continue a checkpoint, for the message of a run that was stopped.

    Returns:
        What the last epoch measured; {} where none was finished.
    """
    augmentation = Augmentation(images.ops, images.train.stats)
    words = {"batch_size": settings.batch_size, "seed": settings.rng_seed}
    words |= {"num_workers": images.num_workers, "loader": images.loader}
    batches = Batches(images.train, augmentation, device, **words)
    per_epoch = settings.steps_per_epoch(len(images.train))
    parts = run.bank, run.criterion, run.optimizer
    schedule = settings.schedule(len(images.train), imagenet=files.imagenet)
    work = _arithmetic(run, images, device)
    if compile_mode:
        profiling.compile_network(run.model, compile_mode)
    model, values = wrap_ddp(run.model), {}
    with (
        main_log(files.log_folder) as write,
        interruption.watch(stop_after) as stop,
        profiling.traced(profile, files.log_folder, device) as after_step,
    ):
        write("start", first_epoch=run.epoch, first_step=run.step, meta=files.meta)
        while run.epoch < settings.epochs:
            done = (run.step - run.epoch * per_epoch) * settings.iter_size
            todo = batches.epoch(run.epoch, done)
            where = {"first_step": run.step, "iter_size": settings.iter_size}
            steps = engine.pretrain(model, *parts, todo, schedule, device, **where)
            measured = _train_epoch(
                *(run, steps, per_epoch, partial(Throughput, lambda: batches.waited_s, work.mfu)),
                *(after_step, stop, print_freq),
            )
            engine.require_finite(run.step, run.model, run.bank, run.criterion)
            if measured is None:
                _save(run, files, images)
                write("stop", run.step, reason=stop.reason)
                how = command(files.folder / files.last)
                print_main(f"stopped by {stop.reason} after step {run.step}; to continue: {how}")
                break
            measured["lr"] = schedule(run.step - 1)
            values = _finish_epoch(run, measured, settings.epochs, images, files, device, write)
    stop.exit()
    if run.epoch == settings.epochs:
        last = files.folder / files.last
        print_main(f"last checkpoint: {last}" if values else "this run is already finished")
    return values


def _arithmetic(run: Run, images: Images, device: Device) -> profiling.Arithmetic:
    shape = (3, images.train.image_size, images.train.image_size)
    loss = run.criterion.flops(*run.bank.memory.shape)
    return profiling.arithmetic(run.model, shape, device, more_per_image=loss)


def _finish_epoch(
    run: Run,
    measured: dict[str, float],
    epochs: int,
    images: Images,
    files: Files,
    device: Device,
    write: Writer,
) -> dict[str, float]:
    """Accuracy, line, log and checkpoints of an epoch whose steps are done; all its numbers."""
    if files.imagenet:  # measuring may outlast the grace that follows a SIGTERM
        _save(run, files, images)
    scores = monitor(run.model, run.bank.memory, images, device)
    is_best = run.finish_epoch(scores)
    values = measured | {"best": run.best, "chance": run.criterion.chance(len(images.train))}
    values |= {f"knn_{name}": score for name, score in scores.items()}
    print_main(describe(run.epoch, epochs, values))
    write("epoch", run.step, epoch=run.epoch - 1, **values)
    _save(run, files, images, is_best=is_best, epoch=run.epoch)
    return values


def _save(run: Run, files: Files, images: Images, *, is_best: bool = False, epoch: int = 0) -> None:
    if is_main():
        state = state_of(run, files, images.train.classes)
        save(state, files, is_best=is_best, epoch=epoch)
