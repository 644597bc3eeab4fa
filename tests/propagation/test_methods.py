"""Every algorithm against its dense formula, and what all of them promise."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse as sp
import torch
from conftest import blobs
from graphs import (
    alone,
    build_graph,
    graph_of,
    graph_operator,
    laplacian_spectrum,
    normalized_cut,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import lib.propagation.embedding_graph
import lib.propagation.normalized_cut
from lib.graph.sparse import to_scipy
from lib.labels.confidence import entropy_confidence, from_scores
from lib.labels.split import Split, labeled_split
from lib.propagation import METHODS, EmbeddingGraph, Labeling, propagate
from lib.propagation.algorithms import ALGORITHMS, run_algorithm
from lib.propagation.diffusion import propagate_poisson, propagate_spreading
from lib.propagation.embedding_graph import GraphCache
from lib.propagation.normalized_cut import propagate_filter
from lib.propagation.scores import NEVER, log_shares, match_prior


def spread(graph, labeled, labels, num_classes, alpha=0.99):
    return alone(propagate_spreading, graph, labeled, labels, num_classes, alpha=alpha).exp()


def learn(graph, labeled, labels, num_classes):
    return alone(propagate_poisson, graph, labeled, labels, num_classes)


def invert(graph, labeled, labels, num_classes):
    kind = {"filter": "pseudo-inverse"}
    return alone(propagate_filter, graph, labeled, labels, num_classes, **kind)


DIFFUSIONS = {"filter": invert, "spreading": spread, "poisson": learn}


def components_of_random_weights(sizes, seed):
    rng = np.random.default_rng(seed)
    blocks = [rng.uniform(0.1, 1, (m, m)) for m in sizes]
    W = scipy.linalg.block_diag(*[(b + b.T) / 2 for b in blocks])
    np.fill_diagonal(W, 0)
    return W


def task(num_classes=3, per_class=25, num_labeled=9, spread=0.4, seed=0):
    features, targets = blobs(num_classes, per_class, spread=spread, seed=seed)
    split = labeled_split(targets, num_labeled, num_classes, seed)
    return EmbeddingGraph(features, num_neighbors=10), split, targets


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), alpha=st.sampled_from([0.5, 0.9, 0.99]))
def test_spreading_equals_the_dense_formula(seed, alpha):
    W = components_of_random_weights([14], seed)
    labeled, labels = torch.tensor([3, 8, 1, 12]), torch.tensor([0, 1, 2, 1])
    scores = spread(graph_of(W), labeled, labels, 3, alpha=alpha)
    root = 1 / np.sqrt(W.sum(axis=1))
    Y = np.zeros((14, 3))
    Y[labeled, labels] = 1
    S = root[:, None] * W * root
    expected = (1 - alpha) * np.linalg.inv(np.eye(14) - alpha * S) @ Y
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(scores, expected, atol=2e-3)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), unbalanced=st.booleans())
def test_poisson_equals_the_dense_formula(seed, unbalanced):
    W = components_of_random_weights([15], seed)
    labeled = torch.tensor([3, 8, 1, 12, 5])
    labels = torch.tensor([0, 1, 2, 1, 1] if unbalanced else [0, 1, 2, 0, 1])
    scores = learn(graph_of(W), labeled, labels, 3).double().numpy()
    onehot = np.eye(3)[labels]
    source = np.zeros((15, 3))
    source[labeled] = onehot - onehot.mean(axis=0)
    degree = W.sum(axis=1)
    u = np.linalg.pinv(np.diag(degree) - W) @ source
    u -= (degree @ u) / degree.sum()  # Calder et al., equation (1): sum_i d_i u_i = 0
    expected = u / onehot.sum(axis=0)
    expected /= np.sqrt(np.mean(expected**2))
    np.testing.assert_allclose(scores, expected, atol=5e-3)


def test_poisson_does_not_depend_on_self_loops():
    features, targets = blobs(3, 20)
    labeled = labeled_split(targets, 6, 3).labeled
    W = build_graph(features, num_neighbors=8)
    kept, dropped = (graph_operator(W, self_loops=choice).product for choice in ("keep", "drop"))
    assert not torch.allclose(kept(torch.eye(60)), dropped(torch.eye(60)))
    # D - W has no self-loops; only the weights of the mean differ, which move whole columns
    one, two = (
        learn(graph_of(W, self_loops=c), labeled, targets[labeled], 3) for c in ("keep", "drop")
    )
    one, two = (z - z.mean(dim=0) for z in (one, two))
    torch.testing.assert_close(one / one.norm(), two / two.norm(), atol=2e-3, rtol=0)


@pytest.mark.parametrize("self_loops", ["published", "keep", "drop"])
def test_pseudo_inverse_filter_equals_the_normalized_cut_with_all_eigenvectors(self_loops):
    features, targets = blobs(4, 20, spread=0.35)
    labeled = labeled_split(targets, 12, 4).labeled
    W = build_graph(features, num_neighbors=8)
    spectrum = laplacian_spectrum(W, 79, self_loops=self_loops)
    assert spectrum.num_components == 1
    torch.testing.assert_close(
        invert(graph_of(W, self_loops=self_loops), labeled, targets[labeled], 4),
        normalized_cut(spectrum, labeled, targets[labeled], 4),
        atol=5e-3,
        rtol=0,
    )


@pytest.mark.parametrize("name", DIFFUSIONS)
@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 8), min_size=3, max_size=6), seed=st.integers(0, 10**6))
def test_component_with_labels_of_one_class_is_labeled_with_it(name, sizes, seed):
    rng = np.random.default_rng(seed)
    sizes = [*sizes, 4]  # the last component has no label
    W = components_of_random_weights(sizes, seed)
    first = np.cumsum([0, *sizes[:-2]])
    classes = np.array([0, 1, *rng.integers(0, 2, len(first) - 2)])
    scores = DIFFUSIONS[name](graph_of(W), torch.from_numpy(first), torch.from_numpy(classes), 2)
    assert torch.isfinite(scores).all()
    assert scores[:-4].argmax(dim=1).tolist() == np.repeat(classes, sizes[:-1]).tolist()
    assert (scores[-4:] == scores[-4:, :1]).all()


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_component_with_labels_of_two_classes_is_divided_inside(name):
    clique = np.ones((6, 6))
    W = scipy.linalg.block_diag(clique, clique, clique)
    W[5, 6] = W[6, 5] = 0.5
    labeled, labels = torch.tensor([0, 11, 12]), torch.tensor([0, 1, 1])
    scores = DIFFUSIONS[name](graph_of(W), labeled, labels, 2)
    assert scores.argmax(dim=1).tolist() == [0] * 6 + [1] * 12


@pytest.mark.filterwarnings("ignore:the graph has")
@pytest.mark.parametrize("method", [m for m in ALGORITHMS if m != "knn"])
@pytest.mark.parametrize("confidence", ["margin", "entropy"])
def test_image_that_no_label_reaches_gets_confidence_zero(method, confidence):
    W = scipy.linalg.block_diag(np.ones((5, 5)), np.ones((6, 6)), np.ones((4, 4)), 0)
    metric = graph_of(W, "published")
    split = Split(torch.tensor([0, 5]), torch.tensor([i for i in range(16) if i not in (0, 5)]))
    found = propagate(metric, method, split, torch.tensor([1, 0]), 2)
    pseudo = from_scores(found.scores, split, confidence=confidence)
    assert sorted(pseudo.indexes[pseudo.confidence < 1e-6].tolist()) == [11, 12, 13, 14, 15]
    reached = pseudo.indexes < 11
    assert (pseudo.labels == (pseudo.indexes < 5).long())[reached].all()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_solves_an_easy_task_and_makes_valid_pseudo_labels(method):
    metric, split, targets = task(spread=0.2)
    found = propagate(metric, method, split, targets[split.labeled], 3)
    pseudo = from_scores(found.scores, split, found.meta, confidence=found.confidence)
    assert (pseudo.labels == targets[pseudo.indexes]).float().mean() > 0.95
    assert pseudo.confidence.max() > pseudo.confidence.min()
    assert found.meta["method"] == method


@pytest.mark.parametrize("method", ALGORITHMS)
def test_many_label_sets_at_once_equal_one_by_one(method):
    metric, _, targets = task()
    labelings = []
    for count, seed in ((3, 0), (9, 1), (30, 2)):
        labeled = labeled_split(targets, count, 3, seed).labeled
        labelings.append(Labeling(labeled, targets[labeled]))
    together = run_algorithm(metric, method, labelings, 3)
    for labeling, one in zip(labelings, together, strict=True):
        alone = run_algorithm(metric, method, [labeling], 3)[0]
        torch.testing.assert_close(one, alone, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("knn", "nc")])
def test_permuted_images_give_the_permuted_scores(method):
    metric, split, targets = task()
    order = torch.randperm(75)
    place = torch.empty(75, dtype=torch.int64)
    place[order] = torch.arange(75)
    labels = targets[split.labeled]
    moved = Split(place[split.labeled], place[split.unlabeled])
    one = propagate(metric, method, split, labels, 3).scores
    two = propagate(
        EmbeddingGraph(metric.features[order], num_neighbors=10), method, moved, labels, 3
    )
    probabilities = one[order].softmax(dim=1), two.scores.softmax(dim=1)
    torch.testing.assert_close(*probabilities, atol=1e-2, rtol=0)


@pytest.mark.filterwarnings("ignore:the graph has")
@pytest.mark.parametrize("kind", ["constant", "pairs", "zero rows", "no noise"])
@pytest.mark.parametrize("method", METHODS)
def test_degenerate_features_give_finite_probabilities(method, kind):
    features, targets = blobs(3, 20, spread=0 if kind == "no noise" else 0.25)
    if kind == "constant":
        features = features[:1].repeat(60, 1)
    elif kind == "pairs":
        features = features[:30].repeat(2, 1)
    elif kind == "zero rows":
        features[:15] = 0
    split = labeled_split(targets, 6, 3)
    found = propagate(EmbeddingGraph(features), method, split, targets[split.labeled], 3)
    pseudo = from_scores(found.scores, split, confidence=found.confidence)
    assert torch.isfinite(pseudo.probabilities).all()
    if kind == "no noise":
        assert (pseudo.labels == targets[pseudo.indexes]).all()


def test_clamped_images_keep_their_labels_and_the_others_are_smooth():
    features, targets = blobs(3, 30, spread=0.3)
    labeled = labeled_split(targets, 15, 3).labeled
    labels = targets[labeled].clone()
    labels[0] = (labels[0] + 1) % 3  # a wrong one, whose neighbors disagree
    spectrum = laplacian_spectrum(build_graph(features, num_neighbors=10), 12)
    free = normalized_cut(spectrum, labeled, labels, 3)
    clamped = normalized_cut(spectrum, labeled, labels, 3, clamp=True)
    assert free[labeled[0]].argmax() != labels[0]
    assert torch.equal(clamped[labeled].argmax(dim=1), labels)
    assert (clamped.argmax(dim=1) == targets).float().mean() > 0.9
    assert (clamped.amax(dim=1) == 0).all()


@pytest.mark.filterwarnings("ignore:the graph has")
def test_clamping_where_no_eigenvector_reaches_a_label_is_finite():
    W = sp.csr_matrix(np.eye(4, dtype=np.float32))
    spectrum = laplacian_spectrum(W)
    scores = normalized_cut(spectrum, torch.tensor([0, 1]), torch.tensor([0, 1]), 2, clamp=True)
    assert torch.isfinite(scores).all()
    assert scores[:2].argmax(dim=1).tolist() == [0, 1]
    W = sp.csr_matrix(scipy.linalg.block_diag(np.eye(2), np.ones((3, 3))).astype(np.float32))
    scores = normalized_cut(
        laplacian_spectrum(W), torch.tensor([0, 1]), torch.tensor([0, 1]), 2, clamp=True
    )
    assert torch.isfinite(scores).all()


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    prior=st.lists(st.floats(0.5, 3), min_size=2, max_size=5),
    scale=st.sampled_from([0.01, 1.0, 100.0]),
)
def test_predicted_class_sizes_match_the_prior(seed, prior, scale):
    generator = torch.Generator().manual_seed(seed)
    classes = len(prior)
    scores = scale * torch.randn(1500, classes, generator=generator)
    scores[:, 0] += scale
    rows = torch.randperm(1500, generator=generator)[:1000]
    matched = match_prior(scores, prior, rows)
    shares = torch.bincount(matched[rows].argmax(dim=1), minlength=classes) / 1000
    torch.testing.assert_close(
        shares, torch.tensor(prior) / sum(prior), atol=0.012, rtol=0, check_dtype=False
    )
    offsets = matched - scores
    torch.testing.assert_close(
        offsets, offsets[:1].expand_as(offsets), atol=1e-4 * scale, rtol=1e-5
    )


def test_matching_a_prior_leaves_rows_without_information_alone():
    scores = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0]])
    matched = match_prior(scores, None, torch.arange(5))
    assert matched[0].tolist() == [0, 0]
    assert matched[1:].argmax(dim=1).tolist() == [1, 1, 0, 0]
    assert torch.equal(match_prior(scores[:1], None, torch.arange(1)), scores[:1])


@pytest.mark.parametrize(
    "prior", [[0.5, 0.5], [1.0, 1.0, 0.0], [1.0, 1.0, -1.0], [1.0, 1.0, math.nan]]
)
def test_impossible_prior_is_refused(prior):
    metric, split, targets = task()
    with pytest.raises(ValueError, match="class prior"):
        propagate(metric, "poisson", split, targets[split.labeled], 3, class_prior=prior)


@pytest.mark.parametrize("method", METHODS)
def test_class_prior_is_an_option_of_every_method(method):
    metric, split, targets = task(spread=0.8)
    labels, prior = targets[split.labeled], [0.6, 0.2, 0.2]
    found = propagate(metric, method, split, labels, 3, class_prior=prior)
    shares = torch.bincount(found.scores[split.unlabeled].argmax(dim=1), minlength=3) / 66
    # an ensemble averages answers that match, and matches less exactly itself
    torch.testing.assert_close(shares, torch.tensor(prior), atol=0.1, rtol=0)


def test_log_shares_keep_the_ratios_and_make_a_row_of_zeros_uniform():
    shares = log_shares(torch.tensor([[2.0, 6.0], [0.0, 0.0], [0.0, 1e-30]])).exp()
    expected = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.0, 1.0]])
    torch.testing.assert_close(shares, expected, atol=2e-6, rtol=0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 12))
def test_entropy_confidence_equals_the_formula(seed, classes):
    probs = torch.rand(6, classes, generator=torch.Generator().manual_seed(seed)).softmax(dim=1)
    for row, confidence in zip(probs.tolist(), entropy_confidence(probs.log()), strict=True):
        entropy = -sum(p * math.log(p) for p in row)
        assert float(confidence) == pytest.approx(1 - entropy / math.log(classes), abs=1e-5)


def test_entropy_confidence_is_one_for_a_certain_row_and_zero_for_a_uniform_one():
    probs = torch.tensor([[1.0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0, 0]])
    assert entropy_confidence(probs.log()).tolist() == pytest.approx([1, 0, 0.5], abs=1e-6)


def test_confidences_rank_by_their_own_measure():
    probs = torch.tensor([[0.5, 0.5, 0.0], [0.45, 0.3, 0.25], [0.2, 0.4, 0.4]])
    split = Split(torch.tensor([2]), torch.tensor([0, 1]))
    by_name = {
        name: from_scores(probs.log(), split, confidence=name)
        for name in ("largest", "margin", "entropy")
    }
    assert by_name["largest"].indexes.tolist() == [0, 1]
    assert by_name["margin"].indexes.tolist() == [1, 0]
    assert by_name["margin"].confidence.tolist() == pytest.approx([1 / 3, 0], abs=1e-6)
    assert by_name["entropy"].indexes.tolist() == [0, 1]


def test_unknown_confidence_is_refused():
    split = Split(torch.tensor([0]), torch.tensor([1]))
    with pytest.raises(ValueError, match="unknown confidence 'best': take one of margin"):
        from_scores(torch.full((2, 2), 0.5), split, confidence="best")


def test_graph_and_spectrum_are_made_once_for_all(monkeypatch):
    metric, _, targets = task()
    calls = {"graph": 0, "spectrum": 0}

    def counted(name, function):
        def wrapper(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return wrapper

    module = lib.propagation.embedding_graph
    monkeypatch.setattr(module, "nearest_neighbors", counted("graph", module.nearest_neighbors))
    monkeypatch.setattr(
        module, "laplacian_spectrum", counted("spectrum", module.laplacian_spectrum)
    )
    for count in (9, 30):
        split = labeled_split(targets, count, 3)
        for method, options in (
            ("nc", {"num_eigenvectors": 40}),
            ("nc", {"num_eigenvectors": 10}),
            ("filter", {}),
            ("poisson", {}),
        ):
            propagate(metric, method, split, targets[split.labeled], 3, **options)
    assert calls == {"graph": 1, "spectrum": 1}
    beginning = metric.spectrum(9)
    np.testing.assert_array_equal(beginning.values, metric.spectrum(39).values[:9])
    assert beginning.vectors.shape == (75, 9)


def test_a_spectrum_that_is_read_from_its_file_needs_no_product(tmp_path):
    metric, _, _ = task()
    first, second = (replace(metric, cache=GraphCache(tmp_path)) for _ in range(2))
    computed, read = first.spectrum(9), second.spectrum(9)
    np.testing.assert_array_equal(read.vectors, computed.vectors)
    assert "product" in vars(first)
    assert "product" not in vars(second)


def test_a_filter_through_eigenvectors_is_chosen_only_where_it_is_cheap_and_exact(monkeypatch):
    metric, split, targets = task(spread=0.2)
    labels, said = targets[split.labeled], []
    metric = replace(metric, cache=GraphCache(log=said.append))

    def scores(way, **more):
        options = {"filter": "heat", "filter_by": way, **more}
        return propagate(metric, "filter", split, labels, 3, **options).scores

    products = scores("products")
    through_few = scores("eigenvectors", time=0.5, num_eigenvectors=4)
    assert (scores("products", time=0.5) - through_few).abs().max() > 0.1  # it is another answer
    assert torch.equal(scores("auto", num_eigenvectors=4), products)  # cheap with three classes
    monkeypatch.setattr(lib.propagation.normalized_cut, "SPECTRUM_PRODUCTS", 1)
    assert torch.equal(scores("auto", time=0.5, num_eigenvectors=4), scores("products", time=0.5))
    assert "by products instead" in said[-1]
    monkeypatch.setattr(lib.propagation.normalized_cut, "SPECTRUM_PRODUCTS", 0.1)
    chosen = scores("auto", num_eigenvectors=75)
    assert torch.equal(chosen, scores("eigenvectors", num_eigenvectors=75))
    torch.testing.assert_close(chosen, products, atol=2e-2, rtol=0)


def test_the_default_is_the_published_normalized_cut():
    metric, split, targets = task()
    found = propagate(metric, "nc", split, targets[split.labeled], 3)
    spectrum = laplacian_spectrum(to_scipy(metric.affinity), 199)
    expected = normalized_cut(spectrum, split.labeled, targets[split.labeled], 3)
    assert torch.equal(found.scores, expected)
    assert found.confidence == "margin"


@pytest.mark.parametrize(
    ("method", "parameters", "words"),
    [
        ("magic", {}, "unknown method 'magic': take one of knn, nc"),
        ("poisson", {"alpha": 0.9}, "poisson has no parameter alpha"),
        ("auto", {"alpha": 0.9}, "auto has no parameter alpha"),
        ("filter", {"filter_by": "magic"}, "unknown way 'magic' to filter: take one of auto"),
        ("filter", {"num_eigenvectors": 1}, "give 2 at least"),
        ("nc", {"num_eigenvectors": 1}, "give 2 at least"),
        ("filter", {"filter": "none"}, "unknown filter 'none'"),
        ("spreading", {"alpha": 1.5}, "between 0 and 1"),
    ],
)
def test_impossible_method_says_why(method, parameters, words):
    metric, split, targets = task()
    with pytest.raises(ValueError, match=words):
        propagate(metric, method, split, targets[split.labeled], 3, **parameters)


@pytest.mark.parametrize("method", ["nc", "filter", "poisson"])
def test_a_class_without_a_label_is_named(method):
    metric, split, targets = task()
    some = split.labeled[targets[split.labeled] != 1]
    with pytest.raises(ValueError, match=r"none of class \[1\]"):
        ALGORITHMS[method].propagate(metric, [Labeling(some, targets[some])], 3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prior", [None, "uniform"])
def test_a_class_without_a_label_leaves_the_others_as_if_it_were_not_there(method, prior):
    metric, split, targets = task(num_classes=4, num_labeled=24)
    some = split.labeled[targets[split.labeled] != 1]
    given, others = Split(some, split.unlabeled), torch.tensor([0, 2, 3])
    compact = torch.searchsorted(others, targets[some])
    priors = [[1 / c] * c if prior else None for c in (4, 3)]
    found = propagate(metric, method, given, targets[some], 4, class_prior=priors[0])
    alone = propagate(metric, method, given, compact, 3, class_prior=priors[1])
    torch.testing.assert_close(found.scores[:, others].softmax(1), alone.scores.softmax(1))
    pseudo = found.pseudo_labels(given)
    assert (pseudo.probabilities[:, 1] < 1e-5).all()
    assert set(pseudo.labels.tolist()) == set(others.tolist())


def test_labelings_of_different_classes_are_run_one_by_one():
    metric, split, targets = task(num_classes=4, num_labeled=24)
    parts = [split.labeled[targets[split.labeled] != label] for label in (0, 3)]
    labelings = [Labeling(x, targets[x]) for x in (split.labeled, *parts)]
    together = run_algorithm(metric, "nc", labelings, 4)
    for one, scores in zip(labelings, together, strict=True):
        assert torch.equal(run_algorithm(metric, "nc", [one], 4)[0], scores)
        assert (scores == NEVER).all(dim=0).sum() == 4 - len(one.labels.unique())


def test_spreading_of_a_class_without_a_label_gives_it_to_nobody():
    metric, split, targets = task()
    some = targets[split.labeled] != 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = spread(metric, split.labeled[some], targets[split.labeled][some], 3)
    assert (scores[:, 1] < 2e-6).all()


@pytest.mark.parametrize("method", ["nc", "poisson", "filter"])
def test_large_graphs_are_multiplied_in_an_order_of_their_own_with_the_same_answer(
    method, monkeypatch
):
    features, targets = blobs(4, 60)
    split = labeled_split(targets, 8, 4)
    plain = propagate(EmbeddingGraph(features), method, split, targets[split.labeled], 4)
    monkeypatch.setattr(lib.propagation.embedding_graph, "SORTED_FROM", 100)
    asked = []
    near_order = lib.propagation.embedding_graph.near_order
    monkeypatch.setattr(
        lib.propagation.embedding_graph, "near_order", lambda *a: asked.append(1) or near_order(*a)
    )
    ordered = propagate(EmbeddingGraph(features), method, split, targets[split.labeled], 4)
    assert asked
    torch.testing.assert_close(ordered.scores, plain.scores, atol=2e-3, rtol=1e-3)
