"""Which requests are taken: a permit for each, which lives as long as the request does.

Everything here runs on the event loop, costs microseconds, and never waits: a request that cannot
be had now is refused at once, with the time after which it can.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from synthia_vllm.admission.fair_share import FairShare, Position, Share
from synthia_vllm.admission.rate_limit import RateLimiter, RetryAfterEstimator
from synthia_vllm.admission.users import User, Users
from synthia_vllm.errors import RateLimited, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# While the server fills up, one user may hold this many times the places still free: alone it gets
# four fifths of them, and whoever comes next always finds some.
_SHARE_OF_FREE: Final = 4
# A priority after that of all requests: their stamps are counts of tokens.
_LAST: Final = 1 << 62


class AdmissionPermit(ABC):
    """Lets one request be in the server, and speaks for its user."""

    __slots__ = ("_max_requests", "_users", "name", "user")

    def __init__(self, users: Users, name: str, user: User, max_requests: int) -> None:
        self._users = users
        self._max_requests = max_requests
        self.name = name
        self.user = user

    def cache_salt(self, own: str | None) -> str | None:
        """As `Users.cache_salt`."""
        return self._users.cache_salt(self.name, own)

    async def claim(self, prompt_tokens: int, max_tokens: int, n: int) -> int:
        """Claim the tokens this request may take; return its priority, smallest first.

        Raises `InvalidRequest` for what can never be had, and `RateLimited` or `Unavailable` for
        what cannot now; the request then counts as never made.
        """
        self.user.require_answers(n, self._max_requests)
        return await self._claim(prompt_tokens, max_tokens, n)

    @abstractmethod
    async def _claim(self, prompt_tokens: int, max_tokens: int, n: int) -> int: ...

    @abstractmethod
    def began(self) -> None:
        """The engine has begun this request."""

    @abstractmethod
    def leave(self, prompt_tokens: int, answer_tokens: int, finished: int) -> None:
        """The request is over; the counts are of tokens that ran, and of answers that ended."""


class BatchPermit(AdmissionPermit):
    """Lets one line of a user's batch run: behind all others, and on places that nobody else has.

    Who runs batches sees to the places. Limits over time are not for them, those of a request are.
    """

    async def _claim(self, prompt_tokens: int, max_tokens: int, n: int) -> int:
        return _LAST

    def began(self) -> None:
        pass

    def leave(self, prompt_tokens: int, answer_tokens: int, finished: int) -> None:
        pass


@dataclass(slots=True)
class Account:
    """What the server knows of one user from its requests so far."""

    share: Share
    in_flight: int = 0
    elsewhere: int = 0
    """Places that the user held at other replicas, when they were last asked."""
    rates: RateLimiter = field(default_factory=RateLimiter)
    retry_after: RetryAfterEstimator = field(default_factory=RetryAfterEstimator)


class AdmissionController(Users):
    """All users, and the places of the server that they share.

    At most `max_requests` requests are in the server at a time; a user whose own would wait
    longer than `max_queue_seconds` is told to come back later.
    """

    def __init__(
        self,
        file: Path | None,
        *,
        max_requests: int,
        max_queue_seconds: float,
        cache_secret: bytes | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_requests = max_requests
        self._max_queue_seconds = max_queue_seconds
        self._clock = clock
        self._accounts: dict[str, Account] = {}
        self._fair_share = FairShare()
        self._retry_after = RetryAfterEstimator()
        self.in_flight = 0
        """Places taken."""
        self.on_accounts: Callable[[bool, int], None] = lambda _reachable, _replicas: None
        """Told whether others that share these accounts can be heard of, and how many there are."""
        self._watchers: list[Callable[[int], None]] = []
        self._batch = 1
        super().__init__(file, cache_secret)

    def reload(self, *, only_if_changed: bool = False) -> bool:
        read = super().reload(only_if_changed=only_if_changed)
        if read:
            for name in set(self._accounts).difference(self.names):
                if not self._accounts[name].in_flight:
                    del self._accounts[name]
                    self._fair_share.forget(name)
        return read

    async def admit(self, name: str) -> AdmissionPermit:
        """`enter`, in the form for those who have to wait for another process's word."""
        return self.enter(name)

    def enter(self, name: str) -> LocalPermit:
        """Take a place for a request of user `name`.

        Raises `RateLimited` or `Unavailable`, with the seconds to wait, and `Unauthorized`.
        """
        now = self._clock()
        user, account = self._account_of(name, now)
        account.rates.require("requests", 1, now)
        self._require_concurrent(account.in_flight + 1, user, account, now)
        self._require_places(1, account, now)
        account.rates.take("requests", 1, now)
        permit = LocalPermit(self, name, user, account)
        permit.occupy(1)
        return permit

    def set_batch(self, size: int) -> None:
        """The engine runs `size` requests at the same time; more than these wait."""
        self._batch = size

    def watch(self, tell: Callable[[int], None]) -> Callable[[], None]:
        """Tell how many places are taken, now and with each change, until what is returned is
        called.
        """
        self._watchers.append(tell)
        tell(self.in_flight)
        return lambda: self._watchers.remove(tell)

    def start(self) -> None:
        """Begin to share the accounts, where they are shared."""

    async def close(self) -> None:
        """End that."""

    async def may_serve(self) -> None:
        """Return when the server may take requests: at once, where it is one process."""

    def headers(self, name: str) -> list[tuple[bytes, bytes]]:
        """What is left of the limits of user `name`."""
        account = self._accounts.get(name)
        return account.rates.headers(self._clock()) if account is not None else []

    def _account_of(self, name: str, now: float) -> tuple[User, Account]:
        """User `name`, and what is known of it. Raises `Unauthorized`."""
        user = self.user(name)
        share = self._fair_share.share_of(name, user.weight)
        account = self._accounts.get(name)
        if account is None:
            account = self._accounts[name] = self._new_account(share)
        account.rates.configure(user.rates, now)
        return user, account

    def _new_account(self, share: Share) -> Account:
        return Account(share)

    def _require_concurrent(self, answers: int, user: User, account: Account, now: float) -> None:
        """Raise `RateLimited` if the user may not have `answers` in the making."""
        user.require_concurrent(answers, lambda: account.retry_after.wait(now, account.in_flight))

    def _require_places(self, places: int, account: Account, now: float) -> None:
        """Raise `RateLimited` for what is this user's doing, `Unavailable` for all others'."""
        free = self._max_requests - self.in_flight
        if free < (places if self.open else 1):
            raise Unavailable(
                "The server is full.",
                code="server_full",
                retry_after=self._retry_after.wait(now, self.in_flight),
            )
        # A door takes a 503 for a server that is gone: what is this user's alone is a 429.
        share = free if self.open else _SHARE_OF_FREE * free - account.in_flight
        if places > min(free, share):
            raise RateLimited(
                f"You hold {account.in_flight} of the {self.in_flight} places in use, and those "
                "that are left are for others, too.",
                code="share_used_up",
                retry_after=self._retry_after.wait(now, account.in_flight),
            )
        gap = self._retry_after.gap
        if self.in_flight < self._batch or gap is None:
            return
        # Requests of this user that wait, times the pace at which its turn comes. What is not
        # streamed is not seen to begin, but no more can wait than the batch does not hold.
        ahead = min(len(account.share.waiting), self.in_flight - self._batch)
        wait = ahead * gap * self._fair_share.crowd(account.share)
        if wait > self._max_queue_seconds:
            refusal = Unavailable if self.open else RateLimited
            raise refusal(
                f"You would wait about {wait:.0f} seconds for the first word; this server lets "
                f"nobody wait longer than {self._max_queue_seconds:g}.",
                code="queue_too_long",
                retry_after=max(1.0, wait - self._max_queue_seconds),
            )

    def _occupy(self, places: int) -> None:
        self.in_flight += places
        for tell in self._watchers:
            tell(self.in_flight)

    def _note_departure(self, user: User, account: Account) -> None:
        """A request of this user, which had its turn, is over."""
        now, allowed = self._clock(), user.concurrent_requests
        full = allowed is not None and account.in_flight + account.elsewhere >= allowed
        account.retry_after.note(now, full=full)
        self._retry_after.note(now, full=self.in_flight >= self._batch)


