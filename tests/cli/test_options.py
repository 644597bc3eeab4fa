"""The command lines as published: every name, alias and default stays valid."""

import argparse

import pytest
import torch
from runs import PHASE_3, actions, load_script, pretraining

from lib.cli import checks, declared, start

finetuning = load_script("cifar-semi.py")

# names and aliases -> default, copied from the published command lines
PRETRAINING = {
    "--data-dir --dataDir": "./data",
    "--model-dir --modelDir": "./checkpoint/instance_cifar10",
    "--log-dir --logDir": "./tensorboard/instance_cifar10",
    "--lr": 0.03,
    "--lr-scheduler": "cosine",
    "--resume -r": "",
    "--test-only": False,
    "--low-dim": 128,
    "--nce-k": 0,
    "--nce-t": 0.1,
    "--nce-m": 0.5,
    "--epochs": 600,
    "--architecture --arch": "wrn-28-2",
    "--transform-scale": 0.2,
    "--transform-crop": "RandomResizedCrop",
    "--weight-decay --wd": 5e-4,
}
FINETUNING = {
    "--data-dir --data_dir --dataDir": "./data",
    "--model-root": "./checkpoint/cifar10-semi",
    "--log-root": "./tensorboard/cifar10-semi",
    "--exp-name": "exp",
    "--lr": 0.01,
    "--lr-scheduler": "cosine",
    "--resume -r": "",
    "--eval": False,
    "--finetune": False,
    "-j --num-workers": 2,
    "-b --batch-size": 128,
    "--max-iters": 500000,
    "--num-labeled": 500,
    "--rng-seed": 0,
    "--gpus": "0",
    "--eval-freq": 500,
    "--print-freq": 100,
    "--criterion": "CrossEntropyLoss",
    "--pseudo-file": "",
    "--input-gray": False,
    "--pseudo-ratio": 1,
    "--architecture --arch": "wrn-28-2",
}
# of ours: these must not disappear either
PRETRAINING_OURS = {
    "--objective": "instance",
    "--views": 1,
    "--optimizer": "sgd",
    "--dataset": "cifar10",
    "--image-size": 32,
    "-j --num-workers --workers": 2,
    "--architecture --arch -a": "wrn-28-2",
    "--lr --learning-rate": 0.03,
    "-b --batch-size": 128,
    "--iter-size": 1,
    "--momentum": 0.9,
    "--stop-after": 0,
    "--deterministic": False,
    "--compile": "",
    "--cuda-graph": "auto",
    "--loader": "device",
    "--profile": 0,
    "--rng-seed": 0,
    "--gpus": "0",
    "--precision": "auto",
    "--nce-loss": "nce",
    "--nce-z": "moving-average",
}
FINETUNING_OURS = {
    "--dataset": "cifar10",
    "--image-size": 32,
    "--weight-decay --wd": 5e-4,
    "--precision": "auto",
    "--class-balanced": False,
    "--confidence-weighted": False,
    **PHASE_3,
    "--pretrained": "",
    "--pseudo-dir": "",
    "--pseudo-per-chunk": False,
    "--iter-size": 1,
    "--stop-after": 0,
    "--deterministic": False,
    "--compile": "",
    "--cuda-graph": "auto",
    "--loader": "device",
    "--profile": 0,
}
CHOOSING = {
    "--dataset": "cifar10",
    "--data-dir --data_dir": "./data",
    "--image-size": None,
    "-j --num-workers": 2,
    "--architecture --arch": "",
    "--checkpoint": "",
    "--features": "",
    "--method": "maxherding",
    "--budget": 40,
    "--space": "metric",
    "--graph": "cifar",
    "--num-neighbors": None,
    "--labeled": None,
    "--pseudo-file": "",
    "--pseudo-dir": "",
    "--gpus": "0",
    "--precision": "auto",
    "--rng-seed": 0,
    "--deterministic": False,
    "--save-path": "./checkpoint/chosen",
}
TRAINING = (
    *(pretraining, finetuning),
    *map(load_script, ("unsupervised/imagenet.py", "imagenet-semi.py")),
)
SCRIPTS = [
    (pretraining, PRETRAINING, PRETRAINING_OURS),
    (finetuning, FINETUNING, FINETUNING_OURS),
    (load_script("scripts/choose.py"), {}, CHOOSING),
]
CASES = [
    pytest.param(script, names.split(), default, id=f"{script.__name__} {names}")
    for script, *tables in SCRIPTS
    for table in tables
    for names, default in table.items()
]


