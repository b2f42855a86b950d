"""The table of routes and features in docs/api.md, each cell against a server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from chat_api import BODY, key_file
from serving import Running, running

from synthia_vllm.engine.fake import FakeEngine

if TYPE_CHECKING:
    from collections.abc import Iterator

API = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
NONE = "\N{EN DASH}"
SCHEMA = {"type": "object", "properties": {}, "additionalProperties": False}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": BODY,
    "/v1/chat/completions/render": BODY,
    "/v1/responses": {"model": "synthia-demo", "input": "Hi"},
    "/v1/completions": {"model": "synthia-demo", "prompt": "Hi"},
    "/v1/completions/render": {"model": "synthia-demo", "prompt": "Hi"},
    "/v1/messages": BODY | {"max_tokens": 100},
    "/v1/messages/count_tokens": BODY,
}
STRUCTURED: dict[str, Any] = {
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
    "text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}},
    "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
}
LOGPROBS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"logprobs": True},
    "/v1/completions": {"logprobs": 1},
    "/v1/responses": {"include": ["message.output_text.logprobs"]},
}
COLUMNS = ("stream", "structured", "logprobs", "several answers", "usage", "limits")


def table() -> dict[str, dict[str, str]]:
    [head, _, *rows] = re.search(r"(\| route for text \|.*?)\n\n", API, re.DOTALL)[1].splitlines()  # type: ignore[index]
    names = [cell.strip() for cell in head.strip("|").split("|")]
    assert tuple(names[1:]) == COLUMNS
    found = {}
    for row in rows:
        path, *cells = (cell.strip().strip("`") for cell in row.strip("|").split("|"))
        found[path] = dict(zip(COLUMNS, cells, strict=True))
    return found


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, dict[str, Any]]]:
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    keys = key_file(file, free={}, bound={"requests_per_minute": 1})
    with running(FakeEngine(), keys_file=file) as server:
        yield server, keys


def test_the_table_has_every_route_for_text(here: tuple[Running, dict[str, Any]]) -> None:
    server, _ = here
    assert {route.path for route in server.app.generation} < set(table()) == set(BODIES)


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("path", BODIES)
def test_cell(here: tuple[Running, dict[str, Any]], path: str, column: str) -> None:
    """What the table says a route has, it does; what not, it refuses, or has nowhere."""
    server, keys = here
    engine: Any = server.engine
    cell = table()[path][column]

    def ask(more: dict[str, Any], user: str = "free") -> httpx.Response:
        return httpx.post(f"{server.url}{path}", json=BODIES[path] | more, headers=keys[user])

    def refused(field: str, value: Any) -> bool:
        """Whether the route takes no such field, or runs nothing in any case."""
        seen = len(engine.seen)
        told = ask({field: value})
        return told.status_code == 400 or len(engine.seen) == seen

    if column == "stream":
        told = ask({"stream": True})
        streamed = told.headers["content-type"].startswith("text/event-stream")
        assert streamed == (cell != NONE)
    elif column == "structured":
        if cell == NONE:
            assert refused("response_format", STRUCTURED["response_format"])
        else:
            assert ask({cell: STRUCTURED[cell]}).status_code == 200
            assert engine.seen[-1].sampling.grammar is not None
    elif column == "logprobs":
        if cell == NONE:
            assert refused("logprobs", True)
        else:
            assert cell in LOGPROBS[path]
            assert '"logprobs":null' not in ask(LOGPROBS[path]).text
            assert engine.seen[-1].sampling.logprobs is not None
    elif column == "several answers":
        if cell == NONE:
            assert refused("n", 2)
        else:
            assert len(ask({cell: 2}).json()["choices"]) == 2
    elif column == "usage":
        assert ("usage" in ask({}).json()) == (cell != NONE)
    else:
        assert ask({}, "bound").status_code in (200, 429)
        assert (ask({}, "bound").status_code == 429) == (cell != NONE)
