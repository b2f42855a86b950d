"""What clients and platforms ask for beside text: other headers, other names, other origins."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import pytest
from chat_api import BODY, events, key_file, post
from serving import Running, running, wait_until

from synthia_vllm.engine.base import ModelInfo
from synthia_vllm.engine.fake import FakeEngine
from synthia_vllm.engine.vllm.hub import revision_of
from synthia_vllm.errors import EngineFault

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ORIGIN = "https://chat.example.com"


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, str]]:
    """A server that wants keys, and one."""
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    key = key_file(file, alice={})["alice"]["Authorization"].removeprefix("Bearer ")
    with running(FakeEngine(), keys_file=file, cors_origins=[ORIGIN]) as here:
        yield here, key


def test_keys_by_either_header(keyed: tuple[Running, str]) -> None:
    """`X-Api-Key` on every route; `Authorization` decides where both are there."""
    here, key = keyed
    good, bad = {"X-Api-Key": key}, {"X-Api-Key": "sk-synthia-no"}
    for url in ("/v1/models", "/version", "/load"):
        assert httpx.get(here.url + url, headers=good).status_code == 200
        assert httpx.get(here.url + url, headers=bad).status_code == 401
    assert post(here, headers=good).status_code == 200
    assert post(here, headers=bad).status_code == 401
    assert post(here, headers=bad | {"Authorization": f"Bearer {key}"}).status_code == 200
    assert post(here, headers=good | {"Authorization": "Bearer no"}).status_code == 401


def test_pages_of_other_origins(keyed: tuple[Running, str]) -> None:
    """Those on the list may ask, read and see headers, errors and streams too; others may not."""
    here, key = keyed
    url = f"{here.url}/v1/chat/completions"
    asks = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    allowed = httpx.options(url, headers=asks)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    assert "authorization" in allowed.headers["access-control-allow-headers"]
    assert httpx.options(url, headers=asks | {"Origin": "https://evil.example"}).status_code == 400
    mine = {"Origin": ORIGIN, "Authorization": f"Bearer {key}"}
    for body in (BODY, BODY | {"stream": True}, BODY | {"model": "x"}):
        told = httpx.post(url, json=body, headers=mine)
        assert told.headers["access-control-allow-origin"] == ORIGIN
        assert told.headers["access-control-expose-headers"] == "*"
        other = httpx.post(url, json=body, headers=mine | {"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
    assert events(httpx.post(url, json=BODY | {"stream": True}, headers=mine))


def test_by_default_no_page_of_another_origin(server: Running) -> None:
    told = post(server, headers={"Origin": ORIGIN})
    assert not [name for name in told.headers if name.startswith("access-control")]
    asks = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    assert httpx.options(f"{server.url}/v1/models", headers=asks).status_code == 405


def test_fingerprints_tell_what_answers(server: Running) -> None:
    """In each form of an answer, and another one for another engine, model or spelling."""
    raw = {"model": "synthia-demo", "prompt": "a"}
    plain = [
        post(server).json(),
        httpx.post(f"{server.url}/v1/completions", json=raw).json(),
        *events(post(server, BODY | {"stream": True})),
        *events(httpx.post(f"{server.url}/v1/completions", json=raw | {"stream": True})),
    ]
    [ours] = {each["system_fingerprint"] for each in plain}
    assert ours.startswith("fp_")
    other = [
        {"engine": FakeEngine(model_info=info(versions={"vllm": "0.33"}))},
        {"engine": FakeEngine(model_info=info(revision="abc"))},
        {"engine": FakeEngine(), "format": "example"},
    ]
    prints = {ours}
    for changes in other:
        with running(**changes) as here:  # type: ignore[arg-type]
            prints.add(post(here).json()["system_fingerprint"])
    assert len(prints) == 4


def info(**changes: object) -> ModelInfo:
    return ModelInfo(2048, 32000, 1, **changes)  # type: ignore[arg-type]


def test_revisions_of_directories(tmp_path: Path) -> None:
    """Other files are another revision; the hub's own word comes first."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    first = revision_of(str(tmp_path), None)
    assert first == revision_of(str(tmp_path), None)
    (tmp_path / "config.json").write_text("[]")
    second = revision_of(str(tmp_path), None)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 101)
    assert len({first, second, revision_of(str(tmp_path), None)}) == 3
    assert revision_of(str(tmp_path), "abc") == "abc"
    assert revision_of("owner/name", None) == "owner/name"


def test_render_tells_tokens_by_both_names(server: Running) -> None:
    told = httpx.post(f"{server.url}/v1/chat/completions/render", json=BODY).json()
    assert told["token_ids"] == told["prompt_token_ids"]
    assert len(told["token_ids"]) == told["count"]


def test_ping_and_load() -> None:
    """As platforms ask: alive or not, with either method, without a key; and how much is on."""
    engine = FakeEngine(delay=0.2)
    with running(engine) as here:
        assert httpx.get(f"{here.url}/ping").status_code == 200
        assert httpx.post(f"{here.url}/ping").status_code == 200
        assert httpx.get(f"{here.url}/load").json() == {"server_load": 0}
        with httpx.stream(
            "POST", f"{here.url}/v1/chat/completions", json=BODY | {"stream": True}
        ) as response:
            assert httpx.get(f"{here.url}/load").json() == {"server_load": 1}
            response.read()
        wait_until(lambda: httpx.get(f"{here.url}/load").json() == {"server_load": 0})
        engine.dead = True
        assert httpx.get(f"{here.url}/ping").status_code == 503


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", BODY),
        ("/v1/completions", {"model": "synthia-demo", "prompt": "a"}),
        ("/v1/responses", {"model": "synthia-demo", "input": "a"}),
        ("/v1/messages", BODY | {"max_tokens": 9}),
    ],
)
def test_a_broken_stream_tells_what_was_used(path: str, body: dict[str, object]) -> None:
    """The last event has the tokens that ran, on every route."""
    with running(FakeEngine(fault=EngineFault(), fault_at=2)) as here:
        told = httpx.post(f"{here.url}{path}", json=body | {"stream": True})
        assert told.status_code == 200
        last = told.text.rstrip().rsplit("\n\n", 1)[1].rpartition("data: ")[2]
        ran = len(" Hello.")
        assert f'tokens":{ran}' in last
        assert "usage" in last
