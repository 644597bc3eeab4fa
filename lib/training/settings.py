"""Every option of the four training scripts, declared once: default, help, limits, and resume invariants.

`PretrainingSettings` is phase 1 and `FinetuningSettings` phase 3; each is made of groups of options, and each
script has the class that adds its own options or defaults. Other scripts share some of the groups. A field is
named as its option. The scripts build their command lines from these classes (`lib.cli.declared`).
"""

from dataclasses import dataclass
from typing import ClassVar

from datasets import DATASETS
from lib.labels.split import parse_num_labeled
from lib.loading.batches import LOADERS
from lib.objectives.memory_bank import LOSSES
from lib.runtime.devices import PRECISIONS
from lib.runtime.option import (
    FRACTION,
    MOMENTUM,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_FRACTION,
    SEED,
    invariant,
    option,
    redeclared,
)
from lib.runtime.profiling import COMPILE_MODES, WARM_UP
from lib.training.optimizer import SCHEDULES
from models import IMAGENET_ARCHITECTURES, SMALL_ARCHITECTURES

# ------------------------------------------------------------------ both phases


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
    image_size: int = invariant(
        32, limit=POSITIVE, metavar="PIXELS", help="side of the square images"
    )
    num_workers: int = option(
        2,
        "-j",
        limit=NOT_NEGATIVE,
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
        limit=POSITIVE,
        metavar="RATE",
        help="learning rate at its highest, which --lr-scheduler lowers",
    )
    lr_scheduler: str = invariant(
        "cosine",
        choices=SCHEDULES,
        help="how the learning rate falls: in steps; along a cosine; along cosines that restart, each twice "
        "as long as the one before; or up and down once (one-cycle), for short runs",
    )
    batch_size: int = invariant(
        128,
        "-b",
        limit=POSITIVE,
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
        help="CUDA devices, one process each (0,1,2,3), or cpu (cpu,cpu: two processes). Without CUDA, "
        "numbers mean one process on the CPU. Under torchrun every process takes the device of its "
        "LOCAL_RANK",
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
        "SIGTERM and Ctrl-C stop a run in the same way, after the current step",
    )


# ------------------------------------------------------------------ phase 1


@dataclass(frozen=True)
class MetricNetwork(Network):
    low_dim: int = invariant(128, limit=POSITIVE, metavar="D", help="dimensions of the embedding")


@dataclass(frozen=True)
class PretrainingOptimization(Optimization):
    momentum: float = invariant(
        0.9, limit=MOMENTUM, metavar="SHARE", help="momentum of the gradients"
    )
    epochs: int = invariant(
        600, limit=POSITIVE, metavar="N", help="passes over the training images"
    )


@dataclass(frozen=True)
class InstanceDiscrimination:
    """Each image against the rows of all others in the memory bank."""

    GROUP: ClassVar[str] = "memory bank"

    nce_k: int = invariant(
        0,
        limit=NOT_NEGATIVE,
        metavar="K",
        help="negatives to draw for each image; 0: compare with all images, by a full softmax",
    )
    nce_t: float = invariant(
        0.1, limit=POSITIVE, metavar="T", help="temperature that cosine similarities are divided by"
    )
    nce_m: float = invariant(
        0.5,
        limit=MOMENTUM,
        metavar="SHARE",
        help="momentum of the memory bank: share of a row that is kept when it is updated",
    )
    nce_loss: str = invariant(
        "nce",
        choices=LOSSES,
        help="loss over --nce-k negatives: noise-contrastive estimation as published, or softmax "
        "cross-entropy (infonce)",
    )
    nce_z: str = invariant(
        "moving-average",
        choices=("moving-average", "first-batch"),
        help="normalizer of NCE: a moving average with momentum 0.99, or estimated once from the first batch "
        "as published",
    )


