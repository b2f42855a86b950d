"""What of another package is used here that its documentation does not promise.

Such a reach is marked where it is made, by a comment or docstring with ``vLLM internal:`` (or
``uvicorn internal:``, ``prometheus_client internal:``) and the full name of each thing in
backticks. Here the marks are read, and looked up in the source of the installed package or of a
wheel, without importing either.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator
    from importlib.resources.abc import Traversable

ROOT: Final = Path(__file__).parents[1]
PACKAGES: Final = {"vLLM": "vllm", "uvicorn": "uvicorn", "prometheus_client": "prometheus_client"}
_MARK: Final = re.compile(rf"\b({'|'.join(PACKAGES)}) internal\b")
_DEPTH: Final = 8  # of imports and base classes that are followed


class Reach(NamedTuple):
    """One thing that is used, and where."""

    name: str
    """``package.module.Class.attribute``."""
    file: Path
    line: int


def marked(root: Path = ROOT / "synthia_vllm") -> Iterator[Reach]:
    """The reaches that are marked. Raises `ValueError` for a mark that names nothing."""
    for file in sorted(root.rglob("*.py")):
        lines = file.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            mark = _MARK.search(line)
            if mark is None or line[mark.start() - 1 : mark.start()] == "`":  # prose about marks
                continue
            package = PACKAGES[mark[1]]
            names: list[tuple[str, int]] = []
            for position in range(number, len(lines)):
                text = lines[position].strip()
                if position > number and (not text.strip('#"') or _MARK.search(text)):
                    break  # the paragraph is over
                found = re.findall(rf"`({package}\.[\w.]+)`", text)
                names += [(name, position + 1) for name in found]
                if text.endswith('"""') and position > number:
                    break
            if not names:
                raise ValueError(f"{file}:{number + 1}: the mark names nothing of {package}")
            yield from (Reach(name, file, at) for name, at in names)


class Source:
    """The modules of a package, in a directory or in a wheel."""

    def __init__(self, root: Traversable) -> None:
        self._root = root
        """Holds the package's folder."""
        self._module = lru_cache(None)(self._read)

    @classmethod
    def installed(cls, package: str) -> Source:
        """That of the package in this environment. Raises `ModuleNotFoundError`."""
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            raise ModuleNotFoundError(package)
        return cls(Path(found.origin).parents[1])

    def has(self, name: str) -> bool:
        """Whether there is something of this full name."""
        return self.find(name) is not None

    def find(self, name: str) -> ast.AST | None:
        """What defines the thing of this full name; `None` if nothing does."""
        return self._find(name, _DEPTH)

    def parameters(self, name: str) -> list[str] | None:
        """The parameters of the function or method of this name; `None` if it is no such thing."""
        node = self.find(name)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return None
        args = node.args
        return [arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs)]

    def _read(self, module: str) -> ast.Module | None:
        path = self._root
        *folders, last = module.split(".")
        for folder in folders:
            path = path / folder
        for candidate in (path / f"{last}.py", path / last / "__init__.py"):
            if candidate.is_file():
                return ast.parse(candidate.read_text(encoding="utf-8"))
        return None

    def _find(self, name: str, depth: int) -> ast.AST | None:
        parts = name.split(".")
        for cut in range(len(parts), 0, -1):
            tree = self._module(".".join(parts[:cut]))
            if tree is not None:
                return self._within(tree, ".".join(parts[:cut]), parts[cut:], depth)
        return None

    def _within(self, node: ast.AST, module: str, names: list[str], depth: int) -> ast.AST | None:
        """What `names`, one in the other, stand for in `node`, which is of `module`."""
        if not names or depth == 0:
            return node if not names else None
        first, *rest = names
        for child in _definitions(node):
            target = _named(child, first)
            if target is None:
                continue
            if isinstance(target, str):  # imported from elsewhere
                there = self._find(".".join((target, *rest)), depth - 1)
                if there is not None:
                    return there
                continue
            return self._within(target, module, rest, depth) if rest else target
        if isinstance(node, ast.ClassDef):
            for base in node.bases:
                if isinstance(base, ast.Name):
                    of_base = self._find(f"{module}.{base.id}", depth - 1)
                    there = self._within(of_base, module, names, depth - 1) if of_base else None
                    if there is not None:
                        return there
        return None


def _definitions(node: ast.AST) -> Iterator[ast.AST]:
    """All statements that may define a name in a module or class, also under conditions."""
    for child in ast.iter_child_nodes(node):
        yield child
        if isinstance(child, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from _definitions(child)
        elif isinstance(node, ast.ClassDef) and isinstance(
            child, ast.FunctionDef | ast.AsyncFunctionDef
        ):
            for inner in ast.walk(child):  # attributes that methods give to `self`
                if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
                    yield inner


def _named(node: ast.AST, name: str) -> ast.AST | str | None:
    """`node` if it defines `name`; the full name, if that is imported; else nothing."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return node if node.name == name else None
        case ast.AnnAssign(target=ast.Name(id=found)) | ast.Attribute(attr=found):
            return node if found == name else None
        case ast.Assign(targets=targets):
            named = {leaf.id for t in targets for leaf in ast.walk(t) if isinstance(leaf, ast.Name)}
            return node if name in named else None
        case ast.ImportFrom(module=str(module), names=aliases, level=0):
            for alias in aliases:
                if (alias.asname or alias.name) == name:
                    return f"{module}.{alias.name}"
        case ast.Import(names=aliases):
            return node if any((alias.asname or alias.name) == name for alias in aliases) else None
    return None
