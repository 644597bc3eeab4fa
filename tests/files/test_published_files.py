"""Files of the formats of 2019: read bit for bit, used by the scripts, and given back."""

import importlib.util
import math
import sys
from collections.abc import Mapping

import published
import pytest
import torch
from conftest import assert_ok, assert_refused, run_script
from runs import load_embedding, make_folder

from datasets import build_datasets
from lib.cli import convert, declared
from lib.cli.start import load_script
from lib.features import extraction
from lib.files import checkpoint
from lib.files.published import (
    CIFAR_METRIC,
    CLASSIFIERS,
    IMAGENET_METRIC,
    accuracies,
    bank_rows,
)
from lib.files.weights import load_weights, model_weights
from lib.labels import pseudo_files, pseudo_labels
from lib.runtime import devices
from lib.training import pretraining
from lib.training.optimizer import sgd
from lib.training.state import TrainState
from models import build_model

CPU = devices.Device(torch.device("cpu"), bf16=False)
TINY = ("--dataset", "folder", "--image-size", 16, "--arch", "wrn-10-1", "--precision", "fp32")


def assert_equal(got, wanted, where="file"):
    """Tensors equal to the last bit, and the same keys and plain values around them."""
    if isinstance(wanted, torch.Tensor):
        assert got.dtype == wanted.dtype, where
        assert torch.equal(got, wanted), where
    elif isinstance(wanted, Mapping):
        assert list(got) == list(wanted), where
        for key in wanted:
            assert_equal(got[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list | tuple):
        assert len(got) == len(wanted), where
        for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
            assert_equal(a, b, f"{where}[{i}]")
    else:
        assert got == wanted, where


def without_bank(state):
    return {key: value for key, value in state.items() if key != "lemniscate"}


@pytest.fixture(scope="module")
def wrn(tmp_path_factory):
    """A WRN-28-2 with used BatchNorm statistics, and a bank of 60 rows."""
    torch.manual_seed(1)
    model = build_model("wrn-28-2", 128, normalize=True)
    model(torch.randn(8, 3, 32, 32))
    return model.eval(), torch.randn(60, 128)


@pytest.mark.parametrize("kind", ["legacy", "python2"])
@pytest.mark.parametrize("nce", [False, True])
def test_a_cifar_checkpoint_with_a_pickled_bank_is_read_to_the_last_bit(tmp_path, wrn, kind, nce):
    model, memory = wrn
    file = tmp_path / "ckpt.pth.tar"
    wanted = published.cifar_checkpoint(file, model, memory, nce=nce, kind=kind)
    for name in published.SOURCES:  # nothing of the original can be found
        assert name not in sys.modules
        assert name.startswith("torch") or importlib.util.find_spec(name) is None
    with pytest.raises(Exception, match=r"(?i)weights"):
        torch.load(file, map_location="cpu", weights_only=True)
    got = checkpoint.load(file)
    assert_equal(without_bank(got), without_bank(wanted))
    bank = wanted["lemniscate"]
    assert torch.equal(bank_rows(got, file), memory)
    assert torch.equal(got["lemniscate"]["params"], bank.params)
    assert got["lemniscate"]["nLem"] == 60
    if nce:
        sampler = {"prob": bank.multinomial.prob, "alias": bank.multinomial.alias}
        assert_equal(got["lemniscate"]["multinomial"], sampler)
    assert {type(value) for value in got["lemniscate"].values()} <= {torch.Tensor, int, dict}


def test_loading_a_published_checkpoint_gives_its_features_to_the_last_bit(tmp_path, wrn):
    model, memory = wrn
    published.cifar_checkpoint(file := tmp_path / "82.12.pth.tar", model, memory)
    loaded = load_embedding(file, "wrn-28-2").eval()
    images = torch.randn(3, 3, 32, 32)
    assert torch.equal(loaded(images), model(images))


def test_an_imagenet_checkpoint_is_read_to_the_last_bit(tmp_path):
    model, memory = build_model("resnet18", 128, imagenet=True, normalize=True), torch.randn(9, 128)
    file = tmp_path / "lemniscate_resnet18.pth.tar"
    wanted = published.imagenet_checkpoint(file, model, "resnet18", memory)
    got = checkpoint.load_dict(file, "state_dict", "arch")
    assert_equal(without_bank(got), without_bank(wanted))
    assert torch.equal(bank_rows(got, file), memory)
    again, classifier = (build_model("resnet18", n, imagenet=True) for n in (128, 7))
    weights = model_weights(got, file)
    assert not load_weights(again, weights, source=file).missing
    assert_equal(again.state_dict(), model.state_dict())
    report = load_weights(classifier, weights, source=file, keep_head=False)
    assert report.missing == ("fc.weight", "fc.bias")


def test_a_bank_is_found_in_our_checkpoints_too_and_missed_where_there_is_none(tmp_path):
    state = {"lemniscate": {"memory": torch.ones(3, 4, dtype=torch.float64)}}
    checkpoint.save(state, tmp_path / "ours")
    rows = bank_rows(checkpoint.load(tmp_path / "ours"), "ours")
    assert torch.equal(rows, torch.ones(3, 4))
    for wrong in ({}, {"lemniscate": 3}, {"lemniscate": {}}, {"lemniscate": {"memory": rows[0]}}):
        with pytest.raises(ValueError, match="some_file holds no memory bank"):
            bank_rows(wrong, "some_file")


@pytest.mark.parametrize("prefix", ["train_", "", "val_"])
def test_published_feature_caches_are_read(tmp_path, prefix):
    rows = torch.nn.functional.normalize(torch.randn(30, 16))
    state = {f"{prefix}features": rows, f"{prefix}labels": torch.arange(30) % 3}
    got, labels, _ = extraction.read(published.write(state, tmp_path / "f.pth.tar"))
    torch.testing.assert_close(got, rows)
    assert torch.equal(labels, torch.arange(30) % 3)
    assert_equal(checkpoint.load(tmp_path / "f.pth.tar"), state)


def test_the_bare_tensor_of_colorization_is_read_to_the_last_bit(tmp_path):
    rows = torch.randn(50, 128)
    file = published.write(rows, tmp_path / "colorization_embedding_128.t7")
    assert torch.equal(checkpoint.load(file), rows)
    assert len(extraction.read(file)[0]) == 50


def test_a_colorization_backbone_leaves_out_exactly_the_head_and_the_norm_before_it(tmp_path):
    torch.manual_seed(2)
    gray, model = (build_model("wrn-10-2", 10, in_channels=1) for _ in range(2))
    gray(torch.randn(4, 1, 32, 32))
    published.colorization_backbone(file := tmp_path / "ckpt_colorization.pth.tar", gray)
    weights = model_weights(checkpoint.load_dict(file), file)
    kept = {k: v.clone() for k, v in model.state_dict().items() if k.startswith(("bn1.", "fc."))}
    report = load_weights(model, weights, source=file, keep_head=False)
    assert set(report.missing) == set(kept) - {"bn1.num_batches_tracked"}
    wanted = {name: value for name, value in gray.state_dict().items() if name not in kept}
    assert_equal(model.state_dict(), wanted | kept)


@pytest.mark.parametrize("keep_head", [True, False])
def test_a_colorization_backbone_is_refused_where_it_does_not_fit(tmp_path, keep_head):
    gray = build_model("wrn-10-1", 10, in_channels=1)
    published.colorization_backbone(file := tmp_path / "ckpt.pth.tar", gray)
    weights = model_weights(checkpoint.load_dict(file), file)
    color = build_model("wrn-10-1", 10)
    with pytest.raises(ValueError, match=r"1 mismatched \(conv1.weight\).*--input-gray"):
        load_weights(color, weights, source=file, keep_head=keep_head)
    with pytest.raises(ValueError, match=r"missing \(bn1"):
        load_weights(gray, weights, source=file)  # a whole classifier is wanted
    del weights["2.layer.0.bn1.weight"]
    with pytest.raises(ValueError, match=r"missing .*block2.layer.0.bn1.weight"):
        load_weights(gray, weights, source=file, keep_head=False)


@pytest.mark.parametrize("nc", [True, False])
def test_published_pseudo_labels_are_read(tmp_path, nc):
    labeled, unlabeled = torch.arange(8), torch.arange(8, 40)
    wanted = published.pseudo_labels(tmp_path / "8.pth.tar", labeled, unlabeled, 4, nc=nc)
    got = pseudo_files.load(tmp_path / "8.pth.tar")
    for key in ("pseudo_indexes", "pseudo_labels", "pseudo_probs", "labeled_indexes"):
        assert torch.equal(got.state()[key], wanted[key]), key
    assert torch.equal(got.confidence, wanted["pseudo_probs"].amax(dim=1))


def test_published_chunks_of_pseudo_labels_are_read_as_one_ranking(tmp_path):
    labeled, parts = torch.arange(6), torch.arange(6, 46).split(20)
    for i, part in enumerate(parts):
        path = tmp_path / f"2_{i}.pth.tar"
        published.pseudo_labels(path, labeled, part, 3, nc=True, chunk=True)
    whole = pseudo_labels.merged([pseudo_files.load(tmp_path / f"2_{i}.pth.tar") for i in (0, 1)])
    assert torch.equal(whole.unlabeled, torch.arange(6, 46))
    assert bool((whole.confidence.diff() <= 0).all())


def convert_words(command, *words):
    return run_script("-m", "lib.cli.convert", command, *words)


def test_published_to_ours_and_back_gives_equal_tensors(tmp_path, wrn):
    first, ours, back = (tmp_path / name for name in ("first.pth.tar", "ours", "back.pth.tar"))
    wanted = published.cifar_checkpoint(first, *wrn)
    convert.convert(first, ours)
    convert.convert(ours, back, published=True)
    assert ours.read_bytes()[:2] == b"PK"
    assert back.read_bytes()[:2] == b"\x80\x02"  # torch before 1.6 knows no other format
    plain = torch.load(ours, weights_only=True)  # no help needed any more
    assert_equal(plain["net"], wrn[0].state_dict())
    got = torch.load(back, weights_only=True)
    assert_equal(without_bank(got), without_bank(wanted))
    assert torch.equal(got["lemniscate"]["memory"], wrn[1])
    convert.convert(back, first)
    assert_equal(checkpoint.load(first), plain)


def test_imagenet_keys_and_bare_tensors_go_both_ways_too(tmp_path):
    weights = {"module.fc.weight": torch.randn(2, 3)}
    for state in ({"state_dict": weights, "arch": "resnet18", "epoch": 3}, torch.randn(4, 5)):
        file = published.write(state, tmp_path / "in")
        convert.convert(file, tmp_path / "ours")
        convert.convert(tmp_path / "ours", tmp_path / "out", published=True)
        assert_equal(torch.load(tmp_path / "out", weights_only=True), state)


def test_what_we_write_in_the_published_format_has_published_keys(tmp_path):
    model = build_model("wrn-10-1", 4)
    state = {"net": model.state_dict(), "step": 3, "best_acc": 1.5, "optimizer": {}}
    checkpoint.save(state, tmp_path / "ours")
    convert.convert(tmp_path / "ours", tmp_path / "theirs", published=True)
    got = torch.load(tmp_path / "theirs", weights_only=True)
    assert list(got) == ["net", "step", "best_acc", "optimizer"]
    assert_equal(got["net"], published.wrapped(model))


@pytest.mark.parametrize(
    ("names", "published_key", "of_100_percent", "which"),
    [
        (CIFAR_METRIC, "acc", 1.0, "last"),
        (IMAGENET_METRIC, "best_prec1", 1.0, "best"),
        (CLASSIFIERS, "best_acc", 100.0, "best"),
    ],
)
def test_accuracies_have_the_published_unit_under_the_published_key(
    names, published_key, of_100_percent, which
):
    written = names.accuracies(25.0, 40.0)
    value = {"last": 25.0, "best": 40.0}[which] * of_100_percent / 100
    assert written == {"accuracies": {"last": 25.0, "best": 40.0}, published_key: value}
    assert accuracies(written, names) == (25.0, 40.0)
    of_2019 = {published_key: value}
    assert accuracies(of_2019, names) == (value * 100 / of_100_percent,) * 2
    earlier = {"meta": {}, "acc": 25.0, "best_acc": 40.0, "best_prec1": 40.0}  # before `accuracies`
    assert accuracies(earlier, names) == (25.0, 40.0)
    never_measured = names.accuracies(math.nan, 0.0)["accuracies"]
    assert never_measured == {"last": None, "best": 0.0}


def test_an_earlier_file_of_ours_goes_to_the_scripts_of_2019_in_their_units(tmp_path, capsys):
    bank = {"lemniscate": {"memory": torch.randn(3, 2)}, "net": {"conv1.weight": torch.ones(2)}}
    earlier = bank | {"meta": {}, "acc": 25.0, "best_acc": 40.0}
    checkpoint.save(earlier, tmp_path / "in")
    call(convert, "convert", tmp_path / "in", tmp_path / "out", "--published-format")
    assert torch.load(tmp_path / "out", weights_only=True)["acc"] == 0.25
    said = capsys.readouterr().out
    assert "cannot continue its training" in said
    assert "notebooks take this one, which has no last layer" in said
    bank["net"] |= {"fc.weight": torch.ones(2, 2)}
    checkpoint.save(bank | CIFAR_METRIC.accuracies(25.0, 40.0) | {"meta": {}}, tmp_path / "in")
    call(convert, "convert", tmp_path / "in", tmp_path / "out", "--published-format")
    assert torch.load(tmp_path / "out", weights_only=True)["acc"] == 0.25
    said = capsys.readouterr().out
    assert "cannot continue its training" in said
    assert "no last layer" not in said


def test_show_prints_the_tree_of_a_published_file(tmp_path, wrn):
    published.cifar_checkpoint(file := tmp_path / "ckpt.pth.tar", *wrn, nce=True)
    printed = assert_ok(convert_words("show", file))
    for line in (
        f"{file}: legacy stream",
        f"net  dict of {len(wrn[0].state_dict())}",
        "  module.conv1.weight  float32 16 x 3 x 3 x 3",
        "  module.bn1.num_batches_tracked  int64 one number",
        "lemniscate  dict of",
        "  memory  float32 60 x 128",
        "    alias  int64 60",
        "acc  0.8212",
    ):
        assert line in printed, printed[:3000]


def test_show_prints_no_control_characters_of_a_file(tmp_path):
    torch.save({"\x1b[2J\n": "\x1b]0;", "long": "x" * 999}, file := tmp_path / "f")
    printed = convert.show(file)
    assert "\x1b" not in printed
    assert len(printed.splitlines()) == 3
    assert max(map(len, printed.splitlines()[1:])) < 120
    torch.save(torch.zeros(2, 3), file)
    assert "float32 2 x 3" in convert.show(file)


def test_a_hostile_file_ends_in_one_message_and_no_new_file(tmp_path):
    published.write({"net": torch.nn.Linear(1, 1)}, tmp_path / "m", "zip")
    refused = convert_words("convert", tmp_path / "m", tmp_path / "out")
    assert_refused(refused, "was refused", "torch.nn.modules.linear.Linear")
    assert not (tmp_path / "out").exists()


def test_safetensors_without_its_package_is_a_message(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    checkpoint.save({"net": {"w": torch.ones(2)}}, tmp_path / "in")
    for names in (("in", "out.safetensors"), ("out.safetensors", "in")):
        with pytest.raises(ValueError, match="pip install safetensors"):
            convert.convert(*(tmp_path / name for name in names))


def test_safetensors_files_hold_the_weights_by_plain_names(tmp_path, wrn):
    published.cifar_checkpoint(file := tmp_path / "ckpt.pth.tar", *wrn)
    left_out = convert.convert(file, out := tmp_path / "weights.safetensors")
    assert left_out == ["optimizer", "lemniscate"]
    weights = checkpoint.load(out)
    assert weights.keys() == wrn[0].state_dict().keys()
    assert "\nconv1.weight  float32 16 x 3 x 3 x 3\n" in convert.show(out)
    for name, value in wrn[0].state_dict().items():
        assert torch.equal(weights[name], value), name
    convert.convert(out, tmp_path / "again")
    assert checkpoint.load(tmp_path / "again").keys() == weights.keys()
    with pytest.raises(ValueError, match="of torch; name a file"):
        convert.convert(file, out, published=True)
    for nothing in ({"epoch": 3}, [torch.ones(2)]):
        torch.save(nothing, file)
        with pytest.raises(ValueError, match="no tensors"):
            convert.convert(file, out)
    out.write_bytes(b"\xff" * 50)
    with pytest.raises(ValueError, match=r"weights.safetensors cannot be read"):
        checkpoint.load(out)


# -------------------------------------------------------------------- in the scripts, on a small network


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pictures, a small network in published checkpoints, and the pictures' features by it."""
    folder = tmp_path_factory.mktemp("world")
    make_folder(folder / "pictures")
    torch.manual_seed(3)
    model = build_model("wrn-10-1", 128, normalize=True)
    train, test = build_datasets("folder", str(folder / "pictures"), image_size=16)
    published.cifar_checkpoint(folder / "metric.pth.tar", model, torch.randn(len(train), 128))
    gray = build_model("wrn-10-1", 128, in_channels=1)
    published.colorization_backbone(folder / "gray.pth.tar", gray)
    rows = extraction.extract(model, train, CPU)
    published.write(rows, folder / "bare.t7")
    return folder, model, train, test, rows


def call(script, *words):
    return script.main(script.build_parser().parse_args([str(w) for w in words]))


def test_the_knn_accuracy_of_a_published_checkpoint_is_measured(world):
    folder, model, train, test, rows = world
    script = load_script("unsupervised/cifar.py")
    words = (*TINY, "--data-dir", folder / "pictures", "--resume", folder / "metric.pth.tar")
    scores = call(script, *words, "--test-only")
    known = train.targets >= 0
    nearest = extraction.extract(model, test, CPU) @ rows[known].T
    votes = (nearest / 0.1).exp() @ torch.nn.functional.one_hot(train.targets[known]).float()
    wanted = (votes.argmax(dim=1) == test.targets).float().mean() * 100
    assert scores["top1"] == pytest.approx(float(wanted))


@pytest.mark.parametrize("file", ["metric.pth.tar", "gray.pth.tar"])
def test_finetuning_starts_from_published_backbones(world, file, tmp_path, capsys):
    folder = world[0]
    words = (*TINY, "--data-dir", folder / "pictures", "--num-labeled", 8, "--max-iters", 2)
    files = ("--model-root", tmp_path / "m", "--log-root", tmp_path / "l")
    gray = ("--input-gray",) if file == "gray.pth.tar" else ()
    finetuning = load_script("cifar-semi.py")
    call(finetuning, *words, *files, "-b", 4, "--resume", folder / file, *gray)
    printed = capsys.readouterr().out
    assert f"{file}: " in printed
    assert "fc.weight" in printed
    assert ("bn1.weight" in printed) == bool(gray)  # what the file does not have is said


def test_labels_are_propagated_through_a_published_bare_tensor(world, tmp_path):
    folder, _, train, _, rows = world
    propagation = load_script("scripts/propagate.py")
    words = ("--features", folder / "bare.t7", "--dataset", "folder", "--image-size", 16)
    words = (*words, "--data-dir", folder / "pictures", "--num-labeled", 8, "--method", "knn")
    call(propagation, *words, "--save-path", tmp_path)
    got = pseudo_files.load(tmp_path / "8.pth.tar")
    one_hot = torch.nn.functional.one_hot(train.targets[got.labeled]).float()
    votes = (rows[got.indexes] @ rows[got.labeled].T / 0.1).exp() @ one_hot
    assert torch.equal(got.labels, votes.argmax(dim=1))


def test_a_published_checkpoint_is_extracted_and_propagated(world, tmp_path):
    folder, _, _, _, rows = world
    found = extraction.load_or_extract(
        checkpoint_file=folder / "metric.pth.tar",
        architecture="wrn-10-1",
        dataset="folder",
        data_dir=str(folder / "pictures"),
        image_size=16,
        device=CPU,
    )
    torch.testing.assert_close(found.features, rows)


def assert_taken_over(script, words, file, model, memory, *, epochs, accuracy):
    """A run of `script` that has read a published file stands where that one ended."""
    args = script.build_parser().parse_args([str(w) for w in words])
    settings, imagenet = declared.values(args, pretraining.Settings), "imagenet" in script.__file__
    network = build_model(args.architecture, args.low_dim, imagenet=imagenet, normalize=True)
    network = CPU.prepare(network)  # weights in channels-last order, as in the scripts
    objective = pretraining.build_objective(settings, len(memory), CPU)
    optimizer = sgd(network.parameters(), args.lr, args.weight_decay, nesterov=not imagenet)
    names = IMAGENET_METRIC if imagenet else CIFAR_METRIC
    run = TrainState(network, objective, optimizer, None, names, {})
    pretraining.resume(run, str(file), args.epochs, 4)
    assert_equal(run.model.state_dict(), model.state_dict())
    assert torch.equal(run.objective.bank.memory, memory)
    momenta = published_momenta(checkpoint.load(file)["optimizer"])
    got = [run.optimizer.state[p]["momentum_buffer"] for p in run.model.parameters()]
    assert_equal(got, momenta)
    assert (run.epoch, run.step) == (epochs, 4 * epochs)
    assert run.accuracy == run.best == pytest.approx(accuracy)  # a percentage
    assert_step_of(run, momenta)
    return run


def assert_step_of(run, momenta):
    """The next step uses each momentum for its own weight, number by number."""
    (group,) = run.optimizer.param_groups
    expected = []
    for p, momentum in zip(run.model.parameters(), momenta, strict=True):
        p.grad = torch.randn_like(p)
        change = p.grad + group["weight_decay"] * p.detach()
        momentum = group["momentum"] * momentum + change
        if group["nesterov"]:
            momentum = change + group["momentum"] * momentum
        expected.append(p.detach() - group["lr"] * momentum)
    run.optimizer.step()
    torch.testing.assert_close(list(run.model.parameters()), expected, rtol=1e-4, atol=1e-5)


def published_momenta(state):
    return [state["state"][i]["momentum_buffer"] for i in state["param_groups"][0]["params"]]


@pytest.mark.parametrize("nce", [False, True])
def test_phase_1_goes_on_from_a_published_checkpoint(world, nce, tmp_path, capsys):
    folder, model, train, _, _ = world
    script, memory = load_script("unsupervised/cifar.py"), torch.randn(len(train), 128)
    published.cifar_checkpoint(file := tmp_path / "82.12.pth.tar", model, memory, nce=nce)
    words = (*TINY, "--data-dir", folder / "pictures", "-b", 16, "--wd", 0.01)
    words = (*words, "--epochs", 1271, *(("--nce-k", 8) if nce else ()))
    run = assert_taken_over(script, words, file, model, memory, epochs=1270, accuracy=82.12)
    group = run.optimizer.param_groups[0]
    assert (group["weight_decay"], group["nesterov"]) == (0.01, True)  # an option, not the file's
    files = ("--model-dir", tmp_path / "m", "--log-dir", tmp_path / "l")
    call(script, *words, *files, "--resume", file)
    assert f"{file} is a published file: it records no options" in capsys.readouterr().out
    ours = checkpoint.load_dict(tmp_path / "m" / "ckpt.cifar.pth.tar", "meta", "criterion")
    assert (ours["epoch"], ours["accuracies"]["best"]) == (1270, pytest.approx(82.12))
    assert not torch.equal(ours["net"]["conv1.weight"], model.conv1.weight)


def test_phase_1_on_imagenet_goes_on_from_a_published_checkpoint(tmp_path):
    model, memory = build_model("resnet18", 128, imagenet=True, normalize=True), torch.randn(9, 128)
    file = tmp_path / "lemniscate_resnet18.pth.tar"
    published.imagenet_checkpoint(file, model, "resnet18", memory)
    script = load_script("unsupervised/imagenet.py")
    words = ("--data-dir", "x", "--nce-k", 4, "--precision", "fp32")
    assert_taken_over(script, words, file, model, memory, epochs=200, accuracy=41.0)


def test_a_published_bank_of_other_images_is_not_continued(world, tmp_path):
    folder, model, *_ = world
    published.cifar_checkpoint(file := tmp_path / "f.pth.tar", model, torch.randn(50, 128))
    words = (*TINY, "--data-dir", folder / "pictures", "--model-dir", tmp_path / "m")
    with pytest.raises(ValueError, match="bank of 50 x 128 numbers, this run needs 52 x 128"):
        call(load_script("unsupervised/cifar.py"), *words, "--resume", file)
