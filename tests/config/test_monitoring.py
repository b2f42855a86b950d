"""Rules, dashboard and compose file, held against Prometheus' own tools and a real scrape."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml
from dashboard import FILE, Query, defaults, filled, queries
from leads import LOAD_LATE
from manifests import render
from processes import LONG, command
from prometheus_client import CollectorRegistry
from promql import Selector, selectors
from valkey_server import valkey_server

from synthia_vllm.engine.fake import FakeEngine
from synthia_vllm.serve.app import create_app
from synthia_vllm.settings import Settings
from synthia_vllm.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from lib.monitored import Scrape

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "config"
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((CONFIG / "prometheus/rules.yaml").read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = {rule["record"]: rule for rule in RULES if "record" in rule}
TESTED: list[dict[str, Any]] = yaml.safe_load((CONFIG / "prometheus/rules.test.yaml").read_text())[
    "tests"
]
DASHBOARD: dict[str, Any] = json.loads(FILE.read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
# As Grafana sends them, with the scrape interval it is told of.
ASKED: list[Query] = [
    query
    for panel in PANELS
    for query in queries(panel, defaults(DASHBOARD), scraped=15, shown=3600)
]
PROMETHEUS_OWN = {"up", "ALERTS"}


def promtool(*arguments: str) -> None:
    """Run it in the directory of the rules; it must be content."""
    tool = shutil.which("promtool")
    assert tool, "`promtool` is not installed: on Debian, apt-get install prometheus"
    ran = subprocess.run(
        [tool, *arguments], cwd=CONFIG / "prometheus", capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def firing(alert: str) -> list[list[dict[str, Any]]]:
    """What the unit tests expect of `alert`, at each moment they look at it."""
    return [
        test["exp_samples"]
        for group in TESTED
        for test in group["promql_expr_test"]
        if f'alertname="{alert}", alertstate="firing"' in test["expr"]
    ]


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("up == 0", ["up"]),
        ('sum by (le) (rate(a_bucket{le="0.5", x=~"}|{"}[5m] offset 10m)) > 1e3', ["a_bucket"]),
        ("a:b:c and on (job) d unless ignoring (e) f", ["a:b:c", "d", "f"]),
        ("sum(a) by (b) / on () group_left (c) scalar(d) # e", ["a", "d"]),
        ("topk(10, count without (a) (b) or vector(0))", ["b"]),
    ],
)
def test_selectors_are_found(expression: str, found: list[str]) -> None:
    """All names of series, and no function, label, keyword or number."""
    assert [selector.name for selector in selectors(expression)] == found


def test_prometheus_takes_its_configuration() -> None:
    """Syntax, and what goes with it."""
    promtool("check", "config", "prometheus.yaml")
    promtool("check", "rules", "rules.yaml")


def test_alerts_fire_and_are_silent_as_they_should() -> None:
    """The unit tests of the rules."""
    promtool("test", "rules", "rules.test.yaml")


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_is_tested_both_ways(alert: str) -> None:
    """There is a moment at which it fires, and one at which nothing is to be seen of it."""
    assert any(firing(alert)), "no test in which it fires"
    assert not all(firing(alert)), "no test in which it is silent"


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_says_what_to_do(alert: str) -> None:
    """Its texts name only labels it has, and it has a section of the documentation."""
    rule = ALERTS[alert]
    assert re.fullmatch(r"Synthia[A-Z]\w+", alert)
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert re.fullmatch(r"\d+[smh]", rule["for"])
    assert len(rule["annotations"]["description"].split()) > 10
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    headings = re.findall(r"^### (\w+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert alert in headings
    assert anchor == alert.lower()
    wanted = re.findall(r"\$labels\.(\w+)", str(rule["annotations"]))
    for sample in [sample for samples in firing(alert) for sample in samples]:
        assert all(f'{label}="' in sample["labels"] for label in wanted)


def test_every_alert_is_documented_and_no_other() -> None:
    """The page has no section for an alert that is gone."""
    page = (ROOT / "docs/monitoring.md").read_text()
    assert set(re.findall(r"^### (Synthia\w+)$", page, re.MULTILINE)) == set(ALERTS)


def test_recording_rules_are_named_by_convention() -> None:
    """``level:metric:operations``, where the level is what it was summed up to."""
    for name, rule in RECORDED.items():
        level, _, _ = name.split(":")
        labels = {
            "job": "namespace, job",
            "job_route": "namespace, job, route",
            "instance": "namespace, job, pod, instance",
        }
        if " by (" in rule["expr"]:
            assert f" by ({labels[level]}) (" in rule["expr"]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_installations_stay_apart(rule: dict[str, Any]) -> None:
    """By the job in each selector, beside which a namespace can be put, and in each result."""
    found = selectors(rule["expr"])
    assert found
    assert all('job="synthia-vllm"' in selector.matchers for selector in found)
    kept = re.findall(r"\bby \(([^)]*)\)", rule["expr"])
    assert all(labels.startswith("namespace, job") for labels in kept)
    compared = re.findall(r"\bon \(([^)]*)\)", rule["expr"])
    assert all(labels.startswith("namespace, job") for labels in compared)


def test_no_route_for_text_is_left_out() -> None:
    """Rules and dashboard name them all, and in one way."""
    expressions = [rule["expr"] for rule in RULES] + [query.expression for query in ASKED]
    [pattern] = set(re.findall(r'route=~"(/[^"]*)"', "\n".join(expressions)))
    app = create_app(FakeEngine(), Settings(), Metrics(CollectorRegistry()))
    paths = [route.path for route in app.generation]
    assert len(paths) == pattern.count("|") + 1
    assert all(re.fullmatch(pattern, path) for path in paths)


def scalings() -> dict[str, tuple[str, float]]:
    """What the autoscalers ask Prometheus, and how much of it each server is to have."""
    [keda] = render("keda").of("ScaledObject")
    [trigger] = keda["spec"]["triggers"]
    query = trigger["metadata"]["query"]
    [hpa] = render("hpa").of("HorizontalPodAutoscaler")
    [external] = [metric["external"] for metric in hpa["spec"]["metrics"]]
    [rule] = yaml.safe_load((CONFIG / "prometheus/adapter.yaml").read_text())["externalRules"]
    assert external["metric"] == {"name": rule["name"]["as"]}
    [series] = re.findall(r'__name__="([^"]+)"', rule["seriesQuery"])
    [load] = selectors(query)
    # The adapter adds the namespace of whoever asks, where KEDA has to be told it.
    asked = rule["metricsQuery"].replace("<<.LabelMatchers>>", load.matchers[1:-1])
    assert [selector.name for selector in selectors(asked)] == [series] == [load.name]
    target = external["target"]["averageValue"]
    assert target.endswith("m")
    return {
        "keda": (query, float(trigger["metadata"]["threshold"])),
        "hpa": (asked, float(target[:-1]) / 1000),
    }


def used() -> dict[str, list[Selector]]:
    """All selectors of rules, dashboard and autoscalers, by what they are in."""
    found = {f"rule {rule.get('alert') or rule['record']}": rule["expr"] for rule in RULES}
    expressions = list(found.items()) + [(f"panel {q.panel}", q.expression) for q in ASKED]
    expressions += [(f"autoscaler {name}", query) for name, (query, _) in scalings().items()]
    selected: dict[str, list[Selector]] = {}
    for place, expression in expressions:
        selected.setdefault(place, []).extend(selectors(expression))
    return selected


def test_every_series_exists(scrape: Scrape) -> None:
    """Whatever rules, dashboard and autoscalers name is in the scrape, or made by a rule."""
    missing = [
        f"{place}: {selector.name}"
        for place, found in used().items()
        for selector in found
        if selector.name not in scrape.names | PROMETHEUS_OWN
    ]
    assert missing == []
    assert set(RECORDED) <= scrape.names


def test_every_selector_finds_something(scrape: Scrape) -> None:
    """Label names and values too: a matcher with a mistake finds nothing, and nobody notices."""
    assert {200, 400, 401, 403, 404, 429, 503, 504} <= set(scrape.statuses)
    # Nothing fired within the seconds of this load; the name is Prometheus' own.
    found = {str(s) for found in used().values() for s in found if s.name != "ALERTS"}
    empty = [s for s in found if not scrape.query(f"last_over_time({s}[5m])")]
    assert empty == []


def test_every_rule_works(scrape: Scrape) -> None:
    """On a real scrape: none fails, all recording rules have a result, and nothing fires."""
    groups = scrape.source.ask("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == len(RULES)
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []
    assert [name for name in RECORDED if not scrape.query(name)] == []
    assert [rule["name"] for rule in rules if rule.get("state") == "firing"] == []


def test_the_autoscalers_see_the_load(scrape: Scrape) -> None:
    """Both the same number, which is the server's: it was full at times, and has no other."""
    worth = {
        tuple(float(result["value"][1]) for result in scrape.query(query))
        for query, _ in scalings().values()
    }
    [[now]] = worth
    assert now >= 0
    lines = scrape.source.query_range("job:synthia_load:sum", scrape.begin, scrape.end, 1)
    assert [line["metric"].get("namespace") for line in lines] == [None, "synthia"]
    for line in lines:
        assert max(float(value) for _, value in line["values"]) > 0.9


