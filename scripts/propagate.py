"""Phase 2 from the shell: spread a few labels through a metric to every other image.

    python scripts/propagate.py --checkpoint checkpoint/instance_cifar10/ckpt.cifar.pth.tar \\
        --method nc --num-labeled 50 250 4000 --save-path checkpoint/pseudos/mine --report
    python scripts/propagate.py --arch torchvision:resnet50 --dataset folder --data-dir DIR ...
    python scripts/propagate.py ... --gpus 0,1,2,3            one process per GPU
    torchrun --nnodes 2 --nproc-per-node 8 ... scripts/propagate.py ...      several machines

Methods: `knn` and `nc`, the published ones; `filter`, `spreading`, `poisson`, `poisson-prior` on the same
graph without eigenvectors; `auto` chooses among all of them by cross-validation on the labeled images
alone; `ensemble` averages the best three. One file `<number of labels>.pth.tar` is written per count, for
`cifar-semi.py --pseudo-file`, and a table is printed where true labels are known.

From a feature file instead of a checkpoint: --features FILE. Images are read at the size that the checkpoint
was trained on, or at --image-size.

Through a network from elsewhere: --arch torchvision:NAME, torchvision:NAME@WEIGHTS or, with timm installed,
timm:NAME. --checkpoint FILE is then a local file of its weights; without one they are the library's own,
downloaded the first time. Its features are kept in checkpoint/backbones.

With --chunks 10 the unlabeled images are shuffled and cut into ten parts, each with a graph of its own, in
the published ImageNet layout `num_labeled_<number of labels>/10_0.pth.tar` ... `10_9.pth.tar`. --report adds
the accuracy-coverage curve, contact sheets of the most and least confident images of each class, and
`report.html` that shows them all.

Several processes give the labels of one: the rows of the graph are divided among them
(lib/propagation/workers.py says what each one holds). The features lie beside the checkpoint, graph and
eigenvectors in SAVE_PATH/work: a run that was killed continues with those when the same command is given
again, and a run with another method or number of labels uses them too.
"""

import argparse
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from datasets import DataSet, build_datasets
from lib.cli import options
from lib.features import extraction
from lib.features.backbones import is_external
from lib.features.extraction import FeatureSet
from lib.files import provenance
from lib.files.atomic import write_whole
from lib.graph.affinity import PRESETS
from lib.graph.filters import FILTERS
from lib.graph.neighbors import METHODS as SEARCHES
from lib.graph.neighbors import PRECISIONS
from lib.graph.spectral import SELF_LOOPS, SOLVERS
from lib.labels import pseudo_labels
from lib.labels.pseudo_labels import CONFIDENCES, PseudoLabels
from lib.labels.split import labeled_split
from lib.propagation import METHODS, EmbeddingGraph
from lib.propagation.algorithms import ALGORITHMS, FILTER_BY, check_parameters
from lib.propagation.cache import GraphCache
from lib.propagation.choose import cross_validate
from lib.propagation.chunks import pseudo_label_parts, save_part
from lib.propagation.workers import lead, serve
from lib.report import page, plots
from lib.report.curves import Curve, accuracy_coverage
from lib.runtime import devices, distributed
from models import SMALL_ARCHITECTURES

# Parameters of single algorithms: given to the method only where the user sets them.
PARAMETERS = (
    *("k", "knn_temperature", "num_eigenvectors", "clamp", "filter", "filter_by", "cutoff"),
    *("degree", "time", "power", "alpha"),
)
GRAPH_OPTIONS = (
    *("graph", "num_neighbors", "graph_file", "self_loops", "search", "search_precision"),
    *("block_mib", "solver", "basis_mib", "work_dir", "fresh"),
)
ARCHITECTURES = (
    f"network, where --checkpoint does not name it: {SMALL_ARCHITECTURES}; or one from elsewhere, with "
    "images as its own configuration wants them: torchvision:NAME, torchvision:NAME@WEIGHTS, timm:NAME"
)
MIB = 2**20


