"""The card's rule for what the answer is, applied while the text still arrives.

The card: ``answer = raw_output.split("USER:")[0].strip()``. Streamed, the same bytes must come
out, and nothing that the rule would later take away may have been sent. So white space at the
end, and whatever may turn out to be the beginning of a stop string, is held back until the
text after it decides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from synthia_vllm.prompt import TURN_STOP

if TYPE_CHECKING:
    from collections.abc import Iterable


class AnswerFilter:
    """Raw deltas of one answer in, clean deltas out; joined they are the card's answer.

    ``USER:`` ends the answer wherever it appears, here and not only in the engine: the engine
    looks away while `min_tokens` is not reached. A request's own `stops` are found by the
    engine, which then ends the text with the one it found; here they are only never let out.

    A continued answer (the client sent its beginning) keeps the white space in front, which
    stands between the client's text and ours.
    """

    __slots__ = ("_held", "_last", "_leading", "_stops", "ended", "skipped")

    def __init__(self, stops: Iterable[str] = (), *, continued: bool = False) -> None:
        self._stops = (TURN_STOP, *stops)
        # The last characters of all beginnings of stops: most text ends in none of them.
        self._last = frozenset(char for stop in self._stops for char in stop[:-1])
        self._held = ""
        self._leading = not continued
        self.skipped = 0
        """Characters of white space in front that are not part of the answer."""
        self.ended = False
        """The answer is complete; whatever the engine still says is not part of it."""

    def feed(self, text: str) -> str:
        """Take the next piece of raw text; return what can be sent now, often ``""``."""
        if self.ended:
            return ""
        text = self._held + text
        if TURN_STOP in text:
            return self._end(text)
        sendable = text
        if text and (text[-1] in self._last or text[-1].isspace()):
            sendable = text[: len(text) - _undecided(text, self._stops)].rstrip()
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
        if self.ended:
            return ""
        text = self._held + text
        return self._end(text if stop is None else text.removesuffix(stop))

    def _end(self, text: str) -> str:
        self.ended = True
        self._held = ""
        text = text.split(TURN_STOP, 1)[0].rstrip()
        if self._leading:
            clean = text.lstrip()
            self.skipped = len(text) - len(clean)
            return clean
        return text


class GrammarFilter:
    """The same for an answer that a grammar rules, which also ends it: nothing is taken away.

    It may have white space at its ends, and ``USER:`` in it. A request's own `stops` end it.
    """

    __slots__ = ("_held", "_stops")
    ended: Final = False
    skipped: Final = 0

    def __init__(self, stops: Iterable[str] = ()) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str) -> str:
        """As `AnswerFilter.feed`."""
        text = self._held + text
        sure = len(text) - _undecided(text, self._stops)
        self._held = text[sure:]
        return text[:sure]

    def finish(self, text: str = "", stop: str | None = None) -> str:
        """As `AnswerFilter.finish`."""
        text = self._held + text
        return text if stop is None else text.removesuffix(stop)


def _undecided(text: str, stops: Iterable[str]) -> int:
    """The length of the longest end of `text` that may become one of `stops`."""
    return max(
        (
            size
            for stop in stops
            for size in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:size])
        ),
        default=0,
    )
