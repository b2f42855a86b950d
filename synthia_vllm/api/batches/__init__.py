"""``/v1/files`` and ``/v1/batches``: many requests in a file, answered when there is time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from synthia_vllm.api.batches.runner import BatchRunner
from synthia_vllm.api.batches.serving import add_batches, add_files, add_refusals
from synthia_vllm.api.batches.store import Store

if TYPE_CHECKING:
    from synthia_vllm.http.application import Application
    from synthia_vllm.http.state import ServerState


def attach(app: Application, state: ServerState) -> BatchRunner | None:
    """Add the routes; return what runs batches, if any are taken. Raises `StartupError`."""
    directory = state.settings.batches.directory
    if directory is None:
        add_refusals(app)
        return None
    # What is around a body is an id, which is bounded, and a URL.
    store = Store(directory, max_line_bytes=state.settings.limits.max_body_bytes + 4096)
    add_files(app, state, store)
    add_batches(app, state, store)
    return BatchRunner(state, store, {route.path: route for route in app.generation})
