"""unsupervised/imagenet.py through its command line: published options, files, measuring, resuming."""

import math
import os
import random
import subprocess
import time

import pytest
import torch
from conftest import ROOT, assert_ok, assert_refused, run_script
from runs import (
    assert_same,
    call,
    deterministic,
    load_embedding,
    log_lines,
    make_folder,
    without_meta,
)

from datasets import FileSet, build_datasets
from datasets.images import IMAGENET_STATS
from lib.cli.start import load_script
from lib.features import extraction
from lib.files import checkpoint
from lib.files.description import METRIC, Description
from lib.graph import knn
from lib.loading.batches import permutation
from lib.runtime import distributed
from lib.runtime.devices import Device
from lib.training import pretraining as loop
from lib.training.state import load_network
from models import IMAGENET_ARCHITECTURES, build_model

imagenet = load_script("unsupervised/imagenet.py")
CPU = Device(torch.device("cpu"), bf16=False)
METRIC_OF_40 = Description(METRIC, "resnet18", {}, *IMAGENET_STATS, 40, 40)
SMALL = ("--image-size", 40, "-b", 16, "-j", 0, "--nce-k", 8, "--precision", "fp32")

# names and aliases -> default, copied from the published command line
PUBLISHED = {
    "--model-dir": "./checkpoint/instance_imagenet",
    "--log-dir": "./tensorboard/instance_imagenet",
    "--arch -a": "resnet18",
    "-j --workers": 4,
    "--epochs": 200,
    "--start-epoch": 0,
    "-b": 256,
    "-vb --val-batch-size": 128,
    "--lr --learning-rate": 0.03,
    "--momentum": 0.9,
    "--weight-decay --wd": 1e-4,
    "-p --print-freq": 10,
    "--resume": "",
    "--auto-resume": False,
    "--test-only": False,
    "-e --evaluate": False,
    "--pretrained": "",
    "--low-dim": 128,
    "--nce-k": 4096,
    "--nce-t": 0.07,
    "--nce-m": 0.5,
    "--iter-size": 1,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("pictures"))


def run(pictures, folder, *words):
    files = ("--model-dir", folder, "--log-dir", folder / "log")
    return call(imagenet, "--data-dir", pictures, *SMALL, *files, *words)


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory):
    """A run of two epochs, 52 images in batches of 16."""
    folder = tmp_path_factory.mktemp("finished")
    run(pictures, folder, "--epochs", 2, "--save-freq", 1)
    return folder


def last(folder):
    return checkpoint.load_dict(folder / "ckpt.pth.tar")


def test_every_published_option_has_its_names_and_default():
    actions = imagenet.build_parser()._option_string_actions
    for names, default in PUBLISHED.items():
        for name in names.split():
            assert actions[name].default == default, name
    assert len({actions[name] for names in PUBLISHED for name in names.split()}) == len(PUBLISHED)
    assert "--data-dir" in actions
    # the published script has no such option and takes them all
    assert actions["--gpus"].default == "all"


def test_a_run_leaves_the_published_keys_and_the_last_the_best_and_the_numbered_files(finished):
    names = {p.name for p in finished.glob("*.pth.tar*")}
    assert names == {"ckpt.pth.tar", "model_best.pth.tar", "ckpt-1.pth.tar", "ckpt-2.pth.tar"}
    state = last(finished)
    assert {"state_dict", "optimizer", "arch", "epoch", "best_prec1", "lemniscate"} <= state.keys()
    assert "net" not in state
    assert (state["arch"], state["epoch"], state["step"]) == ("resnet18", 2, 8)
    assert state["best_prec1"] == state["accuracies"]["best"] / 100  # published as a fraction
    assert state["classes"] == ["blue", "gray", "green", "red"]
    assert state["lemniscate"]["memory"].shape == (52, 128)
    assert checkpoint.load_dict(finished / "ckpt-1.pth.tar")["epoch"] == 1  # the next one
    torchvision = build_model("resnet18", 128, imagenet=True).state_dict()
    assert state["state_dict"].keys() == torchvision.keys()
    (group,) = state["optimizer"]["param_groups"]
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, False, 1e-4)


