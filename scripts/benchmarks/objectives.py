"""The objectives of phase 1 on the same images, with the same network and number of image passes.

    python scripts/benchmarks/objectives.py --dataset patches --passes 200000
    python scripts/benchmarks/objectives.py --dataset folder --data-dir DIR --image-size 64 --arch wrn-16-2

An image pass is one view of one image through the network, forward and backward: an epoch of an objective
with K views has K passes for each image. Every run ends its learning rate within its passes. The first table
has the kNN accuracy on the test images (the nearest neighbors vote, as in the log of a run) at tenths of the
passes, and the minutes of training. The second one has the precision of the pseudo-labels of the normalized
cut, in percent, mean and standard deviation over draws of the labeled images, beside those of two features
that nothing was learned for: the same network before training, and color histograms (8 bins a channel).

--settings gives the options of an objective in place of its own defaults:
`--settings "two-view: -b 256 --lr 0.06" "instance: --lr 0.1"`. Runs stay in --output; a finished one
is not repeated.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor

from datasets import DataSet, build_datasets
from datasets.transforms import Augmentation
from lib.cli import declared, start
from lib.features.extraction import extract
from lib.features.networks import load_network
from lib.files import published
from lib.files.description import METRIC
from lib.labels.split import labeled_split
from lib.loading.batches import in_order
from lib.propagation import EmbeddingGraph, propagate
from lib.report.curves import accuracy_coverage
from lib.runtime import devices
from lib.runtime.devices import Device
from lib.training.settings import OBJECTIVES
from models import build_model
from models.layers import l2_normalize

SCRIPT = "unsupervised/cifar.py"
BINS = 8  # of a color histogram, for each channel
SHOWN = 10  # columns of the table by passes


def build_parser() -> argparse.ArgumentParser:
    parser = declared.parser(__doc__)
    parser.add_argument("--dataset", default="patches", help="as in unsupervised/cifar.py")
    parser.add_argument("--data-dir", default="./data", metavar="DIR", help="folder of the images")
    parser.add_argument("--image-size", type=declared.positive_int, default=32, help="pixels")
    parser.add_argument("--arch", default="wrn-10-1", metavar="NAME", help="network")
    parser.add_argument(
        "--passes", type=declared.positive_int, default=200_000, help="image passes of every run"
    )
    parser.add_argument(
        "--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES), help="rows"
    )
    parser.add_argument(
        "--settings", nargs="+", default=[], metavar="'OBJECTIVE: OPTIONS'", help="its own options"
    )
    parser.add_argument(
        "--num-labeled",
        type=declared.positive_int,
        nargs="+",
        default=[10, 20, 50, 100],
        help="numbers of labels",
    )
    parser.add_argument(
        "--splits", type=declared.positive_int, default=5, help="draws of each, seeds 0, 1, ..."
    )
    parser.add_argument("--rng-seed", type=declared.seed, default=0, help="seed of the training")
    parser.add_argument("--num-workers", type=declared.num_workers, default=2, help="readers")
    parser.add_argument("--gpus", default="0", metavar="DEVICE", help="device, or cpu")
    parser.add_argument(
        "--output", default="./checkpoint/objectives", metavar="DIR", help="runs and results.json"
    )
    return parser


def read_settings(texts: list[str]) -> dict[str, list[str]]:
    """Read --settings: the options of each objective that has some."""
    found = {}
    for text in texts:
        name, separator, words = text.partition(":")
        if not separator or name.strip() not in OBJECTIVES:
            raise ValueError(f"--settings {text!r}: write an objective, a colon and its options")
        found[name.strip()] = shlex.split(words)
    return found


def train(args: argparse.Namespace, objective: str, own: list[str], num_images: int) -> Path:
    """Train a metric by the script of phase 1, unless it is there; return its checkpoint."""
    folder = Path(args.output) / objective
    words = ["--objective", objective, "--dataset", args.dataset, "--data-dir", args.data_dir]
    words += ["--arch", args.arch, "--image-size", str(args.image_size), "--gpus", args.gpus]
    words += ["--rng-seed", str(args.rng_seed), "-j", str(args.num_workers), "--resume", "auto"]
    words += ["--model-dir", str(folder), "--log-dir", str(folder / "log"), *own]
    views = start.load_script(SCRIPT).build_parser().parse_args(words).views
    epochs = max(1, round(args.passes / (num_images * views)))
    command = [sys.executable, str(ROOT / SCRIPT), *words, "--epochs", str(epochs)]
    print(f"$ python {shlex.join(command[1:])}", flush=True)
    subprocess.run(command, check=True, stdout=sys.stderr)
    return folder / "ckpt.cifar.pth.tar"


def by_passes(folder: Path, num_images: int) -> tuple[dict[int, float], float]:
    """Return the kNN accuracy after each epoch, by image passes so far, and the minutes of training."""
    lines = [json.loads(x) for x in (folder / "log" / "log.jsonl").read_text().splitlines()]
    epochs = [x for x in lines if x["event"] == "epoch"]
    passes = num_images * lines[0]["meta"]["options"]["views"]  # of an epoch
    found = {passes * (x["epoch"] + 1): x.get("knn_top1", float("nan")) for x in epochs}
    return found, sum(num_images / x["images_per_s"] for x in epochs) / 60


def histograms(data: DataSet, device: Device) -> Tensor:
    """Compute square roots of color histograms, N x 3 BINS, whose products compare distributions."""
    plain = Augmentation((), ((0.0,) * 3, (1.0,) * 3))
    rows = []
    for batch in in_order(data, plain, device):
        places = (batch.images.flatten(2) * BINS).long().clamp(max=BINS - 1)
        counts = torch.zeros(*places.shape[:2], BINS, device=places.device)
        counts.scatter_add_(2, places, torch.ones_like(places, dtype=torch.float32))
        rows.append(counts.flatten(1).sqrt())
    return l2_normalize(torch.cat(rows)).cpu()


def precisions(
    rows: Tensor, targets: Tensor, num_classes: int, args: argparse.Namespace
) -> dict[int, list[float]]:
    """Measure the pseudo-labels of the normalized cut: percent, by number of labels and draw."""
    graph, found = EmbeddingGraph(rows), {}
    for count in args.num_labeled:
        found[count] = []
        for seed in range(args.splits):
            split = labeled_split(targets, count, num_classes, seed)
            done = propagate(graph, "nc", split, targets[split.labeled], num_classes)
            curve = accuracy_coverage(done.pseudo_labels(split), targets)
            found[count].append(curve.overall if curve else float("nan"))
    return found


def cell(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def print_table(heads: list[str], rows: list[list[str]]) -> None:
    print("\n" + "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads)]))
    print("\n".join("| " + " | ".join(row) + " |" for row in rows), flush=True)


def main(args: argparse.Namespace) -> dict:
    device = devices.select(args.gpus)
    train_set, _ = build_datasets(
        args.dataset, args.data_dir, image_size=args.image_size, num_workers=args.num_workers
    )
    given = train_set.targets, train_set.num_classes, args
    settings = read_settings(args.settings)
    results: dict[str, dict] = {"options": vars(args), "knn": {}, "minutes": {}, "precision": {}}
    for objective in args.objectives:
        file = train(args, objective, settings.get(objective, []), len(train_set))
        curve, minutes = by_passes(file.parent, len(train_set))
        results["knn"][objective], results["minutes"][objective] = curve, minutes
        model, _ = load_network(published.load(file), file, unsaid=METRIC)
        rows = extract(device.prepare(model), train_set, device, num_workers=args.num_workers)
        results["precision"][objective] = precisions(rows, *given)
    torch.manual_seed(args.rng_seed)
    model = device.prepare(build_model(args.arch, 0, normalize=True))
    untrained = extract(model, train_set, device, num_workers=args.num_workers)
    results["precision"]["untrained network"] = precisions(untrained, *given)
    results["precision"]["color histogram"] = precisions(histograms(train_set, device), *given)
    places = [args.passes * (k + 1) // SHOWN for k in range(SHOWN)]
    curves = []
    for objective, curve in results["knn"].items():
        so_far = [[value for passes, value in curve.items() if passes <= place] for place in places]
        cells = [f"{values[-1]:.1f}" if values else "" for values in so_far]
        curves.append([objective, *cells, f"{results['minutes'][objective]:.1f}"])
    print_table(["kNN accuracy at passes", *map(str, places), "minutes"], curves)
    print_table(
        ["precision at labels", *map(str, args.num_labeled)],
        [[name, *map(cell, found.values())] for name, found in results["precision"].items()],
    )
    Path(args.output, "results.json").write_text(json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    start.run(main, build_parser())
