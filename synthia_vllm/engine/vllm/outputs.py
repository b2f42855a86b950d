"""From the engine core's outputs to sinks, past vLLM's way for what needs nothing of it.

Most outputs are one more token of an answer: no end, no event, no log-probabilities. vLLM's loop
asks some twenty things of each. Here such a token is put to the others of its request, counted as
vLLM counts it, and that is all; whatever else comes goes vLLM's own way.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from synthia_vllm.engine.vllm.pace import Pace


class Run(Protocol):
    """A request whose tokens can come this way: see `RunningRequest`, which is one."""

    state: Any
    """vLLM's `RequestState`."""
    table: Any
    """The `TableDetokenizer` that is its detokenizer."""
    streams: bool
    """Whether anybody wants its tokens before the end."""
    handed: float
    """When its sink was given something last (`time.monotonic`)."""

    def take(self, token_ids: list[int], now: float) -> None:
        """Take the next tokens, which the detokenizer has."""

    def hand(self, now: float) -> None:
        """Give the sink all that waits for it."""


class OutputPath:
    """Stands in for `process_outputs` of the output processor of `llm`, vLLM's `AsyncLLM`.

    vLLM internal: `vllm.v1.engine.output_processor.OutputProcessor.process_outputs`,
    `vllm.v1.engine.core_client.AsyncMPClient.outputs_queue`; of an output
    `vllm.v1.engine.EngineCoreOutput.events`,
    `vllm.v1.engine.EngineCoreOutput.num_nans_in_logits`; and what is counted,
    `vllm.v1.metrics.stats.IterationStats` and `vllm.v1.metrics.stats.RequestStateStats`.
    """

    def __init__(self, llm: Any, pace: Pace) -> None:
        self.processor = processor = llm.output_processor
        self.pace = pace
        self.runs: dict[str, Run] = {}
        """By vLLM's own id, those whose tokens need nothing of vLLM's."""
        self.waiting: set[Run] = set()
        """Those that have an output which waits for more."""
        self._own = processor.process_outputs
        self._steps = llm.engine_core.outputs_queue
        self._sweeps = False
        if processor.log_stats:  # else there is nothing to count in, and the rest is little
            processor.process_outputs = self.process_outputs

    def process_outputs(
        self,
        outputs: list[Any],
        timestamp: float = 0.0,
        iteration: Any = None,
        weight_version: str | None = None,
    ) -> Any:
        """Take a step's `outputs`, made at `timestamp`, and count them in `iteration`."""
        now = time.monotonic()
        self.pace.look(now, behind=not self._steps.empty())
        runs = self.runs
        others = []
        gaps = []
        count = 0
        for output in outputs:
            run = runs.get(output.request_id)
            if (
                run is None
                or output.finish_reason is not None
                or output.events is not None
                or output.num_nans_in_logits
                or run.state.is_prefilling
                or not run.table.extend(output.new_token_ids)
            ):
                others.append(output)
                continue
            tokens = output.new_token_ids
            count += len(tokens)
            stats = run.state.stats
            stats.num_generation_tokens += len(tokens)
            gaps.append(timestamp - stats.last_token_ts)
            stats.last_token_ts = timestamp
            if run.streams:
                run.take(tokens, now)
        iteration.num_generation_tokens += count
        iteration.inter_token_latencies_iter += gaps
        return self._own(others, timestamp, iteration, weight_version)

    def hold(self, run: Run) -> None:
        """`run` has an output that waits for more: it does not wait for ever."""
        self.waiting.add(run)
        if not self._sweeps:
            self._sweep_later()

    def _sweep_later(self) -> None:
        self._sweeps = True
        asyncio.get_running_loop().call_later(self.pace.seconds, self._sweep)

    def _sweep(self) -> None:
        """Hand on what has waited long enough, though the engine made no more of it."""
        self._sweeps = False
        now = time.monotonic()
        for run in list(self.waiting):
            if now - run.handed >= self.pace.seconds:
                run.hand(now)
        if self.waiting:
            self._sweep_later()
