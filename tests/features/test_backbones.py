"""Networks of torchvision and timm as metrics: the library's own features, from files, in its own view."""

import hashlib
import sys
from dataclasses import replace
from pathlib import Path
from shutil import copy
from types import ModuleType, SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from runs import make_folder
from torch import nn
from torchvision import models as zoo
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms import InterpolationMode

from datasets import build_datasets
from datasets.images import IMAGENET_STATS, ImageSet
from datasets.resizing import Resizing
from lib.cli.start import load_script
from lib.features import backbones, extraction
from lib.features.extraction import extract
from lib.features.networks import load_network
from lib.files import checkpoint
from lib.labels import pseudo_files
from lib.runtime.devices import select
from models.layers import l2_normalize


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """State dicts of small torchvision networks with random weights, heads and running statistics."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(3)
    for name in ("resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"):
        model = zoo.get_model(name, weights=None)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
        checkpoint.save(model.state_dict(), folder / f"{name}.pth")
    return folder


def pictures(n: int = 3, height: int = 64, width: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, height, width), generator=generator, dtype=torch.uint8)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "node", "width"),
    [
        ("resnet18", "flatten", 512),
        ("mobilenet_v3_small", "classifier.2", 1024),
        ("shufflenet_v2_x0_5", "mean", 1024),
    ],
)
def test_features_are_those_of_torchvisions_own_extraction_bit_for_bit(files, name, node, width):
    theirs = zoo.get_model(name, weights=None).eval()
    theirs.load_state_dict(checkpoint.load_dict(files / f"{name}.pth"))
    images = torch.randn(2, 3, 64, 64)
    expected = create_feature_extractor(theirs, [node])(images)[node]
    found = backbones.build(f"torchvision:{name}", files / f"{name}.pth")
    assert torch.equal(found.model(images), expected)
    assert found.model.head.out_features == expected.shape[1] == width
    assert not found.model.training


@torch.no_grad()
def test_features_of_a_resnet_are_those_of_fc_as_identity(files):
    theirs = zoo.resnet18(weights=None).eval()
    theirs.load_state_dict(checkpoint.load_dict(files / "resnet18.pth"))
    theirs.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    found = backbones.build("torchvision:resnet18", files / "resnet18.pth")
    assert torch.equal(found.model(images), theirs(images))


@torch.no_grad()
@pytest.mark.parametrize(
    ("wanted", "size", "resize"), [("IMAGENET1K_V1", 224, 256), ("IMAGENET1K_V2", 224, 232)]
)
@pytest.mark.parametrize("shape", [(32, 32), (300, 240)])
def test_preprocessing_is_that_of_torchvisions_weights(
    files, monkeypatch, wanted, size, resize, shape
):
    monkeypatch.setattr(backbones, "_load", lambda *_: None)  # only the configuration is looked at
    found = backbones.build(f"torchvision:resnet50@{wanted}", "any")
    images = pictures(1, *shape)
    picture = Image.fromarray(images[0].permute(1, 2, 0).numpy())
    expected = zoo.ResNet50_Weights[wanted].transforms()(picture)
    steps = (found.preprocessing(images)[0] - expected).abs() * 255
    steps *= torch.tensor(IMAGENET_STATS[1])[:, None, None]
    assert steps.max() < 1.5  # of 255; Pillow and torch round differently here and there
    assert (steps > 0.5).float().mean() < 0.03
    assert found.preprocessing.image_size == size
    assert found.preprocessing.resizing.shorter == resize
    assert found.preprocessing.stats == IMAGENET_STATS


def test_a_network_is_built_as_its_weights_were_trained():
    swag = zoo.ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1  # at 384 pixels, the others at 224
    assert backbones._construction("vit_b_16", swag) == {"image_size": 384}
    theirs = backbones._construction("googlenet", zoo.GoogLeNet_Weights.DEFAULT)
    assert theirs["transform_input"] is True
    assert backbones._construction("resnet18", zoo.ResNet18_Weights.DEFAULT) == {}


@pytest.mark.parametrize("changes", ["none", "module.", "net", "no head", "another head"])
def test_a_weight_file_may_hold_wrappers_and_any_head(files, tmp_path, changes):
    weights = dict(checkpoint.load_dict(files / "resnet18.pth"))
    given = dict(weights)
    if changes == "module.":
        given = {f"module.{name}": value for name, value in weights.items()}
    if changes == "net":
        given = {"net": weights, "epoch": 3}
    if changes == "no head":
        given = {name: value for name, value in weights.items() if not name.startswith("fc.")}
    if changes == "another head":
        given |= {"fc.weight": torch.randn(128, 512), "fc.bias": torch.randn(128)}
    checkpoint.save(given, tmp_path / "x.pth")
    found = backbones.build("torchvision:resnet18", tmp_path / "x.pth")
    for name, value in found.model.trunk.state_dict().items():
        assert torch.equal(value, weights[name])


@pytest.mark.parametrize("changes", ["a layer missing", "a layer too many", "another shape"])
def test_a_weight_file_that_does_not_fit_is_refused(files, tmp_path, changes):
    weights = dict(checkpoint.load_dict(files / "resnet18.pth"))
    if changes == "a layer missing":
        del weights["layer3.0.conv1.weight"]
    if changes == "a layer too many":
        weights["layer5.0.conv1.weight"] = torch.zeros(1)
    if changes == "another shape":
        weights["conv1.weight"] = torch.zeros(64, 3, 3, 3)
    checkpoint.save(weights, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth does not fit"):
        backbones.build("torchvision:resnet18", tmp_path / "x.pth")


def test_densenet_files_of_the_first_releases_are_read(tmp_path):
    small = {"growth_rate": 4, "block_config": (2, 2), "num_init_features": 8}
    model, trunk = zoo.DenseNet(**small), zoo.DenseNet(**small)
    trunk.classifier = nn.Identity()
    old = {
        name.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): value
        for name, value in model.state_dict().items()
    }
    assert old.keys() != model.state_dict().keys()
    checkpoint.save(old, tmp_path / "x.pth")
    backbones._load(trunk, tmp_path / "x.pth", ("classifier",))
    for name, value in trunk.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torchvision:resnet51", "did you mean .*resnet50"),
        ("torchvision:fcn_resnet50", "no image classifier"),
        ("torchvision:squeezenet1_0", "another network"),
        ("torchvision:resnet50@V3", "IMAGENET1K_V1, IMAGENET1K_V2"),
        ("torchvision:", "torchvision:NAME"),
        ("resnet50", "torchvision:NAME"),
    ],
)
def test_unknown_names_are_refused_with_what_there_is(name, words):
    with pytest.raises(ValueError, match=words):
        backbones.build(name)


def test_only_names_with_a_library_are_external():
    assert backbones.is_external("torchvision:resnet50")
    assert backbones.is_external("timm:vit_small_patch14_dinov2")
    for name in ("resnet18", "wrn-28-2", "torchvision", "jax:resnet50"):
        assert not backbones.is_external(name)


def test_the_digest_changes_with_the_weights_and_with_the_view(files, tmp_path):
    path = files / "shufflenet_v2_x0_5.pth"
    first = backbones.build("torchvision:shufflenet_v2_x0_5", path)
    assert backbones.build("torchvision:shufflenet_v2_x0_5", path).digest == first.digest
    weights = dict(checkpoint.load_dict(path))
    weights["conv1.0.weight"] = weights["conv1.0.weight"].clone()
    weights["conv1.0.weight"][0, 0, 0, 0] += 1e-3
    checkpoint.save(weights, tmp_path / "x.pth")
    other = backbones.build("torchvision:shufflenet_v2_x0_5", tmp_path / "x.pth")
    assert other.digest != first.digest
    view = first.preprocessing
    moved = backbones.Preprocessing(
        view.image_size, replace(view.resizing, shorter=300), view.stats
    )
    assert backbones.Backbone(first.model, moved).digest != first.digest


def test_whole_data_sets_are_extracted_as_with_our_own_networks(files):
    found = backbones.build("torchvision:shufflenet_v2_x0_5", files / "shufflenet_v2_x0_5.pth")
    small = backbones.Preprocessing(32, Resizing(36), IMAGENET_STATS)
    images = small(pictures(5, 40, 40))
    as_bytes = ImageSet(
        "x", pictures(5, 32, 32), torch.zeros(5, dtype=torch.int64), ("a",), IMAGENET_STATS
    )
    rows = extract(found.model, as_bytes, select("cpu", "fp32"))
    assert rows.shape == (5, 1024)
    assert images.shape == (5, 3, 32, 32)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(5))


# ---- as the metric of phase 2

NAME = "torchvision:shufflenet_v2_x0_5"


def seventh_pixels(images: torch.Tensor) -> torch.Tensor:
    return images[:, 0, ::7, ::7].flatten(1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder data set of 52 pictures; what is kept goes there too."""
    monkeypatch.chdir(tmp_path)
    return make_folder(tmp_path / "pictures")


