"""A server over a scripted engine, on a real socket, for the tests of a module."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from chat_api import PIECES
from serving import Running, running

from synthia_vllm.engine.fake import FakeEngine

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(FakeEngine(PIECES)) as here:
        yield here
