"""The origin that our JSON files record: the versions of the package and its libraries, and the time."""

import os
from datetime import UTC, datetime
from importlib.metadata import version

from model_preparation.errors import SurgeryError

__version__ = "0.5.0"

_LIBRARIES = ("torch", "transformers", "safetensors")


def versions() -> dict[str, str]:
    """The version of this package, and of the libraries that decide the contents of our files."""
    import torch  # its own attribute also has the build's name, such as +cpu

    installed = {name: version(name) for name in _LIBRARIES} | {"torch": torch.__version__}
    return {"model_preparation": __version__, **installed}


def creation_time() -> str:
    """Now in UTC, as ISO 8601 to the second; or the time in $SOURCE_DATE_EPOCH, in seconds since 1970.

    Source of the variable: reproducible-builds.org/specs/source-date-epoch.

    Raises:
        SurgeryError: if the variable holds something else.
    """
    given = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        moment = datetime.now(UTC) if given is None else datetime.fromtimestamp(int(given), UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise SurgeryError(
            f"SOURCE_DATE_EPOCH is {given!r}, which is no number of seconds since 1970. Set it to one, or unset it."
        ) from error
    return moment.isoformat(timespec="seconds")
