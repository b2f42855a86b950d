"""Every token that ran is charged, whatever way its request ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import pytest
from serving import wait_until

if TYPE_CHECKING:
    from serving import Running

LONG: dict[str, Any] = {
    "model": "synthia-demo",
    "messages": [{"role": "user", "content": "Hello!"}],
    "temperature": 0,
    "logit_bias": {"264": 100},  # "a a a a": nothing but `max_tokens` ends it
    "max_tokens": 450,
}
RAW: dict[str, Any] = {
    "model": "synthia-demo",
    "prompt": ["One", "Two and three"],
    "logit_bias": {"264": 100},
    "max_tokens": 450,
}


def books(live: Running) -> dict[str, float]:
    """What was counted of prompts and answers, by the edge and by vLLM."""
    found = {"answer": 0.0, "prompt": 0.0, "vllm answer": 0.0, "vllm prompt": 0.0}
    names = {
        "synthia_answer_tokens_total": "answer",
        "synthia_prompt_tokens_total": "prompt",
        "vllm:generation_tokens_total": "vllm answer",
        "vllm:prompt_tokens_total": "vllm prompt",
    }
    for family in live.metrics.registry.collect():
        for sample in family.samples:
            if sample.name in names:
                found[names[sample.name]] += sample.value
    return found


def ledger(live: Running) -> dict[str, float]:
    """What was counted of the user that all are without keys, by the ledger."""
    told = httpx.get(f"{live.url}/v1/usage", params={"by": "route"}).json()["data"]
    names = ("requests", "prompt_tokens", "answer_tokens")
    return {name: sum(row[name] for row in told) for name in names}


def leave(live: Running, path: str, body: dict[str, Any]) -> None:
    """Ask, and hang up when some tokens have run."""
    before = books(live)["vllm answer"]
    with httpx.Client() as client, client.stream("POST", f"{live.url}{path}", json=body) as answer:
        if body.get("stream"):
            lines = answer.iter_lines()
            for _ in range(12):
                next(lines)
        else:
            wait_until(lambda: books(live)["vllm answer"] > before + 5)


def leave_plain(live: Running, path: str, body: dict[str, Any]) -> None:
    """Ask, without waiting for the response to begin, and hang up when some tokens have run."""
    before = books(live)["vllm answer"]
    with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=httpx.Timeout(60, read=0.4)) as it:
        it.post(f"{live.url}{path}", json=body)
    wait_until(lambda: books(live)["vllm answer"] > before)


def deadline(live: Running, path: str, body: dict[str, Any]) -> None:
    """Ask for less time than the answer takes."""
    headers = {"X-Request-Timeout": "0.4"}
    response = httpx.post(f"{live.url}{path}", json=body, headers=headers, timeout=60)
    assert "deadline_exceeded" in response.text


def whole(live: Running, path: str, body: dict[str, Any]) -> None:
    """Ask, and read it all."""
    assert httpx.post(f"{live.url}{path}", json=body, timeout=60).status_code == 200


CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.mark.parametrize(
    ("end", "path", "body"),
    [
        (leave, CHAT, LONG | {"stream": True}),
        (leave_plain, CHAT, LONG),
        (leave, CHAT, LONG | {"stream": True, "n": 3, "temperature": 1}),
        (leave_plain, CHAT, LONG | {"n": 3, "temperature": 1}),
        (leave, CHAT, LONG | {"stream": True, "logprobs": True}),
        (leave_plain, CHAT, LONG | {"min_tokens": 5}),
        (leave, COMPLETIONS, RAW | {"stream": True}),
        (leave_plain, COMPLETIONS, RAW),
        (deadline, CHAT, LONG | {"stream": True}),
        (deadline, CHAT, LONG),
        (deadline, COMPLETIONS, RAW | {"n": 2}),
        (whole, CHAT, LONG | {"logit_bias": None, "temperature": 0.75, "n": 3}),
        (whole, CHAT, LONG | {"logit_bias": None, "stream": True, "min_tokens": 40}),
        (whole, CHAT, LONG | {"response_format": {"type": "json_object"}, "max_tokens": 20}),
        (whole, COMPLETIONS, RAW | {"max_tokens": 0, "echo": True, "logprobs": 1}),
    ],
)
def test_the_books_agree(live: Running, end: Any, path: str, body: dict[str, Any]) -> None:
    """The edge has counted the tokens that vLLM has, to the token, and so has the ledger."""
    before, written = books(live), ledger(live)
    end(live, path, body)
    wait_until(lambda: live.app.server_state.in_flight == 0)

    def gone(name: str) -> float:
        return books(live)[name] - before[name]

    wait_until(lambda: gone("answer") == gone("vllm answer"))
    assert gone("answer") > 0
    # vLLM runs, and counts, a prompt once for each of its answers; here it is counted once.
    assert gone("prompt") * body.get("n", 1) == gone("vllm prompt")
    wait_until(lambda: ledger(live)["requests"] > written["requests"])
    for kind in ("prompt", "answer"):
        name = f"{kind}_tokens"
        assert ledger(live)[name] - written[name] == gone(kind)
