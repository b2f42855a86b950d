"""What every installation must hold to, beyond its schemas: each rule yields what is wrong."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from manifests import ROOT, Installation, Pod, selects

from synthia_vllm import __version__, settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from synthia_vllm.settings import Settings

RULES: Final[list[Callable[[Installation], Iterator[str]]]] = []
_ENDING_SECONDS: Final = 15  # for last words and the engine's processes, when all else is over
_WRITABLE: Final = ("/cache", "/tmp", "/dev/shm")
_API_PORTS: Final = {"http"}
_DNS: Final = {53}


def rule(check: Callable[[Installation], Iterator[str]]) -> Callable[[Installation], Iterator[str]]:
    """Take `check` into the rules."""
    RULES.append(check)
    return check


@rule
def pods_are_locked(installation: Installation) -> Iterator[str]:
    """The `restricted` profile of Kubernetes, and a root file system that cannot be written."""
    for pod in installation.pods():
        spec, own = pod.spec, pod.spec.get("securityContext", {})
        if not own.get("runAsNonRoot") or not own.get("runAsUser"):
            yield f"{pod.name} may run as root"
        if own.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{pod.name} has no seccomp profile"
        for forbidden in ("hostNetwork", "hostPID", "hostIPC"):
            if spec.get(forbidden):
                yield f"{pod.name} has {forbidden}"
        for volume in spec.get("volumes", []):
            if "hostPath" in volume:
                yield f"{pod.name} reads the node's disk"
        for container in pod.containers():
            context = container.get("securityContext", {})
            if context.get("allowPrivilegeEscalation") is not False:
                yield f"{pod.name} {container['name']} may gain rights"
            if context.get("readOnlyRootFilesystem") is not True:
                yield f"{pod.name} {container['name']} can write to its root"
            if context.get("capabilities", {}).get("drop") != ["ALL"]:
                yield f"{pod.name} {container['name']} keeps capabilities"


@rule
def only_known_places_are_writable(installation: Installation) -> Iterator[str]:
    """Models, keys and configuration are read only; what is written has a volume and a bound."""
    for pod in installation.pods():
        filling = pod.labels.get("app.kubernetes.io/component") == "download"
        for container in pod.containers():
            for mount in container.get("volumeMounts", []):
                writable = not mount.get("readOnly")
                if writable and mount["mountPath"] not in (*_WRITABLE, *(["/models"] * filling)):
                    yield f"{pod.name} can write to {mount['mountPath']}"
        for volume in pod.spec.get("volumes", []):
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                yield f"{pod.name}: {volume['name']} may fill the node"
    for pod in installation.servers():
        if pod.volume("/dev/shm").get("emptyDir", {}).get("medium") != "Memory":
            yield f"{pod.name}: /dev/shm is not memory of its own"
        for place in _WRITABLE:
            if not pod.volume(place):
                yield f"{pod.name} has nothing at {place}"


@rule
def nothing_is_injected(installation: Installation) -> Iterator[str]:
    """No variables for Services, and no token of Kubernetes for those that never talk to it."""
    for pod in installation.pods():
        if pod.spec.get("enableServiceLinks") is not False:
            yield f"{pod.name}: a Service may set VLLM_PORT"
        if pod.spec.get("serviceAccountName", "default") == "default":
            yield f"{pod.name} uses the default account"
        picks = pod.labels.get("app.kubernetes.io/name") == "synthia-picker"
        if not picks and pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.name} gets a token"


@rule
def no_secret_is_written_down(installation: Installation) -> Iterator[str]:
    """Secrets are the operator's to make; here they have only names."""
    for secret in installation.of("Secret"):
        yield f"Secret {secret['metadata']['name']} is in the manifests"
    for pod in installation.pods():
        for container in pod.containers():
            for entry in container.get("env", []):
                if re.search("TOKEN|KEY$|SECRET|PASSWORD", entry["name"]) and "value" in entry:
                    yield f"{pod.name}: {entry['name']} is written down"


@rule
def images_are_fixed(installation: Installation) -> Iterator[str]:
    """Each image has a version; ours is the one of this tree."""
    for pod in installation.pods():
        for container in pod.containers():
            name, _, tag = container["image"].rpartition(":")
            if not name or tag == "latest":
                yield f"{pod.name}: {container['image']} may change"
            if name.endswith("synthia-vllm") and tag.removesuffix("-cpu") != __version__:
                yield f"{pod.name}: {container['image']} is not version {__version__}"


@rule
def resources_are_stated(installation: Installation) -> Iterator[str]:
    """Requests, a limit on memory, and as many GPUs asked for as allowed."""
    for pod in installation.pods():
        for container in pod.containers():
            wants = container.get("resources", {}).get("requests", {})
            limits = container.get("resources", {}).get("limits", {})
            if not {"cpu", "memory"} <= set(wants) or "memory" not in limits:
                yield f"{pod.name} {container['name']} does not say what it needs"
            if wants.get("nvidia.com/gpu") != limits.get("nvidia.com/gpu"):
                yield f"{pod.name} {container['name']}: GPUs cannot be shared"


