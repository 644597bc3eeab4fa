"""Phase 3 for ImageNet-sized folders: a classifier from a few labeled and the most confident other images.

The published run with 1% of the labels (13,000; the pseudo-labels of phase 2 in ten chunks), on four GPUs:

    python imagenet-semi.py --data-dir DIR --arch resnet50 --num-labeled 13000 \\
        --pretrained checkpoint/pretrain_models/lemniscate_resnet50.pth.tar \\
        --pseudo-dir checkpoint/pseudos_imagenet/instance_imagenet_nc_resnet50/num_labeled_13000 \\
        --pseudo-ratio 0.1

DIR holds train/<class>/*, val/<class>/* and, where there are images without labels, unlabeled/**; its
images are read while training, never all at once. `scripts/finetune_imagenet.sh` has the settings for 1, 2
and 4%. Without --pseudo-dir or --pseudo-file the labeled images are all there is: the supervised baseline.

--batch-size is the total over all GPUs, whose number changes the results through BatchNorm alone: each
process normalizes by its own rows. `--gpus 0,1`, `--gpus 0`, or
`torchrun --nnodes 2 --nproc-per-node 4 ... imagenet-semi.py ...` on several machines. On a CPU, without any
data: `--gpus cpu,cpu --dataset patches --image-size 64 -b 64`. How fast the GPUs are: `--dummy`.

`--pretrained` takes weights alone, of phase 1 or of a classifier; `--resume` continues a run of this script:
weights, optimizer and step. Repeat a command with `--resume auto` until it is done.
Measure a classifier: `--eval --resume checkpoint/imagenet/exp/ckpt.pth.tar`.
Writes `ckpt.pth.tar` (last step) and `ckpt.best.pth.tar` (best validation accuracy) to
--model-root/--exp-name, TensorBoard events and `log.jsonl` to --log-root/--exp-name.
"""

import argparse
from pathlib import Path

from datasets import build_datasets
from datasets.transforms import RandomHorizontalFlip, RandomResizedCrop
from lib.cli import options
from lib.files import provenance
from lib.runtime import distributed
from lib.runtime.distributed import print_main
from lib.training import finetuning
from lib.training.finetuning import RESUME_INVARIANTS, Files, Settings
from lib.training.schedule import IMAGENET_FINETUNE_DROPS
from models import IMAGENET_ARCHITECTURES

__all__ = ["RESUME_INVARIANTS", "build_parser", "main"]

SMALLEST_CROP = 0.08  # share of the area, as everyone trains ImageNet classifiers


def build_parser() -> argparse.ArgumentParser:
    parser = options.finetuning_parser(
        __doc__,
        resumes="this run's own checkpoint to continue",
        architectures=", ".join(IMAGENET_ARCHITECTURES),
    )
    parser.set_defaults(
        dataset="folder",
        data_dir="",
        image_size=224,
        num_workers=32,
        architecture="resnet18",
        lr_scheduler="multi-step",
        batch_size=256,
        weight_decay=0.0,
        max_iters=50000,
        num_labeled=13000,
        pseudo_ratio=0.1,
        gpus="0,1,2,3",
        print_freq=10,
        model_root="./checkpoint/imagenet",
        log_root="./tensorboard/imagenet",
    )
    options.add_dummy(parser)
    return parser


def check_options(args: argparse.Namespace) -> None:
    options.check_finetuning(args, build_parser())
    options.require_data_dir(args)
    options.require_imagenet_network(args, "cifar-semi.py", external_too=True)


def main(args: argparse.Namespace) -> dict[str, float]:
    # 1. What is asked for, on what data; a bad pseudo-label file ends here
    check_options(args)
    options.keep_dummy_apart(args, build_parser(), "model_root", "log_root")
    settings = options.values(args, Settings)
    folder = Path(args.model_root) / args.exp_name
    device = options.select_training_device(args)
    resume = finetuning.find_start(args.resume, folder)
    parts = finetuning.read_pseudo_labels(args.pseudo_file, args.pseudo_dir)
    with distributed.main_first():  # it may have to download them
        train, test = build_datasets(
            *(args.dataset, args.data_dir),
            image_size=args.image_size,
            num_workers=distributed.own_workers(args.num_workers),
            in_memory=False,
        )
    source = args.pseudo_file or args.pseudo_dir

    # 2. The network; with --eval that is all it takes
    built, pretrained = finetuning.starting_weights(
        args.architecture, resume, args.pretrained, evaluating=args.eval
    )
    model = finetuning.build_classifier(
        settings, train.num_classes, device, imagenet=True, weights=built
    )
    if args.eval:
        return finetuning.evaluate_file(resume or args.pretrained, model, test, device, settings)

    # 3. What to train on, from which weights or where this run stopped
    examples = finetuning.choose_training_set(train, parts, settings, source=source)
    meta = provenance.record(vars(args), train.digest)
    run = finetuning.Run(settings, device, model, train, test, examples, meta)
    finetuning.begin(run, resume, pretrained, own_only=True)
    print_main(f"{device}; {args.dataset}: {examples} of {len(train)}, {train.num_classes} classes")

    # 4. Train, test, save
    is_new = not run.progress.step
    options.open_run_folder("--model-root", folder, finetuning.LAST, is_new=is_new)
    command = options.resume_command(folder / finetuning.LAST)
    files = Files(folder, Path(args.log_root) / args.exp_name, command)
    ops = [RandomResizedCrop(SMALLEST_CROP), RandomHorizontalFlip()]
    return finetuning.train(run, files, ops, drops=IMAGENET_FINETUNE_DROPS)


if __name__ == "__main__":
    options.run(main, build_parser())
