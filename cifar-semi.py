"""Phase 3: train a classifier on a few labelled and the most confident pseudo-labelled images.

The published CIFAR-10 run at 250 labels, from the metric of phase 1 and the pseudo-labels of phase 2
(test accuracy 71.26% published):

    python cifar-semi.py --num-labeled 250 --resume checkpoint/instance_cifar10/ckpt.cifar.pth.tar \\
        --pseudo-file checkpoint/pseudos/instance_nc_wrn-28-2/250.pth.tar --pseudo-ratio 0.2

The supervised baseline on the same labelled images, from the metric or (without --resume) from scratch:

    python cifar-semi.py --num-labeled 250 --resume checkpoint/instance_cifar10/ckpt.cifar.pth.tar

Measure a trained classifier: `--eval --resume checkpoint/cifar10-semi/exp/ckpt.pth.tar`. Continue an
interrupted run: the same command with --resume naming that run's own ckpt.pth.tar.
Writes `ckpt.pth.tar` (last step) and `ckpt.best.pth.tar` (best test accuracy, as published: a choice
made on the test images, so the last accuracy is the one to report) to --model-root/--exp-name,
TensorBoard events and `log.jsonl` to --log-root/--exp-name.
"""

import argparse
import hashlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from datasets import UNKNOWN, ImageSet, build_datasets
from datasets.transforms import Augmentation, finetune_ops
from lib import checkpoint, devices, engine, options, provenance, pseudo_labels
from lib.loader import Batches
from lib.log import RunLog
from lib.meters import Mean
from lib.pseudo_labels import PseudoLabels
from lib.sampler import num_batches
from lib.schedule import learning_rate
from lib.split import expected_count, labeled_split
from models import build_model

LAST, BEST = "ckpt.pth.tar", "ckpt.best.pth.tar"
OWN_KEYS = ("step", "acc", "best_acc", "net", "optimizer", "examples", "meta")

# Options that make a run what it is: resuming with another value would be another run.
MATHEMATICS = (
    *("dataset", "image_size", "input_gray", "architecture", "lr", "lr_scheduler", "batch_size"),
    *("weight_decay", "max_iters", "rng_seed", "criterion", "finetune", "num_labeled"),
    *("pseudo_ratio", "confidence_weighted", "class_balanced"),
)


@dataclass(frozen=True)
class Examples:
    """What to train on: images by index, their labels (true or pseudo), the weight of each one's loss.

    The first `num_labeled` of them have their true labels.
    """

    indexes: Tensor
    labels: Tensor
    weights: Tensor
    num_labeled: int

    def __str__(self) -> str:
        num_pseudo = len(self.labels) - self.num_labeled
        return f"{self.num_labeled} labelled and {num_pseudo} pseudo-labelled images"

    @property
    def digest(self) -> str:
        parts = (self.indexes, self.labels, self.weights)
        return hashlib.sha256(b"".join(p.numpy().tobytes() for p in parts)).hexdigest()[:16]


@dataclass(frozen=True)
class Start:
    """Where training begins: steps already done, accuracy after them, best accuracy so far."""

    step: int = 0
    accuracy: float = float("nan")
    best: float = 0.0


def build_parser() -> argparse.ArgumentParser:
    parser = options.parser(__doc__)
    options.add_data(parser, "--data_dir", "--dataDir")
    network = options.add_model(parser)
    network.add_argument(
        "--resume",
        "-r",
        default="",
        metavar="FILE",
        help="weights of phase 1 (its last layer is not loaded), or this run's own checkpoint",
    )
    network.add_argument("--finetune", action="store_true", help="train the last layer only")
    network.add_argument(
        "--input-gray", action="store_true", help="gray input, for a colorization backbone"
    )
    optimization = options.add_optimization(parser, lr=0.01)
    optimization.add_argument("--max-iters", type=int, default=500000, help="optimizer steps")
    optimization.add_argument(
        "--criterion",
        choices=("CrossEntropyLoss", "MultiMarginLoss"),
        default="CrossEntropyLoss",
        help="loss of torch.nn",
    )
    labels = parser.add_argument_group("labels")
    labels.add_argument(
        "--num-labeled",
        type=options.num_labeled,
        default=500,
        metavar="N",
        help="labelled images, equally many of each class; all: every image that has a label",
    )
    labels.add_argument(
        "--pseudo-file", default="", metavar="FILE", help="pseudo-labels; none: supervised baseline"
    )
    labels.add_argument(
        "--pseudo-ratio", type=float, default=1, help="most confident share of them to use"
    )
    labels.add_argument(
        "--class-balanced",
        action="store_true",
        help="take that share of each class instead of one global ranking",
    )
    labels.add_argument(
        "--confidence-weighted",
        action="store_true",
        help="weight the loss of each pseudo-labelled image by its confidence, as in the paper",
    )
    options.add_compute(parser)
    files = parser.add_argument_group("files")
    files.add_argument("--model-root", default="./checkpoint/cifar10-semi", help="checkpoints")
    files.add_argument(
        "--log-root", default="./tensorboard/cifar10-semi", help="TensorBoard and log.jsonl"
    )
    files.add_argument("--exp-name", default="exp", help="folder below both of them")
    files.add_argument("--eval", action="store_true", help="only measure --resume")
    files.add_argument("--eval-freq", type=int, default=500, help="steps between tests and saves")
    files.add_argument("--print-freq", type=int, default=100, help="steps between lines")
    return parser


