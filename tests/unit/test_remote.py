"""Accounts kept by one process for several: the same decisions as in one."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from loops import in_loop, until, users_file

from synthia_vllm.admission.permits import AdmissionController
from synthia_vllm.admission.remote import AdmissionClient, AdmissionServer
from synthia_vllm.admission.users import ANONYMOUS
from synthia_vllm.errors import RateLimited, Unauthorized, Unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@dataclass
class Accounts:
    """One set of accounts, with both ends of the API processes' lines."""

    file: Path | None = None
    max_requests: int = 100
    batches: list[int] = field(default_factory=list)
    gone: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.admission = AdmissionController(
            self.file, max_requests=self.max_requests, max_queue_seconds=1e9
        )

    @asynccontextmanager
    async def line(self) -> AsyncIterator[tuple[AdmissionClient, AdmissionServer]]:
        """Another API process, for as long as the context lasts."""
        loop = asyncio.get_running_loop()
        line = AdmissionServer(
            self.admission, on_batch=self.batches.append, on_gone=self.gone.append
        )
        shared = AdmissionClient(self.file, max_requests=8)
        here, there = socket.socketpair()
        await loop.create_connection(lambda: line, sock=here)
        transport, _ = await loop.create_connection(lambda: shared, sock=there)
        try:
            yield shared, line
        finally:
            transport.abort()
            await until(lambda: bool(self.gone))


@in_loop
async def test_limits_hold_over_all(tmp_path: Path) -> None:
    """Two processes: what one user has taken in one is gone in the other."""
    accounts = Accounts(users_file(tmp_path / "keys", alice={"requests_per_minute": 3}, bob={}))
    async with accounts.line() as (one, _), accounts.line() as (two, _):
        for process in (one, two, one):
            assert (await process.admit("alice")).user.requests_per_minute == 3
        with pytest.raises(RateLimited) as refused:
            await two.admit("alice")
        assert refused.value.code == "requests_per_minute"
        assert 0 < (refused.value.retry_after or 0) <= 20
        assert (b"x-ratelimit-remaining-requests", b"0") in two.headers("alice")
        await two.admit("bob")
        assert two.headers("bob") == []


@in_loop
async def test_places_are_counted_over_all() -> None:
    """The bound of requests holds over all processes, and a place given back serves any."""
    accounts = Accounts(max_requests=2)
    async with accounts.line() as (one, _), accounts.line() as (two, _):
        first = await one.admit(ANONYMOUS)
        await two.admit(ANONYMOUS)
        with pytest.raises(Unavailable) as full:
            await two.admit(ANONYMOUS)
        assert full.value.code == "server_full"
        first.leave(0, 0, 0)
        await until(lambda: accounts.admission.in_flight == 1)
        await two.admit(ANONYMOUS)


@in_loop
async def test_turns_are_those_of_one_process(tmp_path: Path) -> None:
    """Priorities, and the counters behind them, are what one controller by itself decides."""
    file = users_file(tmp_path / "keys", alice={"weight": 2.0}, bob={})
    accounts, alone = (
        Accounts(file),
        AdmissionController(file, max_requests=100, max_queue_seconds=1e9),
    )
    async with accounts.line() as (one, _), accounts.line() as (two, _):
        for process, name, prompt, answer in (
            (one, "alice", 100, 50), (two, "alice", 10, 9), (two, "bob", 7, 300),
            (one, "bob", 900, 2), (one, "alice", 30, 30),
        ):  # fmt: skip
            place, permit = await process.admit(name), alone.enter(name)
            assert await place.claim(prompt, 400, 1) == permit.reserve(prompt, 400, 1)
            for either in (place, permit):
                either.began()
                either.leave(prompt, answer, 1)
        await until(lambda: not accounts.admission.in_flight)


