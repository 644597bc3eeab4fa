"""Phase 1 for ImageNet-sized folders: learn a metric without labels from images that stay in their files.

The published runs (nearest-neighbor accuracy 41.0% with resnet18, 46.8% with resnet50), on all visible GPUs
(`--gpus 0,1` takes two of them):

    python unsupervised/imagenet.py --data-dir DIR --arch resnet50 -j 32

DIR holds train/<class>/*, val/<class>/* and, if there are images without labels, unlabeled/**. Labels are
used to measure only. --batch-size is the total over all GPUs. On each of several machines:

    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        unsupervised/imagenet.py --data-dir DIR --arch resnet50

On a CPU, without any data: `--dataset patches --image-size 64 -b 64 --nce-k 512 --epochs 1`. The speed of
the GPUs: `--dummy`.

--auto-resume (or `--resume auto`) continues the newest checkpoint of --model-dir, to the same bits as if
the run had never stopped; such a command can be repeated until the run is done. --pretrained starts from
the weights of another network. Two options measure the checkpoint that --resume names:

    --evaluate     on the memory bank stored in it: one pass over the validation images
    --test-only    on a bank computed anew, in evaluation mode, from all training images

The stored rows are moving averages over the last epochs of embeddings of augmented images, which the run
itself is measured on; the new ones are embeddings by the final network of images that are not augmented.
The script writes `ckpt.pth.tar` (last), `model_best.pth.tar` (best kNN accuracy) and, every --save-freq
epochs, a copy `ckpt-{epochs done}.pth.tar` to --model-dir, TensorBoard events and `log.jsonl` to --log-dir.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from datasets import build_datasets
from datasets.transforms import Augmentation, instance_ops
from lib.cli import checks, declared, start
from lib.files import checkpoint, provenance, published
from lib.files.description import METRIC
from lib.files.published import IMAGENET_METRIC
from lib.loading.batches import Batches, num_batches
from lib.runtime import devices, distributed, interruption, profiling
from lib.runtime.distributed import print_main
from lib.runtime.option import resume_invariants
from lib.training import pretraining
from lib.training.cuda_graph import step_graph
from lib.training.log import main_log
from lib.training.optimizer import IMAGENET_INSTANCE_DROPS, learning_rate, sgd
from lib.training.pretraining import Settings
from lib.training.progress import EpochProgress, TimeLeft, step_arithmetic
from lib.training.settings import ImageNetPretraining
from lib.training.state import Checkpoints, TrainState, describe, load_network
from lib.training.step import train_steps
from models import build_model

LAST, BEST, NUMBERED = "ckpt.pth.tar", "model_best.pth.tar", "ckpt-{epoch}.pth.tar"
RESUME_INVARIANTS = resume_invariants(ImageNetPretraining)


def build_parser() -> declared.Parser:
    parser = declared.parser(__doc__, ImageNetPretraining)
    declared.add_dummy(parser)
    return parser


def check_options(args: argparse.Namespace) -> None:
    parser = build_parser()
    checks.check_pretraining(args, parser)
    checks.check_imagenet(args, "unsupervised/cifar.py")
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
        unused = (*checks.ONLY_TRAINING, "pretrained", "nce_t")
        checks.warn_unused(args, parser, "where a checkpoint is measured", *unused)


def main(args: argparse.Namespace) -> dict[str, float]:
    # 1. Data
    check_options(args)
    checks.keep_dummy_apart(args, build_parser(), "model_dir", "log_dir")
    settings = declared.values(args, Settings)
    device = devices.select(args.gpus, args.precision, deterministic=args.deterministic)
    workers = distributed.own_workers(args.num_workers)
    with distributed.main_first():  # rank 0 may have to download them
        train, test = build_datasets(
            args.dataset,
            args.data_dir,
            image_size=args.image_size,
            num_workers=workers,
            in_memory=False,
        )
    temperature = pretraining.temperature(settings)
    monitor = pretraining.Monitor(train, test, device, temperature, workers, args.val_batch_size)
    print_main(f"{device}; {args.dataset}: {len(train)} images, {train.num_classes} classes")

    # 2. Network; --evaluate and --test-only measure it and end here
    folder, log_folder = Path(args.model_dir), Path(args.log_dir)
    names = (LAST, BEST, *(file.name for file in folder.glob(NUMBERED.format(epoch="*"))))
    automatic = args.auto_resume or args.resume == "auto"
    source = checkpoint.newest_readable(folder, names) if automatic else args.resume
    torch.manual_seed(args.rng_seed)
    dim = pretraining.dimensions(settings)
    described = describe(
        METRIC, args.architecture, train, dim, imagenet=True, temperature=temperature
    )
    model = device.prepare(build_model(args.architecture, **described.arguments))
    if args.evaluate or args.test_only:
        return monitor.measure_file(source, model, stored=args.evaluate)

    # 3. Objective and optimizer; initial weights, or the run to resume
    objective = pretraining.build_objective(settings, len(train), device, model.out_features)
    optimizer = sgd(
        [*model.parameters(), *objective.parameters()],
        args.lr,
        args.weight_decay,
        kind=args.optimizer,
        momentum=args.momentum,
        nesterov=False,
    )
    meta = provenance.record(vars(args), train.digest)
    learning = model, objective, optimizer
    state = TrainState(*learning, described, IMAGENET_METRIC, meta, RESUME_INVARIANTS, accuracy=0.0)
    per_epoch = num_batches(num_batches(len(train), args.batch_size), args.iter_size)
    if source:
        checks.warn_unused(args, build_parser(), "with --resume", "pretrained", "start_epoch")
        pretraining.resume(state, source, args.epochs, per_epoch)
    else:
        state.epoch, state.step = args.start_epoch, args.start_epoch * per_epoch
        if args.pretrained:
            given = args.pretrained
            load_network(model, published.load(given), given, start_of=described)
    files = Checkpoints(folder, LAST, BEST, NUMBERED, args.save_freq)
    start.open_run_folder("--model-dir", folder, LAST, is_new=not source)
    if source:
        files.complete(state, source)

    # 4. Train; test and save after each epoch
    ops = pretraining.augmentation(args.objective, instance_ops(gray_first=True))
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
    schedule = learning_rate(
        args.lr_scheduler, args.lr, *lengths, IMAGENET_INSTANCE_DROPS, by_epoch=True
    )
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
            with EpochProgress(state, per_epoch, batches, arithmetic, args.print_freq) as progress:
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
            files.save(state)  # saves first: testing may outlast the grace period of a SIGTERM
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
