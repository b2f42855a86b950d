"""Real programs that stand in front of servers: routers and proxies, before two of ours."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import ssl
import subprocess
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml
from doors import CONFIG, DOORS, PROGRAMS, opened, placed
from openai import DefaultHttpxClient, OpenAI
from serving import Running, running, wait_until

from synthia_vllm.admission.users import new_key
from synthia_vllm.engine.base import ModelInfo
from synthia_vllm.engine.fake import FakeEngine
from synthia_vllm.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

MODEL = "Synthia-7B-v3.0"
CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
SHORT = ASK | {"max_tokens": 8}
RAW = {"model": MODEL, "prompt": "Hi", "max_tokens": 8}
PLACES = 10
PROXIES = ("nginx", "haproxy", "envoy")


@dataclass(frozen=True)
class Users:
    """A key file, and the headers of each user in it."""

    file: Path
    headers: dict[str, dict[str, str]]

    @property
    def keys(self) -> list[str]:
        return [header["Authorization"].removeprefix("Bearer ") for header in self.headers.values()]


@dataclass(frozen=True)
class Door:
    """A program at `url` before two servers."""

    name: str
    url: str
    log: Path
    servers: tuple[Running, Running]
    users: Users
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=60))

    def post(self, user: str, body: dict[str, Any], at: str = "") -> httpx.Response:
        """The response to `body`, of the door or of a server `at` a URL of its own."""
        headers = self.users.headers[user]
        return self.client.post(f"{at or self.url}{CHAT}", json=body, headers=headers)

    def count(self, series: str, **labels: str) -> float:
        """A counter, over both servers."""
        return sum(server.value(series, **labels) for server in self.servers)

    @property
    def aborted(self) -> int:
        return sum(len(engine(server).aborted) for server in self.servers)

    @property
    def in_flight(self) -> int:
        return sum(server.app.server_state.in_flight for server in self.servers)


def engine(server: Running) -> FakeEngine:
    assert isinstance(server.engine, FakeEngine)
    return server.engine


def server(users: Users, **changes: Any) -> AbstractContextManager[Running]:
    """A server with ten places, which a router may look at without a key."""
    info = ModelInfo(
        max_model_len=200_000, vocab_size=32000, longest_token=1, special_tokens={1: "<s>"}
    )
    options: dict[str, Any] = {
        "served_name": MODEL,
        "keys_file": users.file,
        "discovery": "open",
        "limits": {"max_requests": PLACES},
    }
    said = FakeEngine((" Hello", ".", *(" a",) * 400), delay=0.01, model_info=info)
    return running(said, **options | changes)


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Users:
    """Two who may do what they like, and one with a request a minute."""
    headers: dict[str, dict[str, str]] = {}
    listed: dict[str, dict[str, Any]] = {}
    for name in ("ann", "bob", "eve"):
        key, key_hash = new_key()
        listed[name] = {"keys": [key_hash]}
        headers[name] = {"Authorization": f"Bearer {key}"}
    listed["eve"]["requests_per_minute"] = 1
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    file.write_text(yaml.safe_dump({"users": listed}))
    return Users(file, headers)


@pytest.fixture(scope="module", params=DOORS)
def door(
    request: pytest.FixtureRequest, users: Users, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Door]:
    """Each door with its file of config/doors. No key is ever in what it says."""
    place = tmp_path_factory.mktemp(request.param)
    with (
        server(users) as one,
        server(users) as two,
        opened(DOORS[request.param], [one.url, two.url], place) as (url, log),
    ):
        here = Door(request.param, url, log, (one, two), users)
        with here.client:
            yield here
    assert not [key for key in users.keys if key in log.read_text()]


ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, SHORT),
    "chat, streamed": (CHAT, SHORT | {"stream": True}),
    "two answers, logprobs": (CHAT, SHORT | {"logprobs": True, "top_logprobs": 2, "n": 2}),
    "an unknown field": (CHAT, SHORT | {"chat_id": "x"}),
    "an answer continued": (
        CHAT, SHORT | {"messages": [*ASK["messages"], {"role": "assistant", "content": "Hel"}]}
    ),
    "the name with -tot": (CHAT, SHORT | {"model": f"{MODEL}-tot"}),
    "another name": (CHAT, SHORT | {"model": "nobody"}),
    "a bad value": (CHAT, SHORT | {"temperature": 3}),
    "a missing field": (CHAT, {"model": MODEL}),
    "completions": ("/v1/completions", RAW),
    "completions, streamed": ("/v1/completions", RAW | {"stream": True}),
    "lists of tokens, scored": (
        "/v1/completions", RAW | {"prompt": [[1, 50, 51]], "echo": True, "logprobs": 1}
    ),
    "responses": ("/v1/responses", {"model": MODEL, "input": "Hi", "max_output_tokens": 8}),
    "messages": ("/v1/messages", SHORT),
    "messages, streamed": ("/v1/messages", SHORT | {"stream": True}),
    "count_tokens": ("/v1/messages/count_tokens", ASK),
    "render": (f"{CHAT}/render", ASK),
    "tokenize": ("/tokenize", {"model": MODEL, "prompt": "Hi"}),
}  # fmt: skip
# What the routers answer otherwise, by status. vllm-router sends headers on for chat and
# completions only, so for the rest the key is missing; smg has a list of routes, and one model.
OTHERWISE: dict[str, dict[str, int]] = {
    "vllm-router": {
        "a bad value": 400, "a missing field": 422, "responses": 401, "messages": 401,
        "messages, streamed": 401, "count_tokens": 401, "render": 401, "tokenize": 401,
    },
    "smg": {
        "the name with -tot": 404, "another name": 404, "a bad value": 400, "a missing field": 400,
        "lists of tokens, scored": 400, "responses": 200, "render": 404, "tokenize": 404,
    },
}  # fmt: skip


def test_answers_are_the_servers(door: Door) -> None:
    """Byte for byte, plain and streamed, with the request's id: but for what docs/doors.md says."""

    def said(url: str, path: str, body: dict[str, Any]) -> tuple[int, str]:
        headers = door.users.headers["ann"] | {"X-Request-Id": "one"}
        response = door.client.post(f"{url}{path}", json=body, headers=headers)
        text = re.sub(r'"(created|created_at|completed_at)":\d+', "", response.text)
        return response.status_code, text

    otherwise = {}
    for name, (path, body) in ROUTES.items():
        through, direct = said(door.url, path, body), said(door.servers[0].url, path, body)
        if through != direct:
            otherwise[name] = through[0]
    assert otherwise == OTHERWISE.get(door.name, {})


