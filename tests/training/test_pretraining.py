"""Phase 1 through its command line: what a run leaves behind, resuming, options, divergence."""

import math
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import assert_ok, run_script
from runs import (
    TINY,
    assert_same,
    call,
    contents,
    deterministic,
    interrupted,
    kill_until_finished,
    last,
    load_embedding,
    log_lines,
    make_folder,
    pretraining,
    scalars,
    without_meta,
)

import lib.training.pretraining
from datasets import build_datasets
from lib.cli import start
from lib.features import extraction
from lib.files import checkpoint
from lib.objectives import coding_rate, memory_bank
from lib.objectives.objective import Objective
from lib.runtime.devices import Device
from lib.training import pretraining as loop
from lib.training import state, step
from lib.training.state import Checkpoints
from models import build_model


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def pretrain(tmp_path, pictures):
    """Run phase 1 on the pictures in this process, everything under tmp_path/NAME."""

    def run(*words: object, name: str = "run") -> Path:
        folder = tmp_path / name
        files = ("--model-dir", folder, "--log-dir", folder / "log")
        call(pretraining, "--dataset", "folder", "--data-dir", pictures, *TINY, *files, *words)
        return folder

    return run


def test_the_script_runs_from_any_folder_and_leaves_the_published_keys(tmp_path):
    result = run_script(
        *("unsupervised/cifar.py", "--dataset", "patches", "--arch", "wrn-10-1", "--epochs", "1"),
        cwd=tmp_path,
        PYTHONPATH="",
        CUDA_VISIBLE_DEVICES="",
    )
    output = assert_ok(result)
    assert "chance 8.0064" in output  # log(3000)
    assert "kNN top-1" in output
    folder = tmp_path / "checkpoint" / "instance_cifar10"
    state = last(folder)
    assert {"net", "optimizer", "acc", "epoch", "lemniscate"} <= state.keys()
    assert state["lemniscate"]["memory"].shape == (3000, 128)
    assert not [name for name in state["net"] if name.startswith(("module.", "_orig_mod."))]
    assert (folder / "ckpt.cifar.best.pth.tar").is_file()
    (epoch,) = deterministic(log_lines(tmp_path / "tensorboard" / "instance_cifar10"), "epoch")
    assert epoch["knn_top1"] == state["accuracies"]["last"] > 10  # one epoch beats guessing
    assert state["acc"] == epoch["knn_top1"] / 100  # published as a fraction
    assert "best_acc" not in state


def test_no_file_is_written_in_place_of_another_and_no_temporary_one_stays(pretrain):
    folder = pretrain("--epochs", 2)
    assert sorted(p.name for p in folder.iterdir()) == [
        "ckpt.cifar.best.pth.tar",
        "ckpt.cifar.pth.tar",
        "log",
    ]


def test_the_same_command_gives_the_same_bytes(pretrain):
    a, b = pretrain("--epochs", 2, name="a"), pretrain("--epochs", 2, name="b")
    assert_same(without_meta(last(a)), without_meta(last(b)))
    assert deterministic(log_lines(a / "log"), "epoch") == deterministic(
        log_lines(b / "log"), "epoch"
    )


@pytest.mark.parametrize(
    "words",
    [(), ("--nce-k", 8), ("--nce-k", 8, "--nce-loss", "infonce", "--lr-scheduler", "multi-step")],
    ids=["softmax", "nce", "infonce"],
)
def test_resume_equals_uninterrupted_bit_for_bit(pretrain, words):
    words = ("--epochs", 4, "--lr-scheduler", "cosine-with-restart", *words)
    whole = pretrain(*words, name="whole")
    with interrupted(loop, "describe", 3):
        pretrain(*words, name="cut")
    cut = pretrain(*words, "--resume", whole.parent / "cut" / "ckpt.cifar.pth.tar", name="cut")
    assert_same(without_meta(last(whole)), without_meta(last(cut)))
    best = "ckpt.cifar.best.pth.tar"
    assert_same(
        without_meta(checkpoint.load_dict(whole / best)),
        without_meta(checkpoint.load_dict(cut / best)),
    )
    whole_lines, cut_lines = log_lines(whole / "log"), log_lines(cut / "log")
    assert deterministic(whole_lines, "epoch") == deterministic(cut_lines, "epoch")
    assert [x["first_epoch"] for x in cut_lines if x["event"] == "start"] == [0, 2]


