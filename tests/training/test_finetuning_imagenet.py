"""imagenet-semi.py: its options, starting weights, chunks of pseudo-labels, resuming with images in files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, assert_ok, assert_refused, run_script
from runs import (
    PHASE_3,
    actions,
    assert_same,
    call,
    contents,
    deterministic,
    fake_venv,
    finetuning,
    interrupted,
    load_script,
    log_lines,
    make_folder,
    run_shell,
    without_meta,
)

from datasets import build_datasets
from datasets.transforms import RandomHorizontalFlip, RandomResizedCrop
from lib.cli import declared
from lib.files import checkpoint
from lib.labels import confidence, pseudo_files, pseudo_labels
from lib.labels.split import Split, cut_into_chunks, labeled_split
from lib.propagation.chunks import save_part
from lib.training import finetuning as shared
from models import build_model

imagenet = load_script("imagenet-semi.py")
LABELS, CHUNKS = 8, 3

# names and aliases -> default, copied from the published command line
PUBLISHED = {
    "--model-root": "./checkpoint/imagenet",
    "--log-root": "./tensorboard/imagenet",
    "--exp-name": "exp",
    "--lr": 0.01,
    "--lr-scheduler": "multi-step",
    "--pretrained": "",
    "--resume -r": "",
    "--eval": False,
    "--finetune": False,
    "-j --num-workers": 32,
    "-b --batch-size": 256,
    "--max-iters": 50000,
    "--num-labeled": 13000,
    "--rng-seed": 0,
    "--gpus": "0,1,2,3",
    "--eval-freq": 500,
    "--print-freq": 10,
    "--criterion": "CrossEntropyLoss",
    "--pseudo-dir": "",
    "--pseudo-file": "",
    "--pseudo-ratio": 0.1,
    "--architecture --arch": "resnet18",
}
OURS = {
    "--dataset": "folder",
    "--data-dir --data_dir --dataDir": "",
    "--image-size": 224,
    "--weight-decay --wd": 0.0,
    "--pseudo-per-chunk": False,
    "--class-balanced": False,
    "--confidence-weighted": False,
    **PHASE_3,
    "--input-gray": False,
    "--iter-size": 1,
    "--stop-after": 0,
    "--precision": "auto",
    "--deterministic": False,
    "--compile": "",
    "--cuda-graph": "auto",
    "--loader": "device",
    "--profile": 0,
}


@pytest.mark.parametrize("names", PUBLISHED | OURS)
def test_names_aliases_and_defaults_are_frozen(names):
    parser = imagenet.build_parser()
    found = {actions(parser)[name].dest for name in names.split()}
    assert len(found) == 1
    assert getattr(parser.parse_args([]), found.pop()) == (PUBLISHED | OURS)[names]


def test_there_is_no_option_that_the_tables_do_not_name_and_each_is_explained():
    listed = {name for names in PUBLISHED | OURS for name in names.split()}
    parser = imagenet.build_parser()
    assert actions(parser).keys() - listed == {"-h", "--help", "--dummy"}
    assert imagenet.__doc__.strip() in parser.format_help()
    assert all(action.help for action in actions(parser).values())


def test_both_scripts_have_the_same_options_but_dummy():
    ours, theirs = (actions(script.build_parser()).keys() for script in (imagenet, finetuning))
    assert ours - theirs == {"--dummy"}
    assert not theirs - ours


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """`pictures/`, chunks of pseudo-labels, a published metric and a classifier of other classes."""
    root = tmp_path_factory.mktemp("imagenet")
    make_folder(root / "pictures")
    train, _ = build_datasets("folder", root / "pictures", image_size=40, in_memory=False)
    split = labeled_split(train.targets, LABELS, 4)
    votes = torch.rand(len(train), 4, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    meta = {"data_digest": train.digest, "classes": list(train.classes)}
    for number, unlabeled in enumerate(cut_into_chunks(split, CHUNKS)):
        part = Split(split.labeled, unlabeled)
        part = confidence.from_scores(votes.log(), part, meta, confidence="largest")
        save_part(part, root, LABELS, number, CHUNKS)
    weights = build_model("resnet18", 128, imagenet=True, normalize=True).state_dict()
    metric = {
        "state_dict": {f"module.{name}": value for name, value in weights.items()},
        "arch": "resnet18",
        "epoch": 200,
        "best_prec1": 0.41,
        "optimizer": {},
        "lemniscate": {"memory": torch.rand(52, 128)},
    }
    checkpoint.save(metric, root / "metric.pth.tar")
    weights = build_model("resnet18", 4, imagenet=True).state_dict()
    checkpoint.save({"state_dict": weights}, root / "classifier.pth.tar")
    return root


def words(world: Path, folder: Path) -> list[object]:
    data = ("--data-dir", world / "pictures", "--image-size", 40, "-j", 0, "--precision", "fp32")
    files = ("--model-root", folder, "--log-root", folder / "log", "--exp-name", "e")
    short = ("--num-labeled", LABELS, "--max-iters", 4, "-b", 8, "--gpus", "cpu")
    return [*data, *files, *short]


@pytest.fixture
def finetune(tmp_path, world):
    """Run the script on the pictures in this process, everything under tmp_path/NAME."""

    def run(*more: object, name: str = "run") -> Path:
        call(imagenet, *words(world, tmp_path / name), *more)
        return tmp_path / name

    return run


def last(folder: Path) -> dict[str, Any]:
    return checkpoint.load_dict(folder / "e" / "ckpt.pth.tar")


def chunks_of(world: Path) -> Path:
    return world / f"num_labeled_{LABELS}"


def examples_of(world: Path, *more: object) -> shared.TrainingSet:
    """What a command line would train on."""
    line = ["--data-dir", world / "pictures", "--num-labeled", LABELS, *more]
    args = imagenet.build_parser().parse_args([str(w) for w in line])
    train, _ = build_datasets("folder", world / "pictures", image_size=40, in_memory=False)
    parts = shared.read_pseudo_labels(args.pseudo_file, args.pseudo_dir)
    return shared.choose_training_set(train, parts, declared.values(args, shared.Settings))


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_chunks_are_one_ranking_or_an_equal_share_of_each(world, ratio):
    parts = [pseudo_files.load(chunks_of(world) / f"3_{i}.pth.tar") for i in range(CHUNKS)]
    everything = [
        (float(-c), int(i), int(y))
        for part in parts
        for i, y, c in zip(part.indexes, part.labels, part.confidence, strict=True)
    ]
    whole = sorted(everything)[: int(ratio * len(everything))]
    examples = examples_of(world, "--pseudo-dir", chunks_of(world), "--pseudo-ratio", ratio)
    assert examples.indexes[LABELS:].tolist() == [index for _, index, _ in whole]
    assert examples.labels[LABELS:].tolist() == [label for *_, label in whole]

    more = ("--pseudo-ratio", ratio, "--pseudo-per-chunk")
    shares = examples_of(world, "--pseudo-dir", chunks_of(world), *more)
    of_each = int(len(everything) * ratio / CHUNKS)
    expected = [i for part in parts for i in part.indexes[:of_each].tolist()]
    assert shares.indexes[LABELS:].tolist() == expected
    assert torch.equal(shares.indexes[:LABELS], examples.indexes[:LABELS])
    if ratio == 0.5:
        assert sorted(expected) != sorted(index for _, index, _ in whole)


def test_a_single_file_is_the_ranking_of_its_chunks(world, tmp_path):
    merged = pseudo_labels.merged(pseudo_files.load_chunks(chunks_of(world)))
    pseudo_files.save(merged, tmp_path / "8.pth.tar")
    one, many = (
        examples_of(world, *where, "--pseudo-ratio", 0.5, "--confidence-weighted")
        for where in (("--pseudo-file", tmp_path / "8.pth.tar"), ("--pseudo-dir", chunks_of(world)))
    )
    assert one.digest == many.digest
    assert (one.weights[LABELS:] < 1).all()


def test_without_pseudo_labels_exactly_the_labeled_images_are_trained_on(world):
    examples = examples_of(world)
    train, _ = build_datasets("folder", world / "pictures", image_size=40, in_memory=False)
    assert torch.equal(examples.indexes, labeled_split(train.targets, LABELS, 4).labeled)
    assert torch.equal(examples.labels, train.targets[examples.indexes])


def test_a_run_from_chunks_leaves_the_published_keys_class_names_and_both_checkpoints(
    finetune, world
):
    folder = finetune("--pseudo-dir", chunks_of(world), "--pretrained", world / "metric.pth.tar")
    assert {p.name for p in (folder / "e").iterdir()} == {"ckpt.pth.tar", "ckpt.best.pth.tar"}
    state = last(folder)
    assert {"step", "best_acc", "net", "optimizer"} <= state.keys()
    assert state["step"] == 4
    assert state["classes"] == ["blue", "gray", "green", "red"]
    assert state["net"]["conv1.weight"].shape == (64, 3, 7, 7)
    scores = call(
        imagenet, *words(world, folder), "--eval", "--resume", folder / "e" / "ckpt.pth.tar"
    )
    assert scores["top1"] == state["accuracies"]["last"]


def test_multi_step_drops_to_a_tenth_at_three_and_at_six_sevenths(finetune):
    line = ("--finetune", "--max-iters", 14, "--print-freq", 1, "-b", 2, "--lr", 0.5)
    folder = finetune(*line)
    rates = [x["lr"] for x in log_lines(folder / "log" / "e") if x["event"] == "train"]
    assert rates == pytest.approx([0.5] * 6 + [0.05] * 6 + [0.005] * 2)


def test_the_augmentation_is_that_of_imagenet_classifiers(finetune, monkeypatch):
    class SeenError(Exception):
        pass

    def seen(ops, *_, **__):
        if ops:  # evaluation has none
            raise SeenError(*ops)

    monkeypatch.setattr(shared, "Augmentation", seen)
    with pytest.raises(SeenError) as caught:
        finetune()
    crop, flip = caught.value.args
    assert isinstance(crop, RandomResizedCrop)
    assert (crop.min_scale, crop.max_scale) == (0.08, 1)
    assert isinstance(flip, RandomHorizontalFlip)


def test_pretrained_weights_of_phase_1_come_without_their_last_layer(finetune, world, capsys):
    frozen = ("--finetune", "--lr", 1e-9, "--max-iters", 1)
    state = last(finetune(*frozen, "--pretrained", world / "metric.pth.tar"))
    assert "2 missing (fc.weight, fc.bias); the last layer is a new one" in capsys.readouterr().out
    start = checkpoint.load_dict(world / "metric.pth.tar")["state_dict"]
    name = "layer4.1.conv2.weight"
    torch.testing.assert_close(state["net"][name], start[f"module.{name}"], rtol=0, atol=1e-6)
    assert state["net"]["fc.weight"].shape == (4, 512)


def test_pretrained_weights_of_a_classifier_come_whole_where_it_is_for_these_classes(
    finetune, world, tmp_path, capsys
):
    frozen = ("--finetune", "--lr", 1e-9, "--max-iters", 1)
    start = checkpoint.load_dict(world / "classifier.pth.tar")["state_dict"]
    state = last(finetune(*frozen, "--pretrained", world / "classifier.pth.tar"))
    assert "the last layer is its own" in capsys.readouterr().out
    torch.testing.assert_close(state["net"]["fc.weight"], start["fc.weight"], rtol=0, atol=1e-6)

    names = {"classes": ["ant", "bee", "cat", "dog"], "state_dict": start}
    checkpoint.save(names, tmp_path / "animals.pth.tar")
    state = last(finetune(*frozen, "--pretrained", tmp_path / "animals.pth.tar"))
    assert "the last layer is a new one" in capsys.readouterr().out
    assert (state["net"]["fc.weight"] - start["fc.weight"]).abs().max() > 1e-3

    # a metric with as many dimensions as there are classes fits, and is no classifier
    metric = {"state_dict": start, "lemniscate": {"memory": torch.rand(52, 4)}}
    checkpoint.save(metric, tmp_path / "metric4.pth.tar")
    finetune(*frozen, "--pretrained", tmp_path / "metric4.pth.tar")
    assert "the last layer is a new one" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_is_stopped_and_resumed_equals_the_uninterrupted_one_bit_for_bit(
    finetune, world, capsys
):
    line = ("--eval-freq", 3, "--print-freq", 3, "--lr", 0.05, "-b", 4)
    line += ("--pseudo-dir", chunks_of(world), "--pseudo-ratio", 0.8, "--iter-size", 2)
    line += ("--pretrained", world / "metric.pth.tar")
    whole = finetune(*line, name="whole")
    cut = finetune(*line, "-j", 2, "--resume", "auto", "--stop-after", 2, name="cut")
    assert last(cut)["step"] == 2
    output = capsys.readouterr().out
    assert "no checkpoint in" in output
    assert f"--resume {cut / 'e' / 'ckpt.pth.tar'}" in output
    finetune(*line, "--resume", "auto", name="cut")
    assert_same(without_meta(last(whole)), without_meta(last(cut)))
    best = "e/ckpt.best.pth.tar"
    assert_same(*(without_meta(checkpoint.load_dict(folder / best)) for folder in (whole, cut)))
    whole_lines, cut_lines = (log_lines(folder / "log" / "e") for folder in (whole, cut))
    for event in ("train", "test", "end"):
        assert deterministic(cut_lines, event) == deterministic(whole_lines, event)
    assert [x["first_step"] for x in cut_lines if x["event"] == "start"] == [0, 2]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--resume", "METRIC"), "--pretrained takes the weights of another network"),
        (("--resume", "/nowhere/c.pth.tar"), "--resume /nowhere/c.pth.tar: there is no such file"),
        (("--pretrained", "/nowhere/c.pth.tar"), "--pretrained /nowhere/c.pth.tar: there is no"),
        (("--pseudo-dir", "CHUNKS", "--pseudo-file", "CHUNKS"), "name one of them"),
        (("--pseudo-dir", "CHUNKS", "--num-labeled", 12), "made with 8 labeled images"),
        (("--pseudo-dir", "/nowhere"), "/nowhere is not a folder"),
        (("--arch", "wrn-28-2"), "--arch wrn-28-2: take one of resnet18"),
        (("--eval",), "--eval measures a checkpoint"),
        (("--eval", "--resume", "auto"), "this run has none yet"),
        (("--eval", "--resume", "METRIC"), "metric of phase 1"),
        (("--data-dir", ""), "--data-dir is missing"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_no_run_can_work_with_is_refused_before_anything_is_written(
    world, tmp_path, more, message
):
    places = {"METRIC": world / "metric.pth.tar", "CHUNKS": chunks_of(world)}
    with pytest.raises(ValueError, match=message):
        call(imagenet, *words(world, tmp_path), *(places.get(w, w) for w in more))
    assert not contents(tmp_path)


def test_other_class_names_are_listed_on_resuming_and_on_measuring(finetune, world, tmp_path):
    folder = finetune("--finetune", "--max-iters", 1)
    other = make_folder(tmp_path / "other")
    for part in ("train", "test"):
        (other / part / "green").rename(other / part / "teal")
    line = ("--data-dir", other, "--resume", folder / "e" / "ckpt.pth.tar")
    for more in ((), ("--eval",)):
        with pytest.raises(ValueError, match=r"other classes.*2 green / red, 3 red / teal"):
            finetune("--finetune", "--max-iters", 1, *line, *more)


def test_pseudo_labels_of_other_class_names_are_refused(world, tmp_path):
    file = chunks_of(world) / "3_0.pth.tar"
    state = checkpoint.load_dict(file)
    checkpoint.save(
        state | {"meta": {"classes": ["a", "gray", "b", "red"]}}, tmp_path / "x.pth.tar"
    )
    with pytest.raises(ValueError, match=r"made for other classes: 0 a / blue, 2 b / green"):
        examples_of(world, "--pseudo-file", tmp_path / "x.pth.tar")


def test_a_run_killed_while_it_was_tested_is_tested_when_it_is_resumed(finetune, capsys):
    line = ("--finetune", "--max-iters", 2, "--eval-freq", 2)
    whole = finetune(*line, name="whole")
    with interrupted(shared, "evaluate", 1):
        finetune(*line, name="cut")
    folder = whole.parent / "cut"
    assert last(folder)["accuracies"]["last"] is None
    finetune(*line, "--resume", "auto", name="cut")
    assert_same(without_meta(last(whole)), without_meta(last(folder)))
    lines = [deterministic(log_lines(each / "log" / "e"), "test") for each in (whole, folder)]
    assert lines[0] == lines[1]
    before = contents(folder / "e")
    finetune(*line, "--resume", "auto", name="cut")
    assert contents(folder / "e") == before


def test_a_last_checkpoint_that_cannot_be_read_is_said_and_the_best_one_named_or_taken(
    finetune, capsys
):
    folder = finetune("--finetune", "--eval-freq", 2, "--stop-after", 2)
    broken, best = (folder / "e" / name for name in ("ckpt.pth.tar", "ckpt.best.pth.tar"))
    broken.write_bytes(broken.read_bytes()[:1000])
    with pytest.raises(
        ValueError, match=f"ckpt.pth.tar .*the best checkpoint of that run is {best}"
    ):
        finetune("--finetune", "--eval-freq", 2, "--resume", broken)
    capsys.readouterr()
    finetune("--finetune", "--eval-freq", 2, "--resume", "auto")
    said = capsys.readouterr()
    assert str(broken) in said.err
    assert f"takes {best}" in said.out
    assert "continuing at step 2" in said.out
    assert last(folder)["step"] == 4


def test_the_script_measures_its_speed_without_data(tmp_path):
    line = (
        "--dummy",
        "--image-size",
        40,
        "-b",
        32,
        "--max-iters",
        2,
        "--print-freq",
        1,
        "--finetune",
    )
    output = assert_ok(run_script("imagenet-semi.py", *line, "--gpus", "cpu", cwd=tmp_path))
    assert "dummy: 13000 labeled and 0 pseudo-labeled images of 50000, 1000 classes" in output
    assert "% of the time waiting for images, " in output
    assert "% MFU)" in output
    assert (tmp_path / "checkpoint" / "imagenet-dummy" / "exp" / "ckpt.pth.tar").is_file()
    (line, *_) = [
        x for x in log_lines(tmp_path / "tensorboard/imagenet-dummy/exp") if x["event"] == "train"
    ]
    assert 0 <= line["data_wait"] <= 1
    assert line["images_per_s"] > 0


@pytest.mark.slow
def test_two_processes_make_the_run_of_one_and_rank_0_alone_writes(finetune, world, tmp_path):
    # with --finetune BatchNorm keeps its statistics, which alone depend on the number of processes
    line = ("--pretrained", world / "metric.pth.tar", "--finetune", "--iter-size", 2)
    line += ("--eval-freq", 2, "--lr", 1)
    one, two = finetune(*line), tmp_path / "two"
    command = (*words(world, two), *line, "--gpus", "cpu,cpu")
    output = assert_ok(run_script("imagenet-semi.py", *command))
    assert output.count("last accuracy") == 1
    assert {p.name for p in (two / "e").iterdir()} == {"ckpt.pth.tar", "ckpt.best.pth.tar"}
    for name, value in last(one)["net"].items():
        torch.testing.assert_close(last(two)["net"][name], value, rtol=1e-4, atol=1e-6)
    assert last(one)["net"]["fc.bias"].abs().max() > 1e-2  # there was something to learn
    for key in ("step", "accuracies", "best_acc", "examples", "classes"):
        assert_same(last(two)[key], last(one)[key])


def test_a_missing_folder_of_images_ends_with_code_2_and_one_message(tmp_path):
    result = run_script("imagenet-semi.py", "--data-dir", tmp_path / "none", cwd=tmp_path)
    assert_refused(result, str(tmp_path / "none"))


@pytest.fixture
def published(tmp_path) -> list[object]:
    """Paths for the shell script: an empty data folder, a checkpoint, folders of pseudo-labels."""
    (tmp_path / "data").mkdir()
    (tmp_path / "phase1.pth.tar").touch()
    for count in (13000, 26000, 51000):
        (tmp_path / "pseudos" / f"num_labeled_{count}").mkdir(parents=True)
    places = {"--data-dir": "data", "--checkpoint": "phase1.pth.tar", "--pseudos": "pseudos"}
    return [word for option, name in places.items() for word in (option, tmp_path / name)]


def test_the_shell_script_has_the_published_ratio_of_each_number_of_labels(tmp_path, published):
    log = tmp_path / "log"
    venv = fake_venv(tmp_path / "venv", log)
    line = (*published, "--gpus", "cpu", "--max-iters", 7)
    assert_ok(run_shell("finetune_imagenet.sh", *line, VENV=str(venv)))
    runs = [line.split() for line in log.read_text().splitlines()]
    assert [words[0] for words in runs] == ["imagenet-semi.py"] * 3
    parsed = [imagenet.build_parser().parse_args(words[1:]) for words in runs]
    assert [(a.num_labeled, a.pseudo_ratio) for a in parsed] == [
        *((13000, 0.1), (26000, 0.2), (51000, 0.5)),
    ]
    for args in parsed:
        assert args.pseudo_dir == str(tmp_path / "pseudos" / f"num_labeled_{args.num_labeled}")
        assert args.pretrained == str(tmp_path / "phase1.pth.tar")
        assert (args.architecture, args.lr, args.weight_decay, args.batch_size) == (
            *("resnet50", 0.01, 0.0, 256),
        )
        assert (args.lr_scheduler, args.resume) == ("multi-step", "auto")
        assert (args.gpus, args.max_iters) == ("cpu", 7)  # the user's words win
    assert len({args.exp_name for args in parsed}) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("500",), "no ratio is published for 500 labels"),
        (("13000", "--data-dir"), "--data-dir needs a path"),
        (("--data-dir", "/nowhere"), "there is no folder /nowhere"),
        (("--checkpoint", "/nowhere"), "there is no /nowhere"),
        (("--pseudos", "/nowhere"), "there is no /nowhere/num_labeled_13000"),
    ],
)
def test_the_shell_script_names_what_is_missing_before_the_first_run(
    tmp_path, published, line, message
):
    log = tmp_path / "log"
    numbers = [w for w in line if w.isdecimal()]
    given = (*numbers, *published, *(w for w in line if not w.isdecimal()))
    result = run_shell("finetune_imagenet.sh", *given, VENV=str(fake_venv(tmp_path / "v", log)))
    assert result.returncode == 2
    assert message in result.stderr
    assert not log.exists()


def test_the_shell_script_shows_its_header_as_manual():
    output = assert_ok(run_shell("finetune_imagenet.sh", "--help"))
    header = (ROOT / "scripts/finetune_imagenet.sh").read_text().split("set -euo pipefail")[0]
    assert output.splitlines() == [
        x.removeprefix("#").removeprefix(" ") for x in header.splitlines()[1:]
    ]
