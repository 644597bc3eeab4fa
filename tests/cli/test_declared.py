"""Options declared on dataclass fields: the command line that comes from them, and what it refuses."""

from dataclasses import dataclass, fields
from typing import ClassVar

import pytest

from lib.cli import declared
from lib.runtime.option import (
    FRACTION,
    POSITIVE,
    invariant,
    option,
    options_of,
    redeclared,
    resume_invariants,
)
from lib.training import settings


@dataclass(frozen=True)
class Size:
    GROUP: ClassVar[str] = "size"

    width: int = invariant(3, "-w", "--broad", limit=POSITIVE, help="how broad")
    share: float = option(0.5, limit=FRACTION, help="how much of it")


@dataclass(frozen=True)
class Look:
    GROUP: ClassVar[str] = "look"

    color: str = invariant("red", choices=("red", "blue"), help="which")
    glow: bool = option(False, help="whether it glows")
    mode: str = option("", choices=("fast", "best"), bare="fast", help="how it is made")
    count: int | str = option(1, parse=lambda text: "all" if text == "all" else int(text), help="n")


@dataclass(frozen=True)
class Thing(Size, Look):
    color: str = "blue"
    width: int = redeclared(Size, "width", "--wide", default=4, help="how wide")


def parse(*words):
    return declared.values(declared.parser("manual", Thing).parse_args(words), Thing)


def test_the_command_line_makes_the_dataclass():
    assert parse() == Thing()
    assert (Thing().width, Thing().share, Thing().color) == (4, 0.5, "blue")
    line = ("-w", "7", "--share", "1", "--color", "red", "--glow", "--mode", "--count", "all")
    made = Thing(width=7, share=1.0, color="red", glow=True, mode="fast", count="all")
    assert parse(*line) == made
    for name in ("--width", "--broad", "--wide"):
        assert parse(name, "9", "--mode", "best") == Thing(width=9, mode="best")


def test_a_subclass_changes_what_it_repeats_and_keeps_the_rest():
    assert list(options_of(Thing)) == ["width", "share", "color", "glow", "mode", "count"]
    width = options_of(Thing)["width"]
    assert (width.help, width.group, width.limit) == ("how wide", "size", POSITIVE)
    assert options_of(Size)["width"].help == "how broad"
    assert options_of(Thing)["color"] == options_of(Look)["color"]  # another default alone
    assert resume_invariants(Thing) == {"width": 4, "color": "blue"}


def test_help_has_the_groups_in_order_and_every_name_and_default():
    output = declared.parser("manual", Thing).format_help()
    assert output.index("\nsize:") < output.index("\nlook:")
    assert "-w WIDTH, --width WIDTH, --broad WIDTH, --wide WIDTH" in output
    assert "how wide (default: 4)" in output
    assert "which (default: blue)" in output
    assert "whether it glows\n" in output


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--width 0", "--width/--broad/--wide: must be positive, not 0"),
        ("--width 2.5", "must be a whole number, not 2.5"),
        ("--width nan", "must be a whole number, not nan"),
        ("--share nan", "--share: must be a finite number, not nan"),
        ("--share inf", "must be a finite number, not inf"),
        ("--share=-inf", "must be a finite number, not -inf"),
        ("--share much", "must be a number, not much"),
        ("--share 1.01", r"must lie in [0, 1], not 1.01"),
        ("--color green", "--color: invalid choice: 'green'"),
        ("--count few", "invalid literal"),
    ],
)
def test_an_impossible_value_is_refused_in_one_message(line, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(*line.split())
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error:") == 1


@pytest.mark.parametrize(
    "kind",
    [
        settings.CifarPretraining,
        settings.ImageNetPretraining,
        settings.FinetuningSettings,
        settings.ImageNetFinetuning,
    ],
)
def test_every_setting_of_a_training_script_is_a_declared_option_that_is_explained(kind):
    found = options_of(kind)
    assert set(found) == {each.name for each in fields(kind)}
    assert all(each.help for each in found.values())
    assert declared.values(declared.parser("manual", kind).parse_args([]), kind) == kind()
