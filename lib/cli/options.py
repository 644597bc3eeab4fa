"""The parser of every script, and the groups of options that several scripts share."""

import argparse
from dataclasses import dataclass

from lib.cli.declared import add_options
from lib.runtime.option import redeclared
from lib.training.shared_settings import Compute, Data, Network
from models import SMALL_ARCHITECTURES


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the script's docstring as it is, and show every default that says something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == "":
            return action.help
        return super()._get_help_string(action)


def parser(manual: str | None, settings: type | None = None) -> argparse.ArgumentParser:
    """Return a parser that shows the script's docstring; it does not guess abbreviated options.

    Args:
        manual: the docstring.
        settings: a dataclass whose declared options the script has; None: the script adds its own.
    """
    made = argparse.ArgumentParser(description=manual, formatter_class=_Help, allow_abbrev=False)
    if settings is not None:
        add_options(made, settings)
    return made


def add_data(parser: argparse.ArgumentParser, *aliases: str) -> None:
    """Add the options of the data set; `aliases` are further names of --data-dir."""

    @dataclass(frozen=True)
    class AliasedData(Data):
        data_dir: str = redeclared(Data, "data_dir", *aliases)

    add_options(parser, AliasedData)


def add_model(
    parser: argparse.ArgumentParser, *, known: str = SMALL_ARCHITECTURES
) -> argparse._ArgumentGroup:
    """Add --architecture; `known` says in its help which names it takes. Return the group."""

    @dataclass(frozen=True)
    class KnownNetwork(Network):
        architecture: str = redeclared(Network, "architecture", help=known)

    return add_options(parser, KnownNetwork)[Network.GROUP]


def add_compute(parser: argparse.ArgumentParser) -> None:
    """Add the options of the device, its precision and the seed."""
    add_options(parser, Compute)


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
