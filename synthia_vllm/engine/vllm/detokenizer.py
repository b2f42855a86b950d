"""Tokens to text by a table, where that is all there is to it.

Mistral's tokenizer turns nearly every token into the same text wherever it stands, so a table knows
it: no decoder has to be asked, and none primed with the prompt. It does not know the bytes that
make up a character together, special tokens, and U+FFFD (by which a decoder takes text for
unfinished). With the first of those, vLLM's own detokenizer takes over for the rest of the answer.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# The decoder of Llama's and Mistral's tokenizers, for which the table is right.
_DECODER: Final = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}
_BYTE: Final = re.compile(r"<0x([0-9A-F]{2})>")


def table(decoder: Any, vocabulary: Mapping[str, int], added: Mapping[int, Any]) -> dict[int, str]:
    """The text of each token that has one of its own; empty for an unknown kind of `decoder`.

    `decoder` is as in ``tokenizer.json``, `added` the special and other added tokens.
    """
    if decoder != _DECODER:
        return {}
    found = {}
    for piece, token in vocabulary.items():
        byte = _BYTE.fullmatch(piece)
        text = chr(int(byte[1], 16)) if byte else piece.replace("\u2581", " ")
        if token not in added and "\ufffd" not in text and not (byte and text > "\x7f"):
            found[token] = text
    return found


class Detokenizer(Protocol):
    """The methods of vLLM's `IncrementalDetokenizer`."""

    token_ids: list[int]

    def update(self, new_token_ids: list[int], stop_terminated: bool) -> str | None:
        """Take the next tokens; return the stop string that their text completes, if any."""

    def get_next_output_text(self, finished: bool, delta: bool) -> str:
        """The text; with `delta` only what was not returned before."""


class TableDetokenizer:
    """In place of vLLM's detokenizer `other`, which has seen the prompt, for as long as can be.

    As with vLLM's ``include_stop_str_in_output``, the text ends with the stop string found.
    """

    __slots__ = ("_ends", "_gave_way", "_other", "_parts", "_stops", "_table", "token_ids")

    def __init__(self, table: Mapping[int, str], stops: Sequence[str], other: Detokenizer) -> None:
        self._table = table
        self._stops = stops
        self._ends = {stop[-1] for stop in stops}
        self._other = other
        self._gave_way = False
        self._parts: list[str] = []
        self.token_ids: list[int] = []

    @property
    def output_token_ids(self) -> list[int]:
        """Those of the answer."""
        return self.token_ids

    def num_output_tokens(self) -> int:
        """How many they are."""
        return len(self.token_ids)

    def update(self, new_token_ids: list[int], stop_terminated: bool) -> str | None:
        """Take the next tokens; return the stop string that their text completes, if any."""
        if self._gave_way:
            return self._other.update(new_token_ids, stop_terminated)
        tokens, parts = self.token_ids, self._parts
        before = len(tokens), len(parts)
        for token in new_token_ids:
            text = self._table.get(token)
            if text is None:
                del tokens[before[0] :], parts[before[1] :]
                return self._give_way(new_token_ids, stop_terminated)
            tokens.append(token)
            parts.append(text)
            for end in self._ends:
                if end in text:
                    stop = self._find_stop(text)
                    if stop is not None:
                        return stop
                    break
        return None

    def extend(self, new_token_ids: list[int]) -> bool:
        """Take the next tokens, if no stop string can end in them; else they are `update`'s."""
        if self._gave_way:
            return False
        texts = [*map(self._table.get, new_token_ids)]
        for text in texts:
            if text is None:
                return False
            for end in self._ends:
                if end in text:
                    return False
        self.token_ids += new_token_ids
        self._parts += texts  # type: ignore[arg-type]  # none of them is None
        return True

    def get_next_output_text(self, finished: bool, delta: bool) -> str:
        """The text; with `delta` only what was not returned before."""
        if self._gave_way and not delta:
            return self._other.get_next_output_text(finished, delta)
        text = "".join(self._parts)
        if delta:
            self._parts.clear()
            if self._gave_way:
                text += self._other.get_next_output_text(finished, delta)
        return text

    def _find_stop(self, text: str) -> str | None:
        """The stop string that ends first in `text`, the last token's, which is cut there."""
        longest = max(map(len, self._stops))
        earlier = "".join([self._table[token] for token in self.token_ids[-longest:-1]])
        window = earlier + text
        found, found_end = None, len(window) + 1
        for stop in self._stops:
            at = window.find(stop, max(0, len(earlier) - len(stop) + 1))
            if at >= 0 and at + len(stop) < found_end:
                found, found_end = stop, at + len(stop)
        if found is not None:
            self._parts[-1] = text[: found_end - len(earlier)]
        return found

    def _give_way(self, new_token_ids: list[int], stop_terminated: bool) -> str | None:
        other = self._other
        if stop_terminated and len(new_token_ids) == 1:  # the end-of-text token; nothing follows
            self.token_ids += new_token_ids
            return None
        self._gave_way = True
        other.update(self.token_ids, False)
        other.get_next_output_text(False, True)  # was given out already, or still is in `_parts`
        self.token_ids = other.token_ids
        return other.update(new_token_ids, stop_terminated)
