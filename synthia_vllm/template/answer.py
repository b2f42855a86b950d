"""The card's rule for what the answer is, applied while the text still arrives.

The card: ``answer = raw_output.split("USER:")[0].strip()``. Streamed, the same bytes must come
out, and nothing that the rule would later take away may have been sent. So white space at the
end, and whatever may turn out to be the beginning of a stop string, is held back until the
text after it decides.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class AnswerFilter:
    """Raw deltas of one answer in, clean deltas out; joined they are the card's answer.

    The format's `turn_stops` end the answer wherever they appear, here and not only in the engine,
    which looks away while `min_tokens` is not reached. A request's own `stops` are found by the
    engine, which then ends the text with the one it found; here they are only never let out.

    Stops of nothing but white space, `blank`, are found here, too: the white space in front of an
    answer is no part of it, and the engine would stop there.

    A continued answer (the client sent its beginning) keeps the white space in front, which
    stands between the client's text and ours.
    """

    __slots__ = (
        "_blank",
        "_held",
        "_last",
        "_leading",
        "_stops",
        "_turn_stops",
        "ended",
        "skipped",
    )

    def __init__(
        self,
        turn_stops: tuple[str, ...],
        stops: Iterable[str] = (),
        *,
        blank: Sequence[str] = (),
        continued: bool = False,
    ) -> None:
        self._turn_stops = turn_stops
        self._stops = _beginnings((*turn_stops, *stops))
        # The last characters of all beginnings of stops: most text ends in none of them.
        self._last = self._stops.last
        self._blank = blank
        self._held = ""
        self._leading = not continued
        self.skipped = 0
        """Characters of white space in front that are not part of the answer."""
        self.ended: str | None = None
        """The answer is complete, whatever the engine still says: the stop found here, or the
        empty text for one that the engine found.
        """

    def feed(self, text: str) -> str:
        """Take the next piece of raw text; return what can be sent now, often ``""``."""
        if self.ended is not None:
            return ""
        text = self._held + text
        for stop in self._turn_stops:
            if stop in text:
                return self._end(text, _first(self._turn_stops, text))
        if self._blank:
            found = self._find_blank(text)
            if found is not None:
                return self._end(text[: found[0]], found[1])
        sendable = text
        if text and (text[-1] in self._last or text[-1].isspace()):
            sendable = text[: len(text) - self._stops.undecided(text)].rstrip()
        clean = sendable.lstrip() if self._leading else sendable
        if not clean:  # white space in front is kept too: a stop string may begin with it
            self._held = text
            return ""
        if self._leading:
            self._leading = False
            self.skipped = len(sendable) - len(clean)
        self._held = text[len(sendable) :]
        return clean

    def finish(self, text: str = "", stop: str | None = None) -> str:
        """Take the last piece; `stop` is the stop string the engine found at its very end."""
        if self.ended is not None:
            return ""
        text = self._held + text
        if self._blank and _first(self._turn_stops, text) is None:
            found = self._find_blank(text)
            if found is not None:
                return self._end(text[: found[0]], found[1])
        return self._end(text if stop is None else text.removesuffix(stop), "")

    def _find_blank(self, text: str) -> tuple[int, str] | None:
        """Where the first blank stop after the answer's beginning is, and which."""
        first = len(text) - len(text.lstrip()) if self._leading else 0
        found = [(text.find(stop, first), stop) for stop in self._blank]
        return min(((at, stop) for at, stop in found if at >= 0), default=None)

    def _end(self, text: str, stop: str | None) -> str:
        self.ended = stop
        self._held = ""
        for turn_stop in self._turn_stops:
            text = text.split(turn_stop, 1)[0]
        text = text.rstrip()
        if self._leading:
            clean = text.lstrip()
            self.skipped = len(text) - len(clean)
            return clean
        return text


def _first(stops: Sequence[str], text: str) -> str | None:
    """The stop that comes first in `text`, if there is any."""
    found = [(text.find(stop), stop) for stop in stops]
    return min(((at, stop) for at, stop in found if at >= 0), default=(0, None))[1]


class GrammarFilter:
    """The same for an answer that a grammar rules, which also ends it: nothing is taken away.

    It may have white space at its ends, and ``USER:`` in it. A request's own `stops` end it.
    """

    __slots__ = ("_held", "_stops")
    ended: Final = None
    skipped: Final = 0

    def __init__(self, stops: Iterable[str] = ()) -> None:
        self._stops = _beginnings(tuple(stops))
        self._held = ""

    def feed(self, text: str) -> str:
        """As `AnswerFilter.feed`."""
        text = self._held + text
        sure = len(text) - self._stops.undecided(text)
        self._held = text[sure:]
        return text[:sure]

    def finish(self, text: str = "", stop: str | None = None) -> str:
        """As `AnswerFilter.finish`."""
        text = self._held + text
        return text if stop is None else text.removesuffix(stop)


class _Beginnings:
    """All that `stops` may begin with: a look-up for each length, whatever their number."""

    __slots__ = ("_all", "_longest", "last")

    def __init__(self, stops: Sequence[str]) -> None:
        self._all = frozenset(stop[:size] for stop in stops for size in range(1, len(stop)))
        self._longest = max(map(len, stops), default=1) - 1
        self.last = frozenset(begin[-1] for begin in self._all)
        """The characters they end with."""

    def undecided(self, text: str) -> int:
        """The length of the longest end of `text` that may become a stop."""
        for size in range(min(self._longest, len(text)), 0, -1):
            if text[-size:] in self._all:
                return size
        return 0


@lru_cache(64)  # made once for all choices of a request, and for those that ask for the same
def _beginnings(stops: tuple[str, ...]) -> _Beginnings:
    return _Beginnings(stops)
