"""Phase 2 from the shell: files, table, chunks, graph file, report."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_ok, assert_refused, blobs, run_script
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from runs import make_folder

from datasets import build_datasets
from lib.cli.start import load_script
from lib.features.extraction import FeatureSet
from lib.files import checkpoint
from lib.labels import pseudo_files, pseudo_labels
from lib.labels.gain import Gain
from lib.labels.split import Split, cut_into_chunks, labeled_split
from lib.propagation.chunks import save_part
from lib.propagation.gain import RATIOS
from lib.report import page
from lib.report.curves import accuracy_coverage
from models import build_model
from models.layers import l2_normalize

propagate = load_script("scripts/propagate.py")


def call(*words: object) -> dict[str, dict[str, float]]:
    return propagate.main(propagate.build_parser().parse_args([str(w) for w in words]))


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Path:
    """Features of the patches: a direction per class, and noise."""
    data, _ = build_datasets("patches", "")
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(10, 32, generator=generator)
    rows = l2_normalize(centers[data.targets] + 1.4 * torch.randn(3000, 32, generator=generator))
    path = tmp_path_factory.mktemp("features") / "features.pth.tar"
    checkpoint.save(FeatureSet(rows, data.targets, 10, data.digest).state(), path)
    return path


@pytest.mark.parametrize("method", ["knn", "nc", "poisson-prior"])
def test_one_file_per_number_of_labels_and_its_precision(features, tmp_path, capsys, method):
    options = ("--num-eigenvectors", 12) if method == "nc" else ()
    words = ("--features", features, "--method", method, *options, "--save-path", tmp_path)
    results = call(*words, "--num-labeled", 20, 50)
    printed = capsys.readouterr().out
    targets = build_datasets("patches", "")[0].targets
    for n in (20, 50):
        pseudo = pseudo_files.load(tmp_path / f"{n}.pth.tar")
        split = labeled_split(targets, n, 10, 0)
        assert torch.equal(pseudo.labeled, split.labeled)
        assert set(pseudo.indexes.tolist()) == set(split.unlabeled.tolist())
        correct = (pseudo.labels == targets[pseudo.indexes]).double().mean().item()
        assert results[str(n)]["precision"] == pytest.approx(100 * correct)
        assert f"{100 * correct:.2f}%" in printed
        assert correct > 0.5  # far from the 10% of a guess: the labels did spread
        assert pseudo.meta["propagation"]["method"] == method
    assert json.loads((tmp_path / "results.json").read_text())["results"] == results


@pytest.mark.parametrize("method", ["knn", "nc"])
def test_calibration_brings_probabilities_nearer_to_the_truth_and_changes_no_label(
    features, tmp_path, capsys, method
):
    options = ("--num-eigenvectors", 12) if method == "nc" else ()
    words = ("--features", features, "--method", method, *options, "--num-labeled", 10, 300)
    words = (*words, "--work-dir", tmp_path / "work")
    on, off = tmp_path / "on", tmp_path / "off"
    found = call(*words, "--save-path", on)
    lines = capsys.readouterr().out.splitlines()
    plain = call(*words, "--save-path", off, "--calibration", "off")
    assert "temperature" not in capsys.readouterr().out
    for n in ("10", "300"):
        one, other = (checkpoint.load(folder / f"{n}.pth.tar") for folder in (on, off))
        for key in ("pseudo_indexes", "pseudo_labels", "pseudo_weights"):
            assert torch.equal(one[key], other[key])
        published = other["pseudo_probs"]
        if method == "knn":
            assert torch.equal(published.amax(dim=1), other["pseudo_weights"])
        temperature = one["meta"].get("calibration")
        assert found[n]["calibration"] == temperature
        assert plain[n]["calibration"] is None
        (line,) = (line for line in lines if line.split()[:1] == [n])
        if n == "10":
            assert temperature is None
            assert line.endswith(propagate.NOT_CALIBRATED)
            assert torch.equal(one["pseudo_probs"], published)
            continue
        assert line.endswith(f"temperature {temperature:.2f}")
        expected = published.double() ** (1 / temperature)
        expected /= expected.sum(dim=1, keepdim=True)
        torch.testing.assert_close(one["pseudo_probs"].double(), expected, rtol=0, atol=1e-4)
        # a text column, a result and the truth say the same
        assert f"{found[n]['ece_published']:.2f}%  {found[n]['ece']:>5.2f}%" in line
        assert found[n]["ece_published"] == plain[n]["ece"] == plain[n]["ece_published"]
        assert found[n]["ece"] < 0.7 * plain[n]["ece"]


def test_the_gain_is_printed_kept_and_written_with_the_labels(features, tmp_path, capsys):
    words = ("--features", features, "--method", "knn", "--num-labeled", 10, 50, "--estimate-gain")
    found = call(*words, "--save-path", tmp_path)
    gain = Gain.read(pseudo_files.load(tmp_path / "50.pth.tar").meta)
    assert found["50"]["gain"] == gain.entry()
    assert gain.num_held_out == 50
    assert gain.accuracy.keys() == set(RATIOS)
    assert gain.accuracy[0.0] > 50  # far from the 10% of a guess
    printed = capsys.readouterr().out
    assert str(gain) in printed
    unknown = Gain.read(pseudo_files.load(tmp_path / "10.pth.tar").meta)
    assert unknown == Gain({}, 0)
    assert str(unknown) in printed


def test_chunks_have_the_temperature_of_the_first(features, tmp_path):
    words = ("--features", features, "--method", "knn", "--num-labeled", 100, "--chunks", 2)
    call(*words, "--save-path", tmp_path)
    one, other = pseudo_files.load_chunks(tmp_path / "num_labeled_100")
    assert one.meta["calibration"] == other.meta["calibration"] != 1


def test_auto_says_that_it_is_calibrated_anyway(features, tmp_path, capsys):
    words = ("--features", features, "--method", "auto", "--num-labeled", 20)
    call(*words, "--calibration", "off", "--save-path", tmp_path)
    said = capsys.readouterr()
    assert "--calibration has no effect with --method auto" in said.err
    assert "calibration" not in pseudo_files.load(tmp_path / "20.pth.tar").meta


def test_parameters_reach_the_method(features, tmp_path):
    words = ("--features", features, "--method", "knn", "--num-labeled", 50)
    few = call(*words, "--k", 1, "--save-path", tmp_path / "few")
    many = call(*words, "--k", 50, "--save-path", tmp_path / "many")
    assert few["50"]["precision"] != many["50"]["precision"]
    assert pseudo_files.load(tmp_path / "few" / "50.pth.tar").meta["propagation"]["k"] == 1


def test_chunks_are_shuffled_and_hold_every_image_once(features, tmp_path):
    words = ("--features", features, "--num-eigenvectors", 12, "--save-path", tmp_path)
    call(*words, "--num-labeled", 50, "--chunks", 3)
    parts = pseudo_files.load_chunks(tmp_path / "num_labeled_50")
    assert len(parts) == 3
    targets = build_datasets("patches", "")[0].targets
    split = labeled_split(targets, 50, 10, 0)
    unlabeled = torch.cat([part.unlabeled for part in parts])
    assert sorted(unlabeled.tolist()) == sorted(split.unlabeled.tolist())
    for part in parts:
        assert torch.equal(part.labeled, split.labeled)
        assert set(part.indexes.tolist()) == set(part.unlabeled.tolist())
        # cut in the order of the true classes, a chunk would hold four classes of ten
        assert len(targets[part.unlabeled].unique()) == 10
        assert (part.labels == targets[part.indexes]).double().mean() > 0.5


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 5))
def test_chunks_differ_in_size_by_one_at_most(count, chunks, seed):
    split = Split(torch.arange(2), torch.arange(2, 2 + count))
    if chunks > count:
        with pytest.raises(ValueError, match="chunks"):
            cut_into_chunks(split, chunks, seed)
        return
    parts = cut_into_chunks(split, chunks, seed)
    sizes = [len(part) for part in parts]
    assert len(parts) == chunks
    assert max(sizes) - min(sizes) <= 1
    assert sorted(torch.cat(parts).tolist()) == list(range(2, 2 + count))


def test_merged_chunks_are_one_ranking(features, tmp_path):
    call("--features", features, "--method", "knn", "--save-path", tmp_path, "--num-labeled", 20)
    whole = pseudo_files.load(tmp_path / "20.pth.tar")
    positions = torch.arange(len(whole.indexes))
    parts = []
    for remainder in range(2):
        chosen = positions[positions % 2 == remainder]
        parts.append(
            pseudo_labels.PseudoLabels(
                whole.indexes[chosen],
                whole.labels[chosen],
                whole.confidence[chosen],
                whole.labeled,
                whole.indexes[chosen],
                whole.probabilities[chosen],
            )
        )
    merged = pseudo_labels.merged(parts)
    assert torch.equal(merged.confidence, whole.confidence)
    assert sorted(zip(merged.indexes.tolist(), merged.labels.tolist(), strict=True)) == sorted(
        zip(whole.indexes.tolist(), whole.labels.tolist(), strict=True)
    )
    other = pseudo_labels.PseudoLabels(
        *(parts[1].indexes, parts[1].labels, parts[1].confidence, whole.labeled[:-1]),
        parts[1].unlabeled,
        parts[1].probabilities,
    )
    with pytest.raises(ValueError, match="different sets of labeled images"):
        pseudo_labels.merged([parts[0], other])


def test_the_number_of_workers_reaches_the_reader_of_images(features, tmp_path, monkeypatch):
    asked = []

    def recorded(*words, **keywords):
        asked.append(keywords.get("num_workers"))
        return build_datasets(*words, **keywords)

    bare = tmp_path / "bare.t7"
    torch.save(checkpoint.load(features)["train_features"], bare)
    monkeypatch.setattr("lib.features.extraction.build_datasets", recorded)
    monkeypatch.setattr("lib.cli.embedding.build_datasets", recorded)
    words = ("--features", bare, "--dataset", "patches", "--method", "knn", "-j", 5, "--report")
    call(*words, "--num-labeled", 20, "--save-path", tmp_path)
    assert asked == [5, 5]


def test_the_graph_file_is_used_again_and_gives_the_same_labels(features, tmp_path):
    words = ("--features", features, "--num-eigenvectors", 12, "--num-labeled", 20)
    words = (*words, "--graph-file", tmp_path / "graph.pth.tar")
    call(*words, "--save-path", tmp_path / "first")
    written = (tmp_path / "graph.pth.tar").stat().st_mtime_ns
    call(*words, "--save-path", tmp_path / "second")
    assert (tmp_path / "graph.pth.tar").stat().st_mtime_ns == written
    first, second = (
        pseudo_files.load(tmp_path / run / "20.pth.tar") for run in ("first", "second")
    )
    assert torch.equal(first.labels, second.labels)
    call(*words, "--num-neighbors", 5, "--save-path", tmp_path / "third")
    assert (tmp_path / "graph.pth.tar").stat().st_mtime_ns != written


def files_of(folder: Path) -> dict[str, bytes]:
    """The pseudo-label files of a run, and what they hold."""
    return {path.name: path.read_bytes() for path in folder.glob("*.pth.tar")}


def test_graph_and_eigenvectors_are_kept_and_used_again_for_the_same_bytes(
    features, tmp_path, capsys
):
    words = ("--features", features, "--save-path", tmp_path, "--num-labeled", 20)
    nc = (*words, "--num-eigenvectors", 12)
    call(*nc)
    first, said = files_of(tmp_path), capsys.readouterr().out
    assert "built in" in said
    assert "computed in" in said
    call(*nc)
    said = capsys.readouterr().out
    assert "graph of 3000 images: read from" in said
    assert "11 eigenvectors: read from" in said
    assert files_of(tmp_path) == first
    # the first of more eigenvectors are not these: each number is computed for itself
    call(*words, "--num-eigenvectors", 14)
    assert "13 eigenvectors: computed" in capsys.readouterr().out
    call(*nc)
    said = capsys.readouterr().out
    assert "graph of 3000 images: read" in said
    assert "11 eigenvectors: computed" in said
    assert files_of(tmp_path) == first
    call(*nc, "--fresh")
    assert "read from" not in capsys.readouterr().out
    for change in (("--self-loops", "keep"), ("--solver", "block"), ("--graph", "local-scale")):
        call(*nc, *change)
        assert "11 eigenvectors: computed" in capsys.readouterr().out, change


def test_features_off_the_unit_sphere_are_as_published_and_mix_with_no_others(tmp_path, capsys):
    rows, targets = blobs(5, 60)
    rows *= 0.9 + 0.2 * torch.rand(300, 1, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "features.pth.tar"
    checkpoint.save({"train_features": rows, "train_labels": targets}, path)
    words = ("--features", path, "--num-labeled", 50, "--work-dir", tmp_path / "work")

    def run(method: str, normalize: str) -> pseudo_labels.PseudoLabels:
        more = ("--num-eigenvectors", 30) if method == "nc" else ()
        folder = tmp_path / f"{method}-{normalize}"
        more += ("--normalize", normalize, "--calibration", "off")  # all as published
        call(*words, "--method", method, *more, "--save-path", folder)
        return pseudo_files.load(folder / "50.pth.tar")

    for normalize in ("on", "off", "on", "off"):
        run("nc", normalize)
    said = capsys.readouterr().out
    # each kind has files of its own, which the second run of the kind reads
    assert said.count("graph of 300 images: built") == said.count("images: read from") == 2
    assert said.count("29 eigenvectors: computed") == said.count("eigenvectors: read from") == 2
    pseudo = run("knn", "off")
    products = rows[pseudo.indexes].double() @ rows[pseudo.labeled].double().T
    near, places = products.topk(50)
    votes = torch.zeros(250, 5, dtype=torch.float64)
    votes.scatter_add_(1, targets[pseudo.labeled][places], (near / 0.1).exp())
    expected = votes / votes.sum(dim=1, keepdim=True)
    torch.testing.assert_close(pseudo.probabilities.double(), expected, rtol=0, atol=1e-5)
    assert not torch.equal(pseudo.indexes, run("knn", "on").indexes)


def test_normalize_is_of_no_use_without_a_feature_file(capsys, tmp_path):
    with pytest.raises(ValueError, match="missing"):
        call("--checkpoint", tmp_path / "missing", "--normalize", "off", "--save-path", tmp_path)
    assert "--normalize has no effect without --features" in capsys.readouterr().err


def test_a_damaged_file_in_the_work_folder_is_named(features, tmp_path):
    words = ("--features", features, "--save-path", tmp_path, "--num-labeled", 20)
    words = (*words, "--num-eigenvectors", 12)
    call(*words)
    for kind, key in (("spectrum", "vectors"), ("graph", "values")):
        file = next((tmp_path / "work").glob(f"{kind}-*.pth.tar"))
        state = checkpoint.load(file)
        state[key][-1] = float("nan")
        checkpoint.save(state, file)
        with pytest.raises(ValueError, match=rf"{file.name} holds no {kind}: .*; delete it"):
            call(*words)


STAGES = """
import sys, time
sys.path.insert(0, {root!r})
from lib.cli import start
import lib.propagation.embedding_graph as embedding_graph
def endless(*_, **__):
    print("eigenvectors begin", flush=True)
    time.sleep(120)
