"""Phase 1: learn a metric of images without any label, by instance discrimination.

Every image is a class of its own: a network puts each one on the unit sphere, close to its own row of
a memory bank and far from all others (Wu et al. 2018, arXiv 1805.01978).

The published CIFAR-10 run (WRN-28-2, seven cosine cycles; kNN accuracy 82.12% published):

    python unsupervised/cifar.py --lr-scheduler cosine-with-restart --epochs 1270

Your own images, DIR/train/<class>/* and DIR/unlabeled/**:

    python unsupervised/cifar.py --dataset folder --data-dir DIR --model-dir checkpoint/mine

Without any download, about two minutes on two CPU cores:

    python unsupervised/cifar.py --dataset patches --arch wrn-10-1 --epochs 100 \\
        --lr 0.1 --lr-scheduler one-cycle --model-dir checkpoint/patches

Continue an interrupted run: the same command plus `--resume DIR/ckpt.cifar.pth.tar`.
Writes `ckpt.cifar.pth.tar` (last epoch) and `ckpt.cifar.best.pth.tar` (best kNN accuracy) to
--model-dir, TensorBoard events and `log.jsonl` to --log-dir.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn
from tqdm import tqdm

from datasets import UNKNOWN, ImageSet, build_datasets
from datasets.transforms import Augmentation, instance_ops
from lib import checkpoint, devices, engine, features, memory_bank, options, provenance
from lib.loader import Batches
from lib.log import RunLog
from lib.meters import Mean
from lib.schedule import learning_rate
from models import build_model

LAST, BEST = "ckpt.cifar.pth.tar", "ckpt.cifar.best.pth.tar"

# Options that make a run what it is: resuming with another value would be another run.
MATHEMATICS = (
    *("dataset", "image_size", "architecture", "low_dim", "lr", "lr_scheduler", "batch_size"),
    *("weight_decay", "epochs", "rng_seed", "nce_k", "nce_t", "nce_m", "nce_loss", "nce_z"),
    *("transform_scale", "transform_crop"),
)


def build_parser() -> argparse.ArgumentParser:
    parser = options.parser(__doc__)
    options.add_data(parser, "--dataDir")
    network = options.add_model(parser)
    network.add_argument("--low-dim", type=int, default=128, help="dimensions of the embedding")
    optimization = options.add_optimization(parser, lr=0.03)
    optimization.add_argument("--epochs", type=int, default=600, help="passes over the images")
    augmentation = parser.add_argument_group("augmentation")
    augmentation.add_argument(
        "--transform-crop",
        choices=("RandomResizedCrop", "PadCrop"),
        default="RandomResizedCrop",
        help="PadCrop: reflect-pad by an eighth of the side and crop",
    )
    augmentation.add_argument(
        "--transform-scale", type=float, default=0.2, help="smallest area of RandomResizedCrop"
    )
    bank = parser.add_argument_group("memory bank")
    bank.add_argument(
        "--nce-k", type=int, default=0, help="negatives per image; 0: softmax over all images"
    )
    bank.add_argument("--nce-t", type=float, default=0.1, help="temperature")
    bank.add_argument("--nce-m", type=float, default=0.5, help="momentum of the bank's rows")
    bank.add_argument(
        "--nce-loss",
        choices=memory_bank.LOSSES,
        default="nce",
        help="loss over --nce-k negatives: the published NCE, or softmax cross-entropy",
    )
    bank.add_argument(
        "--nce-z",
        choices=("moving-average", "first-batch"),
        default="moving-average",
        help="normaliser of NCE: momentum 0.99, or estimated once as published",
    )
    options.add_compute(parser)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--model-dir", "--modelDir", default="./checkpoint/instance_cifar10", help="checkpoints"
    )
    files.add_argument(
        "--log-dir",
        "--logDir",
        default="./tensorboard/instance_cifar10",
        help="TensorBoard and log.jsonl",
    )
    files.add_argument(
        "--resume", "-r", default="", metavar="FILE", help="continue this checkpoint"
    )
    files.add_argument(
        "--test-only",
        action="store_true",
        help="measure the kNN accuracy of --resume on a bank recomputed from all training images",
    )
    return parser


def check_options(args: argparse.Namespace) -> None:
    options.check_common(args)
    options.require_positive(args, "epochs", "low_dim", "nce_t")
    options.require_not_negative(args, "nce_k")
    if not 0 <= args.nce_m < 1:
        raise ValueError(f"--nce-m {args.nce_m}: the momentum of the bank must lie in [0, 1)")
    if args.test_only and not args.resume:
        raise ValueError("--test-only measures a checkpoint: name it with --resume FILE")
    parser = build_parser()
    if args.nce_k == 0:
        options.warn_unused(args, parser, "without --nce-k", "nce_loss", "nce_z")
    elif args.nce_loss != "nce":
        options.warn_unused(args, parser, f"with --nce-loss {args.nce_loss}", "nce_z")
    if args.transform_crop == "PadCrop":
        options.warn_unused(args, parser, "with PadCrop", "transform_scale")


def check_images(args: argparse.Namespace, train: ImageSet) -> None:
    """Instance discrimination tells images apart: there must be some, and more than negatives."""
    if len(train) < 2:
        raise ValueError(f"{len(train)} training images: there is nothing to tell apart")
    if args.nce_k >= len(train):
        raise ValueError(
            f"--nce-k {args.nce_k}: an image has only {len(train) - 1} others to draw from; take fewer, "
            "or --nce-k 0, the softmax over all images"
        )


def build_criterion(args: argparse.Namespace, compute: devices.Compute) -> nn.Module:
    criterion = memory_bank.build_loss(
        args.nce_k,
        args.nce_t,
        kind=args.nce_loss,
        z_momentum=0.99 if args.nce_z == "moving-average" else None,
        seed=args.rng_seed,
        bf16=compute.bf16,
    )
    return criterion.to(compute.device)


def monitor(
    model: nn.Module, bank: torch.Tensor, train: ImageSet, test: ImageSet | None, compute
) -> dict[str, float]:
    """kNN accuracy of the test images, {} where there are none or no training image has a label."""
    if test is None or bool((train.targets == UNKNOWN).all()):
        return {}
    return engine.knn_monitor(model, bank, train.targets, test, compute)


def run_state(model, optimizer, bank, criterion, epoch, scores, best, meta) -> dict[str, Any]:
    """Everything a run is, under the published names (`net` ... `lemniscate`) and our own."""
    return {
        "net": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "acc": scores.get("top1", 0.0),
        "epoch": epoch,
        "lemniscate": {"memory": bank.memory},
        "criterion": criterion.state_dict(),
        "best_acc": best,
        "architecture": meta["options"]["architecture"],
        "meta": meta,
    }


def load_network(args, model: nn.Module, state: dict[str, Any]) -> None:
    weights = checkpoint.model_weights(state, args.resume)
    print(f"{args.resume}: {checkpoint.load_weights(model, weights, source=args.resume)}")


def resume(args, model, optimizer, bank, criterion, meta) -> tuple[int, float]:
    """Restore a run in place; returns the next epoch and the best accuracy so far."""
    own = ("net", "optimizer", "epoch", "lemniscate", "criterion", "best_acc", "meta")
    state = checkpoint.load_dict(args.resume, *own)
    provenance.require_same(state["meta"], meta, MATHEMATICS)
    load_network(args, model, state)
    parts = {"optimizer": optimizer, "lemniscate": bank, "criterion": criterion}
    engine.restore(args.resume, ((part, state[name]) for name, part in parts.items()))
    print(f"continuing after epoch {state['epoch'] + 1} (best so far {state['best_acc']:.2f}%)")
    return state["epoch"] + 1, state["best_acc"]


def measure(args, model, train: ImageSet, test: ImageSet | None, compute) -> dict[str, float]:
    """--test-only: kNN accuracy on a bank recomputed in evaluation mode, last batch included."""
    load_network(args, model, checkpoint.load_dict(args.resume))
    memory = features.extract(model, train, compute).to(compute.device)
    scores = monitor(model, memory, train, test, compute)
    if not scores:
        raise ValueError("--test-only needs test images, and labels for the training images")
    print(f"kNN top-1 {scores['top1']:.2f}% top-5 {scores['top5']:.2f}%")
    return scores


def train_epoch(steps, per_epoch: int, description: str) -> dict[str, float]:
    """Run an epoch's steps under a progress bar; mean loss, last learning rate, images per second."""
    start, loss, seen, lr = time.perf_counter(), Mean(), 0, 0.0
    bar = tqdm(steps, total=per_epoch, desc=description, unit="step", leave=False, disable=None)
    for step in bar:
        loss.update(step.loss, step.batch_size)
        seen, lr = seen + step.batch_size, step.lr
        if step.number % 50 == 0 and not bar.disable:
            bar.set_postfix(loss=f"{loss.value:.3f}")
    mean = loss.value  # waits for the device: the clock is read after it
    return {"loss": mean, "lr": lr, "images_per_s": seen / (time.perf_counter() - start)}


