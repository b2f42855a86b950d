"""Batches on what users leave: their lines go to the engine one by one, as places are free.

How many places batches may hold follows from how many users hold, with each change of that: never
the last ones, and beside users only a share, for each answer in the engine's step makes the step
longer for all. What is too much is taken out of the engine and run again later; its prompt is then
still in the prefix cache.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import socket
import time
import uuid
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import IO, TYPE_CHECKING, Final

from pydantic_core import to_json

from synthia_vllm.admission.permits import BatchPermit
from synthia_vllm.api.batches.pace import Pace
from synthia_vllm.api.batches.protocol import (
    BatchError,
    BatchErrors,
    Line,
    LineError,
    LineResponse,
    LineResult,
)
from synthia_vllm.errors import ApiError, EngineDead, EngineFault, InvalidRequest, Unavailable
from synthia_vllm.generate.call import Call
from synthia_vllm.generate.response import ResponseCollector, ResponseState
from synthia_vllm.ledger.rows import UNKNOWN, Used

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from synthia_vllm.api.batches.store import Job, Store
    from synthia_vllm.http.route import GenerationRoute
    from synthia_vllm.http.state import ServerState

logger = logging.getLogger(__name__)

ROUTE: Final = "/v1/batches"
"""What the ledger calls the route of a line, whatever its url."""
_LOOK_S: Final = 1.0  # for new batches, for those to be cancelled, for the time that is over
_PACE_S: Final = 0.2
_REMOVE_S: Final = 3600.0
_DISK_S: Final = 10.0  # until a disk that was full is tried again
# Users have gone when they have been gone so long: one who reads an answer sends the next question.
_LINGER_S: Final = 5.0
_READ_AT_ONCE: Final = 256
_TRIES: Final = 3
# One place of so many stays free for the next user who comes.
_PLACES_TO_A_FREE_ONE: Final = 64


@dataclass(slots=True)
class _Result:
    """A line that was answered, or failed."""

    kind: str
    id: str
    status: int
    text: bytes
    used: Used


@dataclass(slots=True, eq=False)
class _Work:
    """A batch that is being run here."""

    job: Job
    lines: deque[Line] = field(default_factory=deque)
    read_all: bool = False
    running: int = 0
    results: list[_Result] = field(default_factory=list)
    tries: dict[str, int] = field(default_factory=dict)
    """By id: how often the engine has failed at a line."""
    stop: str | None = None
    """What it ends as, if it is not to be run any more."""
    changed: bool = False


@dataclass(slots=True, eq=False)
class _Run:
    """A line in the engine."""

    work: _Work
    line: Line
    task: asyncio.Task[None]


class BatchRunner:
    """Runs the batches in `store` by the `routes`, of which each has a path."""

    def __init__(
        self, state: ServerState, store: Store, routes: dict[str, GenerationRoute]
    ) -> None:
        self._state = state
        self._store = store
        self._routes = routes
        self._wake = asyncio.Event()
        self._users = 0
        self._last_user = -_LINGER_S
        self._pace: Pace | None = None
        self._works: list[_Work] = []
        self._runs: list[_Run] = []
        self._places = 0
        self._had: dict[str, float] = {}
        """By user: tokens that their batches had, by weight."""
        self._not_before = 0.0
        """When a line may be begun again, or the disk be tried (`time.monotonic`)."""
        self._turn: IO[str] | None = None

    async def run(self) -> None:
        """Run until cancelled; then what has no answer yet waits on the disk."""
        await self._state.started.wait()
        while True:
            try:
                await self._run()
            except Exception:
                logger.exception("batches stand still: a fault of the server's own")
            await asyncio.sleep(_DISK_S)

    async def _run(self) -> None:
        state = self._state
        unwatch = state.admission.watch(self._note_users)
        looked = removed = -_REMOVE_S
        try:
            while True:
                now = time.monotonic()
                if now - removed >= _REMOVE_S:
                    removed = now
                    seconds = 24 * 3600 * state.settings.batches.keep_days
                    await asyncio.to_thread(self._store.remove_old, seconds)
                if now - looked >= _LOOK_S:
                    looked = now
                    await self._look()
                await self._fill()
                await self._write()
                with suppress(TimeoutError):
                    async with asyncio.timeout(_PACE_S if self._works else _LOOK_S):
                        await self._wake.wait()
                self._wake.clear()
        finally:
            unwatch()
            await self._give_back(self._runs)
            await self._write()
            while self._works:
                self._works.pop().job.release()
            if self._turn is not None:
                self._turn.close()
                self._turn = None

    # --- Places ---

    def _note_users(self, places: int) -> None:
        if places or self._users:
            self._last_user = time.monotonic()
        self._users = places
        self._stop_surplus()  # at once: this task may be waiting for a disk
        self._wake.set()

    def _allowed(self) -> int:
        """How many places of the engine batches may hold now."""
        if self._state.phase != "serving":
            return 0
        all_places = self._state.engine.model_info.max_num_seqs
        allowed = all_places - self._users - max(1, all_places // _PLACES_TO_A_FREE_ONE)
        now = time.monotonic()
        if self._users or now - self._last_user < _LINGER_S:
            if self._pace is None:
                self._pace = Pace(int(self._state.settings.batches.beside_users * all_places))
            if self._users:
                writes = self._state.writes
                self._pace.note(now, writes.gaps, writes.latest_gaps)
            allowed = min(allowed, self._pace.limit)
        elif self._pace is not None:
            self._pace.rest()
        return max(allowed, 0)

    def _stop_surplus(self) -> None:
        """Take out of the engine what is too much, the latest lines: they have least to lose."""
        surplus = self._places - self._allowed()
        for run in reversed(self._runs):
            if surplus <= 0:
                break
            surplus -= run.line.places
            if not run.task.cancelling():
                run.task.cancel()

    async def _fill(self) -> None:
        """Have as many lines in the engine as may be there."""
        self._stop_surplus()
        while (work := await self._next()) is not None:
            line = work.lines[0]
            free = self._allowed() - self._places
            # One that asks for more places than there ever are gets all that there are.
            if free <= 0 or (line.places > free and self._places):
                return
            work.lines.popleft()
            work.running += 1
            self._places += line.places
            run = _Run(work, line, asyncio.create_task(self._answer(work, line)))
            self._runs.append(run)
            run.task.add_done_callback(partial(self._over, run))
            self._state.metrics.batch_running.set(self._places)
            await asyncio.sleep(0)  # each costs some hundred microseconds: others' turn

    async def _next(self) -> _Work | None:
        """The batch whose line is next: of the user who had least; `None` if no line is left."""
        if time.monotonic() < self._not_before:
            return None
        ready = []
        for work in self._works:
            if work.stop is None and not work.lines and not work.read_all:
                work.lines.extend(await asyncio.to_thread(work.job.read, _READ_AT_ONCE))
                work.read_all = not work.lines
            if work.stop is None and work.lines:
                ready.append(work)
        return min(ready, key=lambda work: self._had.get(work.job.user, 0.0), default=None)

    async def _give_back(self, runs: Iterable[_Run]) -> None:
        """Take lines out of the engine, to be run again."""
        stopped = list(runs)
        for run in stopped:
            run.task.cancel()
        if stopped:
            await asyncio.wait([run.task for run in stopped])
        for run in stopped:
            self._over(run)

    def _over(self, run: _Run, _task: object = None) -> None:
        if run not in self._runs:
            return
        self._runs.remove(run)
        run.work.running -= 1
        self._places -= run.line.places
        if run.task.cancelled():
            run.work.lines.appendleft(run.line)
            self._state.metrics.batch_given_back.inc()
        self._state.metrics.batch_running.set(self._places)
        self._wake.set()

    # --- A line ---

    async def _answer(self, work: _Work, line: Line) -> None:
        """Have `line` answered, and note the result; cancelled, it is as if it had not begun."""
        name = f"batch_req_{uuid.uuid4().hex}"
        began = time.perf_counter()
        ran: list[ResponseState] = []
        try:
            body = await self._body(name, work, line, ran)
            response = LineResponse(status_code=200, request_id=name, body=body)
            kind = "output"
        except (EngineDead, Unavailable):
            work.lines.append(line)
            self._not_before = time.monotonic() + _LOOK_S
            return
        except ApiError as error:
            tries = work.tries[line.custom_id] = work.tries.get(line.custom_id, 0) + 1
            if isinstance(error, EngineFault) and tries < _TRIES:
                work.lines.append(line)
                return
            response = LineResponse(
                status_code=error.status,
                request_id=name,
                body=self._routes[line.url].envelope(error, name),
            )
            kind = "errors"
        except Exception:
            logger.exception("line %s of a batch: a fault of the server's own", name)
            response = LineResponse(
                status_code=500,
                request_id=name,
                body=self._routes[line.url].envelope(EngineFault(), name),
            )
            kind = "errors"
        result = LineResult(id=name, custom_id=line.custom_id, response=response)
        used = Used(
            user=work.job.user,
            model=ran[0].prepared.model if ran else UNKNOWN,
            route=ROUTE,
            refused=kind == "errors",
            prompt_tokens=ran[0].prompt_tokens if ran else 0,
            cached_tokens=ran[0].cached_tokens if ran else 0,
            answer_tokens=ran[0].answer_tokens if ran else 0,
            seconds=time.perf_counter() - began,
        )
        text = to_json(result) + b"\n"
        self._note(work, _Result(kind, name, response.status_code, text, used))

    async def _body(self, name: str, work: _Work, line: Line, ran: list[ResponseState]) -> object:
        """What the line's route answers; `ran` is given what ran for it. Raises `ApiError`."""
        state, route = self._state, self._routes[line.url]
        users, user = state.admission, work.job.user
        permit = BatchPermit(users, user, users.user(user), state.settings.limits.max_requests)
        call = Call(name, to_json(line.body), permit, state.engine, state.settings)
        prepared = await route.prepare(call)
        if prepared.stream:
            raise InvalidRequest(
                "`stream` is not for batches: nobody reads along.",
                param="stream",
                code="unsupported_parameter",
            )
        response = ResponseState(prepared, name, fingerprint=state.fingerprint)
        ran.append(response)
        collector = ResponseCollector(response)
        try:
            async with prepared.submit(state.engine, collector):
                choices = await collector.choices()
        finally:
            state.count_response(response, user)
            weight = permit.user.weight
            tokens = response.prompt_tokens + response.answer_tokens
            self._had[user] = self._had.get(user, 0.0) + tokens / weight
        return route.body(response, choices)

    def _note(self, work: _Work, result: _Result) -> None:
        work.results.append(result)
        kind = result.kind
        counts = work.job.batch.request_counts
        if kind == "output":
            counts.completed += 1
        else:
            counts.failed += 1
        self._state.metrics.batch_lines.labels("completed" if kind == "output" else "failed").inc()
        self._wake.set()

    # --- The disk ---

    async def _look(self) -> None:
        """See what has changed: new batches, those to be cancelled, those whose time is over."""
        if self._state.phase != "serving":
            return
        if not await asyncio.to_thread(self._take_turn):
            return
        held = {work.job.batch.id for work in self._works}
        for user, batch_id in await asyncio.to_thread(self._store.unfinished):
            if batch_id in held:
                continue
            job = await asyncio.to_thread(self._store.take, user, batch_id)
            if job is not None:
                await self._begin(job)
        for work in self._works:
            if work.stop is None and await asyncio.to_thread(work.job.cancelled):
                work.stop = "cancelled"
            elif work.stop is None and time.time() > work.job.batch.expires_at:
                work.stop = "expired"
            if work.stop is not None:
                await self._give_back([run for run in self._runs if run.work is work])
            if work.changed:
                work.changed = False
                await self._on_disk(work, work.job.save)

    def _take_turn(self) -> bool:
        """Whether this process runs batches: one of all API processes of a server does."""
        if self._turn is None and self._state.settings.api_workers > 1:
            server = f"{socket.gethostname()}-{os.getppid()}"
            turn = self._store.lock_of(server)
            try:
                fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                turn.close()
                return False
            self._turn = turn
        return True

    async def _begin(self, job: Job) -> None:
        batch = job.batch
        try:
            await asyncio.to_thread(job.validate)
        except OSError as error:
            logger.error("batch %s waits: %s", batch.id, error.strerror or error)
            job.release()
            return
        counts = batch.request_counts
        if batch.status == "failed":
            logger.info("batch %s of %s: the file is not one of requests", batch.id, job.user)
            job.release()
            return
        logger.info(
            "batch %s of %s: %d lines, %d answered before",
            batch.id,
            job.user,
            counts.total,
            counts.completed + counts.failed,
        )
        # Who is new has had as much as who had least.
        others = [self._had.get(work.job.user, 0.0) for work in self._works]
        least = min(others, default=0.0)
        self._had[job.user] = max(self._had.get(job.user, 0.0), least)
        self._works.append(_Work(job))

    async def _write(self) -> None:
        """Write down what was answered since, and end batches that have no line left."""
        if time.monotonic() < self._not_before:
            return
        for work in list(self._works):
            results, work.results = work.results, []
            for kind in ("output", "errors"):
                of_kind = [result for result in results if result.kind == kind]
                if of_kind and not await self._on_disk(work, self._keep, work, kind, of_kind):
                    work.results += of_kind
            work.changed = work.changed or bool(results)
            over = work.stop is not None or (work.read_all and not work.lines)
            if over and not work.running and not work.results:
                await self._end(work)

    def _keep(self, work: _Work, kind: str, results: list[_Result]) -> None:
        """Write results down; what is on the disk is not run again, and so counts once."""
        work.job.write(kind, [result.text for result in results])
        for result in results:
            used = result.used
            fields = {
                "id": result.id,
                "batch": work.job.batch.id,
                "user": used.user,
                "model": used.model,
                "status": result.status,
                "prompt_tokens": used.prompt_tokens,
                "cached_tokens": used.cached_tokens,
                "answer_tokens": used.answer_tokens,
                "total_ms": round(1e3 * used.seconds),
            }
            logger.info("batch line", extra={"fields": fields})
            self._state.account(used)

    async def _end(self, work: _Work) -> None:
        job = work.job
        batch, now = job.batch, int(time.time())
        if work.stop == "expired" and not await self._on_disk(work, self._expire, work):
            return
        batch.status, batch.finalizing_at = "finalizing", now
        if not await self._on_disk(work, job.finish):
            return
        if work.stop == "cancelled":
            batch.status, batch.cancelled_at = "cancelled", now
        elif work.stop == "expired":
            batch.status, batch.expired_at = "expired", now
        else:
            batch.status, batch.completed_at = "completed", now
        if not await self._on_disk(work, job.save):
            batch.status = "finalizing"
            return
        counts = batch.request_counts
        logger.info(
            "batch %s of %s is %s: %d of %d lines answered, %d failed",
            batch.id,
            job.user,
            batch.status,
            counts.completed,
            counts.total,
            counts.failed,
        )
        self._works.remove(work)
        job.release()

    def _expire(self, work: _Work) -> None:
        """Say of each line that is left that its time was over."""
        error = LineError(code="batch_expired", message="The 24 hours of the batch were over.")
        while True:
            if not work.lines:
                work.lines.extend(work.job.read(_READ_AT_ONCE))
            if not work.lines:
                return
            results = [
                LineResult(
                    id=f"batch_req_{uuid.uuid4().hex}",
                    custom_id=line.custom_id,
                    response=None,
                    error=error,
                )
                for line in work.lines
            ]
            work.job.write("errors", [to_json(result) + b"\n" for result in results])
            work.job.batch.request_counts.failed += len(results)
            work.lines.clear()

    async def _on_disk(self, work: _Work, act: Callable[..., None], *args: object) -> bool:
        """Whether the disk did it; if it is full, nothing more is begun for a while."""
        batch = work.job.batch
        try:
            await asyncio.to_thread(act, *args)
        except OSError as error:
            why = error.strerror or str(error)
            logger.error("batch %s waits for the disk: %s", batch.id, why)
            batch.errors = BatchErrors(
                data=[
                    BatchError(
                        code="storage_full",
                        message=f"The server cannot write ({why}); the batch goes on when it can.",
                    )
                ]
            )
            self._not_before = time.monotonic() + _DISK_S
            return False
        batch.errors = None
        return True
