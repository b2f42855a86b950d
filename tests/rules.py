"""What every installation must hold to, beyond its schemas: each rule yields what is wrong."""

from __future__ import annotations

import json
import re
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml
from manifests import NAMESPACE, ROOT, Installation, Pod, selects

from synthia_vllm import __version__, settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from synthia_vllm.settings import Settings

RULES: Final[list[Callable[[Installation], Iterator[str]]]] = []
_ENDING_SECONDS: Final = 15  # for last words and the engine's processes, when all else is over
_WRITABLE: Final = ("/cache", "/tmp", "/dev/shm")
_NAME, _INSTANCE, _COMPONENT = (
    f"app.kubernetes.io/{label}" for label in ("name", "instance", "component")
)
_API_PORTS: Final = {"http"}
_DNS: Final = {53}


def rule(check: Callable[[Installation], Iterator[str]]) -> Callable[[Installation], Iterator[str]]:
    """Take `check` into the rules."""
    RULES.append(check)
    return check


@rule
def pods_are_locked(installation: Installation) -> Iterator[str]:
    """The `restricted` profile of Kubernetes, and a root file system that cannot be written.

    Beside a GPU that can be given up for the sake of the hook that shows it (nothing else can).
    """
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
            if context.get("readOnlyRootFilesystem") is not installation.values.get(
                "readOnlyRootFilesystem", True
            ):
                yield f"{pod.name} {container['name']} can write to its root"
            if context.get("capabilities", {}).get("drop") != ["ALL"]:
                yield f"{pod.name} {container['name']} keeps capabilities"


@rule
def only_known_places_are_writable(installation: Installation) -> Iterator[str]:
    """Models, keys and configuration are read only; what is written has a volume and a bound."""
    for pod in installation.pods():
        more = {"download": ["/models"], "server": ["/data"]}.get(pod.labels[_COMPONENT], [])
        for container in pod.containers():
            for mount in container.get("volumeMounts", []):
                writable = not mount.get("readOnly")
                if writable and mount["mountPath"] not in (*_WRITABLE, *more):
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
        picks = pod.labels[_COMPONENT] == "picker"
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
            if name.endswith("@sha256"):
                continue
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
    """The kubelet waits longer than the server may take, from preStop to the engine's end.

    And the server as long as a request may take, unless it is told that it must not; which those
    who install it are told.
    """
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
        cuts = found.shutdown_grace_seconds < found.limits.request_seconds
        if cuts and installation.values["drain"]["graceSeconds"] is None:
            yield f"{pod.name} cuts answers that may take {found.limits.request_seconds:g} s"
        if cuts != ("are cut by each update" in installation.notes):
            yield "the notes say something else of drains"


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
    """The new pod is there before the old one goes, where it can have the volumes that this has."""
    alone = {
        claim["metadata"]["name"]
        for claim in installation.of("PersistentVolumeClaim")
        if claim["spec"]["accessModes"] != ["ReadWriteMany"]
    }
    for pod in installation.servers():
        spec = pod.owner["spec"]
        claims = {v["persistentVolumeClaim"]["claimName"] for v in _claims(pod)}
        waits = claims & alone or (claims and not _shared(installation))
        strategy = spec.get("strategy", {}).get("rollingUpdate") or spec.get(
            "rolloutStrategy", {}
        ).get("rollingUpdateConfiguration", {})
        if waits and (spec.get("strategy") != {"type": "Recreate"} or installation.smallest() > 1):
            yield f"{pod.name}: a second pod would wait for {', '.join(sorted(claims))}"
        if waits and "a pause of a start's length" not in installation.notes:
            yield "the notes do not say that an update is a pause"
        if not waits and (strategy.get("maxUnavailable") != 0 or not strategy.get("maxSurge")):
            yield f"{pod.name}: a rollout takes a pod away first"


@rule
def volumes_can_be_filled_and_written(installation: Installation) -> Iterator[str]:
    """Who cannot write where it must says so, and a job can go where the volume is."""
    for pod in installation.pods():
        if not _claims(pod):
            continue
        component = pod.labels[_COMPONENT]
        first = next(pod.containers())
        script = "".join(first.get("command", []))
        place = "/models" if component == "download" else "/cache"
        if pod.volume(place) in _claims(pod) and (
            f"cannot write to the volume of {place}" not in script
            or place not in [m["mountPath"] for m in first["volumeMounts"] if not m.get("readOnly")]
        ):
            yield f"{pod.name} does not say that it cannot write to {place}"
        if component == "download" and not _shared(installation):
            near = (
                pod.spec.get("affinity", {})
                .get("podAffinity", {})
                .get("requiredDuringSchedulingIgnoredDuringExecution", [])
            )
            [server] = installation.servers()
            if not any(
                term["topologyKey"] == "kubernetes.io/hostname"
                and selects(term["labelSelector"], server.labels)
                for term in near
            ):
                yield f"{pod.name} and {server.name} wait for each other's volume"


