"""Users, their limits, and whose turn it is, by a clock of the test's own."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from synthia_vllm.admission.fair_share import ANSWER_COST, PROMPT_COST
from synthia_vllm.admission.permits import AdmissionController, LocalPermit
from synthia_vllm.admission.rate_limit import Bucket, RetryAfterEstimator
from synthia_vllm.admission.users import ANONYMOUS, KeyRing, hash_key, new_key
from synthia_vllm.errors import RateLimited, StartupError, Unauthorized, Unavailable

if TYPE_CHECKING:
    from pathlib import Path


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Users:
    """AdmissionController of a key file with `users`, and their keys."""

    file: Path
    clock: Clock = field(default_factory=Clock)
    keys: dict[str, str] = field(default_factory=dict)

    def write(self, **users: dict[str, object]) -> None:
        document = {}
        for name, limits in users.items():
            key, key_hash = new_key()
            self.keys[name] = key
            document[name] = {"keys": [key_hash], **limits}
        self.file.write_text(yaml.safe_dump({"users": document}))

    def admission(
        self,
        *,
        max_requests: int = 100,
        max_queue_seconds: float = 1e9,
        cache_secret: bytes | None = None,
    ) -> AdmissionController:
        return AdmissionController(
            self.file,
            max_requests=max_requests,
            max_queue_seconds=max_queue_seconds,
            cache_secret=cache_secret,
            clock=self.clock,
        )


@pytest.fixture
def users(tmp_path: Path) -> Users:
    return Users(tmp_path / "keys.yaml")


def test_only_the_key_identifies(users: Users) -> None:
    """A user is found by its key and by nothing else: not its hash, not another's, not none."""
    users.write(alice={}, bob={})
    admission = users.admission()
    assert admission.identify(f"Bearer {users.keys['alice']}".encode()) == "alice"
    assert admission.identify(f"bearer  {users.keys['bob']} ".encode()) == "bob"
    for wrong in (
        None,
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer alice",
        users.keys["alice"].encode(),
        f"Basic {users.keys['alice']}".encode(),
        f"Bearer {users.keys['alice']}x".encode(),
        f"Bearer {hash_key(users.keys['alice'].encode())}".encode(),
        b"Bearer \xff\xfe",
    ):
        with pytest.raises(Unauthorized):
            admission.identify(wrong)


def test_without_a_file_all_are_one() -> None:
    """An open server asks for no key and ignores what is sent."""
    admission = AdmissionController(None, max_requests=1, max_queue_seconds=1)
    assert admission.open
    assert admission.identify(None) == admission.identify(b"Bearer none") == ANONYMOUS


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("users: [", "not valid YAML at line"),
        ("users: {alice: {keys: [secret]}}", "users.alice.keys.0"),
        ("users: {alice: {requests_per_minut: 5}}", "requests_per_minut"),
        ("users: {'../alice': {}}", "users"),
        ("users: {alice: {weight: 0}}", "weight"),
        ("user: {}", "user"),
        ("[]", "valid dictionary"),
        ("", "is empty"),
        (
            f"users: {{a: {{keys: ['{hash_key(b'k')}']}}, b: {{keys: ['{hash_key(b'k')}']}}}}",
            "same key",
        ),
    ],
)
def test_bad_key_files_are_refused(content: str, said: str) -> None:
    """A fault in the key file is named, without what may be a key."""
    with pytest.raises(StartupError, match=said) as caught:
        KeyRing(content, "keys.yaml")
    assert "secret" not in str(caught.value)


def test_changes_of_the_file_are_taken_over(users: Users) -> None:
    """New users come, removed ones go; a bad or missing file leaves the users as they were."""
    users.write(alice={})
    admission = users.admission()
    alice = f"Bearer {users.keys['alice']}".encode()
    assert not admission.reload(only_if_changed=True)
    users.write(bob={})
    assert not admission.reload(only_if_changed=True)  # perhaps still being written
    assert admission.reload(only_if_changed=True)
    bob = f"Bearer {users.keys['bob']}".encode()
    assert admission.identify(bob) == "bob"
    with pytest.raises(Unauthorized):
        admission.identify(alice)
    users.file.write_text("")
    admission.reload(only_if_changed=True)
    users.file.write_text("users: [")  # changed again since the last look
    assert not admission.reload(only_if_changed=True)
    with pytest.raises(StartupError):
        admission.reload(only_if_changed=True)
    assert not admission.reload(only_if_changed=True)  # it is said once
    users.file.unlink()
    with pytest.raises(StartupError):
        admission.reload()
    assert admission.identify(bob) == "bob"