@torch.no_grad()
def test_features_of_a_folder_are_those_of_torchvisions_own_preprocessing(
    files, folder, monkeypatch
):
    # every seventh pixel as features: those of a network without training are all alike
    monkeypatch.setattr(backbones.PooledFeatures, "pooled", lambda _, x: seventh_pixels(x))
    weights = files / "shufflenet_v2_x0_5.pth"
    words = {"architecture": NAME, "dataset": "folder", "data_dir": str(folder)}
    words |= {"num_workers": 0, "device": select("cpu", "fp32")}
    found = extraction.load_or_extract(checkpoint_file=weights, **words)
    assert (found.num_classes, found.classes) == (4, ("blue", "gray", "green", "red"))
    view = zoo.ShuffleNet_V2_X0_5_Weights.DEFAULT.transforms()
    data, _ = build_datasets("folder", folder, in_memory=False)
    for index in (0, 17, 39):
        image = view(Image.open(folder / data.paths[index]).convert("RGB"))[None]
        expected = l2_normalize(seventh_pixels(image))[0]
        steps = (found.features - expected).abs().amax(dim=1)  # one step of 255: about 0.0006
        assert int(steps.argmin()) == index
        assert steps[index] < 0.001
        assert steps.topk(2, largest=False).values[1] > 0.01
    kept = Path("checkpoint/backbones/torchvision_shufflenet_v2_x0_5.folder.features.pth.tar")
    assert kept.is_file()
    monkeypatch.setattr(extraction, "extract", None)
    again = extraction.load_or_extract(checkpoint_file=weights, **words)
    assert torch.equal(again.features, found.features)
    changed = dict(checkpoint.load_dict(weights))
    changed["conv1.0.weight"] = changed["conv1.0.weight"] * 2
    checkpoint.save(changed, "other.pth")
    with pytest.raises(TypeError):  # extracted anew
        extraction.load_or_extract(checkpoint_file="other.pth", **words)


