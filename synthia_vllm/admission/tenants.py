"""Users: who may ask, how much, and whose turn it is.

A key file names the users. It holds only hashes of their keys, and is read again when it
changes. Everything here runs on the event loop, costs microseconds, and never waits: a request
that cannot be had now is refused at once, with the time after which it can.

Fair shares follow Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): each
user has a virtual counter of the tokens served to it, divided by its weight, and the smallest
counter goes first. The order itself is kept by vLLM's priority scheduling, which wants one number
per request, given on arrival. So a request is stamped with its user's counter, which is charged at
once with what the request is expected to cost, and set right when it ends (as in start-time fair
queueing, of which this is the batched form).
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import secrets
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Final, Protocol

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from synthia_vllm.errors import RateLimited, StartupError, Unauthorized, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

# The weights of Sheng et al.: a token of the answer takes a step of its own.
PROMPT_COST: Final = 1
ANSWER_COST: Final = 2

# While the server fills up, one user may hold this many times the places still free: alone it gets
# four fifths of them, and whoever comes next always finds some.
_SHARE_OF_FREE: Final = 4

_LONGEST_PROMISE: Final = 60.0  # seconds; the pace is a guess

_KEY_PREFIX: Final = "sk-synthia-"
_HASH_PREFIX: Final = "sha256:"

UserName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class User(BaseModel):
    """One user, as the key file describes it. `None` means: no limit of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    keys: list[Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]] = []
    weight: float = Field(1.0, ge=0.01, le=100)
    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)
    concurrent_requests: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    models: frozenset[str] | None = None
    cache_group: UserName | None = None
    """Users of one group find each other's prompts in the prefix cache."""


class _KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    users: dict[UserName, User] = {}


ANONYMOUS: Final = "anonymous"


def new_key() -> tuple[str, str]:
    """A new API key and its hash for the key file.

    The key has 256 random bits, so one round of SHA-256 is enough: there is nothing to guess.
    """
    key = _KEY_PREFIX + secrets.token_urlsafe(32)
    return key, hash_key(key.encode())


def new_cache_secret() -> bytes:
    """For `Users`; for as long as the engine runs, whose prefix cache it salts."""
    return secrets.token_bytes(32)


def hash_key(key: bytes) -> str:
    """What the key file holds of `key`."""
    return _HASH_PREFIX + hashlib.sha256(key).hexdigest()


class KeyRing:
    """The users of one version of the key file. Raises `StartupError` if it is not one."""

    def __init__(self, content: str, source: str) -> None:
        try:
            document = yaml.safe_load(content)
            if document is None:  # half of a rewrite, more likely than a wish to lock all out
                raise StartupError(f"The key file {source} is empty; `users: {{}}` means no users.")
            self.users: Mapping[str, User] = _KeyFile.model_validate(document).users
        except yaml.YAMLError as error:
            # Without the text around the fault: it may be a key.
            mark = getattr(error, "problem_mark", None)
            line = f" at line {mark.line + 1}" if mark else ""
            raise StartupError(f"The key file {source} is not valid YAML{line}.") from None
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(str(part) for part in problem["loc"])
            raise StartupError(f"The key file {source}: {place}: {problem['msg']}.") from None
        # Looked up by a hash that nobody outside can compute, so the time a look-up takes tells
        # nothing of the keys; then compared in constant time.
        self._secret = secrets.token_bytes(32)
        self._by_blinded_hash: dict[bytes, tuple[str, str]] = {}
        for name, user in self.users.items():
            for key_hash in user.keys:
                known = self._by_blinded_hash.setdefault(self._blind(key_hash), (key_hash, name))
                if known[1] != name:
                    raise StartupError(
                        f"The key file {source}: {name} and {known[1]} have the same key."
                    )

    def _blind(self, key_hash: str) -> bytes:
        return hmac.digest(self._secret, key_hash.encode(), "sha256")

    def owner_of(self, key: bytes) -> str | None:
        """The name of the user who has `key`."""
        key_hash = hash_key(key)
        known, name = self._by_blinded_hash.get(self._blind(key_hash), ("", None))
        return name if hmac.compare_digest(known, key_hash) else None


