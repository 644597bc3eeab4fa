"""Phase 1 for ImageNet-sized folders: a metric without any label, images read from files while training.

The published runs (nearest-neighbor accuracy 41.0% with resnet18, 46.8% with resnet50), on four GPUs:

    python unsupervised/imagenet.py --data-dir DIR --arch resnet50 --gpus 0,1,2,3 -j 32

DIR holds train/<class>/*, val/<class>/* and, where there are images without labels, unlabeled/**; labels
are only used to measure. --batch-size is the total over all GPUs. On several machines, on each of them:

    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        unsupervised/imagenet.py --data-dir DIR --arch resnet50

On a CPU, without any data: `--dataset patches --image-size 64 -b 64 --nce-k 512 --epochs 1`. How fast the
GPUs are: `--dummy`.

--auto-resume (or `--resume auto`) continues the newest checkpoint of --model-dir, to the same bits as if
the run had never stopped; repeat the command until it is done. --pretrained starts from the weights of
another network. Two ways to measure the checkpoint --resume:

    --evaluate     on the memory bank stored in it: one pass over the validation images
    --test-only    on a bank computed anew, in evaluation mode, from all training images

The stored rows are means over the last epochs of embeddings of augmented images, as the run itself is
measured; the new ones belong to this network and the images as they are.
Writes `ckpt.pth.tar` (last), `model_best.pth.tar` (best kNN accuracy) and, every --save-freq epochs, a copy
`ckpt-{epochs done}.pth.tar` to --model-dir, TensorBoard events and `log.jsonl` to --log-dir.
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
from lib.training.pretraining import RESUME_INVARIANTS, Files, Images, Settings
from models import IMAGENET_ARCHITECTURES

__all__ = ["RESUME_INVARIANTS", "build_parser", "main"]

LAST, BEST, NUMBERED = "ckpt.pth.tar", "model_best.pth.tar", "ckpt-{epoch}.pth.tar"


def build_parser() -> argparse.ArgumentParser:
    known = ", ".join(IMAGENET_ARCHITECTURES)
    parser = options.pretraining_parser(__doc__, architectures=known)
    parser.set_defaults(
        dataset="folder",
        data_dir="",
        image_size=224,
        num_workers=4,
        architecture="resnet18",
        lr_scheduler="multi-step",
        batch_size=256,
        weight_decay=1e-4,
        epochs=200,
        nce_k=4096,
        nce_t=0.07,
        model_dir="./checkpoint/instance_imagenet",
        log_dir="./tensorboard/instance_imagenet",
    )
    group = parser.add_argument_group("ImageNet")
    group.add_argument(
        *("-vb", "--val-batch-size"), type=int, default=128, help="images measured at a time, total"
    )
    group.add_argument(
        *("-p", "--print-freq"), type=int, default=10, help="steps between lines; 0: none"
    )
    group.add_argument(
        "--save-freq", type=int, default=0, help="epochs between copies that stay; 0: none"
    )
    group.add_argument(
        "--start-epoch", type=int, default=0, help="number of the first epoch, from 0, of a new run"
    )
    group.add_argument("--auto-resume", action="store_true", help="the same as --resume auto")
    group.add_argument(
        *("-e", "--evaluate"),
        action="store_true",
        help="measure the nearest-neighbor accuracies of --resume on the memory bank stored in it",
    )
    group.add_argument(
        "--pretrained",
        default="",
        metavar="FILE",
        help="weights to start from; of phase 1, the last layer too where that has our shape",
    )
    options.add_dummy(parser)
    return parser


def check_options(args: argparse.Namespace) -> None:
    parser = build_parser()
    options.check_pretraining(args, parser)
    options.require_positive(args, "val_batch_size")
    options.require_not_negative(args, "print_freq", "save_freq", "start_epoch")
    options.require_data_dir(args)
    options.require_imagenet_network(args, "unsupervised/cifar.py")
    if args.auto_resume and args.resume not in ("", "auto"):
        raise ValueError("--auto-resume and --resume FILE name two checkpoints; give one")
    if args.test_only and args.evaluate:
        raise ValueError("--evaluate and --test-only measure on different banks; give one")
    if (args.test_only or args.evaluate) and not (args.resume or args.auto_resume):
        raise ValueError(
            "--evaluate and --test-only measure a checkpoint: name it with --resume FILE"
        )
    if args.start_epoch >= args.epochs:
        raise ValueError(f"--start-epoch {args.start_epoch}: the last epoch is {args.epochs - 1}")
    if args.test_only or args.evaluate:
        unused = (*options.ONLY_TRAINING, "pretrained")
        options.warn_unused(args, parser, "where a checkpoint is measured", *unused)


def load_measured(args, model, train, source: str):
    """The checkpoint to measure into the network; its memory bank where --evaluate asks for that."""
    pretraining.load_network(model, checkpoint.load_dict(source), source)
    if not args.evaluate:
        return None
    return pretraining.stored_bank(source, len(train), args.low_dim, train.digest)


def main(args: argparse.Namespace) -> dict[str, float]:
    # 1. What computes, on what images
    check_options(args)
    options.keep_dummy_apart(args, build_parser(), "model_dir", "log_dir")
    device = options.select_training_device(args)
    workers = distributed.own_workers(args.num_workers)
    with distributed.main_first():  # it may have to download them
        train, test = build_datasets(
            *(args.dataset, args.data_dir),
            image_size=args.image_size,
            num_workers=workers,
            in_memory=False,
        )
    pretraining.check_images(len(train), args.nce_k)
    ops = instance_ops(gray_first=True)
    images = Images(train, test, ops, workers, args.val_batch_size, args.loader)
    settings, folder = options.values(args, Settings), Path(args.model_dir)
    print_main(f"{device}; {args.dataset}: {len(train)} images, {train.num_classes} classes")

    # 2. Network; to measure one, that is all it takes
    names = (LAST, BEST, *(file.name for file in folder.glob(NUMBERED.format(epoch="*"))))
    wanted, needed = "auto" if args.auto_resume else args.resume, args.evaluate or args.test_only
    source = pretraining.find_checkpoint(wanted, folder, names, needed=needed)
    model = pretraining.build_network(settings, device, imagenet=True)
    if needed:
        return pretraining.measure(model, images, device, load_measured(args, model, train, source))

    # 3. Memory bank, loss, optimizer; weights of another network, or where this run stopped
    run = pretraining.start(model, settings, len(train), device, imagenet=True)
    meta, log = provenance.record(vars(args), train.digest), Path(args.log_dir)
    copies = {"numbered": NUMBERED, "save_freq": args.save_freq}
    files = Files(folder, LAST, BEST, log, meta, imagenet=True, **copies)
    per_epoch = settings.steps_per_epoch(len(train))
    if source:
        options.warn_unused(args, build_parser(), "with --resume", "pretrained", "start_epoch")
        pretraining.resume(run, source, files, per_epoch, RESUME_INVARIANTS)
    else:
        run.epoch, run.step = args.start_epoch, args.start_epoch * per_epoch
        if args.pretrained:
            pretraining.load_backbone(model, args.pretrained)
    options.open_run_folder("--model-dir", folder, LAST, is_new=not source)

    # 4. Train
    return pretraining.train(
        *(run, settings, images, files, device),
        stop_after=args.stop_after,
        print_freq=args.print_freq,
        profile=args.profile,
        compile_mode=args.compile,
        command=options.resume_command,
    )


if __name__ == "__main__":
    options.run(main, build_parser())
