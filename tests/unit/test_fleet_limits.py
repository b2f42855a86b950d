"""Limits over replicas: the decisions of one server, with a real Valkey, and what goes wrong."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import signal
import socket
import ssl
import subprocess
import time
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from loops import in_loop, until, users_file
from serving import free_port
from valkey_server import Server, valkey_server

from synthia_vllm.admission import fleet, line
from synthia_vllm.admission.fair_share import ANSWER_COST, PROMPT_COST
from synthia_vllm.admission.fleet import FleetController
from synthia_vllm.admission.permits import AdmissionController
from synthia_vllm.admission.remote import AdmissionClient, AdmissionServer
from synthia_vllm.errors import ApiError, RateLimited, Unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from synthia_vllm.admission.permits import AdmissionPermit


# What docs/threat-model.md says a server needs.
RIGHTS = "~{synthia}:* +@read +@write +@scripting +@connection +time -@dangerous"


@pytest.fixture(scope="module")
def running_valkey() -> Iterator[Server]:
    with valkey_server() as server:
        yield server


@pytest.fixture
def valkey(running_valkey: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """One that knows nothing yet, and is never too slow, whatever else this machine does."""
    monkeypatch.setattr(line, "BOUND", 10.0)
    running_valkey.ask("FLUSHALL")
    return running_valkey


@asynccontextmanager
async def replicas(
    number: int, file: Path, server: Server, **bounds: Any
) -> AsyncIterator[list[FleetController]]:
    """So many that know each other."""
    bounds = {"max_requests": 1000, "max_queue_seconds": 1e9, **bounds}
    found = [FleetController(file, server.url, **bounds) for _ in range(number)]
    for replica in found:
        replica.start()
    try:
        await until(lambda: all(r._line.open and r._replicas == number for r in found))
        yield found
    finally:
        for replica in found:
            await replica.close()


async def try_all(
    controllers: list[FleetController], name: str, times: int
) -> tuple[list[AdmissionPermit], list[str | None]]:
    """Ask each of `controllers` so many times, all at once; the permits, and why not."""
    asked = [controller.admit(name) for _ in range(times) for controller in controllers]
    said = await asyncio.gather(*asked, return_exceptions=True)
    permits, codes = [], []
    for one in said:
        if isinstance(one, ApiError):
            codes.append(one.code)
        elif isinstance(one, BaseException):
            raise one
        else:
            permits.append(one)
    return permits, codes


def give_back(permits: list[AdmissionPermit]) -> None:
    for permit in permits:
        permit.leave(0, 0, 0)


def user(server: Server, name: str) -> dict[str, str]:
    """What Valkey knows of a user."""
    found: dict[str, str] = server.ask("HGETALL", line.user_key(name))
    return found


# --- the same decisions -----------------------------------------------------------------------


def left(controller: AdmissionController, name: str) -> dict[bytes, int]:
    """The headers that do not tell a time."""
    return {key: int(value) for key, value in controller.headers(name) if b"reset" not in key}


@in_loop
async def test_one_replica_decides_as_a_server_alone(tmp_path: Path, valkey: Server) -> None:
    """Any order of requests: the same refusals, priorities, headers and places."""
    # By so little in so few seconds that the two clocks make no difference.
    limits: dict[str, dict[str, Any]] = {
        "a": {"requests_per_minute": 5, "weight": 2.0},
        "b": {"tokens_per_minute": 60},
        "c": {"concurrent_requests": 4},
        "d": {"concurrent_requests": 3, "tokens_per_minute": 100, "requests_per_minute": 8},
        "e": {},
    }
    file = users_file(tmp_path / "keys", **limits)
    draw = random.Random(7)
    async with replicas(1, file, valkey, max_requests=40) as [shared]:
        alone = AdmissionController(file, max_requests=40, max_queue_seconds=1e9)
        pairs: list[tuple[AdmissionPermit, AdmissionPermit]] = []
        codes = set()
        for _ in range(400):
            name = draw.choice("abcde")
            one, other = [await attempt(controller.admit(name)) for controller in (shared, alone)]
            if isinstance(one, str):
                assert one == other
                codes.add(one)
            else:
                prompt, budget, n = 20 * draw.randint(0, 1), 20, draw.randint(1, 2)
                claims = [await attempt(permit.claim(prompt, budget, n)) for permit in (one, other)]
                assert claims[0] == claims[1]
                if isinstance(claims[0], str):
                    codes.add(claims[0])
                    one.leave(0, 0, 0)
                    other.leave(0, 0, 0)
                else:
                    pairs.append((one, other))
            while pairs and draw.random() < 0.45:
                ending = pairs.pop(draw.randrange(len(pairs)))
                counts = draw.choice(((0, 0, 0), (0, 20, 1)))
                for permit in ending:
                    permit.began()
                    permit.leave(*counts)
            await asyncio.sleep(0)
            await until(lambda: not shared._line._under_way and not shared._line._waiting)
            assert left(shared, name) == pytest.approx(left(alone, name), abs=1)
            assert shared.in_flight == alone.in_flight
        for ending in pairs:
            for permit in ending:
                permit.leave(0, 0, 0)
        await until(lambda: not any(f.startswith("#") for n in "abcde" for f in user(valkey, n)))
    assert {"requests_per_minute", "tokens_per_minute", "concurrent_requests"} <= codes


async def attempt(deciding: Any) -> Any:
    """The result, or the code of the refusal."""
    try:
        return await deciding
    except (RateLimited, Unavailable) as refusal:
        return refusal.code if refusal.retry_after else None


# --- over three ------------------------------------------------------------------------------


@in_loop
async def test_limits_hold_from_all_sides(tmp_path: Path, valkey: Server) -> None:
    """Three replicas asked at once: what the limit allows, and not one more or less."""
    limits: dict[str, dict[str, Any]] = {
        "often": {"requests_per_minute": 10},
        "wide": {"concurrent_requests": 7},
        "long": {"tokens_per_minute": 500},
    }
    file = users_file(tmp_path / "keys", **limits)
    async with replicas(3, file, valkey) as fleet_:
        permits, codes = await try_all(fleet_, "often", 10)
        assert len(permits) == 10
        assert set(codes) == {"requests_per_minute"}
        for _ in range(3):
            permits, codes = await try_all(fleet_, "wide", 10)
            assert len(permits) == 7
            assert set(codes) == {"concurrent_requests"}
            give_back(permits)
        permits, _ = await try_all(fleet_, "long", 5)
        claims = [attempt(permit.claim(10, 90, 1)) for permit in permits]
        assert sum(isinstance(said, int) for said in await asyncio.gather(*claims)) == 5
        assert left(fleet_[2], "long")[b"x-ratelimit-remaining-tokens"] < 20


@in_loop
async def test_answers_of_one_request_count_over_all(tmp_path: Path, valkey: Server) -> None:
    """`n` answers need `n` places; one that is refused was never made."""
    file = users_file(tmp_path / "k", a={"concurrent_requests": 4, "requests_per_minute": 100})
    async with replicas(2, file, valkey) as [one, two]:
        first, second = await one.admit("a"), await two.admit("a")
        await first.claim(1, 1, 3)
        with pytest.raises(RateLimited) as refused:
            await second.claim(1, 1, 2)
        assert refused.value.code == "concurrent_requests"
        second.leave(0, 0, 0)
        assert left(two, "a")[b"x-ratelimit-remaining-requests"] == 99
        await (await two.admit("a")).claim(1, 1, 1)
        with pytest.raises(RateLimited):
            await two.admit("a")
        first.leave(1, 3, 3)
        permits, _ = await try_all([one, two], "a", 4)
        assert len(permits) == 3


@in_loop
async def test_who_leaves_while_it_is_decided_holds_nothing(tmp_path: Path, valkey: Server) -> None:
    """A request that is cancelled at any moment gives back its place and its tokens."""
    file = users_file(tmp_path / "k", a={"concurrent_requests": 5, "tokens_per_minute": 100_000})
    async with replicas(1, file, valkey) as [one]:
        for pause in range(40):
            task = asyncio.create_task(request(one))
            await asyncio.sleep(pause * 5e-5)
            task.cancel()
            await asyncio.wait((task,))
        await until(lambda: not one.in_flight)
        await until(lambda: not any(field.startswith("#") for field in user(valkey, "a")))
        assert float(user(valkey, "a").get("tokens_per_minute", 100_000)) > 99_999


async def request(controller: FleetController) -> None:
    permit = await controller.admit("a")
    try:
        await permit.claim(10, 1000, 2)
        await asyncio.sleep(10)
    finally:
        permit.leave(0, 0, 0)


def same(protocol: Any) -> Any:
    return protocol


@in_loop
async def test_several_processes_of_several_servers(tmp_path: Path, valkey: Server) -> None:
    """A supervisor asks for its processes: one limit for all; who leaves gives all back."""
    file = users_file(tmp_path / "keys", a={"concurrent_requests": 6})
    loop = asyncio.get_running_loop()
    async with replicas(2, file, valkey) as fleet_:
        clients, transports = [], []
        for controller in fleet_ * 2:
            here, there = socket.socketpair()
            server = AdmissionServer(controller, on_batch=lambda _: None, on_gone=lambda _: None)
            client = AdmissionClient(file, max_requests=1000)
            await loop.create_connection(partial(same, server), sock=here)
            found = await loop.create_connection(partial(same, client), sock=there)
            clients.append(client)
            transports.append(found[0])
        permits, codes = await try_all(clients, "a", 5)  # type: ignore[arg-type]  # they admit, too
        assert len(permits) == 6
        assert set(codes) == {"concurrent_requests"}
        give_back(permits)
        tasks = [asyncio.create_task(client.admit("a")) for client in clients]
        await asyncio.sleep(0.0005)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await until(lambda: not any(controller.in_flight for controller in fleet_))
        permits, _ = await try_all(clients, "a", 5)  # type: ignore[arg-type]
        assert len(permits) == 6
        for transport in transports[1:]:
            transport.abort()
        await until(lambda: sum(controller.in_flight for controller in fleet_) < 6)
        permits, _ = await try_all(clients[:1], "a", 9)  # type: ignore[arg-type]
        assert 0 < len(permits) <= 6
        transports[0].abort()
        await until(lambda: not any(controller.in_flight for controller in fleet_))


# --- whose turn it is -------------------------------------------------------------------------


class Engine:
    """A batch that makes a token each a step, and takes those who wait by priority."""

    def __init__(self, controller: FleetController, slots: int = 4) -> None:
        self.controller = controller
        self.slots = slots
        self.waiting: list[tuple[int, int, str, AdmissionPermit]] = []
        self.running: list[tuple[int, str, AdmissionPermit]] = []
        self.served: dict[str, int] = {}
        self.offered = 0

    async def keep_busy(self, name: str, waiting: int = 4) -> None:
        """Let `name` have as many requests waiting."""
        while sum(entry[2] == name for entry in self.waiting) < waiting:
            permit = await self.controller.admit(name)
            self.offered += 1
            self.waiting.append((await permit.claim(10, 20, 1), self.offered, name, permit))

    def step(self) -> None:
        self.waiting.sort(key=lambda entry: entry[:2])
        while self.waiting and len(self.running) < self.slots:
            _, _, name, permit = self.waiting.pop(0)
            permit.began()
            self.running.append((20, name, permit))
            self.served[name] = self.served.get(name, 0) + 10 * PROMPT_COST
        still = []
        for tokens, name, permit in self.running:
            self.served[name] += ANSWER_COST
            if tokens > 1:
                still.append((tokens - 1, name, permit))
            else:
                permit.leave(10, 20, 1)
        self.running = still


@in_loop
async def test_shares_are_fair_over_replicas(tmp_path: Path, valkey: Server) -> None:
    """One user at both servers, and one at each: a third of all for each of the three."""
    file = users_file(tmp_path / "keys", left={}, right={}, both={})
    async with replicas(2, file, valkey) as fleet_:
        engines = [Engine(controller) for controller in fleet_]
        for _ in range(600):
            for engine, name in zip(engines, ("left", "right"), strict=True):
                await engine.keep_busy(name)
                await engine.keep_busy("both")
                engine.step()
        served = {
            name: sum(engine.served.get(name, 0) for engine in engines)
            for name in ("left", "right", "both")
        }
        total = sum(served.values())
        assert [part / total for part in served.values()] == pytest.approx([1 / 3] * 3, rel=0.12)


@in_loop
async def test_what_was_served_elsewhere_locks_nobody_out(tmp_path: Path, valkey: Server) -> None:
    """Who had a server to itself comes to another: behind those who wait there, and no further."""
    file = users_file(tmp_path / "keys", guest={}, local={})
    async with replicas(2, file, valkey) as fleet_:
        first, second = (Engine(controller) for controller in fleet_)
        for _ in range(600):
            await first.keep_busy("guest")
            first.step()
        for _ in range(40):
            await second.keep_busy("local")
            second.step()
        await second.keep_busy("guest", 1)
        for _ in range(60):
            await second.keep_busy("local")
            second.step()
        assert second.served["guest"] > 0


# --- what goes wrong --------------------------------------------------------------------------


async def settled(fleet_: list[FleetController], number: int | None = None) -> None:
    """All know of each other, and wait for nobody any more."""
    await until(lambda: all(r._line.open and r._clock() > r._hold_until for r in fleet_))
    await until(lambda: all(r._replicas == (number or len(fleet_)) for r in fleet_))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of a second where a fleet has several."""
    monkeypatch.setattr(line, "LEASE", 1.0)
    monkeypatch.setattr(line, "_BEAT", 0.2)
    monkeypatch.setattr(line, "_PAUSES", (0.05, 0.2))
    monkeypatch.setattr(fleet, "_HOLD_SECONDS", 0.6)


