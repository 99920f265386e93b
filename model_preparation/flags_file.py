"""Reads a YAML file of settings as text: `--config FILE`, and the experiments of run_experiment.py.

Every value is the text in the file, as a user would type it on a command line. The command's flags check the value. So
`on` stays `on`, and 010 stays 010.
"""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from model_preparation.errors import SurgeryError
from model_preparation.io.text import read_text

if TYPE_CHECKING:
    import yaml

Value: TypeAlias = "str | list[Any] | dict[str, Entry]"


@dataclass(frozen=True)
class Entry:
    """A key's value and its place, such as "FILE, line 3"."""

    place: str
    value: Value


def read_entries(path: Path, lists: Collection[str] = ()) -> dict[str, Entry]:
    """{key: entry} for each key of a YAML file. A hyphen in a key becomes an underscore.

    A key in `lists` may have a list of mappings as its value.

    Raises:
        SurgeryError: if the file cannot be read, has a key twice, or has a value that no flag can have. The
            message names the line.
    """
    import yaml

    try:
        node = yaml.compose(read_text(path), Loader=yaml.BaseLoader)
        return {} if node is None else _entries(node, path, lists)
    except OSError as error:
        raise SurgeryError(f"{path} cannot be read ({error.strerror}). Give a YAML file.") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise SurgeryError(f"{path}{where}: this is not YAML ({reason}). Write `key: value` in each line.") from error


def nearest(word: str, known: Iterable[str]) -> str:
    """A sentence with the known word that the user probably meant; "" if none is near."""
    near = difflib.get_close_matches(word, known, 1, 0.5)
    return f" The nearest is {near[0]}." if near else ""


def _entries(node: "yaml.Node", path: Path, lists: Collection[str] = ()) -> dict[str, Entry]:
    place = _place(node, path)
    if node.id != "mapping":
        raise SurgeryError(f"{place}: keys with values are needed. Write `key: value` in each line.")
    found: dict[str, Entry] = {}
    for key_node, value_node in node.value:
        place = _place(key_node, path)
        if key_node.id != "scalar":
            raise SurgeryError(f"{place}: a key must be a word. Write `key: value` in each line.")
        key = key_node.value.replace("-", "_")
        if key in found:
            raise SurgeryError(f"{place}: {key} is there twice. Remove one of the two.")
        is_list = (
            key in lists and value_node.id == "sequence" and all(item.id == "mapping" for item in value_node.value)
        )
        items = [_entries(item, path) for item in value_node.value] if is_list else None
        found[key] = Entry(place, _value(value_node, path, f"{place}: {key}") if items is None else items)
    return found


def _value(node: "yaml.Node", path: Path, what: str) -> Value:
    if node.id == "mapping":
        return _entries(node, path)
    if node.id == "sequence":
        if not all(item.id == "scalar" for item in node.value):
            raise SurgeryError(f"{what} has a list with lists or keys in it. Give single values, such as [11, 13].")
        return [item.value for item in node.value]
    if node.style is None and node.value in ("", "~", "null"):
        raise SurgeryError(f"{what} has no value. Give one, or remove the line.")
    return node.value


def _place(node: "yaml.Node", path: Path) -> str:
    return f"{path}, line {node.start_mark.line + 1}"


def as_yaml(values: Mapping[str, Any]) -> str:
    """The values as YAML text, for `read_entries`."""
    import yaml

    return yaml.safe_dump(_typed(values), sort_keys=False, allow_unicode=True, width=1000)


def _typed(value: Any) -> Any:
    """The value, with a number in place of each text that is an integer: YAML writes no quotes around a number."""
    if isinstance(value, Entry):
        return _typed(value.value)
    if isinstance(value, Mapping):
        return {key: _typed(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_typed(each) for each in value]
    is_integer = isinstance(value, str) and re.fullmatch(r"-?(0|[1-9]\d{0,18})", value)
    return int(value) if is_integer else value
