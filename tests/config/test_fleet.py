"""A fleet: what gateway, picker and servers are told of each other agrees; any of them may go."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any, Final

import pytest
import yaml
from manifests import CHART, Installation, helm, render, selects

from synthia_vllm.engine.fake import FakeEngine
from synthia_vllm.engine.vllm.options import check_options
from synthia_vllm.serve.app import create_app
from synthia_vllm.settings import Settings
from synthia_vllm.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FLEETS: Final = ("fleet", "a-fleet-behind-envoy", "a-fleet-of-demos")
GENERATES: Final = {f"/v1/{path}" for path in ("chat/completions", "completions", "messages")}
GENERATES.add("/v1/responses")
CHECKS: Final[list[Callable[[Installation], Iterator[str]]]] = []


def check(
    found: Callable[[Installation], Iterator[str]],
) -> Callable[[Installation], Iterator[str]]:
    """Take it into the checks."""
    CHECKS.append(found)
    return found


def deployment(installation: Installation, component: str) -> Any:
    """The Deployment of that component; empty if there is none."""
    return next(
        (pod.owner for pod in installation.pods()
         if pod.labels["app.kubernetes.io/component"] == component),
        {},
    )  # fmt: skip


def pod(installation: Installation, component: str) -> Any:
    return deployment(installation, component)["spec"]["template"]["spec"]


def container(installation: Installation, name: str) -> Any:
    """One of picker's or gateway's."""
    return next(c for p in installation.pods() for c in p.containers() if c["name"] == name)


def flags(installation: Installation) -> dict[str, str]:
    """What the picker is started with."""
    arguments = container(installation, "picker")["args"]
    return dict(argument.removeprefix("--").split("=", 1) for argument in arguments)


def file(installation: Installation, name: str) -> Any:
    """A file in a ConfigMap; empty if there is none."""
    texts = (m["data"].get(name) for m in installation.of("ConfigMap"))
    return yaml.safe_load(next((text for text in texts if text), "{}"))


def plugins(installation: Installation) -> dict[str, Any]:
    """What the picker is made of, by type."""
    found = file(installation, "picker.yaml")["plugins"]
    return {plugin["type"]: plugin.get("parameters", {}) for plugin in found}


def told(installation: Installation) -> Any:
    """What servers tell of their caches, and how."""
    return file(installation, "server.yaml")["engine"].get("kv_events_config", {})


def clusters(installation: Installation) -> dict[str, Any]:
    """The gateway's Envoy's."""
    found = file(installation, "envoy.yaml").get("static_resources", {}).get("clusters", [])
    return {cluster["name"]: cluster for cluster in found}


def listener(installation: Installation, name: str) -> Any:
    """The connection manager of one of the gateway's Envoy's listeners."""
    listeners = file(installation, "envoy.yaml")["static_resources"]["listeners"]
    [found] = [each for each in listeners if each["name"] == name]
    return found["filter_chains"][0]["filters"][0]["typed_config"]


def seconds(span: str) -> float:
    return float(span.removesuffix("s"))


@check
def any_of_them_may_go(installation: Installation) -> Iterator[str]:
    """Gateway and picker: two at least, on different nodes, one at a time, none by an update."""
    budgets = [found["spec"] for found in installation.of("PodDisruptionBudget")]
    components = ["picker", *(["gateway"] if clusters(installation) else [])]
    for component in components:
        owner = deployment(installation, component)["spec"]
        labels = owner["template"]["metadata"]["labels"]
        if owner["replicas"] < 2:
            yield f"there is one {component}"
        if owner["strategy"] != {
            "type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1},
        }:  # fmt: skip
            yield f"an update takes a {component} away"
        if not any(selects(b["selector"], labels) and b["maxUnavailable"] == 1 for b in budgets):
            yield f"each {component} may be evicted at once"
        spread = owner["template"]["spec"]["topologySpreadConstraints"]
        if not all(selects(constraint["labelSelector"], labels) for constraint in spread):
            yield f"each {component} may be on one node"
    if "ha-enable-leader-election" in flags(installation):
        yield "all but one picker only wait"  # each hears of all caches: none needs to lead


@check
def each_ends_with_what_it_has(installation: Installation) -> Iterator[str]:
    """Pickers and gateways are used until all have heard that they go, and then finish."""
    longest = installation.values["settings"]["limits"]["request_seconds"]
    picker, drain = pod(installation, "picker"), seconds(flags(installation)["drain-timeout"])
    on_the_way = longest if not clusters(installation) else 5
    if drain < 10 or picker["terminationGracePeriodSeconds"] < drain + on_the_way + 10:
        yield "a picker is killed with answers that pass by it"
    render_ends = container(installation, "render")["lifecycle"]["preStop"]["sleep"]["seconds"]
    if render_ends < drain:
        yield "a picker that ends gets no tokens any more"
    if clusters(installation):
        ends = container(installation, "envoy")["lifecycle"]["preStop"]["sleep"]["seconds"]
        grace = pod(installation, "gateway")["terminationGracePeriodSeconds"]
        front = listener(installation, "front")
        age = seconds(front["common_http_protocol_options"]["max_connection_duration"])
        if not longest + 15 <= ends < grace or age > ends - 60:
            yield "a gateway ends with answers on the way, or with clients who do not know"
        for name in ("front", "picked"):
            for route in listener(installation, name)["route_config"]["virtual_hosts"][0]["routes"]:
                if seconds(route["route"]["timeout"]) <= longest:
                    yield f"{name} cuts answers that may take {longest} s"


@check
def both_ends_speak_tls(installation: Installation) -> Iterator[str]:
    """The picker does, and who asks it knows."""
    if flags(installation)["secure-serving"] != "true":
        yield "the picker does not speak TLS"
    services = {service["metadata"]["name"] for service in installation.of("Service")}
    rules = installation.of("DestinationRule")
    if clusters(installation):
        asks = clusters(installation)["pickers"]
        if asks.get("transport_socket", {}).get("name") != "envoy.transport_sockets.tls":
            yield "Envoy speaks no TLS to the picker"
    elif [rule["spec"]["host"] in services for rule in rules] != [True]:
        yield "Istio is not told of the picker's TLS"
    elif rules[0]["spec"]["trafficPolicy"]["tls"]["mode"] != "SIMPLE":
        yield "Istio speaks another TLS"


@check
def the_picker_looks_now_and_then(installation: Installation) -> Iterator[str]:
    """Not twenty times a second; and what it saw holds until it looks again."""
    every = installation.values["picker"]["scrapeSeconds"]
    spans = (
        flags(installation)["refresh-metrics-interval"],
        plugins(installation)["metrics-data-source"]["interval"],
    )
    if every < 1 or {seconds(span) for span in spans} != {every}:
        yield f"each server is asked for its load every {spans}"
    holds = (
        flags(installation)["metrics-staleness-threshold"],
        plugins(installation)["utilization-detector"]["metricsStalenessThreshold"],
    )
    if min(map(seconds, holds)) < 3 * every:
        yield f"what it knows is too old after {holds}"
    if file(installation, "server.yaml").get("metrics", "open") != "open":
        yield "it has no key to show"


@check
def the_picker_is_put_together(installation: Installation) -> Iterator[str]:
    """As v0.10.0 reads it: each part that is named is there; the scorer knows what is cached."""
    found = file(installation, "picker.yaml")
    if (found["apiVersion"], found["kind"]) != ("llm-d.ai/v1alpha1", "EndpointPickerConfig"):
        yield "it is of another version"
    sources = found["dataLayer"]["sources"]
    named = [
        part["pluginRef"] for profile in found["schedulingProfiles"] for part in profile["plugins"]
    ]
    named += [source["pluginRef"] for source in sources]
    named += [part["pluginRef"] for source in sources for part in source["extractors"]]
    parts = plugins(installation)
    named.append(parts["prefix-cache-scorer"].get("prefixMatchInfoProducerName", "approximate"))
    for name in set(named) - set(parts):
        yield f"there is no {name}"
    heard = [s["extractors"] for s in sources if s["pluginRef"] == "endpoint-notification-source"]
    if heard != [[{"pluginRef": "precise-prefix-cache-producer"}]]:
        yield "it does not hear of new servers"


@check
def the_picker_hears_the_servers(installation: Installation) -> Iterator[str]:
    """By the ports, the topic and the model's name by which they tell, and nobody else does."""
    producer = plugins(installation)["precise-prefix-cache-producer"]["kvEventsConfig"]
    ports = producer["podDiscoveryConfig"]
    events = told(installation)
    if not events.get("enable_kv_cache_events") or events.get("publisher") != "zmq":
        yield "servers do not tell of their caches"
        return
    if events["endpoint"] != f"tcp://*:{ports['socketPort']}":
        yield f"they tell at {events['endpoint']}"
    if events["replay_endpoint"] != f"tcp://*:{ports['replaySocketPort']}":
        yield f"they tell again at {events['replay_endpoint']}"
    if not re.fullmatch(rf"{producer['topicFilter']}[^@]+@[^@]+", events["topic"]):
        yield f"they tell of {events['topic']}"
    model = plugins(installation)["token-producer"]["modelName"]
    server = Settings(**file(installation, "server.yaml"))
    if {model, events["topic"].rpartition("@")[2]} != {server.base_name}:
        yield f"the model is {server.base_name} to clients, {model} to the picker"
    wanted = {ports["socketPort"], ports["replaySocketPort"]}
    pickers = deployment(installation, "picker")["spec"]["template"]["metadata"]["labels"]
    [labels] = [pod.labels for pod in installation.servers()]
    for policy in installation.of("NetworkPolicy"):
        if not selects(policy["spec"]["podSelector"], labels):
            continue
        for entry in policy["spec"]["ingress"]:
            peers = [peer.get("podSelector", {}) for peer in entry["from"]]
            if wanted & {port["port"] for port in entry["ports"]}:
                wanted -= {port["port"] for port in entry["ports"]}
                if not all(peer and selects(peer, pickers) for peer in peers):
                    yield "others read the tokens of everybody's prompts"
    if wanted:
        yield f"pickers do not come in at {sorted(wanted)}"