class LocalPermit(AdmissionPermit):
    """A permit of an `AdmissionController` in this process."""

    __slots__ = ("_account", "_controller", "_places", "_position", "_reserved")

    def __init__(
        self, controller: AdmissionController, name: str, user: User, account: Account
    ) -> None:
        super().__init__(controller, name, user, controller._max_requests)
        self._controller = controller
        self._account = account
        self._places = 0
        self._reserved = 0
        self._position: Position | None = None

    def occupy(self, places: int) -> None:
        """Take so many more of the server's places, or give them back."""
        self._places += places
        self._account.in_flight += places
        self._controller._occupy(places)

    async def _claim(self, prompt_tokens: int, max_tokens: int, n: int) -> int:
        return self.reserve(prompt_tokens, max_tokens, n)

    def reserve(self, prompt_tokens: int, max_tokens: int, n: int) -> int:
        """`claim`, in the form for those who need not wait."""
        controller, account = self._controller, self._account
        now = controller._clock()
        need = prompt_tokens + n * max_tokens
        try:
            account.rates.require("tokens", need, now)
            if n > 1:
                controller._require_concurrent(account.in_flight + n - 1, self.user, account, now)
                controller._require_places(n - 1, account, now)
        except (RateLimited, Unavailable):
            account.rates.take("requests", -1, now)
            raise
        self.occupy(n - 1)
        self._reserved = need
        account.rates.take("tokens", need, now)
        charged = controller._fair_share.expect(account.share, prompt_tokens, max_tokens, n)
        self._position = controller._fair_share.queue(account.share, charged)
        return self._priority()

    def _priority(self) -> int:
        return math.floor(self._position.stamp) if self._position is not None else _LAST

    def began(self) -> None:
        if self._position is not None:
            self._controller._fair_share.begin(self._position)

    def leave(self, prompt_tokens: int, answer_tokens: int, finished: int) -> None:
        controller, account = self._controller, self._account
        unused, correction = 0, 0.0
        if self._position is not None:
            correction = controller._fair_share.settle(self._position, prompt_tokens, answer_tokens)
            unused = self._reserved - prompt_tokens - answer_tokens
            controller._note_departure(self.user, account)
        if finished:
            share = account.share
            share.usual_answer += 0.1 * (answer_tokens / finished - share.usual_answer)
        self._give_back(unused, correction)
        self.occupy(-self._places)

    def _give_back(self, unused: int, correction: float) -> None:
        """The request is over: so many claimed tokens were not used, and so much more was served
        than the user was charged for its turn.
        """
        controller = self._controller
        self._account.rates.take("tokens", -unused, controller._clock())
