"""How much of a batch users bear: found by what they see of it."""

from __future__ import annotations

from typing import Final

# A step of the engine makes a token for every answer in it, and takes the longer the more they are.
# Users' gaps between tokens may get so many times as long as they are without a batch.
_BEARABLE: Final = 1.15
_SHRINK: Final = 0.6
_GROW: Final = 1.2
_ENOUGH: Final = 30  # gaps that say something
_LOOK_AGAIN_S: Final = 15.0
_SILENCE_S: Final = 3.0


class Pace:
    """The places that batches may hold beside users, `most` at the most.

    None at first, until it is known how long gaps are without; then more while users do not feel
    it, and fewer when they do. From time to time it is looked again how long gaps are without, for
    that changes with what users do. Where nobody reads along, nobody feels it.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = 1.0
        self._alone: float | None = None
        """Seconds of a gap without a batch; `None` while that is looked at."""
        self._looked = 0.0
        self._gaps = 0
        self._seconds = 0.0
        self._since: float | None = None

    @property
    def limit(self) -> int:
        """Places that may be held now."""
        return 0 if self._alone is None else min(int(self._limit), self._most)

    def note(self, now: float, gaps: int, seconds: float) -> None:
        """Users have seen so many `gaps` since the start, of so many `seconds` together."""
        if self._since is None:
            self._begin(now, gaps, seconds)
            return
        seen = gaps - self._gaps
        if seen < _ENOUGH and now - self._since < _SILENCE_S:
            return
        mean = (seconds - self._seconds) / seen if seen else 0.0
        self._begin(now, gaps, seconds)
        if self._alone is None:
            self._alone, self._looked = mean, now
        elif mean > _BEARABLE * self._alone:
            self._limit = max(self._limit * _SHRINK, 1.0)
        else:
            self._limit = min(max(self._limit * _GROW, self._limit + 1), max(1.0, self._most))
        if now - self._looked > _LOOK_AGAIN_S:
            self._alone = None

    def rest(self) -> None:
        """Users have gone; what was seen does not go on with what is seen next."""
        self._since = None

    def _begin(self, now: float, gaps: int, seconds: float) -> None:
        self._gaps, self._seconds, self._since = gaps, seconds, now
