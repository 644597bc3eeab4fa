"""The estimated gain in pseudo-label files: read as it was written, and its share in words."""

from dataclasses import replace

import pytest
import torch

from lib.labels import pseudo_files
from lib.labels.gain import KEY, Gain, parse_ratio
from lib.labels.pseudo_labels import PseudoLabels

GAIN = Gain({0.0: 60.0, 0.2: 71.5, 0.5: 71.5, 1.0: 70.0}, 40)


def pseudo(entry):
    rows = torch.arange(3)
    meta = {} if entry is None else {KEY: entry}
    return PseudoLabels(rows, rows, torch.ones(3), rows + 3, rows, meta=meta)


def test_a_file_gives_back_the_estimate_and_the_largest_of_equal_shares(tmp_path):
    pseudo_files.save(pseudo(GAIN.entry()), tmp_path / "3.pth.tar")
    found = Gain.read(pseudo_files.load(tmp_path / "3.pth.tar").meta)
    assert found == GAIN
    assert found.ratio == 0.5
    assert "40 labels" in str(found)
    assert "60.0% by the other labels alone, 71.5% with 50% of the pseudo-labels" in str(found)
    assert Gain.read(pseudo(None).meta) is None


def test_where_no_share_is_better_than_the_labels_alone_it_says_so():
    alone = replace(GAIN, accuracy={**GAIN.accuracy, 0.0: 72.0})
    assert alone.ratio == 0
    assert "no share of the pseudo-labels gains anything" in str(alone)


def test_without_labels_to_hold_out_all_pseudo_labels_are_taken(tmp_path):
    pseudo_files.save(pseudo(Gain({}, 0).entry()), tmp_path / "3.pth.tar")
    found = Gain.read(pseudo_files.load(tmp_path / "3.pth.tar").meta)
    assert found == Gain({}, 0)
    assert found.ratio == 1
    assert str(found).startswith("no class has two labels")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratios": [0.0, 0.2]}, "4 accuracies for the shares"),
        ({"ratios": [0.1, 0.2, 0.5, 1.0]}, "4 accuracies for the shares"),
        ({"ratios": [0.0, 0.2, 0.5, 2.0]}, r"gain\.ratios\[3\] is 2\.0"),
        ({"accuracies": [0.0, "much", 0.5, 2.0]}, r"gain\.accuracies\[1\] is 'much'"),
        ({"held_out": None}, r"gain\.held_out is None"),
    ],
)
def test_a_damaged_estimate_is_refused(tmp_path, change, message):
    pseudo_files.save(pseudo(GAIN.entry() | change), tmp_path / "3.pth.tar")
    with pytest.raises(ValueError, match=message):
        Gain.read(pseudo_files.load(tmp_path / "3.pth.tar").meta)


def test_an_estimate_that_lacks_an_entry_is_refused(tmp_path):
    pseudo_files.save(pseudo({"ratios": [0.0]}), tmp_path / "3.pth.tar")
    with pytest.raises(ValueError, match="gain has no accuracies, held_out"):
        pseudo_files.load(tmp_path / "3.pth.tar")


def test_a_share_is_a_number_or_auto():
    assert parse_ratio("auto") == "auto"
    assert parse_ratio("0.25") == parse_ratio(0.25) == 0.25
    with pytest.raises(ValueError, match="must be a number or auto, not much"):
        parse_ratio("much")