def check_options(args: argparse.Namespace) -> None:
    options.check_common(args)
    options.require_positive(args, "max_iters", "eval_freq", "print_freq")
    options.require_share(args, "pseudo_ratio")
    if args.eval and not args.resume:
        raise ValueError("--eval measures a checkpoint: name it with --resume FILE")
    if args.resume and not Path(args.resume).is_file():
        raise ValueError(f"--resume {args.resume}: there is no such file")
    if not args.pseudo_file:
        unused = ("pseudo_ratio", "confidence_weighted", "class_balanced")
        options.warn_unused(args, build_parser(), "without --pseudo-file", *unused)
    if args.finetune and not args.resume:
        warning = "warning: --finetune without --resume trains on features of a random network"
        print(warning, file=sys.stderr)


def choose_examples(args, train: ImageSet, pseudo: PseudoLabels | None) -> Examples:
    """Labelled images with their true labels, then the chosen pseudo-labelled ones with theirs."""
    if pseudo is None:
        split = labeled_split(train.targets, args.num_labeled, train.num_classes, args.rng_seed)
        indexes, labels, weights = split.labeled, torch.empty(0).long(), torch.empty(0)
        chosen = labels
    else:
        count = expected_count(args.num_labeled, train.targets, train.num_classes)
        try:
            pseudo.require_fit(len(train), train.num_classes, count, train.digest)
        except ValueError as error:
            raise ValueError(f"{args.pseudo_file}: {error}") from error
        positions = pseudo.select(args.pseudo_ratio, class_balanced=args.class_balanced)
        indexes, chosen = pseudo.labeled, pseudo.indexes[positions]
        labels, weights = pseudo.labels[positions], pseudo.confidence[positions]
    true = train.targets[indexes]
    if (true == UNKNOWN).any():
        raise ValueError(f"{args.pseudo_file}: a labelled image has no label in this data set")
    if not args.confidence_weighted:
        weights = torch.ones(len(labels))
    return Examples(
        torch.cat([indexes, chosen]),
        torch.cat([true, labels]),
        torch.cat([torch.ones(len(true)), weights.float()]),
        len(true),
    )


def load_start(args, model: nn.Module, optimizer, examples: Examples, meta) -> Start:
    """Apply --resume: the weights of phase 1 at step 0, or this run where it stopped."""
    if not args.resume:
        return Start()
    state = checkpoint.load_dict(args.resume)
    own_run = "step" in state
    if own_run:
        state = checkpoint.load_dict(args.resume, *OWN_KEYS)
        provenance.require_same(state["meta"], meta, MATHEMATICS)
        if state["examples"] != examples.digest:
            raise ValueError(f"{args.resume} was trained on other images or labels than these")
    weights = checkpoint.model_weights(state, args.resume)
    report = checkpoint.load_weights(model, weights, source=args.resume, keep_head=own_run)
    print(f"{args.resume}: {report}")
    if not own_run:
        return Start()
    engine.restore(args.resume, [(optimizer, state["optimizer"])])
    print(f"continuing at step {state['step']} (best accuracy so far {state['best_acc']:.2f}%)")
    return Start(state["step"], state["acc"], state["best_acc"])


def evaluate_file(args, model: nn.Module, test: ImageSet | None, compute) -> dict[str, float]:
    """--eval: accuracy of a finished classifier."""
    if test is None:
        raise ValueError("--eval needs test images: DIR/test/<class>/* or DIR/val/<class>/*")
    state = checkpoint.load_dict(args.resume)
    if "lemniscate" in state:
        raise ValueError(
            f"{args.resume} is a metric of phase 1, no classifier: unsupervised/cifar.py --test-only "
            "measures it, this script without --eval trains a classifier from it"
        )
    weights = checkpoint.model_weights(state, args.resume)
    print(f"{args.resume}: {checkpoint.load_weights(model, weights, source=args.resume)}")
    scores = engine.evaluate(model, test, compute, gray=args.input_gray)
    print(f"test accuracy top-1 {scores['top1']:.2f}% top-5 {scores['top5']:.2f}%")
    return scores


def run_state(model, optimizer, step: int, accuracy, best, examples, train, meta) -> dict[str, Any]:
    """Everything a run is, under the published names (`step`, `best_acc`, `net`, `optimizer`)."""
    return {
        "step": step,
        "acc": accuracy,
        "best_acc": best,
        "net": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "architecture": meta["options"]["architecture"],
        "classes": list(train.classes),
        "examples": examples.digest,
        "meta": meta,
    }


