"""Models, metrics, and the API's own description."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import httpx
import pytest
from chat_api import BODY, PIECES, post
from serving import Running, running

from synthia_vllm.engine.examples import examples
from synthia_vllm.engine.fake import FakeEngine

if TYPE_CHECKING:
    from pathlib import Path


def test_models(server: Running) -> None:
    """Both names are listed with the context's size, and can be asked for one by one."""
    client = server.client
    listed = client.models.list().data
    assert [m.id for m in listed] == ["synthia-demo", "synthia-demo-tot"]
    assert (listed[0].model_extra or {})["max_model_len"] == 2048
    assert client.models.retrieve("synthia-demo-tot").id == "synthia-demo-tot"


def test_examples_of_a_model(server: Running) -> None:
    """A model that knows certain questions only lists them under each name; others list none."""
    assert "examples" not in httpx.get(f"{server.url}/v1/models").text
    info = replace(FakeEngine().model_info, examples=("Hello!", "How are you?"))
    with running(FakeEngine(model_info=info)) as demo:
        cards = httpx.get(f"{demo.url}/v1/models").json()["data"]
        assert [card["examples"] for card in cards] == [["Hello!", "How are you?"]] * 2
        assert {card["root"] for card in cards} == {"demo"}
        assert httpx.get(f"{demo.url}/v1/models/synthia-demo").json() == cards[0]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, ()),
        (b'["Hello!", "\xc3\xa9?"]', ("Hello!", "é?")),
        (b"[]", ()),
        (b'["Hello!"', ()),
        (b'{"Hello!": 1}', ()),
        (b'["Hello!", 1]', ()),
        (b'["\\ud800"]', ()),
        (b"\xff", ()),
        (b"[" * 60_000, ()),
        (b'["' + b"x" * (1 << 20) + b'"]', ()),
    ],
    ids=["no file", "fine", "empty", "cut off", "object", "number", "half a character", "no UTF-8",
         "deep", "long"],
)  # fmt: skip
def test_examples_in_the_models_directory(
    content: bytes | None, expected: tuple[str, ...], tmp_path: Path
) -> None:
    """They are read if the file is what it should be, and it is never an error."""
    if content is not None:
        (tmp_path / "examples.json").write_bytes(content)
    assert examples(str(tmp_path)) == expected


def test_metrics_count_what_happened() -> None:
    """Each series of the edge moves by what one request of each kind did, and no more."""
    with running(FakeEngine(PIECES)) as server:
        messages = [{"role": "user", "content": "a\nUSER: b"}]
        plain = post(server, BODY | {"messages": messages}).json()["usage"]
        post(server, BODY | {"stream": True})
        post(server, BODY | {"n": 1000})
        post(server, BODY | {"model": "nobody's"})
        httpx.get(f"{server.url}/v1/models")
        httpx.get(f"{server.url}/unknown/path")
        name = {"model": "synthia-demo"}
        chat = {"route": "/v1/chat/completions"}
        assert server.value("synthia_requests_total", status="200", **chat, **name) == 2
        assert server.value("synthia_requests_total", status="400", model="", **chat) == 1
        assert server.value("synthia_requests_total", status="404", model="", **chat) == 1
        assert server.value("synthia_requests_total", route="other", model="", status="404") == 1
        assert server.value("synthia_finished_total", reason="stop", **name) == 2
        assert server.value("synthia_time_to_first_token_seconds_count", **name) == 1
        assert server.value("synthia_inter_token_latency_seconds_count", **name) == 2
        assert server.value("synthia_time_per_output_token_seconds_count", **name) == 2
        assert server.value("synthia_end_to_end_seconds_count", **name) == 2
        assert server.value("synthia_answer_tokens_total", **name) == 2 * plain["completion_tokens"]
        assert server.value("synthia_escaped_markers_total", **name) == 1
        shown = httpx.get(f"{server.url}/metrics").text
        assert "nobody" not in shown
        assert "unknown/path" not in shown


def test_openapi_describes_the_chat_route(server: Running) -> None:
    """The OpenAPI document has every route and every field of a chat request."""
    document = httpx.get(f"{server.url}/openapi.json").json()
    assert "/v1/chat/completions" in document["paths"]
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "stop", "top_k", "response_format"} <= set(fields)
