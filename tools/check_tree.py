"""What is in the repository is its own work, and small: part of `make check`.

A download or an environment that is committed once is in every clone for good.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Final

LARGEST_FILE: Final = 1_000_000
LARGEST_TREE: Final = 20_000_000
"""Bytes, both; of the tracked files as they are in the working tree."""
ENVIRONMENT: Final = re.compile(
    r"(^|/)(site-packages|node_modules|__pycache__|\.?v?env([-_.\d][^/]*)?|pyvenv\.cfg|[^/]+\.(dist|egg)-info)(/|$)"
    r"|\.(whl|pyc|so|safetensors)$"
)


def problems(root: Path) -> list[str]:
    """What of the files that git tracks in `root` should not be there."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True
    )
    found = []
    total = 0
    for name in filter(None, listed.stdout.split("\0")):
        path = root / name
        size = path.lstat().st_size if path.exists() else 0
        total += size
        if size > LARGEST_FILE:
            found.append(f"{name} has {size:,} bytes; at most {LARGEST_FILE:,} are tracked.")
        if ENVIRONMENT.search(name):
            found.append(f"{name} looks like part of an environment or a build.")
    if total > LARGEST_TREE:
        found.append(f"The tree has {total:,} bytes; at most {LARGEST_TREE:,} are tracked.")
    return found


if __name__ == "__main__":
    said = problems(Path(__file__).parents[1])
    print(*said, sep="\n", end="\n" if said else "")
    sys.exit(bool(said))