@given(
    st.integers(1, 10_000),
    st.lists(st.tuples(st.floats(0, 100), st.floats(1, 20_000)), max_size=30),
)
def test_waiting_is_enough(limit: int, steps: list[tuple[float, float]]) -> None:
    """Whoever waits as long as the bucket says is served, and no more than the limit is given."""
    now, used = 0.0, 0.0
    bucket = Bucket(limit, now)
    for pause, need in steps:
        now += pause
        wait = bucket.wait(need, now)
        assert 0 <= wait <= 61 + max(0.0, used) * 60 / limit
        now += wait
        assert bucket.wait(need, now) == 0
        bucket.take(need, now)
        used += need
        # A need beyond the limit is served from a full bucket, and paid for afterwards.
        assert used <= limit + now * limit / 60 + max((n for _, n in steps), default=0) + 1


def test_requests_a_minute(users: Users) -> None:
    """The limit's worth is served at once, then one each `60 / limit` seconds, as told."""
    users.write(alice={"requests_per_minute": 6})
    admission = users.admission()
    for _ in range(6):
        admission.enter("alice").leave(0, 0, 0)
    with pytest.raises(RateLimited) as caught:
        admission.enter("alice")
    assert caught.value.code == "requests_per_minute"
    assert caught.value.retry_after == pytest.approx(10)
    headers = dict(admission.headers("alice"))
    assert headers[b"x-ratelimit-limit-requests"] == b"6"
    assert headers[b"x-ratelimit-remaining-requests"] == b"0"
    assert headers[b"x-ratelimit-reset-requests"] == b"60.000s"
    users.clock.now += caught.value.retry_after or 0
    admission.enter("alice").leave(0, 0, 0)


def test_tokens_a_minute(users: Users) -> None:
    """A request claims its prompt and budget, gets back what it did not use, and waits truly."""
    users.write(alice={"tokens_per_minute": 600, "requests_per_minute": 100})
    admission = users.admission()
    first, second = admission.enter("alice"), admission.enter("alice")
    first.reserve(100, 400, 1)
    with pytest.raises(RateLimited) as caught:
        second.reserve(100, 400, 1)
    second.leave(0, 0, 0)
    assert caught.value.code == "tokens_per_minute"
    assert caught.value.retry_after == pytest.approx(40)
    remaining = dict(admission.headers("alice"))
    assert remaining[b"x-ratelimit-remaining-tokens"] == b"100"
    assert remaining[b"x-ratelimit-remaining-requests"] == b"99"  # the refused one was not made
    first.leave(100, 50, 1)
    assert dict(admission.headers("alice"))[b"x-ratelimit-remaining-tokens"] == b"450"
    users.clock.now += 40
    again = admission.enter("alice")
    again.reserve(100, 400, 1)
    again.leave(0, 0, 0)  # refused later, or gone before it ran: all is given back
    users.clock.now += 60
    assert dict(admission.headers("alice"))[b"x-ratelimit-remaining-tokens"] == b"600"


def test_a_request_beyond_the_limit_is_served_from_a_full_bucket(users: Users) -> None:
    """No limit makes a request impossible: it waits for a full minute's worth."""
    users.write(alice={"tokens_per_minute": 100})
    admission = users.admission()
    permit = admission.enter("alice")
    permit.reserve(500, 500, 1)
    permit.leave(500, 500, 1)
    waiting = admission.enter("alice")
    with pytest.raises(RateLimited) as caught:
        waiting.reserve(1, 1, 1)
    assert caught.value.retry_after == pytest.approx((1000 - 100 + 2) * 60 / 100)


def test_concurrent_requests(users: Users) -> None:
    """Each answer in the making counts, also the `n` of one request; ended ones do not."""
    users.write(alice={"concurrent_requests": 3}, bob={})
    admission = users.admission()
    permit = admission.enter("alice")
    permit.reserve(1, 1, 2)
    admission.enter("alice")
    with pytest.raises(RateLimited) as caught:
        admission.enter("alice")
    assert caught.value.code == "concurrent_requests"
    assert caught.value.retry_after is not None
    assert caught.value.retry_after > 0
    admission.enter("bob")
    permit.leave(1, 2, 2)
    assert admission.in_flight == 2
    other = admission.enter("alice")
    with pytest.raises(RateLimited):
        other.reserve(1, 1, 3)
    other.leave(0, 0, 0)
    assert admission.in_flight == 2


