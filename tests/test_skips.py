"""No test is skipped that could run here: another skip than the allowed ones fails the session."""

import xml.etree.ElementTree as ET

import pytest
from conftest import ALLOWED_SKIPS, ROOT, run_script

WAYS = """
import pytest

def test_that_passes(): pass
def test_that_skips(): pytest.skip("no time")
@pytest.mark.skip
def test_marked(): pass
@pytest.mark.skipif(True, reason="slow machine")
def test_marked_where_true(): pass
@pytest.mark.skipif(False, reason="slow machine")
def test_marked_where_false(): pass
@pytest.mark.xfail(reason="later")
def test_expected_to_fail(): raise AssertionError
@pytest.mark.parametrize("nothing", [])
def test_of_nothing(nothing): pass
@pytest.fixture
def skipping(): pytest.skip("no fixture")
def test_with_a_fixture_that_skips(skipping): pass
@pytest.mark.skipif(True, reason="needs CUDA")
def test_on_a_device(): pass
"""
ALLOWED = {
    "test_that_passes": "passed",
    "test_marked_where_false": "passed",
    "test_on_a_device": "skipped" if ALLOWED_SKIPS["needs CUDA"] else "failed",
}


def outcomes(folder, *words):
    """pytest under our conftest in `folder`: how it ended, and what became of each test."""
    table = folder / "results.xml"
    line = ("-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", f"--junitxml={table}")
    result = run_script(*line, *words, folder, cwd=folder, PYTHONPATH=str(ROOT / "tests"))
    found = {}
    for case in ET.parse(table).iter("testcase"):
        kinds = [part.tag for part in case if part.tag in ("skipped", "failure", "error")]
        named = {"skipped": "skipped", "failure": "failed", "error": "failed"}
        found[case.get("name").split("[")[0]] = named[kinds[0]] if kinds else "passed"
    return result, found


@pytest.mark.parametrize(
    "workers", [0, pytest.param(1, marks=pytest.mark.slow)], ids=["alone", "xdist"]
)
def test_every_way_to_skip_a_test_fails_but_for_the_allowed_reasons(tmp_path, workers):
    (tmp_path / "test_ways.py").write_text(WAYS)
    (tmp_path / "test_whole.py").write_text(
        "import pytest\npytest.importorskip('no_such_package')\n"
    )
    result, found = outcomes(tmp_path, "-n", workers, "--continue-on-collection-errors")
    assert result.returncode == 1, result.stdout + result.stderr
    assert found == dict.fromkeys(found, "failed") | ALLOWED
    assert len(found) == 10
    said = result.stdout.replace("reason: ", "")
    reasons = ("no time", "unconditional skip", "slow machine", "later", "no fixture")
    for reason in (*reasons, "could not import 'no_such_package'"):
        assert f"was skipped ({reason}" in said, reason
