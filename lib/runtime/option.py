"""Command-line options, each declared once on the dataclass field that holds its value.

    @dataclass(frozen=True)
    class Optimization:
        GROUP: ClassVar[str] = "optimization"
        lr: float = invariant(0.03, "--rate", limit=POSITIVE, help="highest learning rate")

The option is named after the field, `--lr`. `lib.cli.declared` makes the command line from such classes, and
`resume_invariants` lists what a resumed run must not change. A subclass that repeats a field with another
value, `lr: float = 0.1`, changes the default and nothing else; `redeclared` changes more.
"""

import inspect
from collections.abc import Callable, Collection
from dataclasses import MISSING, dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Limit:
    """A rule that a number must satisfy: its text for the user, its test, and the largest number.

    A number beyond that is a slip: it would fill the memory, or never end.
    """

    rule: str
    holds: Callable[[float], bool]
    most: float = 10**9


POSITIVE = Limit("must be positive", lambda number: number > 0)
NOT_NEGATIVE = Limit("must be at least 0", lambda number: number >= 0)
FRACTION = Limit("must lie in [0, 1]", lambda number: 0 <= number <= 1)
OPEN_FRACTION = Limit("must lie between 0 and 1", lambda number: 0 < number < 1)
POSITIVE_FRACTION = Limit("must lie in (0, 1]", lambda number: 0 < number <= 1)
MOMENTUM = Limit("must lie in [0, 1)", lambda number: 0 <= number < 1)
SEED = Limit("must be at least 0 and below 2**63", lambda number: 0 <= number < 2**63, 2**63)
RATE = replace(POSITIVE, most=1e38)  # a float32; training ends by itself where it diverges
SIDE = replace(POSITIVE, most=10_000)  # pixels
BATCH_SIZE = replace(POSITIVE, most=10**6)
NUM_WORKERS = replace(NOT_NEGATIVE, most=1024)


@dataclass(frozen=True)
class Option:
    """The properties of an option besides name, default and type, which the field has."""

    flags: tuple[str, ...]  # further names, such as `-b`
    help: str
    limit: Limit | None = None  # a number that is not finite is refused anyway
    choices: Collection[str] | None = None
    metavar: str | None = None
    bare: str | None = None  # value of an option that the user gives without one
    parse: Callable[[str], Any] | None = None  # None takes the type of the field
    invariant: bool = False  # whether a resumed run must have the same value
    group: str = ""  # heading in --help, the `GROUP` of the class that declares the field


def option(default: Any, *flags: str, help: str, **more: Any) -> Any:
    """Declare an option as a dataclass field; further keywords are attributes of `Option`."""
    return field(default=default, metadata={"option": Option(flags, help, **more)})


def invariant(default: Any, *flags: str, **more: Any) -> Any:
    """Declare an option, as `option` does, that a resumed run must not change."""
    return option(default, *flags, invariant=True, **more)


def redeclared(
    kind: type, name: str, *more_flags: str, default: Any = MISSING, **changes: Any
) -> Any:
    """Declare the option `name` of the dataclass `kind` again in a subclass, with differences.

    These are `more_flags` in addition to those that it has, another default, and attributes of `Option`.
    """
    declared = options_of(kind)[name]
    changed = replace(declared, flags=declared.flags + more_flags, **changes)
    value = kind.__dataclass_fields__[name].default if default is MISSING else default
    return field(default=value, metadata={"option": changed})


def options_of(kind: type) -> dict[str, Option]:
    """Return the options of a dataclass and its bases by field: bases first, in their order."""
    found: dict[str, Option] = {}
    for base in kind.__bases__:
        for name, declared in options_of(base).items():
            found.setdefault(name, declared)
    own = kind.__dict__.get("__dataclass_fields__", {})
    for name in inspect.get_annotations(kind):
        if name in own and "option" in own[name].metadata:
            group = found[name].group if name in found else kind.GROUP
            found[name] = replace(own[name].metadata["option"], group=group)
    return found


def resume_invariants(kind: type) -> dict[str, Any]:
    """Return the options that a resumed run must not change, with their defaults."""
    declared = kind.__dataclass_fields__
    return {
        name: declared[name].default for name, each in options_of(kind).items() if each.invariant
    }
