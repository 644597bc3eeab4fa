"""Choose the images to label, before phase 2: those that say most about all others.

    python scripts/choose.py --checkpoint checkpoint/instance_cifar10/ckpt.cifar.pth.tar --budget 40
    python scripts/choose.py --arch torchvision:resnet50 --dataset folder --data-dir DIR --budget 40

The features are those of scripts/propagate.py: a checkpoint of phase 1, a feature file, or a network from
elsewhere. --save-path gets `chosen.csv`, the list of the images (index, path, rank); `chosen.html`, their
pictures in that order; and, for a folder of images, `labels.csv`. Fill in the labels that are missing there
and put it into DIR. Phases 2 and 3 then take the list:

    python scripts/propagate.py ... --num-labeled checkpoint/chosen/chosen.csv       writes chosen.pth.tar
    python cifar-semi.py ... --num-labeled checkpoint/chosen/chosen.csv --pseudo-file .../chosen.pth.tar

Methods: `maxherding` covers all images as well as so many can, and any beginning of its list is a choice,
too; `typiclust` takes the most typical image of each cluster, as many clusters as labels; `random`;
`stratified` takes equally many of each class, which needs the labels and is there to compare with. The others
see no label, so that they may leave a class out. Phases 2 and 3 name it then, and no image gets it. What the
methods are worth is measured in scripts/benchmarks/README.md.

Distances are those of the metric. With --space spectral they are those in the embedding that `nc` spreads
labels through, which is made as in phase 2 and kept in SAVE_PATH/work.

With labels already there, --labeled names them: an earlier list, a number as for --num-labeled, or all known
ones. They count as covered, and `chosen.csv` begins with them. --pseudo-file, or --pseudo-dir for chunks,
takes what phase 2 made of them instead: `maxherding` then weights each image by 1 - its confidence, so that
images are chosen where the labels are uncertain (UHerding). --confidence and --temperature of
scripts/propagate.py say what that means.

Of more than 10,000 images `maxherding` covers and chooses from a sample, so that its time does not grow with
their number: seconds for 50,000 images, and for a million of them once they are read.
"""

import argparse
import hashlib
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from datasets import UNKNOWN, DataSet
from datasets.listing import TABLE
from lib.cli import checks, declared, embedding, start
from lib.cli.embedding import Embedding
from lib.cli.propagation import Graph
from lib.features.extraction import FeatureSet
from lib.files import provenance
from lib.files.atomic import sha256_of, write_whole
from lib.labels import chosen, pseudo_labels
from lib.labels.split import ALL, labeled_split, parse_num_labeled
from lib.propagation import EmbeddingGraph
from lib.propagation.active_learning import METHODS, choose
from lib.propagation.embedding_graph import GraphCache
from lib.propagation.normalized_cut import NUM_EIGENVECTORS
from lib.report import page
from lib.runtime import devices, distributed
from lib.runtime.option import POSITIVE, option, redeclared
from lib.training.finetuning import read_pseudo_labels
from lib.training.shared_settings import Compute

LIST, PAGE = "chosen.csv", "chosen.html"
NEAR = ("maxherding", "typiclust")  # methods that look at distances


@dataclass(frozen=True)
class _Choice:
    GROUP: ClassVar[str] = "choice"

    method: str = option("maxherding", choices=METHODS, help="how images are chosen")
    budget: int = option(40, limit=POSITIVE, metavar="N", help="images to choose")
    space: str = option(
        "metric",
        choices=("metric", "spectral"),
        help="where images are near: in the metric, as published, or in the spectral embedding of the "
        "normalized cut, through which labels will spread",
    )
    graph: str = redeclared(Graph, "graph")
    num_neighbors: int | None = redeclared(Graph, "num_neighbors")
    labeled: str | None = option(
        None,
        parse=parse_num_labeled,
        limit=POSITIVE,
        metavar="N",
        help="images that have labels already, as for --num-labeled of phase 2: FILE.csv, an earlier list; "
        "all, every known label; or a number",
    )
    pseudo_file: str = option(
        "",
        metavar="FILE",
        help="pseudo-labels of phase 2, in place of --labeled: weights of maxherding",
    )
    pseudo_dir: str = option("", metavar="DIR", help="the same in chunks")


@dataclass(frozen=True)
class _Choosing(Embedding, _Choice, Compute):
    GROUP: ClassVar[str] = "files"

    save_path: str = option("./checkpoint/chosen", metavar="DIR", help="folder of the results")


def build_parser() -> declared.Parser:
    return declared.parser(__doc__, _Choosing)


