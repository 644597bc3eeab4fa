"""The parser of every script."""

import argparse

from lib.cli.declared import add_options


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the script's docstring as it is, and show every default that says something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == "":
            return action.help
        return super()._get_help_string(action)


def parser(manual: str | None, settings: type | None = None) -> argparse.ArgumentParser:
    """Return a parser that shows the script's docstring `manual`; it does not guess abbreviated options.

    The options are those that the dataclass `settings` declares; without one the script adds its own.
    """
    made = argparse.ArgumentParser(description=manual, formatter_class=_Help, allow_abbrev=False)
    if settings is not None:
        add_options(made, settings)
    return made


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