@check
def the_picker_gets_tokens(installation: Installation) -> Iterator[str]:
    """From the Envoy beside it, which has a user's key if there are users."""
    url = plugins(installation)["token-producer"]["vllm"]["url"]
    [listens] = file(installation, "render.yaml")["static_resources"]["listeners"]
    address = listens["address"]["socket_address"]
    if url != f"http://{address['address']}:{address['port_value']}":
        yield f"nobody answers at {url}"
    routes = listens["filter_chains"][0]["filters"][0]["typed_config"]["route_config"]
    [header] = routes.get("request_headers_to_add", [{}])
    value = header.get("header", {}).get("value", "")
    env = {entry["name"]: entry for entry in container(installation, "render").get("env", [])}
    users = file(installation, "server.yaml").get("keys_file")
    if bool(users) != (value == "Bearer %ENVIRONMENT(SYNTHIA_KEY)%"):
        yield "it shows no key"
    if users and "secretKeyRef" not in env.get("SYNTHIA_KEY", {}).get("valueFrom", {}):
        yield "it has no key"


@check
def only_prompts_are_picked_for(installation: Installation) -> Iterator[str]:
    """The routes that generate, by their method; the rest of the API goes to any, and no more."""
    if clusters(installation):
        [host] = listener(installation, "front")["route_config"]["virtual_hosts"]
        regex = host["routes"][0]["match"]["safe_regex"]["regex"]
        picked = {path for path in _paths() if re.fullmatch(regex, path)}
        rest = [route["match"].get("prefix") for route in host["routes"][1:]]
        if "x-gateway-destination-endpoint" not in host["request_headers_to_remove"]:
            yield "a client says where its request goes"
    else:
        [route] = [r for r in installation.of("HTTPRoute") if len(r["spec"]["rules"]) > 1]
        first, *others = route["spec"]["rules"]
        picked = {match["path"]["value"] for match in first["matches"]}
        rest = [match["path"]["value"] for other in others for match in other["matches"]]
        if {match["method"] for match in first["matches"]} != {"POST"}:
            yield "what has no body is picked for"
        if first["backendRefs"][0]["kind"] != "InferencePool":
            yield "nothing is picked"
    if picked != GENERATES:
        yield f"picked for are {picked}"
    if rest != ["/v1/"]:
        yield f"also open is {rest}"


