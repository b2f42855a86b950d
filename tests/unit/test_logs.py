"""Log lines: one event, one line, the same facts in both forms."""

from __future__ import annotations

import json
import logging
import sys

from synthia_vllm.telemetry.logs import HumanFormatter, JsonFormatter


def record(**fields: object) -> logging.LogRecord:
    made = logging.LogRecord("synthia_vllm.x", logging.INFO, "x.py", 1, "chat", (), None)
    made.fields = fields
    return made


def test_json_lines() -> None:
    """A line is one JSON object with the fields as they are, and the traceback if there is one."""
    made = record(user="alice", status=200, first_token_ms=None, prompt="a\n\u2028b")
    line = JsonFormatter().format(made)
    assert "\n" not in line
    found = json.loads(line)
    assert found["message"] == "chat"
    assert (found["user"], found["status"], found["first_token_ms"]) == ("alice", 200, None)
    assert found["prompt"] == "a\n\u2028b"
    try:
        raise ValueError("x")
    except ValueError:
        made.exc_info = sys.exc_info()
    assert "ValueError: x" in json.loads(JsonFormatter().format(made))["exception"]


def test_nobody_writes_a_line_of_the_log() -> None:
    """Whatever is in a field, the human line stays one line, and its fields stay apart."""
    line = HumanFormatter().format(record(id="a status=200\n2026 forged", user="", n=1))
    assert "\n" not in line
    assert line.endswith('chat id="a status=200\\n2026 forged" user=- n=1')


def test_lines_without_fields() -> None:
    """Other libraries' records come through as they are."""
    made = logging.LogRecord("other", logging.ERROR, "x.py", 1, "broke: %s", ("y",), None)
    assert HumanFormatter().format(made).endswith("ERROR other: broke: y")
    assert json.loads(JsonFormatter().format(made))["message"] == "broke: y"
