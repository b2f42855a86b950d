"""Fewer, fuller outputs: the text of a stream waits for more of it where tokens are many.

A reader cannot see a hundred changes a second, and the `write` system call is the dearest part of a
streamed token. Where the process has few tokens to write, waiting would gain nothing, so none is
done.
"""

from __future__ import annotations

import time
from typing import Final

# Streamed tokens a second, of all requests of this process: from so many on their writes take a
# tenth of a core or so, and text waits; with fewer than the second it does no longer.
_MANY: Final = 3000
_FEW: Final = 2000
_WINDOW: Final = 0.1  # seconds over which they are counted

# Steps that wait to be looked at are a sign of not keeping up: then several go out as one.
_BEHIND: Final = 4

# The engine's steps are not even: what comes a moment early is not kept for another step.
_EARLY: Final = 0.9


class Pace:
    """How long the next text of a stream waits after the last: up to `seconds`, 0 for never."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.wait = 0.0
        """Seconds that have to lie between two texts of a stream now."""
        self.tokens = 0
        """Streamed ones that have come; whoever gives them out counts them here."""
        self._many = False
        self._since = time.monotonic()

    def look(self, now: float, *, behind: bool) -> None:
        """Set `wait`, as of `now` (`time.monotonic`). Called with each step of the engine.

        It is `behind` when the engine has made the next step already.
        """
        elapsed = now - self._since
        if elapsed >= _WINDOW:
            self._many = self.tokens >= elapsed * (_FEW if self._many else _MANY)
            self._since, self.tokens = now, 0
        self.wait = self.seconds * (_BEHIND if behind else _EARLY) if self._many else 0.0
