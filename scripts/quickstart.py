"""Run the three phases on the embedded data set, and write a table, pictures and all intermediate files.

    python scripts/quickstart.py

1. `unsupervised/cifar.py` learns a metric of 3,000 small gray patches of ten photographs, without labels.
2. `notebooks/knn.ipynb` and `notebooks/nc.ipynb` propagate 10, 50 and 100 labels to all of them. The
   normalized cut runs once more with the labeled images clamped, each to its own label.
3. `cifar-semi.py` trains on the labels and all of the clamped cut's pseudo-labels, each weighted by the
   calibrated probability that it is right. Its last layer starts from the means of the pseudo-classes, and
   the moving average of its weights is the result. With the same batches, steps and schedule, two baselines
   train on the labeled images only: one from scratch, and the last layer of the network of phase 1, which is
   better than all of its layers.

The labeled images are equally many of each class, as in the paper. Nobody can draw so who does not know the
classes: for the smallest number two rows show images that are drawn from all, and those that
`scripts/choose.py` asks for.

Every column of the table is measured on the same images: all training images without a label. A second
table has the accuracy on test images, which come from another part of each photograph.

Runs are repeated over three draws of the labeled images, because the gain differs between draws. The choice
of `scripts/choose.py` is always the same: the classifiers of its row differ by their random numbers alone.

All files are written to --output: `results.json`, `results.png`, `accuracy_coverage.png`, the page of the
images that were asked for, the executed notebooks, pseudo-label files and checkpoints. The script takes about
four minutes on two CPU cores, and seven on slow ones.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import multiprocessing
import os
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import papermill
import torch
from tqdm import tqdm

from datasets import UNKNOWN, build_datasets
from datasets.patches import PHOTOGRAPHS, TRAIN_PER_CLASS
from lib.cli import declared, start
from lib.features.extraction import FeatureSet, load_or_extract
from lib.files import provenance
from lib.labels import pseudo_files
from lib.labels.split import labeled_split
from lib.propagation import EmbeddingGraph, calibrate, methods
from lib.report import plots
from lib.report.curves import accuracy_coverage
from lib.runtime import devices
from lib.training.finetuning import LAST, evaluate
from lib.training.prediction import load_classifier

ARCHITECTURE = "wrn-10-1"
METRIC_BATCH_SIZE = 64  # half the published one: 3,000 images give few steps per epoch
CLASSIFIER_BATCH_SIZE = 32  # twice the steps of 64 in the same time: from scratch 8 points better
LR_SCRATCH, LR_LAST_LAYER, LR_METRIC = 0.1, 1.0, 0.03
TEMPERATURE = 0.2  # temperature of instance discrimination; the published 0.1 is for 50,000 images
NUM_NEIGHBORS = 10  # for 3,000 images; the published 20 are meant for 50,000

# name in results.json: heading in the table
COLUMNS = {
    "scratch": "labels only, from scratch",
    "metric": "labels only, from the metric",
    "knn": "kNN pseudo-labels",
    "nc": "normalized-cut pseudo-labels",
    "nc-clamped": "the same, clamped",
    "method": "all three phases",
}
TRAINED = ("scratch", "metric", "method")
# name in results.json and of the folder: algorithm and its parameters
SPREAD: dict[str, tuple[str, dict[str, bool]]] = {
    "knn": ("knn", {}),
    "nc": ("nc", {}),
    # clamping keeps a rarer part of a class from losing even its labels to the class that surrounds it
    "nc-clamped": ("nc", {"clamp": True}),
}
NOTEBOOKS = ("knn", "nc")  # entries of `SPREAD` that notebooks compute for the first split
TAUGHT = "nc-clamped"  # entry of `SPREAD` that the classifier learns from
# ending of a row: method of scripts/choose.py that says which images are labeled
CHOSEN = {"drawn from all": "random", "chosen": "maxherding"}

Rows = Mapping[str, list[int | str]]  # by name, --num-labeled of each draw


def build_parser() -> argparse.ArgumentParser:
    parser = declared.parser(__doc__)
    parser.add_argument("--output", default="checkpoint/quickstart", help="folder for everything")
    parser.add_argument(
        "--epochs", type=declared.positive_int, default=70, help="epochs of phase 1"
    )
    parser.add_argument(
        "--max-iters", type=declared.positive_int, default=300, help="steps of each run of phase 3"
    )
    parser.add_argument(
        "--splits", type=declared.positive_int, default=3, help="draws of the labeled images"
    )
    parser.add_argument(
        "--num-labeled",
        type=declared.positive_int,
        nargs="+",
        default=[10, 50, 100],
        help="numbers of labeled images, multiples of ten",
    )
    return parser


def check_options(args: argparse.Namespace) -> None:
    most = len(PHOTOGRAPHS) * (TRAIN_PER_CLASS - 1)
    wrong = [n for n in args.num_labeled if n % len(PHOTOGRAPHS) or not 0 < n <= most]
    if wrong:
        raise ValueError(f"--num-labeled {wrong[0]}: give multiples of ten, 10 to {most}")


def run_script(name: str, words: list[object]) -> dict[str, float]:
    """Run a script with a command line in this process, and return the result of its `main`."""
    module = start.load_script(name)
    words = [str(w) for w in words]
    print(f"$ python {name} {shlex.join(words)}", flush=True)
    return module.main(module.build_parser().parse_args(words))


def choose_rows(checkpoint: str, num_labeled: list[int], splits: int, output: Path) -> Rows:
    """Name the labeled images of each row and draw; scripts/choose.py makes the lists of some."""
    least = min(num_labeled)
    source = ["--checkpoint", checkpoint, "--dataset", "patches", "--budget", least]
    rows: dict[str, list[int | str]] = {}
    for ending, method in CHOSEN.items():
        lists = []
        for seed in range(1 if method == "maxherding" else splits):
            folder = output / "chosen" / f"{method}-split{seed}"
            own = ["--method", method, "--rng-seed", seed, "--save-path", folder]
            run_script("scripts/choose.py", source + own)
            lists.append(str(folder / "chosen.csv"))
        rows[f"{least}, {ending}"] = lists * (splits // len(lists))
    return rows | {str(n): [n] * splits for n in num_labeled}


def draws_of(rows: Rows) -> list[tuple[str, int | str, int]]:
    """List name of the row, --num-labeled and seed of every draw."""
    return [(row, labeled, seed) for row in rows for seed, labeled in enumerate(rows[row])]


def spread(metric: FeatureSet, rows: Rows, output: Path) -> None:
    """Write the missing pseudo-label files of all rows and draws, by the calls of the notebooks."""
    space = EmbeddingGraph(metric.features, num_neighbors=NUM_NEIGHBORS)
    meta = provenance.record({"num_neighbors": NUM_NEIGHBORS}, metric.digest)
    for row, labeled, seed in draws_of(rows):
        split = labeled_split(metric.targets, labeled, metric.num_classes, seed, images=metric)
        labels = metric.targets[split.labeled]
        for name, (algorithm, parameters) in SPREAD.items():
            file = pseudo_file(output, name, row, seed)
            if file.is_file():
                continue
            known = (space, algorithm, split, labels, metric.num_classes)
            answer, temperature = (f(*known, **parameters) for f in (methods.propagate, calibrate))
            file.parent.mkdir(parents=True, exist_ok=True)
            pseudo_files.save(answer.pseudo_labels(split, meta, calibration=temperature), file)


def pseudo_file(output: Path, name: str, row: object, seed: int) -> Path:
    return output / "pseudos" / f"{name}-split{seed}" / f"{file_name(row)}.pth.tar"


def file_name(row: object) -> str:
    return str(row).replace(", ", "-").replace(" ", "-")


def propagate(checkpoint: str, rows: Rows, num_labeled: list[int], output: Path) -> FeatureSet:
    """Run phase 2: the notebooks for the first draw, the same calls for the others."""
    metric = load_or_extract(checkpoint_file=checkpoint, dataset="patches")
    for algorithm in NOTEBOOKS:
        folder = pseudo_file(output, algorithm, 0, 0).parent
        print(f"notebooks/{algorithm}.ipynb -> {folder}/", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        # absolute paths, because a notebook runs in the folder of the repository
        files = {"checkpoint": Path(checkpoint), "save_path": folder}
        parameters = {name: str(path.resolve()) for name, path in files.items()}
        parameters |= {"dataset": "patches", "num_labeled": num_labeled}
        if algorithm == "nc":
            parameters["num_neighbors"] = NUM_NEIGHBORS
        papermill.execute_notebook(
            ROOT / "notebooks" / f"{algorithm}.ipynb",
            folder / f"{algorithm}.ipynb",
            parameters,
            progress_bar={"desc": f"notebooks/{algorithm}.ipynb", "leave": False}
            if sys.stderr.isatty()
            else False,
            cwd=str(ROOT),
        )
    spread(metric, rows, output)
    return metric


def finetune(
    kind: str, row: str, labeled: int | str, seed: int, max_iters: int, output: str
) -> tuple[float, float]:
    """Run phase 3 once in a process of its own, and return accuracies after the last step in percent.

    The first one is on the training images without a label, the second one on the test images.
    """
    torch.set_num_threads(1)  # one run per core is faster than one run on all cores
    out, name = Path(output), f"{kind}-{file_name(row)}-split{seed}"
    words = ["--dataset", "patches", "--arch", ARCHITECTURE]
    words += ["--num-labeled", labeled, "--rng-seed", seed]
    words += ["-b", CLASSIFIER_BATCH_SIZE, "--lr-scheduler", "one-cycle"]
    words += ["--max-iters", max_iters, "--eval-freq", max_iters]
    words += ["--model-root", out / "finetune", "--log-root", out / "tensorboard"]
    words += ["--exp-name", name]
    metric = ["--pretrained", out / "metric" / "ckpt.cifar.pth.tar"]
    if kind == "scratch":
        words += ["--lr", LR_SCRATCH]
    elif kind == "metric":
        words += [*metric, "--finetune", "--lr", LR_LAST_LAYER]
    else:
        words += [*metric, "--pseudo-file", pseudo_file(out, TAUGHT, row, seed)]
        words += ["--calibrated-weights", "--head-init", "class-means", "--ema", "--lr", LR_METRIC]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        test = run_script("cifar-semi.py", words)["last"]
        train, _ = build_datasets("patches", "")
        split = labeled_split(train.targets, labeled, train.num_classes, seed, images=train)
    hidden = train.targets.clone()
    hidden[split.labeled] = UNKNOWN
    others, device = dataclasses.replace(train, targets=hidden), devices.select("cpu")
    model = device.prepare(load_classifier(out / "finetune" / name / LAST).model)
    return evaluate(model, others, device)["top1"], test


def finetune_all(rows: Rows, max_iters: int, output: Path) -> dict:
    """Run phase 3 for all settings, and return its accuracies by (kind, row, draw)."""
    todo = list(itertools.product(TRAINED, draws_of(rows)))
    workers = min(len(todo), os.cpu_count() or 1, 8)
    context = multiprocessing.get_context("spawn")  # a forked torch may hang on its threads
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        jobs: dict[Future, tuple] = {
            pool.submit(finetune, kind, *draw, max_iters, str(output)): (kind, draw[0], draw[2])
            for kind, draw in todo
        }
        bar = tqdm(as_completed(jobs), total=len(jobs), desc="cifar-semi.py", unit="run")
        return {jobs[done]: done.result() for done in bar}


def measure(metric: FeatureSet, accuracy: dict, rows: Rows, output: Path) -> tuple[dict, dict]:
    """Return percentages by column, row and draw: of the images without a label, and of the test images."""
    results: dict[str, dict[str, list[float]]] = {name: {} for name in COLUMNS}
    on_test: dict[str, dict[str, list[float]]] = {name: {} for name in TRAINED}
    for name, (row, draws) in itertools.product(COLUMNS, rows.items()):
        if name in TRAINED:
            found = [accuracy[name, row, s] for s in range(len(draws))]
            results[name][row], on_test[name][row] = map(list, zip(*found, strict=True))
            continue
        files = [pseudo_file(output, name, row, s) for s in range(len(draws))]
        curves = [accuracy_coverage(pseudo_files.load(f), metric.targets) for f in files]
        results[name][row] = [curve.overall for curve in curves]
    return results, on_test


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """Format means and standard deviations in Markdown, one line for each row."""
    heads = ["labels", *(COLUMNS[name] for name in results)]
    lines = ["| " + " | ".join(heads) + " |", "|---:" * len(heads) + "|"]
    for row in next(iter(results.values())):
        cells = [row]
        for name in results:
            values = results[name][row]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.fmean(values):.1f} ± {spread:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    # 1. Options; files of an earlier quickstart must not mix with the new ones
    check_options(args)
    start, output = time.perf_counter(), Path(args.output)
    for name in ("metric", "chosen", "pseudos", "finetune", "tensorboard"):
        shutil.rmtree(output / name, ignore_errors=True)

    # 2. The three phases
    print("\nPhase 1 of 3: a metric without labels", flush=True)
    words = ["--dataset", "patches", "--arch", ARCHITECTURE, "--epochs", args.epochs]
    words += ["--lr", 0.1, "-b", METRIC_BATCH_SIZE, "--nce-t", TEMPERATURE]
    words += ["--lr-scheduler", "one-cycle", "--model-dir", output / "metric"]
    words += ["--log-dir", output / "tensorboard" / "metric"]
    run_script("unsupervised/cifar.py", words)
    print("\nPhase 2 of 3: the labels spread through it", flush=True)
    checkpoint = f"{output}/metric/ckpt.cifar.pth.tar"
    rows = choose_rows(checkpoint, args.num_labeled, args.splits, output)
    metric = propagate(checkpoint, rows, args.num_labeled, output)
    print("\nPhase 3 of 3: classifiers trained on labels and pseudo-labels", flush=True)
    accuracy = finetune_all(rows, args.max_iters, output)

    # 3. Tables and pictures
    results, on_test = measure(metric, accuracy, rows, output)
    record = {"results": results, "test": on_test}
    record["meta"] = provenance.record(vars(args), metric.digest)
    record["seconds"] = round(time.perf_counter() - start, 1)
    (output / "results.json").write_text(json.dumps(record, indent=1))
    plots.accuracy_by_labels(results, COLUMNS).savefig(output / "results.png", dpi=120)
    shutil.copy(output / "pseudos" / "nc-split0" / "accuracy_coverage.png", output)
    drawn = f"percent, mean and deviation over {args.splits} draws of the labeled images"
    print(f"\nRight among the training images without a label, {drawn}:\n\n{table(results)}")
    print(f"\nRight among the test images:\n\n{table(on_test)}")
    print(f"\n{record['seconds']:.0f} s; results.json, results.png and all else: {output}/")
    return results


if __name__ == "__main__":
    start.run(main, build_parser())
