"""Replace one server by another under load, as a rolling update does, and count what users notice.

Two real servers with the demo model, and clients as a cluster has them: a new connection goes to
one of the servers that are listed, a connection that is kept alive stays where it is. The new
server is listed when it is ready; the old one gets SIGTERM at the moment its listing ends, which
clients learn `--lag` seconds later, as with endpoints in Kubernetes. Answers are greedy, so each
can be compared with the first to the same question.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import signal
import time
from collections import Counter
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field

import aiohttp
from lib.client import serve
from lib.report import say, table
from lib.servers import heed_sigterm

QUESTIONS = ("What is the tallest mountain?", "Tell me a story.", "What is rain?")
_SETTLED_SECONDS = 2.0  # of load before and after the swap


@dataclass
class Swap:
    """What happened to all requests of one swap."""

    delay: float
    """The servers' `shutdown_delay_seconds`."""
    outcomes: Counter[str] = field(default_factory=Counter)
    """Requests by what became of them; ``answered`` is a whole and right answer."""
    answered_by: Counter[str] = field(default_factory=Counter)
    exit_code: int | None = None
    """Of the old server."""
    leaving_seconds: float = 0.0
    """From SIGTERM to the end of the old server."""

    @property
    def failed(self) -> int:
        """Requests that a user would have to repeat."""
        return self.outcomes.total() - self.outcomes["answered"]


class _Clients:
    """Users who ask one question after the other on connections that they keep."""

    def __init__(self, swap: Swap) -> None:
        self._swap = swap
        self._right: dict[str, str] = {}
        self.listed: list[str] = []
        self.over = False

    async def ask_on(self, number: int) -> None:
        """One user, until it is over."""
        questions = itertools.cycle(QUESTIONS[number % 3 :] + QUESTIONS[: number % 3])
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as session:
            url = ""
            while not self.over:
                url = url or random.choice(self.listed)
                if not await self._ask(session, url, next(questions)):
                    url = ""
                self._swap.answered_by[url] += 1
                await asyncio.sleep(random.uniform(0, 0.2))

    async def _ask(self, session: aiohttp.ClientSession, url: str, question: str) -> bool:
        """One request; returns whether its connection can be used again."""
        body = {
            "model": "synthia-demo",
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 48,
        }
        try:
            async with session.post(f"{url}/v1/chat/completions", json=body) as response:
                answer = await response.json()
                kept = response.headers.get("Connection", "").lower() != "close"
                outcome = str(response.status)
                if response.status == 200:
                    text = answer["choices"][0]["message"]["content"]
                    right = self._right.setdefault(question, text)
                    outcome = "answered" if text == right else "wrong"
        except (aiohttp.ClientError, ConnectionError, ValueError) as error:
            outcome, kept = type(error).__name__, False
        self._swap.outcomes[outcome] += 1
        say(f"delay {self._swap.delay:g} s: {dict(self._swap.outcomes)}")
        return kept


async def swap_servers(*, delay: float, lag: float, users: int) -> Swap:
    """Offer load with `users`, swap the servers, and return what became of it."""
    swap = Swap(delay)
    clients = _Clients(swap)
    options = ("--set", f"shutdown_delay_seconds={delay}")
    async with AsyncExitStack() as servers:
        old = await servers.enter_async_context(serve(*options))
        clients.listed = [old.url]
        asking = [asyncio.create_task(clients.ask_on(number)) for number in range(users)]
        try:
            new = await servers.enter_async_context(serve(*options))
            clients.listed = [old.url, new.url]
            await asyncio.sleep(_SETTLED_SECONDS)
            told = time.monotonic()
            old.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(lag)
            clients.listed = [new.url]
            swap.exit_code = await old.process.wait()
            swap.leaving_seconds = time.monotonic() - told
            await asyncio.sleep(_SETTLED_SECONDS)
        finally:
            clients.over = True
            await asyncio.gather(*asking)
            say("")
    return swap


async def main() -> None:
    """Parse, swap, print."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python benchmarks/swap.py --delays 0 8 --users 20",
    )
    parser.add_argument("--delays", type=float, nargs="+", default=[0, 8], metavar="SECONDS")
    parser.add_argument("--lag", type=float, default=2, metavar="SECONDS")
    parser.add_argument("--users", type=int, default=8)
    arguments = parser.parse_args()
    heed_sigterm()
    rows: list[tuple[object, ...]] = [
        (
            "shutdown_delay_seconds",
            "requests",
            "failed",
            "of which",
            "old server ended after",
            "with",
        )
    ]
    for delay in arguments.delays:
        swap = await swap_servers(delay=delay, lag=arguments.lag, users=arguments.users)
        failures = ", ".join(
            f"{n} x {what}" for what, n in swap.outcomes.items() if what != "answered"
        )
        rows.append(
            (
                f"{delay:g}",
                swap.outcomes.total(),
                swap.failed,
                failures or "-",
                f"{swap.leaving_seconds:.1f} s",
                f"exit code {swap.exit_code}",
            )
        )
    print(table(rows))


if __name__ == "__main__":
    with suppress(asyncio.CancelledError, KeyboardInterrupt):
        asyncio.run(main())
