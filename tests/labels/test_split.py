"""The published class-balanced split."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.labels.split import ALL, expected_count, labeled_split, parse_num_labeled

# the first 50 labeled images of the real CIFAR-10, class by class (published)
PUBLISHED_50 = [
    [24681, 42151, 48978, 41040, 36909],
    [8628, 24936, 35926, 15934, 8801],
    [36293, 28026, 3814, 34981, 21135],
    [16904, 20152, 3486, 11894, 29780],
    [23932, 33744, 41766, 42979, 49518],
    [11341, 6091, 48161, 36335, 29858],
    [36044, 25569, 46340, 8832, 38677],
    [37807, 4480, 18517, 8409, 15769],
    [49165, 43846, 13449, 34615, 38862],
    [17849, 49031, 4115, 29909, 34515],
]


def naive_split(targets, per_class, num_classes, seed):
    """The published sentences as loops; `per_class` labels of each class."""
    torch.manual_seed(seed)
    permutation = torch.randperm(len(targets)).tolist()
    labeled, unlabeled = [], []
    for label in range(num_classes):
        members = [i for i in permutation if targets[i] == label]
        labeled += members[:per_class]
        unlabeled += members[per_class:]
    return labeled, unlabeled + [i for i in permutation if targets[i] == -1]


def test_permutation_of_50000_starts_and_ends_as_published():
    drawn = labeled_split(torch.zeros(50000, dtype=torch.int64), ALL, 1).labeled.tolist()
    assert drawn[:3] == [36044, 49165, 37807]
    assert drawn[-3:] == [42128, 15898, 31476]
    assert sorted(drawn) == list(range(50000))


def test_permutation_of_imagenet_starts_as_published():
    drawn = labeled_split(torch.zeros(1331167, dtype=torch.int64), ALL, 1).labeled
    assert drawn[:3].tolist() == [970454, 1058848, 717280]


def test_published_50_labeled_images_come_out_in_their_order():
    # Targets that the published list allows: its images have their classes, and any other image
    # that comes up belongs to a class which is already full (there must be one).
    class_of = {index: label for label, row in enumerate(PUBLISHED_50) for index in row}
    torch.manual_seed(0)
    drawn = [[] for _ in range(10)]
    size = [0] * 10
    targets = torch.empty(50000, dtype=torch.int64)
    for index in torch.randperm(50000).tolist():
        full = [label for label in range(10) if len(drawn[label]) == 5]
        if index in class_of:
            label = class_of[index]
            drawn[label].append(index)
        else:
            assert full, f"{index} comes before any class is full"
            label = min(full, key=size.__getitem__)
        targets[index] = label
        size[label] += 1
    assert drawn == PUBLISHED_50

    split = labeled_split(targets, 50, 10)

    assert split.labeled.tolist() == [index for row in PUBLISHED_50 for index in row]
    assert len(split.unlabeled) == 49950


@settings(max_examples=40, deadline=None)
@given(
    targets=st.lists(st.integers(-1, 2), min_size=20, max_size=60),
    per_class=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_split_equals_the_naive_loop(targets, per_class, seed):
    targets = torch.tensor([0, 1, 2] * 3 + targets)
    split = labeled_split(targets, 3 * per_class, 3, seed)
    labeled, unlabeled = naive_split(targets, per_class, 3, seed)
    assert split.labeled.tolist() == labeled
    assert split.unlabeled.tolist() == unlabeled


def test_all_takes_every_known_label_and_leaves_the_unknown_ones():
    targets = torch.tensor([0, 1, -1, 1, 0, 1, -1])
    split = labeled_split(targets, "all", 2)
    assert sorted(split.labeled.tolist()) == [0, 1, 3, 4, 5]
    assert sorted(split.unlabeled.tolist()) == [2, 6]
    assert targets[split.labeled].tolist() == [0, 0, 1, 1, 1]
    assert expected_count("all", targets, 2) == 5


def test_images_without_a_label_never_become_labeled():
    targets = torch.full((100,), -1)
    targets[90:] = torch.arange(10) % 2
    split = labeled_split(targets, 10, 2)
    assert sorted(split.labeled.tolist()) == list(range(90, 100))
    assert (targets[split.unlabeled] == -1).all()


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    labeled_split(torch.arange(30) % 3, 6, 3, seed=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_draw_different_images():
    targets = torch.arange(300) % 3
    drawn = {tuple(labeled_split(targets, 30, 3, seed).labeled.tolist()) for seed in range(5)}
    assert len(drawn) == 5


def test_uneven_number_is_cut_down_with_a_warning():
    targets = torch.arange(30) % 3
    with pytest.warns(UserWarning, match="10 is not a multiple of 3"):
        split = labeled_split(targets, 10, 3)
    assert len(split.labeled) == expected_count(10, targets, 3) == 9
    assert torch.bincount(targets[split.labeled]).tolist() == [3, 3, 3]


def test_even_number_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(labeled_split(torch.arange(30) % 3, 9, 3).labeled) == 9


@pytest.mark.parametrize(
    ("targets", "num_labeled", "words"),
    [
        ([0, 0, 1, 1], 1, "give 2 at least"),
        ([0, 0, 1, 1], 0, "give 2 at least"),
        ([0, 0, 1, 1], -4, "give 2 at least"),
        ([0, 0, 0, 1], 4, "class 1 has 1 labeled images and 2 are asked for"),
        ([0, 0, 0, -1], 2, "class 1 has no labeled image"),
        ([0, 0, 0, -1], "all", "class 1 has no labeled image"),
        ([0, 1, 2, 1], 2, "class 2 among 2 classes"),
        ([0, 1, -2, 1], 2, "class -2 among 2 classes"),
        ([0, 1, 0, 1], "many", "'many' is not a number"),
        ([0, 1, 0, 1], 2.5, "2.5 is not a number"),
    ],
)
def test_impossible_split_says_why(targets, num_labeled, words):
    with pytest.raises(ValueError, match=words):
        labeled_split(torch.tensor(targets), num_labeled, 2)


@pytest.mark.parametrize(("text", "value"), [("250", 250), (250, 250), ("all", "all")])
def test_number_of_labels_is_read_from_text(text, value):
    assert parse_num_labeled(text) == value


@pytest.mark.parametrize("text", ["", "2.5", 2.5, None, "ALL", "5e2", True])
def test_what_is_no_number_of_labels_is_refused(text):
    with pytest.raises(ValueError, match="give an integer or all"):
        parse_num_labeled(text)