embedding_graph.laplacian_spectrum = endless
script = start.load_script("scripts/propagate.py")
start.run(script.main, script.build_parser())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_run_that_was_killed_after_the_graph_continues_with_it(
    features, tmp_path, capsys, number
):
    words = ("--features", features, "--save-path", tmp_path, "--num-labeled", 20)
    words = [str(w) for w in (*words, "--num-eigenvectors", 12)]
    command = [sys.executable, "-c", STAGES.format(root=str(ROOT)), *words]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        for line in process.stdout:
            if "eigenvectors begin" in line:
                break
        process.send_signal(number)
        _, complaints = process.communicate(timeout=30)
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert f"stopped by {number.name}; the same command continues" in complaints
        assert "Traceback" not in complaints
    assert [path.name.split("-")[0] for path in (tmp_path / "work").iterdir()] == ["graph"]
    assert files_of(tmp_path) == {}
    capsys.readouterr()
    call(*words)
    assert "graph of 3000 images: read from" in capsys.readouterr().out
    continued = files_of(tmp_path)
    shutil.rmtree(tmp_path / "work")
    call(*words)
    assert files_of(tmp_path) == continued


def test_chunks_that_are_done_leave_nothing_in_the_work_folder(features, tmp_path, capsys):
    words = ("--features", features, "--save-path", tmp_path, "--num-labeled", 20)
    call(*words, "--num-eigenvectors", 12, "--chunks", 2)
    assert capsys.readouterr().out.count("built in") == 2
    assert list((tmp_path / "work").iterdir()) == []
    assert len(list((tmp_path / "num_labeled_20").iterdir())) == 2


