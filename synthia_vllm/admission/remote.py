"""What several API processes share: the places and limits of users hold over all of them.

One process keeps the accounts (`AdmissionController`), with an `AdmissionServer` for each API
process, which has an `AdmissionClient`. A message is a line of JSON, a list. An API process sends
these; ``number`` is its own for the request, the first two are answered, with that number:

    ["enter", number, user]                     "said", number, null | "refused"
    ["claim", number, prompt, max_tokens, n]    "said", number, priority | "refused"
    ["began", number]
    ["leave", number, prompt, answer, finished]
    ["batch", size]                             the engine is ready, and runs so many at a time
    ["runs", ids]                               the engine has taken a request, under these ids
    ["ran", ids]                                and is done with it
    ["watch"]                                   it wants to know how many places are taken

It is told of these by ``["load", places]``, and, unasked, to ``["serve"]``, now that all others
can, to ``["reload"]`` the key file, to ``["accounts", reachable, replicas]`` where other servers
have the same, and to ``["abort", ids]`` in the engine what a process that died has left there. A
process that is gone gives back all it had.
"""

from __future__ import annotations

import asyncio
import itertools
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Final

from pydantic_core import from_json, to_json

from synthia_vllm.admission.permits import AdmissionController, AdmissionPermit
from synthia_vllm.admission.users import User, Users
from synthia_vllm.errors import ApiError, RateLimited, StartupError, Unauthorized, Unavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from pathlib import Path

_REFUSALS: Final[dict[str, Callable[[str, Any], ApiError]]] = {
    "RateLimited": lambda message, more: RateLimited(message, **more),
    "Unavailable": lambda message, more: Unavailable(message, **more),
    "Unauthorized": lambda _message, _more: Unauthorized(),
}


