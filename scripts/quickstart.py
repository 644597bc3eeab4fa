"""Run the three phases on the embedded data set, and write a table, pictures and all intermediate files.

    python scripts/quickstart.py

1. `unsupervised/cifar.py` learns a metric of 3,000 small gray patches of ten photographs, without labels.
2. `notebooks/knn.ipynb` and `notebooks/nc.ipynb` propagate 10, 20, 50 and 100 labels to all of them. The
   normalized cut runs once more with the labeled images clamped, each to its own label.
3. `cifar-semi.py` trains on the labels and all of the clamped cut's pseudo-labels, each weighted by its
   confidence. With the same batches, steps and schedule, two baselines train on the labeled images only:
   one from scratch, one from the network of phase 1.

The baseline and the method train only the last layer of the network of phase 1 (`--finetune`): so few steps
of all layers lose more of the metric than they gain, even with every true label.

Runs are repeated over eight draws of the labeled images, because the gain at 50 and 100 labels differs
between draws by more than its mean. All files are written to --output: `results.json`, `results.png`,
`accuracy_coverage.png`, the executed notebooks, pseudo-label files and checkpoints. The script takes about
four minutes on two CPU cores.
"""

import argparse
import contextlib
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
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import papermill
import torch
from tqdm import tqdm

from datasets.patches import PHOTOGRAPHS, TRAIN_PER_CLASS
from lib.cli import declared, start
from lib.features.extraction import FeatureSet, load_or_extract
from lib.files import provenance
from lib.labels import pseudo_files
from lib.labels.split import labeled_split
from lib.propagation import EmbeddingGraph, calibrate, methods
from lib.propagation.chunks import save_part
from lib.report import plots
from lib.report.curves import accuracy_coverage

ARCHITECTURE = "wrn-10-1"
METRIC_BATCH_SIZE = 64  # half the published one: 3,000 images give few steps per epoch
CLASSIFIER_BATCH_SIZE = 32  # twice the steps of 64 in the same time: from scratch 8 points better
LR_ALL_LAYERS, LR_LAST_LAYER = 0.1, 1.0
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


