"""Options of phase 2: the algorithm that spreads labels, the graph, the search and the solver."""

import argparse
from collections.abc import Sequence
from typing import Any

from lib.cli import declared
from lib.graph.affinity import PRESETS
from lib.graph.filters import FILTERS
from lib.graph.laplacian import SELF_LOOPS
from lib.graph.neighbors import METHODS as SEARCHES
from lib.graph.neighbors import PRECISIONS
from lib.graph.spectrum import SOLVERS
from lib.labels.confidence import CONFIDENCES
from lib.propagation import METHODS
from lib.propagation.normalized_cut import FILTER_BY

# Parameters of single algorithms, which the method receives only where the user sets them.
PARAMETERS = {  # name of the option: name of the parameter
    "k": "k",
    "knn_temperature": "temperature",
    "num_eigenvectors": "num_eigenvectors",
    "clamp": "clamp",
    "filter": "filter",
    "filter_by": "filter_by",
    "cutoff": "cutoff",
    "degree": "degree",
    "time": "time",
    "power": "power",
    "alpha": "alpha",
}
GRAPH_OPTIONS = (
    "graph",
    "num_neighbors",
    "graph_file",
    "self_loops",
    "search",
    "search_precision",
    "block_mib",
    "solver",
    "basis_mib",
    "work_dir",
    "fresh",
)


def method_parameters(args: argparse.Namespace) -> dict[str, Any]:
    """Collect what the user set for the method, under the names of its parameters."""
    given = {PARAMETERS[name]: getattr(args, name) for name in PARAMETERS}
    return {name: value for name, value in given.items() if value is not None}


def class_prior(args: argparse.Namespace, num_classes: int) -> Sequence[float] | None:
    """Return the class shares that --class-prior asks for; None where it asks for nothing."""
    return [1 / num_classes] * num_classes if args.class_prior == "uniform" else None


def add_labels(parser: argparse.ArgumentParser) -> None:
    """Add the numbers of labels, and the parts of the unlabeled images."""
    labels = parser.add_argument_group("labels")
    labels.add_argument(
        "--num-labeled",
        type=declared.num_labeled,
        nargs="+",
        default=[50, 100, 250, 500, 1000, 2000, 4000, 8000],
        metavar="N",
        help="numbers of labeled images, equally many of each class; all: every known label",
    )
    labels.add_argument(
        "--chunks",
        type=declared.positive_int,
        default=1,
        help="parts of the unlabeled images, each with its own graph",
    )


def add_algorithm(parser: argparse.ArgumentParser) -> None:
    """Add the choice of an algorithm, and the parameters of each."""
    group = parser.add_argument_group("algorithm")
    group.add_argument("--method", choices=METHODS, default="nc", help="how labels spread")
    group.add_argument("--k", type=declared.positive_int, help="knn: neighbors that vote (200)")
    group.add_argument(
        "--knn-temperature",
        type=declared.positive_float,
        help="knn: temperature of the votes (0.1)",
    )
    group.add_argument(
        "--num-eigenvectors",
        type=declared.positive_int,
        help="nc, and filter by eigenvectors: their number with the constant one (200)",
    )
    group.add_argument(
        "--clamp", action="store_true", default=None, help="nc: labeled images keep their labels"
    )
    group.add_argument("--filter", choices=FILTERS, help="filter: its kind (smoothed-step)")
    group.add_argument(
        "--filter-by",
        choices=FILTER_BY,
        help="filter: by products with the graph, one column per class; through --num-eigenvectors, "
        "which costs the same for any number of classes but leaves out what lies beyond the last one; or "
        "auto, through eigenvectors where that is much cheaper and leaves out 1%% at most (products)",
    )
    group.add_argument(
        "--cutoff",
        type=declared.positive_float,
        help="filter smoothed-step: largest eigenvalue kept (0.2)",
    )
    group.add_argument(
        "--degree",
        type=declared.positive_int,
        help="filter smoothed-step: degree, its sharpness (40)",
    )
    group.add_argument(
        "--time", type=declared.positive_float, help="filter heat: time of diffusion (20)"
    )
    group.add_argument(
        "--power", type=declared.not_negative_int, help="filter powers: exponent (20)"
    )
    group.add_argument(
        "--alpha",
        type=declared.open_fraction,
        help="spreading, filter ppr: share that goes on along the edges (0.99)",
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
        help="measure of confidence (default: the method's own)",
    )
    group.add_argument(
        "--temperature",
        type=declared.positive_float,
        default=1.0,
        help="temperature of probabilities and confidence",
    )


def add_graph(parser: argparse.ArgumentParser) -> None:
    """Add the choices of the affinity matrix, the neighbor search and the eigenvector solver."""
    group = parser.add_argument_group("graph")
    group.add_argument("--graph", choices=PRESETS, default="cifar", help="affinity matrix")
    group.add_argument(
        "--num-neighbors",
        type=declared.positive_int,
        metavar="K",
        help="neighbors of each image, in place of the graph's own number",
    )
    group.add_argument(
        "--graph-file",
        default="",
        metavar="FILE",
        help="file that keeps the graph, in place of the work folder",
    )
    group.add_argument(
        "--self-loops",
        choices=SELF_LOOPS,
        default="published",
        help="whether the edge of an image to itself counts",
    )
    group.add_argument(
        "--search",
        choices=SEARCHES,
        default="auto",
        help="search of the neighbors: exact compares all pairs; ivf compares near cells of k-means, finds "
        "97%% or more and pays from about 250,000 images on a CPU, 4 million on a GPU; faiss, where it is "
        "installed; auto chooses between exact and ivf by the number of images",
    )
    group.add_argument(
        "--search-precision",
        choices=PRECISIONS,
        default="auto",
        help="precision of the exact search's products; bf16 ranks half as many candidates more in fp32; "
        "auto: bf16 for many images where the hardware multiplies it",
    )
    group.add_argument(
        "--block-mib",
        type=declared.positive_int,
        default=256,
        metavar="MIB",
        help="memory of each process for similarities at a time; changes speed alone",
    )
    group.add_argument(
        "--solver",
        choices=SOLVERS,
        default="auto",
        help="solver of the eigenvectors: arpack, one core, for small graphs; block, any device, for large "
        "ones; auto chooses by the number of images",
    )
    group.add_argument(
        "--basis-mib",
        type=declared.positive_int,
        default=4096,
        metavar="MIB",
        help="memory for the basis of the block solver, which takes 16 bytes for each image and "
        "eigenvector if it may; with less it restarts more often, and it never takes less than it needs",
    )


def add_files(parser: argparse.ArgumentParser) -> None:
    """Add the folders and files that the results and the work go to."""
    files = parser.add_argument_group("files")
    files.add_argument(
        "--save-path", default="./checkpoint/pseudos/propagated", help="folder of the results"
    )
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
        help="folder that keeps graph and eigenvectors for the next run (SAVE_PATH/work); each is used again "
        "only while it is of the same features and choices, and replaced otherwise. With --chunks the files "
        "of a number of labels are removed when it is done. The folder may be deleted at any time",
    )
    files.add_argument(
        "--fresh",
        action="store_true",
        help="compute graph and eigenvectors anew, whatever lies in the work folder or --graph-file",
    )
