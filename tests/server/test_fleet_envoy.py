"""The chart's Envoys, run for real: in front of two servers, with a picker and without one."""

from __future__ import annotations

import copy
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml
from manifests import CHART, helm
from pickers import Picker
from serving import Running, free_port, running, wait_until

from synthia_vllm.admission.users import new_key
from synthia_vllm.engine.fake import FakeEngine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ENVOY = Path(__file__).parents[2] / ".venv-clients" / "bin" / "envoy"
CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "synthia-demo", "messages": [{"role": "user", "content": "Hi"}]}


def configuration(name: str) -> dict[str, Any]:
    """What the chart gives Envoy: `envoy.yaml`, the gateway's, or `render.yaml`, the picker's."""
    values = {"gateway": {"kind": "standalone"}, "picker": {"keySecret": "synthia-picker"}}
    done = helm("template", "synthia-vllm", str(CHART), f"--values={CHART}/presets/fleet.yaml",
                values=values)  # fmt: skip
    assert done.returncode == 0, done.stderr
    [text] = [
        found["data"][name]
        for found in yaml.safe_load_all(done.stdout)
        if found["kind"] == "ConfigMap" and name in found["data"]
    ]
    return dict(yaml.safe_load(text))


@dataclass
class Gateway:
    """One that runs: the addresses of its listeners, and of the picker that it asks."""

    ports: dict[str, int]
    servers: list[Running]

    def url(self, listener: str) -> str:
        return f"http://127.0.0.1:{self.ports[listener]}"

    def ask(self, **more: Any) -> httpx.Response:
        return httpx.post(f"{self.url('front')}{CHAT}", json=BODY | more, timeout=60)

    def seen(self) -> list[int]:
        """How many requests each server has had."""
        return [len(server.engine.seen) for server in self.servers]  # type: ignore[attr-defined]

    def address(self, server: int) -> str:
        return self.servers[server].url.removeprefix("http://")

    def picks(self) -> bool:
        """Whether Envoy knows a picker that is well, and takes the way that asks it."""
        told = httpx.get(f"{self.url('admin')}/clusters").text
        picker = f"pickers::127.0.0.1:{self.ports['pickers']}::health_flags::healthy"
        return picker in told and f"{self.ports['picked']}::health_flags::healthy" in told


@contextmanager
def envoy(
    place: Path, servers: list[Running], change: Callable[[Any], object] = lambda _: None
) -> Iterator[Gateway]:
    """The gateway as the chart has it, but on this machine: other ports, addresses for names."""
    wanted = configuration("envoy.yaml")
    listeners = wanted["static_resources"]["listeners"]
    names = [*(listener["name"] for listener in listeners), "admin", "pickers"]
    gateway = Gateway({name: free_port() for name in names}, servers)
    _move(wanted, gateway.ports, servers)
    change(wanted)
    with _run(place, wanted, f"{gateway.url('status')}/ready"):
        yield gateway


def _move(wanted: Any, ports: dict[str, int], servers: list[Running]) -> None:
    for listener in wanted["static_resources"]["listeners"]:
        address = listener["address"]["socket_address"]
        address.update(address="127.0.0.1", port_value=ports[listener["name"]])
    wanted["admin"]["address"]["socket_address"]["port_value"] = ports["admin"]
    for cluster in wanted["static_resources"]["clusters"]:
        if cluster["name"] == "servers":
            there = [int(server.url.rpartition(":")[2]) for server in servers]
        elif "load_assignment" in cluster:
            there = [ports[cluster["name"]]]
        else:
            continue
        [place] = cluster["load_assignment"]["endpoints"]
        place["lb_endpoints"] = [
            {
                "endpoint": {
                    "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}
                }
            }
            for port in there
        ]


