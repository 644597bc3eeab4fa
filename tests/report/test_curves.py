"""Precision over confidence against loops."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.labels.confidence import from_scores
from lib.labels.pseudo_labels import PseudoLabels, merged
from lib.labels.split import Split
from lib.report.curves import (
    Curve,
    Reliability,
    accuracy_coverage,
    reliability,
    summary,
    top_k_hits,
)


def pseudo_of(labels, num_labeled=2):
    """Pseudo-labels of images 2, 3, 4 ... in this order."""
    n = len(labels)
    indexes = torch.arange(num_labeled, num_labeled + n)
    confidence = torch.linspace(1, 0, n) if n > 1 else torch.ones(n)
    return PseudoLabels(
        indexes,
        torch.tensor(labels, dtype=torch.int64),
        confidence,
        torch.arange(num_labeled),
        indexes,
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 2)), min_size=1, max_size=30))
def test_curve_equals_the_naive_loop(pairs):
    labels, true = zip(*pairs, strict=True)
    curve = accuracy_coverage(pseudo_of(list(labels)), torch.tensor([0, 1, *true]))
    known = [(a, b) for a, b in pairs if b != -1]
    if not known:
        assert curve is None
        return
    precision, right = [], 0
    for k, (label, target) in enumerate(known, start=1):
        right += label == target
        precision.append(right / k)
    assert curve.precision.tolist() == pytest.approx(precision)
    assert curve.coverage.tolist() == pytest.approx(
        [k / len(known) for k in range(1, len(known) + 1)]
    )
    assert curve.overall == pytest.approx(100 * right / len(known))
    assert curve.auc == pytest.approx(100 * sum(precision) / len(precision))


def test_targets_are_looked_up_by_index_and_not_by_position():
    pseudo = PseudoLabels(
        torch.tensor([4, 1]),
        torch.tensor([1, 0]),
        torch.tensor([0.9, 0.5]),
        torch.tensor([0]),
        torch.tensor([1, 4]),
    )
    curve = accuracy_coverage(pseudo, torch.tensor([1, 0, 0, 0, 1]))
    assert curve.precision.tolist() == [1, 1]
    assert curve.auc == 100


def test_images_with_unknown_targets_count_neither_way():
    curve = accuracy_coverage(pseudo_of([0, 1, 1]), torch.tensor([0, 1, 0, -1, 0]))
    assert curve.precision.tolist() == [1, 0.5]


def test_no_known_target_gives_no_curve():
    assert accuracy_coverage(pseudo_of([0, 1]), torch.tensor([0, 1, -1, -1])) is None
    assert accuracy_coverage(pseudo_of([]), torch.tensor([0, 1])) is None


def published_auc(probabilities, correct):
    """AUC of the published notebook nc in percent: the ranking is that of exp(-entropy), falling."""
    entropy = -(probabilities * torch.log(probabilities + 1e-7)).sum(dim=1)
    confidence = torch.exp(-entropy)
    right, shares = 0, []
    for k, i in enumerate(sorted(range(len(correct)), key=lambda i: -confidence[i]), start=1):
        right += int(correct[i])
        shares.append(right / k)
    return 100 * sum(shares) / len(shares)


@pytest.mark.parametrize("confidence", ["margin", "largest", "entropy"])
def test_auc_by_entropy_is_the_published_one_whatever_the_confidence(confidence):
    rng = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(300, 5, generator=rng).double()
    true = torch.multinomial(scores.softmax(dim=1), 1, generator=rng)[:, 0]
    true[::7] = -1
    split = Split(torch.arange(10), torch.arange(10, 300))
    pseudo = from_scores(scores, split, confidence=confidence)
    known = true[pseudo.indexes] != -1
    probabilities = scores.softmax(dim=1)[pseudo.indexes][known]
    expected = published_auc(probabilities, (pseudo.labels == true[pseudo.indexes])[known])
    curve = accuracy_coverage(pseudo, true)
    assert curve.auc_by_entropy == pytest.approx(expected, abs=1e-9)
    assert curve.precision_by_entropy[-1] == curve.precision[-1]
    assert (curve.auc == pytest.approx(curve.auc_by_entropy)) == (confidence == "entropy")
    # a file holds the probabilities alone, a large run only the entropy, and chunks are put together
    from_file = replace(pseudo, entropy=None)
    assert accuracy_coverage(from_file, true).auc_by_entropy == pytest.approx(expected, abs=1e-9)
    halves = [Split(split.labeled, part) for part in split.unlabeled.split(145)]
    parts = [
        from_scores(scores, half, confidence=confidence, probabilities=False) for half in halves
    ]
    whole = accuracy_coverage(merged(parts), true)
    assert whole.auc_by_entropy == pytest.approx(expected, abs=1e-9)
    neither = accuracy_coverage(replace(pseudo, entropy=None, probabilities=None), true)
    assert neither.figures()[2] == "?"


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.booleans()), min_size=1, max_size=40),
    st.sampled_from([1, 4, 15]),
)
def test_calibration_error_equals_the_naive_loop(pairs, bins):
    # multiples of 1/60: many lie on the border of two bins, and belong to the lower one
    probability = torch.tensor([p / 60 for p, _ in pairs], dtype=torch.float64)
    correct = torch.tensor([float(right) for _, right in pairs])
    found, error = reliability(probability, correct, bins), 0.0
    for place in range(bins):
        own = [
            (p, r) for p, r in pairs if 60 * place < bins * p <= 60 * (place + 1) or p == place == 0
        ]
        assert int(found.count[place]) == len(own)
        if own:
            mean, share = sum(p for p, _ in own) / 60 / len(own), sum(r for _, r in own) / len(own)
            assert float(found.probability[place]) == pytest.approx(mean)
            assert float(found.accuracy[place]) == pytest.approx(share)
            error += len(own) / len(pairs) * abs(mean - share)
    assert found.error == pytest.approx(100 * error, abs=1e-6)


def test_errors_are_those_of_published_and_calibrated_probabilities_from_memory_file_and_chunks():
    rng = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4000, 5, generator=rng)
    true = torch.multinomial(logits.softmax(dim=1), 1, generator=rng)[:, 0]
    true[::7] = -1
    split, words = Split(torch.arange(10), torch.arange(10, 4000)), {"calibration": 3.0}
    pseudo = from_scores(3 * logits, split, words, **words)
    curve = accuracy_coverage(pseudo, true)
    known = torch.arange(4000)[10:][true[10:] != -1]
    right = (logits.argmax(dim=1) == true)[known]
    expected = [reliability((s * logits).softmax(1).amax(1)[known], right).error for s in (3, 1)]
    assert [curve.published.error, curve.calibrated.error] == pytest.approx(expected, abs=1e-3)
    assert expected[0] > 15
    assert expected[1] < 3  # the labels were drawn from these very probabilities
    from_file = accuracy_coverage(replace(pseudo, entropy=None, largest=None), true)
    assert from_file.errors() == curve.errors()
    assert from_file.auc_by_entropy == pytest.approx(curve.auc_by_entropy, abs=1e-3)
    parts = [
        from_scores(3 * logits, Split(split.labeled, part), probabilities=False, **words)
        for part in split.unlabeled.split(1500)
    ]
    assert accuracy_coverage(merged(parts), true).errors() == curve.errors()
    bare = replace(pseudo, entropy=None, largest=None, probabilities=None)
    assert accuracy_coverage(bare, true).errors() == ["?", "?"]


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_top_k_hits_equal_the_naive_ranking(k):
    probabilities = torch.rand(40, 6, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    true = torch.randint(-1, 6, (40,), generator=torch.Generator().manual_seed(1))
    split = Split(torch.empty(0).long(), torch.arange(40))
    pseudo = from_scores(probabilities.log(), split)
    expected = []
    for i in pseudo.indexes.tolist():
        ranking = sorted(range(6), key=lambda c: -probabilities[i, c])
        if true[i] != -1:
            expected.append(int(true[i]) in ranking[:k])
    assert top_k_hits(pseudo, true, k).tolist() == expected


def test_summary_shows_top_5_where_it_is_known():
    half = Curve(torch.tensor([0.5, 1.0]), torch.tensor([1.0, 0.5]), torch.tensor([0.0, 0.5]))
    heads, row = summary({50: half}, {50: torch.tensor([True, True, False])}).splitlines()
    assert heads.endswith("top-5 precision")
    assert row.split() == ["50", "50.00%", "75.00%", "25.00%", "66.67%"]


def test_summary_ends_with_the_calibration_errors_where_they_are_known():
    one, none = torch.tensor([2]), torch.tensor([0.0])
    both = (Reliability(one, none, none + 0.5), Reliability(one, none, none + 0.25))
    half = Curve(torch.tensor([0.5, 1.0]), torch.tensor([1.0, 0.5]))
    curves = {50: replace(half, published=both[0], calibrated=both[1]), 250: half}
    heads, first, second = summary(curves).splitlines()
    assert heads.endswith("ECE published     ECE")
    assert len(heads) == len(first)
    assert first.split()[-2:] == ["50.00%", "25.00%"]
    assert second.split()[-2:] == ["?%", "?%"]


def test_summary_has_one_line_per_number_of_labels_in_rising_order():
    half = Curve(torch.tensor([0.5, 1.0]), torch.tensor([1.0, 0.5]))
    lines = summary({250: half, 50: half}).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["50", "50.00%", "75.00%", "?%"],
        ["250", "50.00%", "75.00%", "?%"],
    ]