class Bucket:
    """A limit per minute: filled evenly up to `limit`, emptied by what is used.

    It may go below zero, for what is used up is known only afterwards.
    """

    __slots__ = ("_at", "_level", "limit")

    def __init__(self, limit: int, now: float) -> None:
        self.limit = limit
        self._level = float(limit)
        self._at = now

    def level(self, now: float) -> float:
        """What is left."""
        self._level = min(self.limit, self._level + (now - self._at) * self.limit / 60)
        self._at = now
        return self._level

    def wait(self, need: float, now: float) -> float:
        """Seconds until `need` is there; a need beyond the limit waits for a full bucket."""
        missing = min(need, self.limit) - self.level(now)
        return missing * 60 / self.limit if missing > 1e-6 else 0.0  # as exact as floats are

    def take(self, amount: float, now: float) -> None:
        """Use up `amount`; a negative amount gives back."""
        self._level = min(self.limit, self.level(now) - amount)


class Departures:
    """How fast places come free, learnt while none is: when should a refused client come back?"""

    __slots__ = ("_last", "_promised", "gap")

    def __init__(self) -> None:
        self.gap: float | None = None
        """Seconds between two departures, lately; `None` before there were any."""
        self._last: float | None = None
        self._promised = 0.0

    def note(self, now: float, *, full: bool) -> None:
        """A place came free; `full` if none was free until now."""
        if full and self._last is not None:
            gap = now - self._last
            self.gap = gap if self.gap is None else self.gap + 0.05 * (gap - self.gap)
        self._last = now if full else None

    def wait(self, now: float, places: int) -> float:
        """Seconds until one of `places` that are taken is free for one more.

        Each who asks is given a later time, until all places will have come free once; then it
        begins anew, for those who ask are the same again, and too early.
        """
        gap = 1.0 if self.gap is None else self.gap
        self._promised = max(self._promised, now) + gap
        if self._promised - now > min(_LONGEST_PROMISE, gap * max(1, places)) + 1e-9:
            self._promised = now + gap
        return self._promised - now


@dataclass(slots=True)
class _Account:
    """What the server knows of one user from its requests so far."""

    in_flight: int = 0
    weight: float = 1.0
    requests: Bucket | None = None
    tokens: Bucket | None = None
    departures: Departures = field(default_factory=Departures)
    counter: float = 0.0
    """Virtual: tokens served and promised, by weight."""
    waiting: deque[float] = field(default_factory=deque)
    """The stamps of requests the engine has not begun, oldest first."""
    usual_answer: float = 128.0
    """Tokens of an answer, lately."""

    def limit(self, user: User, now: float) -> None:
        """Take over the limits of `user`; a bucket whose limit is the same stays as it is."""
        self.weight = user.weight
        for name, limit in (
            ("requests", user.requests_per_minute),
            ("tokens", user.tokens_per_minute),
        ):
            bucket: Bucket | None = getattr(self, name)
            if limit is None:
                setattr(self, name, None)
            elif bucket is None or bucket.limit != limit:
                setattr(self, name, Bucket(limit, now))


