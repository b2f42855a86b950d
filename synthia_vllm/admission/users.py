"""Who may ask: the users of the key file, their keys, and what separates their prompts.

The file holds only hashes of keys, and is read again when it changes.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from synthia_vllm.admission.limits import UserLimits
from synthia_vllm.errors import StartupError, Unauthorized

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

logger = logging.getLogger(__name__)

_KEY_PREFIX: Final = "sk-synthia-"
_HASH_PREFIX: Final = "sha256:"

UserName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class User(UserLimits):
    """One user, as the key file describes it."""

    keys: list[Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]] = Field([])
    cache_group: UserName | None = None
    """Users of one group find each other's prompts in the prefix cache."""


class _KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    users: dict[UserName, User] = {}


ANONYMOUS: Final = "anonymous"


def new_key() -> tuple[str, str]:
    """A new API key and its hash for the key file.

    The key has 256 random bits, so one round of SHA-256 is enough: there is nothing to guess.
    """
    key = _KEY_PREFIX + secrets.token_urlsafe(32)
    return key, hash_key(key.encode())


def new_cache_secret() -> bytes:
    """For `Users`; for as long as the engine runs, whose prefix cache it salts."""
    return secrets.token_bytes(32)


def hash_key(key: bytes) -> str:
    """What the key file holds of `key`."""
    return _HASH_PREFIX + hashlib.sha256(key).hexdigest()


class KeyRing:
    """The users of one version of the key file. Raises `StartupError` if it is not one."""

    def __init__(self, content: str, source: str) -> None:
        try:
            document = yaml.safe_load(content)
            if document is None:  # half of a rewrite, more likely than a wish to lock all out
                raise StartupError(f"The key file {source} is empty; `users: {{}}` means no users.")
            self.users: Mapping[str, User] = _KeyFile.model_validate(document).users
        except yaml.YAMLError as error:
            # Without the text around the fault: it may be a key.
            mark = getattr(error, "problem_mark", None)
            line = f" at line {mark.line + 1}" if mark else ""
            raise StartupError(f"The key file {source} is not valid YAML{line}.") from None
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(str(part) for part in problem["loc"])
            raise StartupError(f"The key file {source}: {place}: {problem['msg']}.") from None
        # Looked up by a hash that nobody outside can compute, so the time a look-up takes tells
        # nothing of the keys; then compared in constant time.
        self._secret = secrets.token_bytes(32)
        self._by_blinded_hash: dict[bytes, tuple[str, str]] = {}
        for name, user in self.users.items():
            for key_hash in user.keys:
                known = self._by_blinded_hash.setdefault(self._blind(key_hash), (key_hash, name))
                if known[1] != name:
                    raise StartupError(
                        f"The key file {source}: {name} and {known[1]} have the same key."
                    )

    def _blind(self, key_hash: str) -> bytes:
        return hmac.digest(self._secret, key_hash.encode(), "sha256")

    def owner_of(self, key: bytes) -> str | None:
        """The name of the user who has `key`."""
        key_hash = hash_key(key)
        known, name = self._by_blinded_hash.get(self._blind(key_hash), ("", None))
        return name if hmac.compare_digest(known, key_hash) else None


def changes(before: Mapping[str, User], after: Mapping[str, User]) -> list[dict[str, Any]]:
    """What is another for each user, as fields for the log: no key and no hash."""
    found = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        old_keys, new_keys = (set(user.keys) if user else set() for user in (old, new))
        was, becomes = old or User(), new or User()
        limits = {
            field: f"{_told(getattr(was, field))} -> {_told(getattr(becomes, field))}"
            for field in User.model_fields
            if field != "keys" and getattr(was, field) != getattr(becomes, field)
        }
        change = "removed" if new is None else "added" if old is None else "changed"
        fields: dict[str, Any] = {
            "user": name,
            "change": change,
            "keys_added": len(new_keys - old_keys),
            "keys_removed": len(old_keys - new_keys),
        }
        found.append(fields | (limits if new else {}))
    return found


