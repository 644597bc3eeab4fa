"""Schemas: what the entries of a file may be. A file is checked against one as soon as it is loaded.

A `Check` yields a line for everything that is wrong with a value. A schema is a dict of checks by the name of
the entry; entries without a check may be anything, and are never read.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lib.files.published_pickle import printable

Check = Callable[[Any, str], Iterator[str]]  # a value and its name -> what is wrong with it
Schema = Mapping[str, Check]

MOST = 2**53  # of a count: every smaller whole number is a float64, too
SHOWN, MOST_PROBLEMS = 60, 20  # characters of a value in a message, and wrong values
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def problems(entries: Mapping[Any, Any], schema: Schema, prefix: str = "") -> list[str]:
    """List what is wrong with those entries that the schema knows."""
    return [
        problem
        for name, check in schema.items()
        if name in entries
        for problem in check(entries[name], prefix + name)
    ]


def require(entries: Mapping[Any, Any], schema: Schema, source: object) -> None:
    """Raise ValueError, listing what is wrong with the entries of the file `source`, if anything is."""
    if wrong := problems(entries, schema):
        more = len(wrong) - MOST_PROBLEMS
        listing = "; ".join(wrong[:MOST_PROBLEMS]) + (f" and {more} more" if more > 0 else "")
        raise ValueError(f"{source} is damaged or made by other means: {listing}")


def shown(value: Any) -> str:
    """Name a value in a message: numbers and short text as they are, others by their kind."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    if value is None or isinstance(value, bool | int | float | str):
        text = ascii(value)
        return text if len(text) <= SHOWN else text[:SHOWN] + "..."
    return f"a {type(value).__name__}"


def expect(is_good: Callable[[Any], bool], wanted: str) -> Check:
    """Return a check of one condition, which `wanted` describes as in `epoch is None, not a number`."""

    def check(value: Any, name: str) -> Iterator[str]:
        if not is_good(value):
            yield f"{printable(name)} is {shown(value)}, not {wanted}"

    return check


def whole(low: int = 0, high: int = MOST) -> Check:
    return expect(
        lambda v: type(v) is int and low <= v <= high, f"a whole number from {low} to {high}"
    )


def number(low: float, high: float, *, or_nan: bool = False) -> Check:
    """Return the check of a number, or of a tensor of one number as the published scripts wrote some."""

    def is_good(value: Any) -> bool:
        if isinstance(value, Tensor) and value.numel() == 1 and value.dtype in FLOATS + INTEGERS:
            value = value.item()
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and (low <= value <= high or (or_nan and math.isnan(value)))

    return expect(is_good, f"a number from {low:g} to {high:g}")


def optional(check: Check) -> Check:
    """Allow None beside what `check` allows."""
    return lambda value, name: iter(()) if value is None else check(value, name)


text = expect(lambda v: isinstance(v, str), "text")
flag = expect(lambda v: isinstance(v, bool), "true or false")


def list_of(check: Check, length: int | None = None) -> Check:
    def checked(value: Any, name: str) -> Iterator[str]:
        if not isinstance(value, list | tuple) or length not in (None, len(value)):
            many = "" if length is None else f" of {length}"
            yield f"{name} is {shown(value)}, not a list{many}"
            return
        for place, member in enumerate(value):
            wrong = list(check(member, f"{name}[{place}]"))
            yield from wrong
            if wrong:
                return  # one member stands for all

    return checked


def entries(schema: Schema, *, required: bool = False) -> Check:
    """Return the check of a dict, of those of its entries that the schema knows, or of all of them."""

    def check(value: Any, name: str) -> Iterator[str]:
        if not isinstance(value, dict) or not all(type(key) is str for key in value):
            yield f"{name} is {shown(value)}, not a dict with text for keys"
            return
        missing = [key for key in schema if key not in value] if required else []
        if missing:
            yield f"{name} has no {', '.join(missing)}"
        yield from problems(value, schema, f"{name}.")

    return check


def dict_of(check: Check, keys: type = str) -> Check:
    """Return the check of a dict whose keys are of one type and whose values are alike."""

    def checked(value: Any, name: str) -> Iterator[str]:
        if not isinstance(value, dict) or not all(type(key) is keys for key in value):
            yield f"{name} is {shown(value)}, not a dict with keys of type {keys.__name__}"
            return
        for key, member in value.items():
            wrong = list(check(member, f"{name}.{key}"))
            yield from wrong
            if wrong:
                return

    return checked


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str for key in value) and all(map(_plain, value.values()))
    if isinstance(value, list | tuple | set):
        return all(map(_plain, value))
    return not isinstance(value, Tensor)


# No tensors: what a file merely records is compared and printed, and comparing a tensor gives no yes or no.
_plain_dict = expect(lambda v: isinstance(v, dict) and _plain(v), "a dict of plain values")


def record(schema: Schema) -> Check:
    """Return the check of a dict of plain values, some of which the schema knows."""

    def check(value: Any, name: str) -> Iterator[str]:
        wrong = list(_plain_dict(value, name))
        yield from wrong or problems(value, schema, f"{name}.")

    return check


def tensor(
    dimensions: int | None,
    kinds: tuple[torch.dtype, ...] = FLOATS,
    low: float = -math.inf,
    high: float = math.inf,
) -> Check:
    """Return the check of a dense tensor: so many dimensions, one of the kinds, finite, within limits."""

    def check(value: Any, name: str) -> Iterator[str]:
        wanted = "" if dimensions is None else f" of {dimensions} dimensions"
        if not isinstance(value, Tensor) or value.dtype not in kinds:
            names = ", ".join(str(kind).removeprefix("torch.") for kind in kinds)
            yield f"{printable(name)} is {shown(value)}, not a tensor{wanted} of {names}"
        elif dimensions is not None and value.ndim != dimensions:
            yield f"{printable(name)} is {shown(value)}, not a tensor{wanted}"
        elif value.is_floating_point() and not torch.isfinite(value).all():
            yield f"{printable(name)} holds NaN or infinity"
        elif value.numel() and not low <= (least := value.min().item()):
            yield f"{printable(name)} holds {least}, below {low:g}"
        elif value.numel() and not (most := value.max().item()) <= high:
            yield f"{printable(name)} holds {most}, above {high:g}"

    return check
