"""Batches on the real engine: the answers that requests have, and places given back to users."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from serving import wait_until

if TYPE_CHECKING:
    from serving import Running

QUESTION = "What is the difference between an Orca, Dolphin and a Seal?"
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 40},
    "/v1/responses": {"input": QUESTION, "max_output_tokens": 40},
    "/v1/completions": {"prompt": f"USER: {QUESTION}\nASSISTANT:", "max_tokens": 40},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 40},
}


def begin(live: Running, path: str, bodies: list[dict[str, Any]]) -> str:
    lines = [
        {"custom_id": f"{n}", "method": "POST", "url": path, "body": body}
        for n, body in enumerate(bodies)
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = live.client.files.create(file=content, purpose="batch")
    endpoint: Any = path
    return live.client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h"
    ).id


def outputs(live: Running, batch: str) -> list[dict[str, Any]]:
    """What came of each line, in the order of the lines."""
    wait_until(lambda: live.client.batches.retrieve(batch).status == "completed", 120)
    done = live.client.batches.retrieve(batch)
    assert done.output_file_id is not None, live.client.files.content(done.error_file_id or "").text
    text = live.client.files.content(done.output_file_id).text
    told = sorted(map(json.loads, text.splitlines()), key=lambda line: int(line["custom_id"]))
    return [line["response"]["body"] for line in told]


def texts(body: Any) -> list[str]:
    """All texts in an answer, whatever its form."""
    if isinstance(body, dict):
        own = [value for key, value in body.items() if key in ("text", "content")]
        return [t for t in own if isinstance(t, str)] + [
            text for value in body.values() for text in texts(value)
        ]
    return [text for value in body for text in texts(value)] if isinstance(body, list) else []


@pytest.mark.parametrize("path", BODIES)
def test_answers_are_those_of_requests(live: Running, path: str) -> None:
    """Greedy, to the byte, on every route for text."""
    body = {"model": "synthia-demo", "temperature": 0} | BODIES[path]
    plain = texts(httpx.post(f"{live.url}{path}", json=body).json())
    assert plain
    assert plain[-1].strip()
    assert [texts(found) for found in outputs(live, begin(live, path, [body, body]))] == [plain] * 2


def test_a_user_gets_the_engine_back(live: Running) -> None:
    """Lines are taken out for a user, and find their prompts in the prefix cache afterwards."""
    # More than two of the prefix cache's blocks, which have 128 tokens on a CPU.
    story = " ".join(f"word{n}" for n in range(100))
    bodies = [
        {"model": "synthia-demo", "prompt": f"{n} {story}", "max_tokens": 300, "ignore_eos": True}
        for n in range(50)
    ]
    before = live.value("synthia_batch_given_back_total")
    cached = live.value("synthia_cached_prompt_tokens_total", model="synthia-demo")
    ran = _prompts_that_ran(live)
    batch = begin(live, "/v1/completions", bodies)
    wait_until(lambda: _prompts_that_ran(live) - ran > 40 * 256)
    assert live.value("synthia_batch_running") == 50
    with live.client.chat.completions.stream(
        model="synthia-demo", messages=MESSAGES, temperature=0
    ) as stream:
        assert stream.get_final_completion().choices[0].message.content
    assert live.value("synthia_batch_given_back_total") - before > 30
    found = outputs(live, batch)
    assert len(found) == 50
    assert {body["usage"]["completion_tokens"] for body in found} == {300}
    again = live.value("synthia_cached_prompt_tokens_total", model="synthia-demo") - cached
    assert again > 30 * 256


def _prompts_that_ran(live: Running) -> float:
    """vLLM's count of prompts' tokens."""
    return sum(
        sample.value
        for family in live.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "vllm:prompt_tokens_total"
    )
