"""Phase 1 in several processes: the same numbers as one, one voice, and an end when one of them dies."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_ok, assert_refused, run_script
from runs import TINY, alive, assert_same, last, log_lines, make_folder, ranks_of, without_meta
from torch import nn

from datasets.images import ImageSet
from datasets.transforms import Augmentation, instance_ops
from lib.cli import checks
from lib.cli.start import load_script
from lib.features import extraction
from lib.files import checkpoint
from lib.graph import knn
from lib.loading.batches import Batches
from lib.objectives.coding_rate import ManyPatches
from lib.objectives.instance import InstanceDiscrimination
from lib.objectives.memory_bank import MemoryBank, build_loss
from lib.objectives.two_view import TwoViews
from lib.runtime import distributed
from lib.runtime.devices import Device
from lib.training.optimizer import sgd
from lib.training.step import train_steps
from models import build_model

CPU = Device(torch.device("cpu"), bf16=False)
STATS = ((0.5,) * 3, (0.25,) * 3)
STEPS = 20
LOSSES = {"softmax": {"k": 0}, "nce": {"k": 16}, "infonce": {"k": 16, "kind": "infonce"}}
# 103 images in batches of 6: the last batch of an epoch has one row, and rank 0 none of it
CASES = [(name, 6, 1, torch.float64) for name in LOSSES]
CASES += [("softmax", 6, 1, torch.float32), ("nce", 8, 3, torch.float32)]
CASES += [(name, 6, 1, torch.float64) for name in ("three views", "two-view", "patches-tcr")]
IDS = ["-".join(map(str, case)) for case in CASES]
RTOL = {torch.float32: 1e-5, torch.float64: 1e-12}


class Frozen(nn.Module):
    """A network whose BatchNorm keeps its statistics: what is left does not depend on the batch."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()]
        self.net = nn.Sequential(*layers, nn.Linear(72, 8))

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, images):
        return F.normalize(self.net(images), dim=1)


def noise(n=103, seed=0):
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=rng)
    return ImageSet("noise", images, torch.arange(n) % 4, ("a", "b", "c", "d"), STATS)


def in_format(batches, dtype):
    for batch in batches:
        pixels = tuple(view.to(dtype) for view in batch.views)
        yield replace(batch, pixels=pixels, augmentations=())


def several_epochs(batches, num_batches):
    place = (divmod(i, batches.per_epoch) for i in range(num_batches))
    return (next(batches.epoch(epoch, first)) for epoch, first in place)


def build(name, dtype):
    if name == "two-view":
        return TwoViews(8, CPU, temperature=0.5, batch_size=6).to(dtype)
    if name == "patches-tcr":
        objective = ManyPatches(8, CPU, views=3)
        for place, layer in enumerate(objective.head):  # its statistics are those of each process
            if isinstance(layer, nn.BatchNorm1d):
                objective.head[place] = nn.Identity()
        return objective.to(dtype)
    views = 3 if name == "three views" else 1
    loss = build_loss(temperature=0.2, z_momentum=0.9, **LOSSES.get(name, LOSSES["nce"]))
    return InstanceDiscrimination(MemoryBank(103, 8).to(dtype), loss, views)


def train(loss, batch_size, iter_size, dtype, steps=STEPS, ops=None):
    """Some steps of an objective; weights, its memory or head, and losses afterwards."""
    torch.manual_seed(0)
    model = Frozen().to(dtype)
    objective = build(loss, dtype)
    optimizer = sgd([*model.parameters(), *objective.parameters()], 0.05, 5e-4)
    augmentation = Augmentation(instance_ops() if ops is None else ops, STATS)
    views = [augmentation] * objective.views
    batches = Batches(noise(), views, CPU, batch_size=batch_size)
    taken = in_format(several_epochs(batches, steps * iter_size), dtype)
    parts = (distributed.wrap_ddp(model), objective, optimizer, taken, lambda _: 0.05, CPU)
    done = list(train_steps(*parts, iter_size=iter_size))
    losses = torch.stack([step.loss for step in done])
    return {"net": model.state_dict(), "memory": objective.state_dict(), "losses": losses}


def measure():
    """Features of 103 images and their accuracy among others."""
    torch.manual_seed(0)
    model, data = build_model("wrn-10-1", 8, normalize=True), noise(seed=1)
    bank = extraction.extract(model, noise(), CPU, batch_size=7)
    rows = extraction.extract(model, data, CPU, batch_size=7)
    few = extraction.extract(model, noise(1), CPU)  # fewer images than processes
    return {"rows": rows, "few": few} | knn.accuracy(
        rows, data.targets, bank, noise().targets, 4, k=9
    )


def work(folder):
    results = {"measured": measure(), "buffers": buffers_of_rank_0()}
    results["one row"] = statistics_of_one_row()
    for name, case in zip(IDS, CASES, strict=True):
        results[name] = train(*case)
    torch.save(results, Path(folder) / f"{distributed.rank()}.pth.tar")
    return 0


