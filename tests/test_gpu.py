"""Every script on a GPU: what it computes there, resumed, repeated, captured and under NCCL."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_ok, run_script
from runs import assert_same, call, finetuning, last, make_folder, pretraining, without_meta

from lib.cli.start import load_script
from lib.files import checkpoint
from lib.labels import pseudo_files
from lib.training import cuda_graph

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
imagenet, imagenet_semi = map(load_script, ("unsupervised/imagenet.py", "imagenet-semi.py"))
propagate, predict = map(load_script, ("scripts/propagate.py", "scripts/predict.py"))
EPOCH = 24  # steps; the last one has 56 images
NETWORK = ("--dataset", "patches", "--image-size", 16, "--arch", "wrn-10-1", "-b", 128)
METRIC = (*NETWORK, "--epochs", 6, "--lr", 0.05, "--deterministic")
CLASSIFIER = (
    *NETWORK,
    "--num-labeled",
    50,
    "--max-iters",
    40,
    "--eval-freq",
    20,
    "--deterministic",
)


@pytest.fixture(autouse=True)
def _every_capture_succeeds(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("a step could not be captured")

    monkeypatch.setattr(cuda_graph, "print_main", refuse)


def metric(folder: Path, *words: object) -> dict[str, Any]:
    """The checkpoint of a run of phase 1 in `folder`."""
    call(pretraining, *METRIC, *words, "--model-dir", folder, "--log-dir", folder / "log")
    return without_meta(last(folder))


def classifier(folder: Path, *words: object) -> dict[str, Any]:
    """The checkpoint of a run of phase 3 in `folder`."""
    folders = ("--model-root", folder, "--log-root", folder / "log", "--exp-name", "e")
    call(finetuning, *CLASSIFIER, *folders, *words)
    return without_meta(checkpoint.load_dict(folder / "e" / "ckpt.pth.tar"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    metric(folder)
    classifier(folder, "--resume", folder / "ckpt.cifar.pth.tar")
    return folder


def test_the_three_phases_are_those_of_the_cpu(tmp_path):
    found = {}
    for gpus in ("0", "cpu"):
        folder, exact = tmp_path / gpus, ("--gpus", gpus, "--precision", "fp32")
        first = metric(folder, *exact, "--epochs", 2, "--stop-after", 6)
        source = folder / "ckpt.cifar.pth.tar"
        call(propagate, "--dataset", "patches", "--image-size", 16, *exact, "--num-labeled", 50,
             "--checkpoint", tmp_path / "0" / source.name, "--save-path", folder)  # fmt: skip
        labels = pseudo_files.load(folder / "50.pth.tar").labels
        second = classifier(folder, *exact, "--stop-after", 6)
        losses = [total / rows for total, rows in (first["sums"]["loss"], second["sums"]["loss"])]
        found[gpus] = torch.tensor(losses), torch.as_tensor(labels)
    torch.testing.assert_close(found["0"][0], found["cpu"][0], rtol=2e-2, atol=0)
    assert (found["0"][1] == found["cpu"][1]).double().mean() > 0.98


@pytest.mark.parametrize("stop", [2, EPOCH, 2 * EPOCH + 11])  # before the capture and after it
def test_a_run_that_is_stopped_and_resumed_ends_in_the_bits_of_a_whole_one(stop, trained, tmp_path):
    metric(tmp_path, "--stop-after", stop)
    assert_same(metric(tmp_path, "--resume", "auto"), without_meta(last(trained)))
    start = ("--pretrained", trained / "ckpt.cifar.pth.tar", "--resume", "auto")
    classifier(tmp_path, *start, "--stop-after", min(stop, 30))
    whole = without_meta(checkpoint.load_dict(trained / "e" / "ckpt.pth.tar"))
    assert_same(classifier(tmp_path, *start), whole)


def test_steps_of_a_graph_and_eager_ones_train_to_the_same_bits(trained, tmp_path):
    assert_same(metric(tmp_path, "--cuda-graph", "off"), without_meta(last(trained)))
    start = ("--resume", trained / "ckpt.cifar.pth.tar")
    whole = without_meta(checkpoint.load_dict(trained / "e" / "ckpt.pth.tar"))
    assert_same(classifier(tmp_path, *start, "--cuda-graph", "off"), whole)


def test_negatives_and_accumulated_batches_are_captured_too(tmp_path):
    words = ("--nce-k", 32, "--iter-size", 3, "--epochs", 3)
    eager = metric(tmp_path / "eager", *words, "--cuda-graph", "off")
    assert_same(metric(tmp_path / "graph", *words), eager)


def test_compiled_kernels_inside_a_graph_train_a_metric_alike(tmp_path):
    words = ("--precision", "fp32")
    losses = [
        total / rows
        for total, rows in (
            metric(tmp_path / name, *words, *more, "--stop-after", 4 * EPOCH + 12)["sums"]["loss"]
            for name, more in (("plain", ()), ("compiled", ("--compile",)))
        )
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_one_process_under_nccl_trains_to_the_same_bits(trained, tmp_path):
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 1)
    folders = ("--model-dir", tmp_path, "--log-dir", tmp_path / "log")
    assert_ok(run_script(*command, "unsupervised/cifar.py", *METRIC, *folders))
    assert_same(without_meta(last(tmp_path)), without_meta(last(trained)))


def test_the_other_scripts_run_from_end_to_end(tmp_path):
    data = ("--dataset", "folder", "--data-dir", make_folder(tmp_path / "pictures"), "-j", 2)
    network = (*data, "--image-size", 64, "--arch", "resnet18", "-b", 8)
    folders = ("--model-dir", tmp_path / "m", "--log-dir", tmp_path / "l")
    call(imagenet, *network, "--epochs", 1, "--nce-k", 16, "--cuda-graph", "on", *folders)
    start = ("--pretrained", tmp_path / "m" / "ckpt.pth.tar", "--num-labeled", 8)
    folders = ("--model-root", tmp_path, "--log-root", tmp_path / "l", "--exp-name", "e")
    call(imagenet_semi, *network, *start, "--max-iters", 6, "--eval-freq", 6, *folders)
    given = ("--checkpoint", tmp_path / "e" / "ckpt.pth.tar", "-j", 2)
    images = ("--images", tmp_path / "pictures" / "test", "--output", tmp_path / "out.csv")
    call(predict, *given, *images, "--report")
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 21