def test_no_file_per_epoch_is_kept_unless_asked_for(pictures, tmp_path):
    run(pictures, tmp_path, "--epochs", 1)
    assert {p.name for p in tmp_path.glob("*.tar")} == {"ckpt.pth.tar", "model_best.pth.tar"}


def test_the_rate_drops_to_a_tenth_at_60_and_80_percent_of_the_epochs(finished):
    # steps 4 and 6 of 8: the second of two epochs begins at the first of them
    rates = [x["lr"] for x in log_lines(finished / "log") if x["event"] == "epoch"]
    assert rates == pytest.approx([0.03, 0.003])


def test_the_speed_and_the_waiting_for_images_are_told(finished, pictures, tmp_path, capsys):
    for line in log_lines(finished / "log")[1:]:
        assert line["images_per_s"] > 0
        assert 0 < line["data_wait"] < 1
    run(pictures, tmp_path, "--epochs", 1, "-p", 3, "--iter-size", 2, "-b", 8)
    said = capsys.readouterr().out
    # 7 batches of 8 are 4 steps of two
    assert said.count("step     3/4  loss") == 1
    assert said.count(" img/s (") == 2
    assert "% of the time waiting for images" in said


def test_evaluate_measures_the_stored_bank_and_test_only_a_new_one(finished, pictures, tmp_path):
    train, test = build_datasets("folder", pictures, image_size=40, in_memory=False)
    assert isinstance(train, FileSet)
    state = last(finished)
    model = build_model("resnet18", 128, imagenet=True, normalize=True)
    model.load_state_dict(state["state_dict"])
    queries, new = (extraction.extract(model, data, CPU) for data in (test, train))
    # the default of 4096 negatives is more than there are images, but measuring needs none
    resume = ("--resume", finished / "ckpt.pth.tar", "-vb", 7, "--nce-k", 4096)
    for option, bank in (("-e", state["lemniscate"]["memory"]), ("--test-only", new)):
        scores = run(pictures, tmp_path / "none", option, *resume)
        known = train.targets >= 0
        nearest = (queries @ bank[known].T).argmax(dim=1)
        right = train.targets[known][nearest] == test.targets
        assert scores["nearest"] == pytest.approx(100 * right.float().mean().item())
        votes = knn.classify(queries, bank, train.targets, 4)
        assert scores["top1"] == pytest.approx(knn.top_k_accuracy(votes, test.targets)[0])
    assert not (tmp_path / "none").exists()


def test_evaluate_refuses_a_bank_of_other_images(finished, tmp_path):
    other = make_folder(tmp_path / "other", unlabeled=8)
    with pytest.raises(ValueError, match="52 x 128 numbers that is not of the 48 training images"):
        run(other, tmp_path, "-e", "--resume", finished / "ckpt.pth.tar")


def test_a_published_file_is_measured_and_continued_and_serves_as_a_backbone(
    finished, pictures, tmp_path, capsys
):
    state = last(finished)
    weights = {f"module.{name}": value for name, value in state["state_dict"].items()}
    published = {k: state[k] for k in ("optimizer", "arch", "epoch", "best_prec1", "lemniscate")}
    file = tmp_path / "lemniscate_resnet18.pth.tar"
    checkpoint.save({"state_dict": weights} | published, file)
    scores = run(pictures, tmp_path, "-e", "--resume", file)
    assert scores == run(pictures, tmp_path, "-e", "--resume", finished / "ckpt.pth.tar")
    run(pictures, tmp_path / "on", "--resume", file, "--stop-after", 1)
    assert f"{file} is a published file" in capsys.readouterr().out
    assert (last(tmp_path / "on")["epoch"], last(tmp_path / "on")["step"]) == (
        state["epoch"],
        state["step"] + 1,
    )
    run(pictures, tmp_path / "new", "--pretrained", file, "--stop-after", 1)
    assert f"{file}: 122 tensors loaded\n" in capsys.readouterr().out
    assert last(tmp_path / "new")["step"] == 1


