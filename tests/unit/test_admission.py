"""Keys and limits over HTTP."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx
import openai
import pytest
from chat_api import BODY, PIECES, key_file, post
from serving import running, wait_until

from synthia_vllm.engine.fake import FakeEngine

if TYPE_CHECKING:
    from pathlib import Path


def test_routes_that_need_a_key(tmp_path: Path) -> None:
    """With a key file all but the probes need a key; `/metrics` as it is set."""
    file = tmp_path / "keys.yaml"
    keys = key_file(file, alice={})
    for metrics, without, with_key in (("open", 200, 200), ("key", 401, 200), ("off", 401, 404)):
        with running(FakeEngine(PIECES), keys_file=file, metrics=metrics) as server:
            for path, expected in (
                ("/health", 200), ("/ready", 200), ("/metrics", without), ("/version", 401),
                ("/v1/models", 401), ("/openapi.json", 401), ("/nope", 401),
            ):  # fmt: skip
                response = httpx.get(server.url + path)
                assert response.status_code == expected, path
                if expected == 401:
                    assert response.json()["error"]["code"] == "invalid_api_key"
                    assert response.headers["www-authenticate"] == "Bearer"
            assert post(server).status_code == 401
            assert post(server, headers={"Authorization": "Bearer wrong"}).status_code == 401
            assert post(server, headers=keys["alice"]).status_code == 200
            found = httpx.get(f"{server.url}/metrics", headers=keys["alice"])
            assert found.status_code == with_key


def test_the_stock_client_with_a_wrong_key(tmp_path: Path) -> None:
    """OpenAI's client sees its own exception types for 401, 403 and 429."""
    file = tmp_path / "keys.yaml"
    keys = key_file(file, alice={"models": ["synthia-demo-tot"], "requests_per_minute": 2})
    with running(FakeEngine(PIECES), keys_file=file) as server:
        client = server.client
        with pytest.raises(openai.AuthenticationError):
            client.chat.completions.create(**BODY)
        client = client.with_options(api_key=keys["alice"]["Authorization"].split()[1])
        assert [m.id for m in client.models.list().data] == ["synthia-demo-tot"]
        with pytest.raises(openai.PermissionDeniedError) as forbidden:
            client.chat.completions.create(**BODY)
        assert forbidden.value.param == "model"
        client.chat.completions.create(**BODY | {"model": "synthia-demo-tot"})
        with pytest.raises(openai.RateLimitError) as limited:
            client.chat.completions.create(**BODY | {"model": "synthia-demo-tot"})
        assert limited.value.code == "requests_per_minute"
        assert 0 < int(limited.value.response.headers["retry-after"]) <= 30
        assert server.value(
            "synthia_user_refusals_total", user="alice", code="requests_per_minute"
        ) == 1  # fmt: skip


def test_waiting_as_told_is_enough(tmp_path: Path) -> None:
    """A client that waits for as long as `Retry-After` says is served."""
    file = tmp_path / "keys.yaml"
    keys = key_file(file, alice={"requests_per_minute": 20, "tokens_per_minute": 100_000})
    with running(FakeEngine(PIECES), keys_file=file) as server:
        refused = post(server, headers=keys["alice"])
        while refused.status_code == 200:
            refused = post(server, headers=keys["alice"])
        assert refused.status_code == 429
        time.sleep(int(refused.headers["retry-after-ms"]) / 1000)
        served = post(server, headers=keys["alice"])
        assert served.status_code == 200
        assert served.headers["x-ratelimit-limit-requests"] == "20"
        assert served.headers["x-ratelimit-remaining-requests"] == "0"
        assert 0 < float(served.headers["x-ratelimit-reset-requests"].rstrip("s")) <= 60
        assert int(served.headers["x-ratelimit-remaining-tokens"]) > 90_000


