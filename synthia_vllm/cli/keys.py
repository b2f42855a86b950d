"""``synthia-vllm keys``: makes, lists and removes users and keys in the key file.

The file stays a person's own: comments and order survive, and a new version takes the old one's
place at once, so a server that watches it never reads half a file.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from synthia_vllm.admission.users import KeyRing, User, changes, new_key
from synthia_vllm.errors import StartupError
from synthia_vllm.telemetry import logs

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger(__name__)

_EXAMPLES: Final = """\
examples:
  synthia-vllm keys new alice --file keys.yaml
  synthia-vllm keys new ci --weight 0.5 --requests-per-minute 60 --tokens-per-minute 100000
  synthia-vllm keys list
  synthia-vllm keys remove alice
  synthia-vllm serve --set keys_file=keys.yaml

The key is printed once, alone, on standard output; the file has only its hash. A running server
takes the change over within a second. A second `new` for the same user adds a key, so that keys
can be changed without a gap: add one, move the clients, then delete the old hash from the file.
"""

_LIMITS: Final = {name: field for name, field in User.model_fields.items() if field.description}
"""What can be given to a user by a flag."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    new = commands.add_parser("new", help="make a key, and the user if there is none yet")
    remove = commands.add_parser("remove", help="remove a user and all its keys")
    listing = commands.add_parser("list", help="list the users, without their keys")
    for command in (new, remove, listing):
        command.add_argument(
            "--file",
            type=Path,
            default=Path(os.environ.get("SYNTHIA_KEYS_FILE", "keys.yaml")),
            help="the key file (default: SYNTHIA_KEYS_FILE, or keys.yaml here)",
        )
    for command in (new, remove):
        command.add_argument("name", metavar="NAME", help="the user")
    for name, field in _LIMITS.items():
        new.add_argument(
            f"--{name.replace('_', '-')}",
            type=float if field.annotation is float else int,
            metavar="N",
            help=field.description,
        )
    new.add_argument(
        "--cache-group", metavar="GROUP", help="share the prefix cache with the users of this group"
    )
    new.add_argument("--models", nargs="+", metavar="MODEL", help="model names it may use")


def run(args: argparse.Namespace) -> int:
    """Do it; return the exit code. Raises `StartupError` with what is wrong."""
    if args.action == "list":
        return _list(args.file)
    document = _read(args.file)
    if not isinstance(document.setdefault("users", {}), dict):
        raise StartupError(f"The key file {args.file}: `users` must be a mapping of users.")
    users = document["users"]
    before = _users(args.file)
    if args.action == "remove":
        if users.pop(args.name, None) is None:
            raise StartupError(f"There is no user {args.name} in {args.file}.")
        _write(args.file, document)
        print(f"{args.name} is removed from {args.file}.", file=sys.stderr)
        _audit(before, _users(args.file))
        return 0
    key, key_hash = new_key()
    user = users.setdefault(args.name, {})
    user.setdefault("keys", []).append(key_hash)
    for limit in (*_LIMITS, "models", "cache_group"):
        value = getattr(args, limit)
        if value is not None:
            user[limit] = value
    _write(args.file, document)
    _audit(before, _users(args.file))
    print(f"A key of {args.name}; {args.file} has its hash. It is shown only now:", file=sys.stderr)
    print(key)
    return 0


def _users(file: Path) -> Mapping[str, User]:
    return KeyRing(file.read_text(encoding="utf-8"), str(file)).users if file.exists() else {}


def _audit(before: Mapping[str, User], after: Mapping[str, User]) -> None:
    """Say what has changed as a server's log does."""
    logs.configure("info", "human")
    for change in changes(before, after):
        logger.info("audit: users", extra={"fields": change})


def _list(file: Path) -> int:
    if not file.exists():
        raise StartupError(f"There is no key file {file}; `keys new NAME` makes one.")
    for name, user in KeyRing(file.read_text(encoding="utf-8"), str(file)).users.items():
        limits = [
            f"{limit}={_plain(getattr(user, limit))}"
            for limit in User.model_fields
            if limit != "keys" and getattr(user, limit) is not None
        ]
        print(f"{name}: {len(user.keys)} key(s), {', '.join(limits)}")
    return 0


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    return ",".join(sorted(value)) if isinstance(value, frozenset) else f"{value:g}"


def _yaml() -> Any:
    from ruamel.yaml import YAML

    return YAML()


def _read(file: Path) -> Any:
    """The file with its comments; an empty document if there is none."""
    if not file.exists():
        return {}
    content = file.read_text(encoding="utf-8")
    KeyRing(content, str(file))  # a file with a fault is not written over
    return _yaml().load(content) or {}


def _write(file: Path, document: Any) -> None:
    """Put `document` in the place of `file`, if it is a key file; readable by its owner only."""
    directory = file.resolve().parent
    try:
        handle, temporary = tempfile.mkstemp(dir=directory, prefix=f".{file.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                _yaml().dump(document, stream)
                stream.flush()
                os.fsync(stream.fileno())
            KeyRing(Path(temporary).read_text(encoding="utf-8"), str(file))
            os.replace(temporary, file.resolve())
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        raise StartupError(f"Cannot write the key file {file}: {error.strerror}.") from error
