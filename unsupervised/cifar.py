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

Several GPUs share each batch, by `--gpus 0,1,2,3` or torchrun. A run that was interrupted goes on with
the same command plus `--resume auto` (or `--resume DIR/ckpt.cifar.pth.tar`), to the same bits.
Writes `ckpt.cifar.pth.tar` (last epoch) and `ckpt.cifar.best.pth.tar` (best kNN accuracy) to
--model-dir, TensorBoard events and `log.jsonl` to --log-dir.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets import build_datasets
from datasets.transforms import instance_ops
from lib.cli import options
from lib.files import checkpoint, provenance
from lib.runtime import distributed
from lib.runtime.distributed import print_main
from lib.training import pretraining
from lib.training.pretraining import Files, Images, Settings

LAST, BEST = "ckpt.cifar.pth.tar", "ckpt.cifar.best.pth.tar"
RESUME_INVARIANTS = (*pretraining.RESUME_INVARIANTS, "transform_scale", "transform_crop")


def build_parser() -> argparse.ArgumentParser:
    parser = options.pretraining_parser(__doc__)
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
    return parser


def check_options(args: argparse.Namespace) -> None:
    parser = build_parser()
    options.check_pretraining(args, parser)
    if args.test_only and not args.resume:
        raise ValueError("--test-only measures a checkpoint: name it with --resume FILE")
    if args.test_only:
        options.warn_unused(args, parser, "with --test-only", *options.ONLY_TRAINING)
    if args.transform_crop == "PadCrop":
        options.warn_unused(args, parser, "with PadCrop", "transform_scale")


def main(args: argparse.Namespace) -> dict[str, float]:
    # 1. What computes, on what images
    check_options(args)
    device = options.select_training_device(args)
    workers = distributed.own_workers(args.num_workers)
    with distributed.main_first():  # it may have to download them
        train, test = build_datasets(
            *(args.dataset, args.data_dir), image_size=args.image_size, num_workers=workers
        )
    pretraining.check_images(len(train), args.nce_k)
    ops = instance_ops(args.transform_crop, args.transform_scale)
    images = Images(train, test, ops, workers, loader=args.loader)
    settings = options.values(args, Settings)
    print_main(f"{device}; {args.dataset}: {len(train)} images, {train.num_classes} classes")

    # 2. Network; with --test-only that is all it takes
    folder = Path(args.model_dir)
    names, needed = (LAST, BEST), args.test_only
    source = pretraining.find_checkpoint(args.resume, folder, names, needed=needed)
    model = pretraining.build_network(settings, device)
    if args.test_only:
        pretraining.load_network(model, checkpoint.load_dict(source), source)
        return pretraining.measure(model, images, device)

    # 3. Memory bank, loss, optimizer; where an interrupted run stopped
    run = pretraining.start(model, settings, len(train), device)
    meta = provenance.record(vars(args), train.digest)
    files = Files(folder, LAST, BEST, Path(args.log_dir), meta)
    if source:
        per_epoch = settings.steps_per_epoch(len(train))
        pretraining.resume(run, source, files, per_epoch, RESUME_INVARIANTS)
    options.open_run_folder("--model-dir", folder, LAST, is_new=not source)

    # 4. Train
    command = options.resume_command
    return pretraining.train(
        *(run, settings, images, files, device),
        stop_after=args.stop_after,
        profile=args.profile,
        compile_mode=args.compile,
        command=command,
    )


if __name__ == "__main__":
    options.run(main, build_parser())