def test_the_best_accuracy_is_remembered_on_resume(pretrain, tmp_path):
    with interrupted(loop, "describe", 2):
        pretrain("--epochs", 3)
    file, best = (tmp_path / "run" / f"ckpt.cifar.{x}pth.tar" for x in ("", "best."))
    state = checkpoint.load_dict(file)
    never_reached = {"last": 1.0, "best": 100.0}
    checkpoint.save(state | {"accuracies": never_reached}, file)
    before = best.read_bytes()
    pretrain("--epochs", 3, "--resume", file)
    assert last(tmp_path / "run")["accuracies"]["best"] == 100
    assert best.read_bytes() == before


def test_best_and_last_are_both_kept_and_the_best_is_the_best_of_the_log(pretrain):
    folder = pretrain("--epochs", 5)
    accuracies = [x["knn_top1"] for x in log_lines(folder / "log") if x["event"] == "epoch"]
    best = checkpoint.load_dict(folder / "ckpt.cifar.best.pth.tar")
    assert best["accuracies"] == {"last": max(accuracies), "best": max(accuracies)}
    assert accuracies[best["epoch"]] == max(accuracies)
    assert last(folder)["epoch"] == 4
    assert last(folder)["accuracies"] == {"last": accuracies[-1], "best": max(accuracies)}


def recorded_saves(folder, monkeypatch):
    """The files of a run after its second epoch, and the names of those that it writes from now on."""
    written = []
    monkeypatch.setattr(state.checkpoint, "save", lambda _, path: written.append(path.name))
    monkeypatch.setattr(state.TrainState, "state_dict", lambda _: {})
    files = Checkpoints(folder, "last", "best", numbered="{epoch}", save_freq=2)
    network = torch.nn.Linear(2, 2)
    run = state.TrainState(network, network, None, None, None, {}, epoch=2)
    return files, run, written


def test_the_best_checkpoint_is_written_before_the_last_one(tmp_path, monkeypatch):
    # cut off between the two, what resumes from the best writes the others; the other way round the best
    # would be lost for good
    files, run, written = recorded_saves(tmp_path, monkeypatch)
    files.save(run, is_best=True, end_of_epoch=True)
    run.epoch = 3
    files.save(run, is_best=False, end_of_epoch=True)
    assert written == ["best", "2", "last", "last"]


@pytest.mark.parametrize("source", ["best", "2", "last", "4", "other"])
@pytest.mark.parametrize("last", ["older", "newer", "missing", "damaged"])
def test_a_save_that_was_cut_short_is_completed_from_the_newer_file(
    tmp_path, monkeypatch, source, last
):
    for name in {source, "last"} - ({"last"} if last == "missing" else set()):
        checkpoint.save({}, tmp_path / name)
        os.utime(tmp_path / name, (1000, 1000))
    if source != "last" and last != "missing":
        age = 999 if last == "older" else 1001
        os.utime(tmp_path / "last", (age, age))
    if last == "damaged":
        (tmp_path / "last").write_bytes(b"")
    files, run, written = recorded_saves(tmp_path, monkeypatch)
    replace(files, folder=tmp_path / "new").complete(run, tmp_path / source)
    assert written == []  # a run that goes on in another folder
    files.complete(run, tmp_path / source)
    # no file of this save: a copy of another epoch, and a foreign one
    own = source in ("best", "2")
    assert written == (["2", "last"] if own and last != "newer" else [])


def test_a_run_killed_between_the_files_of_its_last_save_ends_with_the_last_one(pretrain, capsys):
    folder = pretrain("--epochs", 1)
    finished = without_meta(last(folder))
    file, best = folder / "ckpt.cifar.pth.tar", folder / "ckpt.cifar.best.pth.tar"
    before = pretrain("--epochs", 1, "--stop-after", 3, name="before") / file.name
    os.utime(shutil.copy(before, file), ns=(0, best.stat().st_mtime_ns - 1))
    pretrain("--epochs", 1, "--resume", "auto")
    said = capsys.readouterr().out
    assert f"{file} is behind {best}" in said
    assert "already finished" in said
    assert_same(finished, without_meta(last(folder)))