@in_loop
async def test_away_each_gives_its_part(tmp_path: Path, short: None) -> None:
    """Valkey killed and started anew, empty: a third each of what was left, and back again."""
    file = users_file(tmp_path / "k", a={"requests_per_minute": 12}, b={"concurrent_requests": 6})
    with valkey_server() as server:
        async with replicas(3, file, server) as fleet_:
            told: list[tuple[bool, int]] = []
            fleet_[0].on_accounts = lambda reachable, number: told.append((reachable, number))
            begun = time.monotonic()
            permits, _ = await try_all(fleet_, "a", 1)
            admitted = len(permits)
            assert admitted == 3
            server.kill()
            await until(lambda: not any(replica._line.open for replica in fleet_))
            assert told[-1] == (False, 3)
            permits, codes = await try_all(fleet_, "b", 5)
            assert len(permits) == 6
            assert set(codes) == {"concurrent_requests"}
            permits_of_a, _ = await try_all(fleet_, "a", 2)
            admitted += len(permits_of_a)
            assert len(permits_of_a) == 6
            server.start()
            await settled(fleet_)
            assert told[-1] == (True, 3)
            # Of the three that were left, and what has come since; all of six are still held.
            permits_of_a, _ = await try_all(fleet_, "a", 10)
            admitted += len(permits_of_a)
            assert admitted <= 12 + (time.monotonic() - begun) * 12 / 60
            assert admitted >= 12
            assert not (await try_all(fleet_, "b", 1))[0]
            give_back(permits)
            assert len((await try_all(fleet_, "b", 5))[0]) == 6


