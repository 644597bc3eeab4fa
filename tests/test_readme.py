"""README is true: every command in it parses, every file that it names is there."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

from lib.cli.options import load_script

README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """Every command of the shell blocks, continuation lines joined, comments off."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [w for w in words if w]


PYTHON = [c for c in commands() if c[0] == "python"]
SHELL = [c for c in commands() if c[0] == "bash"]


def test_the_two_commands_come_first():
    assert [c[:2] for c in commands()[:2]] == [
        ["bash", "scripts/quickstart.sh"],
        ["bash", "scripts/test.sh"],
    ]


def test_there_is_a_command_for_each_phase():
    assert {"unsupervised/cifar.py", "cifar-semi.py"} <= {c[1] for c in PYTHON}
    assert "scripts/propagate_cifar10.sh" in {c[1] for c in SHELL}


@pytest.mark.parametrize("words", PYTHON, ids=" ".join)
def test_every_python_command_is_understood_by_its_script(words):
    if words[1] == "-m":
        words = ["python", words[2].replace(".", "/") + ".py", *words[3:]]
    parser = load_script(words[1]).build_parser()
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            parser.parse_args(words[2:])
        except SystemExit:
            pytest.fail(errors.getvalue())


@pytest.mark.parametrize("words", SHELL, ids=" ".join)
def test_every_shell_command_names_a_script(words):
    assert (ROOT / words[1]).is_file()


def test_every_link_and_picture_exists():
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in t]
    assert targets
    assert [t for t in targets if not (ROOT / t).exists()] == []


def test_every_script_that_is_named_exists():
    named = set(
        re.findall(r"`((?:scripts|notebooks|unsupervised|lib|tests)/[\w./-]+\.\w+)`", README)
    )
    assert named
    assert [n for n in sorted(named) if not (ROOT / n).exists()] == []


def test_every_option_that_is_named_is_one_of_a_script():
    named = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", README))
    scripts = ["cifar-semi.py", "unsupervised/cifar.py", "imagenet-semi.py"]
    scripts += ["unsupervised/imagenet.py", "lib/cli/download.py"]
    scripts += [str(p.relative_to(ROOT)) for p in sorted((ROOT / "scripts").glob("*.py"))]
    known = {"--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint"}  # torchrun's
    known |= {
        "--published-format",
        "--csv",
    }  # of lib/cli/convert.py convert, scripts/own_images.sh
    for script in scripts:
        known |= set(load_script(script).build_parser()._option_string_actions)
    assert sorted(named - known) == []


def test_no_path_of_anyones_machine_is_in_the_repository_texts():
    for path in [
        ROOT / "README.md",
        ROOT / "checkpoint" / "README.md",
        *(ROOT / "scripts").iterdir(),
    ]:
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"/(home|root|work|Users)/", text), Path(path).name
