"""What a server tells an endpoint picker of its prefix cache (docs/fleet.md)."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

import httpx
import msgspec
import zmq
from processes import COMMAND, command
from serving import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TOPIC = "kv@synthia-vllm@synthia-demo"
TEXT = "Tell me of the orca and the seal. " * 20


def test_a_picker_finds_each_prompt_and_no_salt(demo: Path, tmp_path: Path) -> None:
    """Blocks are told by the tokens that `render` gives, to whoever comes late, too.

    Users with caches of their own have the same tokens in blocks of their own, and what parts them
    is not told: by it a picker would take each prompt for one that nobody has sent.
    """
    file = tmp_path / "keys.yaml"
    headers = {}
    for name in ("alice", "bob"):
        made = subprocess.run(
            [COMMAND, "keys", "new", name, "--file", str(file)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        headers[name] = {"Authorization": f"Bearer {made.stdout.strip()}"}
    published, replayed = free_port(), free_port()
    events = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{published}",
        "replay_endpoint": f"tcp://*:{replayed}",
        "topic": TOPIC,
    }
    flags = ["--set", f"keys_file={file}", "--engine", f"kv_events_config={json.dumps(events)}"]
    body = {
        "model": "synthia-demo", "messages": [{"role": "user", "content": TEXT}], "max_tokens": 1,
    }  # fmt: skip
    with (
        command(demo, tmp_path / "log", *flags) as (process, url),
        zmq.Context() as context,
        context.socket(zmq.SUB) as subscriber,
        context.socket(zmq.DEALER) as late,
    ):
        for socket in (subscriber, late):
            socket.setsockopt(zmq.RCVTIMEO, 30_000)
            socket.setsockopt(zmq.LINGER, 0)
        subscriber.subscribe("kv@")
        subscriber.connect(f"tcp://127.0.0.1:{published}")
        path = f"{url}/v1/chat/completions"
        asked: dict[str, Any] = {"json": body, "timeout": 60}
        prompt = httpx.post(f"{path}/render", headers=headers["bob"], **asked).json()["token_ids"]
        told = []
        for name in ("alice", "bob"):
            usage = httpx.post(path, headers=headers[name], **asked).json()["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == 0
            topic, _, payload = subscriber.recv_multipart()
            assert topic.decode() == TOPIC
            told += list(stored(payload))
        late.connect(f"tcp://127.0.0.1:{replayed}")
        late.send_multipart([b"", (0).to_bytes(8, "big")])
        again = [late.recv_multipart()[-1] for _ in range(2)]
        assert [block for payload in again for block in stored(payload)] == told
        process.terminate()
        assert process.wait(60) == 0
    tokens = [[token for block in part for token in block["token_ids"]] for part in halves(told)]
    assert tokens[0] == tokens[1] == prompt[: len(tokens[0])]
    assert 0 <= len(prompt) - len(tokens[0]) < told[0]["block_size"]
    hashes = [hash_ for block in told for hash_ in block["block_hashes"]]
    assert len(set(hashes)) == len(hashes)
    assert not any(block.get("extra_keys") for block in told)


def halves(blocks: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Those of the first user and those of the second, who sent the same."""
    middle = len(blocks) // 2
    return blocks[:middle], blocks[middle:]


def stored(payload: bytes) -> Iterator[dict[str, Any]]:
    """The blocks that a message tells of, by vLLM's encoding: time, events, rank."""
    _, events, *_ = msgspec.msgpack.decode(payload)
    yield from (event for event in events if event["type"] == "BlockStored")