class _Line(asyncio.Protocol, ABC):
    """Sends and takes messages; what is sent in one round of the event loop goes out together."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._unsent: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # of a socket, it is one

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self.take(from_json(line))

    @abstractmethod
    def take(self, message: list[Any]) -> None:
        """The other side sent `message`."""

    def tell(self, *message: object) -> None:
        """Send `message`; who is gone need not know."""
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._send)
        self._unsent.append(to_json(message) + b"\n")

    def _send(self) -> None:
        unsent, self._unsent = self._unsent, []
        if self._transport is not None:
            self._transport.write(b"".join(unsent))


class AdmissionServer(_Line):
    """Where the accounts of `admission` are kept for one API process.

    `on_batch` is called with the size of the engine's batch, once the process can serve; `on_gone`
    with the engine's ids of what it ran, when it is gone.
    """

    def __init__(
        self,
        admission: AdmissionController,
        *,
        on_batch: Callable[[int], None],
        on_gone: Callable[[list[str]], None],
    ) -> None:
        super().__init__()
        self._admission = admission
        self._on_batch = on_batch
        self._on_gone = on_gone
        self._permits: dict[int, AdmissionPermit | None] = {}
        """None for a request that is not let in yet."""
        self._deciding: set[asyncio.Task[None]] = set()
        self._unwatch: Callable[[], None] = lambda: None
        self._runs: dict[str, None] = {}

    def take(self, message: list[Any]) -> None:
        match message:
            case ["enter", number, name]:
                self._permits[number] = None
                self._answer(number, name, self._enter(number, name))
            case ["claim", number, *numbers]:
                permit = self._permit(number)
                self._answer(number, permit.name, permit._claim(*numbers))
            case ["began", number]:
                self._permit(number).began()
            case ["leave", number, *counts]:
                gone = self._permits.pop(number, None)
                if gone is not None:
                    gone.leave(*counts)
            case ["runs", ids]:
                self._runs.update(dict.fromkeys(ids))
            case ["ran", ids]:
                for run in ids:
                    del self._runs[run]
            case ["batch", size]:
                self._on_batch(size)
            case ["watch"]:
                self._unwatch()
                self._unwatch = self._admission.watch(lambda places: self.tell("load", places))
            case _:
                raise ValueError(message)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch()
        for permit in self._permits.values():
            if permit is not None:
                permit.leave(0, 0, 0)
        self._permits.clear()
        self._on_gone(list(self._runs))

    async def _enter(self, number: int, name: str) -> None:
        try:
            permit = await self._admission.admit(name)
        except ApiError:
            self._permits.pop(number, None)
            raise
        if number in self._permits:
            self._permits[number] = permit
        else:  # it has left meanwhile
            permit.leave(0, 0, 0)

    def _permit(self, number: int) -> AdmissionPermit:
        permit = self._permits[number]
        if permit is None:
            raise ValueError(number)
        return permit

    def _answer(self, number: int, name: str, deciding: Coroutine[Any, Any, int | None]) -> None:
        async def answer() -> None:
            try:
                said: list[Any] = ["said", number, await deciding]
            except ApiError as error:
                more = {"code": error.code, "retry_after": error.retry_after}
                said = ["refused", number, type(error).__name__, error.message, more]
            headers = self._admission.headers(name)
            self.tell(*said, [(str(k, "ascii"), str(v, "ascii")) for k, v in headers])

        task = asyncio.create_task(answer())
        self._deciding.add(task)
        task.add_done_callback(self._deciding.discard)


class AdmissionClient(Users, _Line):
    """The users as an API process sees them: it knows their keys, and asks for all else."""

    def __init__(
        self, file: Path | None, *, max_requests: int, cache_secret: bytes | None = None
    ) -> None:
        _Line.__init__(self)
        Users.__init__(self, file, cache_secret)
        self._max_requests = max_requests
        self.on_abort: Callable[[list[str]], Awaitable[None]] | None = None
        """Frees what another process has left in the engine, by its ids there."""
        self.on_bad_keys: Callable[[], None] = lambda: None
        """Counts a key file that could not be used; who keeps the accounts has logged it."""
        self._abort: asyncio.Future[None] | None = None
        self._may_serve = asyncio.Event()
        self._numbers = itertools.count()
        self._asked: dict[int, tuple[str, asyncio.Future[Any]]] = {}
        self._headers: dict[str, list[tuple[bytes, bytes]]] = {}
        self._on_load: Callable[[int], None] = lambda _places: None
        self.on_accounts: Callable[[bool, int], None] = lambda _reachable, _replicas: None
        """As `AdmissionController.on_accounts`."""

    def reload(self, *, only_if_changed: bool = False) -> bool:
        """Read the key file, but only when told: who keeps the accounts looks at it for all."""
        return not only_if_changed and super().reload()

    async def admit(self, name: str) -> RemotePermit:
        """As `AdmissionController.admit`."""
        permit = RemotePermit(self, next(self._numbers), name, self.user(name), self._max_requests)
        try:
            await self.ask(permit, "enter", name)
        except asyncio.CancelledError:
            permit.leave(0, 0, 0)
            raise
        return permit

    def start(self) -> None:
        """As `AdmissionController.start`: who keeps the accounts does it."""

    async def close(self) -> None:
        """As `AdmissionController.close`."""

    def set_batch(self, size: int) -> None:
        """As `AdmissionController.set_batch`; it also says that this process can serve."""
        self.tell("batch", size)

    async def may_serve(self) -> None:
        """Return when all API processes can: a client that one of them has called meets any."""
        await self._may_serve.wait()

    def watch(self, tell: Callable[[int], None]) -> Callable[[], None]:
        """As `AdmissionController.watch`, for one at most."""
        self._on_load = tell
        self.tell("watch")
        return lambda: None

    def headers(self, name: str) -> list[tuple[bytes, bytes]]:
        """As `AdmissionController.headers`, as it was told last."""
        return self._headers.get(name, [])

    async def ask(self, permit: RemotePermit, message: str, *more: object) -> Any:
        """Send `message` on behalf of `permit`, and return the answer, or raise it."""
        if self._transport is None:
            raise Unavailable("The server is shutting down.", code="draining")
        answer = asyncio.get_running_loop().create_future()
        self._asked[permit.number] = permit.name, answer
        self.tell(message, permit.number, *more)
        return await answer

    def take(self, message: list[Any]) -> None:
        match message:
            case ["said", number, value, headers]:
                self._settle(number, headers, value, None)
            case ["refused", number, kind, text, more, headers]:
                self._settle(number, headers, None, _REFUSALS[kind](text, more))
            case ["accounts", reachable, replicas]:
                self.on_accounts(reachable, replicas)
            case ["load", places]:
                self._on_load(places)
            case ["serve"]:
                self._may_serve.set()
            case ["reload"]:
                try:
                    super().reload()
                except StartupError:
                    self.on_bad_keys()
            case ["abort", ids]:
                if self.on_abort is not None:
                    self._abort = asyncio.ensure_future(self.on_abort(ids))
            case _:
                raise ValueError(message)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for number in list(self._asked):
            closing = Unavailable("The server is shutting down.", code="draining")
            self._settle(number, [], None, closing)

    def _settle(self, number: int, headers: list[Any], value: Any, error: ApiError | None) -> None:
        name, answer = self._asked.pop(number)
        self._headers[name] = [(key.encode(), text.encode()) for key, text in headers]
        if answer.done():  # the client has left meanwhile
            return
        if error is None:
            answer.set_result(value)
        else:
            answer.set_exception(error)


class RemotePermit(AdmissionPermit):
    """A permit of the `AdmissionController` in the supervisor's process."""

    __slots__ = ("_client", "number")

    def __init__(
        self, client: AdmissionClient, number: int, name: str, user: User, max_requests: int
    ) -> None:
        super().__init__(client, name, user, max_requests)
        self._client = client
        self.number = number

    async def _claim(self, prompt_tokens: int, max_tokens: int, n: int) -> int:
        priority: int = await self._client.ask(self, "claim", prompt_tokens, max_tokens, n)
        return priority

    def began(self) -> None:
        self._client.tell("began", self.number)

    def leave(self, prompt_tokens: int, answer_tokens: int, finished: int) -> None:
        self._client.tell("leave", self.number, prompt_tokens, answer_tokens, finished)
