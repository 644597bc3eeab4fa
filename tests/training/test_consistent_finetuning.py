"""Consistency training, moving average and class means through the command line of phase 3."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runs import (
    CPU,
    LABELS,
    TINY,
    assert_same,
    call,
    deterministic,
    finetuning,
    log_lines,
    without_meta,
    world,
)
from torch import nn

from datasets import build_datasets
from datasets.transforms import Augmentation
from lib.cli import declared
from lib.cli.start import load_script
from lib.files import checkpoint
from lib.labels import pseudo_files
from lib.training import finetuning as shared
from lib.training.ema import DECAY, MovingAverage
from lib.training.optimizer import learning_rate, sgd
from models import build_model

__all__ = ["world"]  # the fixture

imagenet = load_script("imagenet-semi.py")
LOGGED = {"supervised", "consistency", "weight", "used", "agreement", "top1"}


@pytest.fixture
def finetune(tmp_path, world):
    """Run phase 3 on the pictures, with the metric and pseudo-labels; everything under tmp_path/NAME."""

    def run(*words: object, name: str = "run", script: Any = finetuning) -> Path:
        folder = tmp_path / name
        files = ("--model-root", folder, "--log-root", folder / "log", "--exp-name", "e")
        data = ("--dataset", "folder", "--data-dir", world / "pictures", "--num-labeled", LABELS)
        start = (
            "--pretrained",
            world / "metric.pth.tar",
            "--pseudo-file",
            world / "pseudo.pth.tar",
        )
        call(script, *data, *TINY, "-b", 4, "--max-iters", 6, *start, *files, *words)
        return folder / "e"

    return run


def last(folder: Path) -> dict[str, Any]:
    return checkpoint.load_dict(folder / "ckpt.pth.tar")


@pytest.mark.parametrize("kind", ["softmatch", "freematch"])
def test_a_consistent_run_logs_what_it_learns_from_and_resumes_to_the_same_bits(finetune, kind):
    words = ("--consistency", kind, "--print-freq", 2, "--eval-freq", 3)
    whole = finetune(*words, name="whole")
    finetune(*words, "--stop-after", 4, name="cut")
    cut = finetune(*words, "--resume", "auto", name="cut")
    state = last(whole)
    assert_same(without_meta(last(cut)), without_meta(state))
    lines = deterministic(log_lines(whole.parent / "log" / "e"), "train")
    assert len(lines) == 3
    assert all(line.keys() >= LOGGED for line in lines)
    assert 0 <= lines[0]["weight"] <= 1
    assert 0 <= lines[0]["agreement"] <= 100
    assert state["objective"].keys() == {
        "mean_probabilities",
        "mean_confidence",
        "confidence_variance",
    }
    assert {"net", "net_in_training"} <= state.keys()  # the average of the weights by default
    assert not torch.equal(state["net"]["fc.weight"], state["net_in_training"]["fc.weight"])


def test_a_run_with_a_share_of_true_labels_resumes_to_the_same_bits(finetune):
    words = ("--labeled-share", 0.5, "--calibrated-weights", "--ema", "--head-init", "class-means")
    whole = finetune(*words, "--eval-freq", 3, name="whole")
    finetune(*words, "--eval-freq", 3, "--stop-after", 4, name="cut")
    cut = finetune(*words, "--eval-freq", 3, "--resume", "auto", name="cut")
    assert_same(without_meta(last(cut)), without_meta(last(whole)))
    drawn = finetune(*words[2:], "--eval-freq", 3, name="drawn")
    assert not torch.equal(last(drawn)["net"]["fc.weight"], last(whole)["net"]["fc.weight"])
    with pytest.raises(ValueError, match="two weights: name one"):
        finetune(*words, "--confidence-weighted")


def test_what_is_tested_and_measured_is_the_average(finetune, world, tmp_path):
    folder = finetune("--ema", "--eval-freq", 6)
    state = last(folder)
    words = ("--dataset", "folder", "--data-dir", world / "pictures", *TINY, "--eval")
    scores = call(finetuning, *words, "--resume", folder / "ckpt.pth.tar")
    assert scores["top1"] == state["accuracies"]["last"]
    model = build_model("wrn-10-1", 4)
    model.load_state_dict(state["net"])
    _, test = build_datasets("folder", world / "pictures", image_size=16)
    again = shared.evaluate(model, test, CPU)
    assert again["top1"] == state["accuracies"]["last"]


def test_an_average_follows_the_weights_as_its_closed_form_says():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    average = MovingAverage(model)
    expected = model[0].weight.item()
    for step in range(30):
        with torch.no_grad():
            model[0].weight.fill_(step)
        model[1].running_mean.fill_(step)
        average.update(model, step)
        decay = min(DECAY, step / (9 + step))
        expected = decay * expected + (1 - decay) * step
    assert float(average.model[0].weight) == pytest.approx(expected, rel=1e-5)
    assert float(average.model[1].running_mean) == 29
    assert not any(p.requires_grad for p in average.model.parameters())


def test_weights_do_not_decay_where_it_is_asked_for_and_the_rate_warms_up():
    model = build_model("wrn-10-1", 3)
    optimizer = sgd(model.parameters(), 0.1, 0.5, decay_all=False)
    decays = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        assert decays[id(parameter)] == (0.5 if parameter.ndim > 1 else 0), name
    plain = learning_rate("cosine", 0.1, 100)
    rising = learning_rate("cosine", 0.1, 100, warmup=9)
    for step in range(100):
        assert rising(step) == pytest.approx(min(1, (step + 1) / 10) * plain(step))


@pytest.mark.parametrize("flat", [0.0, 0.9])
def test_the_last_layer_starts_as_a_discriminant_analysis_no_surer_than_the_labels(world, flat):
    train, _ = build_datasets("folder", world / "pictures", image_size=16)
    pseudo = pseudo_files.load(world / "pseudo.pth.tar")
    true = train.targets[pseudo.labeled]
    ones, posteriors = torch.ones(len(true)), (1 - flat) * pseudo.probabilities + flat / 4
    if not flat:  # as sure as can be
        posteriors = F.one_hot(posteriors.argmax(dim=1), 4).float()
    chosen = shared.TrainingSet(pseudo.labeled, true, ones, len(true), pseudo.indexes, posteriors)
    torch.manual_seed(0)
    model = build_model("wrn-10-1", 4)
    plain = Augmentation((), train.stats)
    shared.start_from_class_means(model, train, chosen, CPU, plain, 0)
    model.eval()
    with torch.no_grad():
        images = torch.cat([b.images for b in shared.in_order(train, plain, CPU)])
        features, logits = model.pooled(images), model(images)
    shares = torch.zeros(len(train), 4)
    shares[pseudo.labeled, true] = 1
    shares[pseudo.indexes, posteriors.argmax(dim=1)] = posteriors.amax(dim=1)
    features, shares = features.double(), shares.double()
    means = torch.stack(
        [(shares[:, c, None] * features).sum(0) / shares[:, c].sum() for c in range(4)]
    )
    within = torch.zeros(64, 64, dtype=torch.float64)
    for row, of_row in zip(features, shares, strict=True):
        for label in range(4):
            away = row - means[label]
            within += of_row[label] * away[:, None] * away[None]
    shrinkage = 64 / (64 + float(shares.sum()))
    unit = features.var(dim=0).mean() * torch.eye(64)
    within = (1 - shrinkage) * within / shares.sum() + shrinkage * unit
    inverse = within.inverse()
    expected = torch.stack([-((features - m) @ inverse * (features - m)).sum(1) / 2 for m in means])
    expected -= expected.mean(dim=0)
    found = (logits.double() - logits.double().mean(dim=1, keepdim=True)).T
    temperature = (expected * found).sum() / found.square().sum()
    assert temperature > 1.1 if flat else temperature == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(temperature * found, expected, rtol=1e-3, atol=1e-3)
    used = torch.cat([pseudo.labeled, pseudo.indexes])
    sure = float(logits[used].softmax(dim=1).amax(dim=1).mean())
    wanted = float(shares[used].amax(dim=1).mean())
    assert sure == pytest.approx(wanted, abs=1e-3) if flat else sure < wanted


@pytest.mark.parametrize("added", ["rand-augment", "none"])
def test_the_strong_view_is_augmented_as_its_option_says(world, added):
    train, _ = build_datasets("folder", world / "pictures", image_size=16)
    words = ("--consistency", "--strong-augmentation", added)
    args = finetuning.build_parser().parse_args(words)
    settings = declared.values(args, shared.Settings)
    described = SimpleNamespace(stats=train.stats, luma=())
    streams = shared.build_streams(train, [], described, CPU, settings, 0)
    indexes = torch.arange(8)
    (batch,) = streams.repeat(indexes, 0, 1, others=indexes)
    weak, strong = batch.unlabeled.views
    assert torch.equal(weak, strong) == (added == "none")


def test_a_discriminant_analysis_of_one_label_a_class_is_finite(world):
    train, _ = build_datasets("folder", world / "pictures", image_size=16)
    labeled = torch.tensor([int((train.targets == c).nonzero()[0]) for c in range(4)])
    chosen = shared.TrainingSet(labeled, torch.arange(4), torch.ones(4), 4)
    torch.manual_seed(0)
    model = build_model("wrn-10-1", 4)
    shared.start_from_class_means(model, train, chosen, CPU, Augmentation((), train.stats), 0)
    model.eval()
    with torch.no_grad():
        logits = torch.cat(
            [model(b.images) for b in shared.in_order(train, Augmentation((), train.stats), CPU)]
        )
    assert torch.equal(logits[labeled].argmax(dim=1), torch.arange(4))


def test_the_same_in_the_script_for_imagenet(finetune, world, tmp_path):
    words = ("--arch", "resnet18", "--image-size", 40, "--gpus", "cpu", "--num-workers", 0)
    state = checkpoint.load_dict(world / "pseudo.pth.tar")
    checkpoint.save(state | {"meta": {}}, tmp_path / "pseudo.pth.tar")  # read in another way
    words += ("--pretrained", "", "--pseudo-file", tmp_path / "pseudo.pth.tar")
    folder = finetune(*words, "--consistency", "-b", 2, "--max-iters", 2, script=imagenet)
    assert last(folder)["step"] == 2
    assert last(folder)["meta"]["options"]["unlabeled_ratio"] == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--pseudo-file", ""), "--consistency starts from the pseudo-labels of phase 2"),
        (("--loader", "workers"), "leave out --loader workers"),
    ],
)
def test_what_consistency_cannot_work_with_is_refused(finetune, words, message):
    with pytest.raises(ValueError, match=message):
        finetune("--consistency", "softmatch", *words)


def test_pseudo_labels_without_probabilities_are_refused(finetune, world, tmp_path):
    state = checkpoint.load_dict(world / "pseudo.pth.tar")
    del state["pseudo_probs"]
    checkpoint.save(state, tmp_path / "bare.pth.tar")
    with pytest.raises(ValueError, match=r"holds no probabilities .* without --no-probabilities"):
        finetune("--consistency", "softmatch", "--pseudo-file", tmp_path / "bare.pth.tar")


def test_a_consistent_run_brings_its_own_defaults():
    parser = finetuning.build_parser()
    args = parser.parse_args(["--consistency", "--pseudo-file", "x", "-b", "32"])
    assert (args.consistency, args.batch_size, args.lr) == ("softmatch", 32, 0.03)
    assert (args.ema, args.head_init, args.warmup) == (True, "class-means", 500)
    plain = finetuning.build_parser().parse_args([])
    assert (plain.ema, plain.head_init, plain.warmup, plain.lr) == (False, "random", 0, 0.01)