def test_a_finished_run_has_nothing_left_to_train(pretrain, capsys):
    folder = pretrain("--epochs", 1)
    before = (folder / "ckpt.cifar.pth.tar").read_bytes()
    pretrain("--epochs", 1, "--resume", folder / "ckpt.cifar.pth.tar")
    assert "already finished" in capsys.readouterr().out
    assert (folder / "ckpt.cifar.pth.tar").read_bytes() == before


def test_scalars_go_to_log_dir_once_an_epoch_and_equal_the_log(pretrain):
    folder = pretrain("--epochs", 3)
    lines = deterministic(log_lines(folder / "log"), "epoch")
    board = scalars(folder / "log")
    assert {"epoch/loss", "epoch/lr", "epoch/knn_top1", "epoch/best"} <= board.keys()
    # 52 images in batches of 16 are 4 steps an epoch: a scalar per step would be 12
    assert {len(points) for points in board.values()} == {3}
    for name in ("loss", "lr", "knn_top1"):
        assert [step for step, _ in board[f"epoch/{name}"]] == [4, 8, 12]
        logged = [x[name] for x in lines]
        assert [value for _, value in board[f"epoch/{name}"]] == pytest.approx(logged, rel=1e-6)


def test_the_log_holds_the_chance_level_and_what_made_the_run(pretrain):
    folder = pretrain("--epochs", 1, "--nce-k", 8)
    start, epoch = log_lines(folder / "log")
    assert (start["event"], epoch["event"]) == ("start", "epoch")
    assert start["meta"]["options"]["nce_k"] == 8
    every, noise = 9 / 52 + 1e-7, 8 / 52  # P + K/N and the published epsilon, at P = 1/N
    assert epoch["chance"] == pytest.approx(math.log(52 * every) - 8 * math.log(noise / every))
    plain = pretrain("--epochs", 1, name="softmax")
    assert log_lines(plain / "log")[1]["chance"] == pytest.approx(math.log(52))


def test_multi_step_works_for_any_number_of_epochs(pretrain):
    folder = pretrain("--epochs", 5, "--lr-scheduler", "multi-step", "--lr", 0.5)
    # x0.2 at 30%, 60% and 80% of 5 epochs, in the first epoch that begins then
    expected = [0.5, 0.5, 0.5 * 0.2, 0.5 * 0.2**2, 0.5 * 0.2**3]
    assert [x["lr"] for x in log_lines(folder / "log")[1:]] == pytest.approx(expected)


def test_a_cosine_falls_toward_its_floor_and_is_not_stepped_once_too_early(pretrain):
    folder = pretrain("--epochs", 3, "--lr", 0.5)
    rates = [1e-5 + (0.5 - 1e-5) * (1 + math.cos(math.pi * epoch / 3)) / 2 for epoch in range(3)]
    assert [x["lr"] for x in log_lines(folder / "log")[1:]] == pytest.approx(rates)


def test_every_step_is_taken_at_the_rate_of_its_own_epoch(pretrain, monkeypatch):
    rates = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "SGD", Watched)
    pretrain("--epochs", 2, "--lr", 0.5)
    assert rates == pytest.approx([0.5] * 4 + [(0.5 + 1e-5) / 2] * 4)
    rates.clear()
    pretrain("--epochs", 2, "--lr", 0.5, "--lr-scheduler", "one-cycle", name="one-cycle")
    assert len(set(rates)) == 8


def test_measuring_leaves_what_is_trained_as_it_is(pretrain, tmp_path):
    measured = last(pretrain("--epochs", 2, name="measured"))
    data = make_folder(tmp_path / "data", test=False)
    plain = last(pretrain("--epochs", 2, "--data-dir", data, name="plain"))
    for part in ("net", "optimizer", "lemniscate"):
        assert_same(measured[part], plain[part], part)


