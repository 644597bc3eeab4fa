"""Networks of torchvision and timm as metrics: their head is removed, and they return pooled features.

Names are `torchvision:resnet50`, `torchvision:resnet50@IMAGENET1K_V1` (one of several published weights)
and, if timm is installed, `timm:vit_small_patch14_dinov2.lvd142m`. Weights come from a local file, or are
downloaded into the library's own cache. The model's own configuration says how images are preprocessed.
"""

import difflib
import hashlib
import importlib
import math
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models as zoo
from torchvision.transforms import InterpolationMode

from datasets.images import Stats
from datasets.resizing import Resizing
from datasets.transforms import Augmentation
from lib.files import checkpoint
from lib.files.weights import load_weights, model_weights
from lib.runtime.distributed import main_first
from models.layers import EmbeddingNet

LIBRARIES = ("torchvision", "timm")
# Networks without a linear last layer, or that refuse weights without torch's version record.
UNSUITABLE = ("squeezenet", "mnasnet")
# Arguments that torchvision sets when it loads the weights, which lib/files/weights.py does here.
BESIDE_WEIGHTS = {
    name: {"transform_input": True, "init_weights": False} for name in ("googlenet", "inception_v3")
}
OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")  # names before PyTorch 0.4


class Preprocessing(Augmentation):
    """The preprocessing of a network: images of any size are resized, center cropped and normalized.

    Args:
        image_size: side of the input in pixels.
        resize: length of the shorter side before the crop; with `squash`, of both sides.
        interpolation: method of resizing, always with antialiasing.
        stats: mean and standard deviation per channel.
    """

    def __init__(
        self,
        image_size: int,
        resize: int,
        interpolation: InterpolationMode,
        stats: Stats,
        *,
        squash: bool = False,
    ) -> None:
        super().__init__((), stats)
        self.image_size, self.resize = image_size, resize
        self.interpolation, self.squash, self.stats = interpolation, squash, stats

    def __call__(self, images: Tensor, params: Collection[Tensor] = ()) -> Tensor:
        """Preprocess B x 3 x H x W bytes into B x 3 x S x S float32."""
        assert not params, "evaluation must not augment"
        resizing = Resizing(self.resize, self.interpolation, self.squash)
        return super().__call__(resizing(images, self.image_size))

    def __str__(self) -> str:
        cut = f"{self.resize} -> {self.image_size} pixels, {self.interpolation.value}"
        return f"{cut}{', squashed' if self.squash else ''}, mean and std {self.stats}"


class _NoHead(nn.Identity):
    """Identity that replaces the classifier head."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features


class PooledFeatures(EmbeddingNet):
    """A network without its head, with the interface of `EmbeddingNet`; finetuning sets another `head`."""

    head_name = "head"
    normalize = False

    def __init__(self, trunk: nn.Module, out_features: int) -> None:
        super().__init__()
        self.trunk, self.head = trunk, _NoHead(out_features)

    def pooled(self, images: Tensor) -> Tensor:
        return self.trunk(images)


@dataclass(frozen=True)
class Backbone:
    """A network of a library, ready to extract features with.

    Attributes:
        model: network in evaluation mode, from B x 3 x S x S images to B x D pooled features.
        preprocessing: transform from stored images to the input of `model`.
    """

    model: PooledFeatures
    preprocessing: Preprocessing

    @property
    def num_features(self) -> int:
        return self.model.head.out_features

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that change with the weights or the preprocessing."""
        running = hashlib.sha256(str(self.preprocessing).encode())
        for name, value in self.model.state_dict().items():
            running.update(name.encode())
            running.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return running.hexdigest()[:16]


def is_external(architecture: str) -> bool:
    """Return whether a name is for `build` rather than `models.build_model`."""
    return architecture.partition(":")[0] in LIBRARIES and ":" in architecture


def build(architecture: str, path: str | Path = "", *, weighted: bool = True) -> Backbone:
    """Build a network by its name.

    Args:
        architecture: `torchvision:NAME`, `torchvision:NAME@WEIGHTS` or `timm:NAME`.
        path: local file with a state dict, with or without the head; empty takes the library's weights,
            which are downloaded the first time.
        weighted: False leaves the weights random, before those of a checkpoint of ours are loaded.

    Raises:
        ValueError: if the name is unknown, the library is not installed, or the weights cannot be loaded or
            do not fit.
    """
    library, _, name = architecture.partition(":")
    if library not in LIBRARIES or not name:
        raise ValueError(f"{architecture!r}: write torchvision:NAME or timm:NAME")
    make = _from_torchvision if library == "torchvision" else _from_timm
    found = make(name, path, weighted)
    found.model.eval()
    return found


def classifier(
    architecture: str, num_classes: int, path: str | Path = "", *, weighted: bool = True
) -> PooledFeatures:
    """Build a network as `build` does, with a new last layer of `num_classes` outputs."""
    found = build(architecture, path, weighted=weighted)
    found.model.head = nn.Linear(found.num_features, num_classes)
    return found.model


