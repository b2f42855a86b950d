"""The chart: what it renders is valid, and as careful as it claims; what is wrong it refuses."""

from __future__ import annotations

import copy
import json
import re
import runpy
import shlex
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import kubernetes_validate
import pytest
import rules
import yaml
from manifests import (
    CHART,
    HELM,
    KUBECTL,
    NAMES,
    ODD,
    PRESETS,
    ROOT,
    Installation,
    Object,
    helm,
    merged,
    render,
)
from processes import COMMAND

from synthia_vllm import __version__
from synthia_vllm.engine.fake import FakeEngine
from synthia_vllm.serve.app import create_app
from synthia_vllm.settings import Settings
from synthia_vllm.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SCHEMAS = Path(__file__).with_name("schemas")
# The oldest that knows all that is used here, and the newest whose schemas are at hand.
VERSIONS = ("1.31", kubernetes_validate.latest_version())


def validate(found: Object) -> None:
    """Raise if this object is not what its kind may be."""
    _validate(json.dumps(found, sort_keys=True))


@cache  # most objects of most installations are the same
def _validate(written: str) -> None:
    found = json.loads(written)
    group, _, version = found["apiVersion"].rpartition("/")
    own = SCHEMAS / f"{found['kind']}-{group}-{version}.json".lower()
    if own.exists():
        jsonschema.validate(found, json.loads(own.read_text()))
        return
    for release in VERSIONS:
        kubernetes_validate.validate(found, release, strict=True)


