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

--num-labeled also takes lists of images, such as scripts/choose.py makes: `chosen.csv` gives
`chosen.pth.tar`. A class that no image of the list has is named, and no image gets it.

From a feature file instead of a checkpoint: --features FILE, whose rows are scaled to unit length unless
--normalize off. Images are read at the size that the checkpoint was trained on, or at --image-size.

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
import math
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

from datasets import DataSet
from lib.cli import checks, declared, embedding, start
from lib.cli.propagation import GRAPH_OPTIONS, add_options, class_prior, method_parameters
from lib.features.extraction import FeatureSet
from lib.files import provenance
from lib.files.atomic import write_whole
from lib.labels import pseudo_labels
from lib.labels.gain import KEY, Gain
from lib.labels.pseudo_labels import PseudoLabels
from lib.labels.split import labeled_split, name_of
from lib.propagation import EmbeddingGraph, calibrate, estimate_gain, propagate
from lib.propagation.algorithms import ALGORITHMS
from lib.propagation.chunks import cut_graph, save_part
from lib.propagation.embedding_graph import GraphCache
from lib.propagation.methods import check_parameters
from lib.propagation.workers import lead, serve
from lib.report import page, plots
from lib.report.curves import ERROR_HEADS, HEADS, Curve, accuracy_coverage, error_cells, table_row
from lib.runtime import devices, distributed, terminal

MIB = 2**20
NOT_CALIBRATED = "probabilities as published: no class has two labels, so none can be held out"


def build_parser() -> declared.Parser:
    parser = declared.parser(__doc__)
    add_options(parser)
    return parser


def check_options(args: argparse.Namespace) -> None:
    embedding.check_source(args, build_parser())
    if not args.features:
        why = "without --features: a network's embeddings are unit vectors"
        checks.warn_unused(args, build_parser(), why, "normalize")
    checks.check_lists(*args.num_labeled)
    if args.graph_file and args.chunks > 1:
        raise ValueError("--graph-file keeps one graph; it does not go with --chunks")
    check_parameters(args.method, method_parameters(args))
    if args.method not in ALGORITHMS:
        why = f"with --method {args.method}, whose probabilities are calibrated anyway"
        checks.warn_unused(args, build_parser(), why, "calibration")
    if not needs_graph(args.method):
        why = f"with --method {args.method}, which needs no graph"
        checks.warn_unused(args, build_parser(), why, *GRAPH_OPTIONS)
    if distributed.is_main():
        check_folders(args)


def check_folders(args: argparse.Namespace) -> None:
    """Check that the results can be written, before hours of extraction."""
    checks.writable_folder("--save-path", args.save_path)
    if needs_graph(args.method):
        checks.writable_folder("--work-dir", work_folder(args))
        if args.graph_file:
            checks.writable_folder("--graph-file", Path(args.graph_file).parent)


def work_folder(args: argparse.Namespace) -> Path:
    return Path(args.work_dir or Path(args.save_path) / "work")


def needs_graph(method: str) -> bool:
    return method not in ALGORITHMS or ALGORITHMS[method].needs_graph


def build_graph(
    args: argparse.Namespace, found: FeatureSet, device, workers, work: Path
) -> EmbeddingGraph:
    """Put the features and all choices together; graph and spectrum are made when they are first needed."""
    return EmbeddingGraph(
        found.features.to(device),
        args.graph,
        args.num_neighbors,
        args.self_loops,
        search={
            "method": args.search,
            "precision": args.search_precision,
            "block_bytes": args.block_mib and args.block_mib * MIB,
        },
        solver={"solver": args.solver, "basis_bytes": args.basis_mib * MIB},
        cache=GraphCache(
            work, args.graph_file, reuse=not args.fresh, log=lambda line: print(line, flush=True)
        ),
        workers=workers,
    )


