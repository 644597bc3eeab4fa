"""Weighted nearest neighbors against loops."""

import math

import pytest
import torch
from conftest import blobs
from hypothesis import given, settings
from hypothesis import strategies as st

import lib.graph.knn
from lib.graph.knn import classify, top_k_accuracy
from lib.propagation.knn import knn_probabilities


def naive_votes(query, bank, labels, num_classes, k, temperature=0.1):
    near = sorted(((float(query @ row), int(c)) for row, c in zip(bank, labels, strict=True)))
    votes = [0.0] * num_classes
    for cosine, label in near[::-1][:k]:
        votes[label] += math.exp(cosine / temperature)
    return [v / sum(votes) for v in votes]


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6), k=st.integers(1, 40), temperature=st.sampled_from([0.07, 0.1, 1.0])
)
def test_votes_equal_the_naive_loop(seed, k, temperature):
    features, targets = blobs(4, 12, spread=0.6, seed=seed)
    queries, bank, labels = features[:10], features[10:], targets[10:]
    votes = classify(queries, bank, labels, 4, k=k, temperature=temperature)
    expected = [naive_votes(q, bank, labels, 4, k, temperature) for q in queries]
    torch.testing.assert_close(votes, torch.tensor(expected), atol=1e-5, rtol=1e-4)


def test_rows_with_an_unknown_label_have_no_vote():
    features, targets = blobs(3, 20)
    queries, bank, labels = features[:9], features[9:], targets[9:].clone()
    labels[::2] = -1
    known = labels >= 0
    assert torch.equal(
        classify(queries, bank, labels, 3, k=15),
        classify(queries, bank[known], labels[known], 3, k=15),
    )


def test_fewer_images_than_neighbors_all_vote():
    features, targets = blobs(2, 10)
    votes = classify(features[:5], features[5:], targets[5:], 2, k=200)
    expected = [naive_votes(q, features[5:], targets[5:], 2, 15) for q in features[:5]]
    torch.testing.assert_close(votes, torch.tensor(expected), atol=1e-5, rtol=1e-4)


def test_small_temperature_does_not_overflow():
    features, targets = blobs(3, 20)
    votes = classify(features[:9], features[9:], targets[9:], 3, k=20, temperature=1e-3)
    nearest = (features[:9] @ features[9:].T).argmax(dim=1)
    assert torch.isfinite(votes).all()
    assert torch.equal(votes.argmax(dim=1), targets[9:][nearest])


def test_block_size_changes_nothing(monkeypatch):
    features, targets = blobs(3, 20)
    labeled = torch.arange(0, 60, 2)
    whole = knn_probabilities(features, labeled, targets[labeled], 3, k=7)
    monkeypatch.setattr(lib.graph.knn, "BLOCK_BYTES", 4 * len(labeled) * 4)
    blocks = knn_probabilities(features, labeled, targets[labeled], 3, k=7)
    torch.testing.assert_close(blocks, whole)


def test_second_call_does_not_use_the_labels_of_the_first():
    # the released code cached the labels in a module global
    features, targets = blobs(2, 10)
    first = classify(features[:5], features[5:], targets[5:], 2)
    second = classify(features[:5], features[5:], 1 - targets[5:], 2)
    torch.testing.assert_close(second, first.flip(1))


def test_labeled_image_has_no_vote_on_itself():
    features, targets = blobs(3, 12, spread=0.6)
    labeled = torch.tensor([30, 2, 17, 9, 21, 4, 33, 8, 25, 11])
    scores = knn_probabilities(features, labeled, targets[labeled], 3, k=4)
    for i in range(36):
        voters = labeled[labeled != i]
        expected = naive_votes(features[i], features[voters], targets[voters], 3, 4)
        torch.testing.assert_close(scores[i], torch.tensor(expected), atol=1e-5, rtol=1e-4)


def test_excluded_image_leaves_no_vote_even_where_all_others_vote_too():
    # a similarity of 0 in place of exclusion would still vote, and win over the opposite ones
    features = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    scores = knn_probabilities(features, torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]), 2)
    assert scores[0].tolist() == [0, 1]


def test_the_only_labeled_image_is_uniform_and_labels_all_others():
    features, _ = blobs(2, 4)
    scores = knn_probabilities(features, torch.tensor([3]), torch.tensor([1]), 2)
    assert scores[3].tolist() == [0.5, 0.5]
    assert scores[torch.arange(8) != 3].tolist() == [[0, 1]] * 7


