"""The Kubernetes manifests: rendered, valid, and as careful as they claim to be."""

from __future__ import annotations

import copy
import json
import runpy
import shlex
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import kubernetes_validate
import pytest
import rules
from manifests import KUBERNETES, OVERLAYS, Installation, Object, Pod, render
from processes import COMMAND

from synthia_vllm.engine.fake import FakeEngine
from synthia_vllm.serve.app import create_app
from synthia_vllm.settings import Settings
from synthia_vllm.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable

SCHEMAS = Path(__file__).with_name("schemas")
# The oldest that knows all that is used here, and the newest whose schemas are at hand.
VERSIONS = ("1.31", kubernetes_validate.latest_version())


def validate(found: Object) -> None:
    """Raise if this object is not what its kind may be."""
    group, _, version = found["apiVersion"].rpartition("/")
    own = SCHEMAS / f"{found['kind']}-{group}-{version}.json".lower()
    if own.exists():
        jsonschema.validate(found, json.loads(own.read_text()))
        return
    for release in VERSIONS:
        kubernetes_validate.validate(found, release, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_valid(overlay: str) -> None:
    """Each object fits its schema; a kind without a schema, or an unknown field, is an error."""
    installation = render(overlay)
    for found in installation.objects:
        validate(found)
        namespaced = found["kind"] != "Namespace"
        assert found["metadata"].get("namespace") == ("synthia" if namespaced else None)
    for pod in installation.pods():
        validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "it"}, "spec": pod.spec})
    names = [(found["kind"], found["metadata"]["name"]) for found in installation.objects]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("check", rules.RULES, ids=lambda check: check.__name__)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_rule(overlay: str, check: Callable[[Installation], Any]) -> None:
    """Each overlay keeps each rule."""
    assert list(check(render(overlay))) == []


def first(installation: Installation, kind: str) -> Any:
    """The server's object of this kind."""
    return next(o for o in installation.of(kind) if o["metadata"]["name"].startswith("synthia"))


def pod(installation: Installation) -> Any:
    """The server's pod."""
    return installation.servers()[0].spec


def server(installation: Installation) -> Any:
    """The server's container."""
    return installation.servers()[0].server


def env(installation: Installation, name: str) -> Any:
    """One of the server's variables."""
    return next(entry for entry in server(installation)["env"] if entry["name"] == name)