def check_options(args: argparse.Namespace) -> None:
    embedding.check_source(args, build_parser())
    given = [args.labeled is not None, bool(args.pseudo_file), bool(args.pseudo_dir)]
    if sum(given) > 1:
        raise ValueError(
            "--labeled, --pseudo-file and --pseudo-dir all say what is labeled: name one"
        )
    if args.method not in NEAR:
        why = f"with --method {args.method}, which looks at no distance"
        checks.warn_unused(args, build_parser(), why, "space", "graph", "num_neighbors")
    elif args.space == "metric":
        checks.warn_unused(args, build_parser(), "with --space metric", "graph", "num_neighbors")
    if args.method != "maxherding":
        why = f"with --method {args.method}: only maxherding looks at weights"
        checks.warn_unused(args, build_parser(), why, "pseudo_file", "pseudo_dir")
    if distributed.is_main():
        keep_labels(checks.writable_folder("--save-path", args.save_path))


def keep_labels(folder: Path) -> None:
    """Refuse to replace a `labels.csv` that somebody has begun to fill in, or made."""
    table, made = folder / TABLE, None
    if (folder / LIST).is_file():
        made = chosen.read(folder / LIST).meta.get("labels_csv")
    if table.is_file() and sha256_of(table) != made:
        raise ValueError(
            f"--save-path: {table} holds labels that are not to be lost; name another folder, or move it away"
        )


def labels_so_far(args: argparse.Namespace, found: FeatureSet) -> tuple[Tensor, Tensor | None]:
    """Find the images that are labeled, and the weights of all images where labels were spread."""
    source = args.pseudo_file or args.pseudo_dir
    if source:
        pseudo = pseudo_labels.merged(read_pseudo_labels(args.pseudo_file, args.pseudo_dir))
        fit = len(found.features), found.num_classes, len(pseudo.labeled)
        try:
            pseudo.require_fit(*fit, found.digest, found.classes)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        weights = torch.ones(len(found.features))
        weights[pseudo.indexes] = 1 - pseudo.confidence.float().clamp(0, 1)
        return pseudo.labeled, weights
    if args.labeled is not None:
        options = args.labeled, found.num_classes, args.rng_seed
        return labeled_split(found.targets, *options, images=found).labeled, None
    known = int((found.targets != UNKNOWN).sum())
    if 0 < known < len(found.targets):
        checks.warn(
            f"{known} images have a label and may be chosen again; --labeled {ALL} names them"
        )
    return torch.empty(0, dtype=torch.int64), None


def points(args: argparse.Namespace, features: Tensor) -> Tensor:
    """Place the images where their distances count: N unit vectors."""
    if args.space == "metric" or args.method not in NEAR:
        return features
    cache = GraphCache(Path(args.save_path) / "work", log=lambda line: print(line, flush=True))
    graph = EmbeddingGraph(features, args.graph, args.num_neighbors, cache=cache)
    return graph.spectrum(NUM_EIGENVECTORS - 1).rows()


def write_results(
    args: argparse.Namespace,
    found: FeatureSet,
    labeled: Tensor,
    new: Tensor,
    images: tuple[DataSet | None, DataSet | None],
) -> None:
    """Write the list, its page where there are images, and the table where there are labels to fill in."""
    folder, (data, test) = Path(args.save_path), images
    paths = data.paths if data is not None else found.paths
    meta = provenance.record(vars(args), found.digest)
    table = b""
    if data is not None and data.paths and (data.targets[new] == UNKNOWN).any():
        table = chosen.table_to_fill_in(new, data, test)
        write_whole(table, folder / TABLE)
        meta["labels_csv"] = hashlib.sha256(table).hexdigest()
    else:
        (folder / TABLE).unlink(missing_ok=True)  # of an earlier choice, and not filled in
    chosen.write(folder / LIST, torch.cat([labeled, new]), paths, meta)
    print(f"{folder / LIST}: {len(labeled)} labeled images, then {len(new)} new ones")
    if table:
        print(f"{folder / TABLE}: fill in the labels, and put it into {args.data_dir}")
    if data is not None:
        facts = {"method": args.method, "labeled before": len(labeled), "seed": args.rng_seed}
        facts |= {"git commit": meta["git_commit"], "data digest": meta["data_digest"]}
        page.write_page(
            folder / PAGE,
            title=f"{len(new)} images to label, the most useful first",
            facts=facts,
            pictures=page.write_ranking(new, data, folder),
        )
        print(f"page: {folder / PAGE}")


def main(args: argparse.Namespace) -> Tensor | None:
    # 1. Features: read, or extracted once and kept beside the checkpoint
    check_options(args)
    device = devices.select(args.gpus, args.precision, deterministic=args.deterministic)
    found = embedding.load(args, device)
    if not distributed.is_main():
        return None

    # 2. The labels that are there, and the images that add most to them
    labeled, weights = labels_so_far(args, found)
    print(f"{len(found.features)} x {found.features.shape[1]} features, {len(labeled)} labeled")
    new = choose(
        args.method,
        points(args, found.features.to(device.torch_device)),
        args.budget,
        targets=found.targets,
        num_classes=found.num_classes,
        labeled=labeled,
        weights=weights,
        seed=args.rng_seed,
    )

    # 3. A list, a table to fill in and a page
    write_results(args, found, labeled, new, embedding.images_of(args, found))
    return new


if __name__ == "__main__":
    warnings.simplefilter("default", UserWarning)
    start.run(main, build_parser())
