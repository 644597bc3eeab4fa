"""The networks: published parameter names, any image size, gray input, a safe unit sphere."""

import pytest
import torch
import torch.nn.functional as F
import torchvision

from lib.files.weights import load_weights, model_weights
from models import build_model
from models.layers import init_he, l2_normalize
from models.wideresnet import PreActBlock

BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def wide_resnet_names(depth, widen):
    names = ["conv1.weight", "fc.weight", "fc.bias", *(f"bn1.{kind}" for kind in BATCH_NORM)]
    widths = [16, 16 * widen, 32 * widen, 64 * widen]
    for stage in (1, 2, 3):
        for i in range((depth - 4) // 6):
            block = f"block{stage}.layer.{i}"
            names += [f"{block}.conv1.weight", f"{block}.conv2.weight"]
            names += [f"{block}.{bn}.{kind}" for bn in ("bn1", "bn2") for kind in BATCH_NORM]
        if widths[stage - 1] != widths[stage]:
            names.append(f"block{stage}.layer.0.convShortcut.weight")
    return set(names)


@pytest.mark.parametrize(("depth", "widen"), [(10, 1), (16, 2), (28, 2), (28, 10)])
def test_wide_resnet_has_the_published_names_and_widths(depth, widen):
    with torch.device("meta"):
        state = build_model(f"wrn-{depth}-{widen}", 128).state_dict()
    assert set(state) == wide_resnet_names(depth, widen)
    for stage in (1, 2, 3):
        width = 16 * widen * 2 ** (stage - 1)
        assert state[f"block{stage}.layer.0.conv1.weight"].shape[0] == width
    assert state["fc.weight"].shape == (128, 64 * widen)


def test_small_resnet18_has_the_published_names():
    state = build_model("resnet18", 128).state_dict()
    names = ["conv1.weight", "linear.weight", "linear.bias"]
    names += [f"bn1.{kind}" for kind in BATCH_NORM]
    for stage in (1, 2, 3, 4):
        for i in (0, 1):
            block = f"layer{stage}.{i}"
            names += [f"{block}.conv1.weight", f"{block}.conv2.weight"]
            names += [f"{block}.{bn}.{kind}" for bn in ("bn1", "bn2") for kind in BATCH_NORM]
        if stage > 1:
            names.append(f"layer{stage}.0.shortcut.0.weight")
            names += [f"layer{stage}.0.shortcut.1.{kind}" for kind in BATCH_NORM]
    assert set(state) == set(names)
    assert state["conv1.weight"].shape == (64, 3, 3, 3)


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_imagenet_resnet_has_the_names_and_shapes_of_torchvision(depth):
    with torch.device("meta"):
        ours = build_model(f"resnet{depth}", 128, imagenet=True).state_dict()
        theirs = getattr(torchvision.models, f"resnet{depth}")(num_classes=128).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_imagenet_resnet_computes_what_torchvision_computes():
    ours = build_model("resnet18", 7, imagenet=True).eval()
    theirs = torchvision.models.resnet18(num_classes=7).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.allclose(ours(images), theirs(images), atol=1e-6)
    assert not hasattr(build_model("resnet18", 7, imagenet=True), "linear")


def naive_wide_resnet(state, images, blocks):
    """PUBLISHED.md section 5 in plain functions, BatchNorm in evaluation mode."""

    def activated(x, name):
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return F.relu(F.batch_norm(x, mean, var, weight, bias))

    x = F.conv2d(images, state["conv1.weight"], padding=1)
    for stage, stride in ((1, 1), (2, 2), (3, 2)):
        for i in range(blocks):
            name, step = f"block{stage}.layer.{i}", stride if i == 0 else 1
            a = activated(x, f"{name}.bn1")
            out = F.conv2d(a, state[f"{name}.conv1.weight"], stride=step, padding=1)
            out = F.conv2d(activated(out, f"{name}.bn2"), state[f"{name}.conv2.weight"], padding=1)
            if f"{name}.convShortcut.weight" in state:
                x = out + F.conv2d(a, state[f"{name}.convShortcut.weight"], stride=step)
            else:
                x = out + x
    return F.linear(activated(x, "bn1").mean(dim=(2, 3)), state["fc.weight"], state["fc.bias"])


def test_wide_resnet_computes_the_published_network():
    model = build_model("wrn-16-2", 5)
    for module in model.modules():  # statistics and scales that are not the identity
        if isinstance(module, torch.nn.BatchNorm2d):
            for values in (module.weight.data, module.running_var):
                values.uniform_(0.5, 1.5)
            for values in (module.bias.data, module.running_mean):
                values.uniform_(-0.5, 0.5)
    model.eval()
    images = torch.randn(3, 3, 16, 16)
    expected = naive_wide_resnet(model.state_dict(), images, blocks=2)
    assert torch.allclose(model(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["wrn-10-1", "resnet18", "resnet50"])
@pytest.mark.parametrize("size", [32, 64, 40])
def test_a_larger_image_stays_one_row(name, size):
    model = build_model(name, 4).eval()
    assert model(torch.randn(2, 3, size, size)).shape == (2, 4)
    imagenet = build_model("resnet18", 4, imagenet=True).eval()
    assert imagenet(torch.randn(2, 3, size, size)).shape == (2, 4)


def test_pooling_averages_over_the_whole_map_at_any_size():
    model = build_model("wrn-10-1", 4).eval()
    maps = F.relu(model.bn1(model.block3(model.block2(model.block1(model.conv1(x := noise(64)))))))
    assert maps.shape[-1] == 16
    assert torch.allclose(model.pooled(x), maps.flatten(2).mean(2), atol=1e-6)


def noise(size):
    return torch.randn(2, 3, size, size)


@pytest.mark.parametrize(
    ("name", "imagenet"), [("wrn-10-1", False), ("resnet18", False), ("resnet18", True)]
)
def test_gray_images_are_accepted(name, imagenet):
    model = build_model(name, 4, in_channels=1, imagenet=imagenet, normalize=True).eval()
    output = model(torch.randn(3, 1, 32, 32))
    assert torch.allclose(output.norm(dim=1), torch.ones(3), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "imagenet"), [("wrn-10-1", False), ("resnet18", False), ("resnet18", True)]
)
def test_normalize_is_the_only_difference_between_the_phases(name, imagenet):
    bare = build_model(name, 4, imagenet=imagenet).eval()
    unit = build_model(name, 4, imagenet=imagenet, normalize=True).eval()
    unit.load_state_dict(bare.state_dict())
    images = torch.randn(3, 3, 32, 32)
    output = bare(images)
    assert torch.allclose(unit(images), output / output.norm(dim=1, keepdim=True), atol=1e-6)
    assert (output.norm(dim=1) - 1).abs().min() > 1e-3


@pytest.mark.parametrize("name", ["wrn-28", "wrn-27-2", "wrn-28-0", "wrn-4-1", "resnet20", "vgg16"])
def test_an_unknown_network_is_refused_by_name(name):
    with pytest.raises(ValueError, match=name):
        build_model(name, 10)


def test_a_wide_resnet_for_imagenet_is_refused():
    with pytest.raises(ValueError, match="small images"):
        build_model("wrn-28-2", 10, imagenet=True)


def test_normalizing_a_zero_vector_gives_zero_and_a_finite_gradient():
    vectors = torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 4.0]], requires_grad=True)
    unit = l2_normalize(vectors)
    assert torch.equal(unit.detach()[0], torch.zeros(3))
    assert torch.allclose(unit.detach()[1], torch.tensor([0.6, 0.0, 0.8]))
    unit.sum().backward()
    assert torch.isfinite(vectors.grad).all()