def test_one_user_cannot_take_all_places(users: Users) -> None:
    """A flood of one user leaves places for others, in the end for each of many."""
    users.write(**{f"u{i}": {} for i in range(5)})
    admission = users.admission(max_requests=1000)
    got = []
    for i in range(5):
        number = 0
        while True:
            try:
                admission.enter(f"u{i}")
            except (RateLimited, Unavailable):
                break
            number += 1
        got.append(number)
    assert got[0] == 800
    assert all(number > 0 for number in got)
    assert sum(got) <= 1000


def test_an_open_server_uses_all_places() -> None:
    """Where all are one user, it may have every place, and not one more."""
    admission = AdmissionController(None, max_requests=10, max_queue_seconds=1e9)
    for _ in range(10):
        admission.enter(ANONYMOUS)
    with pytest.raises(Unavailable):
        admission.enter(ANONYMOUS)


def test_departures_spread_those_who_come_back() -> None:
    """Places come free at the pace they lately did; each refused client is given a later one."""
    departures = RetryAfterEstimator()
    for tick in range(100):
        departures.note(tick * 0.5, full=True)
    now = 50.0
    waits = [departures.wait(now, places=3) for _ in range(5)]
    # After as many as there are places they are the same ones again, who have come too early.
    assert waits == pytest.approx([0.5, 1.0, 1.5, 0.5, 1.0])
    departures.note(500.0, full=False)  # an idle hour teaches nothing
    departures.note(900.0, full=True)
    assert departures.gap == pytest.approx(0.5)


def test_a_long_queue_is_refused(users: Users) -> None:
    """Who would wait longer than the server allows is refused; another user is not."""
    users.write(alice={}, bob={})
    admission = users.admission(max_queue_seconds=5)
    admission.set_batch(2)
    permits = [admission.enter("alice") for _ in range(8)]
    for permit in permits:
        permit.reserve(10, 10, 1)
    for permit in permits[:4]:  # one leaves each second
        users.clock.now += 1
        permit.began()
        permit.leave(10, 10, 1)
    for _ in range(4):
        admission.enter("alice").reserve(10, 10, 1)
    with pytest.raises(RateLimited) as caught:
        admission.enter("alice")
    assert caught.value.code == "queue_too_long"
    admission.enter("bob").reserve(10, 10, 1)


# --- whose turn it is -------------------------------------------------------------------------


@dataclass(order=True)
class Job:
    priority: int
    number: int
    name: str = field(compare=False)
    prompt: int = field(compare=False)
    answer: int = field(compare=False)
    permit: LocalPermit = field(compare=False)
    arrived: int = field(compare=False)


class Engine:
    """A batch of `slots` that makes a token each a step, and takes those who wait by priority."""

    def __init__(self, admission: AdmissionController, slots: int = 8) -> None:
        self.admission = admission
        self.slots = slots
        self.waiting: list[Job] = []
        self.running: list[list[object]] = []
        self.served: dict[str, int] = {}
        self.waits: dict[str, list[int]] = {}
        self.step_number = 0
        self._number = count()

    def offer(self, name: str, prompt: int, answer: int, budget: int = 1024) -> None:
        permit = self.admission.enter(name)
        priority = permit.reserve(prompt, budget, 1)
        job = Job(priority, next(self._number), name, prompt, answer, permit, self.step_number)
        heapq.heappush(self.waiting, job)

    def step(self) -> None:
        self.step_number += 1
        while self.waiting and len(self.running) < self.slots:
            job = heapq.heappop(self.waiting)
            job.permit.began()
            self.waits.setdefault(job.name, []).append(self.step_number - job.arrived)
            self.served[job.name] = self.served.get(job.name, 0) + PROMPT_COST * job.prompt
            self.running.append([job, job.answer])
        for entry in list(self.running):
            job = entry[0]  # type: ignore[assignment]
            entry[1] -= 1  # type: ignore[operator]
            self.served[job.name] += ANSWER_COST
            if not entry[1]:
                self.running.remove(entry)
                job.permit.leave(job.prompt, job.answer, 1)


