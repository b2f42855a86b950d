"""The server's log: a line an event, for people or as JSON for machines.

What is to be counted or searched is given as `fields` (``extra={"fields": {...}}``), not woven
into the text, so both forms say the same.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any, Literal


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


def configure(level: str, form: Literal["human", "json"]) -> None:
    """Send the log of this process to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else HumanFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