def test_a_file_of_the_users_in_the_work_folder_stays(features, tmp_path):
    mine = tmp_path / "scratch" / "20" / "notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    words = ("--features", features, "--save-path", tmp_path, "--num-labeled", 20, "--chunks", 2)
    call(*words, "--num-eigenvectors", 12, "--work-dir", tmp_path / "scratch")
    assert list(mine.parent.iterdir()) == [mine]


def test_chunks_that_were_interrupted_continue_with_their_graphs(
    features, tmp_path, capsys, monkeypatch
):
    words = ("--features", features, "--save-path", tmp_path, "--num-labeled", 20)
    words = (*words, "--num-eigenvectors", 12, "--chunks", 3)

    def killed(part, folder, n, place, *rest, **more):
        if place == 1:
            raise KeyboardInterrupt
        return save_part(part, folder, n, place, *rest, **more)

    monkeypatch.setattr(propagate, "save_part", killed)
    with pytest.raises(KeyboardInterrupt):
        call(*words)
    monkeypatch.undo()
    capsys.readouterr()
    call(*words)
    said = capsys.readouterr().out
    assert said.count("images: read from") == said.count("eigenvectors: read from") == 2
    assert said.count("built in") == said.count("computed in") == 1


def test_probabilities_can_be_left_out(features, tmp_path):
    words = ("--features", features, "--method", "knn", "--save-path", tmp_path)
    whole = call(*words, "--num-labeled", 20)
    with_them = pseudo_files.load(tmp_path / "20.pth.tar")
    without = call(*words, "--num-labeled", 20, "--no-probabilities")
    pseudo = pseudo_files.load(tmp_path / "20.pth.tar")
    assert "pseudo_probs" not in checkpoint.load(tmp_path / "20.pth.tar")
    assert torch.equal(pseudo.labels, with_them.labels)
    assert without["20"]["precision"] == whole["20"]["precision"]


