"""Every numeric option of every script: numbers that are not finite, or negative, end before any work."""

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from runs import actions, load_script

from lib.cli import start

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


REFUSED = ("nan", "inf", "-inf", "-1", "1e309", "", "1e39", "1" + 39 * "0")


@pytest.mark.parametrize(("parser", "option"), CASES)
def test_a_number_that_is_not_finite_or_is_negative_or_absurd_is_refused(parser, option, capsys):
    for value in REFUSED:
        with pytest.raises(SystemExit) as exit_:
            parser.parse_args([f"{option}={value}"])
        assert exit_.value.code == 2
        error = capsys.readouterr().err
        assert error.count("error:") == 1
        assert f"{option}: " in error
        assert value in error


# what zero means is in the help of each: none, never, or the script's own choice
ZERO = {
    *("--images", "--momentum", "--nce-k", "--nce-m", "--num-workers", "--workers", "--power"),
    *("--print-freq", "--profile", "--pseudo-ratio", "--rng-seed", "--save-freq", "--start-epoch"),
    *("--steps", "--stop-after", "--wd", "--batch-size", "--labeled-share", "--warmup"),
}


@pytest.mark.parametrize(("parser", "option"), CASES)
def test_zero_is_refused_but_where_it_means_something(parser, option):
    if option not in ZERO:
        with pytest.raises(argparse.ArgumentTypeError, match="not 0"):
            actions(parser)[option].type("0")


@pytest.mark.parametrize("name", [name for name in PARSERS if "semi" in name or "unsup" in name])
def test_zero_trains_nothing_by_mistake(name):
    for option in ("--epochs", "--max-iters", "--batch-size", "--num-labeled", "--eval-freq"):
        action = actions(PARSERS[name]).get(option)
        if action is not None:
            with pytest.raises(argparse.ArgumentTypeError, match="must be positive, not 0"):
                action.type("0")


@pytest.mark.parametrize("gpus", ["nan", "-1", "", ",", "0.5", "1e9", "cpu,0", "0,0", "gpu", "inf"])
@pytest.mark.parametrize("name", [n for n, p in PARSERS.items() if "--gpus" in actions(p)])
def test_a_list_of_devices_that_is_none_is_refused_before_any_work(name, gpus, monkeypatch, capsys):
    required = {"scripts/predict.py": ["--checkpoint", "x", "--images", "x"]}.get(name, [])
    monkeypatch.setattr(sys, "argv", [name, *required, f"--gpus={gpus}"])
    with pytest.raises(SystemExit) as exit_:
        start.run(lambda args: pytest.fail("began"), PARSERS[name])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.count("error:") == 1


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
        ("unsupervised/cifar.py", "--low-dim", "1000000000", "must be at most 65,536"),
        ("unsupervised/cifar.py", "--epochs", "1000000000000", "must be at most 1,000,000,000"),
        ("unsupervised/imagenet.py", "--image-size", "1000000000", "must be at most 10,000"),
        ("cifar-semi.py", "--batch-size", "1000000000000", "must be at most 1,000,000"),
        ("imagenet-semi.py", "--num-workers", "100000", "must be at most 1,024"),
        ("scripts/propagate.py", "--degree", "1000000", "must be at most 10,000"),
        ("scripts/propagate.py", "--power", "1000000", "must be at most 10,000"),
        ("scripts/propagate.py", "--time", "1000000", "must be at most 10,000"),
        ("scripts/predict.py", "--batch-size", "1000000000000", "must be at most 1,000,000"),
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