@pytest.mark.parametrize(
    ("words", "compared"),
    [
        (("--lr", 0.1), ()),
        (("--weight-decay", 0.1), ()),
        (("--lr-scheduler", "one-cycle"), ()),
        (("--epochs", 2), ()),
        (("-b", 8), ()),
        (("--rng-seed", 1), ()),
        (("--image-size", 24), ()),
        (("--precision", "bf16"), ()),
        (("--nce-t", 0.5), ()),
        (("--nce-m", 0.9), ()),
        (("--transform-scale", 0.9), ()),
        (("--transform-crop", "PadCrop"), ()),
        (("--iter-size", 2), ()),
        (("--momentum", 0.5), ()),
        (("--nce-k", 8), ()),
        (("--nce-k", 9), ("--nce-k", 8)),
        (("--nce-k", 8, "--nce-loss", "infonce"), ("--nce-k", 8)),
        (("--nce-k", 8, "--nce-z", "first-batch"), ("--nce-k", 8)),
    ],
    ids=lambda words: " ".join(map(str, words)) or "plain",
)
def test_every_option_changes_the_run(pretrain, words, compared):
    changed = last(pretrain("--epochs", 1, *words, name="changed"))
    plain = last(pretrain("--epochs", 1, *compared, name="plain"))
    memory = [state["lemniscate"]["memory"] for state in (changed, plain)]
    assert not torch.equal(*memory)


def test_low_dim_and_architecture_decide_the_network(pretrain):
    state = last(pretrain("--epochs", 1, "--low-dim", 24, "--arch", "wrn-10-2"))
    assert state["lemniscate"]["memory"].shape == (52, 24)
    assert state["net"]["fc.weight"].shape == (24, 128)
    assert state["architecture"] == "wrn-10-2"


def test_the_bank_that_is_saved_has_unit_rows_and_all_of_them_moved(pretrain):
    memory = last(pretrain("--epochs", 1))["lemniscate"]["memory"]
    torch.testing.assert_close(memory.norm(dim=1), torch.ones(52), rtol=0, atol=1e-5)
    start = memory_bank.MemoryBank(52, 128, 0.5, 0).memory
    assert (memory != start).any(dim=1).all()  # the short last batch too


def test_test_only_measures_a_recomputed_bank_and_writes_nothing(pretrain, pictures, tmp_path):
    folder = pretrain("--epochs", 2)
    before = contents(tmp_path)
    words = ("--dataset", "folder", "--data-dir", pictures, *TINY)
    scores = call(
        *(pretraining, *words, "--test-only", "--resume", folder / "ckpt.cifar.pth.tar"),
        *("--model-dir", tmp_path / "none", "--log-dir", tmp_path / "none"),
    )
    assert contents(tmp_path) == before

    train, test = build_datasets("folder", pictures, image_size=16)
    model = build_model("wrn-10-1", 128, normalize=True).eval()
    model.load_state_dict(last(folder)["net"])
    mean, std = (torch.tensor(s).view(1, 3, 1, 1) for s in train.stats)
    with torch.no_grad():
        bank, queries = (model((s.images / 255 - mean) / std) for s in (train, test))
    mine = extraction.extract(model.train(), train, Device(torch.device("cpu"), bf16=False))
    torch.testing.assert_close(mine, bank, rtol=0, atol=1e-5)  # BatchNorm's running statistics
    known = train.targets >= 0
    votes = torch.zeros(len(test), 4)
    for row, query in enumerate(queries):
        for vector, label in zip(bank[known], train.targets[known], strict=True):
            votes[row, label] += math.exp(float(query @ vector) / 0.1)
    expected = 100 * (votes.argmax(dim=1) == test.targets).float().mean().item()
    assert scores["top1"] == pytest.approx(expected)


def test_test_only_needs_the_weights_alone(pretrain, pictures, tmp_path, capsys):
    folder = pretrain("--epochs", 1)
    bare = tmp_path / "published.pth.tar"
    weights = {f"module.{name}": value for name, value in last(folder)["net"].items()}
    checkpoint.save({"net": weights}, bare)
    words = ("--dataset", "folder", "--data-dir", pictures, *TINY, "--test-only", "--resume")
    own = call(pretraining, *words, folder / "ckpt.cifar.pth.tar")
    assert call(pretraining, *words, bare) == own
    assert "tensors loaded" in capsys.readouterr().out


def test_test_only_trains_nothing(pretrain, monkeypatch):
    folder = pretrain("--epochs", 1)
    monkeypatch.setattr(pretraining, "Batches", lambda *_, **__: pytest.fail("training began"))
    pretrain("--epochs", 1, "--test-only", "--resume", folder / "ckpt.cifar.pth.tar")


