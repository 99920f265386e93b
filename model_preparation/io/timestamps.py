"""The time that is written into what we make."""

import os
from datetime import UTC, datetime

from model_preparation.errors import SurgeryError


def creation_time() -> str:
    """Now in UTC, to the second, in ISO 8601; or the time that $SOURCE_DATE_EPOCH says, in seconds since 1970.

    Source of the variable: reproducible-builds.org/specs/source-date-epoch.

    Raises:
        SurgeryError: if the variable is set to something else.
    """
    given = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        moment = datetime.now(UTC) if given is None else datetime.fromtimestamp(int(given), UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise SurgeryError(
            f"SOURCE_DATE_EPOCH is {given!r}, which is no number of seconds since 1970. Set it right, or unset it."
        ) from error
    return moment.isoformat(timespec="seconds")