@contextmanager
def ending_at_once(work: Path) -> Iterator[None]:
    """Let SIGTERM, Ctrl-C and SIGHUP end the process at once in a `with` block, with 128 + their number.

    Files are written whole or not at all, so that nothing has to be cleaned up.
    """

    def end(number: int, _: object) -> None:
        try:
            if distributed.is_main():
                print(
                    f"stopped by {signal.Signals(number).name}; the same command continues with what is in "
                    f"{work}",
                    file=sys.stderr,
                    flush=True,
                )
        finally:  # the terminal may be gone
            os._exit(128 + number)

    before = {number: signal.signal(number, end) for number in terminal.ending_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def label(
    args: argparse.Namespace, graph: EmbeddingGraph, n: int | str, found: FeatureSet, meta: dict
):
    """Make and write the pseudo-labels of one number of labels, part by part.

    Returns:
        All of them without probabilities, and their file.
    """
    seed = args.rng_seed
    split = labeled_split(found.targets, n, found.num_classes, seed, images=found)
    if args.chunks > 1:
        own = Path(graph.cache.folder) / name_of(n)
        graph = replace(graph, cache=replace(graph.cache, folder=own))
    parts, labels, num_classes = [], found.targets[split.labeled], found.num_classes
    options = method_parameters(args) | {"class_prior": class_prior(args, num_classes)}
    ranked = {"confidence": args.confidence, "temperature": args.temperature}
    calibration = gain = None
    for place, chunk in enumerate(cut_graph(graph, split, args.chunks, seed)):
        known = (chunk.graph, args.method, chunk.split, labels, num_classes)
        # the chunks are drawn alike: one speaks for all
        if args.calibration == "on" and place == 0:
            calibration = calibrate(*known, at=args.temperature, **options)
        if args.estimate_gain and place == 0:
            gain = estimate_gain(*known, seed=seed, calibration=calibration, **ranked, **options)
        part = propagate(*known, **options).pseudo_labels(
            chunk.split,
            meta,
            calibration=calibration,
            gain=gain,
            probabilities=not args.no_probabilities,
            **ranked,
        )
        part = chunk.restored(part)
        file = save_part(part, args.save_path, n, place, args.chunks)
        # The probabilities of all numbers of labels would not fit into memory.
        parts.append(replace(part, probabilities=None))
    if args.chunks > 1:
        file = file.with_name(f"{args.chunks}_*.pth.tar")
        graph.cache.discard()  # ten graphs of each number of labels would fill a disk
    return pseudo_labels.merged(parts), file


def write_report(
    args,
    graph: EmbeddingGraph,
    done: dict[str, PseudoLabels],
    curves,
    meta: dict,
    data: DataSet | None,
) -> None:
    """Write the curve, contact sheets where there are images, and report.html."""
    folder, pictures, sheets = Path(args.save_path), {}, {}
    if curves:
        plots.accuracy_coverage(curves, args.method).savefig(folder / "curve.png", dpi=120)
        pictures["curve.png"] = "Precision of the most confident share"
        plots.reliability(curves).savefig(folder / "reliability.png", dpi=120)
        pictures["reliability.png"] = "How often labels are right, over their probability"
    for name, pseudo in tqdm(done.items(), desc="contact sheets", leave=False, disable=None):
        if data is not None:
            written = page.write_sheets(pseudo, data, folder / f"sheets_{name}")
            sheets[name] = [(c, f"sheets_{name}/{file}", n) for c, file, n in written]
    facts = {"method": args.method, "graph": args.graph, "git commit": meta["git_commit"]}
    facts |= {"data digest": meta["data_digest"], "seed of the split": args.rng_seed}
    # each chunk has eigenvectors of its own, whose line is printed
    if not math.isnan(graph.residual):
        facts["largest residual of an eigenvector"] = f"{graph.residual:.1e}"
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
    """Format a line of the table."""
    chosen = ", ".join(pseudo.meta["propagation"].get("chosen", ()))
    line = f"{table_row(len(pseudo.labeled), curve)}{error_cells(curve)}  {seconds:7.1f}  {file}"
    if args.calibration == "on" and args.method in ALGORITHMS:
        found = pseudo.meta.get("calibration")
        line += f"  temperature {found:.2f}" if found else f"  {NOT_CALIBRATED}"
    return line + (f"  {args.method}: {chosen}" if chosen else "")


def label_all(args: argparse.Namespace, graph: EmbeddingGraph, found: FeatureSet, meta: dict):
    """Make the pseudo-labels of every number of labels, and print a table of their precision.

    Returns:
        Pseudo-labels and results by number of labels or name of their list, curves by their number.
    """
    done, curves, results = {}, {}, {}
    if needs_graph(args.method) and args.chunks == 1:
        graph.affinity  # noqa: B018 - made here, so that the table shows the time of the labels alone
    print(f"{HEADS}{ERROR_HEADS}  seconds  file")
    for n in args.num_labeled:
        start = time.perf_counter()
        pseudo, file = label(args, graph, n, found, meta)
        seconds = time.perf_counter() - start
        name = name_of(n)
        done[name], results[name] = pseudo, {"seconds": seconds}
        curve = accuracy_coverage(pseudo, found.targets)
        if curve is not None:
            curves[len(pseudo.labeled)] = curve
            results[name] |= {"precision": curve.overall, "auc": curve.auc}
            results[name] |= {"auc_by_entropy": curve.auc_by_entropy}
            errors = {"ece_published": curve.published.error, "ece": curve.calibrated.error}
            results[name] |= errors | {"calibration": pseudo.meta.get("calibration")}
        print(row(args, n, pseudo, curve, seconds, file), flush=True)
        if args.estimate_gain:
            results[name]["gain"] = pseudo.meta[KEY]
            print(f"         {Gain.read(pseudo.meta)}", flush=True)
    return done, curves, results


def main(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    # 1. Features: read, or extracted once and kept beside the checkpoint
    check_options(args)
    work, folder = work_folder(args), Path(args.save_path)
    with ending_at_once(work):
        device = devices.select(args.gpus, args.precision, deterministic=args.deterministic)
        found = embedding.load(args, device, normalize=args.normalize == "on")
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
            graph = build_graph(args, found, device.torch_device, workers, work)
            done, curves, results = label_all(args, graph, found, meta)

        # 3. What they look like
        record = {"results": results, "meta": meta}
        write_whole(json.dumps(record, indent=1).encode(), folder / "results.json")
        if args.report:
            data, _ = embedding.images_of(args, found)
            write_report(args, graph, done, curves, meta, data)
        return results


if __name__ == "__main__":
    warnings.simplefilter("default", UserWarning)
    start.run(main, build_parser())
