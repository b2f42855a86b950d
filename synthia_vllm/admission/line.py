"""The line to Valkey: one connection, scripts in the order they were sent, and a bound on waiting.

What is sent while answers are under way goes out together when they have come. So nothing is on its
way when the table of all that is held is sent, and the table is exact.

The lease by which others know that this replica lives is renewed from a thread of its own: an event
loop that stands still loses nobody's permits.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import valkey
from valkey.asyncio.connection import Connection, parse_url

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

BOUND: Final = 0.05
"""Seconds that a decision may wait."""
LEASE: Final = 6.0
"""Seconds after which a replica that says nothing is taken for dead."""
_BEAT: Final = 1.0
_LATE: Final = 0.01  # an event loop that wakes later than this has not read what has come
_CONNECT_SECONDS: Final = 1.0
_TRIES: Final = 5
_PAUSES: Final = (0.1, 2.0)  # between two tries, at first and at last

# One slot for all, so that a server in cluster mode has them together.
_PREFIX: Final = "{synthia}:"
REPLICAS: Final = _PREFIX + "replicas"
FLEET: Final = _PREFIX + "fleet"

Script = Literal["move", "sync"]
Word = str | int | float


def user_key(name: str) -> str:
    """Where the account of user `name` is kept."""
    return f"{_PREFIX}user:{name}"


class Table(NamedTuple):
    """What a replica tells of its users: keys, and arguments as `sync.lua` wants them."""

    keys: list[str]
    arguments: list[Word]


@dataclass(slots=True)
class _Command:
    words: tuple[Word, ...]
    answered: Callable[[str | None], None]
    at: float


@cache
def source(script: Script) -> str:
    """What Valkey runs."""
    return (resources.files(__package__) / f"{script}.lua").read_text()


@cache
def _digest(script: Script) -> str:
    return hashlib.sha1(source(script).encode(), usedforsecurity=False).hexdigest()


def _pack(words: tuple[Word, ...]) -> bytes:
    """A command as it is sent. The library's own way is a third of what a request costs."""
    parts = [b"*%d\r\n" % len(words)]
    for word in words:
        encoded = str(word).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(encoded), encoded))
    return b"".join(parts)


def evaluation(script: Script, keys: list[str], arguments: list[Word]) -> tuple[Word, ...]:
    """The command that runs `script`."""
    return ("EVALSHA", _digest(script), len(keys), *keys, *arguments)


