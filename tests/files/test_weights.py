"""Weights are matched to a network by name, with nothing left over."""

import pytest
import torch

from lib.files.weights import load_weights, model_weights, strip_wrappers
from models import build_model


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "module.module."]
)
def test_names_lose_the_prefixes_of_every_wrapper(prefix):
    weights = {f"{prefix}fc.weight": torch.zeros(1), f"{prefix}block1.module.bias": torch.ones(1)}
    assert list(strip_wrappers(weights)) == ["fc.weight", "block1.module.bias"]


@pytest.mark.parametrize("key", ["net", "state_dict", None])
def test_weights_are_found_in_every_published_kind_of_checkpoint(key):
    weights = {"module.w": torch.zeros(2)}
    found = model_weights(weights if key is None else {key: weights, "epoch": 1}, "f")
    assert list(found) == ["w"]


def test_names_in_a_file_bring_no_control_characters_into_a_message():
    state = {"\x1b[2J": 1} | {f"entry {i}": i for i in range(50)}
    with pytest.raises(ValueError, match=r"entries are: \\x1b\[2J, entry 0, .* \.\.\.$") as caught:
        model_weights(state, "f")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("holds", [{"epoch": 3}, {"net": 5}, {"net": {}}, {1: torch.zeros(2)}, {}])
def test_a_checkpoint_without_weights_is_refused(holds):
    with pytest.raises(ValueError, match="backbone holds no network weights"):
        model_weights(holds, "backbone")


def tiny(out_features=4, **keywords):
    return build_model("wrn-10-1", out_features, **keywords)


def unchanged(model, action, message):
    """`action` raises a ValueError and leaves every parameter of `model` as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        action()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_backbone_loads_with_exactly_the_head_missing():
    phase1, phase3 = tiny(128, normalize=True), tiny(10)
    head = phase3.fc.weight.clone()
    report = load_weights(phase3, phase1.state_dict(), source="phase1", keep_head=False)
    assert report.missing == ("fc.weight", "fc.bias")
    assert report.unexpected == report.mismatched == ()
    assert set(report.loaded) == set(phase3.state_dict()) - set(report.missing)
    assert "2 missing (fc.weight, fc.bias)" in str(report)
    assert torch.equal(phase3.fc.weight, head)
    assert torch.equal(phase3.block2.layer[0].conv1.weight, phase1.block2.layer[0].conv1.weight)


@pytest.mark.parametrize("keep_head", [True, False])
@pytest.mark.parametrize("name", ["conv1.weight", "block3.layer.0.bn2.running_var", "bn1.bias"])
def test_partial_weight_loading_names_everything_that_is_missing(name, keep_head):
    weights = dict(tiny().state_dict())
    del weights[name]
    model = tiny()
    unchanged(
        model,
        lambda: load_weights(model, weights, source="f", keep_head=keep_head),
        rf"(?s)f does not fit.*missing .*{name}",
    )


@pytest.mark.parametrize("keep_head", [True, False])
def test_left_over_and_mismatched_weights_are_named(keep_head):
    model = tiny()
    extra = {**model.state_dict(), "block4.layer.0.conv1.weight": torch.zeros(1)}
    wider = {**model.state_dict(), "conv1.weight": torch.zeros(16, 1, 3, 3)}
    no_tensor = {**model.state_dict(), "conv1.weight": "text"}
    for weights, message in (
        (extra, "1 unexpected .block4"),
        (wider, "1 mismatched .conv1"),
        (no_tensor, "1 mismatched .conv1"),
    ):
        unchanged(
            model,
            lambda w=weights: load_weights(model, w, source="f", keep_head=keep_head),
            message,
        )


def test_a_missing_or_another_head_is_refused_where_the_head_is_wanted():
    model = tiny(10)
    headless = {k: v for k, v in model.state_dict().items() if not k.startswith("fc.")}
    for weights, message in ((headless, "2 missing"), (tiny(7).state_dict(), "2 mismatched")):
        unchanged(model, lambda w=weights: load_weights(model, w, source="f"), message)


@pytest.mark.parametrize("other", ["wrn-16-1", "wrn-10-2", "resnet18"])
def test_a_checkpoint_of_another_architecture_is_refused(other):
    model, weights = tiny(), build_model(other, 4).state_dict()
    unchanged(
        model,
        lambda: load_weights(model, weights, source="f", keep_head=False),
        "another --architecture",
    )


def test_counters_that_old_files_do_not_have_may_be_missing():
    model, old = tiny(), tiny().state_dict()
    old = {k: v for k, v in old.items() if not k.endswith("num_batches_tracked")}
    assert set(load_weights(model, old, source="f").loaded) == set(old)