def test_a_folder_without_labels_to_test_on_trains_all_the_same(tmp_path):
    data = make_folder(tmp_path / "data", test=False)
    words = ("--dataset", "folder", "--data-dir", data, *TINY, "--epochs", 1)
    values = call(pretraining, *words, "--model-dir", tmp_path / "m", "--log-dir", tmp_path / "l")
    assert not [name for name in values if name.startswith("knn")]
    assert last(tmp_path / "m")["epoch"] == 0
    resume = ("--resume", tmp_path / "m" / "ckpt.cifar.pth.tar")
    with pytest.raises(ValueError, match="needs test images"):
        call(pretraining, *words, "--test-only", *resume)


def test_cuda_visible_devices_is_left_alone(pretrain, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    pretrain("--epochs", 1, "--gpus", 0)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"


def test_divergence_stops_on_the_step_and_keeps_the_old_checkpoint(pretrain, tmp_path):
    folder = pretrain("--epochs", 1)
    before = {p: p.read_bytes() for p in folder.glob("*.pth.tar")}
    with pytest.raises(FloatingPointError, match="loss of step 2 is not finite"):
        pretrain("--epochs", 1, "--lr", 1e30)
    assert {p: p.read_bytes() for p in folder.glob("*.pth.tar")} == before
    assert len(before) == 2


def test_divergence_ends_the_process_with_one_message_and_exit_code_1(
    pictures, tmp_path, monkeypatch, capsys
):
    files = ("--model-dir", tmp_path / "m", "--log-dir", tmp_path / "l")
    words = ("--dataset", "folder", "--data-dir", pictures, *TINY, "--lr", 1e30, *files)
    monkeypatch.setattr(sys, "argv", ["cifar.py", *map(str, words)])
    with pytest.raises(SystemExit) as exit_:
        start.run(pretraining.main, pretraining.build_parser())
    assert exit_.value.code == 1
    assert "step 2 is not finite" in capsys.readouterr().err
    assert not list((tmp_path / "m").iterdir())


@pytest.mark.parametrize("stop", [(), ("--stop-after", 1)], ids=["epoch", "stopped"])
def test_weights_that_a_last_step_blew_up_are_not_saved(pretrain, tmp_path, stop):
    # one step an epoch: its loss is still finite, what it leaves is not
    words = ("-b", 64, "--lr", 1e35, "--weight-decay", 1e9, *stop)
    with pytest.raises(FloatingPointError, match="not finite after step 1"):
        pretrain("--epochs", 1, *words)
    assert not list((tmp_path / "run").glob("*.pth.tar*"))


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_never_saved(number):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    run = state.TrainState(model, Objective(), None, None, None, {}, step=3)
    run.require_finite()
    model[1].running_var[1] = number
    run.step = 4
    with pytest.raises(FloatingPointError, match=r"1\.running_var is not finite after step 4"):
        run.require_finite()


def test_weights_are_looked_at_once_an_epoch_before_they_are_measured_and_saved(
    pretrain, monkeypatch
):
    seen, look, knn = [], torch.isfinite, loop.knn.accuracy
    monkeypatch.setattr(torch, "isfinite", lambda x: seen.append(x.shape) or look(x))
    monkeypatch.setattr(loop.knn, "accuracy", lambda *a, **k: seen.append("knn") or knn(*a, **k))
    folder = pretrain("--epochs", 2)
    bank = last(folder)["lemniscate"]["memory"].shape
    assert [x for x in seen if x in (bank, "knn")] == [bank, "knn"] * 2


def test_a_gpu_is_not_waited_for_at_every_step_and_the_very_step_is_named():
    watch = step.LossWatch(Device(torch.device("cpu"), bf16=False))
    watch._losses = torch.zeros(step.CHECK_EVERY)  # as on a GPU
    for number in range(1, step.CHECK_EVERY):
        watch.see(torch.tensor(math.nan if number >= 7 else 1.0))
    with pytest.raises(FloatingPointError, match="step 7 "):
        watch.see(torch.tensor(math.nan))


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_the_uninterrupted_one(pretrain, pictures, tmp_path):
    whole, cut = pretrain("--epochs", 30, name="whole"), tmp_path / "cut"
    words = ("--dataset", "folder", "--data-dir", pictures, *TINY, "--epochs", 30)
    words += ("--model-dir", cut, "--log-dir", cut / "log")
    file = cut / "ckpt.cifar.pth.tar"
    assert kill_until_finished("unsupervised/cifar.py", *words, file=file, kills=8) >= 3
    assert_same(without_meta(last(whole)), without_meta(last(cut)))


def test_momenta_numbered_in_another_order_reach_the_weights_of_their_name():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    own = [name for name, _ in model.named_parameters()]
    theirs = own[::-1]
    group = {"params": [70, 71, 72, 73], "lr": 0.1}
    state = {"state": {70 + i: {"momentum_buffer": name} for i, name in enumerate(theirs)}}
    state["param_groups"] = [group]
    turned = lib.training.pretraining._in_own_order(model, state, [*theirs, "0.running_mean"])
    found = [state["state"][n]["momentum_buffer"] for n in turned["param_groups"][0]["params"]]
    assert found == own


OBJECTIVES = {
    "two-view": ("--objective", "two-view", "-b", 16),
    "patches-tcr": ("--objective", "patches-tcr", "--views", 3, "-b", 16),
    "three-views": ("--views", 3),
}


@pytest.mark.parametrize("words", OBJECTIVES.values(), ids=OBJECTIVES)
def test_every_objective_gives_a_metric_and_resumes_to_the_same_bits(pretrain, words, monkeypatch):
    monkeypatch.setattr(coding_rate, "LAYERS", (64, 64, 32))  # 170 MB less in each checkpoint
    words = (*words, "--epochs", 2)
    whole, cut = pretrain(*words, name="whole"), pretrain(*words, "--stop-after", 3, name="cut")
    pretrain(*words, "--resume", "auto", name="cut")
    assert_same(without_meta(last(cut)), without_meta(last(whole)))
    state = last(whole)
    assert ("lemniscate" in state) == ("--objective" not in words)
    assert (
        not [name for name in state["net"] if "head" in name or "fc" in name]
        or "lemniscate" in state
    )
    log = deterministic(log_lines(whole / "log"), "epoch")
    assert log[-1]["knn_top1"] > 25
    found = load_embedding(whole / "ckpt.cifar.pth.tar").eval()
    rows = found(torch.rand(4, 3, 16, 16))
    assert rows.shape == (4, 128 if "lemniscate" in state else 64)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(4))


