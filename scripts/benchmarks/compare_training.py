"""Compare what bf16 and the batched augmentation learn with what float32 and Pillow learn, by curves.

    python scripts/benchmarks/compare_training.py --dataset folder --data-dir DIR --output-dir OUT

The script trains both phases in several variants for each seed, and reads their logs:

    fp32             --precision fp32
    bf16             --precision bf16
    bf16, workers    --precision bf16 --loader workers: one image at a time with Pillow, as published

Phase 1 is unsupervised/cifar.py. Phase 3 is cifar-semi.py from scratch on all labels, where losses differ
most clearly. A seed gives all variants the same initial weights and batches, and all but the workers the same
augmentation. The script prints mean and deviation over the seeds of the last loss and accuracy, the
difference to the baseline, and the p-value of Welch's t-test; the picture shows the whole curves. Finished
runs are not repeated.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from scipy.stats import ttest_ind
from torch import Tensor
from tqdm import tqdm

from lib.cli import checks, declared, start
from lib.files import provenance
from lib.report import plots
from lib.training.shared_settings import Data, Network

VARIANTS = {
    "fp32": ("--precision", "fp32"),
    "bf16": ("--precision", "bf16"),
    "bf16, workers": ("--precision", "bf16", "--loader", "workers"),
}
COMPARED = (("bf16", "fp32"), ("bf16, workers", "bf16"))


class Curve(NamedTuple):
    """A curve read from a log: its title, and the event and value that it shows."""

    title: str
    event: str
    value: str


CURVES = {
    1: (
        Curve("phase 1: loss", "epoch", "loss"),
        Curve("phase 1: kNN accuracy", "epoch", "knn_top1"),
    ),
    3: (Curve("phase 3: loss", "train", "loss"), Curve("phase 3: test accuracy", "test", "top1")),
}


def build_parser() -> argparse.ArgumentParser:
    parser = declared.parser(__doc__)
    declared.add_options(parser, Data)
    declared.add_options(parser, Network)
    parser.set_defaults(dataset="patches", architecture="wrn-10-1")
    parser.add_argument(
        "--phases", type=int, nargs="+", choices=(1, 3), default=[1, 3], help="phases to train"
    )
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="variants to train"
    )
    parser.add_argument(
        "--seeds", type=declared.positive_int, default=3, help="runs of each variant"
    )
    parser.add_argument(
        "--epochs", type=declared.positive_int, default=20, help="epochs of phase 1"
    )
    parser.add_argument(
        "--max-iters", type=declared.positive_int, default=400, help="steps of phase 3"
    )
    parser.add_argument(
        "--lr",
        type=declared.positive_float,
        default=0.1,
        help="highest learning rate of both phases (one-cycle)",
    )
    parser.add_argument(
        "-b", "--batch-size", type=declared.batch_size, default=128, help="images per step"
    )
    parser.add_argument(
        "--output-dir", default="checkpoint/compare", metavar="DIR", help="logs, picture, numbers"
    )
    return parser


def words_of(args: argparse.Namespace, phase: int, folder: Path) -> list[str]:
    """Return the command line of a phase without variant and seed."""
    common = ["--dataset", args.dataset, "--data-dir", args.data_dir, "-j", args.num_workers]
    common += ["--image-size", args.image_size, "--arch", args.architecture, "-b", args.batch_size]
    common += ["--lr", args.lr, "--lr-scheduler", "one-cycle"]
    if phase == 1:
        own = ["--epochs", args.epochs, "--model-dir", folder, "--log-dir", folder]
    else:
        every = max(1, args.max_iters // 30)
        own = ["--max-iters", args.max_iters, "--num-labeled", "all", "--print-freq", every]
        own += ["--eval-freq", max(1, args.max_iters // 6), "--model-root", folder.parent]
        own += ["--log-root", folder.parent, "--exp-name", folder.name]
    return [str(word) for word in common + own]


def train(args: argparse.Namespace, phase: int, variant: str, seed: int) -> list[dict]:
    """Train one run unless it is finished, and return the lines of its log."""
    name = f"phase{phase}-{variant.replace(', ', '-')}-{seed}"
    folder = Path(args.output_dir) / name
    done, log = folder / "done.json", folder / "log.jsonl"
    words = [*words_of(args, phase, folder), *VARIANTS[variant], "--rng-seed", str(seed)]
    words.append(provenance.git_commit())  # repeats runs of other code
    if not (done.is_file() and json.loads(done.read_text()) == words):
        log.unlink(missing_ok=True)
        script = start.load_script("unsupervised/cifar.py" if phase == 1 else "cifar-semi.py")
        script.main(script.build_parser().parse_args(words[:-1]))
        done.write_text(json.dumps(words))
    return [json.loads(line) for line in log.read_text().splitlines()]


def read(lines: list[dict], curve: Curve) -> dict[int, float]:
    """Return the values of a curve by step."""
    found = (line for line in lines if line["event"] == curve.event)
    return {line["step"]: line[curve.value] for line in found}


def compare(values: dict[str, Tensor]) -> list[dict]:
    """Compare the last values (of seeds x steps) of each variant with its baseline, if both were run."""
    rows = []
    for variant, baseline in COMPARED:
        if not {variant, baseline} <= values.keys():
            continue
        one, other = (values[name][:, -1] for name in (variant, baseline))
        rows.append(
            {
                "variant": variant,
                "baseline": baseline,
                "means": [float(one.mean()), float(other.mean())],
                "deviations": [float(one.std()), float(other.std())],
                "difference": float(one.mean() - other.mean()),
                "p": float(ttest_ind(one, other, equal_var=False).pvalue),
            }
        )
    return rows


def table(results: dict[str, list[dict]]) -> str:
    lines = [
        "| | compared | mean ± deviation | baseline | difference | p |",
        "|---|---|---|---|---|---|",
    ]
    for title, rows in results.items():
        for row in rows:
            pairs = zip(row["means"], row["deviations"], strict=True)
            one, other = (f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in pairs)
            names = f"{row['variant']} with {row['baseline']}"
            cells = [title, names, one, other, f"{row['difference']:+.3f}", f"{row['p']:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    if args.seeds < 2:
        raise ValueError("--seeds 1: the noise between seeds needs at least two")
    output = checks.writable_folder("--output-dir", args.output_dir)
    runs = [(p, v, s) for s in range(args.seeds) for p in args.phases for v in args.variants]
    logs = {run: train(args, *run) for run in tqdm(runs, unit="run")}
    panels: dict[str, dict[str, tuple[list[int], Tensor]]] = {}
    for phase in args.phases:
        for curve in CURVES[phase]:
            panels[curve.title] = {}
            for variant in args.variants:
                seeds = [read(logs[phase, variant, seed], curve) for seed in range(args.seeds)]
                values = torch.tensor([list(one.values()) for one in seeds], dtype=torch.float64)
                panels[curve.title][variant] = list(seeds[0]), values
    results = {
        title: compare({name: values for name, (_, values) in variants.items()})
        for title, variants in panels.items()
    }
    plots.training_curves(panels).savefig(output / "curves.png", dpi=120)
    record = {"results": results, "meta": provenance.record(vars(args))}
    (output / "numbers.json").write_text(json.dumps(record, indent=1) + "\n")
    print(table(results))
    print(f"written: {output / 'curves.png'}, {output / 'numbers.json'}")


if __name__ == "__main__":
    start.run(main, build_parser())
