"""`synthia-vllm keys`: the key file through the command."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

import pytest

from synthia_vllm.admission.permits import AdmissionController
from synthia_vllm.cli.main import main

if TYPE_CHECKING:
    from pathlib import Path


def keys(*arguments: object) -> int:
    return main(["keys", *map(str, arguments)])


def identify(file: Path, key: str) -> str:
    admission = AdmissionController(file, max_requests=1, max_queue_seconds=1)
    return admission.identify(f"Bearer {key}".encode())


def test_new_key_works_and_is_shown_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The printed key identifies its user; the file, which only its owner reads, has no key."""
    file = tmp_path / "keys.yaml"
    assert keys("new", "alice", "--file", file, "--weight", 3, "--max-tokens", 100) == 0
    first = capsys.readouterr().out.strip()
    assert keys("new", "alice", "--file", file) == 0
    second = capsys.readouterr().out.strip()
    assert first != second
    assert {identify(file, key) for key in (first, second)} == {"alice"}
    assert first not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert keys("list", "--file", file) == 0
    assert capsys.readouterr().out == "alice: 2 key(s), weight=3, max_tokens=100\n"


def test_comments_survive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a person wrote into the file stays, also the limits of others."""
    file = tmp_path / "keys.yaml"
    file.write_text("# our users\nusers:\n  bob:  # the batch jobs\n    weight: 0.5\n")
    assert keys("new", "alice", "--file", file, "--models", "a", "b") == 0
    assert keys("new", "bob", "--file", file) == 0
    content = file.read_text()
    assert content.startswith("# our users\nusers:\n  bob:  # the batch jobs\n    weight: 0.5\n")
    assert keys("remove", "alice", "--file", file) == 0
    assert "alice" not in file.read_text()
    capsys.readouterr()
    keys("list", "--file", file)
    assert capsys.readouterr().out == "bob: 1 key(s), weight=0.5\n"


def test_what_changes_is_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By the command, and by the server that takes it over: who, and what, and no key or hash."""
    caplog.set_level("INFO")
    file = tmp_path / "keys.yaml"

    def audited(logger: str) -> list[dict[str, object]]:
        found = [
            vars(record)["fields"]
            for record in caplog.records
            if record.name == logger and record.getMessage() == "audit: users"
        ]
        caplog.clear()
        return found

    steps: tuple[tuple[list[object], dict[str, object]], ...] = (
        (["new", "alice", "--file", file, "--weight", 3],
         {"change": "added", "keys_added": 1, "keys_removed": 0, "weight": "1 -> 3"}),
        (["new", "alice", "--file", file, "--models", "b", "a"],
         {"change": "changed", "keys_added": 1, "keys_removed": 0, "models": "None -> a,b"}),
        (["remove", "alice", "--file", file],
         {"change": "removed", "keys_added": 0, "keys_removed": 2}),
    )  # fmt: skip
    file.write_text("users: {bob: {}}\n")
    admission = AdmissionController(file, max_requests=1, max_queue_seconds=1)
    for arguments, told in steps:
        assert keys(*arguments) == 0
        assert audited("synthia_vllm.cli.keys") == [{"user": "alice", **told}]
        admission.reload_wanted = True
        assert admission.reload_changed() == "read"
        assert "sha256" not in caplog.text
        assert audited("synthia_vllm.admission.users") == [{"user": "alice", **told}]
    admission.reload_wanted = True
    admission.reload_changed()
    assert audited("synthia_vllm.admission.users") == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["new", "../alice"], "users"),
        (["new", "alice", "--weight", "0"], "weight"),
        (["remove", "nobody"], "no user nobody"),
        (["list", "--file", "/no/such/keys.yaml"], "keys new NAME"),
        (["new", "alice", "--file", "/no/such/keys.yaml"], "Cannot write"),
    ],
)
def test_wrong_commands_change_nothing(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bad name or limit is an error in plain words, and the file stays as it was."""
    file = tmp_path / "keys.yaml"
    file.write_text("users: {}\n")
    assert main(["keys", arguments[0], "--file", str(file), *arguments[1:]]) == 2
    assert said in capsys.readouterr().err
    assert file.read_text() == "users: {}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["keys.yaml"]
