"""Build the Dockerfile's `cpu` target and use it as a cluster would: `make check-image`.

No Docker daemon: buildah builds on a Debian that debootstrap makes, and the server runs in a mount
and a process namespace of its own: as PID 1, as user 10001, with no capability, on a read-only root
with only /tmp, /cache and /dev/shm to write to. Network and processors are this machine's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import httpx
from processes import LONG, children
from serving import free_port, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
EXAMPLES = """\
examples:
  make check-image
  make check-image ARGS="--keep /var/tmp/synthia"              what was built stays, and is built on
  make check-image ARGS="--volume /etc/pip.conf:/etc/pip.conf:ro"   with this machine's pip settings
"""
BASE, IMAGE = "localhost/synthia-base", "localhost/synthia-vllm:cpu"
BUILDAH = ["buildah", "--storage-driver", "vfs"]
USER = 10001
ASK: dict[str, Any] = {
    "model": "synthia-demo",
    "messages": [{"role": "user", "content": "What is a token?"}],
    "temperature": 0,
}
# What a container engine does before it starts a process, in the namespaces that `unshare` made.
CONTAINER = """
set -eu
root=$1 cache=$2; shift 2
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount -t proc proc "$root/proc"
mount --rbind -o ro /sys "$root/sys"
mount -t tmpfs tmpfs "$root/dev"
for device in null zero full random urandom; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root/dev/shm"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount --bind "$cache" "$root/cache"
mount --bind /etc/resolv.conf "$root/etc/resolv.conf" 2>/dev/null || true
exec chroot "$root" setpriv --reuid USER --regid USER --clear-groups --bounding-set=-all \\
    --inh-caps=-all --no-new-privs env -i -C WORKDIR "$@"
