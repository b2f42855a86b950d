"""The questions that a model was made to answer, where it is one that knows no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

EXAMPLES: Final = "examples.json"
"""In the model's directory: a JSON list of questions."""
_MAX_BYTES: Final = 1 << 16


def examples(model: str) -> tuple[str, ...]:
    """The questions listed in the directory `model`; none if there is no list, or a broken one.

    It is for people to look at, so nothing that may be in it keeps a model from being served.
    """
    try:
        with (Path(model).expanduser() / EXAMPLES).open("rb") as file:
            found = json.loads(file.read(_MAX_BYTES))
        if not isinstance(found, list):
            return ()
        "".join(found).encode()  # text, all of it, and such as can be sent
    except (OSError, RuntimeError, TypeError, ValueError):
        return ()
    return tuple(found)
