"""Whose turn it is, among users who wait for the engine.

Fair shares follow Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): each
user has a virtual counter of the tokens served to it, divided by its weight, and the smallest
counter goes first. The order itself is kept by vLLM's priority scheduling, which wants one number
per request, given on arrival. So a request is stamped with its user's counter, which is charged at
once with what the request is expected to cost, and set right when it ends (as in start-time fair
queueing, of which this is the batched form).

Where a user has requests at several replicas, each has an order of its own, and what the others
have served moves the user's counter here, too: start-time fair queueing over several servers (Wang
and Merchant, "Proportional-Share Scheduling for Distributed Storage Systems", FAST 2007).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

# The weights of Sheng et al.: a token of the answer takes a step of its own.
PROMPT_COST: Final = 1
ANSWER_COST: Final = 2


@dataclass(slots=True)
class Share:
    """What one user has had."""

    counter: float
    """Virtual: tokens served and promised, by weight."""
    weight: float = 1.0
    waiting: deque[float] = field(default_factory=deque)
    """The stamps of requests the engine has not begun, oldest first."""
    usual_answer: float = 128.0
    """Tokens of an answer, lately."""
    elsewhere: float = 0.0
    """What other replicas have served it since it was last stamped here, by weight."""


@dataclass(slots=True, eq=False)
class Position:
    """One request's position in the order."""

    share: Share
    weight: float
    stamp: float
    charged: float
    begun: bool = False


class FairShare:
    """The shares of all users, and the virtual time they live in."""

    __slots__ = ("_floor", "_shares")

    def __init__(self) -> None:
        self._floor = 0.0
        self._shares: dict[str, Share] = {}

    def share_of(self, name: str, weight: float) -> Share:
        """The share of user `name`, who is served by this `weight` from now on."""
        share = self._shares.get(name)
        if share is None:
            share = self._shares[name] = Share(self._floor)
        share.weight = weight
        return share

    def forget(self, name: str) -> None:
        """User `name` is gone."""
        self._shares.pop(name, None)

    def crowd(self, share: Share) -> float:
        """How many times the pace of the engine is slower for `share`, with those who wait."""
        waiting = [other.weight for other in self._shares.values() if other.waiting]
        return max(1.0, sum(waiting) / share.weight)

    def expect(self, share: Share, prompt_tokens: int, max_tokens: int, n: int) -> float:
        """What a request is expected to cost, by the weight of `share`."""
        expected = n * min(max_tokens, share.usual_answer)
        return (PROMPT_COST * prompt_tokens + ANSWER_COST * expected) / share.weight

    def queue(self, share: Share, charged: float) -> Position:
        """Stamp a request, and charge `share` with what it is expected to cost."""
        counter = share.counter + share.elsewhere
        share.elsewhere = 0.0
        if share.waiting:
            share.counter = max(counter, share.waiting[-1])
        else:
            # An idle user has saved nothing up; and what it was served elsewhere, perhaps beside
            # nobody, puts it behind those who wait here, and no further.
            last = max(
                [share.counter, *(o.waiting[-1] for o in self._shares.values() if o.waiting)]
            )
            share.counter = max(min(counter, last), self._virtual_time())
        position = Position(share, share.weight, share.counter, charged)
        share.waiting.append(position.stamp)
        share.counter += charged
        return position

    def begin(self, position: Position) -> None:
        """The engine has begun the request of `position`."""
        if not position.begun:
            position.begun = True
            self._virtual_time()
            position.share.waiting.remove(position.stamp)
            self._floor = max(self._floor, position.stamp)

    def settle(self, position: Position, prompt_tokens: int, answer_tokens: int) -> float:
        """The request of `position` is over: charge what ran of it instead.

        Returns what that changes.
        """
        share = position.share
        if prompt_tokens:
            self.begin(position)
        elif not position.begun:
            share.waiting.remove(position.stamp)
        cost = PROMPT_COST * prompt_tokens + ANSWER_COST * answer_tokens
        correction = cost / position.weight - position.charged
        share.counter += correction
        # Not below what has been stamped: a user's own requests keep their order.
        share.counter = max([share.counter, *share.waiting])
        return correction

    def _virtual_time(self) -> float:
        """The counter of the least active user of those who wait; with none, of the last."""
        heads = [share.waiting[0] for share in self._shares.values() if share.waiting]
        if heads:
            self._floor = max(self._floor, min(heads))
        return self._floor