def build_parser() -> argparse.ArgumentParser:
    parser = options.parser(__doc__)
    options.add_data(parser, "--data_dir")
    parser.set_defaults(image_size=None)
    network = options.add_model(parser, known=ARCHITECTURES)
    network.set_defaults(architecture="")
    network.add_argument(
        "--checkpoint",
        default="",
        metavar="FILE",
        help="metric of phase 1; with a network from elsewhere its weights (default: the library's own)",
    )
    network.add_argument(
        "--features", default="", metavar="FILE", help="feature file, in place of --checkpoint"
    )
    labels = parser.add_argument_group("labels")
    labels.add_argument(
        "--num-labeled",
        type=options.num_labeled,
        nargs="+",
        default=[50, 100, 250, 500, 1000, 2000, 4000, 8000],
        metavar="N",
        help="numbers of labeled images, equally many of each class; all: every known label",
    )
    labels.add_argument(
        "--chunks", type=int, default=1, help="parts of the unlabeled images, a graph each"
    )
    add_algorithm(parser)
    add_graph(parser)
    options.add_compute(parser)
    files = parser.add_argument_group("files")
    files.add_argument("--save-path", default="./checkpoint/pseudos/propagated", help="folder")
    files.add_argument("--report", action="store_true", help="curve, contact sheets, report.html")
    files.add_argument(
        "--no-probabilities",
        action="store_true",
        help="leave pseudo_probs out of the files, as the published ImageNet ones do: 4 bytes for each "
        "image and class, 5 GB for a million images and 1000 classes. Phase 3 does not read them",
    )
    files.add_argument(
        "--work-dir",
        default="",
        metavar="DIR",
        help="where graph and eigenvectors are kept for the next run (SAVE_PATH/work); each is used again "
        "only while it is of the same features and choices, and replaced otherwise. With --chunks it is "
        "emptied of a number of labels that is done. It may be deleted at any time",
    )
    files.add_argument(
        "--fresh",
        action="store_true",
        help="build graph and eigenvectors anew, whatever lies in the work folder or --graph-file",
    )
    return parser


def add_algorithm(parser: argparse.ArgumentParser) -> None:
    """What spreads the labels, and the parameters of each method."""
    group = parser.add_argument_group("algorithm")
    group.add_argument("--method", choices=METHODS, default="nc", help="how labels spread")
    group.add_argument("--k", type=int, default=None, help="knn: neighbors that vote (200)")
    group.add_argument(
        "--knn-temperature", type=float, default=None, help="knn: of the votes (0.1)"
    )
    group.add_argument(
        "--num-eigenvectors",
        type=int,
        default=None,
        help="nc, and filter by eigenvectors: with the constant one (200)",
    )
    group.add_argument(
        "--clamp", action="store_true", default=None, help="nc: labeled images keep their labels"
    )
    group.add_argument(
        "--filter", choices=FILTERS, default=None, help="filter: its kind (smoothed-step)"
    )
    group.add_argument(
        "--filter-by",
        choices=FILTER_BY,
        default=None,
        help="filter: by products with the graph, one column per class; through --num-eigenvectors, "
        "which costs the same for any number of classes but leaves out what lies beyond the last one; or "
        "auto, through eigenvectors where that is much cheaper and leaves out 1%% at most (products)",
    )
    group.add_argument(
        "--cutoff", type=float, default=None, help="filter smoothed-step: eigenvalue kept (0.2)"
    )
    group.add_argument(
        "--degree", type=int, default=None, help="filter smoothed-step: sharpness (40)"
    )
    group.add_argument("--time", type=float, default=None, help="filter heat: of diffusion (20)")
    group.add_argument("--power", type=int, default=None, help="filter powers: exponent (20)")
    group.add_argument(
        "--alpha", type=float, default=None, help="spreading, filter ppr: share kept (0.99)"
    )
    group.add_argument(
        "--class-prior",
        choices=("none", "uniform"),
        default="none",
        help="uniform: as many predicted images in every class",
    )
    group.add_argument(
        "--confidence",
        choices=CONFIDENCES,
        default=None,
        help="measure (default: the method's own)",
    )
    group.add_argument("--temperature", type=float, default=1.0, help="of the probabilities")