@check
def the_namespace_may_be_restricted(installation: Installation) -> Iterator[str]:
    """Istio's pod of a Gateway that is made here gets what it lacks for that."""
    for gateway in installation.of("Gateway"):
        name = gateway["spec"]["infrastructure"]["parametersRef"]["name"]
        [more] = [m for m in installation.of("ConfigMap") if m["metadata"]["name"] == name]
        changed = yaml.safe_load(more["data"]["deployment"])["spec"]
        context = changed["template"]["spec"].get("securityContext", {})
        if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield "the namespace's level refuses the gateway"
        if changed["replicas"] < 2:
            yield "there is one gateway"


def _paths() -> set[str]:
    from prometheus_client import CollectorRegistry

    app = create_app(FakeEngine(()), Settings(), Metrics(CollectorRegistry()))
    return set(app.openapi()["paths"])


@pytest.mark.parametrize("found", CHECKS, ids=lambda found: found.__name__)
@pytest.mark.parametrize("name", FLEETS)
def test_fleet(name: str, found: Callable[[Installation], Iterator[str]]) -> None:
    """Each fleet passes each check."""
    assert list(found(render(name))) == []


def config_map(installation: Installation, name: str) -> Any:
    return next(m for m in installation.of("ConfigMap") if name in m["data"])["data"]


