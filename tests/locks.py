"""The lock files in requirements/, as tests read them."""

from __future__ import annotations

import re
from pathlib import Path

FILES = Path(__file__).parents[1] / "requirements"


def lock(name: str) -> str:
    """The lock file of a set, as it stands."""
    return (FILES / f"{name}.txt").read_text()


def pins(name: str) -> dict[str, set[str]]:
    """The versions of each package in a lock; more than one where markers choose."""
    found: dict[str, set[str]] = {}
    for package, version in re.findall(
        r"^([a-z0-9._-]+)(?:\[[^]]*\])?==([^ ;\\]+)", lock(name), re.M
    ):
        found.setdefault(package, set()).add(version)
    return found
