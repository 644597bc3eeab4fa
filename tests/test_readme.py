"""The documents are true: every command in them parses, every file that they name is there."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

from lib.cli.start import load_script

DOCUMENTS = (
    "README.md",
    "checkpoint/README.md",
    "lib/README.md",
    "notebooks/README.md",
    "scripts/benchmarks/README.md",
    "tests/README.md",
)
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
README = TEXTS["README.md"]


def commands(text: str) -> list[list[str]]:
    """Every command of the shell blocks, continuation lines joined, comments off."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [w for w in words if w]


ALL = [c for text in TEXTS.values() for c in commands(text)]
PYTHON = [c for c in ALL if c[0] == "python"]
SHELL = [c for c in ALL if c[0] == "bash"]


def test_the_two_commands_come_first():
    assert [c[:2] for c in commands(README)[:2]] == [
        ["bash", "scripts/quickstart.sh"],
        ["bash", "scripts/test.sh"],
    ]


def test_there_is_a_command_for_each_phase():
    words = {c[1] for c in commands(README)}
    assert {"unsupervised/cifar.py", "cifar-semi.py", "scripts/propagate_cifar10.sh"} <= words


def test_the_front_page_stays_one():
    assert len(README.splitlines()) <= 200
    assert len(README.split()) <= 2300


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


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_and_picture_exists(name):
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", TEXTS[name]) if "://" not in t]
    assert targets or name == "checkpoint/README.md"  # which links to nothing
    assert [t for t in targets if not ((ROOT / name).parent / t).exists()] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_script_that_is_named_exists(name):
    top = r"scripts|notebooks|unsupervised|lib|models|datasets|tests"
    named = set(re.findall(rf"`((?:{top})/[\w./-]+\.\w+)`", TEXTS[name]))
    assert named or name == "tests/README.md"  # whose tests tests/test_promises.py looks for
    assert [n for n in sorted(named) if not (ROOT / n).exists()] == []


def test_every_picture_is_shown_somewhere():
    shown = set(re.findall(r"pictures/([\w-]+\.png)\)", "".join(TEXTS.values())))
    assert shown == {p.name for p in (ROOT / "notebooks" / "pictures").iterdir()}


def test_every_option_that_is_named_is_one_of_a_script():
    named = {o for text in TEXTS.values() for o in re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", text)}
    scripts = ["cifar-semi.py", "unsupervised/cifar.py", "imagenet-semi.py"]
    scripts += ["unsupervised/imagenet.py", "lib/cli/download.py"]
    scripts += [str(p.relative_to(ROOT)) for p in sorted((ROOT / "scripts").rglob("*.py"))]
    known = {"--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint"}  # torchrun's
    known |= {"--published-format", "--csv"}  # of lib/cli/convert.py, scripts/own_images.sh
    for script in scripts:
        known |= set(load_script(script).build_parser()._option_string_actions)
    assert sorted(named - known) == []


def test_no_path_of_anyones_machine_is_in_the_repository_texts():
    scripts = (p for ending in ("*.py", "*.sh") for p in (ROOT / "scripts").rglob(ending))
    for path in [*(ROOT / name for name in DOCUMENTS), *scripts]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"/(home|root|work|Users)/", text), Path(path).name
