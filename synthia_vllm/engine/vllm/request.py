"""One request in vLLM's front, from which its outputs go straight to their sink."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from synthia_vllm.engine.vllm.detokenizer import TableDetokenizer
from synthia_vllm.engine.vllm.errors import translate_error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from synthia_vllm.engine.base import Output, PromptLogprobs, Sampling, Sink
    from synthia_vllm.engine.vllm.outputs import OutputPath


class RunningRequest:
    """Hands what vLLM says of one request straight to its sink.

    vLLM's own way puts each token in two objects of 30 fields, these in a collector, and wakes a
    task of the request, which takes them out. Nothing would be left to do there.
    """

    __slots__ = (
        "_begun",
        "_id",
        "_interval",
        "_kept",
        "_makes_outputs",
        "_on_prompt",
        "_paced",
        "_path",
        "_sink",
        "_tokens",
        "handed",
        "over",
        "state",
        "streams",
        "table",
    )

    def __init__(
        self,
        path: OutputPath,
        sink: Sink,
        on_prompt: Callable[[PromptLogprobs], None] | None,
    ) -> None:
        self._path = path
        self._sink = sink
        self._on_prompt = on_prompt
        self._id = ""
        self._makes_outputs = False
        self._interval = 1
        self._paced = False
        self._begun: set[int] = set()  # choices of which the reader has text
        self._tokens: list[int] = []  # to be handed on, their text is the detokenizer's
        self._kept: list[tuple[Output, int]] = []  # to be handed on, as vLLM made them
        self.state: Any = None
        self.table: Any = None
        self.streams = False
        self.handed = float("-inf")
        """When the sink was given something last (`time.monotonic`), if that counts."""
        self.over = False

    def intercept(
        self, request_id: str, collector: Any, table: Mapping[int, str], asked: Sampling
    ) -> None:
        """Stand in for `collector`, in which vLLM's output handler puts what it has.

        vLLM internal: `vllm.v1.engine.output_processor.RequestOutputCollector.put`,
        `vllm.v1.engine.output_processor.OutputProcessor.request_states`; for a request of one
        choice, `vllm.v1.engine.output_processor.RequestState.detokenizer`; and of those without
        log-probabilities, which most are, a stream's
        `vllm.v1.engine.output_processor.RequestState.make_request_output` and
        `vllm.v1.engine.output_processor.RequestState.stream_interval`.
        """
        from vllm.sampling_params import RequestOutputKind

        self._id = request_id
        self._paced = asked.stream_interval is None
        collector.put = self.put
        self.state = state = self._path.processor.request_states.get(collector.request_id)
        if state is not None:
            self.streams = state.output_kind == RequestOutputKind.DELTA
            self._interval = state.stream_interval
            # What a table does not do: hold back or leave out stops, show special tokens.
            others = not asked.skip_special_tokens or (
                not asked.stop_in_text and (asked.stop or asked.stop_token_ids)
            )
            own = state.detokenizer
            # With `min_tokens` stops are not looked for at first, which is vLLM's to know.
            if (
                state.prompt_token_ids[-1] in table
                and not others
                and not own.token_ids
                and not own.min_tokens
            ):
                self.table = state.detokenizer = TableDetokenizer(table, own.stop, own)
            if (
                state.parent_req is None
                and self._on_prompt is None
                and state.logprobs_processor.num_logprobs is None
            ):
                if self.table is not None:
                    self._path.runs[state.request_id] = self
                if self.streams:
                    self._makes_outputs = True
                    state.make_request_output = self.make_request_output
        try:
            arrived = collector.get_nowait()
        except Exception as error:
            arrived = error
        if arrived is not None:
            self.put(arrived)

    def put(self, output: Any) -> None:
        """Take a `RequestOutput`, or the error that ended the request."""
        if self.over:
            return
        if isinstance(output, Exception):
            self.stop()
            self._sink.fail(translate_error(output))
            return
        if self._on_prompt is not None and output.prompt_logprobs:
            self._on_prompt(output.prompt_logprobs)
            self._on_prompt = None
        cached = output.num_cached_tokens or 0
        self._kept += [(choice, cached) for choice in output.outputs]
        now = time.monotonic()
        if output.finished:
            self.end()
        elif self._waits(now) and all(
            choice.finish_reason is None and choice.index in self._begun
            for choice in output.outputs
        ):
            self._path.hold(self)
            return
        self.hand(now)

    def make_request_output(
        self,
        token_ids: list[int],
        _: object,
        finish_reason: Any,
        stop_reason: Any,
        *rest: object,
        **more: object,
    ) -> None:
        """Take new tokens in place of vLLM's method, and make no `RequestOutput` of them."""
        if self.over:
            return
        now = time.monotonic()
        if finish_reason is None:
            self.take(token_ids, now)
            return
        self._tokens += token_ids
        self.end()
        self.hand(now, str(finish_reason), stop_reason)

    def take(self, token_ids: list[int], now: float) -> None:
        """Take the next tokens of a stream, the text of which the detokenizer has."""
        self._tokens += token_ids
        self._path.pace.tokens += len(token_ids)
        if self._begun:
            if len(self._tokens) < self._interval:
                return
            if self._waits(now):
                self._path.hold(self)
                return
        self.hand(now)

    def _waits(self, now: float) -> bool:
        """Whether it is too early for more, since the sink was given something last."""
        return now - self.handed < self._path.pace.wait

    def hand(
        self, now: float, finish_reason: str | None = None, stop_reason: int | str | None = None
    ) -> None:
        """Give the sink all that waits for it, and the end, if it has come."""
        if self._paced:
            self.handed = now
            self._path.waiting.discard(self)
        if self._tokens or finish_reason is not None:
            tokens, self._tokens = self._tokens, []
            text = self.state.detokenizer.get_next_output_text(finish_reason is not None, True)
            output = _Output(text, tokens, finish_reason, stop_reason)
            self._kept.append((output, self.state.num_cached_tokens))
        kept, self._kept = self._kept, []
        for choice, cached in kept:
            if self._sink.put(choice, cached):
                self._begun.add(choice.index)

    def stop(self) -> None:
        """End before the end: hand on what waits, and tell of the tokens that ran.

        vLLM internal: `vllm.v1.engine.output_processor.RequestState.is_prefilling`,
        `vllm.v1.engine.detokenizer.IncrementalDetokenizer.num_output_tokens`, which counts the
        tokens that vLLM's metrics have; and of several choices the outputs that are kept until all
        are there, `vllm.v1.engine.parallel_sampling.ParentRequest.output_aggregator`.
        """
        processor = self._path.processor
        self.hand(time.monotonic())
        for state in [
            processor.request_states[one] for one in processor.external_req_ids.get(self._id, ())
        ]:
            if not state.is_prefilling:
                tokens = state.detokenizer.num_output_tokens()
                self._sink.ran(state.request_index, tokens, state.num_cached_tokens)
            for kept in state.parent_req.output_aggregator if state.parent_req is not None else ():
                if kept is not None:
                    self._sink.ran(kept.index, len(kept.token_ids), state.num_cached_tokens)
        self.end()

    def end(self) -> None:
        """Take nothing more."""
        self.over = True
        if self.state is not None:
            self._path.runs.pop(self.state.request_id, None)
            if self._makes_outputs:
                self._makes_outputs = False
                del self.state.make_request_output  # it refers back to us


@dataclass(slots=True)
class _Output:
    """An `Output`: what one step brought for the only choice of a request."""

    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None
    index: ClassVar[int] = 0
    logprobs: ClassVar[None] = None