@pytest.mark.parametrize(("script", "names", "default"), CASES)
def test_names_aliases_and_defaults_are_frozen(script, names, default):
    parser = script.build_parser()
    found = {id(actions(parser)[name]) for name in names}
    assert len(found) == 1  # aliases of one option, not options of their own
    value = getattr(parser.parse_args([]), actions(parser)[names[0]].dest)
    assert value == default
    assert isinstance(value, bool) == isinstance(default, bool)


@pytest.mark.parametrize(
    ("script", "published", "ours"), SCRIPTS, ids=["pretrain", "finetune", "choose"]
)
def test_there_is_no_option_that_the_tables_do_not_name(script, published, ours):
    listed = {name for names in published | ours for name in names.split()}
    assert actions(script.build_parser()).keys() - listed == {"-h", "--help"}


@pytest.mark.parametrize(
    ("script", "option", "published"),
    [
        (finetuning, "--lr-scheduler", ("multi-step", "cosine", "cosine-with-restart")),
        (finetuning, "--criterion", ("CrossEntropyLoss", "MultiMarginLoss")),
        (finetuning, "--arch", ("resnet18", "wrn-28-2", "wrn-16-4")),
        (pretraining, "--lr-scheduler", ("multi-step", "cosine", "cosine-with-restart")),
        (pretraining, "--arch", ("resnet18", "wrn-28-2", "wrn-28-10")),
        (pretraining, "--transform-crop", ("RandomResizedCrop", "PadCrop")),
        (pretraining, "--nce-loss", ("nce", "infonce")),
        (pretraining, "--objective", ("instance", "two-view", "patches-tcr")),
        (pretraining, "--optimizer", ("sgd", "lars")),
        (finetuning, "--consistency", ("softmatch", "freematch")),
        (finetuning, "--head-init", ("random", "class-means")),
        (finetuning, "--strong-augmentation", ("rand-augment", "none")),
    ],
)
def test_published_choices_are_accepted(script, option, published):
    for choice in published:
        args = script.build_parser().parse_args([option, choice])
        assert choice in vars(args).values()


@pytest.mark.parametrize("script", [pretraining, finetuning], ids=["pretrain", "finetune"])
@pytest.mark.parametrize(
    "words", [["--data-dri", "x"], ["--epoch", "3"], ["--lr-sched", "cosine"], ["stray"]]
)
def test_a_typo_is_an_error_and_an_abbreviation_is_not_guessed(script, words, capsys):
    with pytest.raises(SystemExit) as exit_:
        script.build_parser().parse_args(words)
    assert exit_.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize("script", [pretraining, finetuning], ids=["pretrain", "finetune"])
def test_help_is_the_docstring_and_every_option_is_explained(script):
    output = script.build_parser().format_help()
    assert script.__doc__.strip() in output
    for name, action in actions(script.build_parser()).items():
        assert name in output
        assert action.help, name


@pytest.mark.parametrize("script", TRAINING, ids=lambda script: script.__name__)
def test_options_that_change_the_mathematics_are_compared_on_resuming(script):
    known = vars(script.build_parser().parse_args([]))
    # what only decides where a run computes, writes, or stops to look
    free = {"data_dir", "num_workers", "gpus", "precision", "resume", "model_dir", "log_dir"}
    free |= {"test_only", "model_root", "log_root", "exp_name", "eval", "eval_freq", "print_freq"}
    free |= {"stop_after", "deterministic", "compile", "cuda_graph", "profile"}
    free |= {"auto_resume", "evaluate", "val_batch_size", "save_freq"}
    free |= {"start_epoch"}  # it places a new run, and a resumed one ignores it
    free |= {"pseudo_file", "pseudo_dir", "pretrained"}  # its content is compared, not its path
    assert {k: v for k, v in known.items() if k not in free} == script.RESUME_INVARIANTS


