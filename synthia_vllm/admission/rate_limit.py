"""Limits over time, and when it is worth to come back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from synthia_vllm.errors import RateLimited

if TYPE_CHECKING:
    from synthia_vllm.admission.limits import Counted, Rate

_LONGEST_PROMISE: Final = 60.0  # seconds; the pace is a guess


class Bucket:
    """A limit over time: filled evenly up to `limit` in `seconds`, emptied by what is used.

    It may go below zero, for what is used up is known only afterwards.
    """

    __slots__ = ("_at", "_level", "_seconds", "limit")

    def __init__(self, limit: float, now: float, seconds: float = 60.0) -> None:
        self.limit = limit
        self._seconds = seconds
        self._level = float(limit)
        self._at = now

    def level(self, now: float) -> float:
        """What is left."""
        refill = (now - self._at) * self.limit / self._seconds
        self._level = min(self.limit, self._level + refill)
        self._at = now
        return self._level

    def set(self, level: float, now: float) -> None:
        """So much is left."""
        self._level = min(self.limit, level)
        self._at = now

    def wait(self, need: float, now: float) -> float:
        """Seconds until `need` is there; a need beyond the limit waits for a full bucket."""
        missing = min(need, self.limit) - self.level(now)
        return missing * self._seconds / self.limit if missing > 1e-6 else 0.0  # as exact as floats

    def take(self, amount: float, now: float) -> None:
        """Use up `amount`; a negative amount gives back."""
        self._level = min(self.limit, self.level(now) - amount)


class RateLimiter:
    """The buckets of one user, one for each of its rates."""

    __slots__ = ("buckets", "rates")

    def __init__(self) -> None:
        self.rates: tuple[Rate, ...] = ()
        self.buckets: dict[Rate, Bucket] = {}

    def configure(self, rates: tuple[Rate, ...], now: float) -> None:
        """Hold to `rates` from now on; the bucket of one that stays is left as it is."""
        if rates is not self.rates:
            self.rates = rates
            self.buckets = {
                rate: self.buckets.get(rate) or Bucket(rate.limit, now, rate.seconds)
                for rate in rates
            }

    def part(self, parts: int, now: float) -> RateLimiter:
        """One of so many equal parts of all this, as it is now."""
        part = RateLimiter()
        part.rates = self.rates
        for rate, bucket in self.buckets.items():
            part.buckets[rate] = Bucket(rate.limit / parts, now, rate.seconds)
            part.buckets[rate].set(bucket.level(now) / parts, now)
        return part

    def require(self, counted: Counted, need: int, now: float) -> None:
        """Raise `RateLimited`, with the seconds to wait, unless `need` can be had of each."""
        for rate, bucket in self.buckets.items():
            if rate.counted == counted:
                wait = bucket.wait(need, now)
                if wait:
                    raise RateLimited(rate.refusal(need), code=rate.name, retry_after=wait)

    def take(self, counted: Counted, amount: float, now: float) -> None:
        """Use up `amount`; a negative amount gives back."""
        for rate, bucket in self.buckets.items():
            if rate.counted == counted:
                bucket.take(amount, now)

    def headers(self, now: float) -> list[tuple[bytes, bytes]]:
        """What is left, in OpenAI's header names, which are for limits per minute."""
        found: list[tuple[bytes, bytes]] = []
        for rate, bucket in self.buckets.items():
            if rate.header:
                for what, value in (
                    ("limit", f"{rate.limit}"),
                    ("remaining", f"{max(0, int(bucket.level(now) // 1))}"),
                    ("reset", f"{bucket.wait(rate.limit, now):.3f}s"),
                ):
                    found.append((f"x-ratelimit-{what}-{rate.header}".encode(), value.encode()))
        return found


class RetryAfterEstimator:
    """How fast places come free, learnt while none is: when should a refused client come back?"""

    __slots__ = ("_last", "_promised", "gap")

    def __init__(self) -> None:
        self.gap: float | None = None
        """Seconds between two departures, lately; `None` before there were any."""
        self._last: float | None = None
        self._promised = 0.0

    def note(self, now: float, *, full: bool) -> None:
        """A place came free; `full` if none was free until now."""
        if full and self._last is not None:
            gap = now - self._last
            self.gap = gap if self.gap is None else self.gap + 0.05 * (gap - self.gap)
        self._last = now if full else None

    def wait(self, now: float, places: int) -> float:
        """Seconds until one of `places` that are taken is free for one more.

        Each who asks is given a later time, until all places will have come free once; then it
        begins anew, for those who ask are the same again, and too early.
        """
        gap = 1.0 if self.gap is None else self.gap
        self._promised = max(self._promised, now) + gap
        if self._promised - now > min(_LONGEST_PROMISE, gap * max(1, places)) + 1e-9:
            self._promised = now + gap
        return self._promised - now
