"""A request and its response from end to end: faults, clients that leave, deadlines, the log."""

from __future__ import annotations

import gc
import json
import socket
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from chat_api import BODY, PIECES, events, key_file, post
from serving import Running, running, wait_until

from synthia_vllm.engine.fake import FakeEngine
from synthia_vllm.errors import EngineFault
from synthia_vllm.template.answer import AnswerFilter

if TYPE_CHECKING:
    from pathlib import Path


def test_fault_before_the_first_token_is_a_status() -> None:
    """An error before anything was sent has its own status, streamed or not."""
    with running(FakeEngine(fault=EngineFault())) as server:
        for stream in (False, True):
            response = post(server, BODY | {"stream": stream})
            assert response.status_code == 500
            assert response.json()["error"]["code"] == "engine_fault"


def test_fault_in_a_stream_is_an_event() -> None:
    """Later it is the last event, in the same envelope; no `[DONE]` pretends success."""
    with running(FakeEngine(fault=EngineFault(), fault_at=2)) as server:
        response = post(server, BODY | {"stream": True})
        assert response.status_code == 200
        assert "[DONE]" not in response.text
        assert events(response)[-1]["error"]["code"] == "engine_fault"
        client = server.client
        with pytest.raises(openai.APIError, match="failed at this request"):
            list(client.chat.completions.create(**BODY, stream=True))


@pytest.mark.parametrize("stream", [False, True])
def test_a_connection_that_is_kept_alive_keeps_no_request(stream: bool) -> None:
    """What was asked is let go with the answer, by reference counts alone, errors too."""

    def kept() -> int:
        return sum(type(thing).__name__ == "_Exchange" for thing in gc.get_objects())

    bodies = [BODY | {"stream": stream}, BODY | {"stream": stream, "top_k": -7}]
    gc.collect()
    gc.disable()
    try:
        with running(FakeEngine(PIECES)) as server, httpx.Client() as client:
            for body in bodies:
                client.post(f"{server.url}/v1/chat/completions", json=body).read()
            wait_until(lambda: not kept())
    finally:
        gc.enable()


class _Breaks(FakeEngine):
    """An engine that has no meaning for what happened to it."""

    def submit(self, work: Any, sink: Any) -> Any:
        raise ZeroDivisionError


def test_faults_of_our_own_stay_in_the_envelope(caplog: pytest.LogCaptureFixture) -> None:
    """Any exception at all is an error the client can read."""
    with running(_Breaks(PIECES)) as server:
        for body in (BODY, BODY | {"stream": True}):
            answer = post(server, body)
            assert answer.status_code == 500
            assert answer.json()["error"]["code"] == "engine_fault"
    assert "ZeroDivisionError" in caplog.text


