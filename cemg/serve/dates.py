"""Dates and times in ISO 8601, as attributes and filters hold them."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

ISO_PATTERN = (  # a date, optionally with a time and an offset
    r"^[0-9]{4}-[0-9]{2}-[0-9]{2}"
    r"([T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,9})?)?(Z|[+-][0-9]{2}:?[0-9]{2})?)?$"
)
_ISO = re.compile(ISO_PATTERN.replace("$", r"\Z"))
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def microseconds(text: str) -> int | None:
    """Returns the microseconds since 1970 of an ISO date or time, or None if ``text`` is not one.

    Without an offset it is in UTC; a date is its first moment. Digits after the microseconds are dropped.

    Example:
        >>> microseconds("1970-01-02"), microseconds("1970-01-01T01:00:00.5+01:00"), microseconds("soon")
        (86400000000, 500000, None)
    """
    if not _ISO.match(text):
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:  # such as month 13
        return None
    offset = moment.utcoffset() or timedelta()  # subtracted last: the year 1 with an offset has no datetime
    return (moment.replace(tzinfo=UTC) - _EPOCH - offset) // _MICROSECOND
