"""The training accuracy of phase 3: the share of the images of the steps whose label the network predicts."""

import re

import pytest
import torch
from runs import CPU, assert_same, call, finetuning, log_lines, world

from lib.files import checkpoint
from lib.loading.batches import Batch
from lib.objectives.classification import Classification
from lib.training.optimizer import sgd
from lib.training.step import train_steps
from models import build_model

__all__ = ["world"]  # the fixture

LABELS = 8


def run(world, folder, *words):
    files = ("--model-root", folder, "--log-root", folder / "log", "--exp-name", "e")
    data = ("--dataset", "folder", "--data-dir", world / "pictures", "--image-size", 16)
    more = ("--arch", "wrn-10-1", "-b", 16, "--precision", "fp32", "--num-labeled", LABELS)
    call(finetuning, *data, *more, "--pseudo-file", world / "pseudo.pth.tar", *files, *words)
    return checkpoint.load_dict(folder / "e" / "ckpt.pth.tar")


def accuracies(folder):
    return [x["top1"] for x in log_lines(folder / "log" / "e") if x["event"] == "train"]


@pytest.mark.parametrize(
    ("sizes", "full_steps"), [([7, 7], True), ([7, 7], False), ([7, 7, 3], False)], ids=str
)
def test_it_is_the_naive_count_over_the_batches_of_a_step(sizes, full_steps):
    model, generator = build_model("wrn-10-1", 3), torch.Generator().manual_seed(0)
    labels = torch.randint(3, (sum(sizes),), generator=generator)
    weights = torch.linspace(0, 1, len(labels))  # the count has no use for them
    batches, hits, first = [], 0, 0
    model.train()
    for size in sizes:
        images = torch.rand(size, 3, 16, 16, generator=generator)
        places = torch.arange(first, first + size)
        batches.append(Batch((images,), places, 0, size, places))
        with torch.no_grad():
            found = model(images)  # in training mode: by the statistics of the batch
        for output, label in zip(found.tolist(), labels[places].tolist(), strict=True):
            hits += output.index(max(output)) == label
        first += size
    (step,) = train_steps(
        model,
        Classification(labels, weights),
        sgd(model.parameters(), 0.1, 0.0),
        batches,
        lambda _: 0.1,
        CPU,
        iter_size=len(batches),
        full_steps=full_steps,
    )
    assert 0 < hits < len(labels)
    assert float(step.means["top1"]) == pytest.approx(100 * hits / len(labels), rel=1e-9)


@pytest.mark.parametrize("iter_size", [1, 2])
def test_a_line_of_the_log_and_the_terminal_has_that_of_the_steps_since_the_last_one(
    world, tmp_path, monkeypatch, capsys, iter_size
):
    seen, forward = [], Classification.forward

    def watched(self, network, batch):
        def recorded(images):
            outputs = network(images)
            seen.append((outputs.argmax(1) == self.labels[batch.positions]).tolist())
            return outputs

        return forward(self, recorded, batch)

    monkeypatch.setattr(Classification, "forward", watched)
    words = ("--max-iters", 7, "--print-freq", 3, "--iter-size", iter_size, "--lr", 0.1)
    run(world, tmp_path, *words)
    assert len(seen) == 7 * iter_size
    lines = [seen[start * iter_size : (start + 3) * iter_size] for start in (0, 3, 6)]
    expected = [100 * sum(map(sum, line)) / sum(map(len, line)) for line in lines]
    assert accuracies(tmp_path) == pytest.approx(expected, rel=1e-9)
    said = re.findall(r"step .*  training accuracy ([\d.]+)%  lr", capsys.readouterr().out)
    assert list(map(float, said)) == pytest.approx(expected, abs=0.006)


def test_a_file_with_the_sums_of_the_loss_alone_is_continued(world, tmp_path):
    words = ("--max-iters", 6, "--print-freq", 4, "--lr", 0.1)
    whole = run(world, tmp_path / "whole", *words)
    cut = run(world, tmp_path / "cut", *words, "--stop-after", 2)
    assert set(cut["sums"]) == {"loss", "top1"}
    old = {k: v for k, v in cut.items() if k != "sums"} | {"loss_sums": cut["sums"]["loss"]}
    checkpoint.save(old, file := tmp_path / "cut" / "e" / "ckpt.pth.tar")
    resumed = run(world, tmp_path / "cut", *words, "--resume", file)
    assert_same(resumed["net"], whole["net"])
    lines = [
        [x["loss"] for x in log_lines(tmp_path / name / "log" / "e") if x["event"] == "train"]
        for name in ("whole", "cut")
    ]
    assert lines[0] == lines[1]


def test_sums_that_are_none_are_refused(world, tmp_path):
    words = ("--max-iters", 3)
    cut = run(world, tmp_path, *words, "--stop-after", 1)
    for sums in ({"loss": ("much", 1.0)}, {"loss": 3.0}, 3):
        checkpoint.save(cut | {"sums": sums}, file := tmp_path / "e" / "ckpt.pth.tar")
        with pytest.raises(ValueError, match=r"is damaged or made by other means: sums\b"):
            run(world, tmp_path, *words, "--resume", file)
