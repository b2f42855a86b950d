"""HTTP as proxies, routers and old clients speak it; errors told are errors counted."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml
from serving import Running, running, wait_until

from synthia_vllm.admission.users import new_key
from synthia_vllm.engine.fake import FakeEngine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {
    "model": "synthia-demo",
    "messages": [{"role": "user", "content": "Hi"}],
}
SEPARATORS = " a\u2028b\u2029c\u0085d é 鯨"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(FakeEngine((SEPARATORS, " end"))) as here:
        yield here


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, dict[str, dict[str, str]]]:
    """A key file of two users, and the headers of each."""
    headers, users = {}, {}
    for name in ("ann", "bob"):
        key, key_hash = new_key()
        users[name] = {"keys": [key_hash]}
        headers[name] = {"Authorization": f"Bearer {key}"}
    file = tmp_path / "keys.yaml"
    file.write_text(yaml.safe_dump({"users": users}))
    return file, headers


def errors(server: Running) -> dict[tuple[str, str], float]:
    """What `synthia_errors_total` has, by code and route."""
    return {
        (sample.labels["code"], sample.labels["route"]): sample.value
        for family in server.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "synthia_errors_total"
    }


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "route"),
    [
        ("POST", CHAT, {"model": "synthia-demo"}, 400, "missing_required_parameter", CHAT),
        ("POST", CHAT, BODY | {"model": "x"}, 404, "model_not_found", CHAT),
        ("POST", "/v1/completions", {"model": 1}, 400, "invalid_value", "/v1/completions"),
        ("POST", "/tokenize", {"prompt": 1}, 400, "invalid_value", "/tokenize"),
        ("POST", "/detokenize", {"tokens": [-1]}, 400, "invalid_value", "/detokenize"),
        ("POST", f"{CHAT}/render", {}, 400, "missing_required_parameter", f"{CHAT}/render"),
        ("GET", "/v1/models/x", None, 404, "model_not_found", "/v1/models/{name:path}"),
        ("GET", "/no/such/route", None, 404, "not_found", "other"),
        ("GET", CHAT, None, 405, "method_not_allowed", CHAT),
        ("DELETE", "/tokenize", None, 405, "method_not_allowed", "/tokenize"),
    ],
)
def test_each_error_is_counted_once(  # noqa: PLR0917  # as the table above has them
    server: Running, method: str, path: str, body: Any, status: int, code: str, route: str
) -> None:
    """Whatever route it is on: one envelope, one id, one count under the route's template."""
    before = errors(server)
    response = httpx.request(
        method, f"{server.url}{path}", json=body, headers={"X-Request-Id": "mine"}
    )
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert response.headers["x-request-id"] == "mine"
    gone = {key: value - before.get(key, 0) for key, value in errors(server).items()}
    assert {key: value for key, value in gone.items() if value} == {(code, route): 1}


