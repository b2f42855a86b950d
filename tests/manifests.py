"""The Kubernetes manifests as Helm renders them, and ways to look into them."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT = Path(__file__).parents[1]
CHART = ROOT / "config" / "helm" / "synthia-vllm"
HELM = ROOT / ".venv" / "cluster" / "helm" / "helm"
KUBECTL = ROOT / ".venv" / "cluster" / "kubectl" / "kubectl"
PRESETS = sorted(path.stem for path in (CHART / "presets").iterdir())
NAMESPACE = "synthia"

Object = dict[str, Any]

_DATABASES: Final[Object] = {
    "accounts": {"secret": "synthia-valkey"},
    "ledger": {"secret": "synthia-postgres", "to": [{"ipBlock": {"cidr": "10.0.0.7/32"}}]},
}
ODD: Final[dict[str, tuple[list[str], Object]]] = {
    "everything-existing": (
        ["gpu"],
        {
            "image": {"digest": "sha256:" + "0" * 64, "pullPolicy": "Always"},
            "imagePullSecrets": [{"name": "registry"}],
            "storage": {
                "models": {"existingClaim": "weights"},
                "cache": {"existingClaim": "kernels"},
                "data": {"enabled": True, "existingClaim": "words"},
            },
            "settings": {"transcripts": {"directory": "/data/transcripts"}},
            "networkPolicy": {"from": []},
        },
    ),
    "weights-already-there": (
        ["gpu"],
        {"model": {"path": "mine/Synthia"}, "storage": {"models": {"existingClaim": "weights"}}},
    ),
    "a-revision-and-classes": (
        ["l4"],
        {
            "model": {"revision": "0123abcd" * 5, "hubTokenSecret": ""},
            "storage": {"models": {"className": "fast"}, "data": {"enabled": True}},
        },
    ),
    "a-fleet-with-databases": (
        ["h100"],
        {"replicas": 3, "storage": {"accessMode": "ReadWriteMany"}, **_DATABASES},
    ),
    "several-without-databases": (
        ["a10"],
        {"replicas": 3, "storage": {"accessMode": "ReadWriteMany"}, "supplementalGroups": [4321]},
    ),
    "one-with-databases": (["gpu"], _DATABASES),
    "scheduled-with-care": (
        ["multi-gpu", "a100"],
        {
            "nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"},
            "tolerations": [],
            "affinity": {"nodeAffinity": {}},
            "topologySpreadConstraints": [
                {"topologyKey": "rack", "maxSkew": 1, "whenUnsatisfiable": "DoNotSchedule"}
            ],
            "priorityClassName": "serving",
            "runtimeClassName": "nvidia",
            "readOnlyRootFilesystem": False,
            "extraEnv": [{"name": "NCCL_DEBUG", "value": "WARN"}],
            "podAnnotations": {"example.com/owner": "us"},
        },
    ),
    "two-groups-of-four-nodes": (
        ["multi-node", "h200"],
        {
            "nodes": 4,
            "gpus": 2,
            "replicas": 2,
            "settings": {"engine": {"enforce_eager": True, "enable_chunked_prefill": False}},
        },
    ),
    "a-group-watched": (
        ["multi-node"],
        {
            "monitoring": {"enabled": True, "labels": {"team": "us"}, "keySecret": "scrape"},
            "settings": {"metrics": "key"},
            "networkPolicy": {
                "egress": [{"to": [{"podSelector": {}}], "ports": [{"port": 4317}]}],
            },
        },
    ),
    "short-drains": (["gpu"], {"drain": {"delaySeconds": 20, "graceSeconds": 60}}),
    "long-requests": (["gpu"], {"settings": {"limits": {"request_seconds": 1800.5}}}),
    "a-demo-to-the-world": (
        ["cpu-demo"],
        {
            "replicas": 2,
            "ingress": {"enabled": True, "host": "chat.example.com", "tlsSecret": "chat-tls"},
            "httpRoute": {
                "enabled": True,
                "hostnames": ["chat.example.com"],
                "parentRefs": [{"name": "web", "namespace": "gateways", "sectionName": "https"}],
            },
        },
    ),
    "a-demo-that-keeps-words": (["cpu-demo"], {"storage": {"data": {"enabled": True}}}),
    "a-demo-with-keys-and-a-dashboard": (
        ["cpu-demo"],
        {
            "keys": {"secret": "people"},
            "monitoring": {"dashboard": {"enabled": True, "labels": {"dashboards": "yes"}}},
        },
    ),
    "a-fleet-behind-envoy": (
        ["fleet"],
        {
            "gateway": {"kind": "standalone", "serviceType": "LoadBalancer"},
            "monitoring": {"enabled": True},
            "ingress": {"enabled": True, "host": "chat.example.com", "tlsSecret": "chat-tls"},
            **_DATABASES,
        },
    ),
    "a-fleet-of-demos": (
        ["cpu-demo", "fleet"],
        {
            "gateway": {
                "existing": {"name": "web", "namespace": "gateways"},
                "hostnames": ["chat.example.com"],
            },
            "monitoring": {"enabled": True},
            "picker": {"keySecret": "", "replicas": 3, "scrapeSeconds": 5},
        },
    ),
    "scaled-by-little": (
        ["keda", "l4"],
        {"autoscaling": {"minReplicas": 1, "maxReplicas": 3, "load": 0.5}, **_DATABASES},
    ),
}
"""Presets and values together, as somebody might choose them."""
NAMES: Final = [*PRESETS, *ODD]


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
    """All objects of one choice of values, the values, and what Helm tells who installs it."""

    objects: list[Object]
    values: Object
    notes: str

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
    """Whether a selector of labels (``matchLabels`` and expressions, or plain) takes a pod."""
    plain = selector if not {"matchLabels", "matchExpressions"} & set(selector) else {}
    wanted = selector.get("matchLabels", plain)
    among = selector.get("matchExpressions", [])
    assert all(expression["operator"] == "In" for expression in among)
    return all(labels.get(name) == value for name, value in wanted.items()) and all(
        labels.get(expression["key"]) in expression["values"] for expression in among
    )


def helm(*arguments: str, values: Object | None = None) -> subprocess.CompletedProcess[str]:
    """Run Helm on the chart; the values go in by standard input."""
    assert HELM.exists(), "there is no helm in .venv: run `make .venv/.cluster`"
    command, *rest = arguments
    return subprocess.run(
        [HELM, command, *rest, "--namespace", NAMESPACE, "--values", "-"],
        input=json.dumps(values or {}),
        capture_output=True,
        text=True,
        check=False,
    )


@cache
def render(name: str) -> Installation:
    """What Helm would send to the cluster with this preset, or these of `ODD`; and what it says."""
    presets, own = ODD.get(name, ([name], {}))
    files = [f"--values={CHART / 'presets' / preset}.yaml" for preset in presets]
    done = helm("install", "synthia-vllm", str(CHART), "--dry-run=client", *files, values=own)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr
    said, _, notes = done.stdout.partition("\nNOTES:\n")
    manifest = said.partition("\nMANIFEST:\n")[2]
    return Installation(list(yaml.safe_load_all(manifest)), merged(name), notes)


def merged(name: str) -> Object:
    """The values that make this installation."""
    presets, own = ODD.get(name, ([name], {}))
    files = [CHART / "values.yaml", *(CHART / "presets" / f"{preset}.yaml" for preset in presets)]
    values: Object = {}
    for layer in [*(yaml.safe_load(file.read_text()) for file in files), own]:
        _merge(values, layer)
    return values


def _merge(into: Object, layer: Object) -> None:
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = json.loads(json.dumps(value))
