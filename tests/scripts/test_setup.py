"""The set-up script: its manual, its refusals, and a second run that finds nothing to do."""

import os
import subprocess

import pytest
from conftest import ROOT


def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "setup.sh"), *words],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def fake_python(tmp_path):
    """An interpreter that notes what it is asked for; `-m venv DIR` makes DIR/bin/python like it."""
    log, python = tmp_path / "log", tmp_path / "python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        f'echo "$*" >> {log}\n'
        'if [ "$2" = venv ]; then mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python"; fi\n'
        f'if [ "$2" = pip ]; then exit "$(cat {tmp_path}/pip_code 2>/dev/null || echo 0)"; fi\n'
    )
    python.chmod(0o755)
    return python, log


def test_help_is_the_manual():
    result = run("--help")
    assert result.returncode == 0
    assert "bash scripts/setup.sh test" in result.stdout
    assert "PYTHON=" in result.stdout


def test_an_unknown_word_shows_the_manual_and_ends_with_code_2():
    result = run("everything")
    assert result.returncode == 2
    assert "scripts/setup.sh" in result.stderr


def test_a_missing_interpreter_is_named():
    result = run(PYTHON="python-of-nowhere")
    assert result.returncode == 2
    assert "python-of-nowhere" in result.stderr


def test_the_first_run_installs_and_the_second_finds_nothing_to_do(tmp_path, fake_python):
    python, log = fake_python
    words = {"PYTHON": str(python), "VENV": str(tmp_path / "venv")}
    assert run(**words).returncode == 0
    asked = log.read_text()
    assert f"-m venv {tmp_path}/venv" in asked
    assert "-r requirements.txt" in asked
    log.write_text("")
    assert run(**words).returncode == 0
    assert "pip" not in log.read_text()
    assert "venv" not in log.read_text()
    # the test tools are another list: they are still missing
    assert run("test", **words).returncode == 0
    assert "-r tests/requirements.txt" in log.read_text()


def test_a_failed_installation_is_tried_again(tmp_path, fake_python):
    python, log = fake_python
    words = {"PYTHON": str(python), "VENV": str(tmp_path / "venv")}
    (tmp_path / "pip_code").write_text("1")
    failed = run(**words)
    assert failed.returncode == 2
    assert "could not install requirements.txt" in failed.stderr
    (tmp_path / "pip_code").write_text("0")
    log.write_text("")
    assert run(**words).returncode == 0
    assert "-r requirements.txt" in log.read_text()
