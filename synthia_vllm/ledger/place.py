"""Where the ledger is: what the setting says, as a database's address."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sqlalchemy import URL

DEFAULT: Final = "sqlite"
NONE: Final = "none"
_FORMS: Final = (
    "'sqlite' (a file in the state directory), 'none', sqlite:////absolute/path.sqlite, or "
    "postgresql://USER:PASSWORD@HOST/DATABASE"
)


def state_directory() -> Path | None:
    """Where this machine keeps what a program has to remember; `None` if there is no such place."""
    base = os.environ.get("XDG_STATE_HOME", "")
    # The XDG specification wants a relative path to be ignored.
    home = base if base.startswith("/") else os.path.expanduser("~/.local/state")
    return Path(home) / "synthia-vllm" if home.startswith("/") else None


def default_file() -> Path | None:
    """The SQLite file that ``sqlite`` stands for; `None` without a home directory."""
    directory = state_directory()
    return None if directory is None else directory / "usage.sqlite"


def parse(setting: str) -> URL:
    """The address in a setting that is one. Raises `ValueError` with what it should be."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(setting)
    except (ArgumentError, ValueError):  # whose messages have the password
        raise ValueError(f"should be {_FORMS}") from None
    if any("password" in name.lower() for name in url.query):
        raise ValueError("should have the password before the @, where it is not printed")
    kind = url.drivername.partition("+")[0]
    if kind in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    if kind == "sqlite" and url.database not in (None, "", ":memory:"):
        return url.set(drivername="sqlite")
    raise ValueError(f"should be {_FORMS}")


def shown(setting: str) -> str:
    """The setting without a password."""
    if setting in (DEFAULT, NONE):
        return setting
    return parse(setting).render_as_string(hide_password=True)


def without_addresses(text: str) -> str:
    """A text of an error about settings, without what may be a password in it."""
    return re.sub(r"://.*", "://...", text)