def test_the_threshold_is_the_measured_one() -> None:
    """Of all that give no false alarms, the one with the longest leads; and the rule is its."""
    measured = json.loads((ROOT / "docs/measurements/signals.json").read_text())["signals"]["load"]
    assert {threshold for _, threshold in scalings().values()} == {float(measured["best"])}
    assert f"/ {LOAD_LATE:g}," in RECORDED["instance:synthia_load:ratio"]["expr"]


@pytest.mark.parametrize("query", ASKED, ids=lambda query: f"{query.panel}: {query.legend}")
def test_every_query_of_the_dashboard_has_data(scrape: Scrape, query: Query) -> None:
    """At the end of the load, numbers; and as a line over its time, if it is one."""
    results = scrape.query(query.expression)
    assert results
    assert any(math.isfinite(float(result["value"][1])) for result in results)
    wanted = re.findall(r"{{(\w+)}}", query.legend)
    assert all(label in result["metric"] for result in results for label in wanted)
    if not query.instant:
        lines = scrape.source.query_range(query.expression, scrape.begin, scrape.end, 1)
        assert max(len(line["values"]) for line in lines) > 10


def test_the_numbers_are_the_loads(scrape: Scrape) -> None:
    """What Prometheus counted is what the clients saw."""
    by_status = scrape.query(
        'sum by (status) (synthia_requests_total{route="/v1/chat/completions", namespace=""})'
    )
    counted = {result["metric"]["status"]: float(result["value"][1]) for result in by_status}
    for status in (400, 403, 404, 429, 504):
        assert 0 < counted[str(status)] <= scrape.statuses[status] + 1
    assert "synthia_user_refusals_total" in scrape.names
    assert "# TYPE vllm:num_requests_waiting gauge" in scrape.text


