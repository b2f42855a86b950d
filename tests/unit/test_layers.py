"""The order of the layers: the tree is read, and held to who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import synthia_vllm

PACKAGE = Path(synthia_vllm.__file__).parent

# Lowest first: a module imports only from its own folder and from lines above its own.
LAYERS = (
    {"__init__"},
    {"errors"},
    {"template", "telemetry", "admission", "ledger"},
    {"settings"},
    {"engine"},
    {"generate"},
    {"http"},
    {"api"},
    {"serve"},
    {"demo"},
    {"cli"},
)
VLLM = "synthia_vllm.engine.vllm"
WEB = {"fastapi", "starlette", "uvicorn", "httpx", "aiohttp", "openai"}
KNOWS_WEB = {"http", "api", "serve", "cli"}


def modules() -> dict[str, Path]:
    """Every module of the package by its full name; a folder's ``__init__`` has the folder's."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """What a module names in any import, also inside functions and for types, by full names.

    Of ``from package import name`` the module is told if `name` is one, else the package.
    """
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module)
    return found


IMPORTS = {name: imports(name) for name in MODULES}


def layer(name: str) -> int:
    """The position in `LAYERS` of a module of ours."""
    top = name.split(".")[1] if "." in name else "__init__"
    [position] = (position for position, folders in enumerate(LAYERS) if top in folders)
    return position


def ours(name: str) -> set[str]:
    """The modules of ours that a module imports."""
    return {other for other in IMPORTS[name] if other.split(".")[0] == "synthia_vllm"}


def test_every_folder_is_listed() -> None:
    """No module is outside the order, and no name in the order is without a module."""
    tops = {path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")}
    assert {top.removesuffix(".py") for top in tops} == set().union(*LAYERS)


def test_nothing_is_imported_from_above() -> None:
    """A module imports only its own folder and lower layers; folders of one layer stay apart."""
    for name in MODULES:
        for other in ours(name):
            same = name.split(".")[1:2] == other.split(".")[1:2]
            assert same or layer(other) < layer(name), f"{name} imports {other}"


def test_no_cycle() -> None:
    """No module imports itself by way of others."""
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way, name))
        if name not in done:
            for other in ours(name) - {"synthia_vllm"}:
                visit(other, (*way, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_routes_stay_apart() -> None:
    """A route's folder imports no other's: what two routes share is below them."""
    for name in MODULES:
        if name.startswith("synthia_vllm.api.") and name.count(".") > 2:
            for other in ours(name):
                if other.startswith("synthia_vllm.api.") and other.count(".") > 2:
                    assert other.split(".")[2] == name.split(".")[2], f"{name} imports {other}"


def test_who_knows_vllm() -> None:
    """Only `engine.vllm` imports vLLM, and only `serve` and `cli` import `engine.vllm`."""
    for name in MODULES:
        inside = name.startswith(VLLM)
        assert inside or not any(other.split(".")[0] == "vllm" for other in IMPORTS[name]), name
        if any(other.startswith(VLLM) for other in ours(name)):
            assert inside or name.split(".")[1] in {"serve", "cli"}, name


def test_who_knows_http() -> None:
    """Templates, admission, the seam and the answer know no HTTP."""
    for name in MODULES:
        if not set(name.split(".")[1:2]) & KNOWS_WEB:
            assert not {other.split(".")[0] for other in IMPORTS[name]} & WEB, name


def test_light_to_import() -> None:
    """No module of ours loads torch, vLLM, transformers or openai when it is imported."""
    code = (
        f"import importlib, sys\nfor name in {sorted(MODULES)}: importlib.import_module(name)\n"
        "print([m for m in ('torch', 'vllm', 'transformers', 'openai') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "[]"