@rule
def weights_have_a_revision(installation: Installation) -> Iterator[str]:
    """What is fetched is what is served: a directory for each revision, whole when it says so."""
    revision = installation.values["model"]["revision"]
    jobs = [pod for pod in installation.pods() if pod.labels[_COMPONENT] == "download"]
    for job in jobs:
        [container] = job.spec["containers"]
        place = next(e["value"] for e in container["env"] if e["name"] == "MODEL")
        script = container["command"][-1]
        if f"--revision {revision} " not in script:
            yield f"{job.name} fetches whatever there is"
        if revision not in place.split("/"):
            yield f"{job.name}: another revision has the same directory"
        if not script.rstrip().endswith('touch "$MODEL/.complete"'):
            yield f"{job.name} does not say when it is done"
        if not re.fullmatch(r".+-[0-9a-f]{8}", job.owner["metadata"]["name"]):
            yield f"{job.name} cannot be changed, and has one name for all that it could be"
        for pod in installation.pods():
            waiting = [c for c in pod.containers() if c["name"] == "wait-for-weights"]
            if pod.labels[_COMPONENT] not in ("server", "worker"):
                continue
            if not any(
                {"name": "MODEL", "value": place} in c["env"] and ".complete" in c["command"][-1]
                for c in waiting
            ):
                yield f"{pod.name} does not wait for {place}"
            if pod.server and _settings(pod, installation).model != place:
                yield f"{pod.name} serves something else than {place}"
    by_hand = installation.values["model"]["name"] == "demo" or installation.values["model"]["path"]
    if len(jobs) != (not by_hand):
        yield f"{len(jobs)} jobs fetch weights"


@rule
def a_group_finds_itself(installation: Installation) -> Iterator[str]:
    """The controller's headless Service has the group's name: it makes none if there is one."""
    services = {service["metadata"]["name"] for service in installation.of("Service")}
    for group in installation.of("LeaderWorkerSet"):
        if group["metadata"]["name"] in services:
            yield f"{group['metadata']['name']} is a Service without addresses that are not ready"


@rule
def selectors_take_our_own_only(installation: Installation) -> Iterator[str]:
    """By name, installation and component; others in the namespace may use the same words."""
    for owner, selector in _selectors(installation):
        wanted = selector.get("matchLabels", selector)
        for label, value in ((_NAME, "synthia-vllm"), (_INSTANCE, "synthia-vllm")):
            if wanted.get(label) != value:
                yield f"{owner} selects by {wanted}, whatever its {label}"
        among = [e["key"] for e in selector.get("matchExpressions", [])]
        if _COMPONENT not in (*wanted, *among):
            yield f"{owner} selects by {wanted}, whatever its {_COMPONENT}"