def test_several_api_processes_have_the_same_series(demo: Path, tmp_path: Path) -> None:
    """Their merged exposition has all that rules and dashboard need, each value once."""
    with (
        valkey_server() as valkey,
        command(
            demo, tmp_path / "log", "--api-workers", "2", "--set", f"accounts={valkey.url}"
        ) as (process, url),
    ):
        for _ in range(8):
            answer = httpx.post(f"{url}/v1/chat/completions", json=LONG | {"max_tokens": 5})
            assert answer.status_code == 200
        refused = httpx.post(f"{url}/v1/chat/completions", json={"model": "another"})
        assert refused.status_code in (400, 404)
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=LONG) as stream:
            next(stream.iter_raw())
        text = httpx.get(f"{url}/metrics").text
        process.terminate()
        assert process.wait(60) == 0
    names = set(re.findall(r"^([a-zA-Z_:][\w:]*)", text, re.MULTILINE))
    needed = {selector.name for found in used().values() for selector in found}
    with_users_only = {"synthia_user_tokens_total", "synthia_user_refusals_total"}
    assert needed - set(RECORDED) - PROMETHEUS_OWN - with_users_only <= names
    assert 'pid="' not in text


def test_the_dashboard_can_be_read() -> None:
    """Every panel says what it shows and in which unit; none lies upon another."""
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    lines = {y for _, y in taken}
    assert len(taken) == 24 * len(lines) == 24 * (max(lines) + 1), "there is a hole"
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Is it healthy?", "Is it fast?", "Is it full?", "Who is using it?"]
    for panel in PANELS:
        assert panel["title"]
        assert len(panel["description"].split()) > 5
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)