def replace(name: str, old: str, new: str) -> Callable[[Installation], object]:
    """Another text in a file of a ConfigMap."""

    def harm(installation: Installation) -> None:
        data = config_map(installation, name)
        assert old in data[name]
        data[name] = data[name].replace(old, new)

    return harm


def flag(name: str, value: str) -> Callable[[Installation], object]:
    """Another value of one of the picker's flags."""

    def harm(installation: Installation) -> None:
        picker = container(installation, "picker")
        kept = [a for a in picker["args"] if not a.startswith(f"--{name}=")]
        picker["args"] = [*kept, f"--{name}={value}"]

    return harm


ENVOY: Final = "a-fleet-behind-envoy"
BREAKS: Final[list[tuple[str, str, Callable[[Installation], object]]]] = [
    ("any_of_them_may_go", "fleet", lambda i: deployment(i, "picker")["spec"].update(replicas=1)),
    (
        "any_of_them_may_go",
        "fleet",
        lambda i: deployment(i, "picker")["spec"].update(strategy={"type": "Recreate"}),
    ),
    ("any_of_them_may_go", ENVOY, lambda i: deployment(i, "gateway")["spec"].update(replicas=1)),
    ("any_of_them_may_go", "fleet", flag("ha-enable-leader-election", "true")),
    (
        "any_of_them_may_go",
        "fleet",
        lambda i: [b["spec"].update(maxUnavailable=2) for b in i.of("PodDisruptionBudget")],
    ),
    (
        "each_ends_with_what_it_has",
        "fleet",
        lambda i: pod(i, "picker").update(terminationGracePeriodSeconds=130),
    ),
    ("each_ends_with_what_it_has", ENVOY, replace("envoy.yaml", "timeout: 610s", "timeout: 300s")),
    (
        "each_ends_with_what_it_has",
        ENVOY,
        lambda i: container(i, "envoy")["lifecycle"]["preStop"]["sleep"].update(seconds=60),
    ),
    ("both_ends_speak_tls", "fleet", lambda i: i.objects.remove(i.of("DestinationRule")[0])),
    ("both_ends_speak_tls", "fleet", flag("secure-serving", "false")),
    (
        "both_ends_speak_tls",
        ENVOY,
        replace("envoy.yaml", "envoy.transport_sockets.tls\n", "envoy.transport_sockets.raw\n"),
    ),
    ("the_picker_looks_now_and_then", "fleet", flag("refresh-metrics-interval", "0.05s")),
    (
        "the_picker_looks_now_and_then",
        "fleet",
        replace("picker.yaml", "metricsStalenessThreshold: 5s", "metricsStalenessThreshold: 0.2s"),
    ),
    (
        "the_picker_is_put_together",
        "fleet",
        replace("picker.yaml", "llm-d.ai/v1alpha1", "inference.networking.x-k8s.io/v1alpha1"),
    ),
    (
        "the_picker_is_put_together",
        "fleet",
        replace("picker.yaml", "pluginRef: core-metrics-extractor", "pluginRef: core"),
    ),
    (
        "the_picker_is_put_together",
        "fleet",
        replace("picker.yaml", "prefixMatchInfoProducerName", "prefixMatchInfoProducer"),
    ),
    ("the_picker_hears_the_servers", "fleet", replace("server.yaml", "topic: kv@", "topic: ")),
    ("the_picker_hears_the_servers", "fleet", replace("server.yaml", "5557", "5558")),
    (
        "the_picker_hears_the_servers",
        "fleet",
        replace("picker.yaml", "modelName: Synthia", "modelName: synthia"),
    ),
    (
        "the_picker_hears_the_servers",
        "fleet",
        lambda i: [
            entry["from"].append({"podSelector": {}})
            for policy in i.of("NetworkPolicy")
            for entry in policy["spec"]["ingress"]
        ],
    ),
    ("the_picker_gets_tokens", "fleet", lambda i: container(i, "render").pop("env")),
    ("the_picker_gets_tokens", "fleet", replace("render.yaml", "Bearer", "Basic")),
    ("only_prompts_are_picked_for", ENVOY, replace("envoy.yaml", "prefix: /v1/", "prefix: /")),
    ("only_prompts_are_picked_for", ENVOY, replace("envoy.yaml", "|responses", "|files")),
    (
        "only_prompts_are_picked_for",
        "fleet",
        lambda i: i.of("HTTPRoute")[0]["spec"]["rules"][0]["matches"][0].update(method="GET"),
    ),
    (
        "the_namespace_may_be_restricted",
        "fleet",
        replace("deployment", "RuntimeDefault", "Unconfined"),
    ),
]