@rule
def the_stop_has_time(installation: Installation) -> Iterator[str]:
    """The kubelet waits longer than the server may take, from preStop to the engine's end."""
    for pod in installation.servers():
        found = _settings(pod, installation)
        hook = (pod.server or {}).get("lifecycle", {}).get("preStop", {})
        before = hook.get("sleep", {}).get("seconds", 0)
        if hook and not before:
            yield f"{pod.name}: how long preStop takes is not known"
        needed = before + found.shutdown_delay_seconds + found.shutdown_grace_seconds
        if pod.spec.get("terminationGracePeriodSeconds", 30) < needed + _ENDING_SECONDS:
            yield f"{pod.name} is killed before {needed + _ENDING_SECONDS:g} s are over"
        if before + found.shutdown_delay_seconds < 10:
            yield f"{pod.name} closes its door before everybody knows"


@rule
def probes_ask_the_right_thing(installation: Installation) -> Iterator[str]:
    """Startup and liveness ask whether it lives, readiness whether it wants requests."""
    for pod in installation.servers():
        server = pod.server or {}
        ports = {port["name"]: port["containerPort"] for port in server.get("ports", [])}
        for name, path in (
            ("startup", "/health"),
            ("liveness", "/health"),
            ("readiness", "/ready"),
        ):
            asked = server.get(f"{name}Probe", {})
            get = asked.get("httpGet", {})
            if get.get("path") != path:
                yield f"{pod.name}: the {name} probe does not ask {path}"
            if ports.get(get.get("port")) != _settings(pod, installation).port:
                yield f"{pod.name}: the {name} probe asks another port"
            # A server with a thousand streams answers late, and must not be restarted for it.
            if asked.get("timeoutSeconds", 1) < 5:
                yield f"{pod.name}: the {name} probe has no patience"
        if _patience(server.get("startupProbe", {})) < 10 * _measured_cold_start():
            yield f"{pod.name}: a slow start would be restarted"
        if _patience(server.get("livenessProbe", {})) < 30:
            yield f"{pod.name}: a busy moment would be a restart"
        if _patience(server.get("readinessProbe", {})) > 30:
            yield f"{pod.name}: a server that fails is asked for too long"


@rule
def a_rollout_takes_nothing_away(installation: Installation) -> Iterator[str]:
    """The new pod is there before the old one goes."""
    for pod in installation.servers():
        spec = pod.owner["spec"]
        strategy = spec.get("strategy", {}).get("rollingUpdate") or spec.get(
            "rolloutStrategy", {}
        ).get("rollingUpdateConfiguration", {})
        if strategy.get("maxUnavailable") != 0 or not strategy.get("maxSurge"):
            yield f"{pod.name}: a rollout takes a pod away first"


@rule
def evictions_leave_somebody(installation: Installation) -> Iterator[str]:
    """The disruption budget selects the server's pods, and keeps one however few there are."""
    budgets = [found["spec"] for found in installation.of("PodDisruptionBudget")]
    for pod in installation.servers():
        mine = [budget for budget in budgets if selects(budget["selector"], pod.labels)]
        if len(mine) != 1:
            yield f"{pod.name} has {len(mine)} disruption budgets"
            continue
        pods = installation.smallest()
        left = mine[0].get("minAvailable", pods - mine[0].get("maxUnavailable", pods))
        if not isinstance(left, int) or left < 1:
            yield f"{pod.name}: all {pods} may be evicted at once"
        if pods > 1 and left >= pods and not installation.of("LeaderWorkerSet"):
            yield f"{pod.name}: none of {pods} may ever be evicted"
        if mine[0].get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
            yield f"{pod.name}: a broken pod holds up its node"


@rule
def replicas_are_spread(installation: Installation) -> Iterator[str]:
    """Over nodes and zones."""
    for pod in installation.servers():
        if pod.owner["kind"] != "Deployment":
            continue
        spread = {
            found["topologyKey"]
            for found in pod.spec.get("topologySpreadConstraints", [])
            if selects(found["labelSelector"], pod.labels)
        }
        if spread != {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}:
            yield f"{pod.name} may sit on one node, or in one zone"


@rule
def the_network_is_closed(installation: Installation) -> Iterator[str]:
    """Each pod has a policy; the server's lets in the API's port and nobody out to the world."""
    policies = [found["spec"] for found in installation.of("NetworkPolicy")]
    for pod in installation.pods():
        mine = [found for found in policies if selects(found["podSelector"], pod.labels)]
        if not mine or any(set(p["policyTypes"]) != {"Ingress", "Egress"} for p in mine):
            yield f"{pod.name} is open to the network"
        for entry in (entry for found in mine for entry in found.get("ingress") or []):
            if not entry.get("from"):
                yield f"{pod.name} lets in anybody"
            among_us = all(
                selects(peer.get("podSelector", {}), pod.labels) and peer.get("podSelector")
                for peer in entry.get("from", [])
            )
            ports = {port["port"] for port in entry.get("ports", [])}
            if pod.server and not among_us and ports != _API_PORTS:
                yield f"{pod.name} lets in more than its API's port"
        for entry in (entry for found in mine for entry in found.get("egress") or []):
            ports = {port["port"] for port in entry.get("ports", [])}
            if pod.server and not entry.get("to") and ports != _DNS:
                yield f"{pod.name} may talk to the world"