FIELDS: dict[str, Any] = {
    "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": 0.5,
    "frequency_penalty": 0.25, "repetition_penalty": 1.5, "seed": 7, "n": 2, "stop": ["x"],
    "stop_token_ids": [5], "bad_words": ["y"], "min_tokens": 3, "ignore_eos": True,
    "skip_special_tokens": False, "logit_bias": {"5": 1}, "logprobs": True, "top_logprobs": 2,
    "max_completion_tokens": 9, "stream_interval": 2, "allowed_token_ids": [5, 6, 7],
    "repetition_detection": {"max_pattern_size": 3, "min_pattern_size": 1, "min_count": 3},
}  # fmt: skip


def test_fields_come_through(door: Door) -> None:
    """Those that OpenAI's API does not have, too; and those that are not there stay away."""
    reached = []
    for body, url in product((SHORT, ASK | FIELDS), (door.url, door.servers[0].url)):
        before = [len(engine(server).seen) for server in door.servers]
        assert door.post("ann", body, at=url).status_code == 200
        [request] = (
            request
            for server, count in zip(door.servers, before, strict=True)
            for request in engine(server).seen[count:]
        )
        reached.append((request.prompt_token_ids, request.sampling))
    assert reached[0::2] == reached[1::2]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves(door: Door, stream: bool) -> None:
    """Its request is freed in the engine, streamed or not."""
    before, headers = door.aborted, door.users.headers["ann"]
    with httpx.Client(timeout=0.5) as client:
        if stream:
            body = ASK | {"stream": True}
            with client.stream("POST", f"{door.url}{CHAT}", json=body, headers=headers) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{door.url}{CHAT}", json=ASK, headers=headers)
    wait_until(lambda: door.aborted == before + 1)


