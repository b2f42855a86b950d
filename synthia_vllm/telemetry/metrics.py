"""The edge's own Prometheus series, all of them, beside vLLM's ``vllm:*`` in one registry.

Label values come from closed sets (routes of this server, model names it serves, HTTP statuses,
finish reasons): no client can add a series.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import Counter as Counts
from collections import deque
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Final
from weakref import WeakSet

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from prometheus_client.samples import Sample

_SHARED: Final = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's name for it

_WAITING: Final = 512
"""Values of a histogram, at most, that are not in their buckets yet."""

_TTFT_BUCKETS: Final = (0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80)
_ITL_BUCKETS: Final = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5, 10)
_E2E_BUCKETS: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)


class BulkHistogram(Histogram):
    """A histogram whose values wait until somebody looks, or there are many.

    prometheus_client goes through the buckets for each of them under two locks, and a request has
    some twenty values. Where several processes share it, they have to be settled now and then: see
    `settle`.

    prometheus_client internal: `prometheus_client.metrics.Histogram._upper_bounds`,
    `prometheus_client.metrics.Histogram._buckets`, `prometheus_client.metrics.Histogram._sum`;
    and, overridden, `prometheus_client.metrics.Histogram._metric_init` and
    `prometheus_client.metrics.Histogram._child_samples`.
    """

    def _metric_init(self) -> None:
        super()._metric_init()
        self._waiting: deque[float] = deque()
        self._settling = Lock()  # scrapes come from other threads
        _all.add(self)

    def observe(self, amount: float, exemplar: dict[str, str] | None = None) -> None:
        """Take a value. There are no exemplars here."""
        self._waiting.append(amount)
        if len(self._waiting) >= _WAITING:
            self.settle()

    def observe_all(self, amounts: Iterable[float]) -> None:
        """The same as `observe` for each of `amounts`."""
        self._waiting.extend(amounts)
        if len(self._waiting) >= _WAITING:
            self.settle()

    def settle(self) -> None:
        """Put all that waits into its buckets."""
        if not self._waiting:
            return
        with self._settling:
            take = self._waiting.popleft
            amounts = [take() for _ in range(len(self._waiting))]
            counts: dict[int, int] = {}
            for amount, count in Counts(amounts).items():  # of a step's gaps most are the same
                bucket = bisect_left(self._upper_bounds, amount)
                counts[bucket] = counts.get(bucket, 0) + count
            for bucket, count in counts.items():
                self._buckets[bucket].inc(count)
            self._sum.inc(sum(amounts))

    def _child_samples(self) -> Iterable[Sample]:
        self.settle()
        return super()._child_samples()


_all: WeakSet[BulkHistogram] = WeakSet()


def settle() -> None:
    """Let other processes see what this one's histograms have been told."""
    for histogram in list(_all):
        histogram.settle()


class LazyGauge(Gauge):
    """A gauge that is mostly set to what it is; where several processes share it, see `share_in`,
    the latest to set it would not be known.
    """

    _is: float | None = None

    def set(self, value: float) -> None:
        """Set it, if that changes anything."""
        if value != self._is:
            self._is = value
            super().set(value)


class LazyCounter(Counter):
    """A counter that is mostly told of nothing new.

    prometheus_client internal: `prometheus_client.metrics.Counter._value`.
    """

    def inc(self, amount: float = 1, exemplar: dict[str, str] | None = None) -> None:
        """Count, if there is anything to count."""
        if amount > 0 and not exemplar:
            self._value.inc(amount)  # which `Counter` does after looking at more than that
        elif amount:
            super().inc(amount, exemplar)


@dataclass(frozen=True, slots=True)
class ModelSeries:
    """The series of one model name, looked up once and not per token."""

    time_to_first_token: BulkHistogram
    inter_token_latency: BulkHistogram
    time_per_output_token: BulkHistogram
    end_to_end: BulkHistogram
    prompt_tokens: Counter
    cached_prompt_tokens: Counter
    answer_tokens: Counter
    escaped_markers: Counter
    dropped_messages: Counter


def share_in(directory: str) -> None:
    """Let all processes started from now on keep their series in files, for any to read."""
    os.environ[_SHARED] = directory


def forget(pid: int) -> None:
    """The process is gone; what it counted stays, what it had in the making does not."""
    multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]


def shared() -> bool:
    """Whether several processes keep their series together."""
    return _SHARED in os.environ


