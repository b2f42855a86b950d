"""Imported by the fork server before vLLM, which says things while it is imported.

vLLM sets up its log when an engine is configured, so these would be bare lines.
"""

from __future__ import annotations

import json
import logging
import os
from logging.config import dictConfig
from pathlib import Path

logging.getLogger("vllm").setLevel(os.environ.get("VLLM_LOGGING_LEVEL", "INFO"))
if "VLLM_LOGGING_CONFIG_PATH" in os.environ:
    dictConfig(json.loads(Path(os.environ["VLLM_LOGGING_CONFIG_PATH"]).read_text()))