def test_pretrained_takes_weights_alone_and_the_last_layer_only_where_it_fits(finished, capsys):
    source = str(finished / "ckpt.pth.tar")
    expected = last(finished)["state_dict"]
    same, other = (build_model("resnet18", d, imagenet=True, normalize=True) for d in (128, 32))
    head = other.fc.weight.clone()
    for model in (same, other):
        load_network(model, last(finished), source, start_of=METRIC_OF_40)
    assert_same(dict(same.state_dict()), dict(expected))
    assert torch.equal(other.layer4[1].conv2.weight, expected["layer4.1.conv2.weight"])
    assert torch.equal(other.fc.weight, head)
    assert "2 missing (fc.weight, fc.bias)" in capsys.readouterr().out


def test_pretrained_leaves_out_the_last_layer_of_a_classifier_even_where_it_has_our_shape(tmp_path):
    classifier, model = (build_model("resnet18", 128, imagenet=True) for _ in range(2))
    head = model.fc.weight.clone()
    checkpoint.save({"state_dict": classifier.state_dict()}, tmp_path / "c.pth.tar")
    state = checkpoint.load_dict(tmp_path / "c.pth.tar")
    load_network(model, state, "c.pth.tar", start_of=METRIC_OF_40)
    assert torch.equal(model.conv1.weight, classifier.conv1.weight)
    assert torch.equal(model.fc.weight, head)


def test_a_normalizer_that_is_not_finite_is_never_saved(pictures, tmp_path, monkeypatch):
    build = loop.build_objective

    def broken(*words, **keywords):
        objective = build(*words, **keywords)
        objective.loss.register_buffer("spoiled", torch.tensor(math.nan))
        return objective

    monkeypatch.setattr(imagenet.pretraining, "build_objective", broken)
    with pytest.raises(FloatingPointError, match="spoiled is not finite after step 1"):
        run(pictures, tmp_path, "--stop-after", 1)
    assert not list(tmp_path.glob("*.pth.tar"))


def test_start_epoch_numbers_the_first_epoch_of_a_new_run(pictures, tmp_path):
    run(pictures, tmp_path, "--epochs", 10, "--start-epoch", 9)
    start, epoch = log_lines(tmp_path / "log")
    assert (start["first_epoch"], start["first_step"]) == (9, 36)
    assert (epoch["epoch"], epoch["step"]) == (9, 40)
    assert epoch["lr"] == pytest.approx(0.0003)


@pytest.mark.parametrize(
    ("words", "chance"),
    [
        (("--nce-k", 0), math.log(52)),
        (("--nce-loss", "infonce"), math.log(9)),
        ((), math.log(9) - 8 * math.log(8 / 9)),
    ],
    ids=["softmax", "infonce", "nce"],
)
def test_each_loss_trains(pictures, tmp_path, words, chance):
    values = run(pictures, tmp_path, "--epochs", 1, "--momentum", 0.5, *words)
    assert values["chance"] == pytest.approx(chance, rel=1e-5)
    (group,) = last(tmp_path)["optimizer"]["param_groups"]
    assert group["momentum"] == 0.5


