"""Programs that stand in front of servers, started as docs/doors.md shows it."""

from __future__ import annotations

import os
import re
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from serving import free_port, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "config" / "doors"
PROGRAMS = (ROOT / ".venv-clients" / "bin", Path("/usr/sbin"))
DOORS = {
    "nginx": "nginx.conf",
    "haproxy": "haproxy.cfg",
    "envoy": "envoy.yaml",
    "vllm-router": "vllm-router.sh",
    "smg": "smg.sh",
}
"""Of each door, its file in config/doors."""
_SERVERS = ("8001", "8002", "8003")
_FRONT, _FRONT_TLS, _METRICS = "8080", "8443", "29000"
"""The ports in those files."""


def command(file: str) -> str:
    """The line of docs/doors.md that starts a door with `file` as the last of its files."""
    page = (ROOT / "docs" / "doors.md").read_text()
    lines = re.findall(rf"(?m)^[^`|\n]*config/doors/{re.escape(file)}\"?$", page)
    assert len(lines) == 1, lines
    return str(lines[0])


def placed(urls: Sequence[str], place: Path, ports: Mapping[str, str]) -> dict[str, str]:
    """Copy config/doors to `place`, with other `ports` and the servers at `urls`; what it was."""
    servers = {d: url.rpartition(":")[2] for d, url in zip(_SERVERS, urls, strict=False)}
    place.mkdir(parents=True)
    texts = {}
    for original in CONFIG.iterdir():
        texts[original.name] = text = original.read_text()
        if len(urls) > 2:
            text = _with_a_third(text)
        copy = place / original.name
        copy.write_text(
            re.sub(r"\b\d+\b", lambda port: ({**ports, **servers}).get(port[0], port[0]), text)
        )
        copy.chmod(original.stat().st_mode)
    return texts


def _with_a_third(text: str) -> str:
    """A configuration with one server more: a line of its own, or a word in the one for all."""
    second, third = _SERVERS[1:]
    text = re.sub(rf"(http://\S+:){second}", rf"\g<1>{second} \g<1>{third}", text)
    return re.sub(rf"(?m)^(.*port_value: ){second}(.*)$", rf"\g<1>{second}\2\n\g<1>{third}\2", text)


@contextmanager
def opened(
    file: str, urls: Sequence[str], place: Path, *, tls: bool = False
) -> Iterator[tuple[str, Path]]:
    """Start the door of `file` before the servers at `urls`, by the command in docs/doors.md.

    Its files are those of config/doors with other ports. Yields its URL (where it speaks `tls`, of
    that) when an answer came through it, and the file with all that it says.
    """
    line = command(file)
    ports = {default: str(free_port()) for default in (_FRONT, _FRONT_TLS, _METRICS)}
    copies = placed(urls, place / "config" / "doors", ports)
    assert {_FRONT, *_SERVERS[:2]} <= {
        port for copy in copies if copy in line for port in re.findall(r"\d+", copies[copy])
    }
    log = place / "door.log"
    path = os.pathsep.join([*map(str, PROGRAMS), os.environ["PATH"]])
    with log.open("w") as output:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {line}"], stdout=output, stderr=output, cwd=place,
            env=os.environ | {"PATH": path, "TMPDIR": str(place)},
        )  # fmt: skip
    url = f"http://127.0.0.1:{ports[_FRONT]}"

    def answers() -> bool:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            return httpx.get(f"{url}/v1/models", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_until(answers, 60)
        yield f"https://localhost:{ports[_FRONT_TLS]}" if tls else url, log
    finally:
        process.terminate()
        process.wait(20)
