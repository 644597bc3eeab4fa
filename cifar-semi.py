"""Phase 3: train a classifier on a few labeled and the most confident pseudo-labeled images.

The published CIFAR-10 run at 250 labels, from the metric of phase 1 and the pseudo-labels of phase 2
(test accuracy 71.26% published):

    python cifar-semi.py --num-labeled 250 --resume checkpoint/instance_cifar10/ckpt.cifar.pth.tar \\
        --pseudo-file checkpoint/pseudos/instance_nc_wrn-28-2/250.pth.tar --pseudo-ratio 0.2

The supervised baseline on the same labeled images, from the metric or (without --resume) from scratch:

    python cifar-semi.py --num-labeled 250 --resume checkpoint/instance_cifar10/ckpt.cifar.pth.tar

Several GPUs, or processes on a CPU: `--gpus 0,1,2,3` or `--gpus cpu,cpu` (BatchNorm alone sees it: each
process normalizes by its own rows); several machines:
`torchrun --nnodes 2 --nproc-per-node 4 ... cifar-semi.py ...`.

Measure a trained classifier: `--eval --resume checkpoint/cifar10-semi/exp/ckpt.pth.tar`. Continue an
interrupted run: the same command with --resume naming that run's own ckpt.pth.tar; a command that can be
repeated until it is done has `--pretrained METRIC --resume auto`.
Writes `ckpt.pth.tar` (last step) and `ckpt.best.pth.tar` (best test accuracy, as published: a choice
made on the test images, so the last accuracy is the one to report) to --model-root/--exp-name,
TensorBoard events and `log.jsonl` to --log-root/--exp-name.
"""

import argparse
from pathlib import Path

from datasets import build_datasets
from datasets.transforms import finetune_ops
from lib.cli import options
from lib.files import provenance
from lib.runtime import distributed
from lib.runtime.distributed import print_main
from lib.training import finetuning
from lib.training.finetuning import RESUME_INVARIANTS, Files, Settings

__all__ = ["RESUME_INVARIANTS", "build_parser", "main"]


def build_parser() -> argparse.ArgumentParser:
    return options.finetuning_parser(
        __doc__, resumes="this run's own checkpoint to continue, or weights as --pretrained"
    )


def main(args: argparse.Namespace) -> dict[str, float]:
    # 1. What is asked for, on what data; a bad pseudo-label file ends here
    options.check_finetuning(args, build_parser())
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
        )
    source = args.pseudo_file or args.pseudo_dir

    # 2. The network; with --eval that is all it takes
    built, pretrained = finetuning.starting_weights(
        args.architecture, resume, args.pretrained, evaluating=args.eval
    )
    model = finetuning.build_classifier(settings, train.num_classes, device, weights=built)
    if args.eval:
        return finetuning.evaluate_file(resume or args.pretrained, model, test, device, settings)

    # 3. What to train on, from which weights or where this run stopped
    examples = finetuning.choose_training_set(train, parts, settings, source=source)
    meta = provenance.record(vars(args), train.digest)
    run = finetuning.Run(settings, device, model, train, test, examples, meta)
    finetuning.begin(run, resume, pretrained)
    print_main(f"{device}; {args.dataset}: {examples} of {len(train)}, {train.num_classes} classes")

    # 4. Train, test, save
    is_new = not run.progress.step
    options.open_run_folder("--model-root", folder, finetuning.LAST, is_new=is_new)
    command = options.resume_command(folder / finetuning.LAST)
    files = Files(folder, Path(args.log_root) / args.exp_name, command)
    return finetuning.train(run, files, finetune_ops())


if __name__ == "__main__":
    options.run(main, build_parser())