class Metrics:
    """All series of the edge, registered in `registry`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry

        def counter(name: str, text: str, *labels: str) -> Counter:
            return LazyCounter(f"synthia_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> BulkHistogram:
            return BulkHistogram(
                f"synthia_{name}", text, ["model"], registry=registry, buckets=buckets
            )

        self.requests = counter("requests", "HTTP requests answered", "route", "model", "status")
        self.in_flight = Gauge(
            "synthia_requests_in_flight",
            "Chat requests being answered",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.engine_places = Gauge(
            "synthia_engine_places",
            "Answers the engine makes at the same time; more wait",
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.finished = counter(
            "finished", "Answers (choices) by the reason they ended", "model", "reason"
        )
        self._time_to_first_token = histogram(
            "time_to_first_token_seconds",
            "From the arrival of a streamed request to its first text",
            _TTFT_BUCKETS,
        )
        self._inter_token_latency = histogram(
            "inter_token_latency_seconds",
            "Between two pieces of text of one streamed answer",
            _ITL_BUCKETS,
        )
        self._time_per_output_token = histogram(
            "time_per_output_token_seconds",
            "Mean time between the tokens of one whole answer",
            _ITL_BUCKETS,
        )
        self._end_to_end = histogram(
            "end_to_end_seconds", "From the arrival of a request to its end", _E2E_BUCKETS
        )
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens that ran", "model")
        self._cached_prompt_tokens = counter(
            "cached_prompt_tokens", "Prompt tokens the prefix cache served", "model"
        )
        self._answer_tokens = counter("answer_tokens", "Answer tokens that ran", "model")
        self._escaped_markers = counter(
            "escaped_markers", "Role markers in content made harmless", "model"
        )
        self._dropped_messages = counter(
            "dropped_messages", "Messages dropped so that the conversation fits", "model"
        )
        self.aborted_by_client = counter(
            "aborted_by_client",
            "Requests whose client left before the end; no model if it left before it was known",
            "model",
        )
        self.errors = counter("errors", "Errors told to clients, in streams too", "code", "route")
        self.ignored_fields = counter(
            "ignored_fields", "Fields of requests that changed nothing, and were let pass", "field"
        )
        self.user_tokens = counter(
            "user_tokens", "Tokens that ran, of users with a key", "user", "kind"
        )
        self.user_refusals = counter(
            "user_refusals", "Requests of users with a key that were refused", "user", "code"
        )
        self.key_reload_failures = counter(
            "key_reload_failures", "Times the key file changed and could not be used"
        )
        self._accounts_reachable = LazyGauge(
            "synthia_accounts_reachable",
            "Whether limits hold over all replicas now: 1, or 0 for a part of them here",
            ["at"],
            registry=registry,
            multiprocess_mode="livemin",
        )
        self._accounts_replicas = LazyGauge(
            "synthia_accounts_replicas",
            "Live replicas that share the accounts, when last heard of",
            ["at"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.batch_lines = counter(
            "batch_lines", "Lines of batches that were answered, or failed", "result"
        )
        self.batch_running = Gauge(
            "synthia_batch_running",
            "Places of the engine that batches hold",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.batch_given_back = counter(
            "batch_given_back", "Lines of batches that were stopped for users, to be run again"
        )
        self.transcript_lines = counter("transcript_lines", "Lines written to transcripts")
        self.transcript_failures = counter(
            "transcript_failures", "Lines lost to transcripts: disk full, unwritable, too slow"
        )
        self.ledger_waiting = Gauge(
            "synthia_ledger_waiting_rows",
            "Rows of the ledger that its database has not taken",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.ledger_lost = counter(
            "ledger_lost_rows", "Rows of the ledger that there was no room for to wait"
        )
        self.of = cache(self._of)

    def accounts_at(self, address: str) -> Callable[[bool, int], None]:
        """What takes note of the accounts that are kept there."""
        reachable = self._accounts_reachable.labels(address)
        count = self._accounts_replicas.labels(address)

        def note(reached: bool, replicas: int) -> None:
            reachable.set(reached)
            count.set(replicas)

        return note

    def exposition(self) -> bytes:
        """All series in Prometheus' text format; of all processes, where they share them."""
        return generate_latest(self._of_all())

    def in_flight_of_all(self) -> int:
        """Requests being answered, by all processes."""
        return int(self._of_all().get_sample_value("synthia_requests_in_flight") or 0)

    def _of_all(self) -> CollectorRegistry:
        if not shared():
            return self.registry
        settle()  # the others do so four times a second
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return registry

    def _of(self, model: str) -> ModelSeries:
        """The series of `model`, which must be a served name. Use `of`, which remembers them."""
        return ModelSeries(
            time_to_first_token=self._time_to_first_token.labels(model),
            inter_token_latency=self._inter_token_latency.labels(model),
            time_per_output_token=self._time_per_output_token.labels(model),
            end_to_end=self._end_to_end.labels(model),
            prompt_tokens=self._prompt_tokens.labels(model),
            cached_prompt_tokens=self._cached_prompt_tokens.labels(model),
            answer_tokens=self._answer_tokens.labels(model),
            escaped_markers=self._escaped_markers.labels(model),
            dropped_messages=self._dropped_messages.labels(model),
        )
