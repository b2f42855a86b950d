"""Every command in the documentation is run as it stands there, or says what it needs.

A block of commands that cannot be run here has a comment in front: ``<!-- needs: a cluster -->``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from serving import Running

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = {
    "docker", "docker and a GPU", "docker and a cluster", "a cluster", "a cluster with a GPU",
    "a cluster with three GPUs",
    "minutes to an hour", "the tasks' data, from the internet",
    "two servers behind it",  # run by test_doors.py
}  # fmt: skip
# `make serve` is run for what it makes of its flags (test_process.py serves), `make test` is this.
PRELUDE = """\
set -euo pipefail
make() {
    case "$1" in
    serve) local flags="${2-}"; eval ".venv/bin/synthia-vllm serve ${flags#ARGS=} --print-config" ;;
    *) command make -n "$@" ;;
    esac
}
"""


class Block(NamedTuple):
    page: str
    language: str
    needs: str
    text: str


def blocks() -> list[Block]:
    pattern = re.compile(
        r"^(?:<!-- needs: ([^>]*) -->\n)?```(bash|python|sh|console)\n(.*?)^```", re.M | re.S
    )
    return [
        Block(page.name, language, needs or "", text)
        for page in PAGES
        for needs, language, text in pattern.findall(page.read_text())
    ]


BLOCKS = blocks()
RUN = [block for block in BLOCKS if not block.needs]


def test_every_block_is_seen() -> None:
    """No block hides in another spelling, and what a block needs is really not to be had here."""
    fences = sum(len(re.findall(r"(?m)^ *```\w", page.read_text())) for page in PAGES)
    others = sum(
        len(re.findall(r"(?m)^ *```(?:yaml|json|ini|text|promql)", page.read_text()))
        for page in PAGES
    )
    assert len(BLOCKS) == fences - others
    assert {block.needs for block in BLOCKS} - {""} <= NEEDS
    assert len(RUN) > 12
    for page in PAGES:
        hidden = re.findall(
            r"(?m)^    +(?:\.venv/|synthia-vllm|make|curl|kubectl) .*", page.read_text()
        )
        assert hidden == [], page


@pytest.mark.parametrize(
    "block", RUN, ids=lambda block: f"{block.page}:{block.text.split(maxsplit=3)[:2]}"
)
def test_block(block: Block, live: Running, demo: Path, tmp_path: Path) -> None:
    """It ends well, on a server like that of `make serve`, in a directory like a fresh clone."""
    for entry in ROOT.iterdir():
        if entry.name not in (".git", "evaluation"):
            (tmp_path / entry.name).symlink_to(entry)
    text = block.text.replace("http://127.0.0.1:8000", live.url)
    command = [sys.executable, "-c", text]
    if block.language == "python":
        if "langchain" in text:
            command[0] = str(ROOT / ".venv-clients" / "bin" / "python")
    else:
        command = ["bash", "-c", PRELUDE + text]
    done = subprocess.run(
        command,
        input="What is a token?\n", capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "OPENAI_BASE_URL": f"{live.url}/v1", "OPENAI_API_KEY": "none",
             "MODEL": str(demo), "HF_HUB_OFFLINE": "1", "SYNTHIA_MODEL": "demo"},
    )  # fmt: skip
    said = done.stdout + done.stderr
    if text.startswith("# fails"):
        assert done.returncode == 2, said
        return
    assert done.returncode == 0, said[-3000:]
    assert "Traceback" not in said
    if "curl" in text:
        assert '"error":{' not in said, said
    for failed in re.findall(r"Failed requests: +(\d+)", said):
        assert failed == "0", said


def _inline() -> list[tuple[str, list[str]]]:
    """The benchmark scripts that pages name, with the flags they show."""
    found = []
    for page in PAGES:
        for command in re.findall(
            r"(?m)(?:`|^)(?:\.venv/bin/)?python (benchmarks/[^`\n#]*)", page.read_text()
        ):
            script, *words = command.split()
            found.append((script, [word.split("=")[0] for word in words if word.startswith("--")]))
    return found


def test_benchmarks_have_the_flags_they_are_shown_with() -> None:
    """Each `python benchmarks/...` in a text is a script, and knows its flags."""
    commands = _inline()
    assert len(commands) > 3
    for script in {script for script, _ in commands}:
        done = subprocess.run(
            [sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True
        )
        for flags in (flags for name, flags in commands if name == script):
            for flag in flags:
                assert re.search(rf"(?<![\w-]){flag}\b", done.stdout), (script, flag)
