"""The benchmark scripts run through their command lines; what they print is compared, never the time."""

import json
import statistics
from dataclasses import replace

import pytest
import torch
from conftest import assert_ok, assert_refused, blobs, run_script
from PIL import Image
from runs import contents, log_lines, make_folder

from lib.cli.start import load_script
from lib.features.extraction import FeatureSet
from lib.files import checkpoint
from lib.objectives.memory_bank import build_loss


@pytest.mark.slow
def test_the_benchmark_of_propagation_compares_with_the_literal_steps(tmp_path):
    words = ("--images", 450, 900, "--classes", 3, "--num-labeled", 30, 90)
    output, picture = tmp_path / "numbers.json", tmp_path / "growth.png"
    words += ("--output", output, "--picture", picture)
    printed = assert_ok(run_script("scripts/benchmarks/propagation.py", *words))
    record = json.loads(output.read_text())
    variants = record["variants"]
    assert list(variants) == ["literal", "nc", "filter", "knn"]
    for n in ("30", "90"):
        literal, ours = (variants[name]["precision"][n] for name in ("literal", "nc"))
        assert abs(literal - ours) < 2  # of 810 images, at the published tolerance of 1e-2
        assert literal > 50
    assert variants["nc"]["agreement"]["90"] > 90
    assert set(record["growth"]) == set(variants)
    assert picture.stat().st_size > 10_000
    assert all(floor["floor_s"] > 0 for floor in record["floors"].values())
    assert "nc: " in printed
    assert "times as fast as literal" in printed
    assert printed.index("nc: ") < printed.index("filter: ")


def test_the_benchmark_of_choices_measures_each_of_them(tmp_path):
    benchmark = load_script("scripts/benchmarks/choosing.py")
    rows, targets = blobs(4, 40, spread=0.5)
    file, output = tmp_path / "rows.pth.tar", tmp_path / "numbers.json"
    checkpoint.save(FeatureSet(rows, targets, 4).state(), file)
    words = ["--features", str(file), "--num-labeled", "4", "8", "--seeds", "2"]
    found = benchmark.main(benchmark.build_parser().parse_args([*words, "--output", str(output)]))
    assert list(found) == list(benchmark.WAYS)
    assert json.loads(output.read_text())["ways"].keys() == found.keys()
    assert found["stratified"]["classes"] == {4: [4, 4], 8: [4, 4]}
    for way in found.values():
        assert all(len(way[name][8]) == 2 and min(way[name][8]) > 25 for name in ("nc", "knn"))


def test_features_without_labels_cannot_be_measured(tmp_path):
    result = run_script("scripts/benchmarks/propagation.py", "--features", tmp_path / "missing")
    assert_refused(result, "missing", "does not exist")


