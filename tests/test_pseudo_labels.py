"""Pseudo-label values and files: what is refused, what is chosen, the published formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import checkpoint, pseudo_labels
from lib.pseudo_labels import PseudoLabels, from_probabilities, from_scores
from lib.split import Split

NUM_IMAGES, NUM_CLASSES, NUM_LABELED = 40, 4, 8


def good_state(seed=0):
    """A file as phase 2 writes it: 8 labelled images, 32 pseudo-labelled, 4 classes."""
    order = torch.randperm(NUM_IMAGES, generator=torch.Generator().manual_seed(seed))
    scores = 3 * torch.randn(NUM_IMAGES, NUM_CLASSES, generator=torch.Generator().manual_seed(seed))
    split = Split(order[:NUM_LABELED], order[NUM_LABELED:])
    return from_scores(scores, split, {"data_digest": "aa11"}).state()


def read(tmp_path, state):
    """Through the file, as phase 3 does."""
    checkpoint.save(state, tmp_path / "p.pth.tar")
    pseudo = pseudo_labels.load(tmp_path / "p.pth.tar")
    pseudo.require_fit(NUM_IMAGES, NUM_CLASSES, NUM_LABELED, "aa11")
    return pseudo


def put(key, position, value):
    def mutate(state):
        state[key] = state[key].clone()
        state[key][position] = value

    return mutate


def replaced(key, function):
    def mutate(state):
        state[key] = function(state[key])

    return mutate


def label_is_not_the_most_probable(state):
    state["pseudo_probs"] = state["pseudo_probs"].clone()
    state["pseudo_probs"][0] = torch.tensor([0.05, 0.05, 0.05, 0.85])
    state["pseudo_labels"] = state["pseudo_labels"].clone()
    state["pseudo_labels"][0] = 1


def labeled_image_is_pseudo_labeled(state):
    state["pseudo_indexes"] = state["pseudo_indexes"].clone()
    state["pseudo_indexes"][3] = state["labeled_indexes"][0]


MUTATIONS = {  # name: (change, words of the message)
    "key missing": (lambda s: s.pop("pseudo_labels"), "has no pseudo_labels"),
    "no confidence": (
        lambda s: (s.pop("pseudo_probs"), s.pop("pseudo_weights")),
        "neither pseudo_weights nor pseudo_probs",
    ),
    "no tensor": (replaced("pseudo_labels", torch.Tensor.tolist), "must be dense tensors"),
    "sparse tensor": (replaced("pseudo_probs", torch.Tensor.to_sparse), "must be dense tensors"),
    "float indexes": (
        replaced("pseudo_indexes", torch.Tensor.float),
        "pseudo_indexes is no int64 vector",
    ),
    "int32 indexes": (
        replaced("labeled_indexes", torch.Tensor.int),
        "labeled_indexes is no int64 vector",
    ),
    "float labels": (replaced("pseudo_labels", torch.Tensor.float), "int64 is expected"),
    "labels as a column": (replaced("pseudo_labels", lambda x: x[:, None]), r"shape \(32, 1\)"),
    "one label": (replaced("pseudo_labels", lambda x: x[0]), r"shape \(\)"),
    "labels shorter": (replaced("pseudo_labels", lambda x: x[:-1]), r"shape \(31,\)"),
    "weights shorter": (replaced("pseudo_weights", lambda x: x[:-1]), "pseudo_weights of shape"),
    "one weight": (replaced("pseudo_weights", lambda x: x[0]), "pseudo_weights of shape"),
    "integer weights": (replaced("pseudo_weights", torch.Tensor.long), "floats are expected"),
    "probabilities shorter": (
        replaced("pseudo_probs", lambda x: x[:-1]),
        "pseudo_probs of shape",
    ),
    "negative index": (put("pseudo_indexes", 2, -3), "negative index -3"),
    "index out of range": (put("unlabeled_indexes", 2, 99), "not among unlabeled_indexes"),
    "labelled index out of range": (put("labeled_indexes", 0, 40), "index 40 in a data set of 40"),
    "index twice": (
        replaced("pseudo_indexes", lambda x: torch.cat([x[:1], x[:1], x[2:]])),
        "pseudo_indexes holds an index twice",
    ),
    "labelled index twice": (
        replaced("labeled_indexes", lambda x: torch.cat([x[:1], x[:1], x[2:]])),
        "labeled_indexes holds an index twice",
    ),
    "labelled and pseudo-labelled": (
        labeled_image_is_pseudo_labeled,
        "both labelled and pseudo-labelled",
    ),
    "negative label": (put("pseudo_labels", 5, -1), "label -1 is negative"),
    "label out of range": (put("pseudo_labels", 5, 4), "label 4 is out of range"),
    "other number of labels": (
        replaced("labeled_indexes", lambda x: x[:-1]),
        "made with 7 labelled images, but --num-labeled asks for 8",
    ),
    "NaN probability": (put("pseudo_probs", (1, 1), math.nan), "pseudo_probs hold NaN"),
    "infinite probability": (put("pseudo_probs", (1, 1), math.inf), "pseudo_probs hold NaN, inf"),
    "negative probability": (put("pseudo_probs", (1, 1), -0.5), "negative values"),
    "rows do not sum to 1": (replaced("pseudo_probs", lambda x: x / 2), "do not sum to 1"),
    "no classes": (replaced("pseudo_probs", lambda x: x[:, :0]), "do not sum to 1"),
    "label not the most probable": (label_is_not_the_most_probable, "not the most probable"),
    "NaN weight": (put("pseudo_weights", 4, math.nan), "pseudo_weights hold NaN"),
    "infinite weight": (put("pseudo_weights", 0, math.inf), "pseudo_weights hold NaN or infinity"),
    "weight above 1": (put("pseudo_weights", 0, 1.5), r"leave \[0, 1\]"),
    "weight below 0": (put("pseudo_weights", -1, -0.5), r"leave \[0, 1\]"),
    "weights rise": (replaced("pseudo_weights", lambda x: x.flip(0)), "do not fall"),
    "other data set": (
        lambda s: s.update(meta={"data_digest": "bb22"}),
        "made for another data set",
    ),
    "meta is a list": (lambda s: s.update(meta=[1]), "meta is a list"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_damaged_file_is_refused_with_its_fault(tmp_path, name):
    mutate, words = MUTATIONS[name]
    state = good_state()
    mutate(state)
    with pytest.raises(ValueError, match=words):
        read(tmp_path, state)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), name=st.sampled_from(sorted(MUTATIONS)))
def test_no_damage_slips_through_on_any_content(seed, name, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    state = good_state(seed)
    assert len(read(folder, state).indexes) == NUM_IMAGES - NUM_LABELED
    MUTATIONS[name][0](state)
    with pytest.raises(ValueError, match=r"\w"):
        read(folder, state)


def test_message_names_the_file_and_every_problem(tmp_path):
    state = good_state()
    for name in ("negative label", "NaN weight", "labelled and pseudo-labelled"):
        MUTATIONS[name][0](state)
    with pytest.raises(ValueError, match=r"p\.pth\.tar: .*both.*negative.*NaN"):
        read(tmp_path, state)


def test_every_misfit_is_listed_at_once():
    pseudo = PseudoLabels(
        *[good_state()[k] for k in ("pseudo_indexes", "pseudo_labels")],
        good_state()["pseudo_weights"],
        good_state()["labeled_indexes"],
        good_state()["unlabeled_indexes"],
        good_state()["pseudo_probs"],
        {"data_digest": "aa11"},
    )
    with pytest.raises(ValueError, match=r"index 39.*label 3.*4 probabilities.*asks for 6.*digest"):
        pseudo.require_fit(30, 3, 6, "cc33")


def test_labels_out_of_range_are_seen_without_probabilities_too(tmp_path):
    state = good_state()
    del state["pseudo_probs"]
    read(tmp_path, state)
    state["pseudo_labels"] = state["pseudo_labels"] + 1
    with pytest.raises(ValueError, match="label 4 in a data set of 4 classes"):
        read(tmp_path, state)


def test_number_of_labels_is_compared_with_the_file(tmp_path):
    pseudo = read(tmp_path, good_state())
    with pytest.raises(ValueError, match="--num-labeled asks for 12"):
        pseudo.require_fit(NUM_IMAGES, NUM_CLASSES, 12)


def test_digest_is_compared_only_where_both_are_known(tmp_path):
    pseudo = read(tmp_path, good_state())
    pseudo.require_fit(NUM_IMAGES, NUM_CLASSES, NUM_LABELED)
    state = good_state()
    del state["meta"]
    read(tmp_path, state)


def test_slowly_rising_weights_of_a_large_file_are_refused():
    # no step is larger than rounding, the ranking is upside down all the same
    n = 50000
    indexes = torch.arange(n)
    labels = torch.zeros(n, dtype=torch.int64)
    weights = torch.linspace(0, 1, n)
    with pytest.raises(ValueError, match="do not fall"):
        PseudoLabels(indexes, labels, weights, torch.tensor([n]), indexes)
    PseudoLabels(indexes, labels, weights.flip(0), torch.tensor([n]), indexes)


def test_file_comes_back_as_it_was_written(tmp_path):
    state = good_state()
    loaded = read(tmp_path, state).state()
    assert loaded.keys() == state.keys()
    for key in state.keys() - {"meta"}:
        assert torch.equal(loaded[key], state[key])
        assert loaded[key].dtype == (
            torch.float32 if key in ("pseudo_probs", "pseudo_weights") else torch.int64
        )
    assert loaded["meta"] == {"data_digest": "aa11"}


def test_file_without_weights_takes_the_largest_probability(tmp_path):
    order = torch.arange(NUM_IMAGES)
    probs = torch.rand(NUM_IMAGES, NUM_CLASSES).softmax(dim=1)
    pseudo = from_probabilities(probs, Split(order[:NUM_LABELED], order[NUM_LABELED:]))
    state = pseudo.state()
    del state["pseudo_weights"]
    assert torch.equal(read(tmp_path, state).confidence, pseudo.confidence)


def test_file_with_nothing_left_to_label_is_fine(tmp_path):
    none = torch.empty(0, dtype=torch.int64)
    pseudo = from_scores(torch.rand(NUM_LABELED, NUM_CLASSES), Split(torch.arange(8), none))
    pseudo = read(tmp_path, pseudo.state())
    assert len(pseudo.select(1.0)) == len(pseudo.select(1.0, class_balanced=True)) == 0


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), temperature=st.sampled_from([0.25, 1.0, 4.0]))
def test_confidence_and_probabilities_divide_by_the_same_temperature(seed, temperature):
    # the released code used z / T for the weights and z * T for the probabilities
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(20, 4, generator=generator)
    unlabeled = torch.randperm(20, generator=generator)[:15]
    labeled = torch.tensor([i for i in range(20) if i not in unlabeled])
    pseudo = from_scores(scores, Split(labeled, unlabeled), temperature=temperature)
    for row, index in enumerate(pseudo.indexes.tolist()):
        z = scores[index].double() / temperature
        first, second = sorted(z.tolist())[:-3:-1]
        assert pseudo.confidence[row] == pytest.approx(1 - math.exp(-(first - second)), abs=1e-6)
        torch.testing.assert_close(
            pseudo.probabilities[row].double(), z.softmax(0), atol=1e-6, rtol=0
        )
        assert pseudo.labels[row] == z.argmax()
    assert sorted(pseudo.indexes.tolist()) == sorted(unlabeled.tolist())
    assert (pseudo.confidence.diff() <= 0).all()


def test_everything_is_sorted_by_falling_confidence_and_ties_keep_their_order():
    probs = torch.tensor([[0.6, 0.4], [0.1, 0.9], [0.6, 0.4], [0.2, 0.8], [0.4, 0.6]])
    pseudo = from_probabilities(probs, Split(torch.tensor([3]), torch.tensor([4, 2, 1, 0])))
    assert pseudo.indexes.tolist() == [1, 4, 2, 0]
    assert pseudo.labels.tolist() == [1, 1, 0, 0]
    assert torch.equal(pseudo.probabilities, probs[pseudo.indexes])
    assert torch.equal(pseudo.confidence, torch.tensor([0.9, 0.6, 0.6, 0.6]))
    assert pseudo.unlabeled.tolist() == [4, 2, 1, 0]


def test_many_ties_keep_their_order_too():
    unlabeled = torch.randperm(5000, generator=torch.Generator().manual_seed(0)) + 1
    pseudo = from_probabilities(torch.full((5001, 2), 0.5), Split(torch.tensor([0]), unlabeled))
    assert torch.equal(pseudo.indexes, unlabeled)


def test_close_scores_keep_a_confidence_above_zero():
    pseudo = from_scores(
        torch.tensor([[0.0, -1e-9], [0.0, -1.0]]), Split(torch.tensor([1]), torch.tensor([0]))
    )
    assert pseudo.confidence[0] == pytest.approx(1e-9)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_must_be_positive(temperature):
    split = Split(torch.tensor([0]), torch.tensor([1]))
    with pytest.raises(ValueError, match="must be positive"):
        from_scores(torch.rand(2, 3), split, temperature=temperature)


def with_labels(labels):
    n = len(labels)
    return PseudoLabels(
        torch.arange(n),
        torch.tensor(labels, dtype=torch.int64),
        torch.linspace(1, 0, n) if n > 1 else torch.ones(n),
        torch.tensor([n]),
        torch.arange(n),
    )


@settings(max_examples=60, deadline=None)
@given(labels=st.lists(st.integers(0, 4), max_size=60), percent=st.integers(0, 100))
def test_class_balanced_selection_equals_the_naive_loop(labels, percent):
    expected = []
    for label in range(5):
        members = [i for i, c in enumerate(labels) if c == label]
        expected += members[: -(-percent * len(members) // 100)]
    chosen = with_labels(labels).select(percent / 100, class_balanced=True)
    assert chosen.tolist() == sorted(expected)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 400), percent=st.integers(0, 100))
def test_selection_takes_the_share_that_was_asked_for(count, percent):
    chosen = with_labels([0] * count).select(percent / 100)
    assert chosen.tolist() == list(range(percent * count // 100))


def test_binary_rounding_of_a_ratio_takes_none_too_few_or_many():
    assert len(with_labels([0] * 100).select(0.29)) == 29  # 0.29 * 100 < 29 in floats
    assert len(with_labels([0] * 300).select(0.09, class_balanced=True)) == 27


def test_balanced_selection_leaves_no_class_out():
    pseudo = with_labels([0] * 50 + [1] * 3 + [2])
    assert set(pseudo.labels[pseudo.select(0.1)].tolist()) == {0}
    assert pseudo.labels[pseudo.select(0.1, class_balanced=True)].tolist() == [0] * 5 + [1, 2]
    assert len(pseudo.select(0.0, class_balanced=True)) == 0
    assert len(pseudo.select(1.0, class_balanced=True)) == 54


@pytest.mark.parametrize("ratio", [-0.1, 1.1, math.nan, math.inf])
def test_ratio_outside_of_0_to_1_is_refused(ratio):
    for class_balanced in (False, True):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            with_labels([0, 1]).select(ratio, class_balanced=class_balanced)
