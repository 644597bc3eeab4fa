"""Results in files: read while they are of the same key, computed otherwise."""

import json
from pathlib import Path

import pytest

from lib.files.cache import load_or_compute


def read(path):
    return json.loads(Path(path).read_text())


def write(value, path, meta):
    Path(path).write_text(json.dumps([value, meta]))


def no_need():
    raise AssertionError("computed again")


def kept(path, key):
    """The value in a file that is of the key, without computing."""
    return load_or_compute(path, key, no_need, read, write).value


@pytest.fixture
def counted():
    """A function that computes one more than the last time, and reports a fact."""
    values = []

    def compute():
        values.append(len(values))
        return values[-1], {"steps": 7}

    return compute


def test_a_result_is_computed_once_for_the_same_key(tmp_path, counted):
    path = tmp_path / "value"
    first = load_or_compute(path, {"seed": 1}, counted, read, write)
    again = load_or_compute(path, {"seed": 1}, counted, read, write)
    assert (first.value, again.value) == (0, 0)
    assert first.meta == again.meta == {"seed": 1, "steps": 7}
    assert first.origin("built").startswith("built in 0.0 s, kept in ")
    assert again.origin() == f"read from {path}"


@pytest.mark.parametrize("key", [{"seed": 2}, {"seed": 1, "size": 3}])
def test_another_key_replaces_the_file(tmp_path, counted, key):
    path = tmp_path / "value"
    load_or_compute(path, {"seed": 1}, counted, read, write)
    assert load_or_compute(path, key, counted, read, write).value == 1
    assert kept(path, key) == 1
    with pytest.raises(AssertionError, match="computed again"):
        kept(path, {"seed": 1, "size": 4})


def test_a_file_of_more_facts_than_the_key_is_current(tmp_path):
    write(5, tmp_path / "value", {"seed": 1, "written": "before"})
    assert kept(tmp_path / "value", {"seed": 1}) == 5


def test_without_reuse_the_result_is_computed_anew_and_replaces_the_file(tmp_path, counted):
    path = tmp_path / "value"
    load_or_compute(path, {}, counted, read, write)
    assert load_or_compute(path, {}, counted, read, write, reuse=False).value == 1
    assert kept(path, {}) == 1


def test_without_a_path_nothing_is_kept(counted):
    first, second = (load_or_compute("", {}, counted, read, write) for _ in range(2))
    assert (first.value, second.value) == (0, 1)
    assert first.origin() == "computed in 0.0 s"


def test_a_damaged_file_is_not_computed_again(tmp_path, counted):
    (tmp_path / "value").write_text("{")
    with pytest.raises(json.JSONDecodeError):
        load_or_compute(tmp_path / "value", {}, counted, read, write)