@pytest.mark.parametrize(("name", "fleet", "harm"), BREAKS)
def test_checks_notice(name: str, fleet: str, harm: Callable[[Installation], object]) -> None:
    """Each check finds what it is there to find."""
    [found] = [each for each in CHECKS if each.__name__ == name]
    installation = copy.deepcopy(render(fleet))
    harm(installation)
    assert list(found(installation))


def test_every_check_is_tried() -> None:
    """None is without a fleet that fails it."""
    assert {name for name, _, _ in BREAKS} == {found.__name__ for found in CHECKS}


def test_vllm_takes_what_servers_are_told() -> None:
    """The options that make a server tell of its cache."""
    for name in FLEETS:
        check_options(file(render(name), "server.yaml")["engine"])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"settings": {"metrics": "key"}}, "settings.metrics must be open"),
        ({"picker": {"keySecret": ""}}, "picker.keySecret"),
        ({"replicas": 1}, "nothing to pick"),
        ({"picker": {"scrapeSeconds": 0}}, "scrapeSeconds"),
        ({"gateway": {"kind": "nginx"}}, "kind"),
    ],
)
def test_what_cannot_work_is_refused(values: dict[str, Any], said: str) -> None:
    """With a word on what to do."""
    preset = f"--values={CHART / 'presets' / 'fleet.yaml'}"
    done = helm("template", "synthia-vllm", str(CHART), preset, values=values)
    assert done.returncode != 0
    assert said in done.stderr