def test_a_run_stopped_within_an_epoch_and_resumed_by_auto_resume_ends_in_the_same_bits(
    finished, pictures, tmp_path
):
    words = ("--epochs", 2, "--auto-resume", "--save-freq", 1)
    for _ in range(3):
        run(pictures, tmp_path, *words, "--stop-after", 3)
    assert_same(without_meta(last(tmp_path)), without_meta(last(finished)))
    lines = [deterministic(log_lines(f / "log"), "epoch") for f in (tmp_path, finished)]
    assert lines[0] == lines[1]
    run(pictures, tmp_path, *words)  # nothing left to do


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data-dir", ""), "--data-dir is missing"),
        (("--image-size", 32), "33 pixels at least"),
        (("--arch", "wrn-28-2"), "take one of resnet18, resnet34"),
        (("-e", "--test-only"), "different banks"),
        (("-e",), "name it with --resume"),
        (("--auto-resume", "--resume", "file"), "two checkpoints"),
        (("--start-epoch", 200), "last epoch is 199"),
        (("--nce-k", 52), "only 51 others"),
        (("--resume", "/nowhere/file"), "/nowhere/file"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(pictures, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        run(pictures, tmp_path, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("architecture", IMAGENET_ARCHITECTURES)
def test_all_of_torchvisions_resnets_are_accepted(architecture):
    args = imagenet.build_parser().parse_args(["--data-dir", "d", "-a", architecture])
    imagenet.check_options(args)
    assert args.architecture == architecture


def test_options_without_effect_are_named(finished, pictures, tmp_path, capsys):
    words = ("--resume", finished / "ckpt.pth.tar", "--epochs", 2, "--start-epoch", 1)
    run(pictures, tmp_path, *words, "--pretrained", "file")
    said = capsys.readouterr()
    assert "--pretrained has no effect with --resume" in said.err
    assert "--start-epoch has no effect with --resume" in said.err
    assert "already finished" in said.out


def test_features_of_such_a_checkpoint_come_from_the_files_at_the_size_of_training(
    finished, pictures, tmp_path
):
    file = tmp_path / "ckpt.pth.tar"
    file.symlink_to(finished / "ckpt.pth.tar")
    words = {"dataset": "folder", "data_dir": pictures, "num_workers": 0, "device": CPU}
    found = extraction.load_or_extract(checkpoint_file=file, **words)
    train, _ = build_datasets("folder", pictures, image_size=40, in_memory=False)
    model = load_embedding(file)
    torch.testing.assert_close(found.features, extraction.extract(model, train, CPU))
    assert found.digest == train.digest
    again = extraction.load_or_extract(checkpoint_file=file, **words)
    assert torch.equal(again.features, found.features)


def test_the_script_says_what_is_wrong_in_one_message(pictures):
    result = run_script("unsupervised/imagenet.py", "--dataset", "folder", "--data-dir", "/nowhere")
    assert_refused(result, "/nowhere")


def shell(*words, **environment):
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "instance_imagenet.sh"), *map(str, words)],
        env=os.environ | environment,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_shell_script_has_the_published_settings(tmp_path):
    from runs import fake_venv

    log = tmp_path / "log"
    venv = fake_venv(tmp_path / "venv", log)
    assert_ok(shell("/my images", VENV=str(venv)))
    words = log.read_text().replace("/my images", "images").split()
    assert words[0] == "unsupervised/imagenet.py"
    args = imagenet.build_parser().parse_args(words[1:])
    default = imagenet.build_parser().parse_args(["--data-dir", "images"])
    changed = {k: v for k, v in vars(args).items() if v != getattr(default, k)}
    assert changed == {
        "architecture": "resnet50",
        "gpus": "0,1,2,3",
        "num_workers": 32,
        "auto_resume": True,
    }
    assert shell(VENV=str(venv)).returncode == 2
    assert "ResNet-50, 46.8% nearest-neighbor" in assert_ok(shell("--help"))


@pytest.mark.slow
def test_twenty_random_interruptions_end_in_the_same_bits_with_workers_or_without(
    pictures, tmp_path
):
    run(pictures, tmp_path / "whole", "--epochs", 8, "-j", 0)
    rng, starts = random.Random(0), 0
    while not starts or last(tmp_path / "cut")["epoch"] < 8:
        stop = ("--auto-resume", "--stop-after", rng.choice([1, 1, 1, 2, 3]))
        run(pictures, tmp_path / "cut", "--epochs", 8, "-j", (2, 0)[starts % 2], *stop)
        starts += 1
    assert starts >= 20
    both = [without_meta(last(tmp_path / name)) for name in ("whole", "cut")]
    assert_same(*both)


def with_still_statistics(*words, **keywords):
    """The script's network, its BatchNorm as in evaluation: what is left is the same for any processes."""
    model = build_model(*words, **keywords)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
            module.train = lambda _=True, module=module: module
    return model


class StillRun:
    """A run of the script with such a network, as something that can be sent to another process."""

    def __init__(self, *words):
        self.words = [str(word) for word in words]

    def __call__(self):
        imagenet.build_model = with_still_statistics
        try:
            call(imagenet, *self.words)
        finally:
            imagenet.build_model = build_model
        return 0


@pytest.mark.slow
def test_two_processes_make_the_run_of_one_but_for_batchnorm(pictures, tmp_path):
    # 52 images in batches of 6: rank 0 of two has 2 rows of the last one
    line = ("--data-dir", pictures, *SMALL, "-b", 6, "--epochs", 1, "--nce-z", "moving-average")
    runs = {}
    for name, gpus in (("one", "cpu"), ("two", "cpu,cpu")):
        files = ("--model-dir", tmp_path / name, "--log-dir", tmp_path / name / "log")
        start = StillRun(*line, *files, "--gpus", gpus)
        assert distributed.run(start, gpus) == 0
        runs[name] = last(tmp_path / name)
    one, two = runs["one"], runs["two"]
    assert (two["step"], two["epoch"]) == (one["step"], one["epoch"]) == (9, 1)
    torch.manual_seed(0)
    begin = build_model("resnet18", 128, imagenet=True, normalize=True)
    for name, value in begin.named_parameters():
        moved = (one["state_dict"][name] - value).norm()
        assert moved > 0, name
        assert (two["state_dict"][name] - one["state_dict"][name]).norm() < 0.01 * moved, name
    rows = (run["lemniscate"]["memory"] for run in (two, one))
    torch.testing.assert_close(*rows, rtol=0, atol=1e-4)
    losses = [log_lines(tmp_path / name / "log")[-1]["loss"] for name in ("two", "one")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    z = (run["criterion"]["z"] for run in (two, one))
    torch.testing.assert_close(*z, rtol=1e-4, atol=0)


@pytest.mark.slow
def test_an_image_that_one_process_alone_cannot_read_ends_them_all_with_one_message(tmp_path):
    pictures = make_folder(tmp_path / "pictures")
    train, _ = build_datasets("folder", pictures, image_size=40, in_memory=False)
    second = permutation(len(train), 0, 0)[8:16]  # of two in a batch of 16
    broken = pictures / train.paths[int(second[3])]
    broken.write_bytes(b"no picture")
    files = ("--model-dir", tmp_path / "run", "--log-dir", tmp_path / "run" / "log")
    line = ("--data-dir", pictures, *SMALL, *files, "--gpus", "cpu,cpu")
    start = time.monotonic()
    assert_refused(run_script("unsupervised/imagenet.py", *line), broken.name, "cannot be read")
    assert time.monotonic() - start < 60
    assert not list((tmp_path / "run").glob("*.pth.tar"))


@pytest.mark.slow
def test_two_processes_with_workers_train_and_measure_with_one_voice(pictures, tmp_path):
    words = ("--data-dir", pictures, *SMALL, "-j", 1, "--epochs", 1, "--gpus", "cpu,cpu")
    files = ("--model-dir", tmp_path, "--log-dir", tmp_path / "log")
    output = assert_ok(run_script("unsupervised/imagenet.py", *words, *files))
    assert output.count("kNN top-1") == 1
    again = ("--test-only", "--resume", "auto")
    output = assert_ok(run_script("unsupervised/imagenet.py", *words, *files, *again))
    alone = assert_ok(
        run_script("unsupervised/imagenet.py", *words, *files, *again, "--gpus", "cpu")
    )
    assert output.splitlines()[-1] == alone.splitlines()[-1]
