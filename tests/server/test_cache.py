"""The prefix cache tells no user what another has sent."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml

from synthia_vllm.admission.permits import AdmissionController
from synthia_vllm.admission.users import new_cache_secret, new_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from serving import Running

_NUMBERS = count()


@contextmanager
def users(live: Running, file: Path, *, per_user: bool = True) -> Iterator[Callable[..., int]]:
    """Ask as a user, of three with a key; returns how many tokens the cache served."""
    headers, document = {}, {}
    for name, more in (("a", {"cache_group": "g"}), ("b", {}), ("c", {"cache_group": "g"})):
        key, key_hash = new_key()
        headers[name] = {"Authorization": f"Bearer {key}"}
        document[name] = {"keys": [key_hash], **more}
    file.write_text(yaml.safe_dump({"users": document}))
    service = live.app.server_state
    secret = new_cache_secret() if per_user else None
    before, service.admission = (
        service.admission,
        AdmissionController(file, max_requests=100, max_queue_seconds=60, cache_secret=secret),
    )
    service.admission.set_batch(128)

    def ask(user: str, path: str, body: dict[str, Any]) -> int:
        response = httpx.post(f"{live.url}{path}", json=body, headers=headers[user], timeout=60)
        assert response.status_code == 200, response.text
        return int(response.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    try:
        yield ask
    finally:
        service.admission = before


def asked(path: str) -> dict[str, Any]:
    """A request with a prompt that nobody has sent before, of some hundred tokens."""
    text = f"{next(_NUMBERS)} " + "Tell me of the orca and the seal. " * 20
    body: dict[str, Any] = {"model": "synthia-demo", "max_tokens": 1}
    if path == "/v1/completions":
        return body | {"prompt": text}
    return body | {"messages": [{"role": "user", "content": text}]}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_one_user_does_not_find_anothers_prompt(live: Running, tmp_path: Path, path: str) -> None:
    """B's `cached_tokens` is 0 for A's prompt, and not for its own; a group shares on purpose."""
    with users(live, tmp_path / "keys.yaml") as ask:
        body = asked(path)
        assert ask("a", path, body) == 0
        assert ask("a", path, body) > 64
        assert ask("b", path, body) == 0
        assert ask("b", path, body) > 64
        assert ask("c", path, body) > 64


def test_a_clients_salt_narrows_its_own(live: Running, tmp_path: Path) -> None:
    """`cache_salt` parts a user's prompts from its others, and opens nobody else's."""
    path = "/v1/chat/completions"
    with users(live, tmp_path / "keys.yaml") as ask:
        body = asked(path)
        ask("a", path, body)
        assert ask("a", path, body | {"cache_salt": "x"}) == 0
        assert ask("a", path, body | {"cache_salt": "x"}) > 64
        salt = live.app.server_state.admission.cache_salt("a", None)
        for guess in ("x", "a", "group\0g", salt):
            assert ask("b", path, body | {"cache_salt": guess}) == 0


def test_shared_is_shared(live: Running, tmp_path: Path) -> None:
    """`prefix_cache: shared`: everybody finds what anybody has sent."""
    path = "/v1/chat/completions"
    with users(live, tmp_path / "keys.yaml", per_user=False) as ask:
        body = asked(path)
        assert ask("a", path, body) == 0
        assert ask("b", path, body) > 64