class Line:
    """A line to the Valkey at `url`, kept up by `run`.

    `table` gives all that is held here; with ``joining``, also what was used while the line was
    not open. `opened` is called with the number of live replicas when that has been taken, `beaten`
    once a second, and `closed` with the reason, if there is one, when the line is not open.
    """

    def __init__(
        self,
        url: str,
        *,
        table: Callable[[bool], Table],
        opened: Callable[[int], None],
        beaten: Callable[[int], None],
        closed: Callable[[str], None],
    ) -> None:
        if url.startswith(("valkeys:", "rediss:")) and "ssl_check_hostname" not in url:
            url += f"{'&' if '?' in url else '?'}ssl_check_hostname=true"
        self._url = url
        self._table = table
        self._opened = opened
        self._beaten = beaten
        self._closed = closed
        self._name = secrets.token_hex(8)
        self._joined = 0
        self._fleet = ""
        self._pause = _PAUSES[0]
        self._waiting: list[_Command] = []
        self._under_way: list[_Command] = []
        self._wanted = asyncio.Event()
        self.open = False
        """Whether `move` may be called."""
        self.was_open = asyncio.Event()

    def move(
        self, user: str, arguments: list[Word], answered: Callable[[str | None], None]
    ) -> None:
        """Have `move.lua` run on the key `user`, after all that was sent before.

        `answered` is given what it says, or `None` if that is not known in time.
        """
        words = evaluation("move", [REPLICAS, user], [self._replica, *arguments])
        self._waiting.append(_Command(words, answered, time.monotonic()))
        self._wanted.set()

    async def run(self) -> None:
        """Keep the line open, until this task is cancelled."""
        stop = threading.Event()
        thread = threading.Thread(target=self._renew, args=(stop,), name="lease", daemon=True)
        thread.start()
        try:
            while True:
                try:
                    await self._session()
                except (valkey.ValkeyError, OSError, TimeoutError, ValueError) as error:
                    self._close(str(error) or "it is too slow")
                await asyncio.sleep(self._pause)
                self._pause = min(2 * self._pause, _PAUSES[1])
        finally:
            stop.set()
            self._close("")
            await asyncio.to_thread(thread.join)

    @property
    def _replica(self) -> str:
        # Another name with each connection: what an old one has still on its way counts no more.
        return f"{self._name}.{self._joined}"

    async def _session(self) -> None:
        options: dict[str, Any] = parse_url(self._url)
        kind = options.pop("connection_class", Connection)
        connection = kind(**options | {"socket_timeout": None, "decode_responses": True})
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                await connection.connect()
                for script in ("move", "sync"):
                    await self._ask(connection, ("SCRIPT", "LOAD", source(script)))
                await self._require_fast(connection)
            await self._join(connection)
            await self._serve(connection)
        finally:
            await connection.disconnect(nowait=True)

    async def _require_fast(self, connection: Connection) -> None:
        """Raise `TimeoutError` unless it answers in half the time that there is.

        Once of a few times: at a server's start it is the event loop that is slow.
        """
        for _ in range(_TRIES):
            asked = time.monotonic()
            await self._ask(connection, ("PING",))
            if time.monotonic() - asked < BOUND / 2:
                return
        raise TimeoutError

    async def _join(self, connection: Connection) -> None:
        """Say what is held here; from now on what is asked waits for this."""
        self._joined += 1
        words = self._sync("joins", self._table(True))
        self.open = True
        async with asyncio.timeout(BOUND):
            said = await self._ask(connection, words)
        self._fleet, count = said.split()
        self._opened(int(count))
        self.was_open.set()

    async def _serve(self, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        beat = loop.time() + _BEAT
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(beat):
                    await self._wanted.wait()
            self._wanted.clear()
            self._under_way, self._waiting = self._waiting, []
            if loop.time() >= beat:
                beat = loop.time() + _BEAT
                words = self._sync("", self._table(False))
                at = self._under_way[0].at if self._under_way else time.monotonic()
                self._under_way.insert(0, _Command(words, self._note_beat, at))
            if self._under_way:
                await self._exchange(connection)

    async def _exchange(self, connection: Connection) -> None:
        """Send what is under way, and pass on what is said to it."""
        loop, commands = asyncio.get_running_loop(), self._under_way
        deadline = commands[0].at + BOUND
        async with asyncio.timeout(None) as limit:

            def overdue() -> None:
                late = time.monotonic() - deadline > _LATE
                limit.reschedule(loop.time() + (_LATE if late else 0.0))

            timer = loop.call_later(max(0.0, deadline - time.monotonic()), overdue)
            try:
                packed = b"".join([_pack(command.words) for command in commands])
                await connection.send_packed_command(packed, check_health=False)
                for number, command in enumerate(commands):
                    said = await self._read(connection)
                    self._under_way = commands[number + 1 :]
                    command.answered(said)
            finally:
                timer.cancel()

    def _sync(self, joins: str, table: Table) -> tuple[Word, ...]:
        head: list[Word] = [self._replica, joins, self._fleet, LEASE]
        return evaluation("sync", [REPLICAS, FLEET, *table.keys], head + table.arguments)

    async def _ask(self, connection: Connection, words: tuple[Word, ...]) -> str:
        await connection.send_packed_command(_pack(words), check_health=False)
        return await self._read(connection)

    async def _read(self, connection: Connection) -> str:
        try:
            said: str = await connection.read_response()
        except valkey.exceptions.NoScriptError:
            said = "lost"
        if said == "lost":
            raise valkey.ValkeyError("it was flushed or started anew")
        return said

    def _note_beat(self, said: str | None) -> None:
        if said is not None:
            self._pause = _PAUSES[0]
            self._beaten(int(said.split()[1]))

    def _close(self, reason: str) -> None:
        """Whoever waits decides by itself, in the order that was asked."""
        self.open = False
        commands, self._under_way, self._waiting = self._under_way + self._waiting, [], []
        self._closed(reason)
        for command in commands:
            command.answered(None)

    def _renew(self, stop: threading.Event) -> None:
        """Say again and again that this replica lives."""
        client = valkey.Valkey.from_url(self._url, socket_timeout=_CONNECT_SECONDS)
        while not stop.wait(LEASE / 4):
            if self.open:
                with suppress(valkey.ValkeyError, OSError):  # the line itself will tell
                    client.execute_command(  # type: ignore[no-untyped-call]
                        *self._sync("", Table([], []))
                    )
        with suppress(valkey.ValkeyError, OSError):
            client.zrem(REPLICAS, self._replica)  # what was held here is free
        client.close()  # type: ignore[no-untyped-call]
