"""Meters, devices, the log and the provenance record."""

import json
import math
import os
import platform
import re
import subprocess
from contextlib import closing

import pytest
import torch
from faults import block_logs
from runs import scalars

from lib.files import checkpoint, provenance
from lib.runtime import devices, distributed
from lib.runtime.devices import Device
from lib.training.log import RunLog
from lib.training.state import AverageMeter
from models import build_model


def test_a_mean_is_weighted_and_reads_nan_before_the_first_update():
    mean = AverageMeter()
    assert math.isnan(mean.value)
    mean.update(2.0, 3)
    mean.update(torch.tensor(10.0, requires_grad=True), 1)
    assert mean.value == 4.0
    mean.update(torch.tensor(0.0), torch.tensor(4))
    assert mean.value == 2.0


def test_a_mean_keeps_small_numbers_beside_many_large_ones():
    mean = AverageMeter()
    for _ in range(1000):
        mean.update(torch.tensor(1e8))
    mean.update(torch.tensor(1.0))
    # float32 sums lose the last one; doubles do not
    assert mean.value == (1000 * 1e8 + 1) / 1001


def test_a_mean_waits_for_the_device_only_when_it_is_read(monkeypatch):
    mean, value = AverageMeter(), torch.tensor(3.0)

    def refuse(_):
        raise AssertionError("update read a tensor")

    with monkeypatch.context() as patched:
        for name in ("item", "__float__", "__bool__"):
            patched.setattr(torch.Tensor, name, refuse)
        mean.update(value, 2)
        mean.update(value)
    assert mean.value == 3.0


def pretend_cuda(monkeypatch, count, capability=(9, 0)):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # put back afterwards
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)


@pytest.mark.parametrize("gpus", ["0", "3", "cpu", " 1 ", "all"])
def test_without_cuda_every_choice_is_the_cpu(monkeypatch, gpus):
    pretend_cuda(monkeypatch, 0)
    device = devices.select(gpus, "fp32")
    assert device == Device(torch.device("cpu"), bf16=False)
    assert str(device).startswith("CPU, ")
    assert str(device).endswith("fp32")
    assert "\n" not in str(device)


