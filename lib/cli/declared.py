"""Command lines from declared options (`lib.runtime.option`), and types that refuse impossible numbers."""

import argparse
import math
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Any, TypeVar, get_args

from lib.runtime.option import NOT_NEGATIVE, POSITIVE, SEED, Limit, Option, options_of

Values = TypeVar("Values", bound=Any)
WANTED = {int: "a whole number", float: "a number"}


def checked(parse: Callable[[str], Any], limit: Limit | None = None) -> Callable[[str], Any]:
    """Return a type for `add_argument` that refuses what is not finite or beyond the limit, and says why.

    Args:
        parse: function from the text to the value, such as `int`; its ValueError refuses the text.
        limit: what a number must satisfy.
    """

    def read(text: str) -> Any:
        try:
            value = parse(text)
        except ValueError as error:
            problem = f"must be {WANTED[parse]}, not {text}" if parse in WANTED else str(error)
            raise argparse.ArgumentTypeError(problem) from None
        if isinstance(value, float) and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be a finite number, not {text}")
        if limit is not None and isinstance(value, int | float) and not limit.holds(value):
            raise argparse.ArgumentTypeError(f"{limit.rule}, not {text}")
        return value

    return read


positive_int = checked(int, POSITIVE)
not_negative_int = checked(int, NOT_NEGATIVE)
positive_float = checked(float, POSITIVE)
seed = checked(int, SEED)


def flag(name: str) -> str:
    """Return the option of the attribute `name`, as the user types it."""
    return "--" + name.replace("_", "-")


def add_options(parser: argparse.ArgumentParser, kind: type) -> dict[str, argparse._ArgumentGroup]:
    """Add every option that the dataclass `kind` declares, and return their groups by name."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    declared = {each.name: each for each in fields(kind)}
    for name, each in options_of(kind).items():
        if each.group not in groups:
            groups[each.group] = parser.add_argument_group(each.group)
        short = [text for text in each.flags if not text.startswith("--")]
        long = [text for text in each.flags if text.startswith("--")]
        groups[each.group].add_argument(
            *(*short, flag(name), *long),
            dest=name,
            default=declared[name].default,
            help=each.help,
            **_keywords(declared[name], each),
        )
    return groups


def _keywords(declared: Field, option: Option) -> dict[str, Any]:
    """Return what `add_argument` must know of an option beside its names, default and help."""
    kind = (get_args(declared.type) or (declared.type,))[0]  # int of `int | None`
    if kind is bool:
        return {"action": "store_true"}
    keywords: dict[str, Any] = {"metavar": option.metavar}
    if option.choices is not None:
        keywords["choices"] = option.choices
    if option.bare is not None:
        keywords |= {"nargs": "?", "const": option.bare}
    if option.parse is not None or kind in WANTED:
        keywords["type"] = checked(option.parse or kind, option.limit)
    return keywords


def values(args: argparse.Namespace, kind: type[Values]) -> Values:
    """Make a dataclass whose fields are named as options from what the user gave."""
    return kind(**{each.name: getattr(args, each.name) for each in fields(kind)})
