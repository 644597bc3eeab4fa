"""How the four training scripts start: reading processes, folders, warnings; the shell scripts together."""

import argparse
import os
import shutil
import subprocess
from types import ModuleType

import pytest
import torch
from conftest import ROOT, assert_ok
from runs import call, fake_venv, make_folder

from lib.cli import checks, declared, start
from lib.cli.start import load_script
from lib.files import checkpoint, provenance
from lib.runtime import distributed
from lib.training import finetuning as phase3

NAMES = ("unsupervised/cifar.py", "unsupervised/imagenet.py", "cifar-semi.py", "imagenet-semi.py")
IMAGENET = NAMES[1::2]
SCRIPTS = {name: load_script(name) for name in NAMES}
FOLDERS = {True: ("model_dir", "log_dir"), False: ("model_root", "log_root")}


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture
def script(name) -> ModuleType:
    return SCRIPTS[name]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("pictures"))


def words(name, pictures, tmp_path, *more):
    """One step of a script on tiny pictures."""
    places = [option.replace("_", "-") for option in FOLDERS[name.startswith("unsupervised")]]
    files = (f"--{places[0]}", tmp_path, f"--{places[1]}", tmp_path / "log")
    data = ("--dataset", "folder", "--data-dir", pictures, "-j", 0, "-b", 8, "--gpus", "cpu")
    network = ("--image-size", 40, "--arch", "resnet18")
    if "cifar" in name:
        network = ("--image-size", 16, "--arch", "wrn-10-1")
    labels = ("--nce-k", 8) if name.startswith("unsupervised") else ("--num-labeled", 8)
    return (*data, *network, *files, *labels, "--stop-after", 1, *more)


def test_a_gpu_without_enough_memory_ends_in_one_message_with_a_remedy(capsys):
    def main(_):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 5.00 GiB. GPU 0 has a total capacity of 10.00 GiB"
        )

    assert start._guarded(main, argparse.Namespace(), "propagate.py") == 1
    said = capsys.readouterr().err
    assert said.startswith(
        "propagate.py: error: CUDA out of memory. Tried to allocate 5.00 GiB. Less"
    )
    for remedy in ("--batch-size", "--chunks", "--gpus cpu"):
        assert remedy in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("asked", "size", "environment", "expected"),
    [
        (8, 1, {}, 8),
        (8, 4, {}, 2),
        (5, 4, {}, 2),
        (0, 4, {}, 0),
        (8, 16, {"RANK": "0", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "4"}, 2),
        (8, 16, {"RANK": "0", "WORLD_SIZE": "16"}, 1),
    ],
)
def test_processes_that_read_images_are_shared_by_those_of_the_machine(
    asked, size, environment, expected, monkeypatch
):
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(distributed, "world_size", lambda: size)
    assert distributed.own_workers(asked) == expected


def test_every_script_takes_its_share_of_the_processes_that_read_images(
    name, script, pictures, tmp_path, monkeypatch
):
    asked, given = [], []

    class SeenError(Exception):
        pass

    def share_of(workers):
        asked.append(workers)
        return 0

    def batches(*_, num_workers, **__):
        given.append(num_workers)
        raise SeenError

    monkeypatch.setattr(distributed, "own_workers", share_of)
    monkeypatch.setattr(phase3, "own_workers", share_of)
    monkeypatch.setattr(script if hasattr(script, "Batches") else phase3, "Batches", batches)
    with pytest.raises(SeenError):
        call(script, *words(name, pictures, tmp_path, "-j", 3))
    assert set(asked) == {3}
    assert given == [0]


@pytest.mark.parametrize("name", IMAGENET)
@pytest.mark.parametrize("own", [False, True])
def test_a_run_without_data_keeps_away_from_the_folders_of_real_runs(
    name, script, own, tmp_path, monkeypatch
):
    class StoppedError(Exception):
        pass

    def stop(*_, **__):
        raise StoppedError

    monkeypatch.setattr(script, "build_datasets", stop)
    monkeypatch.chdir(tmp_path)
    folders = FOLDERS[name.startswith("unsupervised")]
    line = ["--dummy", "--gpus", "cpu"]
    if own:
        line += [w for folder in folders for w in (declared.flag(folder), "mine")]
    args = script.build_parser().parse_args(line)
    with pytest.raises(StoppedError):
        script.main(args)
    for folder in folders:
        default = script.build_parser().get_default(folder)
        assert getattr(args, folder) == ("mine" if own else f"{default}-dummy")
    args = script.build_parser().parse_args(["--dataset", "patches"])
    checks.keep_dummy_apart(args, script.build_parser(), *folders)
    assert getattr(args, folders[0]) == script.build_parser().get_default(folders[0])


