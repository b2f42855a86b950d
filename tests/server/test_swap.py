"""A rolling update: one server takes over from another while clients go on asking."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING
from unittest.mock import patch

from swap import swap_servers

if TYPE_CHECKING:
    from pathlib import Path


def test_no_request_fails_in_a_swap(demo: Path) -> None:
    """Clients hear of the change 1.5 s late, and still get every answer, the right one."""
    with patch.dict(os.environ, XDG_CACHE_HOME=str(demo.parent.parent)):
        swap = asyncio.run(swap_servers(delay=6, lag=1.5, users=6))
    assert swap.failed == 0, swap.outcomes
    assert swap.outcomes["answered"] > 20
    assert swap.exit_code == 0
    assert swap.leaving_seconds > 6