def build_parser() -> argparse.ArgumentParser:
    parser = declared.parser(__doc__)
    parser.add_argument("--output", default="checkpoint/quickstart", help="folder for everything")
    parser.add_argument(
        "--epochs", type=declared.positive_int, default=70, help="epochs of phase 1"
    )
    parser.add_argument(
        "--max-iters", type=declared.positive_int, default=200, help="steps of each run of phase 3"
    )
    parser.add_argument(
        "--splits", type=declared.positive_int, default=8, help="draws of the labeled images"
    )
    parser.add_argument(
        "--num-labeled",
        type=declared.positive_int,
        nargs="+",
        default=[10, 20, 50, 100],
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


def spread(metric: FeatureSet, num_labeled: list[int], seeds: range, output: Path) -> None:
    """Write the missing pseudo-label files of the splits `seeds`, by the calls of the notebooks."""
    space = EmbeddingGraph(metric.features, num_neighbors=NUM_NEIGHBORS)
    meta = provenance.record({"num_neighbors": NUM_NEIGHBORS}, metric.digest)
    for name, seed, n in itertools.product(SPREAD, seeds, num_labeled):
        file = pseudo_file(output, name, n, seed)
        if file.is_file():
            continue
        algorithm, parameters = SPREAD[name]
        split = labeled_split(metric.targets, n, metric.num_classes, seed)
        labels, num_classes = metric.targets[split.labeled], metric.num_classes
        known = (space, algorithm, split, labels, num_classes)
        answer, temperature = (f(*known, **parameters) for f in (methods.propagate, calibrate))
        save_part(answer.pseudo_labels(split, meta, calibration=temperature), file.parent, n)


def pseudo_file(output: Path, name: str, num_labeled: int, seed: int) -> Path:
    return output / "pseudos" / f"{name}-split{seed}" / f"{num_labeled}.pth.tar"


def propagate(checkpoint: str, num_labeled: list[int], splits: int, output: Path) -> FeatureSet:
    """Run phase 2: the notebooks for the first split, the same calls for the others."""
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
    spread(metric, num_labeled, range(splits), output)
    return metric


def finetune(kind: str, num_labeled: int, seed: int, max_iters: int, output: str) -> float:
    """Run phase 3 once in a process of its own, and return the test accuracy after the last step."""
    torch.set_num_threads(1)  # one run per core is faster than one run on all cores
    out = Path(output)
    words = ["--dataset", "patches", "--arch", ARCHITECTURE]
    words += ["--num-labeled", num_labeled, "--rng-seed", seed]
    words += ["-b", CLASSIFIER_BATCH_SIZE, "--lr-scheduler", "one-cycle"]
    words += ["--max-iters", max_iters, "--eval-freq", max_iters]
    words += ["--model-root", out / "finetune", "--log-root", out / "tensorboard"]
    words += ["--exp-name", f"{kind}-{num_labeled}-split{seed}"]
    if kind == "scratch":
        words += ["--lr", LR_ALL_LAYERS]
    else:
        words += ["--resume", out / "metric" / "ckpt.cifar.pth.tar"]
        words += ["--finetune", "--lr", LR_LAST_LAYER]
    if kind == "method":
        words += ["--pseudo-file", pseudo_file(out, TAUGHT, num_labeled, seed)]
        words += ["--confidence-weighted"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return run_script("cifar-semi.py", words)["last"]


def finetune_all(num_labeled: list[int], splits: int, max_iters: int, output: Path) -> dict:
    """Run phase 3 for all settings, and return test accuracies by (kind, number of labels, split)."""
    todo = [(k, n, s) for n in num_labeled for k in TRAINED for s in range(splits)]
    workers = min(len(todo), os.cpu_count() or 1, 8)
    context = multiprocessing.get_context("spawn")  # a forked torch may hang on its threads
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        jobs: dict[Future, tuple] = {
            pool.submit(finetune, *run, max_iters, str(output)): run for run in todo
        }
        bar = tqdm(as_completed(jobs), total=len(jobs), desc="cifar-semi.py", unit="run")
        return {jobs[done]: done.result() for done in bar}


def measure(metric: FeatureSet, accuracy: dict, num_labeled: list[int], splits: int, output: Path):
    """Return percentages by column, number of labels and split."""
    results: dict[str, dict[int, list[float]]] = {name: {} for name in COLUMNS}
    for n in num_labeled:
        for name in COLUMNS:
            if name in TRAINED:
                results[name][n] = [accuracy[name, n, s] for s in range(splits)]
                continue
            files = [pseudo_file(output, name, n, s) for s in range(splits)]
            curves = [accuracy_coverage(pseudo_files.load(f), metric.targets) for f in files]
            results[name][n] = [curve.overall for curve in curves]
    return results


def table(results: dict[str, dict[int, list[float]]]) -> str:
    """Format means and standard deviations in Markdown, one row per number of labels."""
    measures = {name: "accuracy" if name in TRAINED else "precision" for name in COLUMNS}
    heads = ["labels", *(f"{text} ({measures[name]})" for name, text in COLUMNS.items())]
    lines = ["| " + " | ".join(heads) + " |", "|---:" * len(heads) + "|"]
    for n in next(iter(results.values())):
        cells = [str(n)]
        for name in COLUMNS:
            values = results[name][n]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.fmean(values):.1f} ± {spread:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> dict[str, dict[int, list[float]]]:
    # 1. Options; files of an earlier quickstart must not mix with the new ones
    check_options(args)
    start, output = time.perf_counter(), Path(args.output)
    for name in ("metric", "pseudos", "finetune", "tensorboard"):
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
    metric = propagate(checkpoint, args.num_labeled, args.splits, output)
    print("\nPhase 3 of 3: classifiers trained on labels and pseudo-labels", flush=True)
    accuracy = finetune_all(args.num_labeled, args.splits, args.max_iters, output)

    # 3. Table and pictures
    results = measure(metric, accuracy, args.num_labeled, args.splits, output)
    record = {"results": results, "meta": provenance.record(vars(args), metric.digest)}
    record["seconds"] = round(time.perf_counter() - start, 1)
    (output / "results.json").write_text(json.dumps(record, indent=1))
    plots.accuracy_by_labels(results, COLUMNS).savefig(output / "results.png", dpi=120)
    shutil.copy(output / "pseudos" / "nc-split0" / "accuracy_coverage.png", output)
    print(f"\nPercent, mean and deviation over {args.splits} draws of the labeled images:\n")
    print(table(results))
    print(f"\n{record['seconds']:.0f} s; results.json, results.png and all else: {output}/")
    return results


if __name__ == "__main__":
    start.run(main, build_parser())
