"""Flags of the commands that train: one for each field of their settings, with its default in --help."""

import argparse
from typing import Any

from model_preparation.command_line import CommandParser


def add_setting(parser: CommandParser, settings: type, name: str, *, help: str, flag: str = "", **kwargs: Any) -> None:
    """Add the flag of the field `name`. The parsed arguments have the field only if the user gave the flag.

    Args:
        settings: the dataclass, which has the default.
        flag: the flag's name where it is not the field's.
        kwargs: as argparse takes them.
    """
    default = getattr(settings, name)
    if isinstance(default, bool):
        default = "yes" if default else "no"
    if kwargs.get("action") != "store_true":
        help += f" (default: {'none' if default in ((), None) else default})"
    parser.add_argument(f"--{flag or name}", dest=name, default=argparse.SUPPRESS, help=help, **kwargs)
