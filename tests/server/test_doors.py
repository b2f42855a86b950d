"""Real programs that stand in front of servers: routers and proxies, before two of ours."""

from __future__ import annotations

import http.client
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml
from serving import Running, free_port, running, wait_until

from synthia_vllm.admission.users import new_key
from synthia_vllm.engine.fake import FakeEngine

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CLIENTS = Path(__file__).parents[2] / ".venv-clients" / "bin"
CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "synthia-demo", "messages": [{"role": "user", "content": "Hi"}]}

NGINX = """
daemon off; pid {place}/pid; error_log {place}/log; worker_processes 1;
events {{}}
http {{
  access_log off; client_body_temp_path {place}/b; proxy_temp_path {place}/p;
  fastcgi_temp_path {place}/f; uwsgi_temp_path {place}/u; scgi_temp_path {place}/s;
  upstream servers {{ {servers} keepalive 8; keepalive_timeout 60s; }}
  server {{ listen 127.0.0.1:{port};
    location / {{ proxy_pass http://servers; proxy_http_version 1.1;
      proxy_set_header Connection ""; proxy_buffering off;
      proxy_next_upstream error timeout http_503 non_idempotent; }} }}
}}
"""
HAPROXY = """
defaults
  mode http
  timeout connect 2s
  timeout client 60s
  timeout server 60s
listen front
  bind 127.0.0.1:{port}
  option httpchk /ready
  option http-no-delay
  option abortonclose
  {servers}
"""


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, str]]]:
    """A key file of two users, and the headers of each."""
    headers, users = {}, {}
    for name in ("ann", "bob"):
        key, key_hash = new_key()
        users[name] = {"keys": [key_hash]}
        headers[name] = {"Authorization": f"Bearer {key}"}
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    file.write_text(yaml.safe_dump({"users": users}))
    return file, headers


@pytest.fixture(scope="module")
def servers(keys: tuple[Path, dict[str, dict[str, str]]]) -> Iterator[tuple[Running, Running]]:
    """Two servers with ten places each, which a router may look at without a key."""
    options: dict[str, Any] = {
        "keys_file": keys[0],
        "discovery": "open",
        "limits": {"max_requests": 10},
    }
    pieces = (" Hello", ".", *(" a",) * 400)
    with (
        running(FakeEngine(pieces, delay=0.01), **options) as one,
        running(FakeEngine(pieces, delay=0.01), **options) as two,
    ):
        yield one, two


def commands(door: str, port: int, urls: Sequence[str], place: Path) -> list[str]:
    """How `door` is started before `urls`."""
    if door in ("nginx", "haproxy"):
        program = shutil.which(door)
        assert program, f"{door} is not on this machine: apt-get install {door} (see .ci/run)"
        file = place / "conf"
        hosts = [url.removeprefix("http://") for url in urls]
        if door == "nginx":
            lines = " ".join(f"server {host};" for host in hosts)
            file.write_text(NGINX.format(place=place, port=port, servers=lines))
            return [program, "-c", str(file)]
        lines = "\n  ".join(f"server s{n} {host} check inter 100" for n, host in enumerate(hosts))
        file.write_text(HAPROXY.format(port=port, servers=lines))
        return [program, "-db", "-f", str(file)]
    program = str(CLIENTS / door)
    command = [program, *(["launch"] if door == "smg" else []), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--policy", "round_robin", "--worker-urls", *urls]
    command += ["--prometheus-port", str(free_port())]
    if door == "smg":
        command += ["--model-path", "synthia-demo"]
    return command


@contextmanager
def opened(door: str, urls: Sequence[str], place: Path) -> Iterator[str]:
    """Start `door`; yields its URL when an answer comes through it."""
    port = free_port()
    log = place / "door.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            commands(door, port, urls, place), stdout=output, stderr=output, cwd=place
        )
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            return httpx.get(f"{url}/v1/models", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_until(answers, 60)
        yield url
    finally:
        process.terminate()
        process.wait(20)


DOORS = ("nginx", "haproxy", "vllm-router", "smg")


@pytest.mark.parametrize("door", DOORS)
def test_door(
    door: str,
    servers: tuple[Running, Running],
    keys: tuple[Path, dict[str, dict[str, str]]],
    tmp_path: Path,
) -> None:
    """Plain and streamed answers come through it; one user's flood locks nobody else out."""
    headers = keys[1]
    with opened(door, [server.url for server in servers], tmp_path) as url:

        def ask(user: str, **more: Any) -> httpx.Response:
            body = BODY | {"max_tokens": 8} | more
            return httpx.post(f"{url}{CHAT}", json=body, headers=headers[user], timeout=60)

        plain = ask("ann")
        assert plain.status_code == 200, plain.text
        assert plain.json()["choices"][0]["message"]["content"] == "Hello."
        streamed = ask("ann", stream=True)
        assert streamed.text.endswith("data: [DONE]\n\n")
        turns = [*BODY["messages"], {"role": "assistant", "content": "Hel"}]
        assert ask("ann", messages=turns).status_code == 200
        with ThreadPoolExecutor(24) as pool:
            flood = [pool.submit(ask, "ann", max_tokens=150) for _ in range(24)]
            wait_until(lambda: sum(s.app.server_state.in_flight for s in servers) >= 14)
            beside = [ask("bob").status_code for _ in range(10)]
            statuses = {answer.result().status_code for answer in flood}
        assert beside == [200] * 10
        assert statuses <= {200, 429}
        assert ask("bob").status_code == 200


def test_haproxy_sees_a_server_leave(servers: tuple[Running, Running], tmp_path: Path) -> None:
    """Its plain check asks `/ready` by OPTIONS: a server that drains gets no more requests."""
    one, two = servers
    listed = {"route": "/v1/models", "status": "200", "model": ""}
    with opened("haproxy", [one.url, two.url], tmp_path) as url:
        one.app.server_state.drain()
        try:
            time.sleep(1)  # ten checks
            assert {httpx.get(f"{url}/v1/models").status_code for _ in range(6)} == {200}
            counted = one.value("synthia_requests_total", **listed)
            assert httpx.get(f"{url}/v1/models").status_code == 200
            assert one.value("synthia_requests_total", **listed) == counted
        finally:
            one.app.server_state._phase = "serving"


def test_a_connection_outlives_a_proxys(servers: tuple[Running, Running]) -> None:
    """Kept alive by default for longer than any of these keep theirs: 60 seconds and an hour."""
    assert servers[0].server.config.timeout_keep_alive > 3600
    connection = http.client.HTTPConnection(servers[0].url.removeprefix("http://"), timeout=20)
    for _ in range(2):
        connection.request("GET", "/health")
        first = connection.sock
        assert connection.getresponse().read()
        assert connection.sock is first is not None  # the same one again
        time.sleep(5.5)  # uvicorn's own limit is 5 seconds
    connection.close()