def buffers_of_rank_0():
    model = nn.BatchNorm2d(3)
    model.running_mean.fill_(distributed.rank() + 5)
    distributed.share_buffers(model)
    return model.running_mean


def statistics_of_one_row():
    """Running statistics before and after a step on one image, of which rank 0 of two has no part."""
    torch.manual_seed(0)
    model, bank = build_model("wrn-10-1", 8, normalize=True), MemoryBank(1, 8)
    before = [buffer.clone() for buffer in model.buffers()]
    batches = Batches(noise(1), Augmentation((), STATS), CPU, batch_size=1).epoch(0)
    optimizer = sgd(model.parameters(), 0.05, 5e-4)
    objective = InstanceDiscrimination(bank, build_loss(0, 0.2))
    parts = (distributed.wrap_ddp(model), objective, optimizer, batches)
    list(train_steps(*parts, lambda _: 0.05, CPU))
    return {"before": before, "after": list(model.buffers()), "training": model.training}


class Work:
    """`work` in a folder, as something that can be sent to another process."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __call__(self):
        return work(self.folder)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What one process computes, and each of two."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    assert work(one) == 0
    assert distributed.run(Work(two), "cpu,cpu") == 0
    ranks = [checkpoint.load_dict(two / f"{rank}.pth.tar") for rank in (0, 1)]
    return SimpleNamespace(one=checkpoint.load_dict(one / "0.pth.tar"), ranks=ranks)


@pytest.mark.parametrize("name", IDS)
def test_two_processes_equal_one_after_twenty_steps(results, name):
    alone, rtol = results.one[name], RTOL[CASES[IDS.index(name)][-1]]
    for rank in results.ranks:
        torch.testing.assert_close(rank[name]["losses"], alone["losses"], rtol=rtol, atol=rtol)
        for part, key in ((p, key) for p in ("net", "memory") for key in alone[p]):
            got, value = rank[name][part][key], alone[part][key]
            assert (got - value).abs().max() <= rtol * value.abs().max().clamp(min=1), key


@pytest.mark.parametrize("name", IDS)
def test_network_and_memory_are_the_same_bits_on_every_rank(results, name):
    first, second = (rank[name] for rank in results.ranks)
    assert_same(first, second)


def test_features_and_accuracies_of_103_images_are_those_of_one_process(results):
    for rank in results.ranks:
        assert rank["measured"]["rows"].shape == (103, 8)
        assert rank["measured"]["few"].shape == (1, 8)
        for name, value in results.one["measured"].items():
            torch.testing.assert_close(rank["measured"][name], value, rtol=0, atol=1e-6)
    assert 0 < results.one["measured"]["top1"] < 100
    for name in ("top1", "top5", "nearest"):
        assert results.one["measured"][name] == results.ranks[1]["measured"][name]


def test_running_statistics_are_those_of_rank_0_on_every_rank(results):
    for rank in results.ranks:
        assert rank["buffers"].tolist() == [5, 5, 5]


def test_a_rank_without_rows_leaves_the_running_statistics_as_they_are(results):
    without, having = (rank["one row"] for rank in results.ranks)
    assert len(without["before"]) > 3
    assert_same(without["after"], without["before"])
    assert not torch.equal(having["after"][0], having["before"][0])
    assert without["training"]


def test_accumulated_batches_equal_one_large_batch():
    sizes = (4, 3), (12, 1)
    parts, whole = (train("softmax", *size, torch.float64, 8, ops=()) for size in sizes)
    assert_close(parts["memory"], whole["memory"])
    torch.testing.assert_close(parts["losses"], whole["losses"], rtol=1e-12, atol=1e-12)
    assert_close(parts["net"], whole["net"])


def assert_close(a, b):
    for key, value in b.items():
        torch.testing.assert_close(a[key], value, rtol=1e-11, atol=1e-11, msg=key)


def test_a_short_step_counts_each_image_once():
    # an epoch of 7 images as batches of 4 and 3: their step is one of 7 images
    def step(batch_size, iter_size):
        torch.manual_seed(0)
        model, bank = Frozen().double(), MemoryBank(7, 8).double()
        optimizer = sgd(model.parameters(), 0.05, 0.0)
        batches = Batches(noise(7), Augmentation((), STATS), CPU, batch_size=batch_size)
        objective = InstanceDiscrimination(bank, build_loss(0, 0.2))
        parts = (model, objective, optimizer, in_format(batches.epoch(0), torch.double))
        (done,) = train_steps(*parts, lambda _: 0.05, CPU, iter_size=iter_size)
        return model.state_dict(), done

    (parts, accumulated), (whole, single) = step(4, 2), step(7, 1)
    assert accumulated.batch_size == single.batch_size == 7
    torch.testing.assert_close(accumulated.loss, single.loss)
    assert_close(parts, whole)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("pictures"))


def words(pictures, folder, *more):
    files = ("--model-dir", folder, "--log-dir", folder / "log")
    data = ("--dataset", "folder", "--data-dir", pictures)
    return ["unsupervised/cifar.py", *data, *TINY, *files, *more]


@pytest.mark.slow
def test_two_processes_speak_with_one_voice(pictures, tmp_path):
    two = tmp_path / "two"
    output = assert_ok(run_script(*words(pictures, two, "--gpus", "cpu,cpu", "--epochs", 2)))
    assert "2 processes" in output
    assert len(re.findall(r"^epoch ", output, re.MULTILINE)) == 2
    assert sorted(p.name for p in two.iterdir()) == [
        "ckpt.cifar.best.pth.tar",
        "ckpt.cifar.pth.tar",
        "log",
    ]
    assert len(list((two / "log").glob("events.*"))) == 1
    assert [x["event"] for x in log_lines(two / "log")] == ["start", "epoch", "epoch"]
    memory = last(two)["lemniscate"]["memory"]
    torch.testing.assert_close(memory.norm(dim=1), torch.ones(52), rtol=0, atol=1e-5)
    assert not [name for name in last(two)["net"] if name.startswith("module.")]


def test_a_batch_that_the_processes_cannot_share_equally_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    parse = load_script("unsupervised/cifar.py").build_parser().parse_args
    checks.check_common(parse(["-b", "12"]))
    with pytest.raises(ValueError, match=r"--batch-size 15.* 4 processes; take 12"):
        checks.check_common(parse(["-b", "15"]))


@pytest.mark.slow
def test_what_all_processes_refuse_is_said_once(pictures, tmp_path):
    odd = run_script(*words(pictures, tmp_path, "--gpus", "cpu,cpu", "-b", 15))
    assert_refused(odd, "--batch-size 15", "2 processes")


@pytest.mark.slow
def test_torchrun_gives_the_same_bits_as_gpus(pictures, tmp_path):
    assert_ok(run_script(*words(pictures, tmp_path / "a", "--gpus", "cpu,cpu", "--epochs", 1)))
    script, *rest = words(pictures, tmp_path / "b", "--gpus", "cpu", "--epochs", 1)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    assert_ok(run_script(*launcher, ROOT / script, *rest))
    assert_same(without_meta(last(tmp_path / "a")), without_meta(last(tmp_path / "b")))


@pytest.fixture
def running(pictures, tmp_path):
    """Start a long run in two processes and wait for its first checkpoint: the launcher, its ranks."""
    command = words(pictures, tmp_path, "--gpus", "cpu,cpu", "--epochs", 5000)
    launcher = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while launcher.poll() is None and not (tmp_path / "ckpt.cifar.pth.tar").is_file():
        time.sleep(0.05)
    assert launcher.poll() is None, launcher.communicate()
    yield launcher, ranks_of(launcher.pid)
    launcher.kill()


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_and_leaves_the_checkpoint_intact(running, tmp_path):
    launcher, ranks = running
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode not in (0, None)
    assert errors.count("process 1 was killed") == 1
    assert "process 0" not in errors
    assert not [rank for rank in ranks if alive(rank)]
    assert last(tmp_path)["epoch"] >= 0


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_launcher_saves_and_ends_every_rank(
    running, pictures, tmp_path, number, code
):
    launcher, ranks = running
    launcher.send_signal(number)
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == code
    assert output.count("to continue: python") == 1
    assert not [rank for rank in ranks if alive(rank)]
    done = last(tmp_path)["step"]
    more = ("--gpus", "cpu,cpu", "--epochs", 5000, "--stop-after", 1, "--resume", "auto")
    assert_ok(run_script(*words(pictures, tmp_path, *more)))
    assert last(tmp_path)["step"] == done + 1


@pytest.mark.slow
def test_a_signal_to_one_rank_alone_stops_them_all(running, tmp_path):
    launcher, ranks = running
    os.kill(ranks[1], signal.SIGTERM)
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 143
    assert "stopped by SIGTERM after step" in output
    assert last(tmp_path)["step"] > 0


@pytest.mark.slow
def test_a_stopped_run_that_cannot_save_does_not_end_like_one_that_has_saved(running, tmp_path):
    launcher, _ = running
    moved = tmp_path.rename(tmp_path.with_name(f"{tmp_path.name}-moved"))
    tmp_path.touch()  # no folder: from here on every save fails
    launcher.send_signal(signal.SIGTERM)
    output, errors = launcher.communicate(timeout=60)
    tmp_path.unlink()
    moved.rename(tmp_path)
    assert launcher.returncode == 2
    assert errors.count("error: cannot write") == 1
    assert "to continue" not in output


@pytest.mark.slow
def test_ctrl_c_while_the_ranks_import_ends_them_all_in_silence(pictures, tmp_path):
    command = [sys.executable, *map(str, words(pictures, tmp_path, "--gpus", "cpu,cpu"))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes) as launcher:
        while launcher.poll() is None and len(ranks_of(launcher.pid)) < 2:
            time.sleep(0.02)
        ranks = ranks_of(launcher.pid)
        time.sleep(0.5)
        os.killpg(launcher.pid, signal.SIGINT)  # as a terminal does
        _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 130
    assert "Traceback" not in errors
    assert not [rank for rank in ranks if alive(rank)]
