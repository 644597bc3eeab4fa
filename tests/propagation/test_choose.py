"""Choosing by cross-validation on the labeled images alone."""

import pytest
import torch
from conftest import blobs
from hypothesis import given, settings
from hypothesis import strategies as st

import lib.propagation.choose
from lib.labels.split import Split, labeled_split
from lib.propagation import EmbeddingGraph, Propagation, propagate
from lib.propagation.algorithms import ALGORITHMS, Algorithm, run_algorithm
from lib.propagation.choose import (
    CANDIDATES,
    FINE_TEMPERATURES,
    MAX_FOLDS,
    PULL,
    Candidate,
    Verdict,
    average,
    best,
    brier,
    calibrate,
    choose,
    committee,
    cross_validate,
    fit_temperature,
    make_folds,
)
from lib.propagation.labelings import Labeling

KNN = Candidate("knn", {"k": 5})
POISSON = Candidate("poisson")


def task(num_labeled=12, spread=0.4, seed=0):
    features, targets = blobs(3, 25, spread=spread, seed=seed)
    split = labeled_split(targets, num_labeled, 3, seed)
    return EmbeddingGraph(features, num_neighbors=10), split, targets


@settings(max_examples=50, deadline=None)
@given(labels=st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_folds_are_stratified_and_leave_a_label_of_every_class(labels):
    labels = torch.tensor(labels)
    counts = torch.bincount(labels)
    held = make_folds(labels, 0)
    several = counts >= 2
    if not several.any():
        assert held == []
        return
    num_folds = min(int(counts[several].min()), MAX_FOLDS)
    repeats = len(held) // num_folds
    assert repeats >= 2
    assert len(held) == num_folds * repeats
    times = torch.bincount(torch.cat(held), minlength=len(labels))
    assert torch.equal(times, repeats * several[labels].long())  # each as often as any other
    for out in held:
        taken = torch.bincount(labels[out], minlength=len(counts))
        assert (taken < counts)[counts > 0].all()
        assert (taken - counts / num_folds)[several].abs().max() < 1


def test_folds_are_the_same_for_the_same_seed_only():
    labels = torch.arange(40) % 4
    one, same, other = (torch.cat(make_folds(labels, seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one[:40], one[40:])  # another draw for each repetition


def test_many_labels_are_dealt_out_once():
    assert len(make_folds(torch.arange(400) % 4, 0)) == MAX_FOLDS


def test_no_candidate_is_told_a_held_out_label(monkeypatch):
    metric, split, targets = task()
    labels = targets[split.labeled]
    seen = []

    def spy(metric, method, labelings, num_classes, **options):
        answers = run_algorithm(metric, method, labelings, num_classes, **options)
        for labeling, answer in zip(labelings, answers, strict=True):
            told = labeling.labeled
            if len(metric.features) == len(split.labeled):  # knn works on the labeled images alone
                told = split.labeled[told]
            seen.append(told)
            assert torch.equal(labeling.labels, targets[told])
            answer[labeling.labeled] = torch.nan  # a row that it was told must not be read
        return answers

    monkeypatch.setattr(lib.propagation.choose, "run_algorithm", spy)
    verdicts = cross_validate(metric, Labeling(split.labeled, labels), 3, candidates=(KNN, POISSON))
    assert len(seen) > 4
    assert all(torch.isin(told, split.labeled).all() and len(told) < 12 for told in seen)
    assert all(torch.isfinite(v.losses).all() and len(v.losses) == 12 for v in verdicts)


def test_losses_equal_a_naive_leave_one_out_loop():
    metric, split, targets = task(num_labeled=6)
    labels = targets[split.labeled]
    (verdict,) = cross_validate(
        metric, Labeling(split.labeled, labels), 3, candidates=(KNN,), seed=3
    )
    losses = torch.zeros(6)
    held = make_folds(labels, 3)
    for out in held:
        kept = [i for i in range(6) if i not in out.tolist()]
        one = Labeling(split.labeled[kept], labels[kept])
        logits = run_algorithm(metric, "knn", [one], 3, k=5)[0] / verdict.temperature
        for i in out.tolist():
            p = logits[split.labeled[i]].softmax(dim=0)
            losses[i] += sum((p[c] - float(c == labels[i])) ** 2 for c in range(3)) / 5
    torch.testing.assert_close(verdict.losses, losses, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["auto", "ensemble"])
@pytest.mark.parametrize("num_labeled", [3, 6, 30])
def test_true_labels_of_unlabeled_images_change_nothing(method, num_labeled):
    metric, split, targets = task(num_labeled)
    corrupted = (targets + 1) % 3
    corrupted[split.labeled] = targets[split.labeled]
    one, two = (propagate(metric, method, split, t[split.labeled], 3) for t in (targets, corrupted))
    assert one.meta == two.meta
    assert torch.equal(one.scores, two.scores)


def test_one_label_per_class_falls_back_on_the_documented_order():
    metric, split, targets = task(num_labeled=3)
    labeling = Labeling(split.labeled, targets[split.labeled])
    verdicts = cross_validate(metric, labeling, 3)
    assert [v.candidate for v in verdicts] == list(CANDIDATES)
    assert {(v.temperature, *v.losses.tolist()) for v in verdicts} == {(1.0, 0.0)}
    found = propagate(metric, "auto", split, labeling.labels, 3)
    assert found.meta["chosen"] == [str(CANDIDATES[0])]
    assert choose(verdicts).candidate == CANDIDATES[0]
    members = [v.candidate.method for v in committee(verdicts)]
    assert len(set(members)) == len(members) == 3


def verdict(name, *losses):
    return Verdict(Candidate(name), 1.0, torch.tensor(losses))


def test_preference_decides_between_equals_and_losses_between_unequals():
    # paired: every held-out image says the same, whatever its own difficulty
    first, second = verdict("poisson", 0.5, 0.1, 0.9), verdict("knn", 0.4, 0.0, 0.8)
    assert best([first, second]) is second
    assert best([second, first]) is second
    noisy, good = verdict("poisson", 0.5, 0.1, 0.9, 0.2), verdict("knn", 0.1, 0.4, 0.5, 0.6)
    assert float(good.losses.mean()) < float(noisy.losses.mean())
    assert best([noisy, good]) is noisy
    assert best([good, noisy]) is good
    assert best([first, first]) is first


def test_one_held_out_image_does_not_outvote_preference():
    assert best([verdict("poisson", 0.9), verdict("knn", 0.1)]).candidate.method == "poisson"


def test_few_held_out_images_leave_the_choice_to_preference():
    worse, better = torch.full((30,), 0.9), torch.full((30,), 0.1)
    few = [Verdict(POISSON, 2.0, worse[:29]), Verdict(KNN, 1.0, better[:29])]
    assert choose(few) is few[0]
    enough = [Verdict(POISSON, 2.0, worse), Verdict(KNN, 1.0, better)]
    assert choose(enough) is enough[1]


def test_auto_takes_the_algorithm_that_fits_the_data():
    # classes on a line of many small steps: neighbors' neighbors know, the distances do not
    angle = torch.linspace(0, 3.0, 240)
    features = torch.stack([angle.cos(), angle.sin(), torch.zeros(240)], dim=1)
    blocks = (torch.arange(240) // 40) % 2
    split = labeled_split(blocks, 60, 2)
    metric = EmbeddingGraph(features, num_neighbors=6)
    bad = Candidate("knn", {"k": 60, "temperature": 100.0})  # the majority of all labels
    verdicts = cross_validate(
        metric,
        Labeling(split.labeled, blocks[split.labeled]),
        2,
        candidates=(bad, Candidate("nc", {"num_eigenvectors": 30})),
    )
    assert best(verdicts).candidate.method == "nc"
    assert verdicts[1].losses.mean() < verdicts[0].losses.mean()


def test_fitted_temperature_undoes_a_scale():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 3, generator=generator)
    labels = torch.distributions.Categorical(logits=logits).probs.cumsum(1)
    labels = (labels < torch.rand(4000, 1, generator=generator)).sum(dim=1)
    for scale in (0.5, 1.0, 4.0):
        assert fit_temperature(logits * scale, labels) == pytest.approx(scale, rel=0.25)


@pytest.mark.parametrize("right", [0, 1])
def test_a_pull_keeps_the_temperature_near_one_where_labels_are_few_and_alike(right):
    logits = torch.tensor([[3.0, 0.0, 1.0]]).repeat(4, 1)
    labels = torch.full((4,), 1 - right)  # all are the most probable class, or none
    edge = fit_temperature(logits, labels, FINE_TEMPERATURES)
    assert edge == pytest.approx(0.01 if right else 100, rel=0.01)
    few, more = (fit_temperature(logits, labels, FINE_TEMPERATURES, pull) for pull in (2, 10))
    assert (0.2 < few < more < 1) if right else (1 < more < few < 5)
    # the naive sum: as many further images as the pull says, of every class in its share
    p = logits[0].softmax(dim=0).double()
    losses = []
    for t in FINE_TEMPERATURES.tolist():
        q = (logits[0].double() / t).log_softmax(dim=0)
        losses.append(float(-4 * q[1 - right] - 10 * 4 * (p * q).sum()))
    assert more == float(FINE_TEMPERATURES[losses.index(min(losses))])


@pytest.fixture
def told(monkeypatch):
    """An algorithm whose logits are `told.logits` of every image, whatever the labels."""

    class Told:
        logits: torch.Tensor
        folds = 0

        def __call__(self, graph, labelings, num_classes):
            self.folds += len(labelings)
            return [self.logits.clone() for _ in labelings]

    algorithm = Told()
    monkeypatch.setitem(ALGORITHMS, "told", Algorithm(algorithm))
    return algorithm


def of_known_temperature(n, scale):
    """Logits of n images whose labels were drawn from softmax(logits / scale), and these labels."""
    rng = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(n, 4, generator=rng)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=rng)[:, 0]
    return scale * logits, labels


@pytest.mark.parametrize("scale", [1 / 3, 1.0, 3.0])
def test_logits_of_a_known_temperature_are_brought_back(told, scale):
    told.logits, labels = of_known_temperature(3000, scale)
    split = Split(torch.arange(2000), torch.arange(2000, 3000))
    graph = EmbeddingGraph(torch.zeros(3000, 2))
    found = calibrate(graph, "told", split, labels[:2000], 4)
    assert found == pytest.approx(scale, rel=0.1)
    assert told.folds == 3  # of five: 400 held-out images in each are enough
    # on top of the temperature that the pseudo-labels have anyway
    assert calibrate(graph, "told", split, labels[:2000], 4, at=2.0) == pytest.approx(
        scale / 2, rel=0.1
    )


def test_calibration_changes_the_probabilities_and_nothing_else(told):
    told.logits, labels = of_known_temperature(400, 3.0)
    split = Split(torch.arange(300), torch.arange(300, 400))
    graph = EmbeddingGraph(torch.zeros(400, 2))
    answer = Propagation(told.logits)
    temperature = calibrate(graph, "told", split, labels[:300], 4, at=0.5)
    plain, calibrated = (
        answer.pseudo_labels(split, temperature=0.5, calibration=one) for one in (None, temperature)
    )
    for name in ("indexes", "labels", "confidence", "entropy", "top_classes"):
        assert torch.equal(getattr(plain, name), getattr(calibrated, name)), name
    expected = (told.logits[calibrated.indexes] / (0.5 * temperature)).softmax(dim=1)
    assert torch.equal(calibrated.probabilities, expected)
    assert torch.equal(calibrated.largest[:, 0], plain.probabilities.amax(dim=1))
    assert torch.equal(calibrated.largest[:, 1], calibrated.probabilities.amax(dim=1))
    assert calibrated.meta["calibration"] == temperature
    assert "calibration" not in plain.meta
    with pytest.raises(ValueError, match=r"calibration -1\.0: must be positive"):
        answer.pseudo_labels(split, calibration=-1.0)


def test_calibration_equals_a_naive_loop_over_the_folds():
    metric, split, targets = task(num_labeled=12, spread=0.7)
    labels = targets[split.labeled]
    logits, held_labels = [], []
    for out in make_folds(labels, 0)[:4]:  # four labels of each class: each is held out once
        kept = [i for i in range(12) if i not in out.tolist()]
        one = propagate(
            metric, "poisson", Split(split.labeled[kept], split.unlabeled), labels[kept], 3
        )
        logits.append(one.scores[split.labeled[out]])
        held_labels.append(labels[out])
    expected = fit_temperature(
        torch.cat(logits), torch.cat(held_labels), FINE_TEMPERATURES, PULL / 12
    )
    assert calibrate(metric, "poisson", split, labels, 3) == pytest.approx(expected, rel=0.06)


def test_nothing_is_calibrated_twice_or_without_labels_to_hold_out():
    metric, split, targets = task(num_labeled=3)
    assert calibrate(metric, "nc", split, targets[split.labeled], 3) is None
    metric, split, targets = task(num_labeled=12)
    for method in ("auto", "ensemble"):
        assert calibrate(metric, method, split, targets[split.labeled], 3) is None


def test_classes_with_one_label_or_none_do_not_hinder_calibration():
    metric, split, targets = task(num_labeled=12)
    labels = targets[split.labeled]  # class by class, four of each
    few = Split(split.labeled[:5], split.unlabeled)  # one of class 1, none of class 2
    found = calibrate(metric, "knn", few, labels[:5], 3)
    assert found is not None
    assert 0.1 < found < 10


def test_brier_loss_is_zero_for_a_certain_right_answer_and_two_for_a_wrong_one():
    logits = torch.tensor([[50.0, 0.0], [50.0, 0.0], [0.0, 0.0]])
    assert brier(logits, torch.tensor([0, 1, 1])).tolist() == pytest.approx([0, 2, 0.5])


def test_average_is_the_mean_of_tempered_probabilities():
    one, two = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 8.0]])
    mean = average([one, two], [1.0, 4.0]).exp()
    torch.testing.assert_close(mean, torch.tensor([[0.5, 0.5]]), atol=1e-5, rtol=0)


