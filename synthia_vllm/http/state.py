"""What the routes share: the engine, its users, and how far it is in its life."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import time
from functools import cached_property
from typing import TYPE_CHECKING, Final, Literal, Protocol

from synthia_vllm.admission.permits import AdmissionController
from synthia_vllm.admission.users import new_cache_secret
from synthia_vllm.errors import ApiError, EngineDead, StartupError, Unavailable, without_password
from synthia_vllm.http.sse import WriteBatcher
from synthia_vllm.ledger.writer import open_ledger
from synthia_vllm.telemetry.metrics import settle
from synthia_vllm.telemetry.tracing import Tracer
from synthia_vllm.telemetry.transcript import Transcripts
from synthia_vllm.template.formats import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from synthia_vllm.admission.remote import AdmissionClient
    from synthia_vllm.engine.base import Engine
    from synthia_vllm.generate.response import ResponseState
    from synthia_vllm.ledger.rows import Used
    from synthia_vllm.settings import Settings
    from synthia_vllm.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

# Objects made and not yet freed at which the garbage collector looks: not every few requests.
_GARBAGE_AT: Final = 10_000

WELL_KNOWN: Final = frozenset(
    {
        "annotations", "cache_control", "chat_id", "chat_template_kwargs", "id", "name", "num_ctx",
        "parallel_tool_calls", "prediction", "priority", "reasoning", "reasoning_content",
        "reasoning_effort", "refusal", "request_id", "service_tier", "session_id", "store",
        "thinking", "tools", "verbosity",
    }
)  # fmt: skip
"""Fields that clients are known to send, counted by name; others together."""

Phase = Literal["starting", "serving", "leaving", "draining", "dead"]
"""Leaving, the server takes requests, but asks for no more; draining, it takes none."""


class Endable(Protocol):
    """Something that is being answered."""

    def end(self, error: ApiError) -> None:
        """End it with `error`."""


def own_admission(settings: Settings, cache_secret: bytes | None = None) -> AdmissionController:
    """The accounts of all users, as `settings` have them. Raises `StartupError`."""
    limits = settings.limits
    if settings.accounts is None:
        return AdmissionController(
            settings.keys_file,
            max_requests=limits.max_requests,
            max_queue_seconds=limits.max_queue_seconds,
            cache_secret=cache_secret,
        )
    from synthia_vllm.admission.fleet import FleetController

    return FleetController(
        settings.keys_file,
        settings.accounts,
        max_requests=limits.max_requests,
        max_queue_seconds=limits.max_queue_seconds,
        cache_secret=cache_secret,
    )


class ServerState:
    """One engine, its settings, users and metrics, and the phase it is in.

    Raises `StartupError` if the key file, the ledger or the place for transcripts cannot be used.
    """

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        metrics: Metrics,
        admission: AdmissionClient | None = None,
    ) -> None:
        self.engine = engine
        self.settings = settings
        self.metrics = metrics
        self._phase: Phase = "starting"
        self.started = asyncio.Event()
        """Set when the engine runs, or has failed to."""
        self.failure: StartupError | EngineDead | None = None
        self.created = int(time.time())
        self.tracer = Tracer() if settings.traces else None
        self.admission = admission or own_admission(
            settings, new_cache_secret() if settings.cache_per_user else None
        )
        if settings.accounts is not None:
            self.admission.on_accounts = metrics.accounts_at(without_password(settings.accounts))
        self.writes = WriteBatcher()
        self._open: set[Endable] = set()
        self.ledger = open_ledger(
            settings.ledger, on_waiting=metrics.ledger_waiting.set, on_lost=metrics.ledger_lost.inc
        )
        self._transcripts: Transcripts | None = None
        where = settings.transcripts
        if where.directory is not None:
            self._transcripts = Transcripts(
                where.directory,
                max_bytes=where.max_bytes,
                keep=where.keep,
                fsync=where.fsync,
                on_written=metrics.transcript_lines.inc,
                on_failed=metrics.transcript_failures.inc,
            )

    @property
    def phase(self) -> Phase:
        """How far the server is in its life; only the methods here change it."""
        return self._phase

    def leave(self) -> None:
        """Ask for no more requests, but take those that come."""
        self._phase = "leaving"

    def drain(self) -> None:
        """Take no more requests."""
        self._phase = "draining"

    @cached_property
    def fingerprint(self) -> str:
        """What the same request may be answered otherwise by when it is another: OpenAI's
        `system_fingerprint`, of the engine, the model's files and the prompt's spelling.
        """
        info, settings = self.engine.model_info, self.settings
        parts = (sorted(info.versions.items()), info.revision, settings.format, VERSION)
        return f"fp_{hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}"

    @property
    def in_flight(self) -> int:
        """Chat requests being answered."""
        return len(self._open)

    @property
    def keeps_text(self) -> bool:
        """Whether anybody will ask for the text of an answer after it was sent."""
        return self._transcripts is not None or self.settings.log_content

    def open(self, exchange: Endable) -> None:
        """`exchange` has arrived."""
        self._open.add(exchange)
        self.metrics.in_flight.inc()

    def closed(self, exchange: Endable) -> None:
        """`exchange` is over."""
        self._open.remove(exchange)
        self.metrics.in_flight.dec()

    def end_all(self) -> None:
        """End what is still being answered: the time to finish is over."""
        for exchange in list(self._open):
            exchange.end(
                Unavailable(
                    "The server is shutting down and could not finish this answer.",
                    code="draining",
                )
            )

    def require_serving(self) -> None:
        """Raise if requests cannot be taken now."""
        if self._phase in ("serving", "leaving"):
            return
        if self._phase == "dead":
            raise EngineDead
        raise Unavailable(
            "The server is starting; it takes requests when /ready says so."
            if self._phase == "starting"
            else "The server is shutting down and takes no new requests.",
            code=self._phase,
        )

    def count_error(self, error: ApiError, route: str, user: str | None = None) -> None:
        """An error went to a client: on which route, and to whom, if that is known."""
        code = error.code or "other"
        self.metrics.errors.labels(code, route).inc()
        if user is not None and error.status in (403, 429) and not self.admission.open:
            self.metrics.user_refusals.labels(user, code).inc()

    def note_ignored(self, paths: Sequence[str]) -> None:
        """A request had fields that changed nothing."""
        for path in paths:
            name = path.rpartition(".")[2]
            self.metrics.ignored_fields.labels(name if name in WELL_KNOWN else "other").inc()
        logger.debug("ignored of a request: %s", ", ".join(paths))

    def count_response(self, response: ResponseState, user: str | None) -> None:
        """What ran for `user`, whatever way it ended."""
        prepared, metrics = response.prepared, self.metrics
        series = metrics.of(prepared.model)
        prompt, answer = response.prompt_tokens, response.answer_tokens
        series.escaped_markers.inc(prepared.escaped_markers)
        series.dropped_messages.inc(prepared.dropped_messages)
        series.prompt_tokens.inc(prompt)
        series.cached_prompt_tokens.inc(response.cached_tokens)
        series.answer_tokens.inc(answer)
        for reason in response.finish_reasons:
            metrics.finished.labels(prepared.model, reason).inc()
        if user is not None and not self.admission.open:
            metrics.user_tokens.labels(user, "prompt").inc(prompt)
            metrics.user_tokens.labels(user, "answer").inc(answer)

    def account(self, used: Used) -> None:
        """A request has ended, and its line is in the log."""
        if self.ledger is not None:
            self.ledger.add(used)

    def keep(self, user: str, question: str, answers: Sequence[str]) -> None:
        """Keep a whole answer in the transcripts, if there are any."""
        if self._transcripts is not None:
            for answer in answers:
                self._transcripts.add(user, question, answer)

    async def run(self, progress: Callable[[str], None], on_failure: Callable[[], None]) -> None:
        """Start the engine, then watch it until this task is cancelled."""
        thresholds = gc.get_threshold()
        try:
            self.admission.start()
            await self.engine.start(progress)
            self.admission.set_batch(self.engine.model_info.max_num_seqs)
            await self.admission.may_serve()
            self.metrics.engine_places.set(self.engine.model_info.max_num_seqs)
            # What is there now stays: torch and vLLM alone are a million objects, and looking
            # through them for garbage was a third of the CPU of streaming, in pauses of 0.3 s.
            gc.collect()
            gc.freeze()
            gc.set_threshold(_GARBAGE_AT)
            self._phase = "serving"
            self.started.set()
            host, port = self.settings.host, self.settings.port
            progress(f"ready: {', '.join(self.settings.served)} at http://{host}:{port}/v1")
            while True:
                self.engine.check()
                settle()
                if self.admission.reload_changed() == "failed":
                    self.metrics.key_reload_failures.inc()
                await asyncio.sleep(0.25)
        except (StartupError, EngineDead) as error:
            if self._phase in ("leaving", "draining"):  # Ctrl-C reaches the engine's processes too
                return
            self._phase = "dead"
            self.failure = error
            on_failure()
        finally:
            self.started.set()
            gc.set_threshold(*thresholds)
            gc.unfreeze()  # the interpreter tidies up at exit what it can find

    async def close(self) -> None:
        """Give back what is held, and write what is still to be written."""
        settle()
        await self.admission.close()
        if self._transcripts is not None:
            self._transcripts.close()
        if self.ledger is not None:
            self.ledger.close()
