"""How much of a batch users bear: found by what they see of it."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections import deque

# A step of the engine makes a token for every answer in it, and takes the longer the more they are.
# Users' gaps between tokens may get so many times as long as they are without a batch: those in the
# middle, and the long ones.
_BEARABLE: Final = (1.15, 1.25)
_LONG: Final = 0.9
_SHRINK: Final = 0.6
_GROW: Final = 1.2
_ENOUGH: Final = 60  # gaps that say something
_LOOK_AGAIN_S: Final = 20.0
_SILENCE_S: Final = 3.0


class _Gaps(NamedTuple):
    """Seconds between a user's tokens."""

    middle: float
    long: float

    def bearable(self, alone: _Gaps) -> bool:
        """Whether they are not much longer than those of a user alone."""
        middle, long = _BEARABLE
        return self.middle <= middle * alone.middle and self.long <= long * alone.long


class Pace:
    """The places that batches may hold beside users, `most` at the most.

    None at first, until it is known how long gaps are without; then more while users do not feel
    it, and fewer when they do. From time to time it is looked again how long gaps are without, for
    that changes with what users do. Where nobody reads along, nobody feels it.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = 1.0
        self._alone: _Gaps | None = None
        """Without a batch; `None` while that is looked at."""
        self._looked = 0.0
        self._count = 0
        self._since: float | None = None

    @property
    def limit(self) -> int:
        """Places that may be held now."""
        return 0 if self._alone is None else min(int(self._limit), self._most)

    def note(self, now: float, count: int, latest: deque[float]) -> None:
        """Users have seen so many gaps since the start (`count`), these the `latest` of them."""
        if self._since is None:
            self._count, self._since = count, now
            return
        seen = min(count - self._count, len(latest))
        if seen < _ENOUGH and now - self._since < _SILENCE_S:
            return
        gaps = sorted(islice(reversed(latest), seen)) or [0.0]
        found = _Gaps(gaps[len(gaps) // 2], gaps[int(_LONG * len(gaps))])
        self._count, self._since = count, now
        if self._alone is None:
            self._alone, self._looked = found, now
        elif found.bearable(self._alone):
            self._limit = min(max(self._limit * _GROW, self._limit + 1), max(1.0, self._most))
        else:
            self._limit = max(self._limit * _SHRINK, 1.0)
        if now - self._looked > _LOOK_AGAIN_S:
            self._alone = None

    def rest(self) -> None:
        """Users have gone; what was seen does not go on with what is seen next."""
        self._since = None
