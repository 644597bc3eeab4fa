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
from models.layers import EmbeddingNet, linear_head

LIBRARIES = ("torchvision", "timm")
# Networks without a linear last layer, or that refuse weights without torch's version record.
UNSUITABLE = ("squeezenet", "mnasnet")
# Arguments that torchvision sets when it loads the weights, which lib/files/weights.py does here.
BESIDE_WEIGHTS = {
    name: {"transform_input": True, "init_weights": False} for name in ("googlenet", "inception_v3")
}
OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")  # names before PyTorch 0.4


class Preprocessing(Augmentation):
    """The preprocessing of a network: images of any size are resized, center cropped and normalized."""

    def __init__(self, image_size: int, resizing: Resizing, stats: Stats) -> None:
        super().__init__((), stats)
        self.image_size, self.resizing, self.stats = image_size, resizing, stats

    def __call__(self, images: Tensor, params: Collection[Tensor] = ()) -> Tensor:
        """Preprocess B x 3 x H x W bytes into B x 3 x S x S float32."""
        assert not params, "evaluation must not augment"
        return super().__call__(self.resizing(images, self.image_size))

    def __str__(self) -> str:
        how = self.resizing
        cut = f"{how.shorter} -> {self.image_size} pixels, {how.interpolation.value}"
        return f"{cut}{', squashed' if how.squash else ''}, mean and std {self.stats}"


class PooledFeatures(EmbeddingNet):
    """A network without its head; finetuning sets another `head`."""

    head_name = "head"
    normalize = False

    def __init__(self, trunk: nn.Module, out_features: int) -> None:
        super().__init__()
        self.trunk, self.head = trunk, linear_head(out_features, 0)

    def pooled(self, images: Tensor) -> Tensor:
        return self.trunk(images)


@dataclass(frozen=True)
class Backbone:
    """A network in evaluation mode, from B x 3 x S x S images to B x D pooled features."""

    model: PooledFeatures
    preprocessing: Preprocessing

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
        path: local file with a state dict, with or without the head; empty takes the library's weights,
            which are downloaded the first time.
        weighted: False leaves the weights random, before those of a checkpoint of ours are loaded.

    Raises:
        ValueError: if the name is unknown, the library is not installed, or the weights do not fit.
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
    model = build(architecture, path, weighted=weighted).model
    model.head = nn.Linear(model.head.out_features, num_classes)
    return model


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
    resizing = Resizing(view.resize_size[0], view.interpolation)
    preprocessing = Preprocessing(view.crop_size[0], resizing, (tuple(view.mean), tuple(view.std)))
    return Backbone(PooledFeatures(trunk, num_features), preprocessing)


def _construction(name: str, weights: Any) -> dict[str, Any]:
    if name.startswith("vit_"):  # the number of position embeddings follows from the size
        return {"image_size": weights.meta["min_size"][0]}
    return BESIDE_WEIGHTS.get(name, {})


def _load(trunk: nn.Module, path: str | Path, heads: Collection[str]) -> None:
    """Load every weight of the trunk from a file that may hold the heads in addition, and nothing else."""
    named = model_weights(checkpoint.load_dict(path), path)
    weights = {OLD_DENSENET.sub(r"\1\2", name): value for name, value in named.items()}
    ends = tuple(f"{head}." for head in heads)
    kept = {name: value for name, value in weights.items() if not name.startswith(ends)}
    trunk.head_name = next(iter(heads), "")
    load_weights(trunk, kept, source=path)


def _cached(url: str) -> Path:
    """Return the file of an address in torch's cache, the one of torchvision, downloading it if needed."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    # the name ends in the first digits of the file's sha256
    digest = re.search(r"-([0-9a-f]{8,})\.", path.name)
    with main_first():
        if path.is_file():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(
                url, str(path), digest and digest[1], progress=sys.stderr.isatty()
            )
        except (OSError, HTTPException, RuntimeError) as error:
            raise ValueError(
                f"the weights {url} cannot be downloaded: {error}; fetch that file elsewhere and name it as "
                "the local weight file"
            ) from error
    return path


def _from_timm(name: str, path: str | Path, weighted: bool) -> Backbone:
    try:
        timm = importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise ValueError(
            "timm:NAME needs the package timm, which is not installed: pip install timm"
        ) from error
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
    """Return that of timm's evaluation transform; ValueError unless it crops square RGB images centrally."""
    channels, height, width = config["input_size"]
    if channels != 3 or height != width or config["crop_mode"] not in ("center", "squash"):
        raise ValueError(f"timm:{name} takes images in a way that is not known here ({config})")
    shorter, squash = math.floor(height / config["crop_pct"]), config["crop_mode"] == "squash"
    resizing = Resizing(shorter, InterpolationMode(config["interpolation"]), squash)
    return Preprocessing(height, resizing, (tuple(config["mean"]), tuple(config["std"])))
