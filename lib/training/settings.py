"""Every option of the four training scripts, declared once: default, help, limits, and resume invariants.

`PretrainingSettings` is phase 1 and `FinetuningSettings` phase 3; each is made of groups of options, and each
script has the class that adds its own options or defaults. A field is named as its option. The scripts build
their command lines from these classes (`lib.cli.declared`).
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from datasets.transforms import CROPS, RESIZED_CROP
from lib.labels.gain import parse_ratio
from lib.labels.split import parse_num_labeled
from lib.objectives.consistency import WEIGHTS
from lib.objectives.memory_bank import LOSSES
from lib.runtime.option import (
    BATCH_SIZE,
    FRACTION,
    MOMENTUM,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_FRACTION,
    invariant,
    option,
    redeclared,
)
from lib.training.optimizer import OPTIMIZERS
from lib.training.shared_settings import Data, Network, Optimization, Stopping, TrainingCompute
from models import IMAGENET_ARCHITECTURES

RAND_AUGMENT = "rand-augment"
INSTANCE, TWO_VIEW, PATCHES_TCR = OBJECTIVES = ("instance", "two-view", "patches-tcr")
# ------------------------------------------------------------------ phase 1


@dataclass(frozen=True)
class Objective:
    GROUP: ClassVar[str] = "objective"

    objective: str = invariant(
        INSTANCE,
        choices=OBJECTIVES,
        help="what the metric learns from. instance: each image against the rows of all others in a memory "
        "bank, as published; two-view: two augmentations of an image against the rest of a large batch "
        "(SimCLR); patches-tcr: many small crops of an image that agree, while images spread out (EMP-SSL). "
        "The last two train through a projection head that is not kept; the embedding is what the network "
        "gives before it",
    )
    views: int = invariant(
        1,
        limit=replace(POSITIVE, most=256),
        metavar="K",
        help="augmentations of each image in a step; with instance, its row moves by their mean",
    )


@dataclass(frozen=True)
class MetricNetwork(Network):
    low_dim: int = invariant(
        128, limit=replace(POSITIVE, most=2**16), metavar="D", help="dimensions of the embedding"
    )


@dataclass(frozen=True)
class PretrainingOptimization(Optimization):
    optimizer: str = invariant(
        "sgd",
        choices=OPTIMIZERS,
        help="lars: SGD with a rate for each layer, for large batches",
    )
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
        0.1,
        limit=POSITIVE,
        metavar="T",
        help="temperature that cosine similarities are divided by in the loss and, with --objective "
        "instance, in the kNN monitor, which takes 0.1 otherwise; a checkpoint is measured with its own",
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
    Data,
    Objective,
    MetricNetwork,
    PretrainingOptimization,
    InstanceDiscrimination,
    TrainingCompute,
    Stopping,
):
    """Options of phase 1, with the defaults of `unsupervised/cifar.py`."""

    GROUP: ClassVar[str] = "files"
    # defaults that go with the value of an option
    PRESETS: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {
        "objective": {
            TWO_VIEW: {"views": 2, "batch_size": 512, "lr": 0.12, "nce_t": 0.5, "epochs": 100},
            PATCHES_TCR: {
                "views": 20,
                "batch_size": 100,
                "optimizer": "lars",
                "lr": 0.3,
                "weight_decay": 1e-4,
                "epochs": 30,
                "transform_scale": 0.25,
            },
        }
    }

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
        RESIZED_CROP,
        choices=CROPS,
        help="how images are cropped; PadCrop: reflect-pad by an eighth of the side, then crop",
    )
    transform_scale: float = invariant(
        0.2,
        limit=POSITIVE_FRACTION,
        metavar="SHARE",
        help="smallest share of the area that RandomResizedCrop keeps; the share of every crop with "
        "patches-tcr",
    )


@dataclass(frozen=True)
class ImageNetPretraining(PretrainingSettings):
    """Options of `unsupervised/imagenet.py`, with its defaults."""

    GROUP: ClassVar[str] = "ImageNet"

    val_batch_size: int = option(
        128,
        "-vb",
        limit=BATCH_SIZE,
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
    gpus: str = "all"
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
        False,
        help="turn images gray, for a network of the colorization task: 0.2125 red + 0.7154 green + 0.0721 "
        "blue in [0, 1], not normalized",
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
    warmup: int = invariant(
        0,
        limit=NOT_NEGATIVE,
        metavar="STEPS",
        help="steps over which the learning rate rises to that of --lr-scheduler",
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
        help="images whose true labels are used, equally many of each class; all: every image that has "
        "one; FILE.csv: the images of a list that scripts/choose.py made",
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
    pseudo_ratio: float | str = invariant(
        1,
        parse=parse_ratio,
        limit=FRACTION,
        metavar="SHARE",
        help="share of the pseudo-labels to use, the most confident ones; auto: the one, maybe 0, that "
        "cross-validation found best on the labeled images (--estimate-gain in phase 2)",
    )
    pseudo_per_chunk: bool = invariant(
        False,
        help="take --pseudo-ratio of all chunks, equally many of each, as published, instead of one ranking "
        "of all chunks",
    )
    class_balanced: bool = invariant(
        False, help="take --pseudo-ratio of every class, instead of one ranking of all classes"
    )
    confidence_weighted: bool = invariant(
        False, help="weight the loss of a pseudo-labeled image by its confidence, as in the paper"
    )
    calibrated_weights: bool = invariant(
        False,
        help="weight it by the calibrated probability that its label is right, instead of the confidence",
    )
    labeled_share: float = invariant(
        0.0,
        limit=FRACTION,
        metavar="SHARE",
        help="share of true labels in every batch, however many pseudo-labels there are; 0: as they are "
        "drawn, as published",
    )


@dataclass(frozen=True)
class Consistency:
    """Beside the published finetuning: one target for an image, however it is augmented."""

    GROUP: ClassVar[str] = "consistency"

    consistency: str = invariant(
        "",
        choices=WEIGHTS,
        bare=WEIGHTS[0],
        help="train on every pseudo-labeled image, in a strongly augmented view and one mixed with another "
        "image (CutMix), toward a target from the graph's probabilities and, more and more, the network's "
        "own for a weak view. An image counts by how sure its target is: by a Gaussian (softmatch), or above "
        "a threshold that follows the network (freematch)",
    )
    unlabeled_ratio: int = invariant(
        4,
        limit=replace(POSITIVE, most=1024),
        metavar="N",
        help="with --consistency, unlabeled images in a batch for each labeled one",
    )
    strong_augmentation: str = invariant(
        RAND_AUGMENT,
        choices=(RAND_AUGMENT, "none"),
        help="what is added to crop and flip in the strong view of --consistency. none: nothing, for images "
        "such as textures, whose class the brightness, the sharpness or the angle tells",
    )
    ema: bool = invariant(
        False,
        help="test and save the moving average of the weights (decay 0.999) in place of the last ones",
    )
    head_init: str = invariant(
        "random",
        choices=("random", "class-means"),
        help="start of the last layer. class-means: linear discriminant analysis of what the network before "
        "it gives, a classifier by the means of the classes over labeled and pseudo-labeled images",
    )


@dataclass(frozen=True)
class FinetuningSettings(
    Data, ClassifierNetwork, FinetuningOptimization, Labels, Consistency, TrainingCompute, Stopping
):
    """Options of phase 3, with the defaults of `cifar-semi.py`."""

    GROUP: ClassVar[str] = "files"
    PRESETS: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {
        "consistency": {
            kind: {
                "batch_size": 64,
                "max_iters": 20000,
                "lr": 0.03,
                "warmup": 500,
                "ema": True,
                "head_init": "class-means",
            }
            for kind in WEIGHTS
        }
    }

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