@pytest.mark.parametrize(("weights", "ratio"), [((1, 1), 1.0), ((3, 1), 3.0), ((1, 2), 0.5)])
def test_backlogged_users_share_by_weight(
    users: Users, weights: tuple[int, int], ratio: float
) -> None:
    """Two users who always have requests waiting are served tokens in the ratio of weights."""
    users.write(a={"weight": weights[0]}, b={"weight": weights[1]})
    admission = users.admission(max_requests=10_000)
    engine = Engine(admission)
    draw = random.Random(1)
    for _ in range(12_000):
        for name, mean in (("a", 40), ("b", 15)):  # one asks for long answers, one for short ones
            if sum(1 for job in engine.waiting if job.name == name) < 20:
                engine.offer(name, draw.randint(1, 30), draw.randint(1, 2 * mean))
        engine.step()
    assert engine.served["a"] / engine.served["b"] == pytest.approx(ratio, rel=0.1)


def test_a_light_user_does_not_wait_behind_a_flood(users: Users) -> None:
    """One user floods; another's first token waits for a place to come free, not for the queue."""
    users.write(flood={}, light={})
    engine = Engine(users.admission(max_requests=10_000))
    for _ in range(1000):
        engine.offer("flood", 10, 20)
    for step in range(600):
        if step % 20 == 0:
            engine.offer("light", 10, 5)
        engine.step()
    assert max(engine.waits["light"]) <= 20
    assert max(engine.waits["flood"]) > 500


def test_an_idle_user_has_saved_nothing_up(users: Users) -> None:
    """Who comes back after a long pause shares from now on, and does not lock the others out."""
    users.write(busy={}, back={})
    engine = Engine(users.admission(max_requests=10_000))
    for _ in range(400):
        engine.offer("busy", 10, 20)
    for _ in range(500):
        engine.step()
    before = dict(engine.served)
    for _ in range(300):
        engine.offer("back", 10, 20)
    for _ in range(300):
        engine.step()
    gained = engine.served["busy"] - before["busy"]
    assert engine.served["back"] / gained == pytest.approx(1, rel=0.2)


def test_one_users_requests_keep_their_order(users: Users) -> None:
    """However wrong the guess of an answer's length was, nobody is overtaken by itself."""
    users.write(a={}, b={})
    admission = users.admission(max_requests=10_000)
    draw = random.Random(2)
    stamps: list[int] = []
    running: list[LocalPermit] = []
    for _ in range(500):
        permit = admission.enter("a")
        stamps.append(permit.reserve(draw.randint(1, 100), draw.randint(1, 1000), 1))
        running.append(permit)
        if draw.random() < 0.5:
            ended = running.pop(0)
            ended.began()
            ended.leave(50, draw.choice((1, 900)), 1)
    assert stamps == sorted(stamps)


def test_priorities_are_whole_numbers_whatever_happens(users: Users) -> None:
    """Permits may end in any order and at any stage; places and stamps all come back."""
    users.write(a={"weight": 0.01}, b={"weight": 100})
    admission = users.admission(max_requests=10_000)
    draw = random.Random(3)
    open_permits: list[LocalPermit] = []
    for _ in range(2000):
        permit = admission.enter(draw.choice("ab"))
        if draw.random() < 0.9:
            assert isinstance(permit.reserve(draw.randint(1, 99), 1024, draw.randint(1, 4)), int)
        open_permits.append(permit)
        while len(open_permits) > 50:
            ended = open_permits.pop(draw.randrange(len(open_permits)))
            if ended._position is not None and draw.random() < 0.7:
                ended.began()
                ended.leave(9, 99, 1)
            else:
                ended.leave(0, 0, 0)
    for permit in open_permits:
        permit.leave(0, 0, 0)
    assert admission.in_flight == 0
    assert not any(account.share.waiting for account in admission._accounts.values())
    assert all(account.in_flight == 0 for account in admission._accounts.values())


def test_cache_salts(users: Users) -> None:
    """One for each user or group, by the secret; a user named as a group is another one."""
    users.write(alice={}, bob={"cache_group": "team"}, carol={"cache_group": "team"}, team={})
    admission = users.admission(cache_secret=b"a")
    salts = {name: admission.cache_salt(name, None) for name in ("alice", "bob", "carol", "team")}
    assert salts["bob"] == salts["carol"]
    assert len(set(salts.values())) == 3
    assert admission.cache_salt("alice", "x") not in (
        salts["alice"],
        admission.cache_salt("bob", "x"),
    )
    assert admission.enter("alice").cache_salt(None) == salts["alice"]
    assert users.admission(cache_secret=b"b").cache_salt("alice", None) != salts["alice"]
    assert users.admission().cache_salt("alice", None) is None
