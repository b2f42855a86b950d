"""An executor for vLLM that runs no model, so that a frontend can be seen at its limit.

vLLM takes it by ``--distributed-executor-backend lib.executor.PacedExecutor``, whatever the
frontend; scheduler, KV cache manager and messages stay vLLM's own.

vLLM internal: `vllm.v1.executor.abstract.Executor` and the methods that
`vllm.v1.engine.core.EngineCore` calls of it.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final

import torch
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import ModelRunnerOutput

from lib.servers import STEP_MS

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

WORD: Final = 272
"""The token that everybody is given: " the"."""
_MEMORY: Final = 8 << 30  # bytes that nobody allocates, for a KV cache that never fills


class PacedExecutor(Executor):  # type: ignore[misc]
    """Gives every request that is scheduled one token, a step at a time, at a set pace."""

    def _init_executor(self) -> None:
        self._step = float(os.environ.get(STEP_MS, "10")) / 1000
        self._due = 0.0
        self._scheduled: SchedulerOutput | None = None
        self._unfinished: dict[str, int] = {}

    def get_kv_cache_specs(self) -> list[dict[str, Any]]:
        """Of one layer, as small as one can be."""
        spec = FullAttentionSpec(
            block_size=self.cache_config.block_size or 16,
            num_kv_heads=1,
            head_size=16,
            dtype=torch.float32,
        )
        return [{"layer": spec}]

    def determine_available_memory(self) -> list[int]:
        """Bytes."""
        return [_MEMORY]

    def compile_or_warm_up_model(self) -> None:
        """There is none."""

    def collective_rpc(self, method: Any, *args: Any, **more: Any) -> Any:
        """What there is to ask of workers that are not there."""
        answers = {
            "get_supported_kv_cache_layouts": ["NHD"],
            "get_supported_tasks": ("generate",),
            "supports_draft_weight_updates": False,
        }
        return [answers.get(method)]

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        """Wait until the step is due; what it gives is asked for by `sample_tokens`."""
        self._note(scheduler_output)
        if not scheduler_output.total_num_scheduled_tokens:
            return _done(ModelRunnerOutput([], {}))
        now = time.monotonic()
        self._due = max(self._due + self._step, now)
        time.sleep(self._due - now)
        self._scheduled = scheduler_output
        return _done(None)

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        """A token for each request of the step whose prompt has run."""
        scheduled = self._scheduled
        assert scheduled is not None
        ids = list(scheduled.num_scheduled_tokens)
        left = self._unfinished
        tokens = []
        for request, count in scheduled.num_scheduled_tokens.items():
            left[request] -= count
            tokens.append([WORD] if left[request] <= 0 else [])
            left[request] = max(left[request], 0)
        output = ModelRunnerOutput(ids, {name: i for i, name in enumerate(ids)}, tokens)
        return _done(output) if non_block else output

    def check_health(self) -> None:
        """It has none to lose."""

    def shutdown(self) -> None:
        """Nothing runs."""

    def _note(self, scheduler_output: SchedulerOutput) -> None:
        """Keep count of the prompts' tokens that have not run."""
        for request in scheduler_output.finished_req_ids:
            self._unfinished.pop(request, None)
        for new in scheduler_output.scheduled_new_reqs:
            prompt = len(new.prompt_token_ids or ())
            self._unfinished[new.req_id] = prompt - new.num_computed_tokens


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
