"""Fewer, fuller outputs: the text of a stream waits for more of it while the process is busy.

A reader cannot see a hundred changes a second, and the `write` system call is the dearest part of a
streamed token. Where the process has little to do, waiting would gain nothing, so none is done.
"""

from __future__ import annotations

import time
from typing import Final

# Of one core, as used by the thread of the event loop: a token costs the less the more of them
# come at once, so what turns the waiting on has to be well above what keeps it on.
_BUSY: Final = 0.10
_AT_EASE: Final = 0.05
_WINDOW: Final = 0.1  # seconds over which that is taken

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
        self._busy = False
        self._since = time.monotonic()
        self._cpu = time.thread_time()

    def look(self, now: float, *, behind: bool) -> None:
        """Set `wait`, as of `now` (`time.monotonic`). Called on the event loop with each step.

        It is `behind` when the engine has made the next step already.
        """
        elapsed = now - self._since
        if elapsed >= _WINDOW:
            cpu = time.thread_time()
            self._busy = cpu - self._cpu > elapsed * (_AT_EASE if self._busy else _BUSY)
            self._since, self._cpu = now, cpu
        self.wait = self.seconds * (_BEHIND if behind else _EARLY) if self._busy else 0.0