@pytest.mark.parametrize("name", NAMES)
def test_every_object_is_valid(name: str) -> None:
    """Each object fits its schema; a kind without a schema, or an unknown field, is an error."""
    installation = render(name)
    for found in installation.objects:
        validate(found)
    for pod in installation.pods():
        validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "it"}, "spec": pod.spec})
    names = [(found["kind"], found["metadata"]["name"]) for found in installation.objects]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("check", rules.RULES, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_rule(name: str, check: Callable[[Installation], Any]) -> None:
    """Each preset keeps each rule, and so does each odd choice of values."""
    assert list(check(render(name))) == []


def first(installation: Installation, kind: str) -> Any:
    """The first object of this kind."""
    return installation.of(kind)[0]


def pod(installation: Installation) -> Any:
    """The server's pod."""
    return installation.servers()[0].spec


def server(installation: Installation) -> Any:
    """The server's container."""
    return installation.servers()[0].server


def job(installation: Installation) -> Any:
    """The container that fetches the weights."""
    return first(installation, "Job")["spec"]["template"]["spec"]["containers"][0]


def script(container: Any, old: str, new: str) -> None:
    """Change what a container runs."""
    assert old in container["command"][-1]
    container["command"][-1] = container["command"][-1].replace(old, new)


def config(installation: Installation, **settings: Any) -> None:
    """Change the server's configuration."""
    data = next(c for c in installation.of("ConfigMap") if "server.yaml" in c["data"])["data"]
    data["server.yaml"] = yaml.safe_dump(yaml.safe_load(data["server.yaml"]) | settings)


def policy(installation: Installation) -> Any:
    """The server's network policy."""
    return next(p for p in installation.of("NetworkPolicy") if p["spec"]["ingress"])["spec"]


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
    (
        "pods_are_locked",
        "scheduled-with-care",
        lambda i: server(i)["securityContext"].update(readOnlyRootFilesystem=True),
    ),
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
    ("the_stop_has_time", "gpu", lambda i: config(i, shutdown_grace_seconds=650)),
    ("the_stop_has_time", "gpu", lambda i: config(i, shutdown_grace_seconds=120)),
    ("the_stop_has_time", "gpu", lambda i: config(i, shutdown_delay_seconds=0)),
    ("the_stop_has_time", "gpu", lambda i: config(i, limits={"request_seconds": 601})),
    ("the_stop_has_time", "short-drains", lambda i: object.__setattr__(i, "notes", "")),
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
        "keda",
        lambda i: first(i, "Deployment")["spec"]["strategy"]["rollingUpdate"].update(maxSurge=0),
    ),
    (
        "a_rollout_takes_nothing_away",
        "keda",
        lambda i: first(i, "PersistentVolumeClaim")["spec"].update(accessModes=["ReadWriteOnce"]),
    ),
    (
        "a_rollout_takes_nothing_away",
        "gpu",
        lambda i: first(i, "Deployment")["spec"].update(strategy={"type": "RollingUpdate"}),
    ),
    (
        "a_rollout_takes_nothing_away",
        "cpu-demo",
        lambda i: first(i, "Deployment")["spec"].update(strategy={"type": "Recreate"}),
    ),
    ("a_rollout_takes_nothing_away", "gpu", lambda i: object.__setattr__(i, "notes", "")),
    (
        "volumes_can_be_filled_and_written",
        "gpu",
        lambda i: first(i, "Job")["spec"]["template"]["spec"].pop("affinity"),
    ),
    (
        "volumes_can_be_filled_and_written",
        "gpu",
        lambda i: script(job(i), "cannot write", "fails"),
    ),
    (
        "volumes_can_be_filled_and_written",
        "multi-node",
        lambda i: script(list(i.pods())[-1].spec["initContainers"][0], "cannot write", "fails"),
    ),
    ("weights_have_a_revision", "gpu", lambda i: script(job(i), "--revision main ", "")),
    (
        "weights_have_a_revision",
        "gpu",
        lambda i: script(job(i), 'touch "$MODEL/.complete"\n', ""),
    ),
    (
        "weights_have_a_revision",
        "gpu",
        lambda i: job(i)["env"][0].update(value="/models/Synthia-7B-v3.0"),
    ),
    (
        "weights_have_a_revision",
        "gpu",
        lambda i: first(i, "Job")["metadata"].update(name="synthia-download"),
    ),
    ("weights_have_a_revision", "gpu", lambda i: config(i, model="/models/old/Synthia-7B-v3.0")),
    ("weights_have_a_revision", "gpu", lambda i: pod(i).pop("initContainers")),
    ("weights_have_a_revision", "gpu", lambda i: i.objects.remove(first(i, "Job"))),
    (
        "a_group_finds_itself",
        "multi-node",
        lambda i: first(i, "LeaderWorkerSet")["metadata"].update(name="synthia-vllm"),
    ),
    (
        "selectors_take_our_own_only",
        "gpu",
        lambda i: first(i, "PodDisruptionBudget")["spec"].update(
            selector={"matchLabels": {"app.kubernetes.io/component": "server"}}
        ),
    ),
    (
        "selectors_take_our_own_only",
        "gpu",
        lambda i: first(i, "Service")["spec"]["selector"].pop("app.kubernetes.io/instance"),
    ),
    (
        "selectors_take_our_own_only",
        "keda",
        lambda i: first(i, "PodMonitor")["spec"]["selector"]["matchLabels"].pop(
            "app.kubernetes.io/component"
        ),
    ),
    (
        "all_is_in_its_namespace",
        "gpu",
        lambda i: first(i, "ServiceAccount")["metadata"].pop("namespace"),
    ),
    (
        "all_is_in_its_namespace",
        "gpu",
        lambda i: i.objects.append({"kind": "Namespace", "metadata": {"name": "synthia"}}),
    ),
    (
        "monitors_are_found",
        "keda",
        lambda i: first(i, "PodMonitor")["metadata"]["labels"].pop("release"),
    ),
    (
        "monitors_are_found",
        "keda",
        lambda i: first(i, "PrometheusRule")["metadata"]["labels"].update(release="mine"),
    ),
    (
        "rules_are_of_this_installation",
        "keda",
        lambda i: first(i, "PrometheusRule")["spec"]["groups"][0]["rules"].append(
            {"record": "a", "expr": 'up{job="synthia-vllm"}'}
        ),
    ),
    (
        "monitors_are_found",
        "keda",
        lambda i: first(i, "ScaledObject")["spec"]["fallback"].update(replicas=4),
    ),
    ("monitors_are_found", "hpa", lambda i: i.objects.remove(first(i, "PodMonitor"))),
    (
        "what_several_share_is_shared",
        "a-fleet-with-databases",
        lambda i: server(i)["env"].remove(env(i, "SYNTHIA_LEDGER")),
    ),
    (
        "what_several_share_is_shared",
        "a-fleet-with-databases",
        lambda i: policy(i).update(egress=[]),
    ),
    ("what_several_share_is_shared", "keda", lambda i: config(i, ledger="sqlite")),
    ("what_several_share_is_shared", "gpu", lambda i: config(i, ledger="none")),
    ("what_several_share_is_shared", "keda", lambda i: object.__setattr__(i, "notes", "")),
    (
        "ways_in_lead_to_the_service",
        "a-demo-to-the-world",
        lambda i: first(i, "Ingress")["spec"].pop("tls"),
    ),
    (
        "ways_in_lead_to_the_service",
        "a-demo-to-the-world",
        lambda i: first(i, "Ingress")["spec"]["rules"][0]["http"]["paths"][0].update(path="/"),
    ),
    (
        "routes_lead_to_the_service",
        "a-demo-to-the-world",
        lambda i: first(i, "HTTPRoute")["spec"]["rules"][0]["backendRefs"][0].update(name="other"),
    ),
    (
        "ways_in_lead_to_the_service",
        "a-demo-to-the-world",
        lambda i: config(i, limits={"request_seconds": 610}),
    ),
    (
        "evictions_leave_somebody",
        "gpu",
        lambda i: first(i, "PodDisruptionBudget")["spec"].update(minAvailable=0),
    ),
    (
        "evictions_leave_somebody",
        "a-fleet-with-databases",
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
        "keda",
        lambda i: first(i, "PodMonitor")["spec"]["podMetricsEndpoints"][0].update(port="metrics"),
    ),
    (
        "one_scaler_at_most",
        "keda",
        lambda i: i.objects.append(render("hpa").of("HorizontalPodAutoscaler")[0]),
    ),
    (
        "one_scaler_at_most",
        "keda",
        lambda i: first(i, "ScaledObject")["spec"].update(minReplicaCount=0),
    ),
    ("one_scaler_at_most", "hpa", lambda i: first(i, "Deployment")["spec"].update(replicas=2)),
    ("the_configuration_is_ours", "gpu", lambda i: config(i, host="127.0.0.1")),
    ("the_configuration_is_ours", "gpu", lambda i: config(i, keys_file=None)),
    (
        "the_configuration_is_ours",
        "gpu",
        lambda i: [v.pop("secret", None) for v in pod(i)["volumes"]],
    ),
    ("the_configuration_is_ours", "gpu", lambda i: config(i, model="/weights")),
    (
        "the_configuration_is_ours",
        "gpu",
        lambda i: config(i, batches={"directory": "/var/batches"}),
    ),
    ("the_configuration_is_ours", "keda", lambda i: config(i, metrics="key")),
]