@dataclass(frozen=True)
class PretrainingSettings(
    Data, MetricNetwork, PretrainingOptimization, InstanceDiscrimination, TrainingCompute, Stopping
):
    """Options of phase 1, with the defaults of `unsupervised/cifar.py`."""

    GROUP: ClassVar[str] = "files"

    model_dir: str = option(
        "./checkpoint/instance_cifar10",
        "--modelDir",
        metavar="DIR",
        help="folder of the checkpoints",
    )
    log_dir: str = option(
        "./tensorboard/instance_cifar10",
        "--logDir",
        metavar="DIR",
        help="folder of the TensorBoard events and log.jsonl",
    )
    resume: str = option(
        "",
        "-r",
        metavar="FILE",
        help="checkpoint to continue; auto: the newest one in --model-dir, or a new run where there is none",
    )
    test_only: bool = option(
        False,
        help="do not train: measure the kNN accuracy of --resume, on embeddings of all training images that "
        "are computed anew",
    )

    data_dir: str = redeclared(Data, "data_dir", "--dataDir")
    num_workers: int = redeclared(Data, "num_workers", "--workers")
    architecture: str = redeclared(Network, "architecture", "-a")
    lr: float = redeclared(Optimization, "lr", "--learning-rate")


@dataclass(frozen=True)
class CifarPretraining(PretrainingSettings):
    """Options of `unsupervised/cifar.py`."""

    GROUP: ClassVar[str] = "augmentation"

    transform_crop: str = invariant(
        "RandomResizedCrop",
        choices=("RandomResizedCrop", "PadCrop"),
        help="how images are cropped; PadCrop: reflect-pad by an eighth of the side, then crop",
    )
    transform_scale: float = invariant(
        0.2,
        limit=POSITIVE_FRACTION,
        metavar="SHARE",
        help="smallest share of the area that RandomResizedCrop keeps",
    )


@dataclass(frozen=True)
class ImageNetPretraining(PretrainingSettings):
    """Options of `unsupervised/imagenet.py`, with its defaults."""

    GROUP: ClassVar[str] = "ImageNet"

    val_batch_size: int = option(
        128,
        "-vb",
        limit=POSITIVE,
        metavar="IMAGES",
        help="images of a batch when measuring, in total over all GPUs",
    )
    print_freq: int = option(
        10,
        "-p",
        limit=NOT_NEGATIVE,
        metavar="STEPS",
        help="steps between lines of the terminal; 0: one line for each epoch",
    )
    save_freq: int = option(
        0,
        limit=NOT_NEGATIVE,
        metavar="EPOCHS",
        help="epochs between checkpoints that are never replaced; 0: none",
    )
    start_epoch: int = option(
        0, limit=NOT_NEGATIVE, metavar="EPOCH", help="first epoch of a new run, counted from 0"
    )
    auto_resume: bool = option(False, help="the same as --resume auto")
    evaluate: bool = option(
        False,
        "-e",
        help="do not train: measure the nearest-neighbor accuracies of --resume, on the memory bank in that "
        "checkpoint",
    )
    pretrained: str = option(
        "",
        metavar="FILE",
        help="weights to start from; the last layer is used where the file is of phase 1 and its shape fits",
    )

    dataset: str = "folder"
    data_dir: str = ""
    image_size: int = 224
    num_workers: int = 4
    architecture: str = redeclared(
        PretrainingSettings,
        "architecture",
        default="resnet18",
        help=", ".join(IMAGENET_ARCHITECTURES),
    )
    lr_scheduler: str = "multi-step"
    batch_size: int = 256
    weight_decay: float = 1e-4
    epochs: int = 200
    nce_k: int = 4096
    nce_t: float = 0.07
    model_dir: str = "./checkpoint/instance_imagenet"
    log_dir: str = "./tensorboard/instance_imagenet"


# ------------------------------------------------------------------ phase 3


@dataclass(frozen=True)
class ClassifierNetwork(Network):
    finetune: bool = invariant(
        False, help="train the last layer only; all others keep their weights"
    )
    input_gray: bool = invariant(
        False, help="turn images gray, for a network of the colorization task"
    )
    pretrained: str = option(
        "",
        metavar="FILE",
        help="weights to start from: a metric of phase 1, whose last layer is left out, or a classifier, "
        "whose last layer is used where it is for the same classes",
    )
    resume: str = option(
        "",
        "-r",
        metavar="FILE",
        help="checkpoint of this run to continue, or weights as for --pretrained; auto: the newest "
        "checkpoint of this run, or a new run where there is none",
    )


