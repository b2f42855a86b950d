"""What is used of others' insides is there, and is missed where it is not."""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tools import check_vllm
from tools.reaches import PACKAGES, Source, marked

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("package", PACKAGES.values())
def test_marked_reaches_are_there(package: str) -> None:
    """Each thing that a mark names is in the installed package, which moves it only with a test."""
    reaches = [reach for reach in marked() if reach.name.startswith(f"{package}.")]
    source = Source.installed(package)
    assert reaches
    assert [reach for reach in reaches if not source.has(reach.name)] == []


def test_a_mark_names_something(tmp_path: Path) -> None:
    """A mark without a full name is an error that says where."""
    (tmp_path / "module.py").write_text("# vLLM internal: the usual\nx = 1\n")
    with pytest.raises(ValueError, match=r"module\.py:1"):
        list(marked(tmp_path))


def test_lookups(tmp_path: Path) -> None:
    """Names are found through imports, base classes, conditions and what methods set."""
    package = tmp_path / "p"
    package.mkdir()
    (package / "__init__.py").write_text("from p.a import B as C\n")
    (package / "a.py").write_text(
        "import sys\nif sys:\n    class A:\n        def f(self, x): self.y = x\n"
        "class B(A):\n    z: int = 1\n"
    )
    source = Source(tmp_path)
    for name in ("p.C", "p.C.z", "p.C.f", "p.C.y", "p.a.A.y", "p.a.sys"):
        assert source.has(name), name
    for name in ("p.B", "p.C.q", "p.b", "p.a.A.z"):
        assert not source.has(name), name
    assert source.parameters("p.C.f") == ["self", "x"]
    assert source.parameters("p.C.z") is None


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a wheel of the installed vLLM, with what is given replaced in its modules."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent

    def make(requires: str = "", **changes: tuple[str, str]) -> Path:
        file = tmp_path_factory.mktemp("wheel") / "vllm-9.0-py3-none-any.whl"
        with zipfile.ZipFile(file, "w") as made:
            for path in sorted(folder.rglob("*.py")):
                text = path.read_text(encoding="utf-8")
                for old, new in changes.values():
                    text = text.replace(old, new)
                made.writestr(str(path.relative_to(folder.parent)), text)
            made.writestr("vllm-9.0.dist-info/METADATA", f"Name: vllm\n{requires}")
        return file

    return make


def test_the_same_vllm_misses_nothing(wheel: Callable[..., Path]) -> None:
    """Of the installed vLLM nothing is missing and nothing has changed."""
    assert check_vllm.compare(wheel(), Source.installed("vllm")) == []


def test_what_is_missed(wheel: Callable[..., Path]) -> None:
    """Reaches, imports, options, keywords, parameters, metrics and versions are told apart."""
    other = wheel(
        "Requires-Dist: torch==9.9\n",
        reach=("def _send_input(", "def _send("),
        imported=("class FlexibleArgumentParser", "class RigidArgumentParser"),
        option=("enforce_eager: bool", "eager: bool"),
        keyword=("repetition_detection:", "repetitions:"),
        parameter=("def do_tracing(\n        self,\n", "def do_tracing(\n        self, extra,\n"),
        metric=("vllm:num_requests_running", "vllm:running"),
    )
    told = check_vllm.compare(other, Source.installed("vllm"))
    for start in (
        "missing  vllm.v1.engine.core_client.AsyncMPClient._send_input  (synthia_vllm/engine/vllm/",
        "missing  vllm.utils.argparse_utils.FlexibleArgumentParser  (",
        "missing  vllm.engine.arg_utils.AsyncEngineArgs.enforce_eager  (",
        "missing  vllm.SamplingParams.repetition_detection  (",
        "missing  metric vllm:num_requests_running  (",
        "changed  vllm.v1.engine.output_processor.OutputProcessor.do_tracing(self, extra,",
        "requires torch ==9.9  (now ==",
    ):
        assert [line for line in told if line.startswith(start)], (start, told)