def test_a_users_429(door: Door) -> None:
    """It comes through with its `Retry-After`; the routers ask three times before."""

    def refused() -> float:
        return door.count("synthia_user_refusals_total", user="eve", code="requests_per_minute")

    for running_server in door.servers:
        wait_until(lambda at=running_server.url: door.post("eve", SHORT, at=at).status_code == 429)  # type: ignore[misc]
    before = refused()
    answer = door.post("eve", SHORT)
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "requests_per_minute"
    assert int(answer.headers["Retry-After"]) > 20
    assert refused() - before == (1 if door.name in PROXIES else 3)


def test_a_503_of_one_server(door: Door) -> None:
    """The other one is asked before a check has seen it; by vllm-router's `cache_aware`, not."""
    before = [len(engine(server).seen) for server in door.servers]
    assert door.post("ann", SHORT).status_code == 200
    [away] = (
        server
        for server, count in zip(door.servers, before, strict=True)
        if len(engine(server).seen) > count
    )
    away.app.server_state.drain()
    try:
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(door.post, "ann", SHORT) for _ in range(8)]
            statuses = {answer.result().status_code for answer in asked}
    finally:
        away.app.server_state._phase = "serving"
    assert away.value("synthia_errors_total", code="draining", route=CHAT) > 0
    assert statuses == ({503} if door.name == "vllm-router" else {200})


def test_full_servers(door: Door) -> None:
    """Their 503 comes through and says when to come back; after it nobody is shut out."""
    with ThreadPoolExecutor(2 * PLACES) as pool:
        held: list[Future[httpx.Response]] = []
        for user, places in (("ann", 8), ("bob", PLACES - 8)):  # four fifths, and the rest
            for running_server in door.servers:
                held += (
                    pool.submit(door.post, user, ASK, at=running_server.url) for _ in range(places)
                )
            wait_until(lambda: door.in_flight == len(held))  # noqa: B023
        for _ in range(12):
            answer = door.post("bob", SHORT)
            assert answer.status_code == 503, answer.text
            assert answer.json()["error"]["code"] == "server_full"
            assert int(answer.headers["Retry-After"]) >= 1
        assert {response.result().status_code for response in held} == {200}
    assert {door.post("bob", SHORT).status_code for _ in range(4)} == {200}


def test_a_users_flood(door: Door) -> None:
    """It locks nobody else out, and gets 429, which no door takes for a dead server."""
    with ThreadPoolExecutor(24) as pool:
        flood = [pool.submit(door.post, "ann", ASK | {"max_tokens": 150}) for _ in range(24)]
        wait_until(lambda: door.in_flight >= 8)
        beside = [door.post("bob", SHORT).status_code for _ in range(10)]
        statuses = {answer.result().status_code for answer in flood}
    assert beside == [200] * 10
    assert statuses <= {200, 429}
    assert door.post("bob", SHORT).status_code == 200


def test_keys(door: Door) -> None:
    """They are the server's to judge. smg keeps `X-Api-Key` for itself."""
    key = door.users.keys[0]
    for headers, status in (
        ({}, 401),
        ({"Authorization": "Bearer nobody"}, 401),
        ({"Authorization": f"Bearer {key}"}, 200),
        ({"X-Api-Key": key}, 401 if door.name == "smg" else 200),
    ):
        answer = door.client.post(f"{door.url}{CHAT}", json=SHORT, headers=headers)
        assert answer.status_code == status
    # Envoy writes its log every ten seconds.
    wait_until(lambda: CHAT in door.log.read_text() or door.name not in PROXIES)
    assert key not in door.log.read_text()


