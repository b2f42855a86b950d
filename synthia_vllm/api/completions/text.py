"""One raw completion: what the engine says as it is, and its log-probabilities."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

from synthia_vllm.api.completions.protocol import CompletionLogprobs, PromptLogprob
from synthia_vllm.errors import EngineFault, GrammarTooComplex
from synthia_vllm.generate.logprobs import LEAST_LOGPROB
from synthia_vllm.generate.response import Delta

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from synthia_vllm.engine.base import Engine, Output, PromptLogprobs, TokenLogprob

Entry = tuple[str, float | None, "dict[str, float] | None", int]
"""A token's text, its log-probability, those of the likeliest there, and where it begins."""


class CompletionText:
    """One choice: what the engine says as it is, after the prompt if that is to be echoed."""

    __slots__ = ("_echo", "_logprobs", "_ruled", "_scored", "_shower", "_silent")

    def __init__(
        self,
        echo: str,
        shower: Engine | None,
        logprobs: TextLogprobs | None,
        *,
        silent: bool,
        ruled: bool,
    ) -> None:
        self._echo = echo
        self._shower = shower  # of the prompt's log-probabilities in vLLM's form
        self._logprobs = logprobs
        self._silent = silent
        self._ruled = ruled
        self._scored: PromptLogprobs = ()

    def take_prompt(self, positions: PromptLogprobs) -> None:
        """Note the prompt's log-probabilities, which go out with the first delta."""
        self._scored = positions

    def take(self, output: Output) -> Delta | None:
        reason = output.finish_reason
        if reason == "repetition":
            reason = "stop"
        elif reason not in (None, "stop", "length"):
            raise GrammarTooComplex if self._ruled else EngineFault
        text, self._echo = self._echo, ""
        entries: list[Entry] | None = None
        of_prompt = None
        if self._shower is not None and self._scored:
            of_prompt = _in_vllms_form(self._scored, self._shower)
        if self._logprobs is not None:
            entries = self._logprobs.of_prompt(self._scored) if self._scored else []
        self._scored = ()
        if self._silent:
            return Delta(output.index, text, entries, "length", None, None, of_prompt)
        text += output.text
        if entries is not None and self._logprobs is not None:
            entries += self._logprobs.of_answer(output)
        if not text and not entries and reason is None:
            return None
        return Delta(output.index, text, entries, reason, output.stop_reason, None, of_prompt)


def _in_vllms_form(
    positions: PromptLogprobs, engine: Engine
) -> list[dict[int, PromptLogprob] | None]:
    return [
        None
        if position is None
        else {
            token: PromptLogprob(
                logprob=max(it.logprob, LEAST_LOGPROB),
                rank=it.rank,
                decoded_token=_name(engine, token),
            )
            for token, it in position.items()
        }
        for position in positions
    ]


def _name(engine: Engine, token_id: int) -> str:
    """The text of a token; where that is no text by itself, OpenAI's spelling of its bytes."""
    data = engine.token_bytes(token_id)
    try:
        return data.decode() or engine.model_info.special_tokens.get(token_id, "")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class TokenDecoder:
    """Tokens as text, each with where it begins; special ones have no text."""

    __slots__ = ("_engine", "_utf8", "end")

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.end = 0
        """Characters so far."""

    def feed(self, token_id: int) -> tuple[str, int]:
        """The text that `token_id` completes, and where the token begins."""
        text = self._utf8.decode(self._engine.token_bytes(token_id))
        begin = self.end
        self.end += len(text)
        return text, begin

    def text_of(self, token_ids: Iterable[int]) -> str:
        """The whole text, without the space that the tokenizer puts in front of all text."""
        return "".join([self.feed(token)[0] for token in token_ids]).removeprefix(" ")


class TextLogprobs:
    """The log-probabilities of one choice in the form of OpenAI's completions."""

    __slots__ = ("_decoder", "_engine", "_lead", "_prompt", "_top")

    def __init__(self, engine: Engine, prompt: Sequence[int], top: int, *, echo: bool) -> None:
        self._engine = engine
        self._prompt = prompt
        self._top = top
        self._decoder = TokenDecoder(engine)
        self._lead = 0
        """Characters in front of the tokens' text that are not in the echoed one."""
        if echo:
            first = next((data for data in map(engine.token_bytes, prompt) if data), b"")
            self._lead = int(first.startswith(b" "))

    def of_prompt(self, positions: PromptLogprobs) -> list[Entry]:
        """An entry for each token of the prompt."""
        return [
            self._entry(token, position)
            for token, position in zip(self._prompt, positions, strict=True)
        ]

    def of_answer(self, output: Output) -> list[Entry]:
        """An entry for each token of `output`, also for one that has no text."""
        positions = output.logprobs or ()
        return [
            self._entry(token, position)
            for token, position in zip(output.token_ids, positions, strict=False)
        ]

    def _entry(self, token_id: int, position: Mapping[int, TokenLogprob] | None) -> Entry:
        begin = max(0, self._decoder.feed(token_id)[1] - self._lead)
        name = _name(self._engine, token_id)
        if position is None:
            return name, None, None, begin
        likely = sorted(position.items(), key=lambda item: -item[1].logprob)[: self._top]
        top = {
            _name(self._engine, other): max(it.logprob, LEAST_LOGPROB)
            for other, it in reversed(likely)
        }
        own = max(position[token_id].logprob, LEAST_LOGPROB)
        return name, own, {**top, name: top.get(name, own)}, begin


def logprobs_of(entries: Sequence[Entry] | None) -> CompletionLogprobs | None:
    """`entries` as four lists."""
    if entries is None:
        return None
    return CompletionLogprobs(
        tokens=[entry[0] for entry in entries],
        token_logprobs=[entry[1] for entry in entries],
        top_logprobs=[entry[2] for entry in entries],
        text_offset=[entry[3] for entry in entries],
    )
