"""Tests that are coroutines."""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING, Any

import yaml

from synthia_vllm.admission.users import new_key

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run `test` in an event loop of its own."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(test(**fixtures))

    return run


async def until(holds: Any) -> None:
    """Let the event loop go round until `holds()`."""
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def users_file(path: Path, **users: dict[str, object]) -> Path:
    """A key file with `users`, whose keys nobody needs."""
    document = {name: {"keys": [new_key()[1]], **limits} for name, limits in users.items()}
    path.write_text(yaml.safe_dump({"users": document}))
    return path
