"""What is installed is what the lock files say, and that fits what pyproject.toml asks for."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from locks import FILES, lock, pins
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
SETS = ("cpu", "gpu", "dev", "bench", "eval", "clients")
TOGETHER = ("cpu", "dev", "bench", "eval")
"""Installed into one environment, one after the other."""
BY_ITSELF = {"torch", "torchvision", "torchaudio", "torchcodec"}
"""Installed from another index, or not wanted: see requirements/no-torch.in."""


def inputs(name: str) -> list[str]:
    if name == "clients":
        lines = (FILES / "clients.in").read_text().splitlines()
        return [line for line in lines if line and not line.startswith("#")]
    wanted: list[str] = PROJECT["dependencies"] + EXTRAS[name]
    return wanted


@pytest.mark.parametrize("name", SETS)
def test_locks_fit_their_ranges(name: str) -> None:
    """Each requirement has a version in the lock, and that is within its range."""
    locked = pins(name)
    for text in inputs(name):
        requirement = Requirement(text)
        package = re.sub(r"[-_.]+", "-", requirement.name).lower()
        versions = locked.get(package)
        assert versions, f"{text}: run `make lock`"
        for version in versions:
            assert requirement.specifier.contains(version), f"{text}: {version}, run `make lock`"


@pytest.mark.parametrize("name", SETS)
def test_locks_have_hashes_and_no_addresses(name: str) -> None:
    """Every package has a hash; where it comes from is the machine's business."""
    text = lock(name)
    entries = re.split(r"\n(?=[a-z0-9])", text)[1:]
    assert len(entries) > 20
    for entry in entries:
        assert "--hash=sha256:" in entry, entry
    assert "://" not in text
    assert "index" not in re.sub(r"^[a-z0-9._-]+==.*", "", text, flags=re.M)
    if name != "gpu":
        assert not BY_ITSELF & set(pins(name))


def test_locks_agree() -> None:
    """Of what two sets of one environment have, they have one version."""
    for package in {package for name in TOGETHER for package in pins(name)}:
        versions = {frozenset(pins(name).get(package, ())) for name in TOGETHER} - {frozenset()}
        assert len(versions) == 1, package


def test_locks_are_complete() -> None:
    """Installed as they stand, without a look at dependencies, the locks leave none out."""
    locked = pins("cpu") | pins("dev")
    for package in locked:
        try:
            requirements = requires(package) or ()
        except PackageNotFoundError:  # for another Python or processor, or a machine with a GPU
            continue
        for requirement in map(Requirement, requirements):
            name = re.sub(r"[-_.]+", "-", requirement.name).lower()
            if name in BY_ITSELF or (requirement.marker and not requirement.marker.evaluate()):
                continue
            assert any(map(requirement.specifier.contains, locked[name])), (package, requirement)