class Users:
    """Who there is, by the key file `file`; with `None` for it, all are one user.

    With a `cache_secret` each has a prefix cache of its own, by a salt that nobody without the
    secret can make. Raises `StartupError` if the file cannot be read.
    """

    def __init__(self, file: Path | None, cache_secret: bytes | None = None) -> None:
        self._file = file
        self._cache_secret = cache_secret
        self._ring: KeyRing | None = None
        self._version: Any = None
        self._seen: Any = None
        if file is not None:
            self.reload()

    @property
    def open(self) -> bool:
        """Whether no key is needed."""
        return self._file is None

    @property
    def names(self) -> tuple[str, ...]:
        """The users there are."""
        return tuple(self._ring.users) if self._ring else (ANONYMOUS,)

    def reload(self, *, only_if_changed: bool = False) -> bool:
        """Read the key file; return whether it was read.

        Raises `StartupError` and keeps the users there were. What changes of the file is seen
        also where it is a link that is swapped, as a mounted secret is. With `only_if_changed` a
        change is taken over at the second look that finds it: one may be in the middle of it.
        """
        if self._file is None:
            return False
        version, seen = _version_of(self._file), self._seen
        self._seen = version
        if only_if_changed and (version == self._version or version != seen):
            return False
        self._version = version
        try:
            content = self._file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise StartupError(f"Cannot read the key file {self._file}: {reason}.") from None
        self._ring = KeyRing(content, str(self._file))
        return True

    def identify(self, authorization: bytes | None) -> str:
        """The user with the key of this ``Authorization`` header. Raises `Unauthorized`."""
        if self._ring is None:
            return ANONYMOUS
        scheme, _, key = (authorization or b"").partition(b" ")
        name = self._ring.owner_of(key.strip()) if scheme.lower() == b"bearer" else None
        if name is None:
            raise Unauthorized
        return name

    def user(self, name: str) -> User:
        """The user of this name. Raises `Unauthorized` if there is none, any more."""
        user = self._ring.users.get(name) if self._ring else User()
        if user is None:
            raise Unauthorized
        return user

    def cache_salt(self, name: str, own: str | None) -> str | None:
        """What separates the prompts of user `name` from others' in the prefix cache, if anything.

        `own` is the request's own word: it can make the user's cache narrower, and never another's.
        """
        if self._cache_secret is None:
            # Whom it is told to finds the same: it is a word shared on purpose.
            return None if own is None else hashlib.sha256(own.encode()).hexdigest()
        group = self.user(name).cache_group
        parts = ("user", name) if group is None else ("group", group)
        message = "\0".join((*parts, *(() if own is None else (own,))))
        return hmac.digest(self._cache_secret, message.encode(), "sha256").hex()

    def models_of(self, name: str) -> frozenset[str] | None:
        """The model names user `name` may use; `None` for all."""
        user = self._ring.users.get(name) if self._ring else None
        return user.models if user else None


class Place(Protocol):
    """A request's place in the server; it lives exactly as long as the request."""

    @property
    def user(self) -> User:
        """Whose it is."""

    def cache_salt(self, own: str | None) -> str | None:
        """As `Users.cache_salt`."""

    async def claim(self, prompt_tokens: int, max_tokens: int, n: int) -> int:
        """Claim the tokens this request may take; return its priority, smallest first.

        Raises `RateLimited` or `Unavailable`; the request then counts as never made.
        """

    def began(self) -> None:
        """The engine has begun this request."""

    def leave(self, prompt_tokens: int, answer_tokens: int, finished: int) -> None:
        """Give the place back; the counts are of tokens that ran, and of answers that ended."""


