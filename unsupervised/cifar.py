"""Phase 1: learn a metric of images without any label.

By instance discrimination, as published, every image is a class of its own: a network maps each one to the
unit sphere, close to its own row of a memory bank and far from all others (Wu et al. 2018, arXiv 1805.01978).
There are two objectives of later papers: two views of an image against a large batch (SimCLR), and many small
crops of an image that agree (EMP-SSL). Each comes with the defaults of its recipe, which --help names.

The published CIFAR-10 run (WRN-28-2, seven cosine cycles; kNN accuracy 82.12% published):

    python unsupervised/cifar.py --lr-scheduler cosine-with-restart --epochs 1270

The other objectives, with 100 epochs of 2 views and 30 epochs of 20 crops:

    python unsupervised/cifar.py --arch resnet18 --objective two-view
    python unsupervised/cifar.py --arch resnet18 --objective patches-tcr

Your own images, DIR/train/<class>/* and DIR/unlabeled/**:

    python unsupervised/cifar.py --dataset folder --data-dir DIR --model-dir checkpoint/mine

Without any download, about two minutes on two CPU cores:

    python unsupervised/cifar.py --dataset patches --arch wrn-10-1 --epochs 100 \\
        --lr 0.1 --lr-scheduler one-cycle --model-dir checkpoint/patches

Several GPUs share each batch, by `--gpus 0,1,2,3` or torchrun. The same command with `--resume auto` (or
`--resume DIR/ckpt.cifar.pth.tar`) continues an interrupted run, to the same bits.
The script writes `ckpt.cifar.pth.tar` (last epoch) and `ckpt.cifar.best.pth.tar` (best kNN accuracy) to
--model-dir, TensorBoard events and `log.jsonl` to --log-dir.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from datasets import build_datasets
from datasets.transforms import PAD_CROP, Augmentation, instance_ops
from lib.cli import checks, declared, start
from lib.files import provenance
from lib.files.checkpoint import newest_readable
from lib.files.description import METRIC
from lib.files.published import CIFAR_METRIC
from lib.loading.batches import Batches, num_batches
from lib.runtime import devices, distributed, interruption, profiling
from lib.runtime.distributed import print_main
from lib.runtime.option import resume_invariants
from lib.training import pretraining
from lib.training.cuda_graph import step_graph
from lib.training.log import main_log
from lib.training.optimizer import learning_rate, sgd
from lib.training.pretraining import Settings
from lib.training.progress import EpochProgress, TimeLeft, step_arithmetic
from lib.training.settings import PATCHES_TCR, CifarPretraining
from lib.training.state import Checkpoints, TrainState, describe
from lib.training.step import train_steps
from models import build_model

LAST, BEST = "ckpt.cifar.pth.tar", "ckpt.cifar.best.pth.tar"
RESUME_INVARIANTS = resume_invariants(CifarPretraining)


def build_parser() -> declared.Parser:
    return declared.parser(__doc__, CifarPretraining)


def check_options(args: argparse.Namespace) -> None:
    parser = build_parser()
    checks.check_pretraining(args, parser)
    if args.test_only and not args.resume:
        raise ValueError("--test-only measures a checkpoint: name it with --resume FILE")
    if args.test_only:
        checks.warn_unused(args, parser, "with --test-only", *checks.ONLY_TRAINING, "nce_t")
    if args.objective == PATCHES_TCR:
        checks.warn_unused(args, parser, f"with --objective {PATCHES_TCR}", "transform_crop")
    elif args.transform_crop == PAD_CROP:
        checks.warn_unused(args, parser, f"with {PAD_CROP}", "transform_scale")


def main(args: argparse.Namespace) -> dict[str, float]:
    # 1. Data
    check_options(args)
    settings = declared.values(args, Settings)
    device = devices.select(args.gpus, args.precision, deterministic=args.deterministic)
    workers = distributed.own_workers(args.num_workers)
    with distributed.main_first():  # rank 0 may have to download them
        train, test = build_datasets(
            args.dataset, args.data_dir, image_size=args.image_size, num_workers=workers
        )
    temperature = pretraining.temperature(settings)
    monitor = pretraining.Monitor(train, test, device, temperature, workers)
    print_main(f"{device}; {args.dataset}: {len(train)} images, {train.num_classes} classes")

    # 2. Network; --test-only measures it and ends here
    folder, log_folder = Path(args.model_dir), Path(args.log_dir)
    source = newest_readable(folder, (LAST, BEST)) if args.resume == "auto" else args.resume
    torch.manual_seed(args.rng_seed)
    dim = pretraining.dimensions(settings)
    described = describe(
        METRIC, args.architecture, train, dim, imagenet=False, temperature=temperature
    )
    model = device.prepare(build_model(args.architecture, **described.arguments))
    if args.test_only:
        return monitor.measure_file(source, model)

    # 3. Objective and optimizer, or the run to resume
    objective = pretraining.build_objective(settings, len(train), device, model.out_features)
    optimizer = sgd(
        [*model.parameters(), *objective.parameters()],
        args.lr,
        args.weight_decay,
        kind=args.optimizer,
        momentum=args.momentum,
        nesterov=args.momentum > 0,
    )
    meta = provenance.record(vars(args), train.digest)
    learning = model, objective, optimizer
    state = TrainState(*learning, described, CIFAR_METRIC, meta, RESUME_INVARIANTS, accuracy=0.0)
    per_epoch = num_batches(num_batches(len(train), args.batch_size), args.iter_size)
    if source:
        pretraining.resume(state, source, args.epochs, per_epoch)
    files = Checkpoints(folder, LAST, BEST)
    start.open_run_folder("--model-dir", folder, LAST, is_new=not source)
    if source:
        files.complete(state, source)

    # 4. Train; test and save after each epoch
    crop = args.transform_crop, args.transform_scale
    ops = pretraining.augmentation(args.objective, instance_ops(*crop), *crop)
    batches = Batches(
        train,
        [Augmentation(ops, train.stats)] * objective.views,
        device,
        batch_size=args.batch_size,
        seed=args.rng_seed,
        num_workers=workers,
        loader=args.loader,
    )
    lengths = args.epochs * per_epoch, per_epoch
    schedule = learning_rate(args.lr_scheduler, args.lr, *lengths, by_epoch=True)
    shape = (3, train.image_size, train.image_size)
    arithmetic = step_arithmetic(model, objective, shape, device)
    network, values = profiling.prepare_training(model, args.compile), {}
    graph = step_graph(args.cuda_graph, batches, args.compile)
    left = TimeLeft(state.step, args.epochs * per_epoch)
    with (
        main_log(log_folder) as write,
        interruption.watch(args.stop_after) as stop,
        profiling.traced(args.profile, log_folder, device) as after_step,
    ):
        write("start", first_epoch=state.epoch, first_step=state.step, meta=meta)
        while state.epoch < args.epochs:
            done = state.step - state.epoch * per_epoch
            steps = train_steps(
                network,
                objective,
                optimizer,
                batches.epoch(state.epoch, done * args.iter_size),
                schedule,
                device,
                first_step=state.step,
                iter_size=args.iter_size,
                graph=graph,
            )
            with EpochProgress(state, per_epoch, batches, arithmetic) as progress:
                for step in steps:
                    state.count(step)
                    progress.count(step)
                    after_step()
                    if stop.requested():
                        break
                measured = progress.finish()
            state.require_finite()
            if stop.reached:
                files.save(state)
                write("stop", state.step, reason=stop.reason)
                how = start.resume_command(files.last_file)
                print_main(f"stopped by {stop.reason} after step {state.step}; to continue: {how}")
                break
            measured["lr"] = schedule(state.step - 1)
            scores = monitor(model, objective.bank_rows)
            is_best = state.finish_epoch(scores.get("top1", 0.0))
            values = pretraining.epoch_values(state, measured, scores)
            print_main(pretraining.describe(state.epoch, args.epochs, values, left(state.step)))
            write("epoch", state.step, epoch=state.epoch - 1, **values)
            files.save(state, is_best=is_best, end_of_epoch=True)
    stop.exit()
    if state.epoch == args.epochs:
        print_main(
            f"last checkpoint: {files.last_file}" if values else "this run is already finished"
        )
    return values


if __name__ == "__main__":
    start.run(main, build_parser())