def _selectors(installation: Installation) -> Iterator[tuple[str, Any]]:
    """All selectors of pods, but for those of whom to let in from other namespaces."""

    def inside(name: str, part: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(part, list):
            for item in part:
                yield from inside(name, item)
        elif isinstance(part, dict) and "namespaceSelector" not in part:
            for key, value in part.items():
                if key in ("podSelector", "labelSelector", "selector") and value:
                    yield name, value
                else:
                    yield from inside(name, value)

    for found in installation.objects:
        if found["kind"] not in ("ConfigMap", "PersistentVolumeClaim"):
            name = f"{found['kind']}/{found['metadata']['name']}"
            yield from inside(name, found.get("spec", {}))


@rule
def all_is_in_its_namespace(installation: Installation) -> Iterator[str]:
    """Also by `helm template`, which says no namespace by itself; and none is made or deleted."""
    for found in installation.objects:
        name = f"{found['kind']}/{found['metadata']['name']}"
        if found["kind"] == "Namespace":
            yield f"{name} would be deleted with all that others have in it"
        elif found["metadata"].get("namespace") != NAMESPACE:
            yield f"{name} is in whatever namespace is the current one"
        if len(found["metadata"]["name"]) > 63:
            yield f"{name} is too long"


@rule
def monitors_are_found(installation: Installation) -> Iterator[str]:
    """By a Prometheus that asks for labels; and no autoscaler sits on more than its fewest."""
    wanted = installation.values["monitoring"]["labels"]
    for found in installation.of("PodMonitor", "PrometheusRule"):
        if not wanted or not wanted.items() <= found["metadata"]["labels"].items():
            yield f"{found['kind']} has not the labels {wanted}"
    for scaler in installation.of("ScaledObject", "HorizontalPodAutoscaler"):
        if not installation.of("PodMonitor") or not installation.of("PrometheusRule"):
            yield f"{scaler['kind']}: nobody computes the load"
        fallback = scaler["spec"].get("fallback", {})
        if fallback.get("replicas", 0) > scaler["spec"].get("minReplicaCount", 0):
            yield f"{scaler['kind']}: without Prometheus there are {fallback['replicas']}"


@rule
def rules_are_of_this_installation(installation: Installation) -> Iterator[str]:
    """Each selector names its namespace, or every installation would compute for all."""
    for found in installation.of("PrometheusRule"):
        for group in found["spec"]["groups"]:
            for each in group["rules"]:
                own = f'namespace="{NAMESPACE}", job="synthia-vllm"'
                if each["expr"].count('job="synthia-vllm"') != each["expr"].count(own):
                    yield f"{each.get('record') or each.get('alert')} is of all namespaces"


@rule
def what_several_share_is_shared(installation: Installation) -> Iterator[str]:
    """Accounts and ledger by a URL from a Secret, to a port that is open; else none is kept."""
    scaled = installation.of("ScaledObject", "HorizontalPodAutoscaler")
    several = scaled or installation.values["replicas"] > 1
    for pod in installation.servers():
        env = {entry["name"]: entry for entry in (pod.server or {})["env"]}
        for name in ("accounts", "ledger"):
            values = installation.values[name]
            entry = env.get(f"SYNTHIA_{name.upper()}", {})
            secret = entry.get("valueFrom", {}).get("secretKeyRef", {}).get("name", "")
            if secret != values["secret"]:
                yield f"{pod.name}: the URL of {name} is not from {values['secret'] or 'nowhere'}"
            ports = _egress_ports(installation, pod)
            if (values["port"] in ports) != bool(values["secret"]):
                yield f"{pod.name}: {name} may be reached at {sorted(ports)}"
            if secret and 53 not in ports:
                yield f"{pod.name} cannot look up where {name} are"
        written = yaml.safe_load(installation.config()).get("ledger")
        if (written == "none") != bool(several and not installation.values["ledger"]["secret"]):
            yield f"{pod.name}: the ledger is {written}"
    for told, name in (("Who used what is not kept", "ledger"), ("counts limits for", "accounts")):
        alone = bool(several and not installation.values[name]["secret"])
        if (told in installation.notes) != alone:
            yield f"the notes do not say what there is of {name}"


def _egress_ports(installation: Installation, pod: Pod) -> set[int]:
    return {
        port["port"]
        for policy in installation.of("NetworkPolicy")
        if selects(policy["spec"]["podSelector"], pod.labels)
        for entry in policy["spec"]["egress"] or []
        for port in entry.get("ports", [])
    }


@rule
def ways_in_lead_to_the_service(installation: Installation) -> Iterator[str]:
    """By its name and port, with time for the longest answer, and to the API alone."""
    [server] = installation.servers()
    longest = _settings(server, installation).limits.request_seconds
    ports = {
        (service["metadata"]["name"], port["name"])
        for service in installation.of("Service")
        for port in service["spec"]["ports"]
    }
    for found in installation.of("Ingress"):
        for path in (p for r in found["spec"]["rules"] for p in r["http"]["paths"]):
            service = path["backend"]["service"]
            if (service["name"], service["port"]["name"]) not in ports:
                yield f"Ingress: there is no {service['name']}"
            if path["path"] != "/v1":
                yield "Ingress: /metrics is open to the world"
        if installation.values["ingress"]["tlsSecret"] and not found["spec"].get("tls"):
            yield "Ingress: there is no TLS"
        for name, value in found["metadata"].get("annotations", {}).items():
            if fnmatch(name, "*proxy-*-timeout") and int(value) <= longest:
                yield f"Ingress: {name} cuts answers after {value} s"


@rule
def routes_lead_to_the_service(installation: Installation) -> Iterator[str]:
    """As ways in do."""
    [server] = installation.servers()
    longest = _settings(server, installation).limits.request_seconds
    ports = {
        (service["metadata"]["name"], port["port"])
        for service in installation.of("Service")
        for port in service["spec"]["ports"]
    }
    for found in installation.of("HTTPRoute"):
        for way in found["spec"]["rules"]:
            for backend in way["backendRefs"]:
                if backend.get("kind") is None and (backend["name"], backend["port"]) not in ports:
                    yield f"HTTPRoute: there is no {backend['name']}"
            if int(way["timeouts"]["request"].removesuffix("s")) <= longest:
                yield f"HTTPRoute cuts answers after {way['timeouts']['request']}"
            if any(not m["path"]["value"].startswith("/v1") for m in way["matches"]):
                yield "HTTPRoute: /metrics is open to the world"


@rule
def evictions_leave_somebody(installation: Installation) -> Iterator[str]:
    """The disruption budget selects the server's pods, and keeps one however few there are."""
    budgets = [found["spec"] for found in installation.of("PodDisruptionBudget")]
    for pod in installation.pods():
        if pod.labels[_COMPONENT] not in ("server", "worker"):
            continue
        mine = [budget for budget in budgets if selects(budget["selector"], pod.labels)]
        if len(mine) != 1:
            yield f"{pod.name} has {len(mine)} disruption budgets"
            continue
        pods = installation.smallest()
        left = mine[0].get("minAvailable", pods - mine[0].get("maxUnavailable", pods))
        if not isinstance(left, int) or left < 1:
            yield f"{pod.name}: all {pods} may be evicted at once"
        # Of a single group none: who evicts one pod ends it.
        size = pod.owner["spec"].get("leaderWorkerTemplate", {}).get("size", 1)
        if pods > size and left >= pods:
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
            if selects(found.get("labelSelector", {}), pod.labels)
        }
        if installation.values["topologySpreadConstraints"]:
            continue
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
                {_NAME, _INSTANCE, _COMPONENT}
                <= set(peer.get("podSelector", {}).get("matchLabels", {}))
                or (peer.get("podSelector") and selects(peer["podSelector"], pod.labels))
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
    """Service, monitor and pool take all pods of one component, by a port that these have."""
    found = [
        (service, service["spec"]["selector"], [p["targetPort"] for p in service["spec"]["ports"]])
        for service in installation.of("Service")
    ]
    if not found:
        yield "there is no Service"
    for monitor in installation.of("PodMonitor"):
        ports = [end["port"] for end in monitor["spec"]["podMetricsEndpoints"]]
        found.append((monitor, monitor["spec"]["selector"], ports))
    for pool in installation.of("InferencePool"):
        ports = [port["number"] for port in pool["spec"]["targetPorts"]]
        found.append((pool, pool["spec"]["selector"], ports))
    for owner, selector, ports in found:
        component = selector.get("matchLabels", selector).get(_COMPONENT)
        wanted = component if component in ("picker", "gateway") else "server"
        for pod in installation.pods():
            taken = selects(selector, pod.labels)
            if taken != (pod.labels[_COMPONENT] == wanted):
                yield f"{owner['kind']}: {'takes' if taken else 'does not take'} {pod.name}"
            here = [port for c in pod.containers() for port in c.get("ports", [])]
            known = {p.get("name") for p in here} | {p["containerPort"] for p in here}
            if taken and not set(ports) <= known:
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
    """The server takes the ConfigMap together with its variables, and it says what was asked."""
    for pod in installation.servers():
        found = _settings(pod, installation)
        if found.host != "0.0.0.0":
            yield f"{pod.name} cannot be reached"
        if found.keys_file is None and found.model != "demo":
            yield f"{pod.name} serves the real model without keys"
        if found.keys_file and not pod.volume(str(found.keys_file.parent)).get("secret"):
            yield f"{pod.name}: there is no Secret at {found.keys_file}"
        for place in (Path(found.model), found.transcripts.directory, found.batches.directory):
            if place and place.is_absolute() and not pod.volume(f"/{place.parts[1]}"):
                yield f"{pod.name}: there is no volume at {place}"
        if found.metrics == "key" and any(
            "authorization" not in end
            for monitor in installation.of("PodMonitor")
            for end in monitor["spec"]["podMetricsEndpoints"]
        ):
            yield f"{pod.name} tells Prometheus nothing without a key"


def _shared(installation: Installation) -> bool:
    return bool(installation.values["storage"]["accessMode"] == "ReadWriteMany")


def _claims(pod: Pod) -> list[Any]:
    return [v for v in pod.spec.get("volumes", []) if "persistentVolumeClaim" in v]


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