class Tenants(Users):
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
        self._accounts: dict[str, _Account] = {}
        self._floor = 0.0
        self._departures = Departures()
        self.in_flight = 0
        """Places taken."""
        self._batch = 1
        super().__init__(file, cache_secret)

    def reload(self, *, only_if_changed: bool = False) -> bool:
        read = super().reload(only_if_changed=only_if_changed)
        if read and self._ring is not None:
            for name in [name for name in self._accounts if name not in self._ring.users]:
                if not self._accounts[name].in_flight:
                    del self._accounts[name]
        return read

    async def admit(self, name: str) -> Place:
        """`enter`, in the form for those who may have to wait for another process's word."""
        return self.enter(name)

    def enter(self, name: str) -> Lease:
        """Take a place for a request of user `name`.

        Raises `RateLimited` or `Unavailable`, with the seconds to wait, and `Unauthorized`.
        """
        now = self._clock()
        user = self.user(name)
        account = self._accounts.setdefault(name, _Account(counter=self._floor))
        account.limit(user, now)
        if account.requests is not None:
            wait = account.requests.wait(1, now)
            if wait:
                raise RateLimited(
                    f"You may send {account.requests.limit} requests a minute.",
                    code="requests_per_minute",
                    retry_after=wait,
                )
        self._require_places(1, user, account, now)
        if account.requests is not None:
            account.requests.take(1, now)
        lease = Lease(self, name, user, account)
        self._occupy(lease, 1)
        return lease

    def set_batch(self, size: int) -> None:
        """The engine runs `size` requests at the same time; more than these wait."""
        self._batch = size

    def headers(self, name: str) -> list[tuple[bytes, bytes]]:
        """What is left of the limits of user `name`, in OpenAI's header names."""
        account, now = self._accounts.get(name), self._clock()
        found: list[tuple[bytes, bytes]] = []
        for kind in ("requests", "tokens"):
            bucket: Bucket | None = getattr(account, kind, None)
            if bucket is not None:
                left = max(0, math.floor(bucket.level(now)))
                for what, value in (
                    ("limit", str(bucket.limit)),
                    ("remaining", str(left)),
                    ("reset", f"{bucket.wait(bucket.limit, now):.3f}s"),
                ):
                    found.append((f"x-ratelimit-{what}-{kind}".encode(), value.encode()))
        return found

    def _require_places(self, places: int, user: User, account: _Account, now: float) -> None:
        allowed = user.concurrent_requests
        if allowed is not None and account.in_flight + places > allowed:
            raise RateLimited(
                f"You may have {allowed} answers in the making at a time.",
                code="concurrent_requests",
                retry_after=account.departures.wait(now, account.in_flight),
            )
        free = self._max_requests - self.in_flight
        if free < (places if self._ring is None else 1):
            raise Unavailable(
                "The server is full.",
                code="server_full",
                retry_after=self._departures.wait(now, self.in_flight),
            )
        # A door takes a 503 for a server that is gone: what is this user's alone is a 429.
        share = free if self._ring is None else _SHARE_OF_FREE * free - account.in_flight
        if places > min(free, share):
            raise RateLimited(
                f"You hold {account.in_flight} of the {self.in_flight} places in use, and those "
                "that are left are for others, too.",
                code="share_used_up",
                retry_after=self._departures.wait(now, account.in_flight),
            )
        gap = self._departures.gap
        if self.in_flight < self._batch or gap is None:
            return
        # Requests of this user that wait, times the pace at which its turn comes. What is not
        # streamed is not seen to begin, but no more can wait than the batch does not hold.
        ahead = min(len(account.waiting), self.in_flight - self._batch)
        waiting = [other.weight for other in self._accounts.values() if other.waiting]
        wait = ahead * gap * max(1.0, sum(waiting) / user.weight)
        if wait > self._max_queue_seconds:
            refusal = Unavailable if self._ring is None else RateLimited
            raise refusal(
                f"You would wait about {wait:.0f} seconds for the first word; this server lets "
                f"nobody wait longer than {self._max_queue_seconds:g}.",
                code="queue_too_long",
                retry_after=max(1.0, wait - self._max_queue_seconds),
            )

    def _occupy(self, lease: Lease, places: int) -> None:
        lease.places += places
        lease.account.in_flight += places
        self.in_flight += places

    def _release(self, lease: Lease, *, served: bool) -> None:
        account = lease.account
        if served:
            now = self._clock()
            allowed = lease.user.concurrent_requests
            account.departures.note(now, full=allowed is not None and account.in_flight >= allowed)
            self._departures.note(now, full=self.in_flight >= self._batch)
        account.in_flight -= lease.places
        self.in_flight -= lease.places

    def _virtual_time(self) -> float:
        """The counter of the least active user of those who wait; with none, of the last."""
        heads = [account.waiting[0] for account in self._accounts.values() if account.waiting]
        if heads:
            self._floor = max(self._floor, min(heads))
        return self._floor