def test_a_new_run_over_the_checkpoint_of_another_is_warned_of_once_and_a_resumed_one_is_not(
    name, script, pictures, tmp_path, capsys
):
    call(script, *words(name, pictures, tmp_path))
    assert "will be replaced" not in capsys.readouterr().err
    call(script, *words(name, pictures, tmp_path, "--resume", "auto"))
    assert "will be replaced" not in capsys.readouterr().err
    call(script, *words(name, pictures, tmp_path))
    errors = capsys.readouterr().err
    assert errors.count("will be replaced by a new run; --resume auto") == 1


def test_rank_0_alone_touches_the_folder_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    start.open_run_folder("--model-root", tmp_path / "run", "last", is_new=True)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(distributed, "is_main", lambda: True)
    start.open_run_folder("--model-root", tmp_path / "run", "last", is_new=True)
    assert (tmp_path / "run").is_dir()


def test_going_on_in_another_precision_is_said_in_one_line(
    name, script, pictures, tmp_path, capsys
):
    call(script, *words(name, pictures, tmp_path, "--precision", "fp32"))
    again = words(name, pictures, tmp_path, "--resume", "auto", "--precision")
    call(script, *again, "fp32")
    assert "--precision was" not in capsys.readouterr().out
    call(script, *again, "auto")
    assert capsys.readouterr().out.count("--precision was fp32, is auto") == 1


def test_going_on_with_other_kernels_is_said_too(capsys):
    before = {"options": {"precision": "bf16", "compile": "", "loader": "device"}}
    after = {"options": {"precision": "bf16", "compile": "default", "loader": "device"}}
    provenance.say_precision(before, after)
    assert "--compile was off, is default" in capsys.readouterr().out
    provenance.say_precision(
        {"options": {"precision": "bf16"}}, after
    )  # before there was --compile
    assert "--compile was off, is default" in capsys.readouterr().out
    provenance.say_precision(before, before)
    assert capsys.readouterr().out == ""


def test_an_option_that_has_been_cut_since_does_not_keep_a_run_from_going_on(
    name, script, pictures, tmp_path, capsys
):
    call(script, *words(name, pictures, tmp_path))
    (file,) = tmp_path.rglob("ckpt*.pth.tar")
    state = checkpoint.load_dict(file)
    state["meta"]["options"]["winograd"] = True
    checkpoint.save(state, file)
    call(script, *words(name, pictures, tmp_path, "--resume", "auto"))
    assert "winograd" not in capsys.readouterr().out
    resumed = checkpoint.load_dict(file)
    assert resumed["step"] > state["step"]
    assert "winograd" not in resumed["meta"]["options"]


@pytest.mark.parametrize("name", IMAGENET)
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--arch", "wrn-28-2"), "--arch wrn-28-2: take one of resnet18, .*cifar"),
        (("--image-size", 32), "--image-size 32: these networks take 33 pixels at least.*cifar"),
    ],
)
def test_networks_and_images_too_small_for_imagenet_are_refused(
    name, pictures, tmp_path, more, message
):
    with pytest.raises(ValueError, match=message):
        call(SCRIPTS[name], *words(name, pictures, tmp_path, *more))
    assert "wrn" not in SCRIPTS[name].build_parser().format_help()
    assert not list(tmp_path.iterdir())


def test_the_three_imagenet_shell_scripts_fit_together_as_they_are(tmp_path):
    log, scripts = tmp_path / "log", tmp_path / "scripts"
    scripts.mkdir()
    for phase in ("instance", "propagate", "finetune"):
        shutil.copy(ROOT / f"scripts/{phase}_imagenet.sh", scripts)
    (scripts / "setup.sh").write_text("")
    (scripts / "notebook.sh").write_text(f'echo "$@" >>"{log}"\n')
    (tmp_path / "data/imagenet").mkdir(parents=True)
    environment = os.environ | {"VENV": str(fake_venv(tmp_path / "venv", log))}

    def start(phase, *more):
        command = ["bash", str(scripts / f"{phase}_imagenet.sh"), *more]
        texts = {"capture_output": True, "text": True, "check": False}
        assert_ok(subprocess.run(command, env=environment, cwd=tmp_path, **texts))
        line = log.read_text().splitlines()[-1].split()
        return (
            line if phase == "propagate" else SCRIPTS[line[0]].build_parser().parse_args(line[1:])
        )

    metric = start("instance", "data/imagenet")
    best = tmp_path / metric.model_dir / SCRIPTS["unsupervised/imagenet.py"].BEST
    best.parent.mkdir(parents=True)
    best.touch()
    notebook, pseudos = start("propagate")[:2]
    assert notebook == "nc-imagenet"
    for count in (13000, 26000, 51000):
        (tmp_path / pseudos / f"num_labeled_{count}").mkdir(parents=True)
    classifier = start("finetune")
    assert (tmp_path / classifier.pretrained).samefile(best)
    assert classifier.pseudo_dir == f"{pseudos}/num_labeled_51000"
    assert classifier.architecture == metric.architecture == "resnet50"
