"""Options of phase 2: the features, the algorithm that spreads labels, the graph, search and solver."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from lib.cli import declared
from lib.cli.embedding import Embedding
from lib.graph.affinity import PRESETS
from lib.graph.filters import FILTERS
from lib.graph.laplacian import SELF_LOOPS
from lib.graph.neighbors import METHODS as SEARCHES
from lib.graph.neighbors import PRECISIONS
from lib.graph.spectrum import SOLVERS
from lib.labels.confidence import CONFIDENCES
from lib.labels.split import parse_num_labeled
from lib.propagation import METHODS
from lib.propagation.normalized_cut import FILTER_BY
from lib.runtime.option import (
    NOT_NEGATIVE,
    OPEN_FRACTION,
    POSITIVE,
    option,
    options_of,
)
from lib.training.shared_settings import Compute

MOST_EFFORT = 10_000  # products with the graph, to which these parameters are proportional


@dataclass(frozen=True)
class _Rows(Embedding):
    GROUP: ClassVar[str] = "network"

    normalize: str = option(
        "on",
        choices=("on", "off"),
        help="whether the rows of --features are scaled to unit length; off takes them as they are, and "
        "their products in place of cosines, as the published code does",
    )


@dataclass(frozen=True)
class _Algorithm:
    GROUP: ClassVar[str] = "algorithm"

    method: str = option("nc", choices=METHODS, help="how labels spread")
    chunks: int = option(
        1, limit=POSITIVE, help="parts of the unlabeled images, each with its own graph"
    )
    class_prior: str = option(
        "none",
        choices=("none", "uniform"),
        help="uniform: as many predicted images in every class",
    )
    confidence: str | None = option(
        None, choices=CONFIDENCES, help="measure of confidence (default: the method's own)"
    )
    temperature: float = option(
        1.0, limit=POSITIVE, help="temperature of probabilities and confidence"
    )
    calibration: str = option(
        "on",
        choices=("on", "off"),
        help="whether the probabilities get another temperature, fitted by cross-validation on the labeled "
        "images, so that they are right as often as they say; off leaves them as published. Labels and "
        "confidence are the same in both. auto and ensemble are calibrated anyway, their confidence too",
    )
    estimate_gain: bool = option(
        False,
        help="estimate by cross-validation on the labeled images what the pseudo-labels gain a classifier, "
        "for --pseudo-ratio auto in phase 3. Labels are spread again for each fold, up to ten times",
    )


@dataclass(frozen=True)
class _Parameters:
    """Parameters of single algorithms, which the method receives only where the user sets them."""

    GROUP: ClassVar[str] = "parameters of an algorithm"

    k: int | None = option(None, limit=POSITIVE, help="knn: neighbors that vote (200)")
    knn_temperature: float | None = option(
        None, limit=POSITIVE, help="knn: temperature of the votes (0.1)"
    )
    num_eigenvectors: int | None = option(
        None,
        limit=POSITIVE,
        help="nc, and filter by eigenvectors: their number with the constant one (200)",
    )
    clamp: bool | None = option(None, help="nc: labeled images keep their labels")
    filter: str | None = option(None, choices=FILTERS, help="filter: its kind (smoothed-step)")
    filter_by: str | None = option(
        None,
        choices=FILTER_BY,
        help="filter: by products with the graph, one column per class; through --num-eigenvectors, "
        "which costs the same for any number of classes but leaves out what lies beyond the last one; or "
        "auto, through eigenvectors where that is much cheaper and leaves out 1%% at most (products)",
    )
    cutoff: float | None = option(
        None, limit=POSITIVE, help="filter smoothed-step: largest eigenvalue kept (0.2)"
    )
    degree: int | None = option(
        None,
        limit=replace(POSITIVE, most=MOST_EFFORT),
        help="filter smoothed-step: degree, its sharpness (40)",
    )
    time: float | None = option(
        None, limit=replace(POSITIVE, most=MOST_EFFORT), help="filter heat: time of diffusion (20)"
    )
    power: int | None = option(
        None, limit=replace(NOT_NEGATIVE, most=MOST_EFFORT), help="filter powers: exponent (20)"
    )
    alpha: float | None = option(
        None,
        limit=OPEN_FRACTION,
        help="spreading, filter ppr: share that goes on along the edges (0.99)",
    )


@dataclass(frozen=True)
class Graph:
    GROUP: ClassVar[str] = "graph"

    graph: str = option("cifar", choices=PRESETS, help="affinity matrix")
    num_neighbors: int | None = option(
        None,
        limit=POSITIVE,
        metavar="K",
        help="neighbors of each image, in place of the graph's own number",
    )
    graph_file: str = option(
        "", metavar="FILE", help="file that keeps the graph, in place of the work folder"
    )
    self_loops: str = option(
        "published", choices=SELF_LOOPS, help="whether the edge of an image to itself counts"
    )
    search: str = option(
        "auto",
        choices=SEARCHES,
        help="search of the neighbors: exact compares all pairs; ivf compares near cells of k-means, finds "
        "97%% or more and pays from about 250,000 images on a CPU, 4 million on a GPU; faiss, where it is "
        "installed; auto chooses between exact and ivf by the number of images",
    )
    search_precision: str = option(
        "auto",
        choices=PRECISIONS,
        help="precision of the exact search's products; bf16 ranks half as many candidates more in fp32; "
        "auto: bf16 for many images where the hardware multiplies it",
    )
    block_mib: int | None = option(
        None,
        limit=POSITIVE,
        metavar="MIB",
        help="memory of each process for similarities at a time; changes speed alone (256, on a GPU 1024)",
    )
    solver: str = option(
        "auto",
        choices=SOLVERS,
        help="solver of the eigenvectors: arpack, one core, for small graphs; block, any device, for large "
        "ones; auto chooses by the number of images",
    )
    basis_mib: int = option(
        4096,
        limit=POSITIVE,
        metavar="MIB",
        help="memory for the basis of the block solver, which takes 16 bytes for each image and "
        "eigenvector if it may; with less it restarts more often, and it never takes less than it needs",
    )


@dataclass(frozen=True)
class _Files:
    GROUP: ClassVar[str] = "files"

    save_path: str = option("./checkpoint/pseudos/propagated", help="folder of the results")
    report: bool = option(False, help="curve, contact sheets, report.html")
    no_probabilities: bool = option(
        False,
        help="leave pseudo_probs out of the files, as the published ImageNet ones do: 4 bytes for each "
        "image and class, 5 GB for a million images and 1000 classes. Phase 3 reads them with --consistency "
        "and with --calibrated-weights",
    )
    work_dir: str = option(
        "",
        metavar="DIR",
        help="folder that keeps graph and eigenvectors for the next run (SAVE_PATH/work); each is used again "
        "only while it is of the same features and choices, and replaced otherwise. With --chunks the files "
        "of a number of labels are removed when it is done. The folder may be deleted at any time",
    )
    fresh: bool = option(
        False,
        help="compute graph and eigenvectors anew, whatever lies in the work folder or --graph-file",
    )


@dataclass(frozen=True)
class _Propagation(_Rows, _Algorithm, _Parameters, Graph, Compute, _Files):
    """Every option but --num-labeled, which takes several values."""


GRAPH_OPTIONS = (*options_of(Graph), "work_dir", "fresh")  # without effect where there is no graph


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of phase 2."""
    declared.add_options(parser, _Propagation)["algorithm"].add_argument(
        "--num-labeled",
        type=declared.checked(parse_num_labeled, POSITIVE),
        nargs="+",
        default=[50, 100, 250, 500, 1000, 2000, 4000, 8000],
        metavar="N",
        help="numbers of labeled images, equally many of each class; all: every known label; FILE.csv: the "
        "images of a list that scripts/choose.py made",
    )


def method_parameters(args: argparse.Namespace) -> dict[str, Any]:
    """Collect what the user set for the method, under the names of its parameters."""
    given = {name.removeprefix("knn_"): getattr(args, name) for name in options_of(_Parameters)}
    return {name: value for name, value in given.items() if value is not None}


def class_prior(args: argparse.Namespace, num_classes: int) -> Sequence[float] | None:
    """Return the class shares that --class-prior asks for; None where it asks for nothing."""
    return [1 / num_classes] * num_classes if args.class_prior == "uniform" else None