def test_committee_holds_the_best_of_each_algorithm():
    verdicts = [
        Verdict(Candidate("nc", {"num_eigenvectors": 50}), 1.0, torch.tensor([0.3])),
        Verdict(Candidate("nc", {"num_eigenvectors": 200}), 1.0, torch.tensor([0.2])),
        Verdict(KNN, 1.0, torch.tensor([0.4])),
        Verdict(POISSON, 1.0, torch.tensor([0.1])),
        Verdict(Candidate("spreading"), 1.0, torch.tensor([0.9])),
    ]
    members = committee(verdicts)
    assert [v.candidate.method for v in members] == ["poisson", "nc", "knn"]
    assert members[1].candidate.parameters == {"num_eigenvectors": 200}


def test_one_fold_at_a_time_gives_the_same_verdict(monkeypatch):
    metric, split, targets = task()
    labeling = Labeling(split.labeled, targets[split.labeled])
    together = cross_validate(metric, labeling, 3, candidates=(POISSON,))[0]
    monkeypatch.setattr(lib.propagation.choose, "FOLD_BYTES", 1)
    alone = cross_validate(metric, labeling, 3, candidates=(POISSON,))[0]
    torch.testing.assert_close(alone.losses, together.losses, atol=1e-2, rtol=0)


def test_auto_compares_nothing_where_too_few_images_can_be_held_out(monkeypatch):
    features, targets = blobs(3, 40)
    asked = []
    held_out = lib.propagation.choose._held_out_logits

    def watched(metric, candidate, *arguments, **options):
        asked.append(candidate)
        return held_out(metric, candidate, *arguments, **options)

    monkeypatch.setattr(lib.propagation.choose, "_held_out_logits", watched)
    few, many = labeled_split(targets, 9, 3), labeled_split(targets, 60, 3)
    propagate(EmbeddingGraph(features), "auto", few, targets[few.labeled], 3)
    assert asked == [CANDIDATES[0]]
    asked.clear()
    propagate(EmbeddingGraph(features), "auto", many, targets[many.labeled], 3)
    assert asked == list(CANDIDATES)
