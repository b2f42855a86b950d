"""All of a fleet at work: three servers, Valkey, PostgreSQL, a proxy and a router in front."""

from __future__ import annotations

import itertools
import json
import signal
import threading
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from chat_api import BODY, events, key_file
from doors import DOORS, opened
from postgres import postgres
from replicas import Clients, Replica
from serving import wait_until
from valkey_server import valkey_server

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MOST = 3
USERS: dict[str, dict[str, Any]] = {"bounded": {"concurrent_requests": MOST}, "ann": {}, "bob": {}}
LEAVING_S = 4.0  # before a server drains: doors ask every second, and believe two answers
STUCK_S = 2.0  # longer than an answer takes, much


@dataclass
class Outcome:
    """One request, as its client saw it."""

    door: str
    user: str
    begun: float
    ended: float
    status: int
    """0 for a broken connection, or a stream that did not end as it should."""
    usage: dict[str, Any] | None = None
    told: str = ""
    """What it says that is no answer."""


class Load(Clients):
    """Clients of all users at all doors, plain and streamed, who ask again at once."""

    def __init__(self, doors: Sequence[str], keys: dict[str, dict[str, str]]) -> None:
        super().__init__()
        self.outcomes: list[Outcome] = []
        kinds = itertools.product(doors, keys.items(), (False, True))
        self.threads = [
            threading.Thread(target=self._ask, args=(door, *who, stream))
            for door, who, stream in kinds
        ]

    def wait_answered(self, number: int) -> None:
        """Return when so many more have been answered."""
        so_far = len(self.answered())
        wait_until(lambda: len(self.answered()) >= so_far + number, 120)

    def answered(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes[:] if outcome.status == 200]

    def lost(self) -> list[Outcome]:
        """Neither answered, nor told that the user has as many as it may."""
        return [outcome for outcome in self.outcomes[:] if outcome.status not in (200, 429)]

    def told(self) -> Counter[tuple[str, str]]:
        """What clients were told that they used, and how many they are, by user."""
        total: Counter[tuple[str, str]] = Counter()
        for outcome in self.answered():
            assert outcome.usage is not None
            total[outcome.user, "requests"] += 1
            total[outcome.user, "prompt_tokens"] += outcome.usage["prompt_tokens"]
            total[outcome.user, "answer_tokens"] += outcome.usage["completion_tokens"]
        return total

    def _ask(self, door: str, user: str, headers: dict[str, str], stream: bool) -> None:
        body = BODY | {"stream": stream}
        if stream:
            body["stream_options"] = {"include_usage": True}
        with httpx.Client(base_url=door, headers=headers, timeout=60) as client:
            while not self.over.is_set():
                outcome = Outcome(door, user, time.monotonic(), 0.0, 0)
                with suppress(httpx.TransportError):
                    response = client.post("/v1/chat/completions", json=body)
                    outcome.status = response.status_code
                    if response.status_code == 200:
                        outcome.usage = _usage(response, stream)
                        outcome.status = 200 if outcome.usage else 0
                    else:
                        outcome.told = response.text
                outcome.ended = time.monotonic()
                self.outcomes.append(outcome)
                if outcome.status != 200:
                    time.sleep(0.2)


def _usage(response: httpx.Response, stream: bool) -> dict[str, Any] | None:
    """What the answer says that it took; nothing if it is not whole."""
    if not stream:
        answer = response.json()
        said = answer["choices"][0]["message"]["content"]
        usage: dict[str, Any] = answer["usage"]
    else:
        if not response.text.endswith("data: [DONE]\n\n"):
            return None
        *pieces, last = events(response)
        said = "".join(piece["choices"][0]["delta"].get("content") or "" for piece in pieces)
        usage = last["usage"]
    assert said == "Hello.", said
    return usage


def written(ledger: Any) -> Counter[tuple[str, str]]:
    """What the ledger has, as `Load.told` tells it."""
    total: Counter[tuple[str, str]] = Counter()
    for user, requests, refused, prompt, answer in ledger.ask(
        "SELECT user_name, sum(requests), sum(refused), sum(prompt_tokens), sum(answer_tokens)"
        " FROM synthia_usage GROUP BY user_name"
    ):
        for name, value in {
            "requests": requests - refused, "prompt_tokens": prompt, "answer_tokens": answer,
        }.items():  # fmt: skip
            total[user, name] += int(value)
    return total


def logged(replica: Replica, since: float) -> Counter[tuple[str, str]]:
    """What the log of a killed server has of answers since then, as `Load.told` tells it."""
    total: Counter[tuple[str, str]] = Counter()
    for line in map(json.loads, replica.log.splitlines()):
        at = datetime.fromisoformat(line["time"]).timestamp()
        if line["message"] == "chat" and line["status"] == 200 and at >= since:
            total[line["user"], "requests"] += 1
            for name in ("prompt_tokens", "answer_tokens"):
                total[line["user"], name] += line[name]
    return total


@pytest.mark.costly
def test_nothing_is_lost_and_all_is_written_down(tmp_path: Path) -> None:
    """Under load each server is replaced, then one is killed: only what it had in hand is lost,
    and the ledger says what clients were told.
    """
    keys = key_file(tmp_path / "keys.yaml", **USERS)
    with ExitStack() as stack:
        valkey, ledger = stack.enter_context(valkey_server()), stack.enter_context(postgres())
        settings = {
            "keys_file": str(tmp_path / "keys.yaml"),
            "accounts": valkey.url,
            "ledger": ledger.address,
            "discovery": "open",  # routers look at the models
            "shutdown_delay_seconds": LEAVING_S,
        }
        replicas = [Replica(tmp_path / f"replica{n}", settings, 0.1) for n in range(3)]
        for replica in replicas:
            stack.callback(replica.kill)
            replica.wait_ready()
        urls = [replica.url for replica in replicas]
        doors = []
        for door in ("envoy", "vllm-router"):
            place = tmp_path / door
            url, _ = stack.enter_context(opened(DOORS[door], urls, place))
            doors.append(url)

        # Each is replaced by another.
        with Load(doors, keys) as load:
            load.wait_answered(50)
            for replica in replicas:
                replica.stop()
                replica.start()
                replica.wait_ready()
                load.wait_answered(50)
        assert load.lost() == []
        assert all('"message": "chat"' in replica.log for replica in replicas)
        assert {outcome.status for outcome in load.outcomes if outcome.user != "bounded"} == {200}
        told = load.told()
        wait_until(lambda: written(ledger) == told)

        # One stands still, then is gone.
        killed = replicas[0]
        with Load(doors, keys) as load:
            load.wait_answered(50)
            killed.process.send_signal(signal.SIGSTOP)
            stopped_at = time.time()
            time.sleep(LEAVING_S + STUCK_S)  # doors send it nothing any more
            killed_at = time.monotonic()
            killed.kill()
            load.wait_answered(100)
        assert load.lost()
        for outcome in load.lost():  # was on the one that was killed
            assert outcome.begun < killed_at - STUCK_S
            assert outcome.ended > killed_at
        told += load.told()
        unsaid = logged(killed, stopped_at - 2)

        def agrees() -> bool:
            has = written(ledger)
            return all(told[key] - unsaid[key] <= has[key] <= told[key] for key in told)

        wait_until(agrees)

        # What the dead one held of a user's places is free again.
        def all_at_once() -> bool:
            with Load(doors[:1], {"bounded": keys["bounded"]}) as load:
                time.sleep(1)
            return {outcome.status for outcome in load.outcomes} == {200}

        wait_until(all_at_once)
