"""Pseudo-labels as a table: what comes back, what other tools may write, what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.labels import table
from lib.labels.confidence import from_scores
from lib.labels.pseudo_labels import PseudoLabels
from lib.labels.split import Split

CLASSES = ["ant", "bee", "cat", "dog"]


def some_pseudo_labels(seed, meta):
    """32 pseudo-labeled and 8 labeled images of 4 classes."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(40, generator=generator)
    scores = 3 * torch.randn(40, 4, generator=generator)
    return from_scores(scores, Split(order[:8], order[8:]), meta)


def two_images():
    some = torch.arange(2)
    return PseudoLabels(some, some, torch.tensor([1.0, 0.0]), torch.tensor([2]), some)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), known=st.booleans())
def test_a_table_brings_everything_back_but_probabilities(seed, known, tmp_path_factory):
    file = tmp_path_factory.mktemp("table") / "p.csv"
    pseudo = some_pseudo_labels(seed, {"classes": CLASSES} if known else {})
    table.to_csv(pseudo, file)
    again = table.from_csv(file)
    for name in ("indexes", "labels", "confidence", "labeled"):
        assert torch.equal(getattr(again, name), getattr(pseudo, name)), name
    assert sorted(again.unlabeled.tolist()) == sorted(pseudo.unlabeled.tolist())
    assert again.meta == pseudo.meta
    assert again.probabilities is None


def test_a_table_says_names_paths_and_what_is_labeled(tmp_path):
    pseudo = PseudoLabels(
        torch.tensor([4, 1]),
        torch.tensor([1, 0]),
        torch.tensor([0.75, 0.1]),
        torch.tensor([2, 0]),
        torch.tensor([1, 3, 4]),
        meta={"classes": ["ant, red", "bee"]},
    )
    table.to_csv(pseudo, tmp_path / "p.csv", paths=[f"train/{i}.png" for i in range(5)])
    assert (tmp_path / "p.csv").read_text().splitlines() == [
        '# meta {"classes": ["ant, red", "bee"]}',
        "index,path,label,confidence",
        "4,train/4.png,bee,0.75",
        '1,train/1.png,"ant, red",0.100000001',
        "3,train/3.png,,0",
        "2,train/2.png,,",
        "0,train/0.png,,",
    ]
    again = table.from_csv(tmp_path / "p.csv")
    assert again.labels.tolist() == [1, 0]
    assert again.unlabeled.tolist() == [4, 1, 3]
    with pytest.raises(ValueError, match="4 paths for the image with index 4"):
        table.to_csv(pseudo, tmp_path / "p.csv", paths=["a.png"] * 4)


def test_classes_of_the_same_name_keep_their_numbers_in_a_table(tmp_path):
    some = torch.arange(2)
    classes = {"classes": ["crane", "dog", "crane"]}
    pseudo = PseudoLabels(some, some, torch.tensor([0.9, 0.5]), some[:0], some, meta=classes)
    table.to_csv(pseudo, tmp_path / "p.csv")
    assert table.from_csv(tmp_path / "p.csv").labels.tolist() == [0, 1]
    text = (tmp_path / "p.csv").read_text()
    (tmp_path / "p.csv").write_text(text.replace("0,,0,0.", "0,,crane,0."))
    with pytest.raises(ValueError, match="the label 'crane' is not a number"):
        table.from_csv(tmp_path / "p.csv")


def test_a_path_that_is_no_utf_8_does_not_lose_the_table(tmp_path):
    names = ["a\udce9.png", "b.png", "c.png"]  # as the system hands out a name in Latin-1
    table.to_csv(two_images(), tmp_path / "p.csv", paths=names)
    assert r"a\udce9.png" in (tmp_path / "p.csv").read_text(encoding="utf-8")


def test_a_table_of_another_tool_may_be_in_any_order_and_have_more_columns(tmp_path):
    lines = ["# made elsewhere", "label,index,confidence,note", "1,7,0.25,x", "0,3,0.5,y", ",9,,"]
    (tmp_path / "p.csv").write_bytes("\ufeff".encode() + "\r\n".join(lines).encode())
    pseudo = table.from_csv(tmp_path / "p.csv")
    assert pseudo.indexes.tolist() == [3, 7]
    assert pseudo.labels.tolist() == [0, 1]
    assert pseudo.confidence.tolist() == [0.5, 0.25]
    assert pseudo.labeled.tolist() == [9]


TABLE = "index,path,label,confidence\n"
TABLES = {  # content: words of the message
    "": "no column index, label, confidence",
    "index,label\n1,2\n": "no column confidence",
    TABLE + "x,,1,0.5\n": "line 2: the index 'x' is not a number",
    TABLE + "1,,1,0.5\n2,,ant,0.5\n": "line 3: the label 'ant' is not a number",
    TABLE + "1,,1,much\n": "line 2: the confidence 'much' is not a number",
    TABLE + "1,,,0.5\n": "line 2: there is a confidence 0.5 but no label",
    TABLE + "1,,1,0.5\n1,,2,0.4\n": "holds an index twice",
    TABLE + "1,,1,nan\n": "NaN",
    TABLE + f"{2**70},,1,0.5\n": "p.csv: ",
    '# meta {"classes": ["ant"]}\n'
    + TABLE
    + "1,,bee,0.5\n": "line 3: 'bee' is not among the classes",
    '# meta {"classes": 5}\n' + TABLE: "not a list of names",
    "# meta {\n" + TABLE: "record in its first line is damaged",
    "# meta [1]\n" + TABLE: "does not hold names and values",
}


@pytest.mark.parametrize("content", TABLES)
def test_a_table_that_cannot_be_understood_is_refused_by_line(tmp_path, content):
    (tmp_path / "p.csv").write_text(content)
    with pytest.raises(ValueError, match=TABLES[content]) as caught:
        table.from_csv(tmp_path / "p.csv")
    assert "p.csv" in str(caught.value)


def test_a_table_that_is_no_text_or_no_file_is_refused(tmp_path):
    (tmp_path / "p.csv").write_bytes(b"\xff\xfe\x00")
    for file in (tmp_path / "p.csv", tmp_path / "none.csv", tmp_path):
        with pytest.raises(ValueError, match="cannot be read as a table"):
            table.from_csv(file)
    with pytest.raises(ValueError, match="cannot write"):
        table.to_csv(two_images(), tmp_path / "p.csv" / "below a file.csv")