def test_metrics_are_not_for_clients(door: Door) -> None:
    """However it is spelled: they name users. vllm-router sends it on: `metrics: key` there."""
    connection = http.client.HTTPConnection(door.url.removeprefix("http://"), timeout=20)
    for path in ("/metrics", "/metrics//", "/%6detrics", "/metrics%2f", "/./metrics", "/metrics?x"):
        connection.request("GET", path)
        text = connection.getresponse().read().decode()
        assert ("synthia_requests_total" in text) == (door.name == "vllm-router"), path
    connection.close()


def test_a_server_that_leaves(door: Door) -> None:
    """`/ready` says so, and it gets no more; nginx does not ask, and sends on until it is told."""
    one = door.servers[0]
    one.app.server_state.leave()
    try:
        time.sleep(3)  # three checks
        before = len(engine(one).seen)
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(door.post, "ann", SHORT) for _ in range(8)]
            assert {answer.result().status_code for answer in asked} == {200}
        assert (len(engine(one).seen) > before) == (door.name == "nginx")
    finally:
        one.app.server_state._phase = "serving"


@pytest.mark.costly
def test_idle_connections(users: Users, tmp_path: Path) -> None:
    """It is never a server that closes one: not after uvicorn's own five seconds, either."""
    with ExitStack() as stack:
        doors = []
        for name, file in DOORS.items():
            place = tmp_path / name
            place.mkdir()
            one, two = stack.enter_context(server(users)), stack.enter_context(server(users))
            url, log = stack.enter_context(opened(file, [one.url, two.url], place))
            doors.append(Door(name, url, log, (one, two), users))
            stack.enter_context(doors[-1].client)

        def held(door: Door) -> set[object]:
            return {
                connection
                for running_server in door.servers
                for connection in running_server.server.server_state.connections
            }

        assert {door.post("ann", SHORT).status_code for door in doors} == {200}
        before = [held(door) for door in doors]
        assert all(before)
        time.sleep(6)
        kept = {door.name for door, then in zip(doors, before, strict=True) if held(door) & then}
        assert kept >= set(PROXIES)  # the routers mostly close theirs within that time themselves
        assert {door.post("ann", SHORT).status_code for door in doors} == {200}


def test_times_fit() -> None:
    """Doors wait longer than an answer may take, and close before the servers would."""
    answer, idle = Settings().limits.request_seconds, Settings().keepalive_seconds
    waits = {
        "nginx.conf": ("proxy_read_timeout (.*)s;",),
        "haproxy.cfg": ("timeout server +([0-9]+)s", "timeout client +([0-9]+)s"),
        "envoy.yaml": ("(?m)^ +timeout: ([0-9]{2,})s", "stream_idle_timeout: (.*)s"),
        "vllm-router.sh": ("--request-timeout-secs ([0-9]+)",),
        "smg.sh": ("--request-timeout-secs ([0-9]+)",),
    }
    assert set(waits) == set(DOORS.values())
    for file, patterns in waits.items():
        for pattern in patterns:
            [found] = re.findall(pattern, (CONFIG / file).read_text())
            assert float(found) > answer, (file, pattern)
    for file, pattern in (
        ("nginx.conf", "keepalive_timeout (.*)s;"), ("envoy.yaml", " idle_timeout: (.*)s")
    ):  # fmt: skip
        [found] = re.findall(pattern, (CONFIG / file).read_text())
        assert float(found) < idle


