"""Lists of images to label: what is written is read, and a list of other images is refused by name."""

from types import SimpleNamespace

import pytest
import torch

from lib.labels import chosen
from lib.labels.pseudo_labels import PseudoLabels
from lib.labels.split import expected_count, is_list, labeled_split, name_of, parse_num_labeled

PATHS = tuple(f"unlabeled/{i}.png" for i in range(6))


def images(digest="d", paths=(), classes=()):
    return SimpleNamespace(digest=digest, paths=paths, classes=classes)


@pytest.fixture
def file(tmp_path):
    chosen.write(tmp_path / "mine.csv", torch.tensor([4, 1, 3]), (), {"data_digest": "d"})
    return tmp_path / "mine.csv"


def test_what_is_written_is_read(tmp_path):
    file = tmp_path / "a.csv"
    chosen.write(file, torch.tensor([4, 1, 3]), PATHS, {"data_digest": "d"})
    found = chosen.read(file)
    assert found.indexes.tolist() == [4, 1, 3]
    assert found.paths == (PATHS[4], PATHS[1], PATHS[3])
    assert found.meta == {"data_digest": "d"}
    assert file.read_text().splitlines()[1:3] == ["index,path,rank", "4,unlabeled/4.png,1"]


def test_an_image_is_found_by_its_file_wherever_it_went(tmp_path):
    file = tmp_path / "a.csv"
    chosen.write(file, torch.tensor([4, 1]), PATHS, {"data_digest": "d"})
    moved = images("another", PATHS[::-1])  # as an image that gets a label does
    assert chosen.find(file, 6, moved).tolist() == [1, 4]
    with pytest.raises(
        ValueError, match=r"1 of its 2 images are not in this data set, such as .*/4"
    ):
        chosen.find(file, 6, images("d", PATHS[:4]))


def test_a_name_that_is_not_utf8_is_found(tmp_path):
    paths = ("a\udcff.png", "b.png")
    chosen.write(tmp_path / "a.csv", torch.tensor([0]), paths, {})
    assert chosen.find(tmp_path / "a.csv", 2, images("", paths)).tolist() == [0]


def test_a_list_of_other_images_is_refused(file):
    assert chosen.find(file, 6, images("d")).tolist() == [4, 1, 3]
    assert chosen.find(file, 6).tolist() == [4, 1, 3]
    with pytest.raises(ValueError, match=r"digest d, these have e\); .*choose anew"):
        chosen.find(file, 6, images("e"))
    with pytest.raises(ValueError, match="index 4 among 4 images"):
        chosen.find(file, 4, images(""))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,rank\na,1\n", "no column index"),
        ("", "no column index"),
        ("index\n", "names no image"),
        ("index\n1\nx\n", "line 3: the index 'x' is not a number"),
        ("index,rank\n1,first\n", "the rank 'first' is not a number"),
        ("index\n2\n1\n2\n", "the index 2 is there twice; keep one line"),
        ("index\n-2\n", "the index -2 is negative"),
        ("# meta {cut\nindex\n1\n", "first line is damaged"),
    ],
)
def test_a_damaged_list_says_what_is_wrong(tmp_path, text, words):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"a\.csv: .*{words}"):
        chosen.read(tmp_path / "a.csv")


def test_a_list_of_another_tool_needs_only_indexes(tmp_path):
    (tmp_path / "a.csv").write_text("index\n5\n2\n")
    assert chosen.find(tmp_path / "a.csv", 6).tolist() == [5, 2]


def test_the_split_of_a_list_is_the_list_and_the_others(file):
    targets = torch.tensor([0, 1, 0, 1, 0, -1])
    split = labeled_split(targets, str(file), 2, images=images())
    assert split.labeled.tolist() == [4, 1, 3]
    assert split.unlabeled.tolist() == [0, 2, 5]
    assert expected_count(str(file), targets, 2) == 3
    assert parse_num_labeled(str(file)) == str(file)
    assert is_list(str(file))
    assert not is_list("all")
    assert [name_of(n) for n in (str(file), 250, "all")] == ["mine", "250", "all"]


def test_a_class_that_a_list_leaves_out_is_named(file):
    with pytest.warns(
        UserWarning, match=r"mine\.csv holds no image of class cat: no image will get it"
    ):
        labeled_split(
            torch.tensor([0, 0, 1, 0, 0, 0]), str(file), 2, images=images(classes=("a", "cat"))
        )


def test_an_image_without_a_known_label_is_named(file):
    targets = torch.tensor([0, 1, 0, 1, -1, 0])
    with pytest.raises(
        ValueError, match=r"1 of its 3 images have no known label \(image 4\); fill in"
    ):
        labeled_split(targets, str(file), 2)


def test_pseudo_labels_of_other_labeled_images_do_not_fit():
    pseudo = PseudoLabels(
        torch.tensor([0]), torch.tensor([0]), torch.ones(1), torch.tensor([1, 2]), torch.tensor([0])
    )
    pseudo.require_fit(4, 2, 2, labeled=torch.tensor([2, 1]))
    with pytest.raises(ValueError, match=r"other labeled images: 1 of the list .* run phase 2"):
        pseudo.require_fit(4, 2, 2, labeled=torch.tensor([2, 3]))