@pytest.mark.parametrize(("name", "of", "harm"), BREAKS)
def test_rules_notice(name: str, of: str, harm: Callable[[Installation], object]) -> None:
    """Each rule finds what it is there to find."""
    installation = copy.deepcopy(render(of))
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
    for name in NAMES:
        installation = render(name)
        for found in installation.servers():
            asked = [probe for name, probe in (found.server or {}).items() if "Probe" in name]
            assert {probe["httpGet"]["path"] for probe in asked} <= paths
        for monitor in installation.of("PodMonitor"):
            assert {end["path"] for end in monitor["spec"]["podMetricsEndpoints"]} <= paths


# One for each way to come to engine options and arguments; vLLM takes its time to be asked.
STARTED = ["cpu-demo", "gpu", "two-groups-of-four-nodes"]


@pytest.mark.parametrize("name", STARTED)
def test_the_command_takes_what_the_pod_says(name: str, tmp_path: Path) -> None:
    """The server itself, vLLM's options included, accepts the arguments and variables.

    And a worker on another node is told by vLLM's own command what its leader was.
    """
    installation = render(name)
    [found] = installation.servers()
    file = tmp_path / "server.yaml"
    file.write_text(installation.config())
    container = found.server or {}
    arguments = shlex.join(container["args"]).replace("/etc/synthia/server.yaml", str(file))
    environ = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    done = subprocess.run(
        [COMMAND, *shlex.split(arguments), "--print-config"],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    settings = yaml.safe_load(done.stdout)
    assert settings["host"] == "0.0.0.0"
    values = merged(name)
    assert settings["engine"].get("tensor_parallel_size", 1) == values["nodes"] * max(
        1, values["gpus"]
    )
    for worker in (p.spec["containers"][0] for p in installation.pods() if p.server is None):
        if worker["name"] == "worker":
            said = _engine_options(worker["args"])
            assert said.pop("node_rank") == "$(LWS_WORKER_INDEX)"
            assert settings["engine"].pop("node_rank") == 0
            assert settings["engine"] == said
            assert settings["model"] == worker["command"][2]


def _engine_options(arguments: list[str]) -> Object:
    """What vLLM makes of such arguments, but for variables of the pod."""
    options: Object = {}
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        if not equals:
            options[name.removeprefix("no-").replace("-", "_")] = not name.startswith("no-")
        else:
            options[name.replace("-", "_")] = yaml.safe_load(value)
    return options


def test_a_group_has_as_many_gpus_as_the_model_is_spread_over() -> None:
    """On its nodes, together."""
    installation = render("two-groups-of-four-nodes")
    [group] = installation.of("LeaderWorkerSet")
    size = group["spec"]["leaderWorkerTemplate"]["size"]
    asked = [
        int(list(pod.containers())[-1]["resources"]["limits"]["nvidia.com/gpu"])
        for pod in installation.pods()
        if pod.owner["kind"] == "LeaderWorkerSet"
    ]
    assert asked == [2, 2]
    assert yaml.safe_load(installation.config())["engine"]["tensor_parallel_size"] == size * 2


def test_another_download_is_another_job() -> None:
    """Its name follows what it does; the same does not run again."""
    names = {
        _manifest({"model": model}).of("Job")[0]["metadata"]["name"]
        for model in ({}, {"revision": "main"}, {"revision": "v2"}, {"hubTokenSecret": "mine"})
    }
    assert len(names) == 3
    assert all(re.fullmatch(r"synthia-vllm-download-[0-9a-f]{8}", name) for name in names)


@pytest.mark.parametrize("hub", ["answers", "breaks off"])
def test_weights_are_whole_or_not_there(hub: str, tmp_path: Path) -> None:
    """The job's own script: what was broken off is fetched again, what is whole is not."""
    script = job(render("gpu"))["command"][-1]
    place = tmp_path / "models" / "main" / "Synthia"
    tool = tmp_path / "hf"
    done = tmp_path / "done"
    tool.write_text(f'#!/bin/sh\necho "$@" >>{done}\n' + "exit 1\n" * (hub == "breaks off"))
    tool.chmod(0o755)
    for _ in range(2):
        ran = _run(script, MODEL=str(place), PATH=f"{tmp_path}:/usr/bin:/bin")
        assert ran.returncode == (hub == "breaks off")
    assert (place / ".complete").exists() == (hub == "answers")
    asked = done.read_text().splitlines()
    assert len(asked) == (1 if hub == "answers" else 2)
    assert asked[0] == (f"download migtissera/Synthia-7B-v3.0 --revision main --local-dir {place}")


def test_a_volume_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    """Who it is, which volume, and where to read on; and nothing else is tried."""
    (tmp_path / "models").write_text("not a directory")
    ran = _run(job(render("gpu"))["command"][-1], MODEL=str(tmp_path / "models" / "main"))
    assert ran.returncode == 1
    assert "uid=" in ran.stdout
    assert "cannot write to the volume of /models" in ran.stdout
    waits = pod(render("gpu"))["initContainers"][0]["command"][-1]
    missing = waits.replace("-w /cache", f"-w {tmp_path}/cache")
    assert missing != waits
    ran = _run(missing, MODEL="/nowhere")
    assert ran.returncode == 1
    assert "cannot write to the volume of /cache" in ran.stdout
    (place := tmp_path / "whole").mkdir()
    (place / ".complete").touch()
    there = waits.replace("-w /cache", f"-w {tmp_path}")
    assert _run(there, MODEL=str(place)).returncode == 0


def _run(script: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-ec", script],
        env={"PATH": "/usr/bin:/bin", **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


def _manifest(values: Object) -> Installation:
    done = helm("template", "synthia-vllm", str(CHART), values=values)
    assert done.returncode == 0, done.stderr
    return Installation(list(yaml.safe_load_all(done.stdout)), values, "")


def test_what_is_applied_by_kubectl_is_what_helm_installs() -> None:
    """`helm template` gives the same objects, each time."""
    once, again = _manifest({}), _manifest({})
    assert once.objects == again.objects
    key = lambda found: (found["kind"], found["metadata"]["name"])  # noqa: E731
    assert sorted(once.objects, key=key) == sorted(render("gpu").objects, key=key)


def test_two_installations_share_a_namespace() -> None:
    """No name of one is a name of the other's, and no selector takes the other's pods."""
    done = helm("template", "chat", str(CHART))
    other = Installation(list(yaml.safe_load_all(done.stdout)), {}, "")
    ours = render("gpu")
    names = [
        {(found["kind"], found["metadata"]["name"]) for found in installation.objects}
        for installation in (ours, other)
    ]
    assert not names[0] & names[1]
    assert all(name.startswith("chat-synthia-vllm") for _, name in names[1])
    [service] = other.of("Service")
    assert not any(service["spec"]["selector"].items() <= pod.labels.items() for pod in ours.pods())


def test_another_configuration_is_another_pod() -> None:
    """A changed setting replaces the pods, a changed image repository's tag alone would too."""
    marks = {
        _manifest({"settings": settings})
        .servers()[0]
        .owner["spec"]["template"]["metadata"]["annotations"]["checksum/config"]
        for settings in ({}, {"log_level": "debug"}, {"engine": {"max_model_len": 8192}})
    }
    assert len(marks) == 3


def test_the_chart_is_well_made() -> None:
    """`helm lint --strict`, with each preset; and its version is that of the server."""
    for name in NAMES:
        presets, own = ODD.get(name, ([name], {}))
        files = [f"--values={CHART / 'presets' / preset}.yaml" for preset in presets]
        done = helm("lint", str(CHART), "--strict", *files, values=own)
        assert done.returncode == 0, done.stdout + done.stderr
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__
    assert chart["kubeVersion"] == f">={VERSIONS[0]}.0-0"


def test_the_tools_are_there() -> None:
    """The kubectl of the tests knows what docs tell it to do, and docs say which Helm it was."""
    done = subprocess.run([KUBECTL, "apply", "--help"], capture_output=True, text=True, check=True)
    assert "--server-side" in done.stdout
    version = subprocess.run(
        [HELM, "version", "--template", "{{.Version}}"], capture_output=True, text=True, check=True
    ).stdout
    assert f"Helm {version.removeprefix('v')}," in (ROOT / "docs/kubernetes.md").read_text()


# What somebody might write, and words of the answer that name it.
WRONG: list[tuple[Object, list[str]]] = [
    ({"replica": 2}, ["'replica'"]),
    ({"replicas": 0}, ["/replicas", "minimum"]),
    ({"replicas": "two"}, ["/replicas", "integer"]),
    ({"image": {"tag": "latest"}}, ["/image/tag"]),
    ({"image": {"digest": "sha256:12"}}, ["/image/digest"]),
    ({"model": {"name": "Synthia"}}, ["/model/name"]),
    ({"model": {"revision": "../other"}}, ["/model/revision"]),
    ({"model": {"path": "/mnt/weights"}}, ["/model/path"]),
    ({"keys": {"file": "keys.yaml"}}, ["/keys", "'file'"]),
    ({"settings": {"hots": "0.0.0.0"}}, ["/settings", "'hots'"]),
    ({"settings": {"host": "127.0.0.1"}}, ["/settings", "'host'"]),
    ({"settings": {"keys_file": "/keys"}}, ["/settings", "'keys_file'"]),
    ({"settings": {"format": "chatml"}}, ["/settings/format", "documented"]),
    ({"settings": {"sampling": {"temperature": 3}}}, ["/settings/sampling/temperature"]),
    ({"settings": {"limits": {"request_seconds": 0}}}, ["/settings/limits/request_seconds"]),
    ({"settings": {"limits": None}}, ["/settings", "limits"]),
    ({"drain": {"delaySeconds": 0}}, ["/drain/delaySeconds"]),
    ({"drain": {"graceSeconds": "2m"}}, ["/drain/graceSeconds"]),
    ({"resources": {"limits": {"memory": "a lot"}}}, ["/resources/limits/memory"]),
    ({"storage": {"accessMode": "RWX"}}, ["/storage/accessMode", "ReadWriteMany"]),
    ({"accounts": {"url": "valkey://:word@valkey"}}, ["/accounts", "'url'"]),
    ({"ledger": {"to": []}}, ["/ledger/to"]),
    ({"networkPolicy": {"egress": [{"ports": [{"port": 443}]}]}}, ["/networkPolicy/egress", "to"]),
    ({"networkPolicy": {"from": [{}]}}, ["/networkPolicy/from"]),
    ({"autoscaling": {"by": "vpa"}}, ["/autoscaling/by", "keda"]),
    ({"ingress": {"enabled": True}}, ["/ingress/host"]),
    ({"httpRoute": {"enabled": True}}, ["/httpRoute/parentRefs"]),
    ({"extraEnv": [{"name": "1A"}]}, ["/extraEnv/0/name"]),
    # What is not wrong by itself.
    ({"replicas": 2}, ["storage.accessMode", "ReadWriteMany"]),
    ({"nodes": 2}, ["storage.accessMode", "ReadWriteMany"]),
    ({"autoscaling": {"by": "keda"}, "monitoring": {"enabled": True}}, ["storage.accessMode"]),
    (
        {"autoscaling": {"by": "keda"}, "storage": {"accessMode": "ReadWriteMany"}},
        ["monitoring.enabled"],
    ),
    ({"model": {"path": "Synthia"}}, ["storage.models.existingClaim"]),
    ({"gpus": 3}, ["gpus", "1, 2, 4, 8"]),
    ({"nodes": 2, "gpus": 0, "storage": {"accessMode": "ReadWriteMany"}}, ["nodes:"]),
]


@pytest.mark.parametrize(("values", "said"), WRONG, ids=lambda it: json.dumps(it)[:60])
def test_a_wrong_value_is_refused(values: Object, said: list[str]) -> None:
    """Before anything is sent to a cluster, in words that name it."""
    done = helm("template", "synthia-vllm", str(CHART), values=values)
    assert done.returncode != 0
    assert all(word in done.stderr for word in said), done.stderr


def _leaves(values: Object, schema: Object, path: str = "") -> list[str]:
    """The values that the schema says nothing of, or that it lets have any name beside them."""
    found: list[str] = []
    if "$ref" in schema:
        schema = SCHEMA["definitions"][schema["$ref"].rpartition("/")[2]]
    if values and schema.get("additionalProperties") is None and schema.get("type") == "object":
        return [path]
    for name, value in values.items():
        field = schema.get("properties", {}).get(name) or schema.get("additionalProperties")
        if not field:
            found.append(f"{path}.{name}")
        elif isinstance(value, dict):
            found += _leaves(value, field, f"{path}.{name}")
    return found


SCHEMA: Object = json.loads((CHART / "values.schema.json").read_text())


def test_the_schema_knows_every_value_and_no_other() -> None:
    """Each has a place in it, and it has no place that is not in the values."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert _leaves(values, SCHEMA) == []
    assert set(SCHEMA["properties"]) == set(values)
    for name, section in SCHEMA["properties"].items():
        known = SCHEMA["definitions"].get(section.get("$ref", "").rpartition("/")[2], section)
        if name not in ("settings", "affinity") and "properties" in known:
            assert set(known["properties"]) == set(values[name]), name
    names = set(Settings.model_fields) - set(SCHEMA["properties"]["settings"]["properties"])
    assert names == OWN & set(Settings.model_fields)


def test_every_value_has_a_comment() -> None:
    """Or stands below one, among others that it explains together; and a person can read a line."""
    lines = (CHART / "values.yaml").read_text().splitlines()
    for number, line in enumerate(lines):
        assert len(line) <= 100
        if re.match(r"[a-zA-Z]+:", line):
            before = lines[number - 1]
            assert before.startswith("#") or re.match(r"[a-zA-Z]+:", before) or before[0] in " -"
    said = (CHART / "values.yaml").read_text() + (ROOT / "docs/kubernetes.md").read_text()
    for pointed in re.findall(r"docs/([a-z]+\.md)(?:#(\w+))?", said):
        page = (ROOT / "docs" / pointed[0]).read_text().lower()
        assert not pointed[1] or f"\n## {pointed[1]}" in page or f"\n### {pointed[1]}" in page


def _shown() -> Iterator[list[str]]:
    """The arguments of each `helm` in the documentation that renders the chart."""
    for page in (ROOT / "README.md", ROOT / "docs/kubernetes.md"):
        text = page.read_text().replace("\\\n", " ")
        for command in re.findall(r"(?m)^helm ((?:install|upgrade|template) [^|>#\n]*)", text):
            yield shlex.split(command)


def test_the_commands_shown_render(tmp_path: Path) -> None:
    """Each that installs, upgrades or renders, with the file of values shown beside it."""
    page = (ROOT / "docs/kubernetes.md").read_text()
    [mine] = re.findall(r"(?s)```yaml\n(# mine.yaml.*?)```", page)
    file = tmp_path / "mine.yaml"
    file.write_text(mine)
    made: set[str] = set()
    commands = list(_shown())
    assert len(commands) > 4
    for _, *words in commands:
        arguments = [str(file) if word == "mine.yaml" else word for word in words]
        done = subprocess.run(
            [HELM, "template", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        for found in yaml.safe_load_all(done.stdout):
            made.add(f"{found['kind'].lower()}/{found['metadata']['name']}")
    named = set(re.findall(r"\b(?:deployment|service)/[a-z-]+", page))
    assert len(named) > 2
    assert named <= made
    assert "persistentvolumeclaim/synthia-vllm-models" in made
    first, last = (".".join(version.split(".")[:2]) for version in VERSIONS)
    assert f"Kubernetes {first} and {last} and" in page
    assert f"for Kubernetes {first} and later" in page


def test_the_documentation_deletes_nothing_of_others() -> None:
    """No namespace, and no Secret by an apply that keeps a copy in an annotation."""
    page = (ROOT / "docs/kubernetes.md").read_text()
    assert "delete namespace" not in page
    applies = re.findall(r"kubectl apply (\S+)", page)
    assert applies
    assert set(applies) == {"--server-side"}
    presets = re.findall(r"`([a-z0-9-]+)`", "".join(re.findall(r"(?m)^\| (`.*?) \|", page)))
    assert set(PRESETS) <= set(presets)


def test_generated_files_are_fresh() -> None:
    """`make config` would change nothing, and nothing else lies where it writes."""
    made = GENERATE["generated"]()
    for file, text in made.items():
        assert file.read_text() == text, f"{file} is stale: run `make config`"
    assert set((CHART / "files").iterdir()) <= set(made)


GENERATE = runpy.run_path(str(CHART.parent / "generate.py"))
OWN: set[str] = GENERATE["OWN"]