def test_limits_of_a_user(tmp_path: Path) -> None:
    """The ceiling of an answer is the default too; more is refused by name; tokens run out."""
    file = tmp_path / "keys.yaml"
    keys = key_file(file, short={"max_tokens": 50}, poor={"tokens_per_minute": 60})
    with running(FakeEngine(PIECES), keys_file=file) as server:
        assert post(server, headers=keys["short"]).status_code == 200
        assert server.engine.seen[-1].sampling.max_tokens == 50  # type: ignore[attr-defined]
        refused = post(server, BODY | {"max_tokens": 51}, headers=keys["short"])
        assert refused.json()["error"]["param"] == "max_tokens"
        small = BODY | {"max_tokens": 10}
        codes = [post(server, small, headers=keys["poor"]).status_code for _ in range(4)]
        assert codes[0] == 200
        assert codes[-1] == 429
        told = post(server, small, headers=keys["poor"])
        assert told.json()["error"]["code"] == "tokens_per_minute"
        tokens = sum(
            server.value("synthia_user_tokens_total", user="poor", kind=kind)
            for kind in ("prompt", "answer")
        )
        assert 0 < tokens <= 60


def test_keys_are_reloaded(tmp_path: Path) -> None:
    """A changed key file is taken over while streams go on; a broken one changes nothing."""
    file = tmp_path / "keys.yaml"
    keys = key_file(file, alice={})
    with running(FakeEngine((" a",) * 400, delay=0.005), keys_file=file) as server:
        with httpx.stream(
            "POST",
            f"{server.url}/v1/chat/completions",
            json=BODY | {"stream": True},
            headers=keys["alice"],
        ) as response:
            lines = response.iter_lines()
            next(lines)
            other = key_file(file, bob={})
            wait_until(
                lambda: (
                    httpx.get(f"{server.url}/v1/models", headers=other["bob"]).status_code == 200
                )
            )
            assert post(server, headers=keys["alice"]).status_code == 401
            assert [line for line in lines if line][-1] == "data: [DONE]"
        file.write_text("users: [")
        wait_until(lambda: server.value("synthia_key_reload_failures_total"))
        assert httpx.get(f"{server.url}/v1/models", headers=other["bob"]).status_code == 200
        server.app.server_state.admission.reload_wanted = True  # as SIGHUP does
        wait_until(lambda: server.value("synthia_key_reload_failures_total") == 2)


def test_priorities_reach_the_engine(tmp_path: Path) -> None:
    """A flood's later requests are stamped behind those of a user who comes after them."""
    file = tmp_path / "keys.yaml"
    keys = key_file(file, flood={}, light={})
    with running(FakeEngine((" a",) * 1000, delay=0.02), keys_file=file) as server:
        with ThreadPoolExecutor(9) as pool:
            for _ in range(8):
                pool.submit(post, server, BODY | {"max_tokens": 100}, headers=keys["flood"])
            wait_until(lambda: len(server.engine.seen) == 8)  # type: ignore[attr-defined]
            pool.submit(post, server, BODY | {"max_tokens": 100}, headers=keys["light"])
            wait_until(lambda: len(server.engine.seen) == 9)  # type: ignore[attr-defined]
        *flood, light = [work.priority for work in server.engine.seen]  # type: ignore[attr-defined]
        assert flood == sorted(flood)
        assert len(set(flood)) == 8
        assert light <= flood[1]


def test_a_full_server_says_when_to_come_back() -> None:
    """Beyond `max_requests` there is a 503 at once, before the body is looked at."""
    with running(FakeEngine((" a",) * 1000, delay=0.02), limits={"max_requests": 2}) as server:
        with ThreadPoolExecutor(2) as pool:
            for _ in range(2):
                pool.submit(post, server, BODY | {"max_tokens": 60})
            wait_until(lambda: len(server.engine.seen) == 2)  # type: ignore[attr-defined]
            refused = post(server, content=b"not even JSON")
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "server_full"
            assert int(refused.headers["retry-after"]) >= 1
        assert post(server, BODY | {"max_tokens": 5}).status_code == 200
        route = "/v1/chat/completions"
        assert server.value("synthia_errors_total", code="server_full", route=route) == 1