def test_choices_of_search_and_solver_reach_the_graph(features, tmp_path, monkeypatch):
    asked = {}

    def found(*_, **choices):
        asked.update(choices)
        raise ValueError("enough")

    monkeypatch.setattr("lib.propagation.embedding_graph.nearest_neighbors", found)
    words = ("--features", features, "--save-path", tmp_path, "--num-labeled", 20)
    with pytest.raises(ValueError, match="enough"):
        call(*words, "--search", "ivf", "--search-precision", "bf16", "--block-mib", 7)
    assert (asked["method"], asked["precision"], asked["block_bytes"]) == ("ivf", "bf16", 7 * 2**20)
    monkeypatch.undo()
    monkeypatch.setattr("lib.propagation.embedding_graph.laplacian_spectrum", found)
    with pytest.raises(ValueError, match="enough"):
        call(*words, "--solver", "block", "--basis-mib", 9)
    assert (asked["solver"], asked["basis_bytes"]) == ("block", 9 * 2**20)


@pytest.mark.parametrize(
    ("words", "parameters"),
    [
        (("--filter", "heat", "--time", 5), {"filter": "heat", "time": 5.0}),
        (("--cutoff", 0.4, "--degree", 30), {"cutoff": 0.4, "degree": 30}),
        (("--filter-by", "eigenvectors", "--num-eigenvectors", 9), {"filter_by": "eigenvectors"}),
    ],
)
def test_parameters_of_a_filter_reach_it(features, tmp_path, words, parameters):
    common = ("--features", features, "--method", "filter", "--num-labeled", 20)
    call(*common, *words, "--save-path", tmp_path)
    made = pseudo_files.load(tmp_path / "20.pth.tar")
    assert parameters.items() <= made.meta["propagation"].items()
    call(*common, "--save-path", tmp_path / "default")
    default = pseudo_files.load(tmp_path / "default" / "20.pth.tar")
    assert not torch.equal(made.confidence, default.confidence)


