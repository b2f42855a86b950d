"""A server over a scripted engine, as a process of its own, for tests that kill it.

python tests/fake_server.py PORT DIRECTORY DELAY [SETTINGS]     (the last as JSON)
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from synthia_vllm.engine.fake import FakeEngine
from synthia_vllm.serve.app import create_app
from synthia_vllm.serve.server import Server
from synthia_vllm.settings import Batches, Settings
from synthia_vllm.telemetry import logs
from synthia_vllm.telemetry.metrics import Metrics

if __name__ == "__main__":
    port, directory, delay, *more = sys.argv[1:]
    logs.configure("info", "json")
    changes: dict[str, Any] = json.loads(more[0]) if more else {}
    changes.setdefault("ledger", os.environ.get("SYNTHIA_LEDGER", "sqlite"))
    batches = Batches(directory=Path(directory))
    settings = Settings(model="demo", port=int(port), batches=batches, **changes)
    engine = FakeEngine(delay=float(delay))
    app = create_app(engine, settings, Metrics(CollectorRegistry()))
    Server(app, settings).run()