@rule
def services_reach_servers(installation: Installation) -> Iterator[str]:
    """Service, monitor and pool select the server's pods and no others, by a port that is there."""
    found = [
        (service, service["spec"]["selector"], [p["targetPort"] for p in service["spec"]["ports"]])
        for service in installation.of("Service")
        if service["metadata"]["name"] == "synthia-vllm"
    ]
    if not found:
        yield "there is no Service"
    for monitor in installation.of("PodMonitor"):
        ports = [end["port"] for end in monitor["spec"]["podMetricsEndpoints"]]
        found.append((monitor, monitor["spec"]["selector"], ports))
    for pool in installation.of("InferencePool"):
        ports = [port["number"] for port in pool["spec"]["targetPorts"]]
        found.append((pool, pool["spec"]["selector"], ports))
    # What the controller of groups adds to the leader.
    leads = {"leaderworkerset.sigs.k8s.io/worker-index": "0"}
    for owner, selector, ports in found:
        for pod in installation.pods():
            labels = {**pod.labels, **(leads if pod.server else {})}
            taken = selects(selector, labels)
            works_along = pod.owner["kind"] == "LeaderWorkerSet"
            if taken != bool(pod.server) and not (
                taken and works_along and owner["kind"] != "Service"
            ):
                yield f"{owner['kind']}: {'takes' if taken else 'does not take'} {pod.name}"
            known = {p.get("name") for p in (pod.server or {}).get("ports", [])} | {
                p["containerPort"] for p in (pod.server or {}).get("ports", [])
            }
            if pod.server and not set(ports) <= known:
                yield f"{owner['kind']}: {pod.name} has no port {ports}"


@rule
def one_scaler_at_most(installation: Installation) -> Iterator[str]:
    """Not two that undo each other's work, nor a number of replicas that undoes theirs."""
    scalers = installation.of("HorizontalPodAutoscaler", "ScaledObject")
    if len(scalers) > 1:
        yield "two autoscalers"
    for scaler in scalers:
        target = scaler["spec"]["scaleTargetRef"]
        owners = {pod.owner["metadata"]["name"]: pod.owner for pod in installation.servers()}
        if target["name"] not in owners:
            yield f"{scaler['kind']} scales {target['name']}, which is not the server"
        elif "replicas" in owners[target["name"]]["spec"]:
            yield "each apply would set the replicas back"
        behavior = scaler["spec"].get("behavior") or scaler["spec"].get("advanced", {}).get(
            "horizontalPodAutoscalerConfig", {}
        ).get("behavior", {})
        if behavior.get("scaleDown", {}).get("stabilizationWindowSeconds", 0) < 300:
            yield f"{scaler['kind']} takes servers away that will be missed in a minute"
        if installation.smallest() < 1:
            yield f"{scaler['kind']} scales to nothing, and a start takes minutes"


@rule
def the_configuration_is_ours(installation: Installation) -> Iterator[str]:
    """The ConfigMap is config/server.yaml, and the server takes it together with its variables."""
    if installation.config() != (ROOT / "config" / "server.yaml").read_text():
        yield "the ConfigMap is not config/server.yaml: run `make config`"
    for pod in installation.servers():
        found = _settings(pod, installation)
        if found.host != "0.0.0.0":
            yield f"{pod.name} cannot be reached"
        if found.keys_file is None and found.model != "demo":
            yield f"{pod.name} serves the real model without keys"
        if found.keys_file and not pod.volume(str(found.keys_file.parent)).get("secret"):
            yield f"{pod.name}: there is no Secret at {found.keys_file}"
        if found.model.startswith("/") and not pod.volume("/models"):
            yield f"{pod.name}: there is no volume at {found.model}"


def _settings(pod: Pod, installation: Installation) -> Settings:
    environ = {
        entry["name"]: entry["value"] for entry in (pod.server or {})["env"] if "value" in entry
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(installation.config())
        file.flush()
        return settings.load(Path(file.name), environ, [])


def _patience(probe: Any) -> int:
    """Seconds until a probe that always fails has its effect."""
    return int(probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3))


def _measured_cold_start() -> float:
    """Seconds, of the slowest cold start that was measured."""
    measured = json.loads((ROOT / "docs" / "measurements" / "startup.json").read_text())
    return max(float(run["all"]) for run in measured["runs"]["cold"])
