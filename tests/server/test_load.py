"""`benchmarks/load.py` as a command, on a server that refuses and breaks off."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from serving import running

from synthia_vllm.engine.fake import FakeEngine
from synthia_vllm.errors import EngineFault, Unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from synthia_vllm.engine.base import EngineRequest, Sink
    from synthia_vllm.engine.fake import FakeOutput

ROOT = Path(__file__).parents[2]


class Moody(FakeEngine):
    """Of every seven requests, the third is refused and the fifth breaks off after a word."""

    @asynccontextmanager
    async def submit(self, request: EngineRequest, sink: Sink) -> AsyncGenerator[None, None]:
        if len(self.seen) % 7 == 2:
            self.seen.append(request)
            raise Unavailable("Full.", code="overloaded")
        async with super().submit(request, sink):
            yield

    async def _speak(
        self, request: EngineRequest, sink: Sink, made: list[list[FakeOutput]]
    ) -> None:
        if self.seen.index(request) % 7 == 4:
            sink.put(self._steps(request)[0][0], 0)
            sink.fail(EngineFault())
        else:
            await super()._speak(request, sink, made)


def test_a_run(tmp_path: Path) -> None:
    """The command measures a server by vLLM's code; it counts refusals apart from broken answers,
    and shows the key to nobody."""
    file = tmp_path / "found.json"
    command = [sys.executable, f"{ROOT}/benchmarks/load.py", "--api-key", "swordfish"]
    command += ["--rate", "500", "--requests", "34", "--warmup", "1", "--json", str(file)]
    command += ["--goodput", "ttft:60000", "itl:60000"]
    with running(Moody()) as server:
        done = subprocess.run(
            [*command, "--url", f"{server.url}/v1"], check=True, capture_output=True, text=True
        )
    shown = file.read_text()
    found = json.loads(shown)
    assert (found["num_prompts"], found["completed"], found["failed"]) == (34, 24, 10)
    assert (found["refused"], found["errors"]) == (5, 5)
    assert list(found["refused_by_reason"]) == ["503: Service Unavailable"]
    assert list(found["errors_by_reason"]) == ["200: The stream ended without its usage."]
    assert found["good_share"] == 24 / 34
    assert found["total_output_tokens"] == 24 * len(" Hello.\nUSER:")
    assert found["total_input_tokens"] > found["asked_input_tokens"] == 24 * 128
    for measure in ("ttft", "itl", "tpot", "e2el"):
        assert 0 < found[f"p50_{measure}_ms"] <= found[f"p99_{measure}_ms"]
    assert "| TTFT |" in done.stdout
    assert "swordfish" not in done.stdout + done.stderr + shown