def test_the_benchmark_of_neighbors_probes_as_few_lists_as_give_the_recall(monkeypatch):
    benchmark = load_script("scripts/benchmarks/neighbors.py")
    exact = torch.linspace(0.9, 0.5, benchmark.K).repeat(10, 1)
    asked = []

    class Index:
        nlist, nprobe = 100, 0

        def search(self, sample, k):
            asked.append(self.nprobe)
            found = exact.clone()
            found[:, self.nprobe // 2 :] = 0  # another neighbor for every second list
            return found.numpy(), None

    assert benchmark.fewest_probes(Index(), torch.zeros(10, 2), exact, 9 / 19) == 20
    assert max(asked) <= 32
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install faiss-cpu"):
        benchmark.main(benchmark.build_parser().parse_args([]))


@pytest.mark.slow
def test_the_benchmark_of_training_compares_with_the_literal_step(tmp_path):
    output = tmp_path / "numbers.json"
    words = ("--arch", "wrn-10-1", "--tasks", "pretrain-cifar", "finetune-cifar", "-b", 8)
    words += ("--variants", "literal", "ours", "bare", "--rounds", 1, "--steps", 1)
    printed = assert_ok(run_script("scripts/benchmarks/training.py", *words, "--output", output))
    record = json.loads(output.read_text())
    assert record["matrix_rate"] > 0
    for name in ("pretrain-cifar", "finetune-cifar"):
        found = record["tasks"][name]
        assert {len(found["images_per_s"][v]) for v in ("literal", "ours", "bare")} == {1}
        assert printed.count(f"| {name} |") == 3
        for variant, speeds in found["images_per_s"].items():
            rate = statistics.median(speeds) * found["flops_per_image"] / record["matrix_rate"]
            assert found["mfu"][variant] == pytest.approx(rate)
            assert found["peak_mib"][variant]["resident"] > 100


@pytest.mark.slow
def test_the_large_networks_are_measured_on_pictures_read_from_files(tmp_path):
    output = tmp_path / "numbers.json"
    words = ("--tasks", "pretrain-imagenet", "finetune-imagenet", "--arch", "resnet18", "-b", 2)
    words += ("--variants", "literal", "ours", "--rounds", 1, "--steps", 1, "--output", output)
    assert_ok(run_script("scripts/benchmarks/training.py", *words))
    tasks = json.loads(output.read_text())["tasks"]
    assert all(
        min(speeds) > 0 for found in tasks.values() for speeds in found["images_per_s"].values()
    )


def test_a_literal_nce_step_has_the_loss_and_gradient_of_ours(monkeypatch):
    benchmark = load_script("scripts/benchmarks/training.py")
    task = replace(benchmark.TASKS["pretrain-imagenet"], num_images=50, nce_k=6)
    drawn = {}

    def draw(prob, alias, count):
        drawn["all"] = torch.randint(50, (count,))
        return drawn["all"]

    monkeypatch.setattr(benchmark, "_draw", draw)
    monkeypatch.setattr(benchmark, "_update", lambda memory, *_: drawn.setdefault("memory", memory))
    v = torch.nn.functional.normalize(torch.randn(4, 128), dim=1)
    own, other = v.clone().requires_grad_(), v.clone().requires_grad_()
    indexes = torch.tensor([3, 1, 40, 7])
    value = benchmark._published_loss(task, torch.device("cpu"))(own, indexes)
    value.backward()
    rows = drawn["all"].view(4, -1)
    monkeypatch.setattr("lib.objectives.memory_bank.others", lambda *_: rows[:, 1:])
    criterion = build_loss(6, task.nce_t)
    again = criterion(other, indexes, drawn["memory"], rows)
    again.backward()
    assert value.item() == pytest.approx(again.item(), rel=1e-4)
    torch.testing.assert_close(own.grad, other.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_curves_of_two_variants_are_compared_over_the_seeds(tmp_path):
    words = ("--image-size", 8, "--seeds", 2, "--epochs", 2, "--max-iters", 12, "-b", 256)
    words += ("--variants", "fp32", "bf16", "--output-dir", tmp_path)
    printed = assert_ok(run_script("scripts/benchmarks/compare_training.py", *words))
    results = json.loads((tmp_path / "numbers.json").read_text())["results"]
    assert len(results) == 4
    for title, rows in results.items():
        assert printed.count(f"| {title} |") == 1
        for row in rows:
            assert row["difference"] == pytest.approx(row["means"][0] - row["means"][1])
            assert 0 <= row["p"] <= 1
    assert Image.open(tmp_path / "curves.png").size[0] > 1000
    before = (tmp_path / "phase1-fp32-0" / "log.jsonl").stat().st_mtime_ns
    assert_ok(run_script("scripts/benchmarks/compare_training.py", *words))
    assert (tmp_path / "phase1-fp32-0" / "log.jsonl").stat().st_mtime_ns == before
    assert_refused(
        run_script("scripts/benchmarks/compare_training.py", *words, "--seeds", 1), "--seeds"
    )


@pytest.mark.slow
def test_the_benchmark_of_objectives_prints_both_tables_and_repeats_no_run(tmp_path):
    data = ("--dataset", "folder", "--data-dir", make_folder(tmp_path / "pictures"))
    words = (*data, "--image-size", 16, "--passes", 208, "--num-labeled", 8, "--splits", 2)
    rows = ["instance", "two-view"]
    words += ("--objectives", *rows, "--settings", "instance: -b 16 --views 2", "two-view: -b 16")
    words += ("--output", tmp_path / "out", "--num-workers", 0)
    printed = assert_ok(run_script("scripts/benchmarks/objectives.py", *words))
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(record["knn"]) == list(record["minutes"]) == rows
    assert all(list(curve) == ["104", "208"] for curve in record["knn"].values())  # two epochs
    assert list(record["precision"]) == [*rows, "untrained network", "color histogram"]
    assert statistics.mean(record["precision"]["color histogram"]["8"]) > 90  # they differ by color
    assert printed.count("| two-view |") == 2
    epochs = [x for x in log_lines(tmp_path / "out" / "two-view" / "log") if x["event"] == "epoch"]
    seconds = sum(52 / x["images_per_s"] for x in epochs)  # an epoch reads each image once
    assert record["minutes"]["two-view"] == pytest.approx(seconds / 60)
    files = contents(tmp_path / "out")
    assert_ok(run_script("scripts/benchmarks/objectives.py", *words))
    checkpoints = [name for name in files if name.endswith(".pth.tar")]
    again = contents(tmp_path / "out")
    assert len(checkpoints) == 4
    assert all(again[name] == files[name] for name in checkpoints)


def test_settings_of_an_objective_that_there_is_not_are_refused(tmp_path):
    words = ("--output", tmp_path, "--settings", "byol: -b 16")
    refused = run_script("scripts/benchmarks/objectives.py", *words)
    assert_refused(refused, "--settings 'byol: -b 16'", "a colon and its options")


def test_the_benchmark_of_gains_measures_every_share_and_the_one_that_is_chosen(tmp_path):
    benchmark = load_script("scripts/benchmarks/gain.py")
    rows, targets = blobs(4, 40, spread=0.5)
    file, output = tmp_path / "rows.pth.tar", tmp_path / "numbers.json"
    checkpoint.save(FeatureSet(rows, targets, 4).state(), file)
    words = [
        "--features",
        str(file),
        "--num-labeled",
        "8",
        "--splits",
        "2",
        "--output",
        str(output),
    ]
    found = benchmark.main(benchmark.build_parser().parse_args(words))
    assert json.loads(output.read_text())["results"] == {"8": found[8]}
    for draw in found[8]:
        assert len(draw) == len(benchmark.HEADS)
        assert min(draw) > 50  # far from the 25% of a guess
        assert draw[-1] in draw[1:-1]