def test_the_report_shows_a_sheet_of_every_class(features, tmp_path, capsys):
    words = ("--features", features, "--dataset", "patches", "--method", "knn")
    call(*words, "--num-labeled", 50, "--save-path", tmp_path, "--report")
    page = (tmp_path / "report.html").read_text()
    pseudo = pseudo_files.load(tmp_path / "50.pth.tar")
    for label in pseudo.labels.unique().tolist():
        file = f"sheets_50/class_{label:04d}.png"
        assert f'src="{file}"' in page
        assert len(np.unique(np.asarray(Image.open(tmp_path / file).convert("L")))) > 20
    assert (tmp_path / "curve.png").stat().st_size > 5000
    assert (tmp_path / "reliability.png").stat().st_size > 5000
    curve = accuracy_coverage(pseudo, build_datasets("patches", "")[0].targets)
    cells = "".join(f"<td>{error}</td>" for error in curve.errors())
    assert 'src="reliability.png"' in page
    assert cells in page
    assert str(tmp_path / "report.html") in capsys.readouterr().out


@pytest.mark.parametrize("other", ["images", "number"])
def test_images_that_the_features_are_not_of_are_not_shown(features, tmp_path, capsys, other):
    state = checkpoint.load_dict(features)
    rows, targets = state["train_features"], state["train_labels"]
    found = FeatureSet(rows, targets, 10, "0123456789abcdef")
    if other == "number":
        found = FeatureSet(rows[::2], targets[::2], 10)
    checkpoint.save(found.state(), tmp_path / "other.pth.tar")
    words = ("--features", tmp_path / "other.pth.tar", "--dataset", "patches", "--method", "knn")
    call(*words, "--num-labeled", 20, "--save-path", tmp_path, "--report")
    assert "no contact sheets: the features are not of this data set" in capsys.readouterr().err
    assert (tmp_path / "report.html").is_file()
    assert list(tmp_path.glob("sheets_*")) == []