def test_the_gradient_of_normalization_is_tangent_to_the_sphere():
    vectors = torch.randn(5, 8, requires_grad=True)
    direction = torch.randn(5, 8)
    (l2_normalize(vectors) * direction).sum().backward()
    v, norm = vectors.detach(), vectors.detach().norm(dim=1, keepdim=True)
    unit = v / norm
    expected = (direction - unit * (unit * direction).sum(dim=1, keepdim=True)) / norm
    assert torch.allclose(vectors.grad, expected, atol=1e-6)


def test_normalization_stays_precise_under_bf16_autocast():
    vectors = torch.randn(50, 128)
    with torch.autocast("cpu", torch.bfloat16):
        unit = l2_normalize(vectors.bfloat16())
        through_a_network = build_model("wrn-10-1", 128, normalize=True)(torch.randn(4, 3, 16, 16))
    for output in (unit, through_a_network):
        assert output.dtype == torch.float32
        # a norm taken in bf16 would be off by up to 4e-3
        assert (output.norm(dim=1) - 1).abs().max() < 1e-5


def test_start_values_have_the_he_variance():
    block = PreActBlock(64, 128, 1)
    init_he(block)
    assert block.conv2.weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    assert torch.equal(block.bn1.weight, torch.ones(64))
    assert torch.equal(block.bn1.bias, torch.zeros(64))


def he_std(conv):
    return (2 / (conv.out_channels * conv.kernel_size[0] ** 2)) ** 0.5  # normal, fan-out


def default_std(conv):
    return (conv.in_channels * conv.kernel_size[0] ** 2 * 3) ** -0.5  # uniform in +-1/sqrt(fan-in)


@pytest.mark.parametrize(
    ("name", "imagenet", "published"),
    [
        ("wrn-16-2", False, he_std),
        ("resnet18", True, he_std),
        ("resnet50", True, he_std),
        ("resnet18", False, default_std),
        ("resnet50", False, default_std),
    ],
)
def test_networks_start_from_weights_of_the_published_distribution(name, imagenet, published):
    torch.manual_seed(0)
    model = build_model(name, 128, imagenet=imagenet)
    for conv in (m for m in model.modules() if isinstance(m, torch.nn.Conv2d)):
        deviation = conv.weight.std().item() / published(conv)
        assert deviation == pytest.approx(1, abs=4 / (2 * conv.weight.numel()) ** 0.5)
        if published is default_std:
            assert conv.weight.abs().max() <= 3**0.5 * published(conv)
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()
    head, bound = (
        getattr(model, model.head_name),
        getattr(model, model.head_name).in_features ** -0.5,
    )
    assert 0.98 * bound < head.weight.abs().max() <= bound
    # the published wide residual network alone sets the bias of its last layer to 0
    assert bool(head.bias.any()) != name.startswith("wrn")


@pytest.mark.parametrize("name", ["wrn-28-2", "resnet18"])
def test_a_published_state_dict_loads_although_each_name_starts_with_module(name):
    published = build_model(name, 128)
    weights = {f"module.{k}": v for k, v in published.state_dict().items()}
    model = build_model(name, 128)
    plain = model_weights({"net": weights, "acc": 0.8212, "epoch": 1269}, "file")
    report = load_weights(model, plain, source="file")
    assert set(report.loaded) == set(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(value, published.state_dict()[key]), key
