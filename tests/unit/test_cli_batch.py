"""`synthia-vllm batch` with a running server: a file in, a file out, broken off or not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from chat_api import BODY
from serving import Running, running, wait_until

from synthia_vllm.cli import batch as command
from synthia_vllm.cli.main import main
from synthia_vllm.engine.fake import FakeEngine
from synthia_vllm.settings import Batches

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    with running(FakeEngine(), batches=Batches(directory=tmp_path / "store")) as here:
        yield here


def ask(path: Path, *bodies: dict[str, Any]) -> None:
    lines = [
        {"custom_id": f"{n}", "method": "POST", "url": "/v1/chat/completions", "body": BODY | body}
        for n, body in enumerate(bodies)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(here: Running, place: Path, *more: str) -> int:
    output = place / "out.jsonl"
    return main(
        ["batch", str(place / "in.jsonl"), "-o", str(output), "--url", here.url + "/v1", *more]
    )


def ids(path: Path) -> list[str]:
    return sorted(json.loads(line)["custom_id"] for line in path.read_text().splitlines())


def test_answers_and_errors(
    server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each in its file; nothing stays on the server, nothing beside the output."""
    ask(tmp_path / "in.jsonl", {}, {"temperature": 9}, {})
    assert run(server, tmp_path, "--url", server.url) == 1
    assert ids(tmp_path / "out.jsonl") == ["0", "2"]
    assert ids(tmp_path / "out.errors.jsonl") == ["1"]
    assert "2 lines answered" in capsys.readouterr().err
    assert not list(server.client.files.list())
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["in.jsonl", "out.errors.jsonl", "out.jsonl", "store"]
    assert run(server, tmp_path) == 2
    assert "is there already" in capsys.readouterr().err


def test_it_goes_on_where_it_was(
    server: Running,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """After Ctrl-C the same command finds its batch, and another input is refused."""

    def broken_off(*_: object) -> None:
        raise KeyboardInterrupt

    ask(tmp_path / "in.jsonl", {}, {})
    with monkeypatch.context() as patch:
        patch.setattr(command, "_wait", broken_off)
        assert run(server, tmp_path) == 130
    assert "the same command" in capsys.readouterr().err
    [batch] = server.client.batches.list()
    ask(tmp_path / "in.jsonl", {})
    assert run(server, tmp_path) == 2
    assert "another input" in capsys.readouterr().err
    ask(tmp_path / "in.jsonl", {}, {})
    wait_until(lambda: server.client.batches.retrieve(batch.id).status == "completed")
    assert run(server, tmp_path) == 0
    assert ids(tmp_path / "out.jsonl") == ["0", "1"]
    assert len(list(server.client.batches.list())) == 1


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "first line is not a request"),
        (b"not json\n", "first line is not a request"),
        (b'{"url": "/v1/chat/completions"}\n', "line 1: "),
        (b'{"url": "/v1/embeddings"}\n', "/v1/chat/completions"),
    ],
)
def test_what_is_no_file_of_requests(
    server: Running,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    told: str,
) -> None:
    (tmp_path / "in.jsonl").write_bytes(content)
    assert run(server, tmp_path) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_without_a_file_or_a_server_that_takes_batches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(FakeEngine()) as here:
        assert run(here, tmp_path) == 2
        assert "in.jsonl" in capsys.readouterr().err
        ask(tmp_path / "in.jsonl", {})
        assert run(here, tmp_path) == 2
        assert "batches.directory" in capsys.readouterr().err
