"""How many places batches get beside users, by what those see."""

from __future__ import annotations

from collections import deque

from synthia_vllm.api.batches.pace import Pace


class Users:
    """Users whose gaps get longer with the places that a batch holds beside them."""

    def __init__(self, pace: Pace, for_each_place: float) -> None:
        self.pace = pace
        self.each = for_each_place
        self.now = 0.0
        self.count = 0
        self.latest: deque[float] = deque(maxlen=64)
        self.held: list[int] = []

    def read(self, seconds: float, step: float = 0.01) -> None:
        """Read a stream for so long, with looks at the pace as often as the runner has them."""
        end = self.now + seconds
        while self.now < end:
            held = self.pace.limit
            for _ in range(20):
                gap = step * (1 + self.each * held)
                self.latest.append(gap)
                self.count += 1
                self.now += gap
            self.pace.note(self.now, self.count, self.latest)
            self.held.append(held)


def test_none_until_it_is_known_how_it_is_without() -> None:
    pace = Pace(16)
    users = Users(pace, 0.0)
    assert pace.limit == 0
    users.read(0.5)
    assert pace.limit == 0
    users.read(1.5)
    assert pace.limit >= 1


def test_all_that_it_may_where_users_do_not_feel_it() -> None:
    users = Users(Pace(16), 0.001)
    users.read(15)
    assert users.pace.limit == 16
    assert max(users.held) == 16


def test_as_many_as_users_bear() -> None:
    """One in thirty for each place: five are borne, and it comes to about that."""
    users = Users(Pace(64), 1 / 30)
    users.read(200)
    later = [held for held in users.held[len(users.held) // 2 :] if held]
    assert 2 <= sum(later) / len(later) <= 5
    assert max(later) <= 6


def test_it_is_looked_again_how_it_is_without() -> None:
    """Users who have become slower by themselves are no reason to hold fewer for good."""
    users = Users(Pace(16), 0.001)
    users.read(15)
    users.read(10, step=0.03)
    assert users.pace.limit < 16
    users.read(60, step=0.03)
    assert users.pace.limit == 16
    assert 0 in users.held[len(users.held) // 2 :]


def test_where_nobody_reads_along_nobody_feels_it() -> None:
    pace = Pace(4)
    held = []
    for second in range(60):
        pace.note(float(second), 0, deque())
        held.append(pace.limit)
    assert set(held[30:]) == {0, 4}  # none while it is looked at
    assert held[30:].count(4) > 3 * held[30:].count(0)


def test_who_has_gone_is_forgotten() -> None:
    """The pause between two users is no gap."""
    pace = Pace(4)
    users = Users(pace, 0.0)
    users.read(3)
    pace.rest()
    users.now += 1000
    before = pace.limit
    pace.note(users.now, users.count, users.latest)
    assert pace.limit == before