def test_what_the_connection_refuses_is_counted(server: Running) -> None:
    """Invalid HTTP and endless headers are errors told to clients as well."""
    before = errors(server)
    host, port = server.url.removeprefix("http://").split(":")
    for sent in (b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nx: " + b"y" * 40_000):
        with socket.create_connection((host, int(port))) as client:
            client.sendall(sent)
            assert b"x-request-id: " in client.recv(1 << 16)
    after = errors(server)
    for code in ("invalid_http", "headers_too_large"):
        assert after[code, "other"] == before.get((code, "other"), 0) + 1


@pytest.mark.parametrize(
    "path",
    ["/health", "/ready", "/version", "/metrics", "/v1/models", "/v1/models/synthia-demo", "/",
     "/openapi.json", "/docs", "/tokenizer_info"],
)  # fmt: skip
def test_head_where_get_is(server: Running, path: str) -> None:
    """HEAD has GET's status and headers, and no body."""
    got = httpx.get(f"{server.url}{path}")
    head = httpx.head(f"{server.url}{path}")
    assert head.status_code == got.status_code == 200
    assert head.headers["content-type"] == got.headers["content-type"]
    assert head.content == b""


def test_options_of_the_probes() -> None:
    """HAProxy's plain check asks by OPTIONS in HTTP/1.0, and gets what GET would get."""

    def asked(url: str, path: str) -> bytes:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(f"OPTIONS {path} HTTP/1.0\r\n\r\n".encode())
            return client.recv(1 << 16).split(b"\r\n")[0]

    with running(FakeEngine()) as here:
        assert b" 200 " in asked(here.url, "/ready")
        assert b" 200 " in asked(here.url, "/health")
        here.app.server_state.drain()
        assert b" 503 " in asked(here.url, "/ready")
        assert httpx.options(f"{here.url}/ready").status_code == 503


def test_a_trailing_slash_is_served(server: Running) -> None:
    """It is the same route, on all of them; nobody is sent elsewhere."""
    for path in (CHAT, "/v1/completions", "/tokenize"):
        body = BODY if path == CHAT else {"model": "synthia-demo", "prompt": "x"}
        assert httpx.post(f"{server.url}{path}/", json=body).status_code == 200
    for path in ("/v1/models", "/health", "/docs"):
        assert httpx.get(f"{server.url}{path}/").status_code == 200
    assert httpx.get(f"{server.url}/nothing/").status_code == 404


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_events_are_ascii(server: Running, path: str) -> None:
    """No reader finds a line's end in an event's data; the text is the same."""
    body = BODY if path == CHAT else {"model": "synthia-demo", "prompt": "é\u2028", "echo": True}
    body = body | {"max_tokens": 100}
    response = httpx.post(f"{server.url}{path}", json=body | {"stream": True})
    assert response.content.isascii()
    events = [json.loads(line[6:]) for line in response.text.split("\n\n")[:-2]]
    choices = [event["choices"][0] for event in events]
    text = "".join(c["delta"].get("content", "") if path == CHAT else c["text"] for c in choices)
    assert SEPARATORS.strip() in text


def test_discovery_can_be_open(keys: tuple[Path, dict[str, dict[str, str]]]) -> None:
    """A router lists models and versions without a key, where that is wished, and nothing else."""
    file, headers = keys
    for discovery, status in (("key", 401), ("open", 200)):
        with running(FakeEngine(), keys_file=file, discovery=discovery) as here:
            for path in ("/v1/models", "/version", "/v1/models/synthia-demo", "/v1/models/"):
                assert httpx.get(f"{here.url}{path}").status_code == status
                assert httpx.get(f"{here.url}{path}", headers=headers["ann"]).status_code == 200
            for wrong in ("/tokenizer_info", "/docs"):
                assert httpx.get(f"{here.url}{wrong}").status_code == 401
            assert httpx.post(f"{here.url}{CHAT}", json=BODY).status_code == 401
            bad = {"Authorization": "Bearer nobody"}
            assert httpx.get(f"{here.url}/v1/models", headers=bad).status_code == 401


def test_one_users_share_is_no_servers_fault(
    keys: tuple[Path, dict[str, dict[str, str]]],
) -> None:
    """Who holds his share gets 429, which no door takes for a dead server; others are served."""
    file, headers = keys
    engine = FakeEngine((" a",) * 1000, delay=0.02)
    with running(engine, keys_file=file, limits={"max_requests": 10}) as here:
        url = f"{here.url}{CHAT}"
        long = BODY | {"max_tokens": 200}

        def ask(user: str, body: dict[str, Any]) -> httpx.Response:
            return httpx.post(url, json=body, headers=headers[user], timeout=60)

        with ThreadPoolExecutor(8) as pool:
            for _ in range(8):
                pool.submit(ask, "ann", long)
            wait_until(lambda: len(engine.seen) == 8)
            waits = []
            for _ in range(20):
                refused = ask("ann", long)
                assert refused.status_code == 429
                assert refused.json()["error"]["code"] == "share_used_up"
                waits.append(int(refused.headers["retry-after-ms"]))
            # It does not climb by the retries of the one who is told.
            assert max(waits) <= 8 * min(waits)
            assert ask("bob", BODY | {"max_tokens": 2}).status_code == 200
