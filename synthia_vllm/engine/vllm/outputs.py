"""From the engine core's outputs to sinks, past vLLM's way for what needs nothing of it.

Most outputs are one more token of an answer: no end, no event, no log-probabilities. vLLM's loop
asks some twenty things of each. Here such a token is put to the others of its request, counted as
vLLM counts it, and that is all; whatever else comes goes vLLM's own way.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from synthia_vllm.engine.vllm.pace import Pace
    from synthia_vllm.engine.vllm.request import RunningRequest


class OutputPath:
    """Stands in for `process_outputs` of vLLM's output `processor`.

    vLLM internal: `vllm.v1.engine.output_processor.OutputProcessor.process_outputs`,
    `vllm.v1.engine.output_processor.OutputProcessorOutput`; of an output
    `vllm.v1.engine.EngineCoreOutput.events`,
    `vllm.v1.engine.EngineCoreOutput.num_nans_in_logits`; and what is counted,
    `vllm.v1.metrics.stats.IterationStats` and `vllm.v1.metrics.stats.RequestStateStats`.
    """

    def __init__(self, processor: Any, pace: Pace) -> None:
        self.processor = processor
        self.pace = pace
        self.runs: dict[str, RunningRequest] = {}
        """By vLLM's own id, those whose tokens need nothing of vLLM's."""
        self.waiting: set[RunningRequest] = set()
        """Those that have an output which waits for more."""
        self._own = processor.process_outputs
        self._swept = False
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
        self.pace.look(now)
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

    def hold(self, run: RunningRequest) -> None:
        """`run` has an output that waits for more: it does not wait for ever."""
        self.waiting.add(run)
        if not self._swept:
            self._swept = True
            asyncio.get_running_loop().call_later(self.pace.seconds, self._sweep)

    def _sweep(self) -> None:
        """Hand on what has waited long enough, though the engine made no more of it."""
        self._swept = False
        now = time.monotonic()
        for run in list(self.waiting):
            if now - run.handed >= self.pace.seconds:
                run.hand(now)
        if self.waiting and not self._swept:
            self._swept = True
            asyncio.get_running_loop().call_later(self.pace.seconds, self._sweep)