@dataclass(frozen=True)
class FinetuningOptimization(Optimization):
    lr: float = 0.01
    max_iters: int = invariant(
        500000, limit=POSITIVE, metavar="STEPS", help="optimizer steps of the run"
    )
    criterion: str = invariant(
        "CrossEntropyLoss",
        choices=("CrossEntropyLoss", "MultiMarginLoss"),
        help="loss, as torch.nn names it",
    )


@dataclass(frozen=True)
class Labels:
    """Which labels to train on: true ones and pseudo-labels."""

    GROUP: ClassVar[str] = "labels"

    num_labeled: int | str = invariant(
        500,
        parse=parse_num_labeled,
        limit=POSITIVE,
        metavar="N",
        help="images whose true labels are used, equally many of each class; all: every image that has one",
    )
    pseudo_file: str = option(
        "",
        metavar="FILE",
        help="pseudo-labels of phase 2; without them or --pseudo-dir the true labels are all there is (the "
        "supervised baseline)",
    )
    pseudo_dir: str = option(
        "",
        metavar="DIR",
        help="pseudo-labels of phase 2 in chunks: DIR/10_0.pth.tar ... DIR/10_9.pth.tar",
    )
    pseudo_ratio: float = invariant(
        1,
        limit=FRACTION,
        metavar="SHARE",
        help="share of the pseudo-labels to use, the most confident ones",
    )
    pseudo_per_chunk: bool = invariant(
        False,
        help="take --pseudo-ratio of every chunk, as published, instead of one ranking of all chunks",
    )
    class_balanced: bool = invariant(
        False, help="take --pseudo-ratio of every class, instead of one ranking of all classes"
    )
    confidence_weighted: bool = invariant(
        False, help="weight the loss of a pseudo-labeled image by its confidence, as in the paper"
    )


@dataclass(frozen=True)
class FinetuningSettings(
    Data, ClassifierNetwork, FinetuningOptimization, Labels, TrainingCompute, Stopping
):
    """Options of phase 3, with the defaults of `cifar-semi.py`."""

    GROUP: ClassVar[str] = "files"

    model_root: str = option(
        "./checkpoint/cifar10-semi", metavar="DIR", help="folder of the runs' checkpoints"
    )
    log_root: str = option(
        "./tensorboard/cifar10-semi",
        metavar="DIR",
        help="folder of the runs' TensorBoard events and log.jsonl",
    )
    exp_name: str = option(
        "exp", metavar="NAME", help="name of the run: a folder in --model-root and in --log-root"
    )
    eval: bool = option(
        False, help="do not train: measure the test accuracy of --resume or --pretrained"
    )
    eval_freq: int = option(
        500, limit=POSITIVE, metavar="STEPS", help="steps between tests, which save a checkpoint"
    )
    print_freq: int = option(
        100, limit=POSITIVE, metavar="STEPS", help="steps between lines of the terminal and the log"
    )

    data_dir: str = redeclared(Data, "data_dir", "--data_dir", "--dataDir")


@dataclass(frozen=True)
class ImageNetFinetuning(FinetuningSettings):
    """Options of `imagenet-semi.py`, with its defaults."""

    dataset: str = "folder"
    data_dir: str = ""
    image_size: int = 224
    num_workers: int = 32
    architecture: str = redeclared(
        Network, "architecture", default="resnet18", help=", ".join(IMAGENET_ARCHITECTURES)
    )
    resume: str = redeclared(
        ClassifierNetwork,
        "resume",
        help="checkpoint of this run to continue; auto: the newest one, or a new run where there is none",
    )
    lr_scheduler: str = "multi-step"
    batch_size: int = 256
    weight_decay: float = 0.0
    max_iters: int = 50000
    num_labeled: int | str = 13000
    pseudo_ratio: float = 0.1
    gpus: str = "0,1,2,3"
    print_freq: int = 10
    model_root: str = "./checkpoint/imagenet"
    log_root: str = "./tensorboard/imagenet"