class Lease:
    """A `Place`, and what was taken for it."""

    __slots__ = (
        "_begun",
        "_charged",
        "_reserved",
        "_stamp",
        "_tenants",
        "account",
        "name",
        "places",
        "user",
    )

    def __init__(self, tenants: Tenants, name: str, user: User, account: _Account) -> None:
        self._tenants = tenants
        self.name = name
        self.user = user
        self.account = account
        self.places = 0
        self._reserved = 0
        self._charged = 0.0
        self._stamp: float | None = None
        self._begun = False

    def cache_salt(self, own: str | None) -> str | None:
        """As `Users.cache_salt`."""
        return self._tenants.cache_salt(self.name, own)

    async def claim(self, prompt_tokens: int, max_tokens: int, n: int) -> int:
        """`reserve`, see `Tenants.admit`."""
        return self.reserve(prompt_tokens, max_tokens, n)

    def reserve(self, prompt_tokens: int, max_tokens: int, n: int) -> int:
        """Claim the tokens this request may take; return its priority, smallest first.

        Raises `RateLimited` or `Unavailable`; the request then counts as never made.
        """
        tenants, account, user = self._tenants, self.account, self.user
        now = tenants._clock()
        need = prompt_tokens + n * max_tokens
        wait = account.tokens.wait(need, now) if account.tokens is not None else 0.0
        try:
            if wait:
                raise RateLimited(
                    f"You may use {user.tokens_per_minute} tokens a minute; this request needs "
                    f"{need} (its prompt and `max_tokens`).",
                    code="tokens_per_minute",
                    retry_after=wait,
                )
            if n > 1:
                tenants._require_places(n - 1, user, account, now)
        except (RateLimited, Unavailable):
            if account.requests is not None:
                account.requests.take(-1, now)
            raise
        tenants._occupy(self, n - 1)
        self._reserved = need
        if account.tokens is not None:
            account.tokens.take(need, now)
        if not account.waiting:  # an idle user has saved nothing up
            account.counter = max(account.counter, tenants._virtual_time())
        self._stamp = account.counter
        account.waiting.append(self._stamp)
        expected = n * min(max_tokens, account.usual_answer)
        self._charged = (PROMPT_COST * prompt_tokens + ANSWER_COST * expected) / user.weight
        account.counter += self._charged
        return math.floor(self._stamp)

    def began(self) -> None:
        """The engine has begun this request."""
        if self._stamp is not None and not self._begun:
            self._begun = True
            self._tenants._virtual_time()
            self.account.waiting.remove(self._stamp)
            self._tenants._floor = max(self._tenants._floor, self._stamp)

    def leave(self, prompt_tokens: int, answer_tokens: int, finished: int) -> None:
        """Give the place back; the counts are of tokens that ran, and of answers that ended."""
        tenants, account = self._tenants, self.account
        if self._stamp is not None:
            if prompt_tokens:
                self.began()
            elif not self._begun:
                account.waiting.remove(self._stamp)
            cost = PROMPT_COST * prompt_tokens + ANSWER_COST * answer_tokens
            account.counter += cost / self.user.weight - self._charged
            # Not below what has been stamped: a user's own requests keep their order.
            account.counter = max([account.counter, *account.waiting])
            if account.tokens is not None:
                unused = self._reserved - prompt_tokens - answer_tokens
                account.tokens.take(-unused, tenants._clock())
        if finished:
            account.usual_answer += 0.1 * (answer_tokens / finished - account.usual_answer)
        tenants._release(self, served=self._stamp is not None)


def _version_of(file: Path) -> Any:
    """What changes when the file does; `None` if it is not there."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