def add_graph(parser: argparse.ArgumentParser) -> None:
    """The affinity matrix, the search for its neighbors, the solver for its eigenvectors."""
    group = parser.add_argument_group("graph")
    group.add_argument("--graph", choices=PRESETS, default="cifar", help="affinity matrix")
    group.add_argument(
        "--num-neighbors", type=int, default=None, metavar="K", help="in place of the graph's own"
    )
    group.add_argument(
        "--graph-file",
        default="",
        metavar="FILE",
        help="keep the graph there, in place of the work folder",
    )
    group.add_argument(
        "--self-loops", choices=SELF_LOOPS, default="published", help="edges to itself that count"
    )
    group.add_argument(
        "--search",
        choices=SEARCHES,
        default="auto",
        help="of the neighbors: exact compares all pairs; ivf compares near cells of k-means, finds 97%% "
        "or more and pays from about 250,000 images on a CPU, 4 million on a GPU; faiss, where it is "
        "installed; auto chooses between exact and ivf by the number of images",
    )
    group.add_argument(
        "--search-precision",
        choices=PRECISIONS,
        default="auto",
        help="of the exact search's products; bf16 ranks half as many candidates again in fp32; auto: bf16 "
        "for many images where the hardware multiplies it",
    )
    group.add_argument(
        "--block-mib",
        type=int,
        default=256,
        metavar="MIB",
        help="memory for similarities at a time, of each process; changes speed alone",
    )
    group.add_argument(
        "--solver",
        choices=SOLVERS,
        default="auto",
        help="of the eigenvectors: arpack, one core, for small graphs; block, any device, for large ones; "
        "auto chooses by the number of images",
    )
    group.add_argument(
        "--basis-mib",
        type=int,
        default=4096,
        metavar="MIB",
        help="memory for the basis of the block solver, 16 bytes for each image and eigenvector if it "
        "may; with less it restarts more often, and it never takes less than it needs",
    )


def check_options(args: argparse.Namespace) -> None:
    options.require_positive(args, "chunks", "temperature", "block_mib", "basis_mib")
    external = is_external(args.architecture)
    if bool(args.features) == bool(args.checkpoint or external):
        raise ValueError(
            "give --checkpoint FILE (of phase 1), --features FILE or --arch torchvision:NAME, one of them"
        )
    if external:
        why = "with a network from elsewhere, which has its own"
        options.warn_unused(args, build_parser(), why, "image_size")
    if args.graph_file and args.chunks > 1:
        raise ValueError("--graph-file keeps one graph; it does not go with --chunks")
    run = ALGORITHMS[args.method].run if args.method in ALGORITHMS else cross_validate
    check_parameters(args.method, run, method_parameters(args))
    if not needs_graph(args.method):
        why = f"with --method {args.method}, which needs no graph"
        options.warn_unused(args, build_parser(), why, *GRAPH_OPTIONS)
    if distributed.is_main():
        check_folders(args)


def check_folders(args: argparse.Namespace) -> None:
    """Prove that what will be made can be written, before hours of extraction."""
    options.writable_folder("--save-path", args.save_path)
    if needs_graph(args.method):
        options.writable_folder("--work-dir", work_folder(args))
        if args.graph_file:
            options.writable_folder("--graph-file", Path(args.graph_file).parent)


def work_folder(args: argparse.Namespace) -> Path:
    return Path(args.work_dir or Path(args.save_path) / "work")


def needs_graph(method: str) -> bool:
    return method not in ALGORITHMS or ALGORITHMS[method].needs_graph


