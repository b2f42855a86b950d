"""Limits that hold over replicas: what users may have is decided in Valkey, for all of them.

One round trip takes a request in, one claims its tokens, and none is waited for when it ends. What
is this replica's own (its places, and how long who would wait) is decided here, and before.

While Valkey cannot be asked, each user has its part here: the limits divided by the number of
replicas, with that part of what was left. What was used of it is told when Valkey is back; until
all others have told theirs, too, both have to agree.
"""

from __future__ import annotations

import asyncio
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from synthia_vllm.admission.line import Line, Table, user_key
from synthia_vllm.admission.permits import Account, AdmissionController, LocalPermit
from synthia_vllm.errors import RateLimited, Unavailable, without_password

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from synthia_vllm.admission.fair_share import Share
    from synthia_vllm.admission.limits import Counted
    from synthia_vllm.admission.line import Word
    from synthia_vllm.admission.permits import AdmissionPermit
    from synthia_vllm.admission.rate_limit import RateLimiter
    from synthia_vllm.admission.users import User

logger = logging.getLogger(__name__)

_HOLD_SECONDS: Final = 3.0  # after which all others are back, too: they try every two at least
_MOST_TOLD: Final = 1000  # users of whom nothing was used meanwhile: it has to be taken in time
_FIRST_SECONDS: Final = 2.0  # to hear of the others before anything is served


@dataclass(slots=True)
class _FleetAccount(Account):
    """An `Account`, whose `rates` are as Valkey has told them last."""

    held: int = 0
    """The places here that Valkey knows of."""
    part: RateLimiter | None = None
    """What the user may have here while Valkey cannot be asked."""
    uncharged: float = 0.0
    """What its counter in Valkey is still to be charged."""
    charged: float = 0.0
    """What that was charged from here, on this connection."""
    others: float | None = None
    """The rest of it, when last heard of on this connection."""


@dataclass(slots=True)
class _Question:
    """Whether `permit` may have what it needs, on its way."""

    permit: FleetPermit
    places: int
    counted: Counted
    need: int
    refund: int
    """Requests that are given back if it is refused."""
    charged: float
    granted: Callable[[], None]
    """Called if it may, even if nobody waits for the answer any more."""
    answer: asyncio.Future[None]
    part: RateLimiter | None = None
    """The user's part here, if it has been taken from that."""


