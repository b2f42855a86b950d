"""The rooms of the house: who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import synthia_vllm

PACKAGE = Path(synthia_vllm.__file__).parent

# Lowest first. A room imports only rooms above it in this list.
ROOMS = [
    "__init__", "errors", "prompt", "answer", "settings", "protocol", "raw_protocol", "metrics",
    "tracing", "logs", "tenants", "shared", "transcript", "engine", "grammars", "grammar_checker",
    "leash", "vllm_grammars", "forkserver", "cores", "detokenizer", "vllm_start", "vllm_engine",
    "fake", "http_errors", "reply", "generation", "chat", "completions", "sse", "service",
    "exchange", "endpoint", "workbench", "page", "app",
    "connection", "server", "workers", "demo_training", "demo", "terminal", "rendering", "evaluate",
    "keys", "cli",
]  # fmt: skip
PURE = {
    "errors", "prompt", "answer", "tenants", "shared", "transcript", "engine", "detokenizer",
    "fake", "reply", "generation", "chat", "completions",
}  # fmt: skip
WEB = {"fastapi", "starlette", "uvicorn", "httpx", "aiohttp", "openai"}


def imports(room: str) -> set[str]:
    """The modules that `room` names in any import, also inside functions and for types."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{room}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {node.module or ""}
            if node.module == "synthia_vllm":
                found |= {f"synthia_vllm.{alias.name}" for alias in node.names}
    return found


def test_every_room_is_listed() -> None:
    """No module is outside the order."""
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(ROOMS)


def test_imports_point_one_way() -> None:
    """A room imports only rooms before it."""
    for position, room in enumerate(ROOMS):
        for name in imports(room):
            if name.startswith("synthia_vllm."):
                other = name.split(".")[1]
                assert other not in ROOMS[position:], f"{room} imports {other}"


def test_one_room_knows_vllm() -> None:
    """Only `vllm_start` and `vllm_engine` import vLLM."""
    for room in ROOMS:
        knows = any(name.split(".")[0] == "vllm" for name in imports(room))
        assert knows == (room in {"vllm_start", "vllm_engine", "vllm_grammars"})


def test_pure_rooms_know_no_web() -> None:
    """The template layer and the seam do not know HTTP."""
    for room in PURE:
        assert not {name.split(".")[0] for name in imports(room)} & WEB


def test_light_to_import() -> None:
    """Neither the package nor the edge loads torch, vLLM or transformers."""
    code = (
        "import sys; from synthia_vllm import app, cli, demo, vllm_engine, workers;"
        "print([m for m in ('torch', 'vllm', 'transformers', 'openai') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "[]"