def test_tls(users: Users, tmp_path: Path) -> None:
    """HAProxy with its second file: the stock client over a certificate of our own, and HTTP/2."""
    certificate = tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost",
         "-keyout", "key.pem", "-out", certificate],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    key_file = tmp_path / "key.pem"
    (tmp_path / "door.pem").write_text(certificate.read_text() + key_file.read_text())
    context = ssl.create_default_context(cafile=str(certificate))
    with (
        server(users) as one,
        server(users) as two,
        opened("haproxy-tls.cfg", [one.url, two.url], tmp_path, tls=True) as (url, _log),
        DefaultHttpxClient(verify=context) as connection,
        OpenAI(base_url=f"{url}/v1", api_key=users.keys[0], http_client=connection) as client,
    ):
        answer = client.chat.completions.create(**SHORT).choices[0].message.content
        streamed = client.chat.completions.create(**SHORT, stream=True)
        assert "".join(part.choices[0].delta.content or "" for part in streamed) == answer
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/v1/models")  # nobody vouches for this certificate
        told = subprocess.run(
            ["curl", "-sS", "--http2", "--cacert", certificate, "-w", "\n%{http_version}",
             f"{url}/v1/models"],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        models, version = told.rsplit("\n", 1)
        assert json.loads(models)["data"][0]["id"] == MODEL
        assert version == "2"


@pytest.mark.costly
@pytest.mark.parametrize("name", DOORS)
def test_rolling(name: str, users: Users, tmp_path: Path) -> None:
    """One server after the other is told to stop, and started anew, under load: nothing is lost."""
    answered: list[bool] = []
    over = threading.Event()
    with ExitStack() as stack:
        leaves: dict[str, Any] = {"shutdown_delay_seconds": 4, "limits": {"max_requests": 64}}
        contexts = [server(users, **leaves) for _ in range(2)]
        servers = [context.__enter__() for context in contexts]
        ports = [running_server.server.config.port for running_server in servers]
        url, _log = stack.enter_context(
            opened(DOORS[name], [running_server.url for running_server in servers], tmp_path)
        )
        client = stack.enter_context(httpx.Client(timeout=60))

        def steadily(user: str, stream: bool) -> None:
            body = ASK | {"max_tokens": 40, "stream": stream}
            while not over.is_set():
                try:
                    answer = client.post(f"{url}{CHAT}", json=body, headers=users.headers[user])
                    whole = answer.status_code == 200
                    if stream:
                        whole = whole and answer.text.endswith("data: [DONE]\n\n")
                except httpx.TransportError:
                    whole = False
                answered.append(whole)

        pool = stack.enter_context(ThreadPoolExecutor(8))
        asking = [
            pool.submit(steadily, user, stream)
            for user in ("ann", "bob")
            for stream in (False, True, False, True)
        ]
        try:
            for place, leaving in enumerate(servers):
                time.sleep(3)
                leaving.server.handle_exit(signal.SIGTERM, None)
                wait_until(lambda: not leaving.server.started or leaving.server.should_exit)  # noqa: B023
                contexts[place].__exit__(None, None, None)
                contexts[place] = server(users, **leaves, port=ports[place])
                contexts[place].__enter__()
            time.sleep(3)
        finally:
            over.set()
            for worker in asking:
                worker.result(60)
            for context in contexts:
                context.__exit__(None, None, None)
    assert answered.count(False) == 0, len(answered)
    assert len(answered) > 200


@pytest.mark.costly
def test_litellm(users: Users, tmp_path: Path) -> None:
    """Its router, made of the file: both names, plain and streamed, and a field of vLLM's."""
    script = CONFIG.parents[1] / "tests" / "clients" / "lite_router.py"
    with server(users) as one, server(users) as two:
        placed([one.url, two.url], tmp_path / "doors", {})
        done = subprocess.run(
            [PROGRAMS[0] / "python", script, tmp_path / "doors" / "litellm.yaml"],
            capture_output=True, text=True, check=False, timeout=300,
            env=os.environ | {"SYNTHIA_KEY": users.keys[0], "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.split() == ["Hello."] * 4
        asked = sorted(
            (*engine(one).seen, *engine(two).seen), key=lambda r: len(r.prompt_token_ids)
        )
        plain, _, _, tot = asked
        assert len(tot.prompt_token_ids) > len(plain.prompt_token_ids)
        assert plain.sampling.min_p == 0.1  # a field that OpenAI's API does not have