@in_loop
async def test_a_flood_through_kills_and_flushes(tmp_path: Path, short: None) -> None:
    """From all sides, while Valkey is flushed, killed and started: never more than the limit."""
    file = users_file(tmp_path / "keys", a={"requests_per_minute": 600})
    with valkey_server() as server:
        async with replicas(3, file, server) as fleet_:
            admitted, over = 0, False

            async def flood(controller: FleetController) -> None:
                nonlocal admitted
                while not over:
                    try:
                        permit = await controller.admit("a")
                    except RateLimited:
                        await asyncio.sleep(0.01)
                    else:
                        admitted += 1
                        permit.leave(0, 0, 0)

            begun = time.monotonic()
            floods = [asyncio.create_task(flood(replica)) for replica in fleet_ * 2]
            await asyncio.sleep(0.5)
            server.ask("FLUSHALL")
            await asyncio.sleep(0.3)
            server.kill()
            await asyncio.sleep(0.5)
            server.start()
            await asyncio.sleep(0.3)
            server.ask("SCRIPT", "FLUSH")
            await settled(fleet_)
            await asyncio.sleep(0.3)
            over = True
            await asyncio.gather(*floods)
            allowed = 600 * (1 + (time.monotonic() - begun) / 60)
            assert admitted <= allowed + 3
            assert admitted >= 0.9 * allowed  # nor were they locked out