# What somebody might do to the manifests, and the rule that notices.
BREAKS: list[tuple[str, str, Callable[[Installation], object]]] = [
    ("pods_are_locked", "gpu", lambda i: pod(i)["securityContext"].pop("runAsNonRoot")),
    ("pods_are_locked", "gpu", lambda i: pod(i)["securityContext"].pop("seccompProfile")),
    (
        "pods_are_locked",
        "gpu",
        lambda i: server(i)["securityContext"].pop("readOnlyRootFilesystem"),
    ),
    ("pods_are_locked", "gpu", lambda i: server(i)["securityContext"].pop("capabilities")),
    ("pods_are_locked", "gpu", lambda i: pod(i).update(hostIPC=True)),
    (
        "only_known_places_are_writable",
        "gpu",
        lambda i: [mount.pop("readOnly", None) for mount in server(i)["volumeMounts"]],
    ),
    (
        "only_known_places_are_writable",
        "gpu",
        lambda i: [volume.get("emptyDir", {}).pop("medium", None) for volume in pod(i)["volumes"]],
    ),
    ("nothing_is_injected", "gpu", lambda i: pod(i).pop("enableServiceLinks")),
    ("nothing_is_injected", "gpu", lambda i: pod(i).pop("automountServiceAccountToken")),
    (
        "no_secret_is_written_down",
        "gpu",
        lambda i: server(i)["env"].append({"name": "HF_TOKEN", "value": "hf_abc"}),
    ),
    ("images_are_fixed", "gpu", lambda i: server(i).update(image="synthia-vllm:latest")),
    ("resources_are_stated", "gpu", lambda i: server(i)["resources"]["limits"].pop("memory")),
    ("the_stop_has_time", "gpu", lambda i: pod(i).pop("terminationGracePeriodSeconds")),
    (
        "the_stop_has_time",
        "gpu",
        lambda i: env(i, "SYNTHIA_SHUTDOWN_GRACE_SECONDS").update(value="150"),
    ),
    (
        "the_stop_has_time",
        "gpu",
        lambda i: env(i, "SYNTHIA_SHUTDOWN_DELAY_SECONDS").update(value="0"),
    ),
    (
        "probes_ask_the_right_thing",
        "gpu",
        lambda i: server(i)["readinessProbe"]["httpGet"].update(path="/health"),
    ),
    ("probes_ask_the_right_thing", "gpu", lambda i: server(i).pop("startupProbe")),
    (
        "probes_ask_the_right_thing",
        "gpu",
        lambda i: server(i)["livenessProbe"].update(timeoutSeconds=1),
    ),
    (
        "a_rollout_takes_nothing_away",
        "gpu",
        lambda i: first(i, "Deployment")["spec"]["strategy"]["rollingUpdate"].update(maxSurge=0),
    ),
    (
        "evictions_leave_somebody",
        "gpu",
        lambda i: first(i, "PodDisruptionBudget")["spec"].update(minAvailable=0),
    ),
    (
        "evictions_leave_somebody",
        "fleet",
        lambda i: first(i, "PodDisruptionBudget")["spec"].update(maxUnavailable=3),
    ),
    (
        "evictions_leave_somebody",
        "gpu",
        lambda i: first(i, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"].update(a="b"),
    ),
    ("replicas_are_spread", "gpu", lambda i: pod(i)["topologySpreadConstraints"].pop()),
    ("the_network_is_closed", "gpu", lambda i: i.objects.remove(first(i, "NetworkPolicy"))),
    (
        "the_network_is_closed",
        "gpu",
        lambda i: [p["spec"].update(egress=[{}]) for p in i.of("NetworkPolicy")],
    ),
    (
        "the_network_is_closed",
        "gpu",
        lambda i: [p["spec"].update(ingress=[{}]) for p in i.of("NetworkPolicy")],
    ),
    (
        "services_reach_servers",
        "gpu",
        lambda i: first(i, "Service")["spec"].update(
            selector={"app.kubernetes.io/name": "synthia"}
        ),
    ),
    (
        "services_reach_servers",
        "fleet",
        lambda i: first(i, "InferencePool")["spec"].update(targetPorts=[{"number": 80}]),
    ),
    (
        "one_scaler_at_most",
        "keda",
        lambda i: i.objects.append(render("hpa").of("HorizontalPodAutoscaler")[0]),
    ),
    ("one_scaler_at_most", "hpa", lambda i: first(i, "Deployment")["spec"].update(replicas=2)),
    (
        "the_configuration_is_ours",
        "gpu",
        lambda i: (
            env(i, "SYNTHIA_MODEL").update(value="migtissera/Synthia-7B-v3.0")
            or server(i)["env"].remove(env(i, "SYNTHIA_KEYS_FILE"))
        ),
    ),
    (
        "the_configuration_is_ours",
        "gpu",
        lambda i: next(c for c in i.of("ConfigMap") if "server.yaml" in c["data"])["data"].update(
            {"server.yaml": "host: 0.0.0.0"}
        ),
    ),
]


@pytest.mark.parametrize(("name", "overlay", "harm"), BREAKS)
def test_rules_notice(name: str, overlay: str, harm: Callable[[Installation], object]) -> None:
    """Each rule finds what it is there to find."""
    installation = copy.deepcopy(render(overlay))
    harm(installation)
    assert list(getattr(rules, name)(installation))


def test_every_rule_is_tried() -> None:
    """No rule is without a manifest that breaks it."""
    assert {name for name, _, _ in BREAKS} == {check.__name__ for check in rules.RULES}


def test_probes_ask_routes_that_exist() -> None:
    """The paths in the manifests are routes of the server."""
    from prometheus_client import CollectorRegistry

    app = create_app(FakeEngine(()), Settings(), Metrics(CollectorRegistry()))
    paths = set(app.openapi()["paths"])
    for overlay in OVERLAYS:
        installation = render(overlay)
        for found in installation.servers():
            asked = [probe for name, probe in (found.server or {}).items() if "Probe" in name]
            assert {probe["httpGet"]["path"] for probe in asked} <= paths
        for monitor in installation.of("PodMonitor"):
            assert {end["path"] for end in monitor["spec"]["podMetricsEndpoints"]} <= paths


@pytest.mark.parametrize("overlay", ["gpu", "multi-gpu", "multi-node", "cpu-demo"])
def test_the_command_takes_what_the_pod_says(overlay: str, tmp_path: Path) -> None:
    """The server itself, vLLM's options included, accepts the arguments and variables."""
    installation = render(overlay)
    [found] = installation.servers()
    file = tmp_path / "server.yaml"
    file.write_text(installation.config())
    container = found.server or {}
    arguments = shlex.join(container["args"]).replace("/etc/synthia/server.yaml", str(file))
    environ = {entry["name"]: entry["value"] for entry in container["env"]}
    done = subprocess.run(
        [COMMAND, *shlex.split(arguments), "--print-config"],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "host: 0.0.0.0" in done.stdout


def test_a_worker_is_told_what_its_leader_is() -> None:
    """vLLM's own command on the other node has the leader's engine options."""
    lead, works = (list(found.containers())[-1] for found in _group())
    options = {a.removeprefix("--engine=") for a in lead["args"] if a.startswith("--engine=")}
    said = {
        name.removeprefix("--").replace("-", "_") + "=" + value
        for name, value in (argument.split("=") for argument in works["args"])
    }
    assert options - {"node_rank=0"} == said - {"node_rank=$(LWS_WORKER_INDEX)"}


def _group() -> list[Pod]:
    return [p for p in render("multi-node").pods() if p.owner["kind"] == "LeaderWorkerSet"]


def test_generated_files_are_fresh() -> None:
    """`make config` would change nothing."""
    made = runpy.run_path(str(KUBERNETES / "generate.py"))["generated"]()
    for file, text in made.items():
        assert file.read_text() == text, f"{file} is stale: run `make config`"