def test_an_architecture_alone_is_enough_for_phase_2(files, folder, monkeypatch, capsys):
    hub = Path("hub/checkpoints")
    hub.mkdir(parents=True)
    address = zoo.ShuffleNet_V2_X0_5_Weights.DEFAULT.url
    copy(files / "shufflenet_v2_x0_5.pth", hub / address.rsplit("/", 1)[1])
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "hub")
    monkeypatch.setattr("datasets.folder.read_images", None)  # never the whole folder in memory
    words = ("--arch", NAME, "--dataset", "folder", "--data-dir", folder, "--image-size", 16)
    words = (*words, "--method", "knn", "--num-labeled", 8, "-j", 0, "--save-path", "out")
    script = load_script("scripts/propagate.py")
    script.main(script.build_parser().parse_args([str(w) for w in (*words, "--report")]))
    assert "--image-size has no effect with a network from elsewhere" in capsys.readouterr().err
    pseudo = pseudo_files.load("out/8.pth.tar")
    assert pseudo.meta["classes"] == ["blue", "gray", "green", "red"]
    train, _ = build_datasets("folder", folder, in_memory=False)
    pseudo.require_fit(len(train), 4, 8, train.digest, train.classes)
    assert len(list(Path("out/sheets_8").iterdir())) == len(pseudo.labels.unique())


def test_features_or_a_backbone_not_both():
    script = load_script("scripts/propagate.py")
    args = script.build_parser().parse_args(["--features", "f", "--arch", NAME])
    with pytest.raises(ValueError, match="one of them"):
        script.main(args)


# ---- weights that the library would download


def test_without_a_file_the_librarys_cache_is_used(files, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cache = tmp_path / "checkpoints"
    cache.mkdir()
    url = zoo.ResNet18_Weights.DEFAULT.url
    (cache / url.rsplit("/", 1)[1]).write_bytes((files / "resnet18.pth").read_bytes())
    monkeypatch.setattr(torch.hub, "urlopen", lambda *_: pytest.fail("a download"))
    images = torch.randn(2, 3, 64, 64)
    cached, given = (
        backbones.build("torchvision:resnet18", path) for path in ("", files / "resnet18.pth")
    )
    assert torch.equal(cached.model(images), given.model(images))


def test_a_download_is_kept_only_if_its_name_tells_its_digest(files, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    data = (files / "resnet18.pth").read_bytes()
    wrong, right = (f"net-{d}.pth" for d in ("0" * 8, hashlib.sha256(data).hexdigest()[:8]))
    for name in (wrong, right):
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match="invalid hash"):
        backbones._cached((tmp_path / wrong).as_uri())
    assert list((tmp_path / "checkpoints").iterdir()) == []
    path = backbones._cached((tmp_path / right).as_uri())
    assert path.read_bytes() == data
    assert [f.name for f in path.parent.iterdir()] == [right]


def test_offline_the_message_says_to_give_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def unreachable(*_):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    with pytest.raises(ValueError, match=r"no route to host.*; fetch that file elsewhere"):
        backbones.build("torchvision:resnet18")


# ---- timm, which the tests do without: what is asked of it, and its configurations


def test_without_timm_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="pip install timm"):
        backbones.build("timm:vit_small_patch14_dinov2")


CONFIG = {
    "input_size": (3, 28, 28),
    "interpolation": "bicubic",
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
    "crop_pct": 0.9,
    "crop_mode": "center",
}


