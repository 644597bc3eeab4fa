"""Pseudo-label values and files: what is refused, what is chosen, the published formulas."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lib.files import checkpoint
from lib.labels import confidence, pseudo_files, pseudo_labels
from lib.labels.confidence import from_scores
from lib.labels.pseudo_labels import PseudoLabels
from lib.labels.split import Split

NUM_IMAGES, NUM_CLASSES, NUM_LABELED = 40, 4, 8
CLASSES = ["ant", "bee", "cat", "dog"]


def good_state(seed=0):
    """A file as phase 2 writes it: 8 labeled images, 32 pseudo-labeled, 4 classes."""
    order = torch.randperm(NUM_IMAGES, generator=torch.Generator().manual_seed(seed))
    scores = 3 * torch.randn(NUM_IMAGES, NUM_CLASSES, generator=torch.Generator().manual_seed(seed))
    split = Split(order[:NUM_LABELED], order[NUM_LABELED:])
    return from_scores(scores, split, {"data_digest": "aa11", "classes": CLASSES}).state()


def read(tmp_path, state):
    """Through the file, as phase 3 does."""
    checkpoint.save(state, tmp_path / "p.pth.tar")
    pseudo = pseudo_files.load(tmp_path / "p.pth.tar")
    pseudo.require_fit(NUM_IMAGES, NUM_CLASSES, NUM_LABELED, "aa11", CLASSES)
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
    "no tensor": (
        replaced("pseudo_labels", torch.Tensor.tolist),
        "is a list, not a tensor",
    ),
    "sparse tensor": (replaced("pseudo_probs", torch.Tensor.to_sparse), "a tensor that is sparse"),
    "float indexes": (
        replaced("pseudo_indexes", torch.Tensor.float),
        "pseudo_indexes is not an int64 vector",
    ),
    "int32 indexes": (
        replaced("labeled_indexes", torch.Tensor.int),
        "labeled_indexes is not an int64 vector",
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
    "labeled index out of range": (put("labeled_indexes", 0, 40), "index 40 in a data set of 40"),
    "index twice": (
        replaced("pseudo_indexes", lambda x: torch.cat([x[:1], x[:1], x[2:]])),
        "pseudo_indexes holds an index twice",
    ),
    "labeled index twice": (
        replaced("labeled_indexes", lambda x: torch.cat([x[:1], x[:1], x[2:]])),
        "labeled_indexes holds an index twice",
    ),
    "labeled and pseudo-labeled": (
        labeled_image_is_pseudo_labeled,
        "both labeled and pseudo-labeled",
    ),
    "negative label": (put("pseudo_labels", 5, -1), "label -1 is negative"),
    "label out of range": (put("pseudo_labels", 5, 4), "label 4 is out of range"),
    "other number of labels": (
        replaced("labeled_indexes", lambda x: x[:-1]),
        "made with 7 labeled images, but --num-labeled asks for 8",
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
    "other classes": (
        lambda s: s.update(meta={"classes": ["ant", "cat", "bee", "dog"]}),
        "other classes: 1 cat / bee, 2 bee / cat",
    ),
    "more classes": (
        lambda s: s.update(meta={"classes": [*CLASSES, "elk"]}),
        "other classes: 4 elk / -",
    ),
    "classes without names": (lambda s: s.update(meta={"classes": [1, 2]}), r"classes\[0\] is 1"),
    "too few class names": (lambda s: s.update(meta={"classes": ["ant"]}), "of 1 class names"),
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


ARRAYS = ("pseudo_indexes", "pseudo_labels", "pseudo_weights", "pseudo_probs")
INDEXES = ("pseudo_indexes", "labeled_indexes", "unlabeled_indexes")


def set_one(state, key, draw, value):
    state[key] = state[key].clone()
    flat = state[key].view(-1)
    flat[draw(st.integers(0, len(flat) - 1))] = value


def lose_a_key(state, draw):
    del state[draw(st.sampled_from([*ARRAYS[:2], *INDEXES]))]


def change_the_type(state, draw):
    key = draw(st.sampled_from([*INDEXES, "pseudo_labels"]))
    types = [torch.int32, torch.int16, torch.uint8, torch.float32, torch.float64, torch.bool]
    state[key] = state[key].to(draw(st.sampled_from(types)))


def change_the_length(state, draw):
    key = draw(st.sampled_from(ARRAYS))
    kept = draw(st.integers(0, len(state[key]) - 1))
    state[key] = state[key][:kept]


def put_a_negative_index(state, draw):
    set_one(state, draw(st.sampled_from(INDEXES)), draw, draw(st.integers(-(2**62), -1)))


def put_an_index_beyond_the_images(state, draw):
    beyond = draw(st.integers(NUM_IMAGES, 2**62))
    set_one(state, draw(st.sampled_from(INDEXES)), draw, beyond)


def repeat_an_index(state, draw):
    key = draw(st.sampled_from(INDEXES))
    state[key] = state[key].clone()
    places = st.integers(0, len(state[key]) - 1)
    a, b = draw(st.tuples(places, places).filter(lambda pair: pair[0] != pair[1]))
    state[key][a] = state[key][b]


def label_an_image_twice(state, draw):
    place = draw(st.integers(0, NUM_LABELED - 1))
    set_one(state, "pseudo_indexes", draw, state["labeled_indexes"][place])


def put_a_label_that_is_no_class(state, draw):
    outside = st.integers(-(2**62), -1) | st.integers(NUM_CLASSES, 2**62)
    set_one(state, "pseudo_labels", draw, draw(outside))


def label_more_or_fewer(state, draw):
    state["labeled_indexes"] = state["labeled_indexes"][: draw(st.integers(0, NUM_LABELED - 1))]


def put_a_probability_that_is_none(state, draw):
    nothing = st.sampled_from([math.nan, math.inf, -math.inf, -0.5, 1.5, 100.0])
    set_one(state, "pseudo_probs", draw, draw(nothing))


def choose_an_unlikely_label(state, draw):
    probs, labels = state["pseudo_probs"], state["pseudo_labels"].clone()
    row = draw(st.integers(0, len(labels) - 1))
    second = float(probs[row].topk(2).values[1])
    if float(probs[row].max()) - second > 0.01:
        labels[row] = int(probs[row].argmin())
    else:  # a tie: nothing wrong with either label
        labels[row] = NUM_CLASSES
    state["pseudo_labels"] = labels


def put_a_weight_that_is_none(state, draw):
    nothing = st.sampled_from([math.nan, math.inf, -math.inf]) | st.floats(1.01, 1e30)
    set_one(state, "pseudo_weights", draw, draw(nothing | st.floats(-1e30, -0.01)))


def let_the_weights_rise(state, draw):
    weights = state["pseudo_weights"].clone()
    place = draw(st.integers(1, len(weights) - 1))
    weights[:place], weights[place:] = weights[:place] * 0.4, 0.9
    state["pseudo_weights"] = weights


def come_from_elsewhere(state, draw):
    other = st.text(max_size=8).filter(lambda text: text not in ("", "aa11"))
    names = st.permutations(CLASSES).filter(lambda order: order != CLASSES)
    meta = draw(other.map(lambda text: {"data_digest": text}) | names.map(lambda c: {"classes": c}))
    state["meta"] = meta


DAMAGE = [
    *(lose_a_key, change_the_type, change_the_length, put_a_negative_index, repeat_an_index),
    *(put_an_index_beyond_the_images, label_an_image_twice, put_a_label_that_is_no_class),
    *(label_more_or_fewer, put_a_probability_that_is_none, choose_an_unlikely_label),
    *(put_a_weight_that_is_none, let_the_weights_rise, come_from_elsewhere),
]


@pytest.mark.slow
def test_a_thousand_damaged_files_of_fourteen_kinds_are_all_refused(tmp_path_factory):
    folder, refused = tmp_path_factory.mktemp("files"), dict.fromkeys(DAMAGE, 0)
    assert len(refused) == 14

    @settings(max_examples=1000, deadline=None, derandomize=True)
    @given(data=st.data(), seed=st.integers(0, 10**6))
    def check(data, seed):
        state, damage = good_state(seed), data.draw(st.sampled_from(DAMAGE))
        damage(state, data.draw)
        with pytest.raises(ValueError, match=r"\w"):
            read(folder, state)
        refused[damage] += 1

    check()
    assert sum(refused.values()) >= 1000
    assert min(refused.values()) >= 20, refused
    print(f"{sum(refused.values())} files of {len(refused)} kinds, all refused")


def test_message_names_the_file_and_every_problem(tmp_path):
    state = good_state()
    for name in ("negative label", "NaN weight", "labeled and pseudo-labeled"):
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
    state["meta"] = {}
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
    assert loaded["meta"] == {"data_digest": "aa11", "classes": CLASSES}


def test_file_without_weights_takes_the_largest_probability(tmp_path):
    order = torch.arange(NUM_IMAGES)
    scores = torch.rand(NUM_IMAGES, NUM_CLASSES)
    split = Split(order[:NUM_LABELED], order[NUM_LABELED:])
    pseudo = from_scores(scores, split, confidence="largest")
    state = pseudo.state()
    del state["pseudo_weights"]
    assert torch.equal(read(tmp_path, state).confidence, pseudo.confidence)


def test_file_with_nothing_left_to_label_is_fine(tmp_path):
    none = torch.empty(0, dtype=torch.int64)
    pseudo = from_scores(torch.rand(NUM_LABELED, NUM_CLASSES), Split(torch.arange(8), none))
    pseudo = read(tmp_path, pseudo.state())
    assert len(chosen(pseudo, 1.0)) == len(chosen(pseudo, 1.0, class_balanced=True)) == 0


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
    split = Split(torch.tensor([3]), torch.tensor([4, 2, 1, 0]))
    pseudo = from_scores(probs.log(), split, confidence="largest")
    assert pseudo.indexes.tolist() == [1, 4, 2, 0]
    assert pseudo.labels.tolist() == [1, 1, 0, 0]
    torch.testing.assert_close(pseudo.probabilities, probs[pseudo.indexes])
    torch.testing.assert_close(pseudo.confidence, torch.tensor([0.9, 0.6, 0.6, 0.6]))
    assert pseudo.unlabeled.tolist() == [4, 2, 1, 0]


def test_many_ties_keep_their_order_too():
    unlabeled = torch.randperm(5000, generator=torch.Generator().manual_seed(0)) + 1
    pseudo = from_scores(torch.full((5001, 2), 0.5), Split(torch.tensor([0]), unlabeled))
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


def chosen(pseudo, ratio, **choice):
    """The positions that are chosen of one ranking."""
    return pseudo_labels.most_confident([pseudo], ratio, **choice)[0]


@settings(max_examples=60, deadline=None)
@given(labels=st.lists(st.integers(0, 4), max_size=60), percent=st.integers(0, 100))
def test_class_balanced_selection_equals_the_naive_loop(labels, percent):
    expected = []
    for label in range(5):
        members = [i for i, c in enumerate(labels) if c == label]
        expected += members[: -(-percent * len(members) // 100)]
    found = chosen(with_labels(labels), percent / 100, class_balanced=True)
    assert found.tolist() == sorted(expected)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 400), percent=st.integers(0, 100))
def test_selection_takes_the_share_that_was_asked_for_as_published(count, percent):
    found = chosen(with_labels([0] * count), percent / 100)
    assert found.tolist() == list(range(count))[: int(count * (percent / 100))]
    assert percent * count // 100 - len(found) in (0, 1)


@pytest.mark.parametrize(("ratio", "exact"), [(0.29, 29), (0.57, 57), (0.58, 58)])
def test_a_share_is_rounded_down_as_the_published_product_is(ratio, exact):
    pseudo = with_labels([0] * 100)
    assert len(chosen(pseudo, ratio)) == int(100 * ratio) == exact - 1


def test_binary_rounding_of_a_ratio_takes_none_too_many_of_a_class():
    assert len(chosen(with_labels([0] * 100), 0.07, class_balanced=True)) == 7  # 0.07 * 100 > 7


@pytest.mark.parametrize(
    ("num_labeled", "ratio", "of_each"),
    [(13_000, 0.1, 12_681), (26_000, 0.2, 25_103), (51_000, 0.5, 61_508)],
)
def test_imagenet_chunks_give_the_published_number_each(num_labeled, ratio, of_each):
    unlabeled = torch.arange(1_281_167 - num_labeled)
    chunks = [
        PseudoLabels(
            part,
            torch.zeros_like(part),
            torch.ones(len(part)),
            torch.arange(len(unlabeled), 1_281_167),
            part,
        )
        for part in unlabeled.chunk(10)
    ]
    assert int(len(unlabeled) * ratio / 10) == of_each
    found = pseudo_labels.most_confident(chunks, ratio)
    assert [len(positions) for positions in found] == [of_each] * 10


def test_a_chunk_smaller_than_its_share_gives_all_that_it_has():
    rankings = [with_labels([0] * 2), with_labels([0] * 10)]
    found = pseudo_labels.most_confident(rankings, 0.5)
    assert [positions.tolist() for positions in found] == [[0, 1], [0, 1, 2]]


def test_balanced_selection_leaves_no_class_out():
    pseudo = with_labels([0] * 50 + [1] * 3 + [2])
    assert set(pseudo.labels[chosen(pseudo, 0.1)].tolist()) == {0}
    assert pseudo.labels[chosen(pseudo, 0.1, class_balanced=True)].tolist() == [0] * 5 + [1, 2]
    assert len(chosen(pseudo, 0.0, class_balanced=True)) == 0
    assert len(chosen(pseudo, 1.0, class_balanced=True)) == 54


@pytest.mark.parametrize("ratio", [-0.1, 1.1, math.nan, math.inf])
def test_ratio_outside_of_0_to_1_is_refused(ratio):
    for class_balanced in (False, True):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            chosen(with_labels([0, 1]), ratio, class_balanced=class_balanced)


def chunks(folder, sizes, seed=0, num_chunks=None):
    """`sizes[i]` pseudo-labeled images in chunk i, all with the labeled images 0 ... 3."""
    parts, first = [], 4
    generator = torch.Generator().manual_seed(seed)
    for number, size in enumerate(sizes):
        members = torch.arange(first, first + size)
        first += size
        weights = torch.rand(size, generator=generator).sort(descending=True).values
        labels = torch.randint(0, 4, (size,), generator=generator)
        meta = {"data_digest": "aa11"}
        part = PseudoLabels(members, labels, weights, torch.arange(4), members, meta=meta)
        pseudo_files.save(part, folder / f"{num_chunks or len(sizes)}_{number}.pth.tar")
        parts.append(part)
    return parts


def test_chunks_are_read_in_the_order_of_their_numbers(tmp_path):
    written = chunks(tmp_path, range(1, 13))  # twelve: the names sort 10, 11 before 2
    (tmp_path / "curve.png").touch()  # pictures and notes may lie beside them
    read_back = pseudo_files.load_chunks(tmp_path)
    assert [len(part.indexes) for part in read_back] == list(range(1, 13))
    for one, other in zip(written, read_back, strict=True):
        assert torch.equal(one.indexes, other.indexes)


def other_labels(folder):
    state = checkpoint.load_dict(folder / "3_1.pth.tar")
    state["labeled_indexes"] = torch.arange(1, 4)
    checkpoint.save(state, folder / "3_1.pth.tar")


def test_chunks_may_list_their_labeled_images_in_any_order(tmp_path):
    parts = chunks(tmp_path, [2, 3])
    turned = replace(parts[1], labeled=parts[1].labeled.flip(0))
    pseudo_files.save(turned, tmp_path / "2_1.pth.tar")
    merged = pseudo_labels.merged(pseudo_files.load_chunks(tmp_path))
    assert sorted(merged.indexes.tolist()) == [4, 5, 6, 7, 8]
    with pytest.raises(ValueError, match="different sets of labeled images"):
        pseudo_labels.merged([parts[0], replace(parts[1], labeled=torch.arange(3))])


def other_data(folder):
    state = checkpoint.load_dict(folder / "3_2.pth.tar")
    checkpoint.save(state | {"meta": {"data_digest": "bb22"}}, folder / "3_2.pth.tar")


CHUNK_FAULTS = {
    "one is missing": (
        lambda f: (f / "3_1.pth.tar").unlink(),
        r"the 3 chunks of one set .*: 1 missing \(3_1.pth.tar\)$",
    ),
    "one of another set": (
        lambda f: (f / "3_1.pth.tar").rename(f / "10_1.pth.tar"),
        r"1 missing \(3_1.pth.tar\) and 1 that do not belong to it \(10_1.pth.tar\)",
    ),
    "a whole other set too": (
        lambda f: chunks(f, [2, 2]),
        r"2 that do not belong to it \(2_0.pth.tar, 2_1.pth.tar\)",
    ),
    "a number too large": (
        lambda f: (f / "3_0.pth.tar").rename(f / "3_3.pth.tar"),
        r"1 missing \(3_0.pth.tar\) and 1 that do not belong to it \(3_3.pth.tar\)",
    ),
    "another file": (
        lambda f: (f / "250.pth.tar").touch(),
        r"1 that do not belong to it \(250.pth.tar\)",
    ),
    "a second name for one number": (
        lambda f: (f / "3_01.pth.tar").touch(),
        r"1 that do not belong to it \(3_01.pth.tar\)",
    ),
    "other labeled images": (
        other_labels,
        r"3_1.pth.tar made with other labeled images than 3_0",
    ),
    "another data set": (other_data, r"3_2.pth.tar made with another data set than 3_0.pth.tar"),
    "a damaged one": (lambda f: (f / "3_2.pth.tar").write_bytes(b"x"), r"3_2.pth.tar"),
}


@pytest.mark.parametrize("fault", CHUNK_FAULTS)
def test_a_folder_that_is_not_one_whole_set_is_refused_with_what_is_wrong(tmp_path, fault):
    chunks(tmp_path, [3, 3, 3])
    damage, words = CHUNK_FAULTS[fault]
    damage(tmp_path)
    with pytest.raises(ValueError, match=words) as caught:
        pseudo_files.load_chunks(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_folder_without_chunks_or_none_at_all_is_refused(tmp_path):
    (tmp_path / "250.pth.tar").touch()
    with pytest.raises(ValueError, match=r"no chunks such as 10_0.*: 250\.pth\.tar"):
        pseudo_files.load_chunks(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        pseudo_files.load_chunks(tmp_path / "250.pth.tar")


def test_a_name_that_claims_a_billion_chunks_costs_nothing(tmp_path):
    (tmp_path / "1000000000_0.pth.tar").touch()
    with pytest.raises(ValueError, match=r"999999999 missing \(1000000000_1.pth.tar, .* \.\.\.\)"):
        pseudo_files.load_chunks(tmp_path)


class _Largest(TorchDispatchMode):
    """Counts the numbers of the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        parts = made if isinstance(made, tuple | list) else (made,)
        sizes = [part.numel() for part in parts if isinstance(part, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return made


@pytest.mark.parametrize("measure", confidence.CONFIDENCES)
def test_pseudo_labels_without_probabilities_never_hold_those_of_all_images(measure, monkeypatch):
    scores = 3 * torch.randn(400, 50)
    order = torch.randperm(400)
    words = (scores, Split(order[:50], order[50:]))
    whole = from_scores(*words, temperature=0.7, confidence=measure)
    monkeypatch.setattr(confidence, "TILE", 33 * 50)
    with _Largest() as largest:
        tiled = from_scores(*words, temperature=0.7, confidence=measure, probabilities=False)
    assert largest.numel <= 350 * pseudo_labels.TOP  # 17,500 with the probabilities
    assert tiled.probabilities is None
    for name in ("indexes", "labels", "confidence", "top_classes"):
        assert torch.equal(getattr(tiled, name), getattr(whole, name)), name
    assert torch.equal(whole.top_classes, whole.probabilities.topk(5).indices.int())
    again = from_scores(*words, temperature=0.7, confidence=measure)
    assert torch.equal(again.probabilities, whole.probabilities)
    assert torch.equal(whole.probabilities, (scores / 0.7).softmax(dim=1)[whole.indexes])