def test_with_cuda_the_number_is_an_index_among_the_visible_devices(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    pretend_cuda(monkeypatch, 2)
    assert devices.select("1", "fp32").torch_device == torch.device("cuda", 1)
    assert devices.select("cpu", "fp32").torch_device == torch.device("cpu")
    with pytest.raises(ValueError, match="only 2 CUDA devices"):
        devices.select("2")


@pytest.mark.parametrize("count", [1, 3])
def test_all_is_every_visible_device(monkeypatch, count):
    pretend_cuda(monkeypatch, count)
    assert distributed.device_names(" all ") == ["0", "1", "2"][:count]


def test_under_torchrun_all_is_the_device_of_the_local_rank(monkeypatch):
    pretend_cuda(monkeypatch, 4)
    for name, value in {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    assert distributed.device_names("all") == ["2"]
    assert devices.select("all", "fp32").torch_device == torch.device("cuda", 2)


@pytest.mark.parametrize(("count", "processes"), [(0, 1), (1, 1), (4, 4)])
def test_all_starts_a_process_for_each_device(monkeypatch, count, processes):
    def start(*_, nprocs, **__):
        return [nprocs]

    monkeypatch.setattr(distributed, "start_processes", start)
    monkeypatch.setattr(distributed, "_join", lambda started: started[0])
    pretend_cuda(monkeypatch, count)
    assert distributed.run(lambda: 1, "all") == processes  # a single one is this process


def test_cuda_visible_devices_is_not_overwritten(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    pretend_cuda(monkeypatch, 2)
    devices.select("0")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5,7"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    devices.select("0")
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        ("", "device number"),
        (",", "device number"),
        ("cpu,cpu", "one device"),
        ("0,cpu", "CPU and GPU"),
        ("1,1", "twice"),
        ("cuda", "device number"),
        ("all,0", "or all"),
        ("-1", "device number"),
        ("1.5", "device number"),
    ],
)
def test_an_impossible_device_is_refused(gpus, message):
    with pytest.raises(ValueError, match=message):
        devices.select(gpus)


def test_precision_is_automatic_unless_it_is_forced(monkeypatch):
    for fast in (True, False):
        monkeypatch.setattr(devices, "has_fast_bf16", lambda _, fast=fast: fast)
        assert devices.select("cpu", "auto").bf16 is fast
        assert devices.select("cpu", "bf16").bf16 is True
        assert devices.select("cpu", "fp32").bf16 is False
    with pytest.raises(ValueError, match="fp16"):
        devices.select("cpu", "fp16")


@pytest.mark.parametrize(("capability", "fast"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bf16_needs_an_ampere_device(monkeypatch, capability, fast):
    pretend_cuda(monkeypatch, 1, capability)
    assert devices.select("0", "auto").bf16 is fast


def test_autocast_and_memory_order_follow_the_choice():
    for bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        with Device(torch.device("cpu"), bf16).autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    model = Device(torch.device("cpu"), False).prepare(build_model("wrn-10-1", 4))
    weight = model.block2.layer[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert weight.dtype == torch.float32


def test_a_model_goes_to_the_device_that_was_chosen():
    # to one that is no hardware, so that a machine with a GPU says the same as one without
    model = Device(torch.device("meta"), False).prepare(build_model("wrn-10-1", 4))
    assert {p.device.type for p in model.parameters()} == {"meta"}


def strict_lines(folder):
    """Every line of log.jsonl; NaN and Infinity, which JSON does not know, are errors."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = (folder / "log.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_log_lines_are_valid_json_and_nan_becomes_null(tmp_path):
    with closing(RunLog(tmp_path / "deep" / "run")) as run:
        run.write("start", meta={"lr": math.nan, "list": [1, math.inf, {"x": -math.inf}], "s": "ü"})
        run.write("epoch", 3, loss=math.nan, acc=-math.inf, lr=0.5, done=True, none=None)
    start, epoch = strict_lines(tmp_path / "deep" / "run")
    assert start["meta"] == {"lr": None, "list": [1, None, {"x": None}], "s": "ü"}
    assert "step" not in start
    assert {k: v for k, v in epoch.items() if k != "time"} == {
        **{"event": "epoch", "step": 3, "loss": None, "acc": None},
        **{"lr": 0.5, "done": True, "none": None},
    }
    assert epoch["time"] >= start["time"] > 1.7e9


def test_a_resumed_run_appends_to_the_log(tmp_path):
    for step in (1, 2):
        with closing(RunLog(tmp_path)) as run:
            run.write("epoch", step, loss=1.0)
    assert [line["step"] for line in strict_lines(tmp_path)] == [1, 2]


def test_each_line_is_on_the_disk_before_the_next_step(tmp_path):
    with closing(RunLog(tmp_path)) as run:
        run.write("epoch", 1, loss=1.0)
        assert len(strict_lines(tmp_path)) == 1


def test_tensorboard_gets_the_numbers_of_events_with_a_step(tmp_path):
    with closing(RunLog(tmp_path)) as run:
        run.write("start", first=0)
        run.write("epoch", 7, loss=2.5, best=math.nan, flag=True, name="x")
    assert scalars(tmp_path) == {"epoch/loss": [(7, 2.5)]}


def test_half_a_line_of_an_earlier_run_is_cut_off(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"event": "epoch", "step": 1}\n{"event": "ep')
    with closing(RunLog(tmp_path)) as run:
        run.write("epoch", 2, loss=1.0)
    assert [line["step"] for line in strict_lines(tmp_path)] == [1, 2]


@pytest.mark.parametrize("full", ["log.jsonl", "events"])
def test_a_log_that_takes_no_more_is_told_once_and_the_other_one_goes_on(tmp_path, capsys, full):
    block_logs(tmp_path, full)
    with closing(RunLog(tmp_path)) as run:
        for step in range(300):  # more than the buffer of a file holds
            run.write("epoch", step, loss=1.0)
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1
    assert re.search(
        rf"cannot write {tmp_path}/{full}.*: No space left on device; training goes", said
    )
    if full == "events":
        assert len(strict_lines(tmp_path)) == 300
    else:
        assert len(scalars(tmp_path)["epoch/loss"]) == 300


def test_a_log_folder_that_cannot_be_made_is_a_message(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="cannot write the log") as caught:
        RunLog(tmp_path / "file" / "run")
    assert str(tmp_path / "file") in str(caught.value)


def test_a_provenance_record_survives_a_checkpoint_and_names_its_parts(tmp_path):
    options = {"lr": 0.1, "k": 3, "flag": True, "arch": "wrn", "none": None, "path": tmp_path}
    meta = provenance.record(options, "digest")
    checkpoint.save({"meta": meta}, tmp_path / "c")
    assert checkpoint.load(tmp_path / "c")["meta"] == meta
    expected = options | {"none": "None", "path": str(tmp_path)}
    assert meta["options"] == expected
    assert meta["data_digest"] == "digest"
    assert meta["versions"]["python"] == platform.python_version()
    assert meta["versions"]["torch"] == torch.__version__
    assert set(meta["versions"]) >= {"torch", "torchvision", "numpy", "scipy"}
    json.dumps(meta)


def git(folder, *words):
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_recorded_and_says_whether_files_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.git_commit() == "unknown"
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-q", "-m", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")[:12]
    assert provenance.git_commit() == commit
    (tmp_path / "a").write_text("2")
    assert provenance.git_commit() == commit + "+changes"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_commit() == "unknown"


DEFAULTS = {"lr": 0.03, "batch_size": 128}


def test_another_value_of_an_option_that_matters_is_refused_and_listed():
    saved = provenance.record({"lr": 0.1, "batch_size": 128, "gpus": "0"}, "aaaa")
    provenance.require_same(saved, saved, DEFAULTS)
    now = provenance.record({"lr": 0.1, "batch_size": 128, "gpus": "cpu"}, "aaaa")
    provenance.require_same(saved, now, DEFAULTS)
    now = provenance.record({"lr": 0.2, "batch_size": 64, "gpus": "0"}, "bbbb")
    with pytest.raises(ValueError, match="another run") as caught:
        provenance.require_same(saved, now, DEFAULTS)
    for words in ("--lr was 0.1, is 0.2", "--batch-size was 128, is 64", "data set"):
        assert words in str(caught.value)
    assert "gpus" not in str(caught.value)


def test_a_file_older_than_an_option_goes_on_under_its_default_alone():
    saved, defaults = (
        provenance.record({"lr": 0.1}, "aaaa"),
        {"lr": 0.03, "nce_z": "moving-average"},
    )
    now = provenance.record({"lr": 0.1, "nce_z": "moving-average"}, "aaaa")
    provenance.require_same(saved, now, defaults)
    provenance.require_same({}, provenance.record(defaults), defaults)
    now["options"]["nce_z"] = "first-batch"
    with pytest.raises(ValueError, match="--nce-z was moving-average, is first-batch"):
        provenance.require_same(saved, now, defaults)
