"""The command that turns pseudo-label files into tables and back."""

import pytest
import torch
from conftest import assert_ok, assert_refused, run_script
from runs import make_folder

from datasets import build_datasets
from lib.cli import pseudo_labels as command
from lib.files import checkpoint
from lib.labels import pseudo_files
from lib.labels.confidence import from_scores
from lib.labels.split import Split

NUM_IMAGES = 40


def write_pseudo_labels(path):
    """8 labeled and 32 pseudo-labeled images of 4 classes."""
    order = torch.randperm(NUM_IMAGES)
    split = Split(order[:8], order[8:])
    meta = {"classes": ["ant", "bee", "cat", "dog"]}
    pseudo_files.save(from_scores(3 * torch.randn(NUM_IMAGES, 4), split, meta), path)


def test_paths_come_from_the_folder_of_the_images(tmp_path):
    make_folder(tmp_path / "pictures", unlabeled=4, test=False)  # 44 of them
    write_pseudo_labels(tmp_path / "p.pth.tar")
    words = [
        "to-csv",
        tmp_path / "p.pth.tar",
        tmp_path / "p.csv",
        "--data-dir",
        tmp_path / "pictures",
    ]
    command.main(command.build_parser().parse_args([str(word) for word in words]))
    lines = (tmp_path / "p.csv").read_text().splitlines()[2:]
    train, _ = build_datasets("folder", tmp_path / "pictures", image_size=16)
    assert len(lines) == NUM_IMAGES
    for index, path, *_ in (line.split(",") for line in lines):
        assert path == train.paths[int(index)]


@pytest.mark.slow
def test_the_command_line_goes_there_and_back(tmp_path):
    write_pseudo_labels(tmp_path / "p.pth.tar")
    module = ("-m", "lib.cli.pseudo_labels")
    output = assert_ok(run_script(*module, "to-csv", tmp_path / "p.pth.tar", tmp_path / "p.csv"))
    assert "32 pseudo-labeled and 8 labeled images" in output
    assert_ok(run_script(*module, "from-csv", tmp_path / "p.csv", tmp_path / "q.pth.tar"))
    one, other = (checkpoint.load_dict(tmp_path / f"{name}.pth.tar") for name in "pq")
    for key in ("pseudo_indexes", "pseudo_labels", "pseudo_weights", "labeled_indexes"):
        assert torch.equal(one[key], other[key])
    assert one["meta"] == other["meta"]
    assert_refused(run_script(*module, "from-csv", tmp_path / "p.pth.tar", tmp_path / "x"), "table")
