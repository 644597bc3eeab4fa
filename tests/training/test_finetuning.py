"""Phase 3 through its command line: what it trains on, what it leaves behind, resuming, options."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, assert_ok, run_script
from runs import (
    CPU,
    LABELS,
    TINY,
    assert_same,
    call,
    contents,
    deterministic,
    fake_venv,
    finetuning,
    interrupted,
    kill_until_finished,
    log_lines,
    make_folder,
    pretraining,
    run_shell,
    scalars,
    without_meta,
    world,
)

from datasets import UNKNOWN, build_datasets
from datasets.images import ImageSet
from lib.cli import declared
from lib.files import checkpoint
from lib.labels import pseudo_files
from lib.labels.gain import Gain
from lib.loading.batches import Batch
from lib.objectives.classification import Classification
from lib.training import finetuning as shared
from lib.training.optimizer import sgd, trainable
from lib.training.state import Checkpoints
from lib.training.step import train_steps
from models import build_model

__all__ = ["world"]  # the fixture


@pytest.fixture
def finetune(tmp_path, world):
    """Run phase 3 on the pictures in this process, everything under tmp_path/NAME."""

    def run(*words: object, name: str = "run") -> Path:
        folder = tmp_path / name
        files = ("--model-root", folder, "--log-root", folder / "log", "--exp-name", "e")
        data = ("--dataset", "folder", "--data-dir", world / "pictures", *TINY)
        defaults = ("--num-labeled", LABELS, "--max-iters", 4)
        call(finetuning, *data, *defaults, *files, *words)
        return folder

    return run


def last(folder: Path) -> dict[str, Any]:
    return checkpoint.load_dict(folder / "e" / "ckpt.pth.tar")


def examples_of(world: Path, *words: object) -> Any:
    """What a command line would train on."""
    data = ("--dataset", "folder", "--data-dir", world / "pictures", "--num-labeled", LABELS)
    args = finetuning.build_parser().parse_args([str(w) for w in (*data, *words)])
    train, _ = build_datasets("folder", world / "pictures", image_size=16)
    parts = shared.read_pseudo_labels(args.pseudo_file, args.pseudo_dir)
    return shared.choose_training_set(train, parts, declared.values(args, shared.Settings))


def test_the_script_runs_from_any_folder_and_prints_and_logs_both_accuracies(tmp_path):
    words = ("--dataset", "patches", "--arch", "wrn-10-1", "--max-iters", "4", "-b", "16")
    result = run_script(
        *("cifar-semi.py", *words, "--num-labeled", "50", "--eval-freq", "2"),
        cwd=tmp_path,
        PYTHONPATH="",
        CUDA_VISIBLE_DEVICES="",
    )
    output = assert_ok(result)
    folder = tmp_path / "checkpoint" / "cifar10-semi" / "exp"
    state = checkpoint.load_dict(folder / "ckpt.pth.tar")
    assert {"step", "best_acc", "net", "optimizer"} <= state.keys()
    assert state["step"] == 4
    best = checkpoint.load_dict(folder / "ckpt.best.pth.tar")
    lines = log_lines(tmp_path / "tensorboard" / "cifar10-semi" / "exp")
    tests = [x for x in lines if x["event"] == "test"]
    assert [x["step"] for x in tests] == [2, 4]
    assert lines[-1]["event"] == "end"
    assert lines[-1]["last"] == tests[-1]["top1"] == state["accuracies"]["last"]
    assert (
        lines[-1]["best"] == max(x["top1"] for x in tests) == best["best_acc"] == state["best_acc"]
    )
    assert (
        f"last accuracy {lines[-1]['last']:.2f}%, best accuracy {best['best_acc']:.2f}%" in output
    )


def test_without_a_pseudo_file_exactly_the_labeled_images_of_the_split_are_trained_on(world):
    train, _ = build_datasets("folder", world / "pictures", image_size=16)
    for seed in (0, 1):
        # the published draw, spelled out
        torch.manual_seed(seed)
        order = torch.randperm(len(train)).tolist()
        expected = []
        for label in range(4):
            expected += [i for i in order if train.targets[i] == label][: LABELS // 4]
        examples = examples_of(world, "--rng-seed", seed)
        assert examples.indexes.tolist() == expected
        assert torch.equal(examples.labels, train.targets[expected])
        assert examples.weights.eq(1).all()
        assert examples.num_labeled == LABELS


def test_with_a_pseudo_file_the_same_images_are_labeled_and_keep_their_true_labels(world):
    examples = examples_of(world, "--pseudo-file", world / "pseudo.pth.tar")
    baseline = examples_of(world)
    assert torch.equal(examples.indexes[:LABELS], baseline.indexes)
    assert torch.equal(examples.labels[:LABELS], baseline.labels)
    pseudo = pseudo_files.load(world / "pseudo.pth.tar")
    assert torch.equal(examples.indexes[LABELS:], pseudo.indexes)
    assert torch.equal(examples.labels[LABELS:], pseudo.labels)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_pseudo_ratio_takes_the_most_confident_share_of_one_global_ranking(world, ratio):
    pseudo = pseudo_files.load(world / "pseudo.pth.tar")
    examples = examples_of(
        world, "--pseudo-file", world / "pseudo.pth.tar", "--pseudo-ratio", ratio
    )
    count = int(ratio * 44)  # 40 labeled and 12 unlabeled pictures, less 8 labels
    assert examples.indexes[LABELS:].tolist() == pseudo.indexes[:count].tolist()


def test_class_balanced_takes_the_share_of_each_class(world):
    pseudo = pseudo_files.load(world / "pseudo.pth.tar")
    words = ("--pseudo-file", world / "pseudo.pth.tar", "--pseudo-ratio", 0.5, "--class-balanced")
    examples = examples_of(world, *words)
    for label in range(4):
        members = pseudo.indexes[pseudo.labels == label].tolist()
        chosen = examples.indexes[LABELS:][examples.labels[LABELS:] == label].tolist()
        assert chosen == members[: math.ceil(len(members) / 2)]


def test_confidence_weighted_gives_pseudo_labels_their_confidence_and_true_labels_one(world):
    pseudo = pseudo_files.load(world / "pseudo.pth.tar")
    file = ("--pseudo-file", world / "pseudo.pth.tar")
    assert examples_of(world, *file).weights.eq(1).all()
    weights = examples_of(world, *file, "--confidence-weighted").weights
    assert weights[:LABELS].eq(1).all()
    assert torch.equal(weights[LABELS:], pseudo.confidence)


def test_calibrated_weights_are_the_probabilities_of_the_labels(world, tmp_path):
    pseudo = pseudo_files.load(world / "pseudo.pth.tar")
    sharper = pseudo.probabilities.square()  # at half the temperature
    pseudo = replace(pseudo, probabilities=sharper / sharper.sum(dim=1, keepdim=True))
    pseudo_files.save(pseudo, tmp_path / "8.pth.tar")
    words = ("--pseudo-file", tmp_path / "8.pth.tar", "--calibrated-weights")
    weights = examples_of(world, *words).weights
    assert weights[:LABELS].eq(1).all()
    own = pseudo.probabilities[torch.arange(len(pseudo.labels)), pseudo.labels]
    assert torch.equal(weights[LABELS:], own)
    assert not torch.equal(own, pseudo.confidence)
    some = examples_of(world, *words, "--pseudo-ratio", 0.5).weights
    assert torch.equal(some, weights[: len(some)])
    pseudo_files.save(replace(pseudo, probabilities=None), tmp_path / "bare.pth.tar")
    with pytest.raises(ValueError, match=r"no probabilities .* which --calibrated-weights needs"):
        examples_of(world, "--calibrated-weights", "--pseudo-file", tmp_path / "bare.pth.tar")


@pytest.mark.parametrize(("best", "count"), [(0.5, 22), (0.0, 0)])
def test_the_ratio_auto_is_the_one_that_phase_2_estimated_best(
    world, tmp_path, capsys, best, count
):
    pseudo = pseudo_files.load(world / "pseudo.pth.tar")
    words = ("--pseudo-ratio", "auto", "--pseudo-file", tmp_path / "8.pth.tar")
    gain = Gain({0.0: 50.0, 0.2: 40.0, 0.5: 45.0, 1.0: 30.0} | {best: 62.5}, 8)
    meta = {**pseudo.meta, "gain": gain.entry()}
    pseudo_files.save(replace(pseudo, meta=meta), tmp_path / "8.pth.tar")
    examples = examples_of(world, *words)
    assert examples.indexes[LABELS:].tolist() == pseudo.indexes[:count].tolist()
    assert f"pseudo-labels: {gain}" in capsys.readouterr().out
    pseudo_files.save(pseudo, tmp_path / "8.pth.tar")
    with pytest.raises(ValueError, match=r"needs an estimate .* --estimate-gain"):
        examples_of(world, *words)


def test_recall_is_the_share_of_each_class_that_is_recognized():
    """Images of one gray, which a linear layer tells apart by their brightness."""
    targets = torch.tensor([0, 0, 0, 0, 1, 1, 3, UNKNOWN])
    seen = [0, 0, 0, 1, 1, 3, 0, 3]  # the class that each image looks like
    pixels = torch.tensor(seen, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    stats = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)
    data = ImageSet("gray", pixels, targets, ("a", "b", "c", "d"), stats)

    class Nearest(torch.nn.Module):
        def forward(self, images):
            return -(images.mean(dim=(1, 2, 3))[:, None] - torch.arange(4)).abs()

    found = shared.evaluate(Nearest(), data, CPU)
    assert found["recall"][:2] == [75, 50]
    assert math.isnan(found["recall"][2])
    assert found["recall"][3] == 0
    assert found["top1"] == pytest.approx(100 * 4 / 7)
    assert shared.worst_class(found["recall"], data.classes) == "lowest recall 0.0% (d)"


def test_a_weight_multiplies_its_own_example_in_the_loss():
    model = build_model("wrn-10-1", 3).eval()
    images = torch.rand(4, 3, 16, 16)
    labels, weights = torch.tensor([0, 1, 2, 1]), torch.tensor([1.0, 0.5, 0.25, 0.0])
    positions = torch.tensor([3, 0, 2, 1])
    with torch.no_grad():
        log_p = model(images).log_softmax(dim=1)
    losses = [-float(log_p[row, labels[p]] * weights[p]) for row, p in enumerate(positions)]
    step = next(
        train_steps(
            model,
            Classification(labels, weights),
            sgd(model.parameters(), 0.1, 0.0),
            [Batch((images,), torch.arange(4), 0, 4, positions)],
            lambda _: 0.1,
            CPU,
            head_only=True,  # evaluation mode, so that the closed form above holds
        )
    )
    assert step.loss.item() == pytest.approx(sum(losses) / 4, rel=1e-5)


@pytest.mark.parametrize("start", ["metric", "scratch"])
def test_resume_equals_uninterrupted_bit_for_bit(finetune, world, tmp_path, start):
    words = ("--max-iters", 9, "--eval-freq", 3, "--print-freq", 3, "--lr", 0.1)
    words += ("--pseudo-file", world / "pseudo.pth.tar", "--confidence-weighted")
    metric = ("--resume", world / "metric.pth.tar") if start == "metric" else ()
    whole = finetune(*words, *metric, name="whole")
    with interrupted(Checkpoints, "save", 3):
        finetune(*words, *metric, name="cut")
    file = tmp_path / "cut" / "e" / "ckpt.pth.tar"
    assert checkpoint.load_dict(file)["step"] == 6
    cut = finetune(*words, "--resume", file, name="cut")
    assert_same(without_meta(last(whole)), without_meta(last(cut)))
    best = "e/ckpt.best.pth.tar"
    assert_same(
        without_meta(checkpoint.load_dict(whole / best)),
        without_meta(checkpoint.load_dict(cut / best)),
    )
    whole_lines, cut_lines = (log_lines(f / "log" / "e") for f in (whole, cut))
    # step 9 was logged before the interruption and is logged again by the run that repeated it
    for event in ("train", "test"):
        repeated = {x["step"]: x for x in deterministic(cut_lines, event)}
        assert list(repeated.values()) == deterministic(whole_lines, event)


def assert_same_run(one: Path, other: Path) -> None:
    """Checkpoints to the last bit, and the same lines of the log in the same order."""
    for name in ("ckpt.pth.tar", "ckpt.best.pth.tar"):
        states = [checkpoint.load_dict(folder / "e" / name) for folder in (one, other)]
        assert_same(*map(without_meta, states))
    lines = [log_lines(folder / "log" / "e") for folder in (one, other)]
    for event in ("train", "test", "end"):
        assert deterministic(lines[0], event) == deterministic(lines[1], event)


STOPPED = ("--print-freq", 4, "--eval-freq", 6, "--lr", 0.1, "--confidence-weighted")


def test_a_run_stopped_between_two_lines_of_the_log_logs_them_as_the_uninterrupted_one(
    finetune, world, capsys
):
    words = (*STOPPED, "--max-iters", 14, "--pseudo-file", world / "pseudo.pth.tar")
    words += ("--pretrained", world / "metric.pth.tar")
    whole, starts = finetune(*words, name="whole"), (3, 2, 1, 7)
    for steps in starts:  # amid a mean, at a test, twice in a row, to the last but one
        cut = finetune(*words, "--resume", "auto", "--stop-after", steps, name="cut")
        file = cut / "e" / "ckpt.pth.tar"
        assert f"continue: python {sys.argv[0]}" in capsys.readouterr().out
    assert last(cut)["step"] == sum(starts)
    finetune(*words, "--resume", "auto", name="cut")
    assert f"--resume auto takes {file}" in capsys.readouterr().out
    assert_same_run(whole, cut)


def test_a_checkpoint_from_before_descriptions_goes_on_to_the_same_bits(finetune, world):
    words = (*STOPPED, "--max-iters", 8, "--pseudo-file", world / "pseudo.pth.tar")
    whole = finetune(*words, name="whole")
    cut = finetune(*words, "--stop-after", 3, name="cut")
    file = cut / "e" / "ckpt.pth.tar"
    state = checkpoint.load_dict(file)
    checkpoint.save({k: v for k, v in state.items() if k != "description"}, file)
    assert_same_run(whole, finetune(*words, "--resume", file, name="cut"))


def test_resume_auto_starts_afresh_where_there_is_no_checkpoint_and_says_so(finetune, capsys):
    folder = finetune("--resume", "auto")
    assert f"no checkpoint in {folder / 'e'} yet, starting afresh" in capsys.readouterr().out
    assert_same(without_meta(last(folder)), without_meta(last(finetune(name="plain"))))


def test_a_run_goes_on_without_looking_at_the_weights_it_once_started_from(finetune, world):
    words = ("--max-iters", 4, "--pretrained", world / "metric.pth.tar")
    folder = finetune(*words, "--stop-after", 2)
    whole = finetune(*words, name="whole")
    folder = finetune("--max-iters", 4, "--resume", "auto")
    assert_same(without_meta(last(folder)), without_meta(last(whole)))


def test_two_sets_of_weights_to_start_from_are_one_too_many(finetune, world):
    with pytest.raises(ValueError, match="both hold weights to start from"):
        finetune(
            *(word for o in ("--resume", "--pretrained") for word in (o, world / "metric.pth.tar"))
        )


def interrupt(command: list[str], number: signal.Signals, ready: Path, delay: float) -> int:
    """Send a signal to a run a while after it has written `ready` anew; its exit code."""
    before = ready.stat().st_mtime_ns if ready.is_file() else 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        deadline = time.monotonic() + 120
        while process.poll() is None and not (
            ready.is_file() and ready.stat().st_mtime_ns != before
        ):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(number)
        process.communicate(timeout=60)
        return process.returncode


def run_until_finished(
    world: Path, folder: Path, signals: list[signal.Signals], *words: object
) -> list:
    """The script again and again with --resume auto, ended by the signals; exit codes."""
    line = ("--dataset", "folder", "--data-dir", world / "pictures", *TINY, "--num-labeled", LABELS)
    line += ("--model-root", folder, "--log-root", folder / "log", "--exp-name", "e", *words)
    command = [sys.executable, ROOT / "cifar-semi.py", *line, "--resume", "auto"]
    command, rng = [str(word) for word in command], random.Random(0)
    ready = folder / "e" / "ckpt.pth.tar"
    codes = [interrupt(command, number, ready, rng.uniform(0, 0.1)) for number in signals]
    assert_ok(subprocess.run(command, capture_output=True, text=True, check=False))
    return codes


@pytest.mark.slow
def test_sigterm_and_ctrl_c_lose_nothing(finetune, world, tmp_path):
    words = (*STOPPED, "--max-iters", 300, "--eval-freq", 10, "--print-freq", 7)
    words += ("--pseudo-file", world / "pseudo.pth.tar", "--finetune")
    words += ("--pretrained", world / "metric.pth.tar")
    whole = finetune(*words, name="whole")
    codes = run_until_finished(world, tmp_path / "cut", [signal.SIGTERM, signal.SIGINT], *words)
    assert codes == [143, 130]
    assert_same_run(whole, tmp_path / "cut")


@pytest.mark.slow
def test_twenty_random_interruptions_change_no_bit(finetune, world):
    words = (*STOPPED, "--max-iters", 60, "--eval-freq", 7, "--print-freq", 5)
    words += ("--pseudo-file", world / "pseudo.pth.tar", "--iter-size", 2)
    whole, rng = finetune(*words, name="whole"), random.Random(0)
    for _ in range(20):
        cut = finetune(*words, "--resume", "auto", "--stop-after", rng.randint(1, 4), name="cut")
    assert 20 <= last(cut)["step"] < 60
    finetune(*words, "--resume", "auto", name="cut")
    assert_same_run(whole, cut)


def test_class_names_travel_and_others_are_refused(finetune, tmp_path):
    folder = finetune()
    assert last(folder)["classes"] == ["blue", "gray", "green", "red"]
    other = make_folder(tmp_path / "other")
    for part in ("train", "test"):
        (other / part / "red").rename(other / part / "violet")
    line = ("--data-dir", other, "--resume", folder / "e" / "ckpt.pth.tar")
    for more in ((), ("--eval",)):
        with pytest.raises(ValueError, match="other classes than these: 3 red / violet"):
            finetune(*line, *more)


def remember_best(file, best):
    """Let a run have reached an accuracy of which nothing later is the better."""
    state = checkpoint.load_dict(file)
    checkpoint.save(state | {"accuracies": state["accuracies"] | {"best": best}}, file)


def test_the_best_accuracy_is_remembered_on_resume(finetune, tmp_path):
    with interrupted(Checkpoints, "save", 2):
        finetune("--eval-freq", 2)
    file, best = (tmp_path / "run" / "e" / f"ckpt.{x}pth.tar" for x in ("", "best."))
    remember_best(file, 100.0)
    before = best.read_bytes()
    folder = finetune("--eval-freq", 2, "--resume", file)
    assert last(folder)["best_acc"] == last(folder)["accuracies"]["best"] == 100
    assert best.read_bytes() == before


def test_the_accuracy_of_the_last_step_is_told_and_not_the_best_on_the_test_images(
    finetune, capsys
):
    file = finetune() / "e" / "ckpt.pth.tar"
    accuracy = checkpoint.load_dict(file)["accuracies"]["last"]
    remember_best(file, 100.0)
    capsys.readouterr()
    finetune("--resume", file)
    assert f"last accuracy {accuracy:.2f}%, best accuracy 100.00%" in capsys.readouterr().out


def test_a_resumed_run_goes_on_with_its_learning_rates(finetune):
    words = ("--max-iters", 6, "--print-freq", 1, "--lr-scheduler", "cosine-with-restart")
    finetune(*words, "--stop-after", 3, name="cut")
    folders = finetune(*words, name="whole"), finetune(*words, "--resume", "auto", name="cut")
    whole, cut = (
        [x["lr"] for x in log_lines(folder / "log" / "e") if x["event"] == "train"]
        for folder in folders
    )
    assert whole == cut
    assert len(set(whole)) == 6


def test_a_finished_run_repeats_its_accuracy(finetune, capsys):
    folder = finetune()
    accuracy = last(folder)["accuracies"]["last"]
    before = (folder / "e" / "ckpt.pth.tar").read_bytes()
    capsys.readouterr()
    finetune("--resume", folder / "e" / "ckpt.pth.tar")
    assert f"last accuracy {accuracy:.2f}%" in capsys.readouterr().out
    assert (folder / "e" / "ckpt.pth.tar").read_bytes() == before


def test_the_same_command_gives_the_same_bytes(finetune):
    a, b = finetune(name="a"), finetune(name="b")
    assert_same(without_meta(last(a)), without_meta(last(b)))


def test_the_last_checkpoint_is_saved_even_where_no_test_is_due(finetune):
    folder = finetune("--max-iters", 5, "--eval-freq", 100, "--print-freq", 100)
    assert last(folder)["step"] == 5
    events = [x["event"] for x in log_lines(folder / "log" / "e")]
    assert events == ["start", "train", "test", "end"]


def test_scalars_are_written_at_print_and_eval_frequency_and_equal_the_log(finetune):
    folder = finetune("--max-iters", 12, "--print-freq", 4, "--eval-freq", 6)
    board, lines = scalars(folder / "log" / "e"), log_lines(folder / "log" / "e")
    assert {"train/loss", "train/lr", "test/top1", "test/best", "end/last"} <= board.keys()
    assert [step for step, _ in board["train/loss"]] == [4, 8, 12]
    assert [step for step, _ in board["test/top1"]] == [6, 12]
    for tag, points in board.items():
        event, name = tag.split("/")
        logged = [x[name] for x in lines if x["event"] == event]
        assert [value for _, value in points] == pytest.approx(logged, rel=1e-6)


def test_the_head_alone_is_missing_in_a_metric_of_phase_1(finetune, world, capsys):
    finetune("--resume", world / "metric.pth.tar")
    weights = checkpoint.load_dict(world / "metric.pth.tar")["net"]
    report = f"{len(weights) - 2} tensors loaded; 2 missing (fc.weight, fc.bias)"
    assert report in capsys.readouterr().out


def test_the_metric_is_where_training_starts(finetune, world):
    start = checkpoint.load_dict(world / "metric.pth.tar")["net"]
    words = ("--max-iters", 1, "--lr", 1e-9, "--weight-decay", 0)
    from_metric = last(finetune(*words, "--resume", world / "metric.pth.tar", name="a"))["net"]
    from_scratch = last(finetune(*words, name="b"))["net"]
    name = "block3.layer.0.conv1.weight"
    torch.testing.assert_close(from_metric[name], start[name], rtol=0, atol=1e-5)
    assert (from_scratch[name] - start[name]).abs().max() > 0.01
    assert from_metric["fc.weight"].shape == (4, 64)


def test_finetune_leaves_all_but_the_last_layer_bit_identical(finetune, world):
    start = checkpoint.load_dict(world / "metric.pth.tar")["net"]
    words = ("--resume", world / "metric.pth.tar", "--finetune", "--eval-freq", 2, "--lr", 0.5)
    trained = last(finetune(*words))
    for name, value in trained["net"].items():
        if name not in ("fc.weight", "fc.bias"):  # BatchNorm's running statistics too
            assert torch.equal(value, start[name]), name
    assert len(trained["optimizer"]["param_groups"][0]["params"]) == 2
    torch.manual_seed(0)
    untrained = build_model("wrn-10-1", 4)
    assert not torch.equal(trained["net"]["fc.weight"], untrained.fc.weight)


def test_finetune_gives_the_frozen_layers_no_gradient():
    model = build_model("wrn-10-1", 4)
    assert len(trainable(model, head_only=False)) == len(list(model.parameters()))
    assert trainable(model, head_only=True) == [model.fc.weight, model.fc.bias]
    model(torch.rand(2, 3, 16, 16)).sum().backward()
    with_gradient = [name for name, p in model.named_parameters() if p.grad is not None]
    assert with_gradient == ["fc.weight", "fc.bias"]


@pytest.mark.parametrize(
    ("words", "compared"),
    [
        (("--lr", 0.1), ()),
        (("--weight-decay", 0.1), ()),
        (("--lr-scheduler", "one-cycle"), ()),
        (("--max-iters", 5), ()),
        (("-b", 8), ()),
        (("--iter-size", 2), ()),
        (("--rng-seed", 1), ()),
        (("--image-size", 24), ()),
        (("--precision", "bf16"), ()),
        (("--num-labeled", 12), ()),
        (("--num-labeled", "all"), ()),
        (("--criterion", "MultiMarginLoss"), ()),
        (("--resume", "METRIC"), ()),
        (("--pretrained", "METRIC"), ()),
        (("--finetune",), ()),
        (("--pseudo-file", "PSEUDO"), ()),
        (("--pseudo-file", "PSEUDO", "--pseudo-ratio", 0.3), ("--pseudo-file", "PSEUDO")),
        (("--pseudo-file", "PSEUDO", "--confidence-weighted"), ("--pseudo-file", "PSEUDO")),
        (
            ("--pseudo-file", "PSEUDO", "--pseudo-ratio", 0.3, "--class-balanced"),
            ("--pseudo-file", "PSEUDO", "--pseudo-ratio", 0.3),
        ),
    ],
    ids=lambda words: " ".join(map(str, words)) or "plain",
)
def test_every_option_changes_the_run(finetune, world, words, compared):
    places = {"METRIC": world / "metric.pth.tar", "PSEUDO": world / "pseudo.pth.tar"}
    nets = [
        last(finetune(*(places.get(w, w) for w in line), name=name))["net"]
        for name, line in (("changed", words), ("plain", compared))
    ]
    assert not torch.equal(*(net["fc.weight"] for net in nets))


def test_input_gray_builds_a_network_of_one_channel_that_is_evaluated_in_gray(
    finetune, world, tmp_path
):
    folder = finetune("--input-gray")
    state = last(folder)
    assert state["net"]["conv1.weight"].shape[1] == 1
    words = ("--dataset", "folder", "--data-dir", world / "pictures", *TINY, "--input-gray")
    scores = call(finetuning, *words, "--eval", "--resume", folder / "e" / "ckpt.pth.tar")
    assert scores["top1"] == state["accuracies"]["last"]


def test_multi_step_is_offered_and_works_by_the_step(finetune):
    words = ("--lr-scheduler", "multi-step", "--lr", 0.5, "--max-iters", 10, "--print-freq", 1)
    lines = log_lines(finetune(*words) / "log" / "e")
    rates = [x["lr"] for x in lines if x["event"] == "train"]
    expected = [0.5] * 3 + [0.1] * 3 + [0.02] * 2 + [0.004] * 2
    assert rates == pytest.approx(expected)


def test_the_multi_margin_criterion_is_the_loss_that_is_logged(finetune):
    # before the first step the classes of a fresh head differ by little: each of 3 wrong ones costs
    # almost the margin 1, averaged over 4 classes
    words = ("--criterion", "MultiMarginLoss", "--max-iters", 1)
    (train,) = deterministic(log_lines(finetune(*words) / "log" / "e"), "train")
    (plain,) = deterministic(log_lines(finetune("--max-iters", 1, name="p") / "log" / "e"), "train")
    assert train["loss"] != plain["loss"]
    assert 0.3 < train["loss"] < 1.5


def test_eval_only_measures(finetune, world, tmp_path):
    folder = finetune()
    before = contents(tmp_path)
    file = folder / "e" / "ckpt.pth.tar"
    words = ("--dataset", "folder", "--data-dir", world / "pictures", *TINY, "--eval")
    files = ("--model-root", tmp_path / "none", "--log-root", tmp_path / "none")
    scores = call(finetuning, *words, "--resume", file, *files)
    assert contents(tmp_path) == before

    _, test = build_datasets("folder", world / "pictures", image_size=16)
    model = build_model("wrn-10-1", 4).eval()
    model.load_state_dict(last(folder)["net"])
    mean, std = (torch.tensor(s).view(1, 3, 1, 1) for s in test.stats)
    with torch.no_grad():
        chosen = [int(model((i[None] / 255 - mean) / std).argmax()) for i in test.images]
    hits = [a == b for a, b in zip(chosen, test.targets.tolist(), strict=True)]
    assert (
        scores["top1"]
        == pytest.approx(100 * sum(hits) / len(hits))
        == last(folder)["accuracies"]["last"]
    )
    assert scores["top5"] == 100  # four classes: the top five hold them all


def test_a_published_classifier_can_be_measured(finetune, world, tmp_path):
    state = last(finetune())
    published = tmp_path / "published.pth.tar"
    weights = {f"module.{name}": value for name, value in state["net"].items()}
    keys = {"step": 4, "best_acc": 0.0, "net": weights, "optimizer": state["optimizer"]}
    checkpoint.save(keys, published)
    words = ("--dataset", "folder", "--data-dir", world / "pictures", *TINY)
    scores = call(finetuning, *words, "--eval", "--resume", published)
    assert scores["top1"] == state["accuracies"]["last"]


def test_a_folder_without_test_images_trains_and_says_no_accuracy(tmp_path, capsys):
    data = make_folder(tmp_path / "data", test=False)
    words = ("--dataset", "folder", "--data-dir", data, *TINY, "--num-labeled", 8)
    files = ("--model-root", tmp_path / "m", "--log-root", tmp_path / "l")
    call(finetuning, *words, "--max-iters", 2, *files)
    said = capsys.readouterr().out
    assert not re.search("(test|last|best) accuracy", said)
    for line in (tmp_path / "l" / "exp" / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # NaN is no JSON
    assert checkpoint.load_dict(tmp_path / "m" / "exp" / "ckpt.pth.tar")["step"] == 2


def test_cuda_visible_devices_is_left_alone(finetune, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    finetune("--gpus", 0)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"


def test_divergence_stops_on_the_step_and_keeps_the_old_checkpoint(finetune):
    folder = finetune()
    before = {p: p.read_bytes() for p in (folder / "e").iterdir()}
    with pytest.raises(FloatingPointError, match="loss of step 2 is not finite"):
        finetune("--lr", 1e30)
    assert {p: p.read_bytes() for p in (folder / "e").iterdir()} == before
    assert len(before) == 2


def test_weights_that_a_last_step_blew_up_are_not_saved(finetune, tmp_path):
    # the loss of the only step is finite, what it leaves is not
    with pytest.raises(FloatingPointError, match="not finite after step 1"):
        finetune("--max-iters", 1, "--lr", 1e35, "--weight-decay", 1e9)
    assert not list((tmp_path / "run" / "e").iterdir())


def test_settings_without_effect_are_named(finetune, capsys):
    unused = ("--class-balanced", "--confidence-weighted", "--pseudo-per-chunk")
    finetune("--pseudo-ratio", 0.2, *unused)
    said = capsys.readouterr().err
    for option in ("--pseudo-ratio", *unused[:2]):
        assert f"{option} has no effect without --pseudo-file or --pseudo-dir" in said
    assert "--pseudo-per-chunk has no effect without --pseudo-dir" in said
    finetune()
    assert "no effect" not in capsys.readouterr().err


def test_the_shell_script_trains_once_per_number_of_labels_with_the_published_ratio(tmp_path):
    log = tmp_path / "log"
    venv, pseudos = fake_venv(tmp_path / "venv", log), tmp_path / "pseudos"
    pseudos.mkdir()
    for count in (250, 4000):
        (pseudos / f"{count}.pth.tar").touch()  # and not 250_T_1.pth.tar
    result = run_shell(
        *("finetune_cifar10.sh", 250, 4000, "--max-iters", 10, "--exp-name", "mine"),
        VENV=str(venv),
        PSEUDO_DIR=str(pseudos),
    )
    assert_ok(result)
    runs = [line.split() for line in log.read_text().splitlines()]
    assert [words[0] for words in runs] == ["cifar-semi.py"] * 2
    parsed = [finetuning.build_parser().parse_args(words[1:]) for words in runs]
    assert [a.num_labeled for a in parsed] == [250, 4000]
    assert [a.pseudo_file for a in parsed] == [str(pseudos / f"{n}.pth.tar") for n in (250, 4000)]
    assert {a.pseudo_ratio for a in parsed} == {0.2}
    assert {(a.max_iters, a.exp_name) for a in parsed} == {(10, "mine")}  # the user's words win
    assert {a.resume for a in parsed} == {"checkpoint/instance_cifar10/ckpt.cifar.pth.tar"}


def test_the_shell_script_names_a_missing_pseudo_file_before_the_first_run(tmp_path):
    log = tmp_path / "log"
    venv = fake_venv(tmp_path / "venv", log)
    (tmp_path / "250.pth.tar").touch()
    result = run_shell("finetune_cifar10.sh", 250, 500, VENV=str(venv), PSEUDO_DIR=str(tmp_path))
    assert result.returncode == 2
    assert f"{tmp_path}/500.pth.tar" in result.stderr
    assert not log.exists()


def test_the_pretraining_shell_script_has_the_published_schedule(tmp_path):
    log = tmp_path / "log"
    venv = fake_venv(tmp_path / "venv", log)
    assert_ok(run_shell("instance_cifar10.sh", "--arch", "wrn-28-10", VENV=str(venv)))
    (words,) = (line.split() for line in log.read_text().splitlines())
    args = pretraining.build_parser().parse_args(words[1:])
    assert (words[0], args.lr_scheduler, args.epochs) == (
        "unsupervised/cifar.py",
        "cosine-with-restart",
        1270,
    )
    assert args.architecture == "wrn-28-10"


@pytest.mark.parametrize("phase", ["instance", "propagate", "finetune"])
def test_shell_scripts_show_their_header_as_manual(phase):
    output = assert_ok(run_shell(f"{phase}_cifar10.sh", "--help"))
    header = (ROOT / "scripts" / f"{phase}_cifar10.sh").read_text().split("set -euo pipefail")[0]
    expected = [line.removeprefix("#").removeprefix(" ") for line in header.splitlines()[1:]]
    assert output.splitlines() == expected


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_the_uninterrupted_one(finetune, world, tmp_path):
    words = ("--max-iters", 150, "--eval-freq", 5, "--print-freq", 5)
    words += ("--pseudo-file", world / "pseudo.pth.tar")
    whole, cut = finetune(*words, name="whole"), tmp_path / "cut"
    words += ("--dataset", "folder", "--data-dir", world / "pictures", *TINY)
    words += ("--num-labeled", LABELS, "--model-root", cut, "--log-root", cut / "log")
    words += ("--exp-name", "e")
    file = cut / "e" / "ckpt.pth.tar"
    assert kill_until_finished("cifar-semi.py", *words, file=file, kills=8) >= 3
    assert_same(without_meta(last(whole)), without_meta(last(cut)))
