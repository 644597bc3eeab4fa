"""The promises of tests/README.md, row by row, kept by every script: what no other file shows of them."""

import ctypes
import hashlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, assert_ok, blobs, run_script
from forked import NAMES, SCRIPTS, Running
from runs import (
    alive,
    assert_same,
    call,
    contents,
    deterministic,
    log_lines,
    make_folder,
    ranks_of,
    without_meta,
)

from datasets import build_datasets
from lib.features.extraction import FeatureSet
from lib.files import checkpoint
from lib.labels import confidence, pseudo_files
from lib.labels.split import Split, cut_into_chunks, labeled_split
from lib.propagation.chunks import save_part

TRAINING, PROPAGATE, PREDICT = NAMES[:4], NAMES[4], NAMES[5]
LABELS = 8
DERIVED = re.compile(
    r".*\.features\.pth\.tar|(graph|spectrum)-.*"
)  # kept for the next run, by a key
LASTS = {
    "unsupervised/cifar.py": "ckpt.cifar.pth.tar",
    "unsupervised/imagenet.py": "ckpt.pth.tar",
    "cifar-semi.py": "e/ckpt.pth.tar",
    "imagenet-semi.py": "e/ckpt.pth.tar",
}


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """`pictures/`, and what each phase leaves of them: metrics, pseudo-labels, a classifier."""
    root = tmp_path_factory.mktemp("reliability")
    make_folder(root / "pictures")
    for name, file in (("unsupervised/cifar.py", "metric"), ("cifar-semi.py", "classifier")):
        call(SCRIPTS[name], *words(name, root, root / "made"), "--stop-after", 1)
        shutil.copy(root / "made" / LASTS[name], root / f"{file}.pth.tar")
    for name, in_memory in (("pseudo", True), ("chunks", False)):
        train, _ = build_datasets("folder", root / "pictures", image_size=16, in_memory=in_memory)
        split = labeled_split(train.targets, LABELS, 4)
        votes = torch.rand(len(train), 4, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
        meta = {"data_digest": train.digest, "classes": list(train.classes)}
        if in_memory:
            whole = confidence.from_scores(votes.log(), split, meta, confidence="largest")
            pseudo_files.save(whole, root / f"{name}.pth.tar")
            continue
        for place, part in enumerate(cut_into_chunks(split, 2)):
            part = Split(split.labeled, part)
            part = confidence.from_scores(votes.log(), part, meta, confidence="largest")
            save_part(part, root, LABELS, place, 2)
    return root


def words(name: str, world: Path, folder: Path) -> list[object]:
    """A short command line of a script, all that it writes under `folder`."""
    data = ["--dataset", "folder", "--data-dir", world / "pictures", "--precision", "fp32"]
    if name == PREDICT:
        files = ["--checkpoint", world / "classifier.pth.tar", "--output", folder / "table.csv"]
        return [*files, "--images", world / "pictures" / "test", "--report", *data[-2:]]
    if name == PROPAGATE:
        made = ["--checkpoint", folder / "metric.pth.tar", "--num-labeled", LABELS]
        return [*data, *made, "--num-neighbors", 40, "--save-path", folder / "pseudo"]
    network = ["--image-size", 40, "--arch", "resnet18", "-j", 0, "--gpus", "cpu"]
    if "imagenet" not in name:
        network = ["--image-size", 16, "--arch", "wrn-10-1"]
    files = ["--model-dir", folder, "--log-dir", folder / "log", "--nce-k", 8, "--epochs", 2]
    if not name.startswith("unsupervised"):
        files = ["--model-root", folder, "--log-root", folder / "log", "--exp-name", "e"]
        files += ["--num-labeled", LABELS, "--max-iters", 6, "--eval-freq", 2, "--print-freq", 2]
    return [*data, *network, "-b", 16, *files]


def prepare(name: str, world: Path, folder: Path) -> Path:
    """The folder with what the script expects in it."""
    folder.mkdir(parents=True, exist_ok=True)
    if name == PROPAGATE:
        shutil.copy(world / "metric.pth.tar", folder)
    return folder


def last(name: str, folder: Path) -> dict[str, Any]:
    return checkpoint.load_dict(folder / LASTS[name])


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in a nested state."""
    if isinstance(value, torch.Tensor):
        yield value
    for part in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        yield from tensors(part)


# Row 1: an untrusted file runs no code, whichever option names it.


class Attack:
    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.folder,)


FILE_OPTIONS = {
    "unsupervised/cifar.py": ("--resume", "--test-only --resume"),
    "unsupervised/imagenet.py": ("--resume", "--pretrained", "--evaluate --resume"),
    "cifar-semi.py": ("--resume", "--pretrained", "--eval --resume", "--pseudo-file"),
    "imagenet-semi.py": ("--resume", "--pretrained", "--eval --resume", "--pseudo-file"),
    PROPAGATE: ("--checkpoint", "--features", "--graph-file"),
    PREDICT: ("--checkpoint",),
}


@pytest.mark.parametrize("name", NAMES)
def test_no_file_that_an_option_names_runs_code(name, world, tmp_path):
    file = tmp_path / "attack.pth.tar"
    torch.save({"net": {}, "step": 1, "lemniscate": Attack(tmp_path / "owned")}, file)
    line = words(name, world, prepare(name, world, tmp_path / "run"))
    for option in FILE_OPTIONS[name]:
        given = list(line)
        if name == PROPAGATE and option != "--graph-file":  # features from one file only
            place = given.index("--checkpoint")
            del given[place : place + 2]
        with pytest.raises(ValueError, match=r"attack\.pth\.tar was refused"):
            call(SCRIPTS[name], *given, *option.split(), file)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("kept", ["*.features.pth.tar", "graph-*", "spectrum-*"])
def test_no_file_kept_for_the_next_run_runs_code(kept, world, tmp_path):
    line = words(PROPAGATE, world, prepare(PROPAGATE, world, tmp_path / "run"))
    line += ["--num-eigenvectors", 5]
    call(SCRIPTS[PROPAGATE], *line)
    (file,) = (tmp_path / "run").rglob(kept)
    torch.save({"features": Attack(tmp_path / "owned")}, file)
    with pytest.raises(ValueError, match=rf"{re.escape(file.name)} was refused"):
        call(SCRIPTS[PROPAGATE], *line)
    assert not (tmp_path / "owned").exists()


# Row 4: a signal loses nothing.


def starts(folder: Path) -> int:
    """How often a training loop has begun, by its log."""
    # a line that is being written may be read in part
    return sum(log.read_text().count('{"event": "start"') for log in folder.rglob("log.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING)
def test_twenty_signals_at_any_moment_lose_nothing(name, world, tmp_path, capsys):
    endless = ("--epochs" if name.startswith("unsupervised") else "--max-iters", 100_000)
    line = [*words(name, world, tmp_path / "cut"), *endless, "--resume", "auto"]
    rng, steps, slowest = random.Random(0), [0], 0.0
    for i in range(20):
        number, before = (signal.SIGTERM, signal.SIGINT)[i % 2], starts(tmp_path / "cut")
        with Running(name, *line, output=tmp_path / "said") as run:
            run.wait_for(lambda before=before: starts(tmp_path / "cut") > before)
            time.sleep(rng.uniform(0, 0.3))
            run.send(number)
            code, said, seconds = run.end()
        assert code == 128 + number, said
        assert f"stopped by {number.name} after step" in said
        slowest = max(slowest, seconds)
        steps.append(last(name, tmp_path / "cut")["step"])
    assert steps == sorted(set(steps))  # each start went on from where the one before had stopped
    assert slowest < 60
    with capsys.disabled():
        print(f"\n{name}: 20 of 20 signals, {slowest:.1f} s from signal to end at most")
    whole = [*words(name, world, tmp_path / "whole"), *endless, "--stop-after", steps[-1]]
    with Running(name, *whole, output=tmp_path / "said") as run:
        assert run.end()[0] == 0, run.said
    both = [without_meta(last(name, tmp_path / folder)) for folder in ("whole", "cut")]
    assert_same(*both)


STAGES = ("", "x 128 features", "graph of 3000 images", "199 eigenvectors")  # said when one is done


def copied_metric(source: Path, folder: Path) -> Path:
    """The checkpoint in a folder of its own, where nothing has been extracted from it."""
    folder.mkdir(parents=True)
    return Path(shutil.copy(source, folder / "metric.pth.tar"))


@pytest.mark.slow
def test_twenty_signals_to_propagation_end_it_at_once_and_change_no_byte(tmp_path, capsys):
    first = ("--dataset", "patches", "--arch", "wrn-10-1", "--stop-after", 1)
    call(SCRIPTS["unsupervised/cifar.py"], *first, "--model-dir", tmp_path, "--log-dir", tmp_path)
    rng, files = random.Random(0), {}
    for folder in (tmp_path / "whole", tmp_path / "cut"):
        metric = copied_metric(tmp_path / "ckpt.cifar.pth.tar", folder)
        line = ("--dataset", "patches", "--checkpoint", metric, "--num-labeled", 20, 50, 100)
        line += ("--save-path", folder / "pseudo", "--report")  # drawing takes a while
        for i in range(20 if folder.name == "cut" else 0):
            number = (signal.SIGTERM, signal.SIGINT)[i % 2]
            with Running(PROPAGATE, *line, output=tmp_path / "said") as run:
                run.wait_for(lambda run=run: run.handles(signal.SIGTERM))
                run.wait_for(lambda run=run, i=i: STAGES[i // 5] in run.said)
                time.sleep(rng.uniform(0, 0.05))
                run.send(number)
                code, said, seconds = run.end()
            assert seconds < 60
            assert code == 128 + number, said
            assert f"stopped by {number.name}; the same command continues" in said
            for path in folder.rglob("*.pth.tar"):
                checkpoint.load(path)  # whole, whatever was being written
        with Running(PROPAGATE, *line, output=tmp_path / "said") as run:
            assert run.end()[0] == 0, run.said
        paths = {str(path.relative_to(folder)): path for path in folder.rglob("*.pth.tar")}
        files[folder.name] = {n: without_meta(checkpoint.load_dict(p)) for n, p in paths.items()}
    with capsys.disabled():
        print(f"\n{PROPAGATE}: 20 of 20 signals, five in each stage; equal files in the end")
    assert_same(files["whole"], files["cut"])
    assert len(files["cut"]) == 7  # metric, features, graph, eigenvectors, three of pseudo-labels


# Row 3: random interruptions change no bit.


@pytest.mark.slow
def test_twenty_random_interruptions_of_imagenet_finetuning_change_no_bit(world, tmp_path, capsys):
    name = "imagenet-semi.py"
    more = ("--max-iters", 40, "--eval-freq", 7, "--print-freq", 5, "-b", 4)
    more += ("--pseudo-dir", world / f"num_labeled_{LABELS}", "--pseudo-ratio", 0.8)

    def run(folder: str, *stop: object, workers: int = 0) -> None:
        line = (*words(name, world, tmp_path / folder), *more, *stop, "-j", workers)
        with Running(name, *line, output=tmp_path / "said") as process:
            assert process.end()[0] == 0, process.said

    run("whole")
    rng, stops = random.Random(0), 0
    while not stops or last(name, tmp_path / "cut")["step"] < 40:
        stop = ("--resume", "auto", "--stop-after", rng.choice([1, 1, 2, 2, 3]))
        run("cut", *stop, workers=(2, 0)[stops % 2])
        stops += 1
    assert stops >= 20
    folders = [tmp_path / "whole", tmp_path / "cut"]
    for file in ("ckpt.pth.tar", "ckpt.best.pth.tar"):
        states = [checkpoint.load_dict(folder / "e" / file) for folder in folders]
        assert_same(*map(without_meta, states))
    logs = [log_lines(folder / "log" / "e") for folder in folders]
    for event in ("train", "test", "end"):
        assert deterministic(logs[0], event) == deterministic(logs[1], event)
    with capsys.disabled():
        print(f"\n{name}: {stops} starts, with two workers and with none in turn, bit-identical")


# Row 5: nothing that is no number reaches the disk.


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", TRAINING)
def test_a_number_that_is_none_stops_on_its_step_and_never_reaches_the_disk(
    name, number, world, tmp_path, monkeypatch
):
    line = words(name, world, tmp_path)
    call(SCRIPTS[name], *line, "--stop-after", 1)
    before = {file: content for file, content in contents(tmp_path).items() if "ckpt" in file}
    step, steps = torch.optim.SGD.step, []

    def poisoned(optimizer: torch.optim.SGD, *given: object) -> object:
        steps.append(step(optimizer, *given))
        if len(steps) == 1:  # the second step of the run
            weight = optimizer.param_groups[0]["params"][0].data
            weight[(0,) * weight.ndim] = number
        return steps[-1]

    monkeypatch.setattr(torch.optim.SGD, "step", poisoned)
    with pytest.raises(
        FloatingPointError, match=r"loss of step 3 is not finite|not finite after step 2"
    ):
        call(SCRIPTS[name], *line, "--resume", "auto")
    assert len(steps) == 1
    after = {file: content for file, content in contents(tmp_path).items() if "ckpt" in file}
    assert after == before
    assert all(x.isfinite().all() for x in tensors(last(name, tmp_path)) if x.is_floating_point())
    for log in tmp_path.rglob("log.jsonl"):
        assert "NaN" not in log.read_text()


# Row 6: a picture that cannot be read is named.


@pytest.mark.parametrize("name", [*TRAINING, PROPAGATE])
def test_every_planted_fault_is_named_with_its_path_and_nothing_is_written(name, world, tmp_path):
    pictures = make_folder(tmp_path / "pictures")
    faults = [pictures / "train" / place for place in ("blue/3.png", "gray/0.png", "red/9.png")]
    faults[0].write_bytes(b"no picture")
    faults[1].write_bytes(faults[1].read_bytes()[:90])
    faults[2].write_bytes(b"")
    folder = prepare(name, world, tmp_path / "run")
    line = [w if w != world / "pictures" else pictures for w in words(name, world, folder)]
    more = () if name == PROPAGATE else ("-b", 64, "--num-labeled", "all")
    more = ("-b", 64) if name.startswith("unsupervised") else more
    with pytest.raises(ValueError, match="cannot be read") as caught:
        call(SCRIPTS[name], *line, *more)
    for fault in faults:
        assert re.search(rf"image \d+, {re.escape(str(fault))}", str(caught.value))
    assert not list(folder.rglob("*ckpt*"))
    assert not list(folder.rglob("*features*"))


# Row 10: the same command gives the same bytes.


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_same_command_gives_the_same_bytes_three_times(name, world, tmp_path, capsys):
    folder, digests = tmp_path / "run", []
    line = words(name, world, folder)
    environment = {"GIT_DIR": "/nowhere"}  # somebody may commit meanwhile, and that is recorded
    for time_ in range(3):
        prepare(name, world, folder)
        if time_:
            with Running(name, *line, output=tmp_path / "said", **environment) as run:
                assert run.end()[0] == 0, run.said
        else:  # with another order of sets of text
            assert_ok(run_script(name, *line, PYTHONHASHSEED="7", **environment))
        timed = ("log.jsonl", "results.json", "events")  # these tell the time
        kept = {p: c for p, c in contents(folder).items() if not any(t in p for t in timed)}
        digests.append({Path(p).name: hashlib.sha256(c).hexdigest() for p, c in kept.items()})
        shutil.rmtree(folder)
    assert digests[0] == digests[1] == digests[2]
    assert digests[0]
    with capsys.disabled():
        print(f"\n{name}: {len(digests[0])} files, equal digests over 3 runs")


# Row 12: a reading process that dies ends the run.


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in TRAINING if "imagenet" in n])
def test_a_reading_process_that_dies_ends_the_run_and_leaves_the_checkpoint(
    name, world, tmp_path, capsys
):
    endless = ("--epochs" if name.startswith("unsupervised") else "--max-iters", 100_000)
    line = (*words(name, world, tmp_path / "run"), *endless, "-j", 2, "-b", 4)
    with Running(name, *line, output=tmp_path / "said") as run:
        run.wait_for(lambda: (tmp_path / "run" / LASTS[name]).is_file())
        run.wait_for(lambda: len(run.children()) >= 2)
        readers = run.children()
        os.kill(readers[0], signal.SIGKILL)
        code, said, seconds = run.end()
    assert code == 2, said
    assert seconds < 60
    assert run.outlived_by(readers) == []
    assert last(name, tmp_path / "run")["step"] >= 1
    with capsys.disabled():
        print(f"\n{name}: ended {seconds:.1f} s after the death of a reading process, no orphan")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_of_propagation_that_dies_ends_all_and_leaves_whole_files(rank, tmp_path):
    rows, targets = blobs(4, 190, spread=0.45)
    features = tmp_path / "features.pth.tar"
    checkpoint.save(FeatureSet(rows, targets, 4).state(), features)
    line = ("--features", features, "--num-labeled", 40, "--save-path", tmp_path / "pseudo")
    line += ("--num-eigenvectors", 370, "--solver", "arpack", "--gpus", "cpu,cpu")  # takes a while
    command = [sys.executable, str(ROOT / PROPAGATE), *map(str, line)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert any("graph of 760 images: built" in text for text in run.stdout)
        ranks = ranks_of(run.pid)
        os.kill(ranks[rank], signal.SIGKILL)
        _, errors = run.communicate(timeout=60)
    assert run.returncode not in (0, None)
    assert f"process {rank} was killed" in errors
    assert [pid for pid in ranks if alive(pid)] == []
    (graph,) = (tmp_path / "pseudo" / "work").iterdir()
    checkpoint.load(graph)


# Row 8: a bad file of pseudo-labels is refused, and soon.


def test_a_mistake_among_fifty_thousand_pseudo_labels_is_found(tmp_path, capsys):
    targets = torch.arange(10).repeat(5000)
    split = labeled_split(targets, 250, 10)
    votes = torch.rand(50_000, 10, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    pseudo_files.save(confidence.from_scores(votes.log(), split), tmp_path / "250.pth.tar")
    state = checkpoint.load_dict(tmp_path / "250.pth.tar")
    state["pseudo_indexes"][-1] = state["pseudo_indexes"][0]
    checkpoint.save(state, tmp_path / "250.pth.tar")
    start = time.perf_counter()
    with pytest.raises(ValueError, match="pseudo_indexes holds an index twice"):
        pseudo_files.load(tmp_path / "250.pth.tar")
    with capsys.disabled():
        print(f"\nrefused in {time.perf_counter() - start:.3f} s among 50,000 images")


# Row 13: a full disk, and a folder that takes no files.


@contextmanager
def disk_for(num_bytes: int) -> Iterator[None]:
    """No file may grow beyond `num_bytes`, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", TRAINING)
def test_a_full_disk_keeps_the_checkpoint_and_the_run_goes_on_where_there_is_room(
    name, world, tmp_path
):
    line = (*words(name, world, tmp_path / "run"), "--resume", "auto")
    call(SCRIPTS[name], *line, "--stop-after", 1)
    file = tmp_path / "run" / LASTS[name]
    before = file.read_bytes()
    with disk_for(len(before) // 2), pytest.raises(ValueError, match="cannot write") as caught:
        call(SCRIPTS[name], *line, "--stop-after", 1)
    said = re.search(
        r"cannot write (.+) \((\d+) bytes, (\d+) free\): File too large", str(caught.value)
    )
    assert said, caught.value
    assert said[1].startswith(f"{file.parent}{os.sep}ckpt.")
    assert abs(int(said[2]) - len(before)) < 10_000
    assert file.read_bytes() == before
    assert not list(tmp_path.rglob("*.tmp"))
    call(SCRIPTS[name], *line, "--stop-after", 1)
    assert last(name, tmp_path / "run")["step"] == 2


@pytest.mark.parametrize(
    ("name", "more", "num_bytes", "file"),
    [
        (PROPAGATE, (), 1000, "metric.folder.features.pth.tar"),
        (PROPAGATE, ("--method", "poisson"), 1000, "graph-"),
        (PROPAGATE, ("--method", "knn"), 1000, f"/{LABELS}.pth.tar"),
        (PREDICT, (), 100, "table.csv"),
    ],
    ids=["features", "graph", "pseudo-labels", "table"],
)
def test_a_full_disk_is_named_by_propagation_and_prediction_too(
    name, more, num_bytes, file, world, tmp_path
):
    folder = prepare(name, world, tmp_path / "run")
    line = [*words(name, world, folder), *more]
    if more:  # features are there already
        call(SCRIPTS[name], *line, "--save-path", tmp_path / "first")
    before = contents(folder)
    with disk_for(num_bytes), pytest.raises((ValueError, OSError)) as caught:
        call(SCRIPTS[name], *line)
    assert re.search(rf"cannot write \S*{file}\S* \(\d+ bytes, \d+ free\)", str(caught.value))
    assert contents(folder) == before  # neither half a file nor a temporary one


CAP_OPTIONS = (1 << 1) | (
    1 << 2
)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH: root's way past permissions


@contextmanager
def permissions_bind() -> Iterator[None]:
    """Permission bits hold for this thread even where it is root's."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the interface; this thread
    held, fewer = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, held) == 0
    fewer[:] = held[:]
    fewer[0] &= ~CAP_OPTIONS  # effective; still permitted, so that it can be taken back
    assert libc.capset(header, fewer) == 0
    try:
        yield
    finally:
        assert libc.capset(header, held) == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_read_only_folder_is_refused_before_any_work_and_left_as_it_is(name, world, tmp_path):
    folder = prepare(name, world, tmp_path / "run")
    before = contents(folder)
    folder.chmod(0o555)
    try:
        with permissions_bind(), pytest.raises(ValueError, match="Permission denied") as caught:
            call(SCRIPTS[name], *words(name, world, folder))
    finally:
        folder.chmod(0o755)
    assert str(folder) in str(caught.value)
    assert re.match(r"--[a-z-]+: cannot write to the folder", str(caught.value)), caught.value
    assert contents(folder) == before


# Every file says what made it, and files of different origin do not mix.


@pytest.mark.parametrize("name", [*TRAINING, PROPAGATE])
def test_every_file_says_what_made_it(name, world, tmp_path):
    folder = prepare(name, world, tmp_path)
    call(SCRIPTS[name], *words(name, world, folder), "--rng-seed", 3)
    paths = [p for p in tmp_path.rglob("*.pth.tar") if p.name != "metric.pth.tar"]  # of another run
    assert paths
    for path in paths:
        meta = checkpoint.load_dict(path)["meta"]
        if not DERIVED.match(path.name):  # these depend on fewer options, which their keys name
            assert meta["options"]["rng_seed"] == 3, path
        assert meta["git_commit"], path
        digests = [value for name, value in meta.items() if name.endswith("_digest")]
        assert digests, path
        assert all(digests), path
        assert {"python", "torch", "numpy", "scipy"} <= meta["versions"].keys(), path


@pytest.mark.parametrize("name", ["cifar-semi.py", "imagenet-semi.py"])
@pytest.mark.parametrize("other", ["labels", "images", "split"])
def test_files_of_different_data_sets_or_splits_are_not_mixed(name, other, world, tmp_path):
    """A run is not continued, and pseudo-labels are not used, where one picture or label differs."""
    line = words(name, world, tmp_path / "run")
    call(SCRIPTS[name], *line, "--stop-after", 1)
    if other == "split":
        with pytest.raises(ValueError, match="--rng-seed was 0, is 1"):
            call(SCRIPTS[name], *line, "--resume", "auto", "--rng-seed", 1)
        return
    pictures = Path(shutil.copytree(world / "pictures", tmp_path / "pictures"))
    if other == "labels":
        (pictures / "train" / "blue" / "0.png").rename(pictures / "train" / "gray" / "x.png")
    else:
        shutil.copy(pictures / "train/blue/0.png", pictures / "unlabeled/blue/0.png")
    line = [pictures if w == world / "pictures" else w for w in line]
    with pytest.raises(ValueError, match="images or labels of the data set are not the same"):
        call(SCRIPTS[name], *line, "--resume", "auto")
    pseudo = ("--pseudo-file", world / "pseudo.pth.tar")
    if name == "imagenet-semi.py":
        pseudo = ("--pseudo-dir", world / f"num_labeled_{LABELS}")
    with pytest.raises(ValueError, match="another data set"):
        call(SCRIPTS[name], *line, *pseudo)
