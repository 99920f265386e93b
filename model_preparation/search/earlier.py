"""Whether the result that is in a folder is of the search that is asked for, so that none is replaced unseen.

In: the folder, and what decides on a result. Out: an error that says what differs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model_preparation.errors import SurgeryError
from model_preparation.search.result_files import RESULT
from model_preparation.untrusted.untrusted_files import read_json

_LONGEST = 60  # characters of a value that is worth being shown


def check_earlier(folder: Path, asked: Mapping[str, Any], part: str) -> None:
    """Raise SurgeryError if the folder has a result, and what is asked for differs from it.

    Args:
        folder: the search's.
        asked: what decides on the result, as it will stand in it.
        part: where in the result that stands.
    """
    path = folder / RESULT
    if not path.is_file():
        return
    try:
        found = read_json(path)[part]
        differing = [name for name in {**found, **asked} if found.get(name) != asked.get(name)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SurgeryError(
            f"{path} is no search's result that can be read ({error}), and would be replaced. Choose another "
            "--output_dir, or add --overwrite."
        ) from error
    if differing:
        told = "; ".join(_told(name, found.get(name), asked.get(name)) for name in differing)
        raise SurgeryError(
            f"{folder} has the result of another search, which would be replaced: {told}. Choose another --output_dir, "
            "or add --overwrite. (Evaluations of either search stay in the journal, and are not made again.)"
        )


def _told(name: str, old: Any, new: Any) -> str:
    values = [_shown(old), _shown(new)]
    return f"{name} differs" if max(map(len, values)) > _LONGEST else f"{name} was {values[0]} and is {values[1]}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "not given" if value is None else "on" if value is True else "off" if value is False else str(value)
