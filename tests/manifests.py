"""The Kubernetes manifests as kustomize renders them, and ways to look into them."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT = Path(__file__).parents[1]
KUBERNETES = ROOT / "config" / "kubernetes"
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())

Object = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """A template of pods, and who makes them."""

    owner: Object
    labels: Mapping[str, str]
    spec: Object

    @property
    def name(self) -> str:
        return f"{self.owner['kind']}/{self.owner['metadata']['name']}"

    @property
    def server(self) -> Object | None:
        """The container that runs our server, if there is one."""
        return next((c for c in self.spec["containers"] if c["name"] == "server"), None)

    def containers(self) -> Iterator[Object]:
        """All containers, those that come first too."""
        yield from self.spec.get("initContainers", [])
        yield from self.spec["containers"]

    def volume(self, mount_path: str) -> Object:
        """What the server has there; nothing, if nothing."""
        mounts = (self.server or self.spec["containers"][0]).get("volumeMounts", [])
        name = next((m["name"] for m in mounts if m["mountPath"] == mount_path), None)
        return next((v for v in self.spec.get("volumes", []) if v["name"] == name), {})


@dataclass(frozen=True)
class Installation:
    """All objects of one overlay."""

    objects: list[Object]

    def of(self, *kinds: str) -> list[Object]:
        """The objects of these kinds."""
        return [found for found in self.objects if found["kind"] in kinds]

    def pods(self) -> Iterator[Pod]:
        """All templates of pods."""
        for owner in self.of("Deployment", "Job"):
            template = owner["spec"]["template"]
            yield Pod(owner, template["metadata"]["labels"], template["spec"])
        for owner in self.of("LeaderWorkerSet"):
            for part in ("leaderTemplate", "workerTemplate"):
                template = owner["spec"]["leaderWorkerTemplate"][part]
                yield Pod(owner, template["metadata"]["labels"], template["spec"])

    def servers(self) -> list[Pod]:
        """The templates of pods that run our server."""
        return [pod for pod in self.pods() if pod.server is not None]

    def smallest(self) -> int:
        """The number of pods of the server when there are the fewest."""
        for scaler in self.of("HorizontalPodAutoscaler"):
            return int(scaler["spec"]["minReplicas"])
        for scaler in self.of("ScaledObject"):
            return int(scaler["spec"]["minReplicaCount"])
        for group in self.of("LeaderWorkerSet"):
            return int(group["spec"]["replicas"]) * int(
                group["spec"]["leaderWorkerTemplate"]["size"]
            )
        return int(self.servers()[0].owner["spec"].get("replicas", 1))

    def config(self) -> str:
        """The server's configuration file."""
        return next(
            str(text)
            for found in self.of("ConfigMap")
            for name, text in found["data"].items()
            if name == "server.yaml"
        )


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a selector of labels (``matchLabels`` or plain) takes a pod with `labels`."""
    wanted = selector.get("matchLabels", {} if selector == {} else selector)
    return all(labels.get(name) == value for name, value in wanted.items())


def render(overlay: str) -> Installation:
    """What `kubectl apply -k` would send to the cluster."""
    return Installation(list(yaml.safe_load_all(_rendered(overlay))))


@cache
def _rendered(overlay: str) -> str:
    tool = shutil.which("kubectl")
    assert tool, "kubectl (1.27 or later) is not on this machine: install it to check config/"
    done = subprocess.run(
        [tool, "kustomize", str(KUBERNETES / "overlays" / overlay)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # what is deprecated
    return done.stdout
