"""Winograd's kernels against the direct sums in float64, and what happens where they do not suit."""

import copy
import json
import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_ok, assert_refused, run_script
from torch import nn

from lib.cli import options
from lib.files import provenance
from lib.runtime import devices, profiling, winograd
from lib.runtime.devices import Device
from lib.training import engine
from models import build_model
from models.layers import BatchNormReLU

CPU = torch.device("cpu")
pytestmark = pytest.mark.xdist_group("winograd")  # one process compiles
PLAIN, WINOGRAD = Device(CPU, True), Device(CPU, True, True)
needs_avx512 = pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="needs AVX512-BF16"
)
# images, inputs, outputs, height, width: with one row of tiles, blocks that end early, tiles left over
# from a group of three, channels that fill half a register group, and those of the networks
SHAPES = [
    (1, 16, 16, 2, 4),
    (3, 32, 16, 2, 8),
    (5, 16, 32, 6, 4),
    (2, 48, 96, 10, 20),
    (7, 32, 64, 4, 28),
    (2, 64, 32, 2, 100),
    (4, 32, 32, 32, 32),
    (3, 128, 128, 8, 8),
]


@pytest.fixture(autouse=True)
def kernels(request):
    if request.node.get_closest_marker("skipif"):
        winograd.build()


def whole_numbers(*shape: int, seed: int, step: int = 1) -> torch.Tensor:
    """Multiples of `step` between -2 and 2 times it."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=rng).float() * step


def in_bf16(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)


def direct(images, weight, gradient):
    """Output and both gradients of a convolution, in float64."""
    images, weight = (x.double().requires_grad_() for x in (images, weight))
    output = F.conv2d(images, weight, padding=1)
    return output.detach(), *torch.autograd.grad(output, (images, weight), gradient.double())


def layer_with(weight: torch.Tensor) -> nn.Conv2d:
    outputs, inputs = weight.shape[:2]
    layer = nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
    assert winograd.install(layer) == 1
    layer[0].weight.data = weight.clone(memory_format=torch.channels_last)
    return layer[0]


def of_layer(layer, images, gradient):
    layer.weight.grad, images = None, images.clone().requires_grad_()
    with PLAIN.autocast():
        output = layer(images)
    output.backward(gradient)
    return output.detach(), images.grad, layer.weight.grad


# --------------------------------------------------------------------------------------------- convolution


@needs_avx512
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_convolutions_of_whole_numbers_are_exact(shape):
    """Small whole numbers pass through the transforms without rounding: every bit is as in the direct sum."""
    number, inputs, outputs, height, width = shape
    images = in_bf16(whole_numbers(number, inputs, height, width, seed=0))
    weight = whole_numbers(
        outputs, inputs, 3, 3, seed=1, step=4
    )  # quarters of their sums are whole
    gradient = in_bf16(whole_numbers(number, outputs, height, width, seed=2))
    found = of_layer(layer_with(weight), images, gradient)
    for mine, exact in zip(found, direct(images, weight, gradient), strict=True):
        assert torch.equal(mine, exact.to(mine.dtype))
    assert [x.dtype for x in found] == [torch.bfloat16, torch.bfloat16, torch.float32]


@needs_avx512
def test_the_error_is_that_of_rounded_factors():
    images, gradient = (in_bf16(torch.randn(16, 64, 16, 16)) for _ in range(2))
    weight = torch.randn(64, 64, 3, 3)
    exact = direct(images, weight, gradient)
    mine = of_layer(layer_with(weight), images, gradient)
    rounded = direct(images, weight.to(torch.bfloat16), gradient)
    rounded = [
        one.to(x.dtype) for one, x in zip(rounded, mine, strict=True)
    ]  # what bf16 at its best gives
    usual = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    usual.weight.data = weight
    pytorch = of_layer(usual, images, gradient)
    for name, one, theirs, truth in zip(("y", "dx", "dw"), mine, pytorch, exact, strict=True):
        errors = [float((x.double() - truth).norm() / truth.norm()) for x in (one, theirs)]
        print(f"{name}: {errors[0]:.2%} with Winograd's algorithm, {errors[1]:.2%} in bf16 alone")
    for name, one, other, truth in zip(("y", "dx", "dw"), mine, rounded, exact, strict=True):
        error, at_best = ((x.double() - truth).norm() / truth.norm() for x in (one, other))
        assert error < 0.006, name
        if name != "dw":  # whose factors are given in bf16: at its best it is exact
            assert error < 2.5 * at_best, name


@needs_avx512
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_computes_the_same(threads):
    images, gradient = (in_bf16(torch.randn(5, 32, 12, 12)) for _ in range(2))
    layer, before = layer_with(torch.randn(32, 32, 3, 3)), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = of_layer(layer, images, gradient)
        torch.set_num_threads(threads)
        many, again = (of_layer(layer, images, gradient) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(many, again, strict=True))
    assert torch.equal(one[0], many[0])
    assert torch.equal(one[1], many[1])
    torch.testing.assert_close(
        one[2], many[2], rtol=1e-4, atol=1e-4
    )  # a sum over tiles, shared among the threads


@needs_avx512
def test_filters_in_any_order_in_memory_give_the_same():
    images, gradient = (in_bf16(torch.randn(2, 32, 4, 4)) for _ in range(2))
    weight = torch.randn(64, 32, 3, 3)
    gradient = gradient.repeat(1, 2, 1, 1).contiguous(memory_format=torch.channels_last)
    layer = layer_with(weight)
    one = of_layer(layer, images, gradient)
    layer.weight.data = weight.contiguous()
    for x, y in zip(one, of_layer(layer, images, gradient), strict=True):
        assert torch.equal(x, y)


@needs_avx512
def test_images_in_any_order_in_memory_give_the_same():
    images, gradient = (in_bf16(torch.randn(2, 32, 4, 8)) for _ in range(2))
    layer = layer_with(torch.randn(32, 32, 3, 3))
    one = of_layer(layer, images, gradient)
    for x, y in zip(one, of_layer(layer, images.contiguous(), gradient.contiguous()), strict=True):
        assert torch.equal(x, y)
    with PLAIN.autocast():
        assert torch.equal(one[0], layer(images.float()))


@needs_avx512
@pytest.mark.parametrize("shape", [(2, 32, 7, 8), (2, 32, 8, 6), (2, 32, 5, 5)], ids=str)
def test_maps_of_other_sizes_are_computed_as_before(shape):
    images, gradient = (in_bf16(torch.randn(shape)) for _ in range(2))
    layer = layer_with(torch.randn(32, 32, 3, 3))
    usual = nn.Conv2d(32, 32, 3, padding=1, bias=False)
    usual.load_state_dict(layer.state_dict())
    for x, y in zip(
        of_layer(layer, images, gradient), of_layer(usual, images, gradient), strict=True
    ):
        assert torch.equal(x, y)


@needs_avx512
def test_without_bf16_a_layer_computes_as_before():
    layer, images = layer_with(torch.randn(32, 32, 3, 3)), torch.randn(2, 32, 8, 8)
    assert torch.equal(layer(images), F.conv2d(images, layer.weight, padding=1))
    assert layer(images).dtype == torch.float32


@needs_avx512
def test_the_gradient_of_very_many_filters_comes_from_pytorch(monkeypatch):
    monkeypatch.setattr(winograd, "MOST_FILTERS", 32 * 32 - 1)
    images, gradient = (in_bf16(whole_numbers(2, 32, 4, 4, seed=s)) for s in (0, 1))
    weight = whole_numbers(32, 32, 3, 3, seed=2, step=4)
    asked = []
    monkeypatch.setattr(
        torch.nn.grad,
        "conv2d_weight",
        lambda *words, found=torch.nn.grad.conv2d_weight, **more: (
            asked.append(1) or found(*words, **more)
        ),
    )
    mine = of_layer(layer_with(weight), images, gradient)[2]
    assert asked == [1]
    exact = direct(images, weight, gradient)[2]
    torch.testing.assert_close(mine.double(), exact, rtol=0.01, atol=0.5)  # rounded to bf16


@needs_avx512
def test_kernels_refuse_what_they_would_read_wrongly():
    kernels, weight = torch.ops.winograd, torch.randn(32, 32, 3, 3)
    images = in_bf16(torch.randn(2, 32, 4, 4))
    for wrong in (images.contiguous(), images.float(), images[:, :8], images[:, :, :3], images[0]):
        with pytest.raises(RuntimeError, match=r"winograd::convolution: takes"):
            kernels.convolution(wrong, weight, False)
    for wrong in (weight[:, :16], weight[:20], weight[:, :, :2]):
        with pytest.raises(RuntimeError, match=r"winograd::convolution: takes"):
            kernels.convolution(images, wrong, False)
    for one, other in (
        (images, images[:1]),
        (images[:, :, :, :2], images),
        (images, images[:, :16]),
    ):
        with pytest.raises(RuntimeError, match=r"winograd::filter_gradient: takes"):
            kernels.filter_gradient(
                *(x.contiguous(memory_format=torch.channels_last) for x in (one, other))
            )
    ones = torch.ones(32)
    for wrong in (ones[:16], ones.double(), torch.ones(64)[::2]):
        with pytest.raises(RuntimeError, match=r"winograd::batch_norm_relu: takes"):
            kernels.batch_norm_relu(images, wrong, ones, 1e-5)


# ------------------------------------------------------------------------------------ BatchNorm and ReLU


def both_norms(channels: int) -> tuple[BatchNormReLU, BatchNormReLU]:
    """The usual one in float64, and ours."""
    usual = nn.Sequential(BatchNormReLU(channels))
    nn.init.uniform_(usual[0].weight, 0.5, 2)
    nn.init.normal_(usual[0].bias)
    ours = copy.deepcopy(usual)
    winograd.install(ours)
    assert type(ours[0]) is winograd.OnePassBatchNormReLU
    return usual[0].double(), ours[0]


@needs_avx512
@pytest.mark.parametrize("shape", [(2, 16, 1, 1), (3, 48, 5, 7), (9, 64, 8, 8)], ids=str)
@pytest.mark.parametrize("far", [0.0, 50.0], ids=["around zero", "far from zero"])
def test_normalization_and_its_gradients(shape, far):
    usual, ours = both_norms(shape[1])
    images = in_bf16(torch.randn(shape) * 2 + far)
    gradient = in_bf16(torch.randn(shape))
    exact_images, mine_images = images.double().requires_grad_(), images.clone().requires_grad_()
    exact = usual(exact_images)
    exact.backward(gradient.double())
    with PLAIN.autocast():
        mine = ours(mine_images)
    mine.backward(gradient)
    assert mine.dtype == torch.bfloat16
    torch.testing.assert_close(mine.double(), exact, rtol=2**-8, atol=1e-4)
    assert torch.equal(mine == 0, exact == 0)
    close = {"rtol": 2**-8, "atol": 2e-3}
    torch.testing.assert_close(mine_images.grad.double(), exact_images.grad, **close)
    for name in ("weight", "bias"):
        one, other = (getattr(norm, name).grad.double() for norm in (ours, usual))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.running_mean.double(), usual.running_mean)
    torch.testing.assert_close(ours.running_var.double(), usual.running_var, rtol=1e-4, atol=1e-6)
    assert ours.num_batches_tracked == usual.num_batches_tracked == 1


@needs_avx512
def test_a_constant_channel_does_not_blow_up():
    _, ours = both_norms(16)
    images = in_bf16(torch.full((4, 16, 2, 4), 3.0)).requires_grad_()
    with PLAIN.autocast():
        found = ours(images)
    found.sum().backward()
    expected = ours.bias.detach().relu().to(torch.bfloat16)
    assert torch.equal(found, expected[None, :, None, None].expand_as(found))
    assert torch.equal(images.grad, torch.zeros_like(images))


@needs_avx512
def test_what_is_no_number_stays_none():
    _, ours = both_norms(16)
    images = in_bf16(torch.randn(2, 16, 2, 4))
    images[0, 3, 1, 1] = torch.nan
    with PLAIN.autocast():
        found = ours(images).isnan()
    assert found[:, 3].all()
    assert found.sum() == found[:, 3].numel()


@needs_avx512
@pytest.mark.parametrize(
    "case", ["evaluation", "float32", "one value", "cumulative", "no statistics"]
)
def test_where_it_does_not_suit_normalization_is_as_before(case):
    usual, ours = (norm.float() for norm in both_norms(16))
    images = in_bf16(torch.randn(4, 16, 2, 4))
    if case == "evaluation":
        usual.eval(), ours.eval()
    if case == "cumulative":
        usual.momentum = ours.momentum = None
    if case == "no statistics":
        usual.track_running_stats = ours.track_running_stats = False
    if case == "one value":
        with PLAIN.autocast(), pytest.raises(ValueError, match="more than 1 value per channel"):
            ours(images[:1, :, :1, :1])
        return
    with torch.autocast("cpu", torch.bfloat16, enabled=case != "float32"):
        images = images.float() if case == "float32" else images
        assert torch.equal(ours(images), usual(images))
    assert torch.equal(ours.running_var, usual.running_var)


# ------------------------------------------------------------------------------------------------ networks


@needs_avx512
@pytest.mark.parametrize(
    ("name", "words", "number"),
    [
        ("wrn-28-2", {}, 22),
        ("wrn-10-1", {}, 4),
        ("resnet18", {}, 13),
        ("resnet50", {"imagenet": True}, 13),
    ],
)
def test_which_layers_of_a_network_they_suit(name, words, number, capsys):
    model = build_model(name, 10, **words)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    total = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert winograd.install(model) == number
    assert f"suits {number} of {total} convolutions" in capsys.readouterr().out
    for module in model.modules():
        if isinstance(module, winograd.WinogradConv2d):
            assert module.kernel_size == (3, 3)
            assert module.stride == module.padding == (1, 1)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "words",
    [
        {"stride": 2, "padding": 1},
        {"padding": 0},
        {"padding": 1, "bias": True},
        {"padding": 1, "groups": 2},
        {"padding": 2, "dilation": 2},
        {"padding": 1, "padding_mode": "reflect"},
    ],
    ids=str,
)
def test_other_convolutions_are_left_alone(words):
    assert winograd._suits(nn.Conv2d(32, 32, 3, padding=1, bias=False))
    assert not winograd._suits(nn.Conv2d(32, 32, 3, **{"bias": False} | words))
    assert not winograd._suits(nn.Conv2d(24, 32, 3, padding=1, bias=False))
    assert not winograd._suits(nn.Conv2d(32, 32, 5, padding=1, bias=False))


@needs_avx512
@pytest.mark.parametrize("name", ["wrn-10-1", "wrn-10-2", "resnet18"])
def test_a_network_learns_what_it_learns_without_them(name):
    """Ten steps on one batch; bfloat16 alone is off from float32 by as much."""
    images, targets = torch.randn(32, 3, 16, 16), torch.arange(32) % 10
    losses = {}
    for how, device in {
        "fp32": Device(CPU, False),
        "bf16": PLAIN,
        "winograd": WINOGRAD,
    }.items():
        torch.manual_seed(0)
        model = device.prepare(build_model(name, 10)).train()
        optimizer = engine.sgd(model.parameters(), 0.02, 5e-4)
        losses[how] = []
        for _ in range(10):
            with device.autocast():
                loss = F.cross_entropy(model(images).float(), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[how].append(loss.item())
    exact = torch.tensor(losses["fp32"])
    errors = {how: (torch.tensor(found) - exact).abs().max() for how, found in losses.items()}
    assert exact[-1] < exact[0] - 0.3
    assert errors["winograd"] < 3 * errors["bf16"] + 0.01
    assert losses["winograd"] != losses["bf16"]  # they were used


@needs_avx512
def test_a_network_with_them_is_copied_and_counted_like_any_other():
    plain = build_model("wrn-10-1", 10)
    model = WINOGRAD.prepare(copy.deepcopy(plain))
    flops = profiling.training_flops(plain, (3, 32, 32))
    assert profiling.training_flops(model, (3, 32, 32)) == flops
    twin, images = copy.deepcopy(model).eval(), torch.randn(2, 3, 32, 32)
    with PLAIN.autocast(), torch.no_grad():
        assert torch.equal(twin(images), model.eval()(images))
        twin.block3.layer[0].conv2.weight.zero_()
        assert not torch.equal(twin(images), model(images))


# --------------------------------------------------------------------------------- where, and from what


def test_it_is_refused_where_it_cannot_work(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    winograd.check_hardware(CPU, bf16=True)
    assert devices.select("cpu", "bf16", with_winograd=True) == WINOGRAD
    assert "Winograd" in str(WINOGRAD)
    assert "Winograd" not in str(PLAIN)
    with pytest.raises(ValueError, match="--precision fp32"):
        devices.select("cpu", "fp32", with_winograd=True)
    with pytest.raises(ValueError, match="--gpus cpu"):
        winograd.check_hardware(torch.device("cuda", 0), bf16=True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.raises(ValueError, match="AVX512-BF16"):
        devices.select("cpu", "bf16", with_winograd=True)


def test_mistakes_end_before_anything_is_made(tmp_path, monkeypatch):
    script = options.load_script("unsupervised/cifar.py")

    def run(*more):
        words = ("--dataset", "patches", "--winograd", "--model-dir", str(tmp_path / "new"), *more)
        script.main(script.build_parser().parse_args(words))

    with pytest.raises(ValueError, match="--compile and --winograd"):
        run("--compile")
    with pytest.raises(ValueError, match="--winograd"):
        run("--precision", "fp32")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "")
    with pytest.raises(ValueError, match=r"--winograd needs a C\+\+ compiler.*apt install g\+\+"):
        run()
    assert not (tmp_path / "new").exists()


def test_going_on_without_them_is_said(capsys):
    before, after = ({"options": {"winograd": value}} for value in (True, False))
    provenance.say_precision(before, after)
    assert "--winograd was on, is off" in capsys.readouterr().out
    provenance.say_precision({"options": {}}, before)  # of before there were any
    assert "--winograd was off, is on" in capsys.readouterr().out
    provenance.say_precision({"options": {}}, after)
    assert capsys.readouterr().out == ""


def without_ninja(folder) -> str:
    """A search path of all that is on this one but ninja, as in an environment not activated."""
    folder.mkdir()
    for place in os.get_exec_path():
        for program in Path(place).glob("*"):
            link = folder / program.name
            if program.name != "ninja" and not link.is_symlink():
                link.symlink_to(program)
    return str(folder)


@needs_avx512
@pytest.mark.slow
def test_they_are_compiled_once_and_made_again_where_the_file_is_no_library(tmp_path):
    """Slow in the first process alone: the second finds what the first has left."""
    kept = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "kept"), "PATH": without_ninja(tmp_path / "bin")}
    code = "from lib import winograd; winograd.build(); winograd.build()"
    words = ("--dataset", "patches", "--arch", "wrn-10-1", "--precision", "bf16", "--winograd")
    words += ("--stop-after", 5, "--model-dir", tmp_path, "--log-dir", tmp_path)
    output = assert_ok(run_script("unsupervised/cifar.py", *words, **kept))
    assert output.count("compiling") == 1
    assert re.search(r"CPU, \d+ threads, bf16 autocast, Winograd", output)
    assert "suits 4 of 9 convolutions" in output
    assert "compiling" not in assert_ok(run_script("-c", code, **kept))
    (library,) = (tmp_path / "kept").iterdir()
    size = library.stat().st_size
    library.write_bytes(b"")
    assert "compiling" in assert_ok(run_script("-c", code, **kept))
    assert library.stat().st_size == size


@needs_avx512
@pytest.mark.slow
def test_a_folder_that_cannot_be_written_costs_a_compilation_and_no_more(tmp_path):
    (tmp_path / "file").write_text("in the way")
    code = "from lib import winograd; winograd.build(); winograd.torch.ops.winograd.convolution"
    printed = assert_ok(run_script("-c", code, TORCH_EXTENSIONS_DIR=str(tmp_path / "file")))
    assert "not kept for the next run" in printed


@needs_avx512
@pytest.mark.slow
def test_a_compiler_that_fails_is_quoted(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\n[ $# -gt 2 ] || exec c++ "$@"\necho out of magic >&2\nexit 1\n')
    compiler.chmod(0o755)
    words = (
        "--dataset",
        "patches",
        "--arch",
        "wrn-10-1",
        "--winograd",
        "--model-dir",
        tmp_path / "new",
    )
    environment = {"CXX": str(compiler), "TORCH_EXTENSIONS_DIR": str(tmp_path / "kept")}
    result = run_script("unsupervised/cifar.py", *words, **environment)
    assert_refused(result, "--winograd: its kernels could not be made", "out of magic")


@needs_avx512
@pytest.mark.slow
def test_both_phases_train_with_them_and_phase_1_goes_on(tmp_path):
    """Losses as without, within what bf16 rounds; a run that was stopped goes on to the same bits."""
    script = "unsupervised/cifar.py"
    common = ("--dataset", "patches", "--arch", "wrn-10-1", "--precision", "bf16", "--epochs", 1)
    losses, nets = {}, {}
    for name, more in {"usual": (), "whole": ("--winograd",), "stopped": ("--winograd",)}.items():
        folder = tmp_path / name
        words = (*common, *more, "--model-dir", folder, "--log-dir", folder)
        if name == "stopped":
            assert_ok(run_script(script, *words, "--stop-after", 12))
            words = (*words, "--resume", "auto")
        assert_ok(run_script(script, *words))
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        losses[name] = [line["loss"] for line in lines if line["event"] == "epoch"]
        state = torch.load(folder / "ckpt.cifar.pth.tar", weights_only=True)
        assert state["net"].keys() == build_model("wrn-10-1", 128).state_dict().keys()
        nets[name] = state["net"]
    assert losses["usual"] == pytest.approx(losses["whole"], rel=0.02)
    assert losses["usual"] != losses["whole"]
    assert all(torch.equal(value, nets["stopped"][key]) for key, value in nets["whole"].items())
    words = (
        *common[:-2],
        "--winograd",
        "--max-iters",
        5,
        "--model-root",
        tmp_path,
        "--log-root",
        tmp_path,
    )
    output = assert_ok(run_script("cifar-semi.py", *words))
    assert re.search(r"CPU, \d+ threads, bf16 autocast, Winograd", output)
    assert "suits 4 of 9 convolutions" in output
