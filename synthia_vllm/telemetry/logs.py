"""The server's log: a line an event, for people or as JSON for machines.

What is to be counted or searched is given as `fields` (``extra={"fields": {...}}``), not woven
into the text, so both forms say the same.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from datetime import UTC, datetime
from typing import Any, Literal

logger = logging.getLogger(__name__)


class HumanFormatter(logging.Formatter):
    """``2026-01-31 12:00:00,123 INFO synthia_vllm.http.handler: chat id=... status=200``."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s%(fields_text)s")

    def format(self, record: logging.LogRecord) -> str:
        record.fields_text = "".join(f" {name}={_shown(v)}" for name, v in _fields(record).items())
        return super().format(record)


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        } | _fields(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields


def _shown(value: Any) -> str:
    """`value` on one line, whatever is in it: no client can write a line of the log."""
    text = "-" if value in (None, "") else str(value)
    return text if text.isprintable() and " " not in text else json.dumps(text)


def json_handler() -> logging.Handler:
    """Writes lines of JSON to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    return handler


def configure(level: str, form: Literal["human", "json"]) -> None:
    """Send the log of this process to standard error."""
    handler: logging.Handler = logging.StreamHandler()
    handler.setFormatter(HumanFormatter())
    if form == "json":
        handler = json_handler()
        logging.captureWarnings(True)
    root = logging.getLogger()
    for old in root.handlers[:]:  # a forked process has the log of the one that it is forked from
        if isinstance(old.formatter, HumanFormatter | JsonFormatter):
            root.removeHandler(old)
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


class Progress:
    """Tells each step of a start, with the seconds since it began."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __call__(self, step: str) -> None:
        took = time.monotonic() - self._start
        if is_json():
            logger.info(step, extra={"fields": {"seconds": round(took, 1)}})
        else:
            print(f"[{took:5.1f} s] {step}", file=sys.stderr, flush=True)


def tell_end(why: object) -> None:
    """Say why the process cannot go on, to who started it."""
    if is_json():
        logger.critical(str(why))
    else:
        print(f"synthia-vllm: {why}", file=sys.stderr)


def is_json() -> bool:
    """Whether this process logs JSON."""
    handlers = logging.getLogger().handlers
    return any(isinstance(handler.formatter, JsonFormatter) for handler in handlers)
