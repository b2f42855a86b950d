"""The server's life: starting, serving, leaving, draining, dead; and what it keeps."""

from __future__ import annotations

import asyncio
import json
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx
from serving import Running, running, wait_until

from synthia_vllm.engine.fake import FakeEngine
from synthia_vllm.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
from chat_api import BODY, PIECES, events, key_file, post


class _Slow(FakeEngine):
    """Starts when it is told to."""

    async def start(self, progress: Callable[[str], None]) -> None:
        await asyncio.to_thread(wait_until, lambda: not self.dead)


def test_phases() -> None:
    """`/health` and `/ready` tell starting, serving, draining and dead apart, as do requests."""

    def statuses(server: Running) -> tuple[int, int, int]:
        paths = ("/health", "/ready")
        found = [httpx.get(server.url + path).status_code for path in paths]
        return found[0], found[1], post(server).status_code

    engine = _Slow(PIECES, dead=True)
    with running(engine, ready=False) as server:
        assert statuses(server) == (503, 503, 503)
        assert post(server).headers["retry-after"]
        engine.dead = False
        wait_until(lambda: server.app.server_state.phase == "serving")
        assert statuses(server) == (200, 200, 200)
        server.app.server_state.drain()
        assert statuses(server) == (200, 503, 503)
        server.app.server_state._phase = "serving"
        engine.dead = True
        wait_until(lambda: server.app.server_state.phase == "dead")
        assert statuses(server) == (503, 503, 503)
        assert post(server).json()["error"]["code"] == "engine_dead"


class _Broken(FakeEngine):
    """Does not start."""

    async def start(self, progress: Callable[[str], None]) -> None:
        raise StartupError("no weights")


def test_failed_start_is_known() -> None:
    """An engine that cannot start leaves its reason for the command line to print."""
    with running(_Broken(), ready=False) as server:
        wait_until(lambda: server.app.server_state.phase == "dead")
        assert str(server.app.server_state.failure) == "no weights"


def test_leaving() -> None:
    """SIGTERM with a delay: not ready, yet answering, each answer closing its connection."""
    with (
        running(FakeEngine(PIECES), shutdown_delay_seconds=1) as server,
        httpx.Client() as client,
    ):
        url = f"{server.url}/v1/chat/completions"
        assert "connection" not in client.post(url, json=BODY).headers
        server.server.handle_exit(signal.SIGTERM, None)
        assert httpx.get(f"{server.url}/ready").status_code == 503
        assert httpx.get(f"{server.url}/health").status_code == 200
        for stream in (False, True):
            answer = client.post(url, json=BODY | {"stream": stream})
            assert answer.status_code == 200
            assert answer.headers["connection"] == "close"
        wait_until(lambda: server.app.server_state.phase == "draining")


def test_the_end_of_the_grace_time_is_told() -> None:
    """SIGTERM: what is not finished in time gets an error event or a 503, not a broken pipe."""
    engine = FakeEngine((" a",) * 1000, delay=0.02)
    with running(engine, shutdown_grace_seconds=0.3) as server, ThreadPoolExecutor(2) as pool:
        streamed = pool.submit(post, server, BODY | {"stream": True})
        plain = pool.submit(post, server)
        wait_until(lambda: len(engine.seen) == 2)
        server.server.handle_exit(signal.SIGTERM, None)
        refused = post(server)
        assert refused.status_code == 503
        assert refused.headers["connection"] == "close"
        assert refused.headers["retry-after"]
        assert events(streamed.result())[-1]["error"]["code"] == "draining"
        assert plain.result().status_code == 503
        assert plain.result().json()["error"]["code"] == "draining"
    assert len(engine.aborted) == 2


def test_transcripts(tmp_path: Path) -> None:
    """Whole answers are kept, a file a user, as the card keeps them; a cut one is not."""
    file = tmp_path / "keys.yaml"
    keys = key_file(file, alice={}, bob={})
    place = tmp_path / "transcripts"
    with running(FakeEngine(PIECES), keys_file=file, transcripts={"directory": place}) as server:
        for stream in (False, True):
            assert post(server, BODY | {"stream": stream}, headers=keys["alice"]).status_code == 200
        post(server, BODY | {"n": 2}, headers=keys["bob"])
        post(server, BODY | {"n": 99}, headers=keys["bob"])
        wait_until(lambda: server.value("synthia_transcript_lines_total") == 4)
    line = {"prompt": "Hi", "answer": "Hello."}
    for name in ("alice", "bob"):
        found = (place / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(text) for text in found] == [line, line]


def test_transcripts_that_cannot_be_written(tmp_path: Path) -> None:
    """Answers go on when transcripts cannot be kept, and the loss is counted."""
    place = tmp_path / "transcripts"
    with running(FakeEngine(PIECES), transcripts={"directory": place}) as server:
        (place / "anonymous.jsonl").mkdir()  # whatever is in the way of writing
        assert post(server).status_code == 200
        wait_until(lambda: server.value("synthia_transcript_failures_total") == 1)
        assert post(server).status_code == 200