@in_loop
async def test_a_valkey_that_stands_still_is_waited_for_once(tmp_path: Path, short: None) -> None:
    """It answers nothing: who asks is decided here, and later ones do not ask it at all."""
    file = users_file(tmp_path / "keys", a={"concurrent_requests": 4})
    with valkey_server() as server:
        async with replicas(2, file, server) as fleet_:
            server.signal(signal.SIGSTOP)
            permits, _ = await try_all(fleet_, "a", 3)
            assert len(permits) == 4  # while it stands still
            assert not any(replica._line.open for replica in fleet_)
            assert not (await try_all(fleet_, "a", 1))[0]
            give_back(permits)
            tasks = [asyncio.create_task(replica.admit("a")) for replica in fleet_]
            for _ in range(3):
                await asyncio.sleep(0)
            assert all(task.done() for task in tasks)  # without a moment for anybody to answer
            give_back([task.result() for task in tasks])
            await asyncio.sleep(1.5)  # longer than a lease
            server.signal(signal.SIGCONT)
            await settled(fleet_)
            assert len((await try_all(fleet_, "a", 4))[0]) == 4


@in_loop
async def test_a_slow_valkey_counts_as_none(tmp_path: Path, short: None) -> None:
    """What it says too late is not waited for, and changes nothing afterwards."""
    file = users_file(tmp_path / "keys", a={"concurrent_requests": 4, "requests_per_minute": 60})
    with valkey_server() as server:
        async with replicas(1, file, server) as [one]:
            sleeping = asyncio.create_task(asyncio.to_thread(server.ask, "DEBUG", "SLEEP", "0.5"))
            await asyncio.sleep(0.1)
            permit = await one.admit("a")
            assert not sleeping.done()
            assert not one._line.open
            await sleeping
            await settled([one])
            assert user(server, "a")[f"#{one._line._replica}"] == "1"
            permit.leave(0, 0, 0)
            assert len((await try_all([one], "a", 9))[0]) == 4


