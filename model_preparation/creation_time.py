"""The time that our JSON files record."""

import os
from datetime import UTC, datetime

from model_preparation.errors import SurgeryError


def creation_time() -> str:
    """The time in $SOURCE_DATE_EPOCH (seconds since 1970), or now if it is not set: UTC, in ISO 8601, to the second.

    reproducible-builds.org/specs/source-date-epoch defines the variable.

    Raises:
        SurgeryError: if the variable is not a number of seconds.
    """
    given = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        moment = datetime.now(UTC) if given is None else datetime.fromtimestamp(int(given), UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise SurgeryError(
            f"SOURCE_DATE_EPOCH is {given!r}, not a number of seconds since 1970. Set it to such a number, or unset it."
        ) from error
    return moment.isoformat(timespec="seconds")