@in_loop
async def test_who_is_gone_gives_all_back(tmp_path: Path) -> None:
    """A process that dies: places, tokens, turns; and its runs are named."""
    accounts = Accounts(users_file(tmp_path / "keys", alice={"tokens_per_minute": 1000}))
    async with accounts.line() as (two, _):
        async with accounts.line() as (one, _):
            waiting, running = await one.admit("alice"), await one.admit("alice")
            await one.admit("alice")
            await waiting.claim(10, 300, 1)
            await running.claim(10, 300, 2)
            running.began()
            one.tell("runs", ["a", "b"])
            one.tell("runs", ["c"])
            one.tell("ran", ["a", "b"])
            await until(lambda: accounts.admission.in_flight == 4)
            await one.admit("alice")  # all before it has been taken
        assert accounts.gone == [["c"]]
        assert accounts.admission.in_flight == 0
        place = await two.admit("alice")
        await place.claim(10, 900, 1)
        assert dict(two.headers("alice"))[b"x-ratelimit-remaining-tokens"] == b"90"


@in_loop
async def test_a_client_that_leaves_while_it_is_decided() -> None:
    """A place that nobody waits for any more is given back, refused or not."""
    accounts = Accounts(max_requests=1)
    async with accounts.line() as (one, _):
        for _ in range(2):
            asking = [asyncio.create_task(one.admit(ANONYMOUS)) for _ in range(2)]
            await asyncio.sleep(0)
            for task in asking:
                task.cancel()
            await asyncio.wait(asking)
            await until(lambda: accounts.admission.in_flight == 0)
        (await one.admit(ANONYMOUS)).leave(0, 0, 0)


@in_loop
async def test_news(tmp_path: Path) -> None:
    """The batch is told up; keys and what to abort are told down."""
    file = users_file(tmp_path / "keys", alice={})
    accounts, aborted = Accounts(file), []

    async def abort(ids: list[str]) -> None:
        aborted.append(ids)

    async with accounts.line() as (one, line):
        one.on_abort = abort
        one.set_batch(64)
        await until(lambda: accounts.batches == [64])
        place = await one.admit("alice")
        users_file(file, bob={})
        assert not one.reload(only_if_changed=True)
        accounts.admission.reload()
        with pytest.raises(Unauthorized):  # its keys are still known here
            await one.admit("alice")
        place.leave(0, 0, 0)
        line.tell("reload")
        line.tell("abort", ["x", "y"])
        await until(lambda: one.names == ("bob",))
        await until(lambda: aborted == [["x", "y"]])
        await one.admit("bob")
        bad: list[None] = []
        one.on_bad_keys = lambda: bad.append(None)
        file.write_text("users: [")
        line.tell("reload")
        await until(lambda: bad)
        await one.admit("bob")


@in_loop
async def test_nobody_at_the_desk() -> None:
    """When the accounts are gone, who asks is told to come back, and nobody waits for ever."""
    accounts = Accounts()
    async with accounts.line() as (one, line):
        asking = asyncio.create_task(one.admit(ANONYMOUS))
        await asyncio.sleep(0)
        assert line._transport is not None
        line._transport.abort()
        with pytest.raises(Unavailable):
            await asking
        with pytest.raises(Unavailable):
            await one.admit(ANONYMOUS)


@in_loop
async def test_none_serves_before_all_can() -> None:
    """An API process that is ready waits until it is told that the others are, too."""
    accounts = Accounts()
    async with accounts.line() as (one, line):
        one.set_batch(8)
        waiting = asyncio.ensure_future(one.may_serve())
        await until(lambda: accounts.batches == [8])
        assert not waiting.done()
        line.tell("serve")
        await until(waiting.done)
    await accounts.admission.may_serve()  # alone it need not wait


@in_loop
async def test_all_processes_hear_how_many_places_are_taken() -> None:
    """Those that want to know, with each change, until they are gone."""
    accounts = Accounts()
    async with accounts.line() as (first, _), accounts.line() as (second, _):
        heard: list[int] = []
        first.watch(heard.append)
        await until(lambda: heard == [0])
        permit = await second.admit(ANONYMOUS)
        await until(lambda: heard == [0, 1])
        await permit.claim(1, 1, 3)
        await until(lambda: heard == [0, 1, 3])
        permit.leave(1, 1, 3)
        await until(lambda: heard == [0, 1, 3, 0])
    permit = accounts.admission.enter(ANONYMOUS)  # type: ignore[assignment]
    permit.leave(0, 0, 0)
