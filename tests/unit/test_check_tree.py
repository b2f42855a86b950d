"""What `make check` says of files that do not belong into the repository."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from tools.check_tree import problems

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one file that belongs there."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    add(tmp_path, "package/module.py", 10)
    return tmp_path


def add(root: Path, name: str, size: int) -> None:
    """Have git track a file of this `size`."""
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"x" * size)
    subprocess.run(["git", "add", "-f", name], cwd=root, check=True)


def test_what_belongs_there(repository: Path) -> None:
    """Nothing is said of a small file, nor of what git does not track."""
    (repository / "large").write_bytes(b"x" * 2_000_000)
    (repository / ".venv").mkdir()
    assert problems(repository) == []


@pytest.mark.parametrize(
    "name",
    [
        ".venv/pyvenv.cfg", ".venv-clients/bin/python", "env/x", "a/node_modules/b/index.js",
        "lib/python3.11/site-packages/x.py", "x-1.0.dist-info/METADATA", "a/vllm.whl",
    ],
)  # fmt: skip
def test_environments(repository: Path, name: str) -> None:
    """Parts of an environment are named."""
    add(repository, name, 10)
    [problem] = problems(repository)
    assert problem.startswith(name)


def test_sizes(repository: Path) -> None:
    """A file over the limit is named with its size, and so is the whole tree."""
    add(repository, "data.bin", 1_000_001)
    [problem] = problems(repository)
    assert problem.startswith("data.bin has 1,000,001 bytes")
    for number in range(20):
        add(repository, f"{number}.txt", 999_999)
    assert "The tree has 20,999,991 bytes" in problems(repository)[-1]
