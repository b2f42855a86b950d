"""One answer of a conversation: the card's rule, or a grammar's, over what the engine says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from synthia_vllm.errors import EngineFault, GrammarTooComplex
from synthia_vllm.generate.response import Delta
from synthia_vllm.template.answer import GrammarFilter

if TYPE_CHECKING:
    from synthia_vllm.engine.base import Engine, Output
    from synthia_vllm.generate.logprobs import AnswerLogprobs
    from synthia_vllm.template.answer import AnswerFilter


class Answer:
    """One choice: the rule over what the engine says, and its log-probabilities."""

    __slots__ = ("_engine", "_logprobs", "_rule", "_sent", "_special")

    def __init__(
        self,
        engine: Engine,
        rule: AnswerFilter | GrammarFilter,
        logprobs: AnswerLogprobs | None,
        *,
        special: bool,
    ) -> None:
        self._engine = engine
        self._special = special  # the text has the names of special tokens
        self._rule = rule
        self._logprobs = logprobs
        self._sent = 0  # characters of the answer that went out

    def take(self, output: Output) -> Delta | None:
        rule = self._rule
        reason, stop = output.finish_reason, output.stop_reason
        if reason is None:
            text = rule.feed(output.text)
            if rule.ended is not None:  # where the engine was told to look away, or not told
                reason, stop = "stop", rule.ended
        elif reason in ("stop", "length", "repetition"):
            text = rule.finish(output.text, self._ending(reason, stop))
            reason = "length" if reason == "length" else "stop"
            stop = rule.ended or stop
        else:
            raise GrammarTooComplex if isinstance(rule, GrammarFilter) else EngineFault
        logprobs = None
        if self._logprobs is not None:
            self._sent += len(text)
            self._logprobs.add(output)
            logprobs = self._logprobs.up_to(rule.skipped, self._sent)
        elif not text and reason is None:
            return None
        return Delta(output.index, text, logprobs, reason, stop)

    def _ending(self, reason: str, stop: int | str | None) -> str | None:
        """What of the text a stop takes away: itself, or the text of a token that is one."""
        if reason != "stop":
            return None
        if isinstance(stop, str):
            return stop
        data = b"" if stop is None else self._engine.token_bytes(stop)
        if data or not self._special:
            return data.decode(errors="replace") or None
        model_info = self._engine.model_info
        return model_info.eos if stop is None else model_info.special_tokens.get(stop)