def test_the_report_states_the_residual_of_the_eigenvectors(features, tmp_path, capsys):
    words = ("--features", features, "--method", "nc", "--num-labeled", 50, "--report")
    call(*words, "--save-path", tmp_path, "--dataset", "folder", "--data-dir", tmp_path / "nowhere")
    (residual,) = re.findall(r"eigenvectors: .*; residual (\S+)", capsys.readouterr().out)
    page = (tmp_path / "report.html").read_text()
    assert re.search(rf"largest residual of an eigenvector</td><td[^>]*>{residual}<", page)


def test_graph_options_are_said_to_be_useless_without_a_graph(features, tmp_path, capsys):
    words = ("--features", features, "--method", "knn", "--num-labeled", 20)
    call(*words, "--save-path", tmp_path, "--graph", "imagenet", "--solver", "block")
    said = capsys.readouterr().err
    assert "--graph has no effect with --method knn" in said
    assert "--solver has no effect" in said
    assert "--search " not in said


@pytest.mark.parametrize("option", ["--save-path", "--work-dir", "--graph-file"])
def test_a_folder_that_cannot_be_written_is_refused_before_features_are_made(tmp_path, option):
    (tmp_path / "file").touch()
    given = {"--save-path": tmp_path / "out", option: tmp_path / "file" / "below" / "x"}
    words = [word for pair in given.items() for word in pair]
    with pytest.raises(ValueError, match=f"{option}: cannot write"):
        call("--features", tmp_path / "not looked for.pth.tar", *words)


