"""Defects that must not come back: a patch for each, which applies, and tests that notice it."""

import ast
import difflib
import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, assert_ok, run_script

from lib.cli.start import load_script

mutations = load_script("tests/mutations/run.py")
PATCHES = [mutations.read(path) for path in sorted(mutations.HERE.glob("*.patch"))]
BY_NAME = {patch.name: patch for patch in PATCHES}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of every file that a patch changes."""
    root = tmp_path_factory.mktemp("tree")
    for name in {name for patch in PATCHES for name in mutations.touched_files(patch.path)}:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    return root


def listed_defects() -> dict[int, str]:
    """The numbered list of README.md."""
    text = (mutations.HERE / "README.md").read_text()
    items = re.findall(r"^(\d+)\. (.+(?:\n +.+)*)", text, re.MULTILINE)
    assert [int(number) for number, _ in items] == list(range(1, len(items) + 1))
    return {int(number): " ".join(item.split()) for number, item in items}


def test_every_defect_of_the_list_has_one_patch_that_begins_with_it():
    numbers = [int(patch.name.split("-")[0]) for patch in PATCHES]
    defects = listed_defects()
    assert len(defects) == 56
    assert numbers == list(defects)
    for number, patch in zip(numbers, PATCHES, strict=True):
        assert patch.defect.startswith(defects[number]), patch.name


@pytest.mark.parametrize("name", BY_NAME)
def test_a_patch_applies_and_is_not_applied_already(tree, name):
    path = BY_NAME[name].path
    assert mutations.git_apply(tree, path, "--check") == ""
    assert "does not apply" in mutations.git_apply(tree, path, "--check", "--reverse")


def test_the_tests_that_patches_name_exist():
    functions: dict[str, set[str]] = {}
    for test in {test for patch in PATCHES for test in patch.tests}:
        file, name = test.split("::")
        if file not in functions:
            body = ast.parse((ROOT / file).read_text()).body
            functions[file] = {node.name for node in body if isinstance(node, ast.FunctionDef)}
        assert name.split("[")[0] in functions[file], test


def test_a_patch_is_put_back_and_taken_away_with_the_times_of_its_files(tree):
    path = BY_NAME["25-top5-is-top2"].path
    file = tree / "lib" / "graph" / "knn.py"
    before, time = file.read_bytes(), file.stat().st_mtime_ns
    with mutations.applied(tree, path) as problem:
        assert problem == ""
        assert file.read_bytes() != before
        with mutations.applied(tree, path) as again:
            assert "does not apply" in again
    assert (file.read_bytes(), file.stat().st_mtime_ns) == (before, time)


def test_patches_are_chosen_by_number_pattern_or_file(tmp_path):
    def names(*words: str) -> list[str]:
        return [patch.name for patch in mutations.chosen(words)]

    assert names() == list(BY_NAME)
    assert names("25", "25-*", "*-is-top2") == ["25-top5-is-top2"]
    assert names("*top5*", "1") == ["11-top5-few-classes", "25-top5-is-top2", "01-accuracy-view"]
    mine = shutil.copy(BY_NAME["25-top5-is-top2"].path, tmp_path / "mine.patch")
    assert names(str(mine)) == ["mine"]
    with pytest.raises(ValueError, match="there is no patch 99"):
        names("25", "99")


@pytest.mark.parametrize(
    "header", ["", "A defect.\n", "caught by: tests/graph/test_knn.py::test_x\n"]
)
def test_a_patch_without_defect_or_tests_is_refused(tmp_path, header):
    path = tmp_path / "p.patch"
    path.write_text(header + "diff --git a/x b/x\ncaught by: the body, which is no header\n")
    with pytest.raises(ValueError, match=r"p\.patch: must begin with its defect"):
        mutations.read(path)


@pytest.mark.slow
def test_every_defect_is_noticed():
    jobs = min(4, len(os.sched_getaffinity(0)))
    result = run_script("tests/mutations/run.py", "-j", jobs)
    missed = [
        line
        for line in result.stdout.splitlines()
        if re.search(r"SURVIVED|NO TEST|NOT APPLY", line)
    ]
    assert not missed
    assert f"{len(PATCHES)} of {len(PATCHES)} caught (100%)" in assert_ok(result)


def write_patch(path: Path, name: str, old: str, new: str) -> Path:
    """A patch of the file `name` of the repository."""
    before = (ROOT / name).read_text()
    lines = (text.splitlines(keepends=True) for text in (before, before.replace(old, new)))
    diff = "".join(difflib.unified_diff(*lines, f"a/{name}", f"b/{name}"))
    assert diff
    path.write_text(
        f"Nothing.\ncaught by: tests/graph/test_knn.py::test_top_5_is_not_top_2\n\n{diff}"
    )
    return path


@pytest.mark.slow
def test_a_patch_that_no_test_notices_or_that_does_not_apply_is_reported(tmp_path):
    old, new = '"""Weighted nearest-neighbor', '"""Weighted near-neighbor'
    harmless = write_patch(tmp_path / "harmless.patch", "lib/graph/knn.py", old, new)
    stale = tmp_path / "stale.patch"
    stale.write_text(harmless.read_text().replace("nearest", "farthest"))
    result = run_script("tests/mutations/run.py", harmless, stale, "25")
    assert result.returncode == 1, result.stderr
    lines = {line.split(" | ")[0]: line for line in result.stdout.splitlines()}
    assert " | SURVIVED | " in lines["harmless"]
    assert " | DOES NOT APPLY: " in lines["stale"]
    assert " | tests/graph/test_knn.py::test_top_5_is_not_top_2 | " in lines["25-top5-is-top2"]
    assert "1 of 3 caught (33%)" in result.stdout


@pytest.mark.slow
def test_tests_that_fail_without_a_patch_are_said_and_nothing_is_measured(tmp_path):
    path = write_patch(tmp_path / "p.patch", "lib/graph/knn.py", "Weighted", "Light")
    path.write_text(path.read_text().replace("test_top_5_is_not_top_2", "test_that_is_missing"))
    result = run_script("tests/mutations/run.py", path)
    assert result.returncode == 2
    assert "must pass without a patch" in result.stderr
    assert "test_that_is_missing" in result.stderr
