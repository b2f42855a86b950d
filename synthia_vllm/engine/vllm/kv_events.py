"""Loaded by vLLM into its engine core: what it tells of its prefix cache is told without salts.

With `kv_events_config` vLLM publishes which blocks it holds, by their tokens, and a picker in front
of several servers sends a prompt where its beginning is. A user's salt (docs/users.md) is in the
first block of each prompt; a picker cannot know it, and would find no prompt again. The cache
itself stays salted: what is picked wrongly, for another user's prompt was the same, is computed.

vLLM internal: `vllm.distributed.kv_events.EventPublisherFactory._registry`,
`vllm.distributed.kv_events.ZmqEventPublisher.publish`,
`vllm.distributed.kv_events.BlockStored.extra_keys`.
"""

from __future__ import annotations

import os
from typing import Any

from synthia_vllm.engine.vllm import watchdog


def unsalt() -> None:
    """Leave salts out of events; does nothing in any other use of vLLM."""
    if watchdog.SERVER not in os.environ:
        return
    from vllm.distributed.kv_events import BlockStored, EventPublisherFactory, ZmqEventPublisher

    class UnsaltedPublisher(ZmqEventPublisher):  # type: ignore[misc]
        def publish(self, events: Any) -> None:
            for event in events.events:
                if isinstance(event, BlockStored):
                    event.extra_keys = None  # else of adapters and images only: there are none
            super().publish(events)

    EventPublisherFactory._registry["zmq"] = UnsaltedPublisher
