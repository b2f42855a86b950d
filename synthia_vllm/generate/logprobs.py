"""Log-probabilities of an answer's tokens, in the form of OpenAI's chat."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from synthia_vllm.engine.base import Engine, Output, TokenLogprob

# JSON has no infinity; OpenAI writes this for a token that cannot be.
LEAST_LOGPROB: Final = -9999.0


class AnswerLogprobs:
    """The log-probabilities of one choice, held until their token's text is part of the answer.

    A token of a stop string, of the next turn's marker, or of white space around the answer is
    never reported: it is not in the answer.
    """

    __slots__ = ("_decoder", "_end", "_engine", "_top", "_waiting")

    def __init__(self, engine: Engine, top: int) -> None:
        self._engine = engine
        self._top = top
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._end = 0
        self._waiting: list[tuple[int, dict[str, Any]]] = []

    def add(self, output: Output) -> None:
        """Note the tokens of `output` with where in the raw text each ends."""
        for token_id, position in zip(output.token_ids, output.logprobs or (), strict=False):
            data = self._engine.token_bytes(token_id)
            if not data:  # a special token has no text
                continue
            text = self._decoder.decode(data)
            self._end += len(text)
            # Part of a character counts as reaching the end of that character.
            end = self._end + (0 if text else 1)
            self._waiting.append((end, self._entry(token_id, data, position)))

    def up_to(self, skipped: int, sent: int) -> list[dict[str, Any]]:
        """Let go of the tokens whose text lies within the first `sent` characters of the answer."""
        ready = [entry for end, entry in self._waiting if skipped < end <= skipped + sent]
        self._waiting = [(end, entry) for end, entry in self._waiting if end > skipped + sent]
        return ready

    def _entry(
        self, token_id: int, data: bytes, position: Mapping[int, TokenLogprob]
    ) -> dict[str, Any]:
        likely = sorted(position.items(), key=lambda item: -item[1].logprob)[: self._top]
        return {
            **self._token(token_id, data, position[token_id].logprob),
            "top_logprobs": [
                self._token(other, self._engine.token_bytes(other), value.logprob)
                for other, value in likely
            ],
        }

    def _token(self, token_id: int, data: bytes, logprob: float) -> dict[str, Any]:
        # A special token has no bytes; its name says which it is.
        name = data.decode(errors="replace") or self._engine.model_info.special_tokens.get(
            token_id, ""
        )
        return {"token": name, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(data)}
