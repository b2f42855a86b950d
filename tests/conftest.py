"""One real engine with the demo model for all tests that want it."""

from __future__ import annotations

import os
from multiprocessing import forkserver
from typing import TYPE_CHECKING, Any

import pytest

pytest.register_assert_rewrite("processes", "serving")  # so that they show the values, too

from prometheus_client import REGISTRY
from serving import Running, running

from synthia_vllm.demo.checkpoint import ensure_demo
from synthia_vllm.engine.vllm.client import VllmEngine
from synthia_vllm.settings import Batches

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # Beside another run of tests an engine of several threads waits for its own: they spin, each
    # for the other's core. One is as fast for so small a model.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


@pytest.fixture(scope="session", autouse=True)
def state_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where servers keep their ledger meanwhile: not where this machine's own does."""
    place = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(place))
        yield place


@pytest.fixture(scope="session")
def demo(pytestconfig: pytest.Config) -> Path:
    """The demo model's directory; made at the first use, in about three minutes."""
    reporter: Any = pytestconfig.pluginmanager.get_plugin("terminalreporter")
    return ensure_demo(lambda line: reporter.write_line(line) if reporter else None)


@pytest.fixture(scope="session")
def live(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The server as `synthia-vllm serve --model demo` runs it, inside this process."""
    # One that tests have started before has not the environment that the engine's own is to have.
    forkserver._forkserver._stop()  # type: ignore[attr-defined]  # made for tests
    engine = VllmEngine(str(demo), {}, name="synthia-demo", stream_pace=0.02)
    batches = Batches(directory=tmp_path_factory.mktemp("batches"))
    with running(engine, registry=REGISTRY, batches=batches) as here:
        yield here
