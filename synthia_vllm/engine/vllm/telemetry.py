"""vLLM's own metrics and spans, told cheaper and in more detail."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

from synthia_vllm.telemetry import metrics


def stat_logger() -> Any:
    """vLLM's own Prometheus series, fed with all tokens of a step at once.

    vLLM sets some twenty of them with every step of the engine, nearly all to what they are.
    vLLM internal: `vllm.v1.metrics.loggers.PrometheusStatLogger.record`, and of the same class
    `vllm.v1.metrics.loggers.PrometheusStatLogger._gauge_cls`,
    `vllm.v1.metrics.loggers.PrometheusStatLogger._counter_cls`,
    `vllm.v1.metrics.loggers.PrometheusStatLogger._histogram_cls` and
    `vllm.v1.metrics.loggers.PrometheusStatLogger.histogram_inter_token_latency`;
    `vllm.v1.metrics.stats.IterationStats.inter_token_latencies_iter`.
    """
    from prometheus_client import Gauge
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    class BulkStatLogger(PrometheusStatLogger):  # type: ignore[misc]
        _gauge_cls = Gauge if metrics.shared() else metrics.LazyGauge
        _counter_cls = metrics.LazyCounter
        _histogram_cls = metrics.BulkHistogram

        def record(self, scheduler_stats: Any, iteration_stats: Any, **more: Any) -> None:
            if iteration_stats is not None:
                histogram = self.histogram_inter_token_latency[more.get("engine_idx", 0)]
                histogram.observe_all(iteration_stats.inter_token_latencies_iter)
                iteration_stats.inter_token_latencies_iter = []
            super().record(scheduler_stats, iteration_stats, **more)

    return BulkStatLogger


def trace_phases(processor: Any) -> None:
    """Make spans of a request's phases, whose lengths vLLM puts into attributes of its one span.

    vLLM internal: `vllm.v1.engine.output_processor.OutputProcessor.do_tracing`, and the times in
    `vllm.v1.engine.output_processor.RequestState.stats`, which are the engine core's monotonic
    clock: the system's, so they can be told in this process.
    """
    from opentelemetry import trace
    from vllm.tracing import extract_trace_context

    own = processor.do_tracing
    tracer = trace.get_tracer("synthia_vllm.engine")

    def do_tracing(output: Any, state: Any, iteration: Any) -> None:
        own(output, state, iteration)
        context = extract_trace_context(output.trace_headers)
        at = state.stats
        began = time.time_ns() - time.monotonic_ns()
        marks = (at.queued_ts, at.scheduled_ts, at.first_token_ts, at.last_token_ts)
        times = [began + int(1e9 * mark) for mark in marks]
        for name, (start, end) in zip(("queue", "prefill", "decode"), pairwise(times), strict=True):
            tracer.start_span(name, context, start_time=start).end(end)

    processor.do_tracing = do_tracing