def test_class_without_a_label_gets_no_votes():
    features, targets = blobs(3, 20)
    labeled = (targets != 1).nonzero()[:10, 0]
    scores = knn_probabilities(features, labeled, targets[labeled], 3)
    assert (scores[:, 1] == 0).all()
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(60))


def test_propagation_uses_at_most_200_neighbors():
    features, _ = blobs(2, 150, spread=2.0)
    labeled = torch.arange(299)
    labels = torch.arange(299) % 2
    scores = knn_probabilities(features, labeled, labels, 2)[299]
    expected = naive_votes(features[299], features[:299], labels, 2, 200)
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert scores.tolist() != naive_votes(features[299], features[:299], labels, 2, 299)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0}, "k 0 and temperature 0.1"),
        ({"temperature": 0.0}, "must be positive"),
        ({"temperature": math.nan}, "must be positive"),
        ({"labels": torch.tensor([0, 3])}, r"labels must lie in 0 \.\.\. 2"),
        ({"labels": torch.tensor([0, -1])}, r"labels must lie in 0 \.\.\. 2"),
        ({"labeled": torch.tensor([1, 1])}, "named twice"),
        ({"labeled": torch.tensor([1, 60])}, r"must lie in 0 \.\.\. 59"),
    ],
)
def test_impossible_propagation_says_why(options, words):
    features, _ = blobs(3, 20)
    call = {"labeled": torch.tensor([1, 5]), "labels": torch.tensor([0, 1])} | options
    with pytest.raises(ValueError, match=words):
        knn_probabilities(features, num_classes=3, **call)


def test_bank_without_any_label_is_refused():
    with pytest.raises(ValueError, match="at least one labeled image"):
        classify(torch.ones(1, 2), torch.ones(3, 2), torch.full((3,), -1), 2)


def test_top_5_is_not_top_2():
    scores = torch.tensor([[6.0, 5, 4, 3, 2, 1]]).repeat(6, 1)
    accuracies = top_k_accuracy(scores, torch.arange(6), (1, 2, 5))
    assert accuracies == pytest.approx([100 / 6, 200 / 6, 500 / 6])


def test_top_k_accuracy_equals_the_naive_loop_on_a_non_contiguous_matrix():
    scores = torch.rand(7, 40, generator=torch.Generator().manual_seed(0)).T
    targets = torch.arange(40) % 7
    assert not scores.is_contiguous()
    for k, accuracy in zip((1, 3, 5), top_k_accuracy(scores, targets, (1, 3, 5)), strict=True):
        hits = [
            int(t) in sorted(range(7), key=row.__getitem__)[-k:]
            for row, t in zip(scores.tolist(), targets, strict=True)
        ]
        assert accuracy == pytest.approx(100 * sum(hits) / 40)


def test_top_5_of_three_classes_is_all_of_them():
    assert top_k_accuracy(torch.rand(6, 3), torch.arange(6) % 3)[1] == 100


def test_accuracies_of_votes_and_of_the_nearest_image_equal_the_naive_count():
    features, targets = blobs(7, 30, spread=0.9)
    queries, bank, labels = features[:103], features[103:], targets[103:].clone()
    labels[::5] = -1
    known = [i for i, label in enumerate(labels.tolist()) if label >= 0]
    wanted, hits = targets[:103].clone(), {"top1": 0, "top5": 0, "nearest": 0}
    wanted[3], counted = -1, 0
    for query, target in zip(queries, wanted.tolist(), strict=True):
        if target < 0:
            continue
        counted += 1
        order = sorted(known, key=lambda i, query=query: -float(query @ bank[i]))
        votes = naive_votes(query, bank[known], labels[known], 7, 60)
        best = sorted(range(7), key=lambda c, votes=votes: -votes[c])
        hits["top1"] += best[0] == target
        hits["top5"] += target in best[:5]
        hits["nearest"] += int(labels[order[0]]) == target
    found = lib.graph.knn.accuracy(queries, wanted, bank, labels, 7, k=60)
    assert found == pytest.approx({name: 100 * count / counted for name, count in hits.items()})
    assert found["nearest"] != found["top1"] != found["top5"]


def test_an_accuracy_needs_labeled_images_to_measure_on():
    features, targets = blobs(2, 5)
    with pytest.raises(ValueError, match="no labeled image"):
        lib.graph.knn.accuracy(features, torch.full((10,), -1), features, targets, 2)
