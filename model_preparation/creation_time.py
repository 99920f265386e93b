"""The time that our JSON files record."""

import os
from datetime import UTC, datetime

from model_preparation.errors import SurgeryError


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