def _told(value: Any) -> str:
    if isinstance(value, frozenset):
        return ",".join(sorted(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


class Users:
    """Who there is, by the key file `file`; with `None` for it, all are one user.

    With a `cache_secret` each has a prefix cache of its own, by a salt that nobody without the
    secret can make. Raises `StartupError` if the file cannot be read.
    """

    def __init__(self, file: Path | None, cache_secret: bytes | None = None) -> None:
        self._file = file
        self._cache_secret = cache_secret
        self._ring: KeyRing | None = None
        self._version: Any = None
        self._seen: Any = None
        self.reload_wanted = False
        """Set by a signal: the key file is read again, changed or not."""
        if file is not None:
            self.reload()

    @property
    def open(self) -> bool:
        """Whether no key is needed."""
        return self._file is None

    @property
    def names(self) -> tuple[str, ...]:
        """The users there are."""
        return tuple(self._ring.users) if self._ring else (ANONYMOUS,)

    def reload(self, *, only_if_changed: bool = False) -> bool:
        """Read the key file; return whether it was read.

        Raises `StartupError` and keeps the users there were. What changes of the file is seen
        also where it is a link that is swapped, as a mounted secret is. With `only_if_changed` a
        change is taken over at the second look that finds it: one may be in the middle of it.
        """
        if self._file is None:
            return False
        version, seen = _version_of(self._file), self._seen
        self._seen = version
        if only_if_changed and (version == self._version or version != seen):
            return False
        self._version = version
        try:
            content = self._file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise StartupError(f"Cannot read the key file {self._file}: {reason}.") from None
        self._ring = KeyRing(content, str(self._file))
        return True

    def reload_changed(self) -> Literal["unchanged", "read", "failed"]:
        """Read the key file again if it has changed, or if it is wanted, and log that.

        One that cannot be used leaves the users as they are.
        """
        wanted, self.reload_wanted = self.reload_wanted, False
        before = self._ring
        try:
            if not self.reload(only_if_changed=not wanted):
                return "unchanged"
        except StartupError as error:
            logger.error("%s The users stay as they were.", error)
            return "failed"
        logger.info("The key file was read: %d users.", len(self.names))
        if before is not None and self._ring is not None:
            for change in changes(before.users, self._ring.users):
                logger.info("audit: users", extra={"fields": change})
        return "read"

    def identify(self, authorization: bytes | None, api_key: bytes | None = None) -> str:
        """The user whose key is in the header ``Authorization``, or else in ``X-Api-Key``.

        Raises `Unauthorized`.
        """
        if self._ring is None:
            return ANONYMOUS
        if authorization is None:
            name = None if api_key is None else self._ring.owner_of(api_key.strip())
        else:
            scheme, _, key = authorization.partition(b" ")
            name = self._ring.owner_of(key.strip()) if scheme.lower() == b"bearer" else None
        if name is None:
            raise Unauthorized
        return name

    def user(self, name: str) -> User:
        """The user of this name. Raises `Unauthorized` if there is none, any more."""
        user = self._ring.users.get(name) if self._ring else User()
        if user is None:
            raise Unauthorized
        return user

    def may_use(self, name: str, model: str) -> bool:
        """Whether user `name`, who may be nobody in particular, may use the served name `model`."""
        user = self._ring.users.get(name) if self._ring else None
        return user is None or user.may_use(model)

    def cache_salt(self, name: str, own: str | None) -> str | None:
        """What separates the prompts of user `name` from others' in the prefix cache, if anything.

        `own` is the request's own word: it can make the user's cache narrower, and never another's.
        """
        if self._cache_secret is None:
            # Whom it is told to finds the same: it is a word shared on purpose.
            return None if own is None else hashlib.sha256(own.encode()).hexdigest()
        group = self.user(name).cache_group
        parts = ("user", name) if group is None else ("group", group)
        message = "\0".join((*parts, *(() if own is None else (own,))))
        return hmac.digest(self._cache_secret, message.encode(), "sha256").hex()


def _version_of(file: Path) -> Any:
    """What changes when the file does; `None` if it is not there."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