def describe(epoch: int, epochs: int, values: dict[str, float]) -> str:
    line = (
        f"epoch {epoch + 1:4d}/{epochs}  loss {values['loss']:.4f} (chance {values['chance']:.4f})"
    )
    line += f"  lr {values['lr']:.5f}  {values['images_per_s']:.0f} img/s"
    if "knn_top1" in values:
        line += f"  kNN top-1 {values['knn_top1']:.2f}% top-5 {values['knn_top5']:.2f}%"
        line += f" (best {values['best']:.2f}%)"
    return line


def save(state: dict[str, Any], folder: Path, is_best: bool) -> None:
    """The best one first: a run cut off in between repeats its epoch and writes both again."""
    if is_best:
        checkpoint.save(state, folder / BEST)
    checkpoint.save(state, folder / LAST)


def main(args: argparse.Namespace) -> dict[str, float]:
    # 1. What computes, on what data
    check_options(args)
    compute = devices.select(args.gpus, args.precision)
    train, test = build_datasets(
        args.dataset, args.data_dir, image_size=args.image_size, num_workers=args.num_workers
    )
    check_images(args, train)
    print(f"{compute}; {args.dataset}: {len(train)} images, {train.num_classes} classes")

    # 2. Network; with --test-only that is all it takes
    torch.manual_seed(args.rng_seed)
    model = compute.prepare(build_model(args.architecture, args.low_dim, normalize=True))
    if args.test_only:
        return measure(args, model, train, test, compute)

    # 3. Memory bank, optimizer, batches, schedule; where an interrupted run stopped
    bank = memory_bank.MemoryBank(len(train), args.low_dim, args.nce_m, args.rng_seed)
    bank, criterion = bank.to(compute.device), build_criterion(args, compute)
    optimizer = engine.sgd(model.parameters(), args.lr, args.weight_decay)
    ops = instance_ops(args.transform_crop, args.transform_scale)
    augmentation = Augmentation(ops, train.stats)
    batches = Batches(train, augmentation, compute, batch_size=args.batch_size, seed=args.rng_seed)
    total = args.epochs * batches.per_epoch
    schedule = learning_rate(
        args.lr_scheduler, base=args.lr, total=total, steps_per_epoch=batches.per_epoch
    )
    meta, first, best = provenance.record(vars(args), train.digest), 0, 0.0
    if args.resume:
        first, best = resume(args, model, optimizer, bank, criterion, meta)
    folder = options.writable_folder("--model-dir", args.model_dir)

    # 4. Train
    values: dict[str, float] = {}
    with RunLog(args.log_dir) as log:
        log.write("start", first_epoch=first, meta=meta)
        for epoch in range(first, args.epochs):
            first_step, last_step = epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch
            steps = engine.pretrain(
                *(model, bank, criterion, optimizer, batches.epoch(epoch), schedule, compute),
                first_step=first_step,
            )
            values = train_epoch(steps, batches.per_epoch, f"epoch {epoch + 1}")
            engine.require_finite(last_step, model, bank)
            scores = monitor(model, bank.memory, train, test, compute)
            is_best = scores.get("top1", 0.0) >= best
            best = max(best, scores.get("top1", 0.0))
            values |= {"chance": criterion.chance(len(train)), "best": best}
            values |= {f"knn_{name}": score for name, score in scores.items()}
            print(describe(epoch, args.epochs, values), flush=True)
            log.write("epoch", last_step, epoch=epoch, **values)
            state = run_state(model, optimizer, bank, criterion, epoch, scores, best, meta)
            save(state, folder, is_best)
    print(f"last checkpoint: {folder / LAST}" if values else "this run is already finished")
    return values


if __name__ == "__main__":
    options.run(main, build_parser())
