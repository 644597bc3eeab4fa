"""Pseudo-labels in parts: every image once, the labels of one graph where the method needs none."""

from dataclasses import replace

import pytest
import torch
from conftest import blobs

from lib.files import checkpoint
from lib.labels import pseudo_labels
from lib.labels.split import Split, cut_into_chunks, labeled_split
from lib.propagation import EmbeddingGraph, propagate
from lib.propagation.chunks import cut_graph, save_part
from lib.report.curves import top_k_hits

FEATURES, TARGETS = blobs(num_classes=5, per_class=40)
SPLIT = labeled_split(TARGETS, 20, 5)


def parts_of(method, chunks, **parameters):
    parts = []
    for chunk in cut_graph(EmbeddingGraph(FEATURES, num_neighbors=8), SPLIT, chunks):
        words = chunk.graph, method, chunk.split, TARGETS[SPLIT.labeled], 5
        answer = propagate(*words, **parameters)
        parts.append(chunk.restored(answer.pseudo_labels(chunk.split)))
    return parts


def test_nearest_neighbors_do_not_notice_the_chunks():
    # an image asks labeled images only, and these are in every chunk
    whole, merged = parts_of("knn", 1)[0], pseudo_labels.merged(parts_of("knn", 4))
    assert merged.indexes[merged.indexes.argsort()].tolist() == sorted(SPLIT.unlabeled.tolist())
    first, second = whole.indexes.argsort(), merged.indexes.argsort()
    assert torch.equal(whole.labels[first], merged.labels[second])
    torch.testing.assert_close(whole.probabilities[first], merged.probabilities[second])


def test_a_chunk_holds_images_of_every_class():
    # cut in the order of the true classes, each of five chunks would hold one class
    for part in cut_into_chunks(SPLIT, 5):
        assert TARGETS[part].unique().tolist() == [0, 1, 2, 3, 4]


def test_each_chunk_is_propagated_on_a_graph_of_its_own_with_all_labeled_images():
    parts = parts_of("nc", 3, num_eigenvectors=10)
    for part in parts:
        members = torch.cat([SPLIT.labeled, part.unlabeled])
        alone = EmbeddingGraph(FEATURES[members], num_neighbors=8)
        local = Split(torch.arange(20), torch.arange(20, len(members)))
        labels = TARGETS[SPLIT.labeled]
        answer = propagate(alone, "nc", local, labels, 5, num_eigenvectors=10)
        found = dict(zip(members.tolist(), answer.scores.argmax(dim=1).tolist(), strict=True))
        assert part.labels.tolist() == [found[i] for i in part.indexes.tolist()]
        assert torch.equal(part.labeled, SPLIT.labeled)


def test_a_subset_shares_the_choices_but_neither_graph_nor_spectrum():
    metric = EmbeddingGraph(FEATURES, "local-scale", 6, "drop")
    metric.spectrum(5)
    part = metric.subset(torch.arange(50))
    assert part.affinity.shape == (50, 50)
    assert part.spectrum(5).vectors.shape == (50, 5)
    assert (part.graph, part.num_neighbors, part.self_loops) == ("local-scale", 6, "drop")
    assert metric.spectrum(5).vectors.shape == (200, 5)


def test_the_meta_record_says_what_was_done():
    answer = propagate(EmbeddingGraph(FEATURES), "knn", SPLIT, TARGETS[SPLIT.labeled], 5, k=3)
    pseudo = answer.pseudo_labels(SPLIT, {"mine": 1}, confidence="entropy")
    assert pseudo.meta["propagation"] == {"method": "knn", "k": 3}
    assert (pseudo.meta["confidence"], pseudo.meta["mine"]) == ("entropy", 1)


def test_top_5_is_known_without_probabilities_too():
    answer = propagate(EmbeddingGraph(FEATURES), "knn", SPLIT, TARGETS[SPLIT.labeled], 5)
    whole, bare = (answer.pseudo_labels(SPLIT, probabilities=wanted) for wanted in (True, False))
    assert bare.probabilities is None
    assert torch.equal(bare.labels, whole.labels)
    true = TARGETS.flip(0)  # of other images: the right ones are all found
    for k in (1, 3, 5):
        hits = top_k_hits(bare, true, k)
        assert torch.equal(hits, top_k_hits(whole, true, k))
        assert bool(hits.all()) == (k == 5)


def test_parts_are_written_under_the_published_names(tmp_path):
    for place, part in enumerate(parts_of("knn", 2)):
        path = save_part(replace(part, probabilities=None), tmp_path, 20, place, 2)
        assert path == tmp_path / "num_labeled_20" / f"2_{place}.pth.tar"
        state = checkpoint.load_dict(path)
        assert "pseudo_probs" not in state
        assert torch.equal(state["unlabeled_indexes"].sort().values, part.indexes.sort().values)
    whole = save_part(parts_of("knn", 1)[0], tmp_path, 20)
    assert whole == tmp_path / "20.pth.tar"
    assert "pseudo_probs" in checkpoint.load_dict(whole)


def test_chunks_of_an_earlier_run_do_not_mix_with_new_ones(tmp_path):
    for place, part in enumerate(parts_of("knn", 4)):
        save_part(part, tmp_path, 20, place, 4)
    other = tmp_path / "num_labeled_20" / "notes.txt"
    other.write_text("kept")
    first = parts_of("knn", 3)[0]
    save_part(first, tmp_path, 20, 0, 3)
    assert {p.name for p in other.parent.iterdir()} == {"3_0.pth.tar", "notes.txt"}


def test_more_chunks_than_images_are_refused():
    with pytest.raises(ValueError, match="181 chunks of 180"):
        parts_of("knn", 181)