def test_a_metric_without_a_head_is_measured_spread_and_finetuned(pretrain, pictures, tmp_path):
    folder = pretrain(*OBJECTIVES["two-view"], "--epochs", 1)
    file = folder / "ckpt.cifar.pth.tar"
    data = ("--dataset", "folder", "--data-dir", pictures, "--image-size", 16)
    scores = call(
        *(pretraining, *data, *TINY[2:], "--objective", "two-view", "--test-only", "--resume", file)
    )
    assert scores["top1"] == last(folder)["accuracies"]["last"]
    spread, finetuning = (
        start.load_script(name) for name in ("scripts/propagate.py", "cifar-semi.py")
    )
    given = ("--num-labeled", 8)
    call(spread, *data, "--checkpoint", file, "--method", "knn", *given, "--save-path", tmp_path)
    runs = ("--model-root", tmp_path / "runs", "--log-root", tmp_path / "log")
    more = ("--pseudo-file", tmp_path / "8.pth.tar", "--pretrained", file, "--max-iters", 2)
    call(finetuning, *data, *TINY[2:], *given, *more, *runs)
    assert len(list((tmp_path / "runs" / "exp").glob("*.pth.tar"))) >= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--objective", "two-view", "--views", 3),
            "--views 3: --objective two-view compares exactly 2",
        ),
        (("--objective", "patches-tcr", "--views", 1), "1 views: this objective compares views"),
    ],
)
def test_views_that_an_objective_does_not_take_are_refused(pretrain, words, message):
    with pytest.raises(ValueError, match=message):
        pretrain(*words)


def test_a_run_of_another_objective_is_not_continued(pretrain):
    pretrain("--epochs", 1)
    with pytest.raises(ValueError, match="objective"):
        pretrain("--objective", "two-view", "-b", 16, "--epochs", 1, "--resume", "auto")
