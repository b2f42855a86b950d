"""One request in vLLM's front, from which its outputs go straight to their sink."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from synthia_vllm.engine.vllm.detokenizer import TableDetokenizer
from synthia_vllm.engine.vllm.errors import translate_error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from synthia_vllm.engine.base import PromptLogprobs, Sampling, Sink


class RunningRequest:
    """Hands what vLLM says of one request straight to its sink.

    vLLM's own way puts each token in two objects of 30 fields, these in a collector, and wakes a
    task of the request, which takes them out. Nothing would be left to do there.
    """

    __slots__ = ("_id", "_on_prompt", "_processor", "_sink", "_state", "over")

    def __init__(self, sink: Sink, on_prompt: Callable[[PromptLogprobs], None] | None) -> None:
        self._sink = sink
        self._on_prompt = on_prompt
        self._processor: Any = None
        self._id = ""
        self._state: Any = None
        self.over = False

    def intercept(
        self,
        llm: Any,
        request_id: str,
        collector: Any,
        table: Mapping[int, str],
        asked: Sampling,
    ) -> None:
        """Stand in for `collector`, in which vLLM's output handler puts what it has.

        vLLM internal: `vllm.v1.engine.output_processor.RequestOutputCollector.put`,
        `vllm.v1.engine.output_processor.OutputProcessor.request_states`; for a request of one
        choice, `vllm.v1.engine.output_processor.RequestState.detokenizer`; and for a stream without
        log-probabilities, which most are,
        `vllm.v1.engine.output_processor.RequestState.make_request_output`.
        """
        from vllm.sampling_params import RequestOutputKind

        self._processor, self._id = llm.output_processor, request_id
        collector.put = self.put
        state = llm.output_processor.request_states.get(collector.request_id)
        # What a table does not do: hold back or leave out stops, show special tokens.
        others = not asked.skip_special_tokens or (
            not asked.stop_in_text and (asked.stop or asked.stop_token_ids)
        )
        if state is not None and state.prompt_token_ids[-1] in table and not others:
            own = state.detokenizer
            # With `min_tokens` stops are not looked for at first, which is vLLM's to know.
            if not own.token_ids and not own.min_tokens:
                state.detokenizer = TableDetokenizer(table, own.stop, own)
        if (
            state is not None
            and state.parent_req is None
            and state.output_kind == RequestOutputKind.DELTA
            and state.stream_interval == 1
            and self._on_prompt is None
            and state.logprobs_processor.num_logprobs is None
        ):
            self._state = state
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
        if output.finished:
            self.end()
        if self._on_prompt is not None and output.prompt_logprobs:
            self._on_prompt(output.prompt_logprobs)
            self._on_prompt = None
        for choice in output.outputs:
            self._sink.put(choice, output.num_cached_tokens or 0)

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
        state = self._state
        text = state.detokenizer.get_next_output_text(finish_reason is not None, True)
        reason = None
        if finish_reason is not None:
            reason = str(finish_reason)
            self.end()
        self._sink.put(_Output(text, token_ids, reason, stop_reason), state.num_cached_tokens)

    def stop(self) -> None:
        """End before the end: tell of the tokens that ran.

        vLLM internal: `vllm.v1.engine.output_processor.RequestState.is_prefilling`,
        `vllm.v1.engine.detokenizer.IncrementalDetokenizer.num_output_tokens`, which counts the
        tokens that vLLM's metrics have; and of several choices the outputs that are kept until all
        are there, `vllm.v1.engine.parallel_sampling.ParentRequest.output_aggregator`.
        """
        processor = self._processor
        ids = processor.external_req_ids.get(self._id, ()) if processor is not None else ()
        for state in [processor.request_states[one] for one in ids]:
            if not state.is_prefilling:
                tokens = state.detokenizer.num_output_tokens()
                self._sink.ran(state.request_index, tokens, state.num_cached_tokens)
            for kept in state.parent_req.output_aggregator if state.parent_req is not None else ():
                if kept is not None:
                    self._sink.ran(kept.index, len(kept.token_ids), state.num_cached_tokens)
        self.end()

    def end(self) -> None:
        """Pass on nothing more."""
        self.over = True
        if self._state is not None:
            del self._state.make_request_output  # it refers back to us
            self._state = None


@dataclass(slots=True)
class _Output:
    """An `Output`: what one step brought for the only choice of a request."""

    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None
    index: ClassVar[int] = 0
    logprobs: ClassVar[None] = None
