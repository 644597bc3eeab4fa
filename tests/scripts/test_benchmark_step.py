"""What a step asks of a GPU, counted on fake tensors."""

import json

import pytest
import torch
from runs import call
from torch import Tensor

from lib.cli.start import load_script
from lib.objectives.classification import Classification

step = load_script("scripts/benchmarks/step.py")


# kernels of one step at the published settings
MOST = {
    "pretrain-cifar": {
        "images": 150,
        "forward": 160,
        "objective": 40,
        "backward": 180,
        "after step": 8,
    },
    "finetune-cifar": {
        "images": 15,
        "forward": 160,
        "objective": 15,
        "backward": 170,
        "after step": 0,
    },
}


def test_a_step_at_the_published_settings_asks_for_few_kernels_and_no_wait(tmp_path, capsys):
    call(step, "--output", tmp_path / "counts.json")
    found = json.loads((tmp_path / "counts.json").read_text())
    assert set(found) == set(MOST)
    for task, most in MOST.items():
        for part, limit in most.items():
            assert limit / 2 <= found[task][part]["kernels"] <= limit, (task, part)
        assert found[task]["optimizer"]["kernels"] == 1
        assert sum(part["copies"] for part in found[task].values()) == 0
    printed = capsys.readouterr().out
    total = sum(part["kernels"] for part in found["finetune-cifar"].values())
    assert f"| one step | {total} | 0 |" in printed


@pytest.mark.parametrize(
    "waiting",
    [lambda losses: losses.sum() / losses.max().item(), lambda losses: losses[losses > 0].sum()],
    ids=["reads a value", "shape depends on values"],
)
def test_a_step_that_waits_for_the_device_ends_with_the_operation(monkeypatch, waiting):
    def forward(self: Classification, network: object, batch: object) -> tuple[dict, None]:
        return {"loss": waiting(network(batch.images).float())}, None

    monkeypatch.setattr(Classification, "forward", forward)
    with pytest.raises(SystemExit, match="aten"):
        call(step, "--tasks", "finetune-cifar")


def test_kernels_and_copies_are_counted_by_part_and_views_are_none():
    with step.fake_gpu(), step.Launches("cuda") as launches:
        x = torch.empty(4, 3, device="cuda")
        with launches.during("outer"):
            y = x.T.reshape(-1)[None] * 2  # a copy of a transposed matrix, and a product
            with launches.during("inner"):
                torch.ones(3).to("cuda")
    assert isinstance(y, Tensor)
    assert dict(launches.kernels) == {"outer": 2, "inner": 1}
    assert dict(launches.copies) == {"inner": 1}