class FleetController(AdmissionController):
    """An `AdmissionController` whose users have their limits over all replicas that ask the Valkey
    at `url`.
    """

    _accounts: dict[str, _FleetAccount]  # type: ignore[assignment]  # all that it makes

    def __init__(
        self,
        file: Path | None,
        url: str,
        *,
        max_requests: int,
        max_queue_seconds: float,
        cache_secret: bytes | None = None,
    ) -> None:
        super().__init__(
            file,
            max_requests=max_requests,
            max_queue_seconds=max_queue_seconds,
            cache_secret=cache_secret,
        )
        self._address = without_password(url)
        self._line = Line(
            url,
            table=self._table,
            opened=self._note_open,
            beaten=self._note_replicas,
            closed=self._note_closed,
        )
        self._replicas = 1
        self._hold_until = math.inf
        self._closed_at = -math.inf
        self._reachable: bool | None = None
        self._life: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._life = asyncio.create_task(self._line.run())

    async def close(self) -> None:
        if self._life is not None:
            self._life.cancel()
            await asyncio.wait((self._life,))

    async def may_serve(self) -> None:
        try:
            async with asyncio.timeout(_FIRST_SECONDS):
                await self._line.was_open.wait()
        except TimeoutError:
            logger.warning("No word of other replicas yet: limits are this server's own.")

    async def admit(self, name: str) -> AdmissionPermit:
        now = self._clock()
        user, account = self._account_of(name, now)
        self._require_places(1, account, now)
        permit = FleetPermit(self, name, user, self._accounts[name])
        await permit.enter()
        return permit

    def headers(self, name: str) -> list[tuple[bytes, bytes]]:
        account, now = self._accounts.get(name), self._clock()
        if account is None:
            return []
        return (self._part_of(account, now) or account.rates).headers(now)

    def _new_account(self, share: Share) -> Account:
        return _FleetAccount(share)

    def ask(
        self,
        permit: FleetPermit,
        counted: Counted,
        need: int,
        places: int,
        *,
        refund: int = 0,
        charged: float = 0.0,
        granted: Callable[[], None] = lambda: None,
    ) -> asyncio.Future[None]:
        """See `_Question`. The answer is nothing, or it raises `RateLimited`."""
        answer = asyncio.get_running_loop().create_future()
        asked = _Question(permit, places, counted, need, refund, charged, granted, answer)
        account, now = permit.account, self._clock()
        permit.occupy(places)
        permit.asking = True
        part = self._part_of(account, now)
        if part is not None:
            try:
                self._take_part(asked, part, now)
            except RateLimited as error:
                self.give_back(permit, requests=refund)
                self._end(asked, error)
                return answer
        if self._line.open:
            takes: dict[str, tuple[int, int, int]] = {"requests": (0, 0, -refund)}
            takes[counted] = (need, need, 0)
            self._move(permit, takes, places, charged, lambda said: self._decide(asked, said))
        else:
            self._decide(asked, None)
        return answer

    def give_back(
        self,
        permit: FleetPermit,
        *,
        requests: int = 0,
        tokens: int = 0,
        places: int = 0,
        correction: float = 0.0,
    ) -> None:
        """`permit` did not use so much, and its user is to be charged `correction` for its turn."""
        account, now = permit.account, self._clock()
        part = self._part_of(account, now)
        if part is not None:
            part.take("requests", -requests, now)
            part.take("tokens", -tokens, now)
        if not self._line.open:
            account.uncharged += correction
        elif requests or tokens or places or correction:
            account.rates.take("requests", -requests, now)
            account.rates.take("tokens", -tokens, now)
            takes = {"requests": (0, -requests, 0), "tokens": (0, -tokens, 0)}
            self._move(permit, takes, -places, correction, lambda _said: None)

    def _move(
        self,
        permit: FleetPermit,
        takes: dict[str, tuple[int, int, int]],
        places: int,
        charged: float,
        answered: Callable[[str | None], None],
    ) -> None:
        """Have `move.lua` run, and take note of what it says of the user."""
        account, rates = permit.account, permit.account.rates.rates
        most = permit.user.concurrent_requests or 0
        arguments: list[Word] = [places, most, charged]
        for rate in rates:
            need = takes.get(rate.counted, (0, 0, 0))
            arguments += (rate.name, rate.limit, rate.seconds, *need)

        def note(said: str | None) -> None:
            if said is None:
                answered(None)
                return
            verdict, elsewhere, counter, *levels = said.split()
            now = self._clock()
            account.elsewhere = int(elsewhere)
            if verdict == "taken":
                account.held += places
                account.charged += charged
            others = float(counter) - account.charged
            if account.others is not None:
                account.share.elsewhere += others - account.others
            account.others = others
            for rate, level in zip(rates, levels, strict=True):
                if rate in account.rates.buckets:
                    account.rates.buckets[rate].set(float(level), now)
            answered(verdict)

        self._line.move(user_key(permit.name), arguments, note)

    def _decide(self, asked: _Question, verdict: str | None) -> None:
        """Take note of Valkey's verdict; without one, decide by the user's part here."""
        permit, now = asked.permit, self._clock()
        account, part = permit.account, self._part_of(permit.account, now)
        refusal = None
        if verdict is None:
            try:
                if part is not None and part is not asked.part:
                    self._take_part(asked, part, now)
                account.uncharged += asked.charged
            except RateLimited as error:
                self.give_back(permit, requests=asked.refund)
                refusal = error
        elif verdict != "taken":
            if asked.part is not None:
                asked.part.take(asked.counted, -asked.need, now)
                asked.part.take("requests", -asked.refund, now)
            refusal = self._refusal(verdict, asked, now)
        self._end(asked, refusal)

    def _end(self, asked: _Question, refusal: RateLimited | None) -> None:
        permit, answer = asked.permit, asked.answer
        permit.asking = False
        if refusal is None:
            asked.granted()
        else:
            permit.occupy(-asked.places)
        if not answer.done():
            if refusal is None:
                answer.set_result(None)
            else:
                answer.set_exception(refusal)
        if permit.left is not None:
            permit.leave(*permit.left)

    def _refusal(self, verdict: str, asked: _Question, now: float) -> RateLimited:
        """What a user is told who cannot have what it needs for the reason `verdict`."""
        user, account = asked.permit.user, asked.permit.account
        for rate, bucket in account.rates.buckets.items():
            if rate.name == verdict:
                wait = bucket.wait(asked.need, now)
                return RateLimited(rate.refusal(asked.need), code=rate.name, retry_after=wait)
        return user.too_many(account.retry_after.wait(now, account.in_flight))

    def _take_part(self, asked: _Question, part: RateLimiter, now: float) -> None:
        """Take what is needed of a user's `part`, or raise `RateLimited`."""
        user, account = asked.permit.user, asked.permit.account
        part.require(asked.counted, asked.need, now)
        most = user.concurrent_requests
        if asked.places and most is not None:
            here = max(1, most // self._replicas)
            if now - self._closed_at < _HOLD_SECONDS:  # what others held a moment ago, they hold
                here = min(here, most - account.elsewhere)
            if account.in_flight > here:
                raise user.too_many(account.retry_after.wait(now, account.in_flight))
        part.take(asked.counted, asked.need, now)
        asked.part = part

    def _part_of(self, account: _FleetAccount, now: float) -> RateLimiter | None:
        """What the user may have here, if that counts now."""
        if now >= self._hold_until:
            account.part = None
        elif account.part is None or account.part.rates is not account.rates.rates:
            account.part = account.rates.part(self._replicas, now)
        return account.part

    def _table(self, joining: bool) -> Table:
        """All that is held here, as `sync.lua` wants it."""
        now = self._clock()
        keys: list[str] = []
        arguments: list[Word] = []
        for name, account in self._accounts.items():
            lines: list[tuple[Word, ...]] = []
            if joining:
                account.held = account.in_flight
                if account.part is not None or len(keys) < _MOST_TOLD:
                    lines = list(self._levels(account, now))
            if account.held or account.uncharged or lines:
                keys.append(user_key(name))
                arguments += [account.held, account.uncharged, len(lines)]
                arguments += [word for line in lines for word in line]
        return Table(keys, arguments)

    def _levels(self, account: _FleetAccount, now: float) -> Iterator[tuple[Word, ...]]:
        """Of each rate that says more than a new bucket: what it is, its level, what was used."""
        for rate, bucket in account.rates.buckets.items():
            level, used = bucket.level(now), 0.0
            if account.part is not None and rate in account.part.buckets:
                own = account.part.buckets[rate]
                used = level * own.limit / rate.limit - own.level(now)
            if used or level < rate.limit:
                yield rate.name, rate.limit, rate.seconds, level, used

    def _note_open(self, replicas: int) -> None:
        now = self._clock()
        # There is nothing to wait for where nothing was decided without the others.
        self._hold_until = now if self._reachable is None else now + _HOLD_SECONDS
        for account in self._accounts.values():
            account.charged = account.uncharged = 0.0
            account.others = None
            self._level_with_part(account, now)
        logger.info("Limits hold over all replicas, now %d, by %s.", replicas, self._address)
        self._reachable = True
        self._note_replicas(replicas)

    def _note_closed(self, reason: str) -> None:
        now = self._clock()
        if self._reachable:
            for account in self._accounts.values():
                if self._part_of(account, now) is not None:
                    self._level_with_part(account, now)
            self._closed_at = now
        self._hold_until = math.inf
        if reason and self._reachable is not False:
            logger.warning(
                "Limits are not shared while %s cannot be asked (%s): each replica, of %d, gives"
                " its part.",
                self._address,
                reason,
                self._replicas,
            )
        self._reachable = False
        self.on_accounts(False, self._replicas)

    def _level_with_part(self, account: _FleetAccount, now: float) -> None:
        """Take it that all other replicas have as much left as this one, until that is known."""
        if account.part is not None:
            for rate, own in account.part.buckets.items():
                if rate in account.rates.buckets:
                    level = own.level(now) * rate.limit / own.limit
                    account.rates.buckets[rate].set(level, now)

    def _note_replicas(self, replicas: int) -> None:
        # Those that are not back yet are there all the same.
        held = self._clock() < self._hold_until
        self._replicas = max(replicas, self._replicas) if held else replicas
        self.on_accounts(True, self._replicas)


class FleetPermit(LocalPermit):
    """A permit of a `FleetController`."""

    __slots__ = ("account", "asking", "left")

    _controller: FleetController

    def __init__(
        self, controller: FleetController, name: str, user: User, account: _FleetAccount
    ) -> None:
        super().__init__(controller, name, user, account)
        self.account = account
        self.asking = False
        self.left: tuple[int, int, int] | None = None
        """Its request was over before it was decided."""

    async def enter(self) -> None:
        """Raises `RateLimited`."""
        try:
            await self._controller.ask(self, "requests", 1, 1)
        except asyncio.CancelledError:
            self.leave(0, 0, 0)
            raise

    async def _claim(self, prompt_tokens: int, max_tokens: int, n: int) -> int:
        controller, account = self._controller, self.account
        fair_share, need = controller._fair_share, prompt_tokens + n * max_tokens
        charged = fair_share.expect(account.share, prompt_tokens, max_tokens, n)

        def granted() -> None:
            self._reserved = need
            self._position = fair_share.queue(account.share, charged)

        if n > 1:
            try:
                controller._require_places(n - 1, account, controller._clock())
            except (RateLimited, Unavailable):
                controller.give_back(self, requests=1)
                raise
        await controller.ask(
            self, "tokens", need, n - 1, refund=1, charged=charged, granted=granted
        )
        return self._priority()

    def leave(self, prompt_tokens: int, answer_tokens: int, finished: int) -> None:
        if self.asking:
            self.left = (prompt_tokens, answer_tokens, finished)
        else:
            super().leave(prompt_tokens, answer_tokens, finished)

    def _give_back(self, unused: int, correction: float) -> None:
        self._controller.give_back(self, tokens=unused, places=self._places, correction=correction)
