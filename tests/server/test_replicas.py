"""Three servers with one Valkey, as processes that are killed: limits hold over all of them."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import httpx
from chat_api import BODY, key_file
from replicas import Clients, Replica
from serving import wait_until
from valkey_server import Server, valkey_server

from synthia_vllm.admission.fleet import _HOLD_SECONDS
from synthia_vllm.admission.line import LEASE, REPLICAS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MOST = 6
BESIDE = MOST + MOST // 2  # without Valkey: what one held, and beside it the other's part
A_MINUTE = 120


def was_alone(replica: Replica) -> bool:
    """Whether it ever decided without Valkey, which a busy machine can make too slow."""
    return "not shared" in replica.log


class Flood(Clients):
    """Clients of one user at every replica, who ask again at once; what came of it."""

    def __init__(self, replicas: list[Replica], headers: dict[str, str], clients: int) -> None:
        super().__init__()
        self.statuses: dict[str, list[int]] = {replica.url: [] for replica in replicas}
        self.running: list[tuple[float, float]] = []
        """From when to when answers were surely in the making."""
        self._headers = headers
        self.threads = [
            threading.Thread(target=self._ask, args=(replica.url,))
            for replica in replicas
            for _ in range(clients)
        ]

    def _ask(self, url: str) -> None:
        with httpx.Client(base_url=url, headers=self._headers, timeout=30) as client:
            while not self.over.is_set():
                try:
                    with client.stream(
                        "POST", "/v1/chat/completions", json=BODY | {"stream": True}
                    ) as response:
                        begun, last = time.monotonic(), 0.0
                        try:
                            for _ in response.iter_raw():
                                last = time.monotonic()
                        finally:
                            if response.status_code == 200 and last:
                                self.running.append((begun, last))
                    self.statuses[url].append(response.status_code)
                except httpx.TransportError:
                    self.statuses[url].append(0)
                if self.statuses[url][-1] != 200:
                    time.sleep(0.05)

    def most_at_a_time(self) -> int:
        changes = sorted([(begun, 1) for begun, _ in self.running]
                         + [(ended, -1) for _, ended in self.running])  # fmt: skip
        now = most = 0
        for _, change in changes:
            now += change
            most = max(most, now)
        return most


@contextmanager
def fleet(place: Path, valkey: Server, number: int) -> Iterator[list[Replica]]:
    """So many servers, ready and known to each other."""
    settings = {"keys_file": str(place / "keys.yaml"), "accounts": valkey.url}
    replicas = [Replica(place / f"replica{i}", settings) for i in range(number)]
    try:
        for replica in replicas:
            replica.wait_ready()
        wait_until(lambda: all(r.gauge("synthia_accounts_replicas") == number for r in replicas))
        yield replicas
    finally:
        for replica in replicas:
            replica.kill()


def test_limits_hold_while_replicas_and_valkey_are_killed(tmp_path: Path) -> None:
    """Users at their limits from all sides: none has more, and nothing but the killed is lost."""
    keys = key_file(
        tmp_path / "keys.yaml",
        wide={"concurrent_requests": MOST},
        often={"requests_per_minute": A_MINUTE},
    )
    with valkey_server() as valkey, fleet(tmp_path, valkey, 3) as replicas:
        begun = time.monotonic()
        first, second, killed = replicas
        oftens: list[Flood] = []

        # All three, from all sides.
        with Flood(replicas, keys["wide"], 4) as wide, Flood(replicas, keys["often"], 2) as often:
            oftens.append(often)
            wait_until(lambda: len(wide.running) >= 5 * MOST)
            # One of them dies in the middle of its answers.
            killed.process.kill()
            wait_until(lambda: 0 in wide.statuses[killed.url])
            dead_at = time.monotonic()
            wait_until(lambda: first.gauge("synthia_accounts_replicas") == 2)
            assert time.monotonic() - dead_at < 2 * LEASE
            so_far = len(wide.running)
            wait_until(lambda: len(wide.running) >= so_far + 4 * MOST)
        alone = any(map(was_alone, replicas))
        assert MOST <= wide.most_at_a_time() <= (BESIDE if alone else MOST)
        survivors = (first.url, second.url)
        for flood in (wide, often):
            assert {s for url in survivors for s in flood.statuses[url]} <= {200, 429}
        after = [entry for entry in wide.running if entry[0] > dead_at + LEASE + 1]
        wide.running = after
        # What the dead one held is free.
        assert MOST <= wide.most_at_a_time() <= (BESIDE if alone else MOST)

        # Valkey dies, and comes again with nothing.
        left = [first, second]
        with Flood(left, keys["wide"], 6) as wide, Flood(left, keys["often"], 2) as often:
            oftens.append(often)
            wait_until(lambda: len(wide.running) >= 2 * MOST)
            valkey.kill()
            wait_until(lambda: not any(r.gauge("synthia_accounts_reachable") for r in left))
            so_far = len(wide.running)
            wait_until(lambda: len(wide.running) >= so_far + 2 * MOST)
            valkey.start()
            wait_until(lambda: all(r.gauge("synthia_accounts_reachable") for r in left))
            valkey.ask("FLUSHALL")
            wait_until(lambda: valkey.ask("ZCARD", REPLICAS) == 2)
            time.sleep(_HOLD_SECONDS)
            back_at = time.monotonic()
            so_far = len(wide.running)
            wait_until(lambda: len(wide.running) >= so_far + 4 * MOST)
        for flood in (wide, often):
            assert {s for statuses in flood.statuses.values() for s in statuses} <= {200, 429}
        assert wide.most_at_a_time() <= BESIDE
        wide.running = [entry for entry in wide.running if entry[0] > back_at]
        assert MOST <= wide.most_at_a_time() <= BESIDE

        # All that was taken of the bucket, over all of this.
        served = sum(
            statuses.count(200) for flood in oftens for statuses in flood.statuses.values()
        )
        allowed = A_MINUTE * (1 + (time.monotonic() - begun) / 60)
        assert 0.8 * allowed - 6 <= served <= allowed + 2
