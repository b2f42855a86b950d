"""Conversations that are too long for the context."""

from __future__ import annotations

import openai
import pytest
from chat_api import BODY, PIECES, post
from serving import Running, running

from synthia_vllm.engine.fake import FakeEngine


def long_conversation(turns: int) -> list[dict[str, str]]:
    """A system message, `turns` exchanges of about 100 fake tokens each, and a question."""
    messages = [{"role": "system", "content": "S" * 50}]
    for turn in range(turns):
        messages += [
            {"role": "user", "content": f"question {turn} " + "x" * 30},
            {"role": "assistant", "content": f"answer {turn} " + "y" * 30},
        ]
    return [*messages, {"role": "user", "content": "last"}]


def test_overflow_error(server: Running) -> None:
    """A prompt beyond the context is a 400 that says the tokens counted and the limit."""
    error = post(server, BODY | {"messages": long_conversation(40)}).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "2048" in error["message"]
    client = server.client
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="synthia-demo", messages=long_conversation(40))  # type: ignore[arg-type]
    assert caught.value.code == "context_length_exceeded"


def test_hopeless_prompts_are_not_counted_to_the_end(server: Running) -> None:
    """What cannot fit by its length alone is refused without the work of tokenising all of it."""
    content = "x" * 500_000
    error = post(server, BODY | {"messages": [{"role": "user", "content": content}]}).json()[
        "error"
    ]
    assert error["code"] == "context_length_exceeded"
    assert "at least 2050 tokens" in error["message"]


def test_max_tokens_is_cut_to_the_room(server: Running) -> None:
    """`max_tokens` beyond what the context leaves is cut to it, up to the last token."""
    content = "x" * (2048 - len("USER: \nASSISTANT:") - 1 - 1)
    body = BODY | {"messages": [{"role": "user", "content": content}], "max_tokens": 10**9}
    answer = post(server, body).json()
    assert answer["usage"]["prompt_tokens"] == 2047
    assert server.engine.seen[-1].sampling.max_tokens == 1  # type: ignore[attr-defined]
    body["messages"] = [{"role": "user", "content": content + "x"}]
    assert post(server, body).json()["error"]["code"] == "context_length_exceeded"


def test_overflow_drop_oldest() -> None:
    """Whole exchanges go, oldest first, as few as it takes; header and usage say how many."""
    with running(FakeEngine(PIECES), overflow="drop-oldest") as server:
        messages = long_conversation(40)
        response = post(server, BODY | {"messages": messages})
        dropped = int(response.headers["x-synthia-dropped-messages"])
        usage = response.json()["usage"]
        assert usage["prompt_tokens_details"]["dropped_messages"] == dropped
        assert dropped % 2 == 0
        work = server.engine.seen[-1]  # type: ignore[attr-defined]
        text = b"".join(server.engine.token_bytes(i) for i in work.prompt_token_ids).decode()
        first = dropped // 2
        assert text.startswith("SYSTEM: " + "S" * 50 + f"\nUSER: question {first} ")
        assert text.endswith("\nUSER: last\nASSISTANT:")
        # One exchange fewer dropped would not have left the reserve.
        one_more = len(f"USER: question {first} \nASSISTANT: answer {first} \n") + 60
        assert usage["prompt_tokens"] + 256 <= 2048 < usage["prompt_tokens"] + 256 + one_more
        streamed = post(server, BODY | {"messages": messages, "stream": True})
        assert streamed.headers["x-synthia-dropped-messages"] == str(dropped)
        short = post(server, BODY)
        assert "x-synthia-dropped-messages" not in short.headers
        huge = post(server, BODY | {"messages": [{"role": "user", "content": "x" * 3000}]})
        assert huge.json()["error"]["code"] == "context_length_exceeded"