@in_loop
async def test_permits_of_the_dead_come_free(
    tmp_path: Path, valkey: Server, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the lease has run out, and not before; who leaves in order gives them back at once."""
    file = users_file(tmp_path / "keys", a={"concurrent_requests": 4})
    async with replicas(1, file, valkey) as [one]:
        async with beside(one, file, valkey) as two:
            assert len((await try_all([two], "a", 3))[0]) == 3
            assert len((await try_all([one], "a", 4))[0]) == 1
            # What a process that is killed does not do any more.
            monkeypatch.setattr(two._line, "_renew", lambda stop: None)
        await until(lambda: not valkey.ask("ZSCORE", line.REPLICAS, two._line._replica))
        assert len((await try_all([one], "a", 4))[0]) == 3


@asynccontextmanager
async def beside(
    one: FleetController, file: Path, server: Server
) -> AsyncIterator[FleetController]:
    """Another beside `one`."""
    two = FleetController(file, server.url, max_requests=100, max_queue_seconds=1e9)
    two.start()
    await settled([one, two])
    try:
        yield two
    finally:
        await two.close()


@in_loop
async def test_a_standing_event_loop_loses_no_permit(
    tmp_path: Path, valkey: Server, short: None
) -> None:
    """The lease is renewed while the loop does nothing for three of its times."""
    file = users_file(tmp_path / "keys", a={"concurrent_requests": 2})
    async with replicas(2, file, valkey) as fleet_:
        names = {replica._line._replica for replica in fleet_}
        assert len((await try_all(fleet_, "a", 1))[0]) == 2
        time.sleep(3 * line.LEASE)  # noqa: ASYNC251  # that is the point
        assert set(valkey.ask("ZRANGE", line.REPLICAS, "0", "-1")) == names
        assert not (await try_all(fleet_, "a", 1))[0]
        assert {replica._line._replica for replica in fleet_} == names


@in_loop
async def test_what_is_lost_is_told_again_with_the_next_beat(
    tmp_path: Path, valkey: Server, short: None
) -> None:
    """A user that Valkey has forgotten is known again, with all that it holds everywhere."""
    file = users_file(tmp_path / "keys", a={"concurrent_requests": 5})
    async with replicas(2, file, valkey) as fleet_:
        assert len((await try_all(fleet_, "a", 4))[0]) == 5
        valkey.ask("DEL", line.user_key("a"))
        await until(
            lambda: sum(int(v) for k, v in user(valkey, "a").items() if k.startswith("#")) == 5
        )
        assert not (await try_all(fleet_, "a", 1))[0]


@in_loop
async def test_all_of_it_ends(tmp_path: Path, valkey: Server) -> None:
    """Every key has a time to live, whatever was done."""
    file = users_file(tmp_path / "keys", a={"tokens_per_minute": 10})
    async with replicas(1, file, valkey) as [one]:
        permit = await one.admit("a")
        await permit.claim(5000, 5000, 1)
        permit.leave(5000, 5000, 1)
        await until(lambda: not one._line._under_way and not one._line._waiting)
        keys = valkey.ask("KEYS", "*")
        assert set(keys) == {line.REPLICAS, line.FLEET, line.user_key("a")}
        assert all(valkey.ask("TTL", key) > 0 for key in keys)
        # It is remembered until its debt is paid: 10,000 tokens at ten a minute.
        assert valkey.ask("TTL", line.user_key("a")) > 1000 * 60
        assert math.isclose(float(user(valkey, "a")["tokens_per_minute"]), -9990, abs_tol=1)


@in_loop
async def test_a_password_and_a_cluster(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A server that asks for a password, in cluster mode; a wrong one is nowhere to be read."""
    caplog.set_level(logging.DEBUG)
    file = users_file(tmp_path / "keys", a={"concurrent_requests": 2})
    bounds: dict[str, Any] = {"max_requests": 9, "max_queue_seconds": 1e9}
    nodes = str(tmp_path / "nodes.conf")
    # Of its own it would take a port 10,000 higher, and there may be no such port.
    bus = ("--cluster-port", str(free_port()))
    options = ("--cluster-enabled", "yes", "--cluster-config-file", nodes, *bus)
    with valkey_server(*options) as server:
        server.ask("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
        await until(lambda: "cluster_state:ok" in str(server.ask("CLUSTER", "INFO")))
        server.ask("ACL", "SETUSER", "synthia", "on", ">open:sesame", *RIGHTS.split())
        place = f"127.0.0.1:{server.port}/0"
        wrong = FleetController(file, f"valkey://synthia:sesame@{place}", **bounds)
        right = FleetController(file, f"valkey://synthia:open%3Asesame@{place}", **bounds)
        for controller in (wrong, right):
            controller.start()
        await right.may_serve()
        await until(lambda: wrong._reachable is False)
        assert len((await try_all([right], "a", 5))[0]) == 2
        assert len((await try_all([wrong], "a", 5))[0]) == 2
        for controller in (wrong, right):
            await controller.close()
    assert place in caplog.text
    assert "sesame" not in caplog.text


@in_loop
async def test_tls(tmp_path: Path, valkey: Server) -> None:
    """`valkeys://` goes through TLS, to who has a certificate for that host of that authority."""
    file = users_file(tmp_path / "keys", a={"concurrent_requests": 2})
    bounds: dict[str, Any] = {"max_requests": 9, "max_queue_seconds": 1e9}
    for host in ("localhost", "elsewhere"):
        certificate, key = certified(tmp_path, host)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate, key)
        door = await asyncio.start_server(partial(pass_on, valkey), "localhost", 0, ssl=context)
        port = door.sockets[0].getsockname()[1]
        url = f"valkeys://localhost:{port}/0?ssl_ca_certs={certificate}"
        controller = FleetController(file, url, **bounds)
        controller.start()
        if host == "localhost":
            await until(lambda: controller._line.open)  # noqa: B023  # it is at once
        else:
            await until(lambda: controller._reachable is False)  # noqa: B023
        assert len((await try_all([controller], "a", 3))[0]) == 2
        assert bool(user(valkey, "a")) is (host == "localhost")
        await controller.close()
        valkey.ask("FLUSHALL")
        door.close()


def certified(place: Path, host: str) -> tuple[Path, Path]:
    """A certificate for `host`, by its own authority, and its key."""
    certificate, key = place / f"{host}.pem", place / f"{host}.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-days", "2", "-subj", f"/CN={host}", "-addext", f"subjectAltName=DNS:{host}",
         "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, key


async def pass_on(
    server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """To the Valkey behind, and back."""
    there, to_there = await asyncio.open_connection("127.0.0.1", server.port)

    async def pipe(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            target.write(data)
            await target.drain()
        target.close()

    await asyncio.gather(pipe(reader, to_there), pipe(there, writer), return_exceptions=True)
