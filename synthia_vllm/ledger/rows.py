"""What the ledger counts, and of what: a row is of one user, model, route and hour."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from typing import Final, NamedTuple

HOUR: Final = 3600
COUNTS: Final = (
    "requests",
    "refused",
    "prompt_tokens",
    "cached_tokens",
    "answer_tokens",
    "seconds",
)
GROUPS: Final = ("user", "model", "route", "day", "hour")
"""What can be added up by."""


class Key(NamedTuple):
    """What a row is of."""

    user: str
    model: str
    route: str
    hour: int
    """Its beginning, in seconds since 1970."""


class Used(NamedTuple):
    """What one request used, whatever way it ended."""

    user: str
    model: str
    route: str
    refused: bool
    """Whether it was answered with an error's status."""
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int
    seconds: float


UNKNOWN: Final = "-"
"""Who has no valid key, and the model of a request that was refused before it was known."""


Rows = dict[Key, list[float]]
"""Numbers by `COUNTS`, in that order."""


def merge(into: Rows, more: Rows, most: int) -> int:
    """Add `more` to `into`, which holds no more than `most`; return how many rows were left out."""
    left_out = 0
    for key, counts in more.items():
        known = into.get(key)
        if known is not None:
            into[key] = [a + b for a, b in zip(known, counts, strict=True)]
        elif len(into) < most:
            into[key] = counts
        else:
            left_out += 1
    return left_out


def parse_groups(text: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """``model,day`` as names. Raises `ValueError` with what is wrong."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in allowed:
            raise ValueError(f"it can be {', '.join(allowed)}, with commas, not {name[:40]!r}")
    return tuple(dict.fromkeys(names))


def parse_time(text: str, *, end: bool = False) -> int:
    """A date, or a date and a time, in UTC unless it says otherwise, as seconds since 1970.

    Rows are of whole hours: rounded to the earlier one, and for the `end` of a time to the later.
    Raises `ValueError` with what is wrong.
    """
    if not re.match(r"\d{4}-\d\d-\d\d", text):
        raise ValueError(f"a date such as 2026-01-31 or 2026-01-31T12:00Z, not {text[:40]!r}")
    try:
        moment = datetime.fromisoformat(text)
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        rounded = (math.ceil(seconds / HOUR) if end else math.floor(seconds / HOUR)) * HOUR
        datetime.fromtimestamp(rounded, UTC)  # there are years that only one of them knows
    except (ValueError, OverflowError) as error:
        raise ValueError(f"there is no time {text[:40]!r}") from error
    return rounded