@contextmanager
def _run(place: Path, wanted: Any, ready: str, **env: str) -> Iterator[None]:
    file, log = place / "envoy.yaml", place / "envoy.log"
    file.write_text(yaml.safe_dump(wanted))
    flags = ["--disable-hot-restart", "--concurrency", "2", "--log-level", "warn"]
    with log.open("w") as out:
        process = subprocess.Popen(
            [ENVOY, "--config-path", file, *flags], env=os.environ | env, stdout=out, stderr=out
        )
    try:
        wait_until(lambda: process.poll() is not None or _answers(ready))
        assert process.poll() is None, log.read_text()
        assert "eprecated" not in log.read_text()
        yield
    finally:
        process.terminate()
        process.wait(30)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Running]]:
    with running(FakeEngine()) as one, running(FakeEngine()) as other:
        yield [one, other]


@pytest.fixture(scope="module")
def gateway(servers: list[Running], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with envoy(tmp_path_factory.mktemp("envoy"), servers) as found:
        yield found


@contextmanager
def picker(gateway: Gateway, place: Path, server: int) -> Iterator[Picker]:
    """One that sends everything to this server, when the gateway asks it."""
    found = Picker(place, gateway.ports["pickers"], lambda _: gateway.address(server))
    try:
        wait_until(gateway.picks)
        yield found
    finally:
        found.stop()


@pytest.mark.parametrize("server", [0, 1])
def test_requests_go_where_the_picker_says(gateway: Gateway, tmp_path: Path, server: int) -> None:
    """Whatever a client says of that; whole, plain and streamed; and only what has a prompt."""
    before = gateway.seen()
    long = [{"role": "user", "content": "x" * 1500}] * 100  # in three parts
    with picker(gateway, tmp_path, server) as found:
        bodies: list[bytes] = []
        found.pick = lambda body: bodies.append(body) or gateway.address(server)  # type: ignore[func-returns-value]
        elsewhere = {"x-gateway-destination-endpoint": gateway.address(1 - server)}
        url = f"{gateway.url('front')}{CHAT}"
        assert httpx.post(url, json=BODY, headers=elsewhere).status_code == 200
        with httpx.stream("POST", url, json=BODY | {"stream": True}) as response:
            assert response.read().endswith(b"data: [DONE]\n\n")
        assert gateway.ask(messages=long).json()["error"]["code"] == "context_length_exceeded"
        assert found.asked == len(bodies) == 3
        assert len(bodies[-1]) > 100_000
        assert httpx.get(f"{gateway.url('front')}/v1/models").status_code == 200
        assert httpx.post(f"{gateway.url('front')}{CHAT}/render", json=BODY).status_code == 200
        assert found.asked == 3
    after = gateway.seen()
    assert after[server] == before[server] + 2
    assert after[1 - server] == before[1 - server]


def test_nothing_but_the_api_comes_through(gateway: Gateway) -> None:
    """Neither what names users, nor a way around by a path."""
    for path in ("/metrics", "/", "/v1/../metrics", "/v1/%2e%2e/metrics", "/ready"):
        assert httpx.get(f"{gateway.url('front')}{path}").status_code in (400, 404)
    assert "envoy_cluster" in httpx.get(f"{gateway.url('status')}/metrics").text


def test_without_a_picker_all_is_served(gateway: Gateway, tmp_path: Path) -> None:
    """When it was never there, when it is killed under requests, and it is asked again later."""

    def flood(number: int) -> list[int]:
        with ThreadPoolExecutor(8) as pool:
            told = pool.map(lambda _: gateway.ask().status_code, range(number))
            return list(told)

    before = gateway.seen()
    assert set(flood(40)) == {200}
    for times in range(2):
        with picker(gateway, tmp_path, times) as found, ThreadPoolExecutor(1) as pool:
            told = pool.submit(flood, 60)
            wait_until(lambda asked=found.asked: found.asked > asked + 5)  # type: ignore[misc]
            found.stop()
            assert set(told.result()) == {200}
    after = gateway.seen()
    assert sum(after) == sum(before) + 160
    assert all(now > then for now, then in zip(after, before, strict=True))


def test_a_gateways_filter_does_not_fail_open(servers: list[Running], tmp_path: Path) -> None:
    """What all this is for: where the filter is in front, a body that was handed to it is lost."""

    def as_gateways_have_it(wanted: Any) -> None:
        by_name = {found["name"]: found for found in wanted["static_resources"]["listeners"]}
        front, picked = (
            by_name[name]["filter_chains"][0]["filters"][0]["typed_config"]
            for name in ("front", "picked")
        )
        asks = copy.deepcopy(picked["http_filters"][0])
        del asks["typed_config"]["status_on_error"]
        front["http_filters"].insert(0, asks)
        [host] = front["route_config"]["virtual_hosts"]
        host["routes"] = [{"match": {"prefix": "/"}, "route": {"cluster": "servers"}}]

    def fail(_: bytes) -> str:
        raise RuntimeError

    with (
        envoy(tmp_path, servers, as_gateways_have_it) as found,
        picker(found, tmp_path, 0) as asked,
    ):
        assert found.ask().status_code == 200
        asked.pick = fail
        assert {found.ask().status_code for _ in range(5)} == {500}


def test_a_picker_that_fails_is_passed_over(gateway: Gateway, tmp_path: Path) -> None:
    """Also with a body in its hands."""

    def fail(_: bytes) -> str:
        raise RuntimeError

    with picker(gateway, tmp_path, 0) as found:
        found.pick = fail
        assert {gateway.ask().status_code for _ in range(5)} == {200}
        assert found.asked


def test_a_picker_that_hangs_is_passed_over(gateway: Gateway, tmp_path: Path) -> None:
    """Though it says that it is well."""
    with picker(gateway, tmp_path, 0) as found:
        found.hangs = True
        before = found.asked
        assert gateway.ask().status_code == 200
        assert found.asked == before + 1


def test_a_picker_ends_no_answer(tmp_path: Path) -> None:
    """One that is killed, and one that is asked for longer than a question may take."""
    slow = FakeEngine(["word "] * 70, delay=0.1)
    with (
        running(slow) as one,
        running(FakeEngine()) as other,
        envoy(tmp_path, [one, other]) as found,
        picker(found, tmp_path, 0) as asked,
    ):
        url = f"{found.url('front')}{CHAT}"
        for kills in (False, True):
            with httpx.stream("POST", url, json=BODY | {"stream": True}, timeout=60) as told:
                lines = told.iter_lines()
                next(lines)
                if kills:
                    asked.stop()
                *_, done, _ = lines
            assert done == "data: [DONE]"
        assert found.seen() == [2, 0]


def test_a_server_that_is_gone_is_passed_over(gateway: Gateway, tmp_path: Path) -> None:
    """Picked all the same, before the picker knows."""
    with picker(gateway, tmp_path, 0) as found:
        found.pick = lambda _: f"127.0.0.1:{free_port()}"
        assert gateway.ask().status_code == 200
        found.pick = lambda _: "not an address"
        assert gateway.ask().status_code == 200


def test_a_picker_gets_tokens_by_its_key(tmp_path: Path) -> None:
    """By both routes that llm-d's asks, with the body of its client and no key of its own."""
    key, key_hash = new_key()
    file = tmp_path / "keys.yaml"
    file.write_text(yaml.safe_dump({"users": {"picker": {"keys": [key_hash]}}}))
    with running(FakeEngine(), keys_file=file) as server:
        wanted = configuration("render.yaml")
        ports = {name: free_port() for name in ("render", "admin")}
        _move(wanted, ports, [server])
        with _run(tmp_path, wanted, f"http://127.0.0.1:{ports['admin']}/ready", SYNTHIA_KEY=key):
            url = f"http://127.0.0.1:{ports['render']}"
            asked = {"prompt": ["Hi", "You"], "model": "synthia-demo", "stream": True}
            wait_until(lambda: httpx.post(f"{url}/v1/completions/render", json=asked).is_success)
            several = httpx.post(f"{url}/v1/completions/render", json=asked).json()
            assert [sorted(each) for each in several] == [["count", "token_ids"]] * 2
            chat = httpx.post(f"{url}{CHAT}/render", json=BODY | {"stream": True}).json()
            assert chat["token_ids"]
            assert httpx.post(f"{url}{CHAT}", json=BODY).status_code == 404
        assert httpx.post(f"{server.url}{CHAT}/render", json=BODY).status_code == 401
        assert not server.engine.seen  # type: ignore[attr-defined]