def test_fault_within_a_stream_ends_that_stream(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What goes wrong while the engine hands over a step never gets back to the engine."""
    with running(FakeEngine(PIECES, delay=0.02)) as server:
        feed = AnswerFilter.feed

        def breaks(answer: AnswerFilter, text: str) -> str:
            return feed(answer, text if text != "." else str(1 // 0))

        monkeypatch.setattr(AnswerFilter, "feed", breaks)
        said = events(post(server, BODY | {"stream": True}))
        assert said[0]["choices"][0]["delta"]["content"]
        assert said[-1]["error"]["code"] == "engine_fault"
        monkeypatch.undo()
        assert post(server).status_code == 200
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_is_noticed(stream: bool) -> None:
    """When the connection goes, the request is freed in the engine, also on the plain route."""
    with running(FakeEngine((" a",) * 1000, delay=0.01)) as server:
        body = json.dumps(BODY | {"stream": stream}).encode()
        with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as raw:
            raw.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
                b"Content-Type: application/json\r\nX-Request-Id: gone\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            if stream:
                assert raw.recv(15) == b"HTTP/1.1 200 OK"
            else:
                wait_until(lambda: server.engine.seen)  # type: ignore[attr-defined]
        wait_until(lambda: server.engine.aborted == ["gone"])  # type: ignore[attr-defined]
        wait_until(lambda: server.value("synthia_requests_in_flight") == 0)
        assert server.value("synthia_aborted_by_client_total", model="synthia-demo") == 1


def test_request_id(server: Running) -> None:
    """The client's request id is used and returned; a senseless one is replaced."""
    response = post(server, headers={"X-Request-Id": "abc-1"})
    assert response.headers["x-request-id"] == "abc-1"
    assert response.json()["id"] == "chatcmpl-abc-1"
    assert post(server, headers={"X-Request-Id": "a b"}).headers["x-request-id"] != "a b"


@pytest.mark.parametrize("stream", [False, True])
def test_deadline(stream: bool) -> None:
    """When the time is up the engine is freed, and the client is told: by a status or an event."""
    with running(FakeEngine((" a",) * 1000, delay=0.02)) as server:
        headers = {"X-Request-Timeout": "0.3", "X-Request-Id": "late"}
        response = post(server, BODY | {"stream": stream}, headers=headers)
        assert response.status_code == (200 if stream else 504)
        error = events(response)[-1]["error"] if stream else response.json()["error"]
        assert error["code"] == "deadline_exceeded"
        assert "0.3 seconds" in error["message"]
        assert server.engine.aborted == ["late"]  # type: ignore[attr-defined]
        for wrong in ("0", "-1", "nan", "soon", ""):
            refused = post(server, headers={"X-Request-Timeout": wrong})
            assert refused.json()["error"]["param"] == "X-Request-Timeout"


def test_the_servers_own_deadline() -> None:
    """Without a header, and for a header that asks for more, the server's limit holds."""
    limits = {"request_seconds": 0.2}
    with running(FakeEngine((" a",) * 1000, delay=0.02), limits=limits) as server:
        assert post(server).status_code == 504
        assert post(server, headers={"X-Request-Timeout": "inf"}).status_code == 504


def test_keepalive_comments() -> None:
    """While the first token is waited for, comments are sent; the events are as without them."""
    with running(FakeEngine(PIECES, delay=0.3), sse_keepalive_seconds=0.05) as server:
        response = post(server, BODY | {"stream": True})
        assert response.text.startswith(": waiting\n\n: waiting\n\n")
        chunks = list(server.client.chat.completions.create(**BODY, stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Hello."
    with running(FakeEngine(fault=EngineFault(), delay=0.2), sse_keepalive_seconds=0.05) as server:
        response = post(server, BODY | {"stream": True})
        assert response.status_code == 200
        assert '"code":"engine_fault"' in response.text.split("\n\n")[-2]
    with running(FakeEngine(PIECES, delay=0.01), sse_keepalive_seconds=5) as server:
        assert "waiting" not in post(server, BODY | {"stream": True}).text


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_before_the_first_token(stream: bool) -> None:
    """Also with keep-alive comments, a client that leaves while it waits frees the engine."""
    with running(FakeEngine(PIECES, delay=30), sse_keepalive_seconds=0.05) as server:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{server.url}/v1/chat/completions",
                json=BODY | {"stream": stream},
                timeout=httpx.Timeout(5, read=0.02 if stream else 0.3),
            ).read()
        wait_until(lambda: server.value("synthia_requests_in_flight") == 0)
        assert len(server.engine.aborted) == 1  # type: ignore[attr-defined]


def test_logs_say_who_and_how_much(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A line a request, with id, user, counts and times; the texts only if they are asked for."""
    caplog.set_level("INFO")
    file = tmp_path / "keys.yaml"
    keys = key_file(file, alice={})
    for content in (False, True):
        caplog.clear()
        with running(FakeEngine(PIECES), keys_file=file, log_content=content) as server:
            usage = post(server, headers=keys["alice"] | {"X-Request-Id": "r1"}).json()["usage"]
            post(server)
            post(server, {**BODY, "stream": True}, headers=keys["alice"])
        [answered, refused, streamed] = [
            vars(r)["fields"] for r in caplog.records if r.getMessage() == "chat"
        ]
        assert answered["id"] == "r1"
        assert (answered["user"], answered["status"]) == ("alice", 200)
        assert answered["prompt_tokens"] == usage["prompt_tokens"]
        assert answered["answer_tokens"] == usage["completion_tokens"]
        assert answered["first_token_ms"] is None  # a plain answer has no first token
        assert 0 <= streamed["first_token_ms"] <= streamed["total_ms"]
        assert answered["finish"] == "stop"
        assert ("Hello." in answered.get("answers", [])) == content
        assert ("Hi" in answered.get("prompt", "")) == content
        assert (refused["user"], refused["status"]) == ("-", 401)
        assert keys["alice"]["Authorization"].split()[1] not in caplog.text
