"""Settings classes: a `Flag` in a field's annotation makes the field a flag of a command, and checks its values."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from model_preparation.command_line import CommandParser
from model_preparation.errors import SurgeryError

T = TypeVar("T")


class Flag(NamedTuple):
    """In the annotation of a field: makes the field a flag of a command too.

    `read` is argparse's `type`. If `read` has a method `text`, this method turns a value back into text. `name` is the
    flag's name, if it differs from the field's. --help adds the default to `help`, unless `help` names it.
    """

    metavar: str | None
    help: str
    read: Callable[[str], Any] = str
    nargs: str | None = None
    name: str = ""

    def text(self, value: Any) -> Any:
        """The text, or list of texts, that a user types to give this value."""
        return [str(each) for each in value] if self.nargs else getattr(self.read, "text", str)(value)


class OneOf:
    """Reads a word: one of `words`, which stays a text, or a key of `values`, which becomes the value."""

    def __init__(self, *words: str, **values: Any):
        self.values = dict(zip(words, words, strict=True)) | values

    def __call__(self, text: str) -> Any:
        if text not in self.values:
            raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {', '.join(self.values)})")
        return self.values[text]

    def text(self, value: Any) -> str:
        return next((word for word, each in self.values.items() if each == value), str(value))


YES_OR_NO = OneOf(yes=True, no=False)


class CheckedSettings:
    """A base class for settings. Its fields refuse the values that their flags refuse."""

    def __post_init__(self) -> None:
        for name, default, flag in flags_of(self):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
            read = YES_OR_NO if default is False else flag.read
            if read in (str, Path) or value is default is None:
                continue
            try:
                for each in value if flag.nargs else [value]:
                    found = read(getattr(read, "text", str)(each))
                    if isinstance(each, str) and not isinstance(found, str):
                        raise SurgeryError(f"{name} is the text {each!r}. Give {found!r}.")
            except argparse.ArgumentTypeError as error:
                if isinstance(read, OneOf):
                    raise SurgeryError(f"{name} is {value!r}. Choose one of {', '.join(read.values)}.") from None
                raise SurgeryError(f"{name} is {value!r}: {error}. Give another value.") from None


def add_flags(parser: CommandParser, settings: type, *, without: tuple[str, ...] = ()) -> None:
    """Add a flag for each field of a settings class whose annotation has one."""
    for name, default, flag in flags_of(settings):
        word = f"--{flag.name or name}"
        if name in without:
            continue
        if default is False:
            parser.add_argument(word, dest=name, action="store_true", help=flag.help)
            continue
        shown = None if default is None else flag.text(default)
        help = flag.help if "(default" in flag.help or not shown else f"{flag.help} (default: %(default)s)"
        words = f"{{{','.join(flag.read.values)}}}" if isinstance(flag.read, OneOf) else None
        more = {"metavar": flag.metavar or words, "help": help, "type": flag.read, "nargs": flag.nargs}
        parser.add_argument(word, dest=name, default=shown, **more)


def from_flags(settings: type[T], args: argparse.Namespace, **more: Any) -> T:
    """The settings from the parsed flags. `more` has the fields that do not come from flags."""
    names = [each.name for each in fields(settings) if hasattr(args, each.name)]  # type: ignore[arg-type]
    return settings(**{name: getattr(args, name) for name in names} | more)


def as_flags(settings: Any) -> Mapping[str, Any]:
    """{flag's name: value}, as in a --config file."""
    found = {}
    for name, default, flag in flags_of(settings):
        value = getattr(settings, name)
        found[flag.name or name] = value if value is None or default is False else flag.text(value)
    return found


def flags_of(settings: Any) -> list[tuple[str, Any, Flag]]:
    """(name, default, flag) of each field that has a flag, for a settings class or object."""
    found = [(each, getattr(each.type, "__metadata__", (None,))[0]) for each in fields(settings)]
    return [(each.name, each.default, flag) for each, flag in found if flag is not None]