def method_parameters(args: argparse.Namespace) -> dict:
    """What the user set for the method, under the names of its own arguments."""
    given = {name: getattr(args, name) for name in PARAMETERS if getattr(args, name) is not None}
    if "knn_temperature" in given:
        given["temperature"] = given.pop("knn_temperature")
    return given


def build_metric(
    args: argparse.Namespace, found: FeatureSet, device, workers, work: Path
) -> EmbeddingGraph:
    """The features with all choices; graph and spectrum are made when they are first asked for."""
    return EmbeddingGraph(
        found.features.to(device),
        args.graph,
        args.num_neighbors,
        args.self_loops,
        search={
            "method": args.search,
            "precision": args.search_precision,
            "block_bytes": args.block_mib * MIB,
        },
        solver={"solver": args.solver, "basis_bytes": args.basis_mib * MIB},
        cache=GraphCache(
            work, args.graph_file, reuse=not args.fresh, log=lambda line: print(line, flush=True)
        ),
        workers=workers,
    )


@contextmanager
def ending_at_once(work: Path) -> Iterator[None]:
    """SIGTERM and Ctrl-C end the process on the spot, with 143 or 130: no stage is saved in its midst.

    Files are written whole or not at all, so that nothing has to be put in order.
    """

    def end(number: int, _: object) -> None:
        if distributed.is_main():
            print(
                f"stopped by {signal.Signals(number).name}; the same command continues with what is in "
                f"{work}",
                file=sys.stderr,
                flush=True,
            )
        os._exit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def label(
    args: argparse.Namespace, metric: EmbeddingGraph, n: int | str, found: FeatureSet, meta: dict
):
    """Pseudo-labels of one number of labels, written part by part; all without probabilities, and where."""
    split = labeled_split(found.targets, n, found.num_classes, args.rng_seed)
    prior = [1 / found.num_classes] * found.num_classes if args.class_prior == "uniform" else None
    if args.chunks > 1:
        own = Path(metric.cache.folder) / str(n)
        metric = replace(metric, cache=replace(metric.cache, folder=own))
    parts = []
    found_parts = pseudo_label_parts(
        metric,
        args.method,
        split,
        found.targets[split.labeled],
        found.num_classes,
        chunks=args.chunks,
        seed=args.rng_seed,
        parameters=method_parameters(args),
        class_prior=prior,
        temperature=args.temperature,
        confidence=args.confidence,
        probabilities=not args.no_probabilities,
        meta=meta,
    )
    for place, part in enumerate(found_parts):
        file = save_part(part, args.save_path, str(n), place, args.chunks)
        parts.append(
            replace(part, probabilities=None)
        )  # those of all numbers of labels would not fit
    if args.chunks > 1:
        file = file.with_name(f"{args.chunks}_*.pth.tar")
        metric.cache.discard()  # ten graphs of each number would fill a disk
    return pseudo_labels.merged(parts), file


def images_of(args: argparse.Namespace, found: FeatureSet) -> DataSet | None:
    """The images that the features are of; None, and a warning, where they are not at hand."""
    side = page.MOST_SIDE if args.dataset == "folder" else extraction.SMALL_SIZE
    try:
        data, _ = build_datasets(
            args.dataset,
            args.data_dir,
            image_size=args.image_size or side,
            num_workers=args.num_workers,
            in_memory=False,  # a folder's images are read where a sheet shows them
        )
    except ValueError as error:
        options.warn(f"no contact sheets without the images: {error}")
        return None
    # a folder's digest tells how it is read, too: features of the same images may have another one
    recorded = "" if args.dataset == "folder" else found.digest
    if len(data) != len(found.features) or (recorded and recorded != data.digest):
        options.warn(
            "no contact sheets: the features are not of this data set (--dataset, --data-dir, --image-size)"
        )
        return None
    return data