""".replace("USER", str(USER))


def say(text: str) -> None:
    """A line of progress."""
    print(f"[image] {text}", file=sys.stderr, flush=True)


def run(*command: str | Path, **more: Any) -> str:
    """What `command` prints. It must succeed."""
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **more)
    return str(done.stdout)


def build(place: Path, mirror: str, options: list[str]) -> None:
    """Make the base image, unless it is there, and the image."""
    if subprocess.run([*BUILDAH, "inspect", BASE], capture_output=True, check=False).returncode:
        rootfs = place / "base"
        say("a Debian with Python, from debootstrap (half a minute)")
        packages = "--include=python3,python3-venv,ca-certificates"
        with (place / "debootstrap.log").open("w") as log:
            subprocess.run(
                ["debootstrap", "--variant=minbase", packages, "bookworm", rootfs, mirror],
                stdout=log, check=True,
            )  # fmt: skip
        container = run(*BUILDAH, "from", "scratch").strip()
        run(*BUILDAH, "add", container, rootfs, "/")
        run(*BUILDAH, "commit", "--rm", container, BASE)
        shutil.rmtree(rootfs)
    say("the Dockerfile's target cpu (a few minutes)")
    # Docker's format: OCI's has no health check. The options are the user's: volumes, for one.
    command = [*BUILDAH, "build", "--isolation", "chroot", "--format", "docker", "--layers=false"]
    command += ["--target", "cpu", "--build-arg", f"PYTHON_IMAGE={BASE}", "--tag", IMAGE]
    begun = time.monotonic()
    with (place / "build.log").open("w") as log:
        done = subprocess.run([*command, *options, ROOT], stdout=log, stderr=log, check=False)
    if done.returncode:
        raise SystemExit((place / "build.log").read_text()[-4000:])
    say(f"built in {time.monotonic() - begun:.0f} s")


class Container:
    """The server in its namespaces."""

    def __init__(self, root: Path, cache: Path, config: dict[str, Any], log: Path) -> None:
        self._root, self._log = root, log
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._environment = [*config["Env"], "SYNTHIA_HOST=127.0.0.1", f"SYNTHIA_PORT={self._port}"]
        script = CONTAINER.replace("WORKDIR", shlex.quote(config["WorkingDir"]))
        command = [*config["Entrypoint"], *config["Cmd"]]
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [
                    "unshare", "--mount", "--pid", "--fork", "--kill-child",
                    "sh", "-c", script, "sh", root, cache, *self._environment, *command,
                ],
                stdout=output, stderr=output,
            )  # fmt: skip
        wait_until(lambda: children(self._process.pid))
        self.pid = children(self._process.pid)[0][0]

    def ready(self) -> bool:
        """Whether it takes requests. Raises `SystemExit` if it has ended."""
        if self._process.poll() is not None:
            raise SystemExit(self._log.read_text())
        with suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/ready").status_code == 200
        return False

    def inside(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run `command` in there, as what the server is."""
        return subprocess.run(
            [
                "nsenter", f"--target={self.pid}", "--mount", "--pid",
                f"--root=/proc/{self.pid}/root",
                "setpriv", "--reuid", str(USER), "--regid", str(USER), "--clear-groups",
                "env", "-i", *self._environment, *command,
            ],
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    def status(self, name: str) -> str:
        """A line of PID 1's ``/proc/…/status``."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        [value] = re.findall(rf"^{name}:\s*(.*)$", text, re.MULTILINE)
        return str(value)

    def memory(self) -> int:
        """Bytes that all its processes take, shared ones once."""
        total = 0
        for pid in [self.pid, *(pid for pid, _ in children(self.pid))]:
            with suppress(OSError):
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                total += 1024 * int(re.findall(r"^Pss:\s+(\d+)", rollup, re.MULTILINE)[0])
        return total

    def stop(self) -> None:
        """Send SIGTERM to PID 1."""
        os.kill(self.pid, signal.SIGTERM)

    def wait(self) -> int:
        """What it exits with."""
        return self._process.wait(90)

    def kill(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()


@contextmanager
def started(root: Path, cache: Path, config: dict[str, Any], log: Path) -> Iterator[Container]:
    """A server that is ready, from the image unpacked at `root`."""
    container = Container(root, cache, config, log)
    try:
        begun, peak = time.monotonic(), 0
        while not container.ready():
            peak = max(peak, container.memory())
            assert time.monotonic() - begun < 600, log.read_text()
            time.sleep(0.5)
        gib = 1 << 30
        say(
            f"ready after {time.monotonic() - begun:.0f} s, at most {peak / gib:.1f} GiB of memory "
            f"until then, {container.memory() / gib:.1f} now"
        )
        yield container
    finally:
        container.kill()


def use(container: Container, config: dict[str, Any]) -> None:
    """What is promised of the image, seen."""
    assert container.status("Uid").split() == [str(USER)] * 4
    assert int(container.status("CapEff"), 16) == int(container.status("CapBnd"), 16) == 0
    assert container.status("NSpid").split()[-1] == "1"
    say("PID 1, user 10001, no capabilities")
    for place in ("/", "/app", "/opt/synthia", "/etc"):
        refused = container.inside("touch", f"{place}/x").stderr
        assert "Read-only" in refused or "Permission" in refused, refused
    root = Path(f"/proc/{container.pid}/mounts").read_text().splitlines()[-1000:]
    assert any(line.split()[1] == "/" and "ro" in line.split()[3].split(",") for line in root)
    say("the root file system is read-only")
    chat = f"{container.url}/v1/chat/completions"
    plain = httpx.post(chat, json=ASK, timeout=60).json()
    text = plain["choices"][0]["message"]["content"]
    assert text
    with httpx.stream("POST", chat, json=ASK | {"stream": True}, timeout=60) as stream:
        events = [
            json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")
        ]
    assert text == "".join(e["choices"][0]["delta"].get("content") or "" for e in events)
    say(f"answered, streamed as plain: {text[:60]}…")
    health = container.inside(*config["Healthcheck"]["Test"][1:])
    assert health.returncode == 0, health.stderr
    say("the health check passes")


def end(container: Container, config: dict[str, Any]) -> None:
    """Stop it under a running answer."""
    assert config["StopSignal"] == "SIGTERM"
    with httpx.stream(
        "POST", f"{container.url}/v1/chat/completions", json=LONG | {"stream": True}, timeout=60
    ) as stream:
        lines = stream.iter_lines()
        next(lines)
        container.stop()
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert container.wait() == 0
    say("stopped with SIGTERM: the running answer was finished, exit status 0")


def main() -> None:
    """Build, use, stop, start again."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--keep", type=Path, metavar="FOLDER", help="work here, and leave images and cache there")
    add("--mirror", default="http://deb.debian.org/debian", help="of Debian's packages")
    add("--volume", action="append", default=[], metavar="FROM:TO:ro", help="for the build only")
    asked = parser.parse_args()
    for tool in ("buildah", "debootstrap"):
        if shutil.which(tool) is None:
            parser.error(f"`{tool}` is not installed: on Debian, apt-get install {tool}")
    if os.geteuid() != 0:
        parser.error("only root can do this: it mounts, and becomes another user")
    with TemporaryDirectory(prefix="synthia-image-", dir="/var/tmp") as temporary:
        place = asked.keep or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        BUILDAH.extend(["--root", str(place / "images"), "--runroot", str(place / "run")])
        build(place, asked.mirror, [f"--volume={volume}" for volume in asked.volume])
        config = json.loads(run(*BUILDAH, "inspect", IMAGE))["Docker"]["config"]
        assert config["User"] == str(USER)
        assert list(config["ExposedPorts"]) == ["8000/tcp"]
        container = run(*BUILDAH, "from", IMAGE).strip()
        try:
            root = Path(run(*BUILDAH, "mount", container).strip())
            say(f"{int(run('du', '-s', root).split()[0]) / (1 << 20):.1f} GiB in {IMAGE}")
            cache = place / "cache"
            cache.mkdir(exist_ok=True)
            os.chown(cache, USER, USER)
            with started(root, cache, config, place / "server.log") as server:
                use(server, config)
                end(server, config)
            say("again, with what the first start left in /cache")
            with started(root, cache, config, place / "server.log") as server:
                server.stop()
                assert server.wait() == 0
        finally:
            run(*BUILDAH, "rm", container)
    say("all is well")


if __name__ == "__main__":
    main()
