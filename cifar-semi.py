"""Phase 3: train a classifier on a few labeled and the most confident pseudo-labeled images.

The published CIFAR-10 run at 250 labels, from the metric of phase 1 and the pseudo-labels of phase 2
(test accuracy 71.26% published):

    python cifar-semi.py --num-labeled 250 --resume checkpoint/instance_cifar10/ckpt.cifar.pth.tar \\
        --pseudo-file checkpoint/pseudos/instance_nc_wrn-28-2/250.pth.tar --pseudo-ratio 0.2

The supervised baseline on the same labeled images, from the metric or (without --resume) from scratch:

    python cifar-semi.py --num-labeled 250 --resume checkpoint/instance_cifar10/ckpt.cifar.pth.tar

Beside the published finetuning, all pseudo-labeled images can be trained on in strongly augmented and mixed
views, toward a target that goes over from the graph's probabilities to the network's own:

    python cifar-semi.py --num-labeled 250 --pretrained checkpoint/instance_cifar10/ckpt.cifar.pth.tar \\
        --pseudo-file checkpoint/pseudos/instance_nc_wrn-28-2/250.pth.tar --consistency

Its options have defaults of their own then, which --help names.

Several GPUs, or processes on a CPU: `--gpus 0,1,2,3` or `--gpus cpu,cpu`. Results change through BatchNorm
alone: each process normalizes by its own rows. Several machines:
`torchrun --nnodes 2 --nproc-per-node 4 ... cifar-semi.py ...`.

Measure a trained classifier: `--eval --resume checkpoint/cifar10-semi/exp/ckpt.pth.tar`. Continue an
interrupted run: the same command with --resume naming that run's own ckpt.pth.tar. A command with
`--pretrained METRIC --resume auto` can be repeated until the run is done.

The script writes `ckpt.pth.tar` (last step) and `ckpt.best.pth.tar` (best test accuracy, as published) to
--model-root/--exp-name, TensorBoard events and `log.jsonl` to --log-root/--exp-name. The best accuracy is
chosen on the test images, so the last one is the one to report.
"""

import argparse
from pathlib import Path

from datasets import build_datasets
from datasets.transforms import Augmentation, finetune_ops
from lib.cli import checks, declared, start
from lib.files import provenance
from lib.files.checkpoint import newest_readable
from lib.files.description import CLASSIFIER
from lib.files.published import CLASSIFIERS
from lib.loading.batches import num_batches
from lib.runtime import devices, distributed, interruption, profiling
from lib.runtime.distributed import print_main
from lib.runtime.option import resume_invariants
from lib.training import finetuning
from lib.training.cuda_graph import step_graph
from lib.training.ema import MovingAverage
from lib.training.finetuning import BEST, LAST, Settings, Tester
from lib.training.log import main_log
from lib.training.optimizer import learning_rate, sgd, trainable
from lib.training.progress import RunProgress, step_arithmetic
from lib.training.state import Checkpoints, TrainState, describe
from lib.training.step import train_steps

RESUME_INVARIANTS = resume_invariants(Settings)


def build_parser() -> declared.Parser:
    return declared.parser(__doc__, Settings)


def main(args: argparse.Namespace) -> dict[str, float]:
    # 1. Data; bad pseudo-label files are refused here
    checks.check_finetuning(args, build_parser())
    settings = declared.values(args, Settings)
    device = devices.select(args.gpus, args.precision, deterministic=args.deterministic)
    folder, log_folder = (Path(root) / args.exp_name for root in (args.model_root, args.log_root))
    resume = newest_readable(folder, (LAST, BEST)) if args.resume == "auto" else args.resume
    parts = finetuning.read_pseudo_labels(args.pseudo_file, args.pseudo_dir)
    workers = distributed.own_workers(args.num_workers)
    with distributed.main_first():  # rank 0 may have to download them
        train, test = build_datasets(
            args.dataset, args.data_dir, image_size=args.image_size, num_workers=workers
        )

    # 2. Network; --eval measures it and ends here
    classes, gray = train.num_classes, args.input_gray
    described = describe(CLASSIFIER, args.architecture, train, classes, imagenet=False, gray=gray)
    described = finetuning.described_as_before(described, settings, resume)
    model = finetuning.build_classifier(settings, described, resume, device)
    shown = Augmentation((), described.stats, luma=described.luma)
    tester = Tester(test, device, shown, args.num_workers)
    if args.eval:
        return tester.measure_file(resume or args.pretrained, model)

    # 3. Training images, objective, optimizer; initial weights, or the run to resume
    source = args.pseudo_file or args.pseudo_dir
    chosen = finetuning.choose_training_set(train, parts, settings, source=source)
    objective = finetuning.build_objective(chosen, settings, device)
    parameters = trainable(model, head_only=args.finetune)
    optimizer = sgd(parameters, args.lr, args.weight_decay, decay_all=not args.consistency)
    meta, facts = provenance.record(vars(args), train.digest), {"examples": chosen.digest}
    learning, average = (model, objective, optimizer), MovingAverage(model) if args.ema else None
    state = TrainState(*learning, described, CLASSIFIERS, meta, RESUME_INVARIANTS, facts, average)
    finetuning.begin(state, settings, resume)
    print_main(f"{device}; {args.dataset}: {chosen} of {len(train)}, {train.num_classes} classes")
    files, is_new = Checkpoints(folder, LAST, BEST), not state.step
    start.open_run_folder("--model-root", folder, LAST, is_new=is_new)
    if not is_new:
        files.complete(state, resume)
    elif args.head_init == "class-means":
        finetuning.start_from_class_means(model, train, chosen, device, shown, workers)

    # 4. Train; test and save every --eval-freq steps
    batches = finetuning.build_streams(train, finetune_ops(), described, device, settings, workers)
    per_epoch = num_batches(len(chosen.indexes), args.batch_size * args.iter_size)
    lengths = args.max_iters, per_epoch
    schedule = learning_rate(args.lr_scheduler, args.lr, *lengths, warmup=args.warmup)
    shape = (1 if args.input_gray else 3, train.image_size, train.image_size)
    arithmetic = step_arithmetic(model, objective, shape, device)
    network = profiling.prepare_training(model, args.compile)
    graph = step_graph(args.cuda_graph, batches, args.compile)
    first, end = state.step * args.iter_size, args.max_iters * args.iter_size
    steps = train_steps(
        network,
        objective,
        optimizer,
        finetuning.run_batches(batches, chosen, settings, first, end),
        schedule,
        device,
        first_step=state.step,
        iter_size=args.iter_size,
        graph=graph,
        full_steps=True,
        head_only=args.finetune,
    )
    with (
        main_log(log_folder) as write,
        interruption.watch(args.stop_after) as stop,
        profiling.traced(args.profile, log_folder, device) as after_step,
        RunProgress(state, args.max_iters, batches, arithmetic, write) as progress,
    ):
        write("start", first_step=state.step, meta=meta)
        for step in steps:
            state.count(step)
            progress.count(step)
            after_step()
            stopping, is_last = stop.requested(), state.step == args.max_iters
            if is_last or state.step % args.print_freq == 0:
                progress.report(step)
            with progress.throughput.paused():
                if is_last or state.step % args.eval_freq == 0:
                    files.save(state, is_best=tester.measure_run(state, write))
                elif stopping:
                    files.save(state)
            if stopping:
                break
        command = start.resume_command(files.last_file)
        finetuning.finish(state, args.max_iters, write, files, stop.reason, command)
    stop.exit()
    return {"last": state.accuracy, "best": state.best}


if __name__ == "__main__":
    start.run(main, build_parser())