def write_report(
    args, folder: Path, done: dict[str, PseudoLabels], curves, meta: dict, data: DataSet | None
) -> None:
    """The curve, contact sheets where there are images, and report.html."""
    pictures, sheets = {}, {}
    if curves:
        plots.accuracy_coverage(curves, args.method).savefig(folder / "curve.png", dpi=120)
        pictures["curve.png"] = "Precision of the most confident share"
    for name, pseudo in tqdm(done.items(), desc="contact sheets", leave=False, disable=None):
        if data is not None:
            written = page.write_sheets(pseudo, data, folder / f"sheets_{name}")
            sheets[name] = [(c, f"sheets_{name}/{file}", n) for c, file, n in written]
    facts = {"method": args.method, "graph": args.graph, "git commit": meta["git_commit"]}
    facts |= {"data digest": meta["data_digest"], "seed of the split": args.rng_seed}
    page.write_page(
        folder / "report.html",
        title="Pseudo-labels",
        facts=facts,
        curves=curves,
        pictures=pictures,
        sheets=sheets,
    )
    print(f"report: {folder / 'report.html'}")


def row(args, n: int | str, pseudo: PseudoLabels, curve: Curve | None, seconds: float, file) -> str:
    """A line of the table."""
    shown = "       ?%      ?%" if curve is None else f"{curve.overall:8.2f}%  {curve.auc:5.2f}%"
    chosen = ", ".join(pseudo.meta["propagation"].get("chosen", ()))
    line = f"{len(pseudo.labeled):6d}  {shown}  {seconds:7.1f}  {file}"
    return line + (f"  {args.method}: {chosen}" if chosen else "")


def label_all(args: argparse.Namespace, metric: EmbeddingGraph, found: FeatureSet, meta: dict):
    """Pseudo-labels of every number of labels, their curves and results; prints the table."""
    done, curves, results = {}, {}, {}
    if needs_graph(args.method) and args.chunks == 1:
        metric.affinity  # noqa: B018 - made here, so that the table has the time of the labels
    print("labels  precision     AUC  seconds  file")
    for n in args.num_labeled:
        start = time.perf_counter()
        pseudo, file = label(args, metric, n, found, meta)
        seconds = time.perf_counter() - start
        done[str(n)], results[str(n)] = pseudo, {"seconds": seconds}
        curve = accuracy_coverage(pseudo, found.targets)
        if curve is not None:
            curves[len(pseudo.labeled)] = curve
            results[str(n)] |= {"precision": curve.overall, "auc": curve.auc}
        print(row(args, n, pseudo, curve, seconds, file), flush=True)
    return done, curves, results


def main(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    # 1. Features: read, or extracted once and kept beside the checkpoint
    check_options(args)
    work, folder = work_folder(args), Path(args.save_path)
    with ending_at_once(work):
        device = devices.select(args.gpus, args.precision, deterministic=args.deterministic)
        found = extraction.load_or_extract(
            features=args.features,
            checkpoint_file=args.checkpoint,
            architecture=args.architecture,
            dataset=args.dataset,
            data_dir=args.data_dir,
            image_size=args.image_size,
            num_workers=args.num_workers,
            device=device,
        )
        if not distributed.is_main():
            del found  # rank 0 hands out what is needed
            serve(device.torch_device)
            return {}

        # 2. Propagation; the graph and its spectrum serve every number of labels
        with lead(device.torch_device) as workers:
            meta = provenance.record(vars(args), found.digest)
            meta["classes"] = list(found.classes)
            shape = f"{len(found.features)} x {found.features.shape[1]}"
            print(f"{shape} features, {found.num_classes} classes", flush=True)
            metric = build_metric(args, found, device.torch_device, workers, work)
            done, curves, results = label_all(args, metric, found, meta)

        # 3. What they look like
        record = {"results": results, "meta": meta}
        write_whole(json.dumps(record, indent=1).encode(), folder / "results.json")
        if args.report:
            write_report(args, folder, done, curves, meta, images_of(args, found))
        return results


if __name__ == "__main__":
    warnings.simplefilter("default", UserWarning)
    options.run(main, build_parser())
