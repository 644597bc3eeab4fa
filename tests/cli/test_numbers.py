"""Every numeric option of every script: numbers that are not finite, or negative, end before any work."""

import argparse
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from runs import load_script

TOP = ("*.py", "unsupervised/*.py", "scripts/**/*.py", "lib/**/*.py")


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The parser of every script and module that has a command line."""
    for path in sorted(path for pattern in TOP for path in ROOT.glob(pattern)):
        name = path.relative_to(ROOT).as_posix()
        if "\ndef build_parser(" not in path.read_text(encoding="utf-8"):
            continue
        if name.startswith("lib/"):
            module = importlib.import_module(".".join(Path(name).with_suffix("").parts))
        else:
            module = load_script(name)
        yield name, module.build_parser()


def reads_numbers(kind: Callable[[str], object]) -> bool:
    try:
        return isinstance(kind("1"), int | float)
    except argparse.ArgumentTypeError:  # a number, and beyond the limit
        return True


def numeric(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Options whose type understands a number."""
    for action in parser._actions:
        if action.type is None or action.choices or not action.option_strings:
            continue
        if reads_numbers(action.type):
            yield action


PARSERS = dict(parsers())
CASES = [
    pytest.param(parser, action.option_strings[-1], id=f"{name} {action.option_strings[-1]}")
    for name, parser in PARSERS.items()
    for action in numeric(parser)
]


def test_the_parsers_of_all_phases_are_among_them():
    wanted = {"cifar-semi.py", "imagenet-semi.py", "unsupervised/cifar.py"}
    wanted |= {"unsupervised/imagenet.py", "scripts/propagate.py", "scripts/predict.py"}
    assert wanted <= PARSERS.keys()
    assert len(CASES) > 100


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1"])
@pytest.mark.parametrize(("parser", "option"), CASES)
def test_a_number_that_is_not_finite_or_is_negative_is_refused(parser, option, value, capsys):
    with pytest.raises(SystemExit) as exit_:
        parser.parse_args([f"{option}={value}"])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1
    assert f"{option}: " in error
    assert value in error


@pytest.mark.parametrize(
    ("name", "option", "value", "rule"),
    [
        ("scripts/propagate.py", "--chunks", "0", "must be positive"),
        ("scripts/propagate.py", "--basis-mib", "0", "must be positive"),
        ("scripts/propagate.py", "--k", "0", "must be positive"),
        ("scripts/propagate.py", "--alpha", "1", "must lie between 0 and 1"),
        ("scripts/predict.py", "--top", "0", "must be positive"),
        ("cifar-semi.py", "--iter-size", "0", "must be positive"),
        ("imagenet-semi.py", "--pseudo-ratio", "1.5", r"must lie in [0, 1]"),
        ("imagenet-semi.py", "--iter-size", "0", "must be positive"),
        ("imagenet-semi.py", "--stop-after", "-1", "must be at least 0"),
        ("unsupervised/imagenet.py", "--val-batch-size", "0", "must be positive"),
        ("unsupervised/imagenet.py", "--save-freq", "-1", "must be at least 0"),
        ("unsupervised/imagenet.py", "--iter-size", "0", "must be positive"),
        ("unsupervised/imagenet.py", "--momentum", "1", "must lie in [0, 1)"),
    ],
)
def test_a_number_beyond_its_limit_is_refused(name, option, value, rule, capsys):
    with pytest.raises(SystemExit) as exit_:
        PARSERS[name].parse_args([option, value])
    assert exit_.value.code == 2
    assert f"{option}: {rule}, not {value}" in capsys.readouterr().err


@pytest.mark.parametrize("parser", PARSERS.values(), ids=PARSERS)
def test_no_option_takes_any_float(parser):
    assert all(action.type not in (int, float) for action in parser._actions if not action.choices)
