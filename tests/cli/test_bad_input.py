"""A user's mistake: exit code 2, one message, before any training, nothing on disk damaged."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import assert_refused, run_script
from runs import LABELS, TINY, call, contents, finetuning, make_folder, pretraining, world

from lib.cli import start
from lib.files import checkpoint

__all__ = ["world"]  # the fixture


def no_step(*_: object, **__: object) -> Iterator[None]:
    yield pytest.fail("training began")


@pytest.fixture
def refused(world, tmp_path, monkeypatch, capsys):
    """Start a script as its own `__main__` does, expect its refusal, and compare the disk."""

    def run(script: object, *words: object, data: Path | None = None) -> str:
        files = {
            pretraining: ("--model-dir", tmp_path / "old", "--log-dir", tmp_path / "old"),
            finetuning: ("--model-root", tmp_path, "--exp-name", "old", "--log-root", tmp_path),
        }[script]
        folder = ("--dataset", "folder", "--data-dir", data or world / "pictures", *TINY)
        short = ("--epochs", 1) if script is pretraining else ("--max-iters", 1)
        if script is finetuning:
            short += ("--num-labeled", LABELS)
        before = contents(tmp_path)
        line = (*folder, *files, *short, *words)
        monkeypatch.setattr(sys, "argv", ["script", *map(str, line)])
        monkeypatch.setattr(script, "train_steps", no_step)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            start.run(script.main, script.build_parser())
        message = capsys.readouterr().err
        assert exit_.value.code == 2, message
        assert message.count("error:") == 1, message
        assert "Traceback" not in message
        assert contents(tmp_path) == before
        return message

    (tmp_path / "old").mkdir()
    for name in ("ckpt.cifar.pth.tar", "ckpt.cifar.best.pth.tar", "ckpt.pth.tar"):
        shutil.copy(world / "metric.pth.tar", tmp_path / "old" / name)
    return run


PRETRAINING = {
    "--epoch 3": ["unrecognized arguments"],
    "--lr-scheduler linear": ["--lr-scheduler", "invalid choice"],
    "--epochs 0": ["--epochs: must be positive, not 0"],
    "--lr nan": ["--lr/--learning-rate: must be a finite number, not nan"],
    "--lr -1": ["--lr/--learning-rate: must be positive, not -1"],
    "-b 0": ["--batch-size: must be positive, not 0"],
    "--num-workers -1": ["--num-workers", "must be at least 0, not -1"],
    "--rng-seed -1": ["--rng-seed: must be at least 0 and below 2**63, not -1"],
    "--rng-seed 99999999999999999999": ["--rng-seed: ", "below 2**63"],
    "--weight-decay -1": ["--weight-decay/--wd: must be at least 0, not -1"],
    "--image-size 4": ["image size 4"],
    "--image-size 0": ["--image-size: must be positive, not 0"],
    "--low-dim 0": ["--low-dim: must be positive, not 0"],
    "--nce-t 0": ["--nce-t: must be positive, not 0"],
    "--nce-m 1": ["--nce-m: must lie in [0, 1), not 1"],
    "--nce-m -0.1": ["--nce-m: must lie in [0, 1), not -0.1"],
    "--nce-k -1": ["--nce-k: must be at least 0, not -1"],
    "--nce-k 52": ["--nce-k 52", "51 others"],
    "--transform-scale 0": ["--transform-scale: must lie in (0, 1], not 0"],
    "--transform-scale 2": ["--transform-scale: must lie in (0, 1], not 2"],
    "--arch wrn-28": ["unknown architecture 'wrn-28'", "wrn-D-K"],
    "--arch wrn-11-1": ["wrn-11-1", "6n + 4"],
    "--arch resnet19": ["resnet19"],
    "--gpus 0,0": ["--gpus 0,0", "twice"],
    "--gpus first": ["--gpus first"],
    "--test-only": ["--test-only", "--resume"],
    "--resume /nowhere/ckpt.pth.tar": ["/nowhere/ckpt.pth.tar"],
    "--test-only --resume /nowhere/ckpt.pth.tar": ["/nowhere/ckpt.pth.tar"],
}
FINETUNING = {
    "--data-dri x": ["unrecognized arguments"],
    "--max-iters 0": ["--max-iters: must be positive, not 0"],
    "--eval-freq 0": ["--eval-freq: must be positive, not 0"],
    "--print-freq 0": ["--print-freq: must be positive, not 0"],
    "--num-workers -1": ["--num-workers", "must be at least 0, not -1"],
    "--pseudo-ratio 2": ["--pseudo-ratio: must lie in [0, 1], not 2"],
    "--pseudo-ratio -0.5": ["--pseudo-ratio: must lie in [0, 1], not -0.5"],
    "--pseudo-ratio nan": ["--pseudo-ratio: must be a finite number, not nan"],
    "--num-labeled 3": ["3 labeled images for 4 classes"],
    "--num-labeled 0": ["--num-labeled: must be positive, not 0"],
    "--num-labeled -8": ["--num-labeled: must be positive, not -8"],
    "--num-labeled 400": ["class 0 has 10 labeled images", "100"],
    "--num-labeled few": ["--num-labeled", "give an integer or all"],
    "--arch vgg16": ["unknown architecture 'vgg16'"],
    "--criterion L1": ["--criterion", "invalid choice"],
    "--eval": ["--eval", "--resume"],
    "--resume /nowhere/ckpt.pth.tar": ["--resume /nowhere/ckpt.pth.tar"],
    "--pseudo-file /nowhere/50.pth.tar": ["/nowhere/50.pth.tar"],
}


@pytest.mark.parametrize("line", PRETRAINING)
def test_pretraining_refuses(refused, line):
    message = refused(pretraining, *line.split())
    assert all(words in message for words in PRETRAINING[line]), message


@pytest.mark.parametrize("line", FINETUNING)
def test_finetuning_refuses(refused, line):
    message = refused(finetuning, *line.split())
    assert all(words in message for words in FINETUNING[line]), message


def change(**entries):
    return lambda state: state | entries


def with_entry(key: str, place: int, value: int):
    def apply(state: dict) -> dict:
        changed = state[key].clone()
        changed[place] = value
        return state | {key: changed}

    return apply


PSEUDO = {
    "of another data set": (change(meta={"data_digest": "0" * 16}), "another data set"),
    "of wrong length": (lambda s: s | {"pseudo_labels": s["pseudo_labels"][:-1]}, "pseudo_labels"),
    "with a label out of range": (
        lambda s: (
            with_entry("pseudo_labels", 0, 7)({k: s[k] for k in s if k != "pseudo_probs"})
            | {"pseudo_weights": s["pseudo_weights"]}
        ),
        "label 7 in a data set of 4 classes",
    ),
    "with a label beyond its probabilities": (
        with_entry("pseudo_labels", 0, 7),
        "label 7 is out of range",
    ),
    "with a negative label": (with_entry("pseudo_labels", 0, -1), "label -1 is negative"),
    "with an index twice": (
        lambda s: with_entry("pseudo_indexes", 0, int(s["pseudo_indexes"][1]))(s),
        "pseudo_indexes holds an index twice",
    ),
    "with an index out of range": (
        lambda s: with_entry("pseudo_indexes", 0, 52)(
            s | {"unlabeled_indexes": torch.cat([s["unlabeled_indexes"], torch.tensor([52])])}
        ),
        "index 52 in a data set of 52 images",
    ),
    "with a labeled index out of range": (
        with_entry("labeled_indexes", 0, 1000),
        "index 1000 in a data set of 52 images",
    ),
    "with a negative index": (with_entry("pseudo_indexes", 0, -1), "negative index -1"),
    "with a labeled image among the pseudo-labeled": (
        lambda s: with_entry("pseudo_indexes", 0, int(s["labeled_indexes"][0]))(s),
        "both labeled and pseudo-labeled",
    ),
    "without labels": (lambda s: {k: s[k] for k in s if k != "pseudo_labels"}, "no pseudo_labels"),
    "with a confidence that is no number": (
        lambda s: s | {"pseudo_weights": s["pseudo_weights"] * float("nan")},
        "NaN",
    ),
    "with an unlabeled image called labeled": (
        lambda s: with_entry("labeled_indexes", 0, 51)(  # the last twelve have no label
            {k: s[k] for k in s if k != "meta"} | drop_image(s, 51)
        ),
        "no label in this data set",
    ),
}


def drop_image(state: dict, index: int) -> dict:
    """The pseudo-label arrays without one image."""
    keep = state["pseudo_indexes"] != index
    arrays = ("pseudo_indexes", "pseudo_labels", "pseudo_probs", "pseudo_weights")
    unlabeled = state["unlabeled_indexes"]
    return {key: state[key][keep] for key in arrays} | {
        "unlabeled_indexes": unlabeled[unlabeled != index]
    }


@pytest.mark.parametrize("fault", PSEUDO)
def test_a_pseudo_label_file_is_refused(refused, world, tmp_path, fault):
    mutate, words = PSEUDO[fault]
    file = tmp_path / "bad.pth.tar"
    checkpoint.save(mutate(checkpoint.load_dict(world / "pseudo.pth.tar")), file)
    message = refused(finetuning, "--pseudo-file", file)
    assert words in message
    assert str(file) in message


def test_num_labeled_is_compared_with_the_pseudo_file(refused, world):
    file = world / "pseudo.pth.tar"
    message = refused(finetuning, "--pseudo-file", file, "--num-labeled", 12)
    assert "made with 8 labeled images, but --num-labeled asks for 12" in message
    assert str(file) in message


def test_a_pseudo_file_that_is_another_kind_of_file_is_refused(refused, world):
    message = refused(finetuning, "--pseudo-file", world / "metric.pth.tar")
    assert "has no pseudo_indexes" in message


@pytest.mark.parametrize("script", [pretraining, finetuning], ids=["pretrain", "finetune"])
@pytest.mark.parametrize(
    "damage", ["empty", "cut", "text", "folder", "tensor", "number", "nothing in it"]
)
def test_a_damaged_checkpoint_is_refused(refused, world, tmp_path, script, damage):
    file = tmp_path / "bad.pth.tar"
    whole = (world / "metric.pth.tar").read_bytes()
    if damage == "folder":
        file.mkdir()
    elif damage in ("tensor", "number", "nothing in it"):
        torch.save({"tensor": torch.zeros(3), "number": 3, "nothing in it": {}}[damage], file)
    else:
        cut = {"empty": b"", "cut": whole[: len(whole) // 2], "text": b"no checkpoint"}
        file.write_bytes(cut[damage])
    assert str(file) in refused(script, "--resume", file)


@pytest.mark.parametrize("script", [pretraining, finetuning], ids=["pretrain", "finetune"])
def test_a_checkpoint_of_another_architecture_is_refused(refused, world, script):
    message = refused(script, "--resume", world / "metric.pth.tar", "--arch", "wrn-16-2")
    # phase 1 already refuses to continue a run with another option
    assert "wrn-16-2" in message or "does not fit this network" in message
    only = ("--test-only",) if script is pretraining else ("--eval",)
    message = refused(script, "--resume", world / "metric.pth.tar", "--arch", "resnet18", *only)
    assert str(world / "metric.pth.tar") in message


def test_a_partial_match_of_weights_is_no_match(refused, world, tmp_path):
    state = checkpoint.load_dict(world / "metric.pth.tar")
    for problem, changed in {
        "3 missing (block2.layer.0.conv1.weight, fc.weight, fc.bias)": {
            k: v for k, v in state["net"].items() if k != "block2.layer.0.conv1.weight"
        },
        "1 unexpected (block4.layer.0.conv1.weight)": state["net"]
        | {"block4.layer.0.conv1.weight": torch.zeros(1)},
        "1 mismatched (bn1.weight)": state["net"] | {"bn1.weight": torch.zeros(1)},
    }.items():
        file = tmp_path / "partial.pth.tar"
        checkpoint.save(state | {"net": changed}, file)
        assert problem in refused(finetuning, "--resume", file)


def test_a_metric_of_phase_1_is_no_classifier_to_evaluate(refused, world, tmp_path):
    message = refused(finetuning, "--eval", "--resume", world / "metric.pth.tar")
    assert "metric of phase 1" in message
    # with as many dimensions as classes the shapes would fit
    state = checkpoint.load_dict(world / "metric.pth.tar")
    head = {name: state["net"][name][:4] for name in ("fc.weight", "fc.bias")}
    checkpoint.save(state | {"net": state["net"] | head}, tmp_path / "four.pth.tar")
    message = refused(finetuning, "--eval", "--resume", tmp_path / "four.pth.tar")
    assert "metric of phase 1" in message


@pytest.mark.parametrize("key", ["optimizer", "epoch", "lemniscate", "criterion", "meta"])
def test_pretraining_continues_no_checkpoint_that_lacks_a_part(refused, world, tmp_path, key):
    state = checkpoint.load_dict(world / "metric.pth.tar")
    del state[key]
    checkpoint.save(state, tmp_path / "part.pth.tar")
    message = refused(pretraining, "--epochs", 2, "--resume", tmp_path / "part.pth.tar")
    assert f"part.pth.tar has no {key}" in message


@pytest.mark.parametrize("key", ["optimizer", "lemniscate", "criterion"])
def test_pretraining_continues_no_checkpoint_whose_parts_do_not_fit(refused, world, tmp_path, key):
    state = checkpoint.load_dict(world / "metric.pth.tar")
    file = tmp_path / "part.pth.tar"
    checkpoint.save(state | {key: {"memory": torch.zeros(3, 128)}}, file)
    message = refused(pretraining, "--epochs", 2, "--resume", file)
    assert f"{file} cannot be continued" in message


@pytest.fixture
def own_run(world, tmp_path) -> Path:
    """A finished run of phase 3."""
    words = ("--dataset", "folder", "--data-dir", world / "pictures", *TINY, "--max-iters", 1)
    files = ("--model-root", tmp_path / "own", "--log-root", tmp_path / "own")
    call(finetuning, *words, "--num-labeled", LABELS, *files)
    return tmp_path / "own" / "exp" / "ckpt.pth.tar"


@pytest.mark.parametrize("key", ["best_acc", "optimizer", "examples"])
def test_finetuning_continues_no_checkpoint_that_lacks_a_part(refused, own_run, key):
    state = checkpoint.load_dict(own_run)
    del state[key]
    checkpoint.save(state, own_run)
    assert f"has no {key}" in refused(finetuning, "--resume", own_run)


def test_finetuning_does_not_guess_which_run_a_checkpoint_is_of(refused, own_run):
    state = checkpoint.load_dict(own_run)
    del state["meta"]
    checkpoint.save(state, own_run)
    assert "does not say what run it is" in refused(finetuning, "--resume", own_run)


def test_another_option_makes_another_run_and_is_named(refused, world, own_run):
    message = refused(finetuning, "--resume", own_run, "--lr", 0.5, "--max-iters", 7)
    assert "--lr was 0.01, is 0.5" in message
    assert "--max-iters was 1, is 7" in message
    message = refused(pretraining, "--resume", world / "metric.pth.tar", "--nce-t", 0.2)
    assert "--nce-t was 0.1, is 0.2" in message


def test_other_pseudo_labels_make_another_run(refused, world, own_run):
    message = refused(finetuning, "--resume", own_run, "--pseudo-file", world / "pseudo.pth.tar")
    assert "other images or labels" in message


@pytest.mark.parametrize("script", [pretraining, finetuning], ids=["pretrain", "finetune"])
def test_another_data_set_makes_another_run(refused, world, own_run, tmp_path, script):
    other = make_folder(tmp_path / "other", unlabeled=16)
    own = own_run if script is finetuning else world / "metric.pth.tar"
    epochs = ("--epochs", 2) if script is pretraining else ()
    assert "data set are not the same" in refused(script, "--resume", own, *epochs, data=other)


@pytest.mark.parametrize("script", [pretraining, finetuning], ids=["pretrain", "finetune"])
class TestFolders:
    def test_a_missing_folder(self, refused, tmp_path, script):
        message = refused(script, data=tmp_path / "nowhere")
        assert str(tmp_path / "nowhere" / "train") in message

    def test_an_empty_class_folder(self, refused, tmp_path, script):
        data = make_folder(tmp_path / "data")
        (data / "train" / "yellow").mkdir()
        message = refused(script, data=data)
        assert str(data / "train" / "yellow") in message

    def test_a_training_folder_without_classes(self, refused, tmp_path, script):
        (tmp_path / "data" / "train").mkdir(parents=True)
        assert "no class folder" in refused(script, data=tmp_path / "data")

    def test_a_class_that_only_the_test_folder_has(self, refused, tmp_path, script):
        data = make_folder(tmp_path / "data")
        shutil.copytree(data / "test" / "red", data / "test" / "violet")
        assert "'violet'" in refused(script, data=data)

    def test_unreadable_images_are_all_named(self, refused, tmp_path, script):
        data = make_folder(tmp_path / "data")
        bad = [data / "train" / "blue" / "3.png", data / "unlabeled" / "red" / "0.png"]
        bad[0].write_bytes(b"no picture")
        bad[1].write_bytes(bad[1].read_bytes()[:100])
        message = refused(script, data=data)
        assert all(str(path) in message for path in bad)
        assert "2 of 52 images" in message


def test_an_unreadable_test_image_is_named(refused, tmp_path):
    data = make_folder(tmp_path / "data")
    (data / "test" / "gray" / "4.png").write_bytes(b"")
    assert str(data / "test" / "gray" / "4.png") in refused(pretraining, data=data)


# Root writes to read-only folders too: a file in the folder's place refuses everyone.
@pytest.mark.parametrize(
    ("script", "option"),
    [
        (pretraining, "--model-dir"),
        (pretraining, "--log-dir"),
        (finetuning, "--model-root"),
        (finetuning, "--log-root"),
    ],
)
def test_a_file_in_the_place_of_an_output_folder_is_found_before_training(
    refused, tmp_path, script, option
):
    (tmp_path / "file").write_text("keep")
    message = refused(script, option, tmp_path / "file")
    assert str(tmp_path / "file") in message


def test_a_mistake_in_a_real_process_ends_with_code_2_and_one_message(tmp_path, world):
    files = ("--model-dir", tmp_path / "m", "--log-dir", tmp_path / "l")
    data = ("--dataset", "folder", "--data-dir", world / "nowhere")
    assert_refused(run_script("unsupervised/cifar.py", *data, *files, cwd=tmp_path), "nowhere")
    files = ("--model-root", tmp_path / "m", "--log-root", tmp_path / "l")
    words = ("--dataset", "patches", "--pseudo-file", world / "pseudo.pth.tar", *files)
    result = run_script("cifar-semi.py", *words, "--num-labeled", 50, cwd=tmp_path)
    assert_refused(result, "pseudo.pth.tar", "another data set", "--num-labeled asks for 50")
    assert list(tmp_path.iterdir()) == []
