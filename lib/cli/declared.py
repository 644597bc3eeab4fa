"""Command lines from declared options (`lib.runtime.option`), and types that refuse impossible numbers."""

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any, TypeVar, get_args

from lib.runtime.option import (
    BATCH_SIZE,
    NOT_NEGATIVE,
    NUM_WORKERS,
    POSITIVE,
    SEED,
    Limit,
    options_of,
)

Values = TypeVar("Values", bound=Any)
WANTED = {int: "a whole number", float: "a number"}


def checked(parse: Callable[[str], Any], limit: Limit | None = None) -> Callable[[str], Any]:
    """Return a type for `add_argument` that refuses what is not finite or beyond the limit, and says why.

    `parse` makes the value of the text, as `int` does; its ValueError refuses the text.
    """

    def read(text: str) -> Any:
        try:
            value = parse(text)
        except ValueError as error:
            problem = f"must be {WANTED[parse]}, not {text}" if parse in WANTED else str(error)
            raise argparse.ArgumentTypeError(problem) from None
        if isinstance(value, float) and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be a finite number, not {text}")
        if limit is not None and isinstance(value, int | float):
            if not limit.holds(value):
                raise argparse.ArgumentTypeError(f"{limit.rule}, not {text}")
            if value > limit.most:
                raise argparse.ArgumentTypeError(f"must be at most {limit.most:,}, not {text}")
        return value

    return read


positive_int = checked(int, POSITIVE)
not_negative_int = checked(int, NOT_NEGATIVE)
positive_float = checked(float, POSITIVE)
seed = checked(int, SEED)
batch_size = checked(int, BATCH_SIZE)
num_workers = checked(int, NUM_WORKERS)


def flag(name: str) -> str:
    """Return the option of the attribute `name`, as the user types it."""
    return "--" + name.replace("_", "-")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the script's docstring as it is, and show every default that says something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == "":
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser in which the value of an option may choose the defaults of others.

    `presets` maps the name of an option, its value and the name of another option to a default.
    """

    presets: Mapping[str, Mapping[str, Mapping[str, Any]]] = MappingProxyType({})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = vars(namespace) if namespace else {}
        chosen = super().parse_known_args(args, argparse.Namespace(**given))[0]
        # what the namespace has already, argparse takes for the default
        start = argparse.Namespace(**self.chosen_defaults(chosen) | given)
        return super().parse_known_args(args, start)

    def chosen_defaults(self, args: argparse.Namespace) -> dict[str, Any]:
        """Return the defaults that go with the values in `args`, by the name of their option."""
        found: dict[str, Any] = {}
        for name, values in self.presets.items():
            found |= values.get(getattr(args, name), {})
        return found


def parser(manual: str | None, settings: type | None = None) -> Parser:
    """Return a parser that shows the script's docstring `manual`; it does not guess abbreviated options.

    The options are those that the dataclass `settings` declares; without one the script adds its own.
    """
    made = Parser(description=manual, formatter_class=_Help, allow_abbrev=False)
    if settings is not None:
        add_options(made, settings)
        made.presets = presets_of(settings)
    return made


def presets_of(kind: type) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the `PRESETS` of a dataclass of options, of those options that it has."""
    known = options_of(kind)
    return {
        choosing: {
            value: {name: default for name, default in defaults.items() if name in known}
            for value, defaults in values.items()
        }
        for choosing, values in getattr(kind, "PRESETS", {}).items()
    }


def add_dummy(parser: argparse.ArgumentParser) -> None:
    """Add --dummy, for the scripts that read images from files."""
    parser.add_argument(
        "--dummy",
        dest="dataset",
        action="store_const",
        const="dummy",
        default=argparse.SUPPRESS,  # --dataset has the default
        help="train on random images, to measure the speed without data; without other folders, checkpoints "
        "and log go to folders that end in -dummy",
    )


def add_options(parser: argparse.ArgumentParser, kind: type) -> dict[str, argparse._ArgumentGroup]:
    """Add every option that the dataclass `kind` declares, and return their groups by name."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, option in options_of(kind).items():
        field = kind.__dataclass_fields__[name]
        value_type = (get_args(field.type) or (field.type,))[0]  # int of `int | None`
        keywords: dict[str, Any] = {"metavar": option.metavar}
        if value_type is bool:
            keywords = {"action": "store_true"}
        elif option.parse is not None or value_type in WANTED:
            keywords["type"] = checked(option.parse or value_type, option.limit)
        if option.choices is not None:
            keywords["choices"] = option.choices
        if option.bare is not None:
            keywords |= {"nargs": "?", "const": option.bare}
        short = [text for text in option.flags if not text.startswith("--")]
        long = [text for text in option.flags if text.startswith("--")]
        names = (*short, flag(name), *long)
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        others = [
            f"--{choosing} {value}: {defaults[name]}"
            for choosing, values in presets_of(kind).items()
            for value, defaults in values.items()
            if name in defaults
        ]
        text = f"{option.help} ({', '.join(others)})" if others else option.help
        groups[option.group].add_argument(
            *names, dest=name, default=field.default, help=text, **keywords
        )
    return groups


def values(args: argparse.Namespace, kind: type[Values]) -> Values:
    """Make a dataclass whose fields are named as options from what the user gave."""
    return kind(**{each.name: getattr(args, each.name) for each in fields(kind)})
