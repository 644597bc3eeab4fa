"""Groups of options that phase 1 and phase 3 share, and other scripts in part.

`lib.training.settings` makes the options of each training script from them.
"""

from dataclasses import dataclass
from typing import ClassVar

from datasets import DATASETS
from lib.loading.batches import LOADERS
from lib.runtime.devices import PRECISIONS
from lib.runtime.option import (
    BATCH_SIZE,
    NOT_NEGATIVE,
    NUM_WORKERS,
    POSITIVE,
    RATE,
    SEED,
    SIDE,
    invariant,
    option,
)
from lib.runtime.profiling import COMPILE_MODES, WARM_UP
from lib.training.cuda_graph import CHOICES
from lib.training.optimizer import SCHEDULES
from models import SMALL_ARCHITECTURES


@dataclass(frozen=True)
class Data:
    """The images, and who reads them."""

    GROUP: ClassVar[str] = "data"

    dataset: str = invariant(
        "cifar10",
        choices=DATASETS,
        help="cifar10 and cifar100 are downloaded at the first start; patches comes with the installation; "
        "folder is your own images: DIR/train/<class>/*, DIR/test/<class>/* and, for images without a "
        "label, DIR/unlabeled/**",
    )
    data_dir: str = option("./data", metavar="DIR", help="folder of the data set")
    image_size: int = invariant(32, limit=SIDE, metavar="PIXELS", help="side of the square images")
    num_workers: int = option(
        2,
        "-j",
        limit=NUM_WORKERS,
        metavar="N",
        help="processes on each machine that decode image files, or that augment with --loader workers; "
        "0: the training process does it",
    )


@dataclass(frozen=True)
class Network:
    GROUP: ClassVar[str] = "network"

    architecture: str = invariant("wrn-28-2", "--arch", metavar="NAME", help=SMALL_ARCHITECTURES)


@dataclass(frozen=True)
class Optimization:
    """Stochastic gradient descent."""

    GROUP: ClassVar[str] = "optimization"

    lr: float = invariant(
        0.03,
        limit=RATE,
        metavar="RATE",
        help="learning rate at its highest, which --lr-scheduler lowers",
    )
    lr_scheduler: str = invariant(
        "cosine",
        choices=SCHEDULES,
        help="how the learning rate falls: in steps; along a cosine; along cosines that restart, each twice "
        "as long as the one before; or up and down once (one-cycle), for short runs. In phase 1 all but the "
        "last keep it constant within an epoch, as published",
    )
    batch_size: int = invariant(
        128,
        "-b",
        limit=BATCH_SIZE,
        metavar="IMAGES",
        help="images of a batch, in total over all GPUs",
    )
    weight_decay: float = invariant(
        5e-4, "--wd", limit=NOT_NEGATIVE, metavar="FACTOR", help="L2 penalty on the weights"
    )
    iter_size: int = invariant(
        1,
        limit=POSITIVE,
        metavar="BATCHES",
        help="average the gradients of so many batches for one optimizer step (gradient accumulation), for "
        "large batches in little memory",
    )


@dataclass(frozen=True)
class Compute:
    """The device, its precision, and the seed of random numbers."""

    GROUP: ClassVar[str] = "computing"

    gpus: str = option(
        "0",
        metavar="DEVICES",
        help="CUDA devices, one process each (0,1,2,3, or all: every visible one), or cpu (cpu,cpu: two "
        "processes). Without CUDA, numbers and all mean one process on the CPU. Under torchrun every process "
        "takes the device of its LOCAL_RANK",
    )
    precision: str = option(
        "auto",
        choices=PRECISIONS,
        help="number format of the forward pass; auto: bf16 autocast where the hardware multiplies it fast, "
        "else fp32",
    )
    rng_seed: int = invariant(0, limit=SEED, metavar="SEED", help="seed of all random numbers")
    deterministic: bool = option(
        False,
        help="let a GPU compute the same bits whenever the command is repeated, at some loss of speed; a CPU "
        "always does",
    )


@dataclass(frozen=True)
class TrainingCompute(Compute):
    """How training computes, beside where."""

    loader: str = invariant(
        LOADERS[0],
        choices=LOADERS,
        help="where training images are augmented. device: in whole batches on the device; workers: one by "
        "one in --num-workers processes, by torchvision as in the published code, which is slower. Both draw "
        "from the same distribution, but not the same random numbers",
    )
    cuda_graph: str = option(
        CHOICES[0],
        choices=CHOICES,
        help="launch all kernels of a training step at once, as a CUDA graph, with the same results: a small "
        "network trains several times faster. auto: on a single GPU, for images in its memory; on: for "
        "images read from files too",
    )
    compile: str = option(
        "",
        choices=COMPILE_MODES,
        bare=COMPILE_MODES[0],
        help="compile the network with torch.compile: about a minute at the start, then faster steps on a "
        "GPU. reduce-overhead records the kernels as CUDA graphs too, which helps small networks. Results "
        "differ in the last bits",
    )
    profile: int = option(
        0,
        limit=NOT_NEGATIVE,
        metavar="STEPS",
        help=f"trace so many steps with torch.profiler, after {WARM_UP} to warm up: write the trace to the "
        "folder of the log and print the costliest operations; 0: no trace",
    )


@dataclass(frozen=True)
class Stopping:
    GROUP: ClassVar[str] = "stopping"

    stop_after: int = option(
        0,
        limit=NOT_NEGATIVE,
        metavar="STEPS",
        help="save and stop after so many steps of this start; --resume auto continues. 0: train to the end. "
        "SIGTERM, Ctrl-C, SIGHUP and a closed output stop a run in the same way, after the current step; a "
        "log that cannot be written is told once and left out",
    )
