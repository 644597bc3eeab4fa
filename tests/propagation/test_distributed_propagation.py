"""Several processes on one propagation give what one gives, end together and let nobody wait."""

import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from subprocess import PIPE

import pytest
import torch
from conftest import ROOT, assert_ok, assert_refused, blobs, run_script

from lib.cli.start import load_script
from lib.features.extraction import FeatureSet
from lib.files import checkpoint
from lib.labels import pseudo_files
from lib.propagation.workers import ROWS, rows_of
from lib.runtime import distributed

METHODS = {
    "nc-block": ("--method", "nc", "--num-eigenvectors", 20, "--solver", "block"),
    "nc-arpack": ("--method", "nc", "--num-eigenvectors", 20, "--solver", "arpack"),
    "filter": ("--method", "filter", "--graph", "local-scale"),
    "poisson": ("--method", "poisson", "--search", "ivf"),
    "knn": ("--method", "knn"),
    "auto": ("--method", "auto", "--graph", "imagenet", "--num-neighbors", 30),
    "chunks": ("--method", "nc", "--num-eigenvectors", 20, "--chunks", 3),
}
ROUNDED = (
    "poisson",
    "chunks",
)  # approximate search, few rows: products of other shapes, other last bits
LABELS = 40


def run_all(features: str, folder: str, gpus: str) -> int:
    """Every method by the script's own main function, one after the other in the processes that there are."""
    torch.set_num_threads(1)
    script = load_script("scripts/propagate.py")
    for name, words in METHODS.items():
        options = ("--features", features, "--save-path", Path(folder, name), "--gpus", gpus)
        words = (*options, "--num-labeled", LABELS, *words)
        script.main(script.build_parser().parse_args([str(word) for word in words]))
    return 0


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Path:
    rows, targets = blobs(4, 190, spread=0.45)
    path = tmp_path_factory.mktemp("features") / "features.pth.tar"
    checkpoint.save(FeatureSet(rows, targets, 4).state(), path)
    return path


@pytest.fixture(scope="module")
def folders(features, tmp_path_factory) -> tuple[Path, Path]:
    """Pseudo-labels of all methods, made by one process and by two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    threads = torch.get_num_threads()
    try:
        assert run_all(str(features), str(one), "cpu") == 0
        torch.set_num_threads(1)
        assert distributed.run(partial(run_all, str(features), str(two), "cpu,cpu"), "cpu,cpu") == 0
    finally:
        torch.set_num_threads(threads)
    return one, two


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.pth.tar"))


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_give_the_labels_of_one(folders, name):
    one, two = (folder / name for folder in folders)
    assert files(one) == files(two)
    made = [f for f in files(one) if not f.startswith("work")]
    assert len(made) == (3 if name == "chunks" else 1)
    for file in made:
        alone, together = pseudo_files.load(one / file), pseudo_files.load(two / file)
        assert alone.meta["propagation"] == together.meta["propagation"]
        by_image = alone.indexes.argsort(), together.indexes.argsort()
        assert torch.equal(alone.labels[by_image[0]], together.labels[by_image[1]])
        torch.testing.assert_close(together.confidence, alone.confidence, atol=1e-5, rtol=0)
        if name not in ROUNDED:
            for entry in ("indexes", "confidence", "probabilities"):
                assert torch.equal(getattr(alone, entry), getattr(together, entry)), entry


def test_the_graph_of_two_processes_is_the_graph_of_one(folders):
    one, two = (folder / "nc-block" / "work" for folder in folders)
    name = next(path.name for path in one.glob("graph-*"))
    graphs = [checkpoint.load(folder / name) for folder in (one, two)]
    for entry in ("crow", "col", "values", "meta"):
        assert str(graphs[0][entry]) == str(graphs[1][entry])
        if entry != "meta":
            assert torch.equal(graphs[0][entry], graphs[1][entry])


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [7, 100, 2 * 7 * ROWS, 5000])
def test_every_row_is_that_of_one_process(n, size):
    parts = [rows_of(rank, size, n) for rank in range(size)]
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(n))
    assert all(part.start < part.stop for part in parts)
    if n >= 2 * size * ROWS:
        assert all(part.start % ROWS == 0 for part in parts)


@pytest.mark.slow
def test_torchrun_starts_the_script(features, folders, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    words = ("--features", features, "--gpus", "cpu", "--save-path", tmp_path)
    words = (*words, "--num-labeled", LABELS, *METHODS["poisson"])
    printed = assert_ok(run_script(*launcher, "scripts/propagate.py", *words, OMP_NUM_THREADS="1"))
    assert printed.count("760 x 16 features, 4 classes") == 1  # rank 0 alone prints
    alone = pseudo_files.load(folders[0] / "poisson" / f"{LABELS}.pth.tar")
    together = pseudo_files.load(tmp_path / f"{LABELS}.pth.tar")
    by_image = alone.indexes.argsort(), together.indexes.argsort()
    assert torch.equal(alone.labels[by_image[0]], together.labels[by_image[1]])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        # Rank 0 alone notices it.
        (("--method", "filter", "--cutoff", "3"), "give 0 < cut-off < 2"),
        # All processes notice it, in the midst of a task.
        (("--method", "nc", "--search", "faiss"), "FAISS is not installed"),
    ],
)
def test_a_mistake_ends_all_processes_with_one_message(features, tmp_path, words, message):
    options = ("--features", features, "--num-labeled", LABELS, "--save-path", tmp_path)
    (tmp_path / "faiss.py").write_text("raise ImportError")
    command = ("scripts/propagate.py", *options, *words, "--gpus", "cpu,cpu")
    result = run_script(*command, PYTHONPATH=str(tmp_path))
    assert_refused(result, message)


@pytest.mark.slow
def test_sigterm_ends_all_processes_at_once_and_leaves_whole_files(features, tmp_path):
    options = ("--features", features, "--num-labeled", LABELS, "--save-path", tmp_path)
    slow = ("--method", "nc", "--num-eigenvectors", 370, "--solver", "arpack")  # takes a while
    words = ["scripts/propagate.py", *options, *slow, "--gpus", "cpu,cpu"]
    with subprocess.Popen(
        [sys.executable, *map(str, words)], stdout=PIPE, stderr=PIPE, text=True, cwd=ROOT
    ) as process:
        assert any("graph of 760 images: built" in line for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        _, complaints = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert complaints.count("the same command continues") == 1
    assert "Traceback" not in complaints
    assert [file.name.split("-")[0] for file in (tmp_path / "work").iterdir()] == ["graph"]
