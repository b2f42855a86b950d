"""The fake engine keeps the seam's promises, so what is tested over it holds over the real one."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from contract import CHECKS

from synthia_vllm.engine.fake import FakeEngine

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Callable[[FakeEngine], Any]) -> None:
    """The same checks as for the real engine, see tests/server/test_engine.py."""
    pieces = (" Orcas", " are", " large", ".", "\nUS", "ER", ": And", " then?")
    # Slow enough that a busy machine leaves a request while it runs.
    asyncio.run(check(FakeEngine(pieces, delay=0.1)))