@pytest.mark.parametrize("words", [("knn", "--alpha", 0.5), ("filter", "--power", 2)])
def test_parameters_are_checked_before_features_are_made(tmp_path, words):
    with pytest.raises(ValueError, match="has no parameter"):
        call("--features", tmp_path / "none", "--save-path", tmp_path, "--method", *words)


def test_frames_of_a_sheet_tell_right_from_wrong(features, tmp_path):
    call("--features", features, "--method", "knn", "--save-path", tmp_path, "--num-labeled", 20)
    pseudo = pseudo_files.load(tmp_path / "20.pth.tar")
    data, _ = build_datasets("patches", "")
    members = pseudo.indexes[pseudo.labels == 3]
    sheet = page.contact_sheet(pseudo, data, 3, shown=1)
    expected = page.RIGHT if data.targets[members[0]] == 3 else page.WRONG
    assert sheet.getpixel((3, 3)) == expected
    assert page.contact_sheet(pseudo, data, 99) is None


def test_names_in_the_page_are_escaped(tmp_path):
    table = page.html_table(("<a>",), [("<script>",)])
    assert "<script>" not in table
    assert "&lt;script&gt;" in table


def test_the_script_runs_in_a_process_of_its_own_from_any_folder(features, tmp_path):
    words = ("--features", features, "--method", "knn", "--num-labeled", 20, "--save-path", "out")
    printed = assert_ok(run_script("scripts/propagate.py", *words, cwd=tmp_path))
    assert "precision" in printed
    assert (tmp_path / "out" / "20.pth.tar").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--checkpoint"),
        (("--features", "a", "--checkpoint", "b"), "one of them"),
        (("--features", "missing.pth.tar"), "does not exist"),
        (("--features", "F", "--method", "knn", "--alpha", "0.5"), "no parameter alpha"),
        (("--features", "F", "--method", "auto", "--alpha", "0.5"), "auto has no parameter alpha"),
        (("--features", "F", "--method", "filter", "--power", "2"), "has no parameter power"),
        (("--features", "F", "--chunks", "2", "--graph-file", "g"), "--graph-file"),
    ],
)
def test_bad_words_end_in_one_message(features, tmp_path, words, message):
    words = [str(features) if w == "F" else w for w in words]
    arguments = propagate.build_parser().parse_args([*words, "--save-path", str(tmp_path / "out")])
    with pytest.raises(ValueError, match=message):
        propagate.main(arguments)


def test_an_unknown_method_is_refused_with_the_list():
    assert_refused(run_script("scripts/propagate.py", "--method", "magic"), "magic", "poisson")


def test_class_names_go_into_the_files_and_images_are_read_at_the_size_of_training(
    tmp_path, monkeypatch
):
    make_folder(tmp_path / "pictures")
    network = build_model("wrn-10-1", 8, normalize=True)
    state = {"net": network.state_dict(), "architecture": "wrn-10-1"}
    state["meta"] = {"options": {"image_size": 24}}
    checkpoint.save(state, tmp_path / "metric.pth.tar")
    asked = []

    def recorded(*words, **keywords):
        asked.append(keywords["image_size"])
        return build_datasets(*words, **keywords)

    monkeypatch.setattr("lib.features.extraction.build_datasets", recorded)
    words = ("--checkpoint", tmp_path / "metric.pth.tar", "--dataset", "folder", "--method", "knn")
    words = (*words, "--data-dir", tmp_path / "pictures", "--num-labeled", 8, "--chunks", 2)
    call(*words, "--save-path", tmp_path)
    assert asked == [24]
    for part in pseudo_files.load_chunks(tmp_path / "num_labeled_8"):
        assert part.meta["classes"] == ["blue", "gray", "green", "red"]