def save(state: dict[str, Any], folder: Path, is_best: bool) -> None:
    """The best one first: a run cut off in between repeats its last steps and writes both again."""
    if is_best:
        checkpoint.save(state, folder / BEST)
    checkpoint.save(state, folder / LAST)


def measure(args, log: RunLog, model, test: ImageSet | None, compute, done: int, best: float):
    """Test accuracy after step `done` and the best so far; NaN where there are no test images."""
    if test is None:
        return float("nan"), best
    scores = engine.evaluate(model, test, compute, gray=args.input_gray)
    best = max(best, scores["top1"])
    log.write("test", done, **scores, best=best)
    tqdm.write(f"step {done:6d}  test accuracy {scores['top1']:.2f}% (best {best:.2f}%)")
    return scores["top1"], best


def report_training(log: RunLog, done: int, max_iters: int, values: dict[str, float]) -> None:
    log.write("train", done, **values)
    tqdm.write(
        f"step {done:6d}/{max_iters}  loss {values['loss']:.4f}  lr {values['lr']:.5f}"
        f"  {values['images_per_s']:.0f} img/s"
    )


def main(args: argparse.Namespace) -> dict[str, float]:
    # 1. What is asked for, on what data; a bad pseudo-label file ends here
    check_options(args)
    compute = devices.select(args.gpus, args.precision)
    pseudo = pseudo_labels.load(args.pseudo_file) if args.pseudo_file else None
    train, test = build_datasets(
        args.dataset, args.data_dir, image_size=args.image_size, num_workers=args.num_workers
    )
    examples = None if args.eval else choose_examples(args, train, pseudo)

    # 2. Network, optimizer, schedule; weights of phase 1, or where this run stopped
    torch.manual_seed(args.rng_seed)
    channels = 1 if args.input_gray else 3
    model = compute.prepare(build_model(args.architecture, train.num_classes, in_channels=channels))
    if examples is None:
        return evaluate_file(args, model, test, compute)
    parameters = engine.trainable(model, head_only=args.finetune)
    optimizer = engine.sgd(parameters, args.lr, args.weight_decay)
    criterion = getattr(nn, args.criterion)(reduction="none")
    per_epoch = num_batches(len(examples.indexes), args.batch_size)
    schedule = learning_rate(
        args.lr_scheduler, base=args.lr, total=args.max_iters, steps_per_epoch=per_epoch
    )
    meta = provenance.record(vars(args), train.digest)
    start = load_start(args, model, optimizer, examples, meta)
    folder = options.writable_folder("--model-root", Path(args.model_root) / args.exp_name)
    print(f"{compute}; {args.dataset}: {examples} of {len(train)}, {train.num_classes} classes")

    # 3. Train, test, save
    augmentation = Augmentation(finetune_ops(), train.stats, gray=args.input_gray)
    batches = Batches(train, augmentation, compute, batch_size=args.batch_size, seed=args.rng_seed)
    steps = engine.finetune(
        model,
        criterion,
        optimizer,
        batches.stream(examples.indexes, start.step, args.max_iters),
        *(examples.labels, examples.weights, schedule, compute),
        first_step=start.step,
        head_only=args.finetune,
    )
    accuracy, best, loss, seen, since = start.accuracy, start.best, Mean(), 0, time.perf_counter()
    bar = tqdm(initial=start.step, total=args.max_iters, unit="step", leave=False, disable=None)
    with RunLog(Path(args.log_root) / args.exp_name) as log, bar:
        log.write("start", first_step=start.step, meta=meta)
        for step in steps:
            done, is_last = step.number + 1, step.number + 1 == args.max_iters
            loss.update(step.loss, step.batch_size)
            seen += step.batch_size
            bar.update()
            if done % args.print_freq == 0 or is_last:
                values = {"loss": loss.value, "lr": step.lr}
                values["images_per_s"] = seen / (time.perf_counter() - since)
                report_training(log, done, args.max_iters, values)
                loss, seen, since = Mean(), 0, time.perf_counter()
            if done % args.eval_freq == 0 or is_last:
                paused = time.perf_counter()
                engine.require_finite(done, model)
                accuracy, best = measure(args, log, model, test, compute, done, best)
                state = run_state(model, optimizer, done, accuracy, best, examples, train, meta)
                save(state, folder, is_best=not accuracy < best)
                since += time.perf_counter() - paused
        log.write("end", args.max_iters, last=accuracy, best=best)

    # 4. Both numbers: the published one is chosen on the test images, the last one is not
    measured = (
        f"last accuracy {accuracy:.2f}%, best accuracy {best:.2f}%; " if test is not None else ""
    )
    print(f"{measured}checkpoint: {folder / LAST}")
    return {"last": accuracy, "best": best}


if __name__ == "__main__":
    options.run(main, build_parser())