def _require_known(library: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=5)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"{library} has no image classifier {name!r}{hint}")


def _from_torchvision(name: str, path: str | Path, weighted: bool) -> Backbone:
    name, _, wanted = name.partition("@")
    _require_known("torchvision", name, zoo.list_models(module=zoo))
    if name.startswith(UNSUITABLE):
        raise ValueError(
            f"torchvision:{name} cannot be used as a metric here; take another network"
        )
    published = zoo.get_model_weights(name)
    if wanted and wanted not in published.__members__:
        raise ValueError(
            f"{name} has no weights {wanted!r}; take {', '.join(published.__members__)}"
        )
    weights = published[wanted] if wanted else published.DEFAULT
    trunk = zoo.get_model(name, weights=None, **_construction(name, weights))
    head = [n for n, module in trunk.named_modules() if isinstance(module, nn.Linear)][-1]
    num_features = trunk.get_submodule(head).in_features
    trunk.set_submodule(head, nn.Identity())
    if weighted:
        _load(trunk, path or _cached(weights.url), (head,))
    view = weights.transforms()
    stats = tuple(view.mean), tuple(view.std)
    preprocessing = Preprocessing(view.crop_size[0], view.resize_size[0], view.interpolation, stats)
    return Backbone(PooledFeatures(trunk, num_features), preprocessing)


def _construction(name: str, weights: Any) -> dict[str, Any]:
    """Return the constructor arguments of the network that these weights belong to."""
    if name.startswith("vit_"):  # the number of position embeddings follows from the size
        return {"image_size": weights.meta["min_size"][0]}
    return BESIDE_WEIGHTS.get(name, {})


def _load(trunk: nn.Module, path: str | Path, heads: Collection[str]) -> None:
    """Load every weight of the trunk from a file that may hold the heads in addition, and nothing else."""
    state = checkpoint.load_dict(path)
    named = model_weights(state, path)
    weights = {OLD_DENSENET.sub(r"\1\2", name): value for name, value in named.items()}
    ends = tuple(f"{head}." for head in heads)
    kept = {name: value for name, value in weights.items() if not name.startswith(ends)}
    trunk.head_name = next(iter(heads), "")
    load_weights(trunk, kept, source=path)


def _cached(url: str) -> Path:
    """Return the file of an address in torch's cache, the one of torchvision, downloading it if needed."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    with main_first():
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            _download(url, path)
    return path


def _download(url: str, path: Path) -> None:
    """Download weights whose file name ends in the first digits of their sha256."""
    digest = re.search(r"-([0-9a-f]{8,})\.", path.name)
    try:
        torch.hub.download_url_to_file(
            url, str(path), digest and digest[1], progress=sys.stderr.isatty()
        )
    except (OSError, HTTPException, RuntimeError) as error:
        raise ValueError(
            f"the weights {url} cannot be downloaded: {error}; fetch that file elsewhere and name it as "
            "the local weight file"
        ) from error


def _import_timm() -> ModuleType:
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise ValueError(
            "timm:NAME needs the package timm, which is not installed: pip install timm"
        ) from error


def _from_timm(name: str, path: str | Path, weighted: bool) -> Backbone:
    timm = _import_timm()
    _require_known("timm", name.split(".")[0], timm.list_models())
    try:
        with main_first():
            trunk = timm.create_model(name, pretrained=weighted and not path, num_classes=0)
    except Exception as error:  # several packages raise a dozen kinds for a file that is not there
        raise ValueError(
            f"timm:{name} cannot be loaded: {error}; without a network, fetch its weights elsewhere and "
            "name them as the local weight file"
        ) from error
    config = timm.data.resolve_model_data_config(trunk)
    if weighted and path:
        heads = trunk.pretrained_cfg.get("classifier") or ()
        _load(trunk, path, (heads,) if isinstance(heads, str) else tuple(heads))
    num_features = getattr(trunk, "head_hidden_size", trunk.num_features)
    return Backbone(PooledFeatures(trunk, num_features), timm_preprocessing(name, config))


def timm_preprocessing(name: str, config: Mapping[str, Any]) -> Preprocessing:
    """Return the preprocessing of timm's evaluation transform with this data configuration.

    Raises:
        ValueError: if the inputs are not square RGB images, or are cropped in another way.
    """
    channels, height, width = config["input_size"]
    if channels != 3 or height != width or config["crop_mode"] not in ("center", "squash"):
        raise ValueError(f"timm:{name} takes images in a way that is not known here ({config})")
    return Preprocessing(
        height,
        math.floor(height / config["crop_pct"]),
        InterpolationMode(config["interpolation"]),
        (tuple(config["mean"]), tuple(config["std"])),
        squash=config["crop_mode"] == "squash",
    )
