"""Whether the result that is in a folder is of the search that is asked for, so that none is replaced unseen.

In: the folder, and what decides on a result. Out: an error that says what differs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model_preparation.errors import SurgeryError
from model_preparation.io.identity import differences
from model_preparation.io.untrusted.untrusted_files import read_json
from model_preparation.search.result_files import RESULT


def check_earlier(folder: Path, asked: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise SurgeryError if the folder has a result, and what is asked for differs from it.

    Args:
        folder: the search's.
        asked: what decides on the result, as it will stand in it, by the part of the result where that is.
    """
    path = folder / RESULT
    if not path.is_file():
        return
    try:
        found = read_json(path)
        differing = [each for part in asked for each in differences(found.get(part, {}), asked[part])]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SurgeryError(
            f"{path} is no search's result that can be read ({error}), and would be replaced. Choose another "
            "--output_dir, or add --overwrite."
        ) from error
    if differing:
        raise SurgeryError(
            f"{folder} has the result of another search, which would be replaced: {'; '.join(differing)}. Choose "
            "another --output_dir, or add --overwrite. (Evaluations of either search stay in the journal, and are not "
            "made again.)"
        )