def test_the_dashboards_variables_have_values(scrape: Scrape) -> None:
    """Each lists what its label has; the one for the data source comes first, for they need it."""
    first, *others = DASHBOARD["templating"]["list"]
    names = [variable["name"] for variable in others]
    assert names == ["namespace", "pod", "instance", "model", "route", "user"]
    assert (first["name"], first["type"], first["query"]) == (
        "datasource",
        "datasource",
        "prometheus",
    )
    for variable in others:
        asked = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
        assert asked
        assert asked[2] == variable["name"]
        assert variable["allValue"] == ".*"  # which a target without this label has, too
        results = scrape.query(filled(asked[1], defaults(DASHBOARD)))
        values = {result["metric"].get(asked[2]) for result in results} - {None}
        assert values
        for value in values:
            one = defaults(DASHBOARD) | {variable["name"]: re.escape(value).replace("\\", "\\\\")}
            panel = next(p for p in PANELS if f"${variable['name']}" in str(p["targets"]))
            [first_query, *_] = queries(panel, one, scraped=15, shown=3600)
            assert scrape.query(first_query.expression)


def test_the_objectives_are_the_same_everywhere() -> None:
    """In the rules, on the dashboard, in the documentation."""
    page = (ROOT / "docs/monitoring.md").read_text()
    for panel, record, late, budget in (
        ("Time to first text", "first_token", "job:synthia_first_tokens_late:rate5m", 0.05),
        ("Time per token", "slow_answer", "job:synthia_slow_answers:rate5m", 0.01),
    ):
        _, allowed = RECORDED[f"job:synthia_{record}_budget:ratio"]["expr"].split(" + ")
        assert float(allowed) == budget
        [seconds] = re.findall(r'le="([\d.]+)"', RECORDED[late]["expr"])
        [shown] = [p for p in PANELS if p["title"] == panel]
        assert shown["fieldConfig"]["defaults"]["thresholds"]["steps"][1]["value"] == float(seconds)
        said = f"{100 * (1 - budget):g} % within {seconds} s"
        assert said in shown["description"]
        assert said in page


def test_the_compose_file_fits_together() -> None:
    """Schema, files mounted, ports, and the paths at which each looks for what it is given."""
    file = CONFIG / "compose.yaml"
    checker = Path(sys.executable).with_name("check-jsonschema")
    assert checker.exists(), "`check-jsonschema` is not installed: make .venv/.dev"
    subprocess.run([checker, "--builtin-schema", "vendor.compose-spec", file], check=True)
    document = yaml.safe_load(file.read_text())
    services = document["services"]
    assert (CONFIG / services["synthia-vllm"]["build"]["context"] / "Dockerfile").exists()
    mounted: dict[str, Path] = {}
    for service in services.values():
        for mount in service["volumes"]:
            source, place = mount.split(":")[:2]
            if source.startswith("."):
                mounted[place] = CONFIG / source
                assert mounted[place].is_dir()
            else:
                assert source in document["volumes"]

    [flag] = [f for f in services["prometheus"]["command"] if f.startswith("--config.file=")]
    configuration = mounted["/etc/prometheus"] / Path(flag.partition("=")[2]).name
    scraping = yaml.safe_load(configuration.read_text())
    [job] = scraping["scrape_configs"]
    assert job["job_name"] in services
    assert job["static_configs"] == [{"targets": ["synthia-vllm:8000"]}]
    assert all(
        f'job="{job["job_name"]}"' in str(selector)
        for found in used().values()
        for selector in found
        if selector.name == "up"
    )

    provisioning = mounted["/etc/grafana/provisioning"]
    [source] = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == scraping["global"]["scrape_interval"] == "5s"
    [provider] = yaml.safe_load((provisioning / "dashboards/synthia-vllm.yaml").read_text())[
        "providers"
    ]
    assert mounted[provider["options"]["path"]] == FILE.parent.resolve() or (
        mounted[provider["options"]["path"]].samefile(FILE.parent)
    )
    home = Path(services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (mounted[str(home.parent)] / home.name).samefile(FILE)
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