@pytest.fixture
def timm(monkeypatch):
    """A stand-in with the functions that are used, and one small network."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 6, 3), nn.Identity()
            self.num_features = 6
            self.pretrained_cfg = {"classifier": "head"}

        def forward(self, images):
            return self.stem(images).mean(dim=(2, 3))

    def create_model(name, *, pretrained, num_classes):
        assert num_classes == 0
        if pretrained:
            raise FileNotFoundError("no such file in the local cache")
        return Net()

    module = ModuleType("timm")
    module.create_model = create_model
    module.list_models = lambda: ["tiny_net", "other_net"]
    module.data = SimpleNamespace(resolve_model_data_config=lambda model: CONFIG)
    monkeypatch.setitem(sys.modules, "timm", module)
    return Net


def test_a_timm_network_takes_a_local_file_and_its_own_configuration(timm, tmp_path):
    own = timm()
    head = {"head.weight": torch.zeros(10, 6), "head.bias": torch.zeros(10)}
    checkpoint.save(own.state_dict() | head, tmp_path / "x.pth")
    found = backbones.build("timm:tiny_net.some_tag", tmp_path / "x.pth")
    images = torch.randn(2, 3, 28, 28)
    assert torch.equal(found.model(images), own(images))
    assert found.model.head.out_features == 6
    view = found.preprocessing
    assert (view.image_size, view.resizing) == (28, Resizing(31, InterpolationMode.BICUBIC))
    assert view.stats == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def test_timm_without_its_weights_says_to_give_a_file(timm):
    with pytest.raises(ValueError, match="no such file in the local cache; without a network"):
        backbones.build("timm:tiny_net")
    with pytest.raises(ValueError, match="did you mean tiny_net"):
        backbones.build("timm:tiny_nett")


@pytest.mark.parametrize("mode", ["center", "squash"])
def test_the_view_of_a_timm_configuration_is_that_of_pillow(mode):
    view = backbones.timm_preprocessing("x", CONFIG | {"crop_mode": mode})
    noise = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    picture = np.array(Image.fromarray(noise).resize((45, 60), Image.Resampling.BICUBIC))
    size = (31, 31) if mode == "squash" else (31, int(31 * 60 / 45))
    resized = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
    top, left = (round((side - 28) / 2) for side in resized.shape[:2])
    cut = resized[top : top + 28, left : left + 28].astype(np.float64) / 255
    expected = (cut - CONFIG["mean"]) / CONFIG["std"]
    found = view(torch.from_numpy(picture).permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy()
    steps = np.abs(found - expected) * np.array(CONFIG["std"]) * 255
    assert steps.max() < 1.5  # Pillow rounds once more, between the two directions


@pytest.mark.parametrize(
    "changes", [{"input_size": (1, 28, 28)}, {"input_size": (3, 28, 32)}, {"crop_mode": "border"}]
)
def test_views_that_are_not_known_are_refused(changes):
    with pytest.raises(ValueError, match="not known here"):
        backbones.timm_preprocessing("x", CONFIG | changes)


def test_a_network_from_elsewhere_is_finetuned_continued_measured_and_read_for_predictions(
    files, tmp_path, monkeypatch
):
    monkeypatch.setattr("sys.argv", ["imagenet-semi.py"])
    script = load_script("imagenet-semi.py")
    loaded = []
    read = backbones._load
    monkeypatch.setattr(backbones, "_load", lambda *a: loaded.append(a[1]) or read(*a))

    def run(*words: object) -> dict[str, float]:
        common = ("--dataset", "patches", "--image-size", 48, "--arch", "torchvision:resnet18")
        common += (
            "--num-labeled",
            10,
            "-b",
            4,
            "--max-iters",
            3,
            "--gpus",
            "cpu",
            "--eval-freq",
            3,
        )
        common += ("--model-root", tmp_path, "--log-root", tmp_path / "log", "--finetune", *words)
        return script.main(script.build_parser().parse_args([str(w) for w in common]))

    weights = files / "resnet18.pth"
    whole = run("--pretrained", weights, "--exp-name", "whole")
    run("--pretrained", weights, "--stop-after", 1)
    assert loaded == [str(weights)] * 2
    resumed = run("--resume", "auto")  # its own checkpoint holds the weights
    last = tmp_path / "exp" / "ckpt.pth.tar"
    measured = run("--eval", "--resume", last)
    assert len(loaded) == 2
    assert resumed == whole
    assert measured["top1"] == resumed["last"]
    state, given = checkpoint.load_dict(last), checkpoint.load_dict(weights)
    assert torch.equal(state["net"]["trunk.conv1.weight"], given["conv1.weight"])
    model, _ = load_network(state, last)
    assert torch.equal(model.head.weight, state["net"]["head.weight"])