PRESETS = [
    ("two-view", {"views": 2, "batch_size": 512, "lr": 0.12, "nce_t": 0.5, "weight_decay": 5e-4}),
    ("patches-tcr", {"views": 20, "batch_size": 100, "lr": 0.3, "optimizer": "lars", "epochs": 30}),
    ("instance", {"views": 1, "batch_size": 128, "lr": 0.03, "nce_t": 0.1, "optimizer": "sgd"}),
]


@pytest.mark.parametrize(("objective", "defaults"), PRESETS)
def test_an_objective_brings_its_own_defaults_which_the_user_overrides(objective, defaults, capsys):
    parser = pretraining.build_parser()
    args = vars(parser.parse_args(["--epochs", "7", "--lr", "0.5", "--objective", objective]))
    given = {"epochs": 7, "lr": 0.5}
    assert {name: args[name] for name in defaults} == defaults | {
        name: value for name, value in given.items() if name in defaults
    }
    checks.check_pretraining(argparse.Namespace(**args), parser)
    assert "has no effect" not in capsys.readouterr().err
    assert vars(parser.parse_args([])) == vars(pretraining.build_parser().parse_args([]))


def test_a_crop_that_patches_do_not_take_is_told(capsys):
    words = [
        "--objective",
        "patches-tcr",
        "--transform-crop",
        "PadCrop",
        "--transform-scale",
        "0.3",
    ]
    pretraining.check_options(pretraining.build_parser().parse_args(words))
    warned = capsys.readouterr().err
    assert warned == "warning: --transform-crop has no effect with --objective patches-tcr\n"


def test_help_names_the_defaults_of_each_objective():
    output = " ".join(pretraining.build_parser().format_help().split())
    assert "(--objective two-view: 512, --objective patches-tcr: 100) (default: 128)" in output
    imagenet = load_script("unsupervised/imagenet.py").build_parser()
    assert not hasattr(imagenet.parse_args(["--objective", "patches-tcr"]), "transform_scale")


def test_num_labeled_takes_a_number_or_all_and_says_so(capsys):
    parser = finetuning.build_parser()
    assert parser.parse_args(["--num-labeled", "250"]).num_labeled == 250
    assert parser.parse_args(["--num-labeled", "all"]).num_labeled == "all"
    assert parser.parse_args(["--num-labeled", "a/b.csv"]).num_labeled == "a/b.csv"
    with pytest.raises(SystemExit):
        parser.parse_args(["--num-labeled", "some"])
    assert "give an integer or all" in capsys.readouterr().err


def test_an_output_folder_is_made_and_left_empty(tmp_path):
    folder = checks.writable_folder("--model-dir", tmp_path / "a" / "b")
    assert list(folder.iterdir()) == []
    (tmp_path / "file").write_text("keep")
    with pytest.raises(ValueError, match=r"--model-dir: cannot write to the folder .*file"):
        checks.writable_folder("--model-dir", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "keep"


def test_traceback_in_the_environment_shows_where_a_message_came_from(monkeypatch):
    def fail(_: argparse.Namespace) -> None:
        raise ValueError("mistyped")

    monkeypatch.setattr("sys.argv", ["script"])
    with pytest.raises(SystemExit):
        start.run(fail, declared.parser("manual"))
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(ValueError, match="mistyped"):
        start.run(fail, declared.parser("manual"))


def test_scripts_can_be_imported_without_running_anything():
    assert torch.initial_seed() == 0  # conftest seeds every test; building a parser must not
    pretraining.build_parser()
    finetuning.build_parser()
    assert torch.initial_seed() == 0
