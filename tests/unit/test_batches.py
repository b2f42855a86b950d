"""Files and batches: what is answered, once each, for whom, when, and on which places."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx
import openai
import pytest
from chat_api import BODY, key_file
from openai import OpenAI
from serving import Running, free_port, running, wait_until

from synthia_vllm.api.batches.protocol import Batch
from synthia_vllm.api.batches.store import Job, Store
from synthia_vllm.engine.base import ModelInfo
from synthia_vllm.engine.fake import FakeEngine
from synthia_vllm.settings import Batches

if TYPE_CHECKING:
    from collections.abc import Iterator

CHAT: Final = "/v1/chat/completions"
FAKE_SERVER = Path(__file__).parent.parent / "fake_server.py"


def line(number: int, url: str = CHAT, **body: Any) -> dict[str, Any]:
    return {"custom_id": f"line-{number}", "method": "POST", "url": url, "body": BODY | body}


def jsonl(lines: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(each) + "\n" for each in lines).encode()


def begin(client: OpenAI, content: bytes, endpoint: Any = CHAT) -> openai.types.Batch:
    file = client.files.create(file=("asked.jsonl", content), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"for": "test"}
    )


def ended(client: OpenAI, batch_id: str, seconds: float = 60) -> openai.types.Batch:
    def over() -> bool:
        status = client.batches.retrieve(batch_id).status
        return status in ("completed", "failed", "cancelled", "expired")

    wait_until(over, seconds)
    return client.batches.retrieve(batch_id)


def lines_of(client: OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    return [json.loads(each) for each in client.files.content(file_id).text.splitlines()]


def engine_of(places: int, delay: float = 0.0, **options: Any) -> FakeEngine:
    info = ModelInfo(max_model_len=2048, vocab_size=32000, longest_token=1, max_num_seqs=places)
    return FakeEngine(delay=delay, model_info=info, **options)


def stored(store: Store, user: str, lines: int) -> Batch:
    """A batch of so many lines that nobody runs yet."""
    content = jsonl([line(n) for n in range(lines)])
    file = store.add_file(user, "asked.jsonl", io.BytesIO(content), len(content))
    return store.add_batch(user, file, CHAT, None)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("batches")
    with running(FakeEngine(), batches=Batches(directory=directory)) as here:
        yield here


def test_each_line_has_the_answer_that_a_request_has(server: Running) -> None:
    """Output and errors are the routes' own bodies, with the ids they were asked under."""
    client = server.client
    asked = [
        line(1),
        line(2, n=2),
        line(3, temperature=9),
        line(4, stream=True),
        line(5, model="x"),
    ]
    batch = begin(client, jsonl(asked))
    assert batch.status == "validating"
    assert batch.metadata == {"for": "test"}
    done = ended(client, batch.id)
    assert done.status == "completed"
    counts = done.request_counts
    assert counts is not None
    assert (counts.total, counts.completed, counts.failed) == (5, 2, 3)
    answers = {each["custom_id"]: each for each in lines_of(client, done.output_file_id)}
    errors = {each["custom_id"]: each for each in lines_of(client, done.error_file_id)}
    assert set(answers) == {"line-1", "line-2"}
    plain = httpx.post(f"{server.url}{CHAT}", json=BODY).json()
    mine = answers["line-1"]["response"]
    assert mine["status_code"] == 200
    for own in ("id", "created"):
        del plain[own], mine["body"][own]
    assert mine["body"] == plain
    assert len(answers["line-2"]["response"]["body"]["choices"]) == 2
    assert [errors[f"line-{n}"]["response"]["status_code"] for n in (3, 4, 5)] == [400, 400, 404]
    told = [errors[f"line-{n}"]["response"]["body"]["error"]["param"] for n in (3, 4, 5)]
    assert told == ["temperature", "stream", "model"]
    assert all(each["error"] is None for each in (*answers.values(), *errors.values()))


def test_every_route_for_text_takes_batches(server: Running) -> None:
    """Also raw completions; an endpoint that is none is refused with those that are."""
    client = server.client
    body = {"model": "synthia-demo", "prompt": ["a", "b"]}
    raw = {"custom_id": "r", "method": "POST", "url": "/v1/completions", "body": body}
    done = ended(client, begin(client, jsonl([raw]), "/v1/completions").id)
    [answer] = lines_of(client, done.output_file_id)
    assert len(answer["response"]["body"]["choices"]) == 2
    file = client.files.create(file=b"{}", purpose="batch")
    with pytest.raises(openai.BadRequestError, match="/v1/completions") as refused:
        client.batches.create(
            input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h"
        )
    assert refused.value.param == "endpoint"


def test_a_file_that_is_not_one_of_requests_fails_whole(server: Running) -> None:
    """Nothing of it runs, and each fault is told with its line."""
    good = json.dumps(line(1)).encode()
    faults = {
        b"not json": "invalid_json_line",
        b"[]": "invalid_request",
        b'{"custom_id": "x"}': "invalid_request",
        json.dumps(line(1)).encode(): "duplicate_custom_id",
        json.dumps(line(2, url="/v1/completions")).encode(): "mismatched_endpoint",
        b'{"custom_id": "\xff"}': "invalid_json_line",
    }
    seen = len(server.engine.seen)  # type: ignore[attr-defined]
    batch = begin(server.client, b"\n".join([good, b"", *faults]))
    done = ended(server.client, batch.id)
    assert done.status == "failed"
    assert done.errors is not None
    data = done.errors.data or []
    assert [(each.line, each.code) for each in data] == [
        (number, code) for number, code in enumerate(faults.values(), 2)
    ]
    assert len(server.engine.seen) == seen  # type: ignore[attr-defined]
    long = json.dumps(line(2, messages=[{"role": "user", "content": "x" * 600_000}])).encode()
    bounded = ended(server.client, begin(server.client, good + b"\n" + long).id)
    assert bounded.errors is not None
    assert [(each.line, each.code) for each in bounded.errors.data or []] == [(2, "line_too_long")]
    empty = ended(server.client, begin(server.client, b"\n").id)
    assert empty.errors is not None
    assert [each.code for each in empty.errors.data or []] == ["empty_file"]


@pytest.mark.parametrize("front", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\r\n\r\n"])
def test_files_as_editors_write_them(server: Running, front: bytes, end: bytes) -> None:
    content = front + (end or b"\n").join([json.dumps(line(n)).encode() for n in range(2)]) + end
    done = ended(server.client, begin(server.client, content).id)
    told = lines_of(server.client, done.output_file_id)
    assert {each["custom_id"] for each in told} == {"line-0", "line-1"}


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "limit=99999", "order=up"])
def test_bad_queries(server: Running, query: str) -> None:
    """In the same envelope as all else."""
    told = httpx.get(f"{server.url}/v1/files?{query}")
    assert told.status_code == 400
    assert told.json()["error"]["param"] == query.partition("=")[0]


def test_files_and_batches_are_listed_read_and_deleted(server: Running) -> None:
    """Newest first, in pages; a batch outlives the file that it was made of."""
    client = server.client
    content = jsonl([line(1)])
    files = [client.files.create(file=(f"{n}", content), purpose="batch") for n in range(3)]
    assert files[0].bytes == len(content)
    assert client.files.retrieve(files[1].id) == files[1]
    assert client.files.content(files[1].id).content == content
    listed = [file.id for file in client.files.list(purpose="batch", limit=2)]  # in pages
    assert {file.id for file in files} <= set(listed)
    assert len(listed) == len(set(listed))
    batch = client.batches.create(input_file_id=files[0].id, endpoint=CHAT, completion_window="24h")
    assert client.files.delete(files[0].id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(files[0].id)
    assert ended(client, batch.id).status == "completed"
    assert batch.id in [each.id for each in client.batches.list(limit=1)]


@pytest.mark.parametrize(
    "name", ["file-../../x", "file-" + "0" * 32, "..%2f..%2fetc", "x" * 500, "batch_1"]
)
def test_ids_are_no_paths(server: Running, name: str) -> None:
    """What is not the id of an own file or batch is not found."""
    for path in (f"/v1/files/{name}", f"/v1/files/{name}/content", f"/v1/batches/{name}"):
        told = httpx.get(f"{server.url}{path}")
        assert told.status_code == 404, path
        assert told.json()["error"]["code"] == "not_found"


def test_bad_uploads(server: Running) -> None:
    """No form, no file, another purpose, cut short: a 400 that says what."""
    url = f"{server.url}/v1/files"
    file = {"file": ("a", b"{}")}
    for told, param in (
        (httpx.post(url, content=b"x"), "file"),
        (httpx.post(url, data={"purpose": "batch"}, files={"other": b"x"}), "file"),
        (httpx.post(url, data={"purpose": "batch", "file": "text"}), "file"),
        (httpx.post(url, files=file), "purpose"),
        (httpx.post(url, files=file, data={"purpose": "fine-tune"}), "purpose"),
        (
            httpx.post(url, content=b"--x\r\n", headers={"Content-Type": "multipart/form-data"}),
            None,
        ),
        (
            httpx.post(
                url,
                content=b"--x\r\nnonsense",
                headers={"Content-Type": "multipart/form-data; boundary=x"},
            ),
            "file",
        ),
    ):
        error = told.json()["error"]
        assert told.status_code == 400, error
        assert error["param"] == param, error


def test_an_upload_that_is_cut(server: Running) -> None:
    """It is counted as a client that left, and nothing of it is kept."""
    before = len(list(server.client.files.list()))
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port or 80)) as connection:
        connection.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
            b'Content-Disposition: form-data; name="file"; filename="a"\r\n\r\nxxxx'
        )
    labels = {"route": "/v1/files", "model": "", "status": "499"}
    wait_until(lambda: server.value("synthia_requests_total", **labels) == 1)
    assert len(list(server.client.files.list())) == before


def test_forms_of_other_sites_are_refused(server: Running) -> None:
    """A browser sends a form to any server, without asking it first."""

    def send(origin: str) -> int:
        return httpx.post(
            f"{server.url}/v1/files",
            data={"purpose": "batch"},
            files={"file": ("a", b"{}")},
            headers={"Origin": origin},
        ).status_code

    assert send("https://evil.example") == 403
    assert send("null") == 403
    assert send(server.url) == 200


def test_files_are_bounded(tmp_path: Path) -> None:
    """One file, and all of a user's together."""
    bounds = Batches(directory=tmp_path, max_file_bytes=2048, max_stored_bytes=3000)
    with running(FakeEngine(), batches=bounds) as here:
        with pytest.raises(openai.APIStatusError, match="2048") as refused:
            here.client.files.create(file=b"x" * 70_000, purpose="batch")
        assert refused.value.status_code == 413
        here.client.files.create(file=b"x" * 2000, purpose="batch")
        with pytest.raises(openai.PermissionDeniedError, match="2000 bytes, of 3000"):
            here.client.files.create(file=b"x" * 2000, purpose="batch")


def test_without_a_directory_there_are_none() -> None:
    """And the answer names the setting."""
    with running(FakeEngine()) as here:
        for path in ("/v1/files", "/v1/batches/batch_1/cancel"):
            told = httpx.post(f"{here.url}{path}")
            assert told.status_code == 404
            assert "batches.directory" in told.json()["error"]["message"]


def test_users_have_their_own(tmp_path: Path) -> None:
    """Nobody sees, reads, runs, cancels or deletes what is another's."""
    keys = key_file(tmp_path / "keys.yaml", alice={}, bob={"max_tokens": 10})
    directory = Batches(directory=tmp_path / "b")
    with running(FakeEngine(), keys_file=tmp_path / "keys.yaml", batches=directory) as here:
        alice, bob = (
            OpenAI(
                base_url=f"{here.url}/v1", api_key=keys[name]["Authorization"][7:], max_retries=0
            )
            for name in ("alice", "bob")
        )
        content = jsonl([line(1, max_tokens=20)])
        batch = begin(alice, content)
        done = ended(alice, batch.id)
        assert done.output_file_id is not None
        for refused in (
            lambda: bob.batches.retrieve(batch.id),
            lambda: bob.batches.cancel(batch.id),
            lambda: bob.files.content(done.output_file_id or ""),
            lambda: bob.files.delete(batch.input_file_id),
            lambda: bob.batches.create(
                input_file_id=batch.input_file_id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
            ),
        ):
            with pytest.raises(openai.NotFoundError):
                refused()
        assert not list(bob.files.list())
        assert not list(bob.batches.list())
        mine = ended(bob, begin(bob, content).id)
        [error] = lines_of(bob, mine.error_file_id)
        assert error["response"]["body"]["error"]["param"] == "max_tokens"
        prompt = here.value("synthia_user_tokens_total", user="alice", kind="prompt")
        assert prompt == len(here.engine.seen[0].prompt_token_ids)  # type: ignore[attr-defined]
        for client in (alice, bob):
            client.close()


def test_batches_leave_places_and_give_them_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never the last place; beside a user only a share; all lines are answered in the end."""
    monkeypatch.setattr("synthia_vllm.api.batches.runner._LINGER_S", 1.0)
    engine = engine_of(8, delay=0.05)
    with running(engine, batches=Batches(directory=tmp_path)) as here:
        batch = begin(here.client, jsonl([line(n) for n in range(200)]))
        most = []

        def places() -> float:
            most.append(here.value("synthia_batch_running"))
            return most[-1]

        wait_until(lambda: places() == 7)
        with here.client.chat.completions.stream(
            model="synthia-demo", messages=[{"role": "user", "content": "Hi"}]
        ) as stream:
            wait_until(lambda: places() <= 2)
            stream.until_done()
        assert here.value("synthia_batch_given_back_total") >= 5
        assert places() <= 2  # who has had an answer may ask again
        priorities = {request.priority for request in engine.seen}
        assert len(priorities) == 2
        wait_until(lambda: places() == 7)  # until nobody has for some seconds
        done = ended(here.client, batch.id)
        ids = Counter(each["custom_id"] for each in lines_of(here.client, done.output_file_id))
        assert ids == Counter(f"line-{n}" for n in range(200))
        assert max(most) == 7
        assert not here.value("synthia_requests_in_flight")


def test_a_line_for_more_places_than_there_are_runs_alone(tmp_path: Path) -> None:
    engine = engine_of(4)
    with running(engine, batches=Batches(directory=tmp_path)) as here:
        done = ended(here.client, begin(here.client, jsonl([line(1, n=8), line(2)])).id)
        assert done.request_counts is not None
        assert done.request_counts.completed == 2


def test_cancelled_batches_keep_what_was_answered(tmp_path: Path) -> None:
    """The rest is neither answered nor an error; what has ended cannot be cancelled."""
    with running(engine_of(2, delay=0.05), batches=Batches(directory=tmp_path)) as here:
        batch = begin(here.client, jsonl([line(n) for n in range(100)]))
        wait_until(lambda: here.value("synthia_batch_lines_total", result="completed") >= 2)
        assert here.client.batches.cancel(batch.id).status == "cancelling"
        done = ended(here.client, batch.id)
        assert done.status == "cancelled"
        assert done.request_counts is not None
        answered = lines_of(here.client, done.output_file_id)
        assert 2 <= len(answered) == done.request_counts.completed < 100
        assert done.error_file_id is None
        with pytest.raises(openai.BadRequestError, match="cancelled"):
            here.client.batches.cancel(batch.id)


def test_after_a_day_what_is_left_is_told(tmp_path: Path) -> None:
    store = Store(tmp_path)
    batch = stored(store, "anonymous", 600)
    job = store.take("anonymous", batch.id)
    assert job is not None
    job.batch.expires_at = int(time.time()) - 1
    job.save()
    job.release()
    with running(engine_of(2, delay=0.2), batches=Batches(directory=tmp_path)) as here:
        done = ended(here.client, batch.id)
        assert done.status == "expired"
        lines = [
            *lines_of(here.client, done.output_file_id),
            *lines_of(here.client, done.error_file_id),
        ]
        assert Counter(each["custom_id"] for each in lines) == Counter(
            f"line-{n}" for n in range(600)
        )
        codes = {each["error"]["code"] for each in lines if each["error"]}
        assert codes == {"batch_expired"}


@contextmanager
def process(directory: Path, delay: float) -> Iterator[tuple[subprocess.Popen[bytes], OpenAI]]:
    """A server of its own process, which may be killed."""
    port = free_port()
    command = [sys.executable, str(FAKE_SERVER), str(port), str(directory), str(delay)]
    with subprocess.Popen(command) as server:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)

        def ready() -> bool:
            try:
                return httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200
            except httpx.TransportError:
                return False

        try:
            wait_until(ready)
            yield server, client
        finally:
            client.close()
            server.kill()


def holder(lock: Path) -> int:
    """The process that has the lock."""
    lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    inode = str(lock.stat().st_ino)
    [pid] = [line[4] for line in lines if line[1] == "FLOCK" and line[5].endswith(f":{inode}")]
    return int(pid)


def test_killed_servers_answer_each_line_once(tmp_path: Path) -> None:
    """Two servers, one killed in the middle, and a third one in its place."""
    lines = [line(n, temperature=9 if n % 10 == 0 else 0.5) for n in range(300)]
    with process(tmp_path, 0.02) as (one, client), process(tmp_path, 0.02) as (two, other):
        batches = [begin(client, jsonl(lines)), begin(other, jsonl(lines))]
        some = tmp_path / "anonymous" / "batches" / batches[0].id / "output"
        wait_until(lambda: some.exists() and some.stat().st_size)
        runs = {each.pid: each for each in (one, two)}[holder(some.with_name("lock"))]
        os.kill(runs.pid, signal.SIGSTOP)  # the batch is its own until its end
        wait_until(lambda: " T " in Path(f"/proc/{runs.pid}/stat").read_text())
        with some.open("ab") as torn:  # as a write that the death of the machine cut
            torn.write(b'{"id": "x", "custom_id": "line-299", "resp')
        os.kill(runs.pid, signal.SIGKILL)
        runs.wait()
        with process(tmp_path, 0.0) as (_, third):
            for batch in batches:
                done = ended(third, batch.id)
                assert done.status == "completed"
                answered = lines_of(third, done.output_file_id)
                failed = lines_of(third, done.error_file_id)
                ids = Counter(each["custom_id"] for each in (*answered, *failed))
                assert ids == Counter(f"line-{n}" for n in range(300))
                assert len(failed) == 30
                assert done.request_counts is not None
                assert done.request_counts.completed == 270


def test_one_batch_is_run_by_one_server(tmp_path: Path) -> None:
    """Whoever has the lock; who comes later does not get it, and sees how far it is."""
    store = Store(tmp_path)
    batch = stored(store, "alice", 1)
    job = store.take("alice", batch.id)
    assert job is not None
    assert Store(tmp_path).take("alice", batch.id) is None
    job.release()
    again = Store(tmp_path).take("alice", batch.id)
    assert again is not None
    again.release()


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch waits and says why; nothing is answered twice or left out."""
    refusals = [3]
    write = Job.write

    def full(job: Job, kind: str, lines: list[bytes]) -> None:
        if refusals[0]:
            refusals[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        write(job, kind, lines)

    monkeypatch.setattr(Job, "write", full)
    monkeypatch.setattr("synthia_vllm.api.batches.runner._DISK_S", 0.2)
    with running(engine_of(4), batches=Batches(directory=tmp_path)) as here:
        batch = begin(here.client, jsonl([line(n) for n in range(50)]))
        done = ended(here.client, batch.id)
        assert not refusals[0]
        assert done.errors is None
        ids = Counter(each["custom_id"] for each in lines_of(here.client, done.output_file_id))
        assert ids == Counter(f"line-{n}" for n in range(50))


def test_a_line_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """Where the system takes a part of what is written and then no more."""
    batch = Batch(id="b", endpoint=CHAT, input_file_id="f", created_at=0, expires_at=0)
    with (tmp_path / "lock").open("w") as lock:
        job = Job(Store(tmp_path), "alice", batch, tmp_path, lock)
        job.write("output", [b"first\n"])
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9, before[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                job.write("output", [b"second\n"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert (tmp_path / "output").read_bytes() == b"first\n"
        job.write("output", [b"second\n"])
        assert (tmp_path / "output").read_bytes() == b"first\nsecond\n"


def test_an_upload_to_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 503 that says so, and nothing is left behind."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with running(FakeEngine(), batches=Batches(directory=tmp_path)) as here:
        monkeypatch.setattr("shutil.copyfileobj", full)
        with pytest.raises(openai.InternalServerError, match="disk is full"):
            here.client.files.create(file=b"{}", purpose="batch")
        assert not list(here.client.files.list())
        assert not list((tmp_path / "anonymous" / "files").iterdir())


def test_a_hundred_thousand_lines(tmp_path: Path) -> None:
    """Are checked while others are served, and read on from where an earlier server was."""
    store = Store(tmp_path)
    job = store.take("alice", stored(store, "alice", 100_000).id)
    assert job is not None
    looking = threading.Thread(target=job.validate)
    looking.start()
    turns = 0
    while looking.is_alive():
        time.sleep(0)
        turns += 1
    assert turns > 1000
    assert job.batch.status == "in_progress"
    assert job.batch.request_counts.total == 100_000
    read = sum(len(found) for found in iter(lambda: job.read(5000), []))
    assert read == 100_000
    job.release()


def test_old_files_and_batches_go(tmp_path: Path) -> None:
    """By their age; a batch that has not ended stays."""
    store = Store(tmp_path)
    batch = stored(store, "alice", 1)
    store.remove_old(3600)
    assert store.files("alice")
    store.remove_old(-1)
    assert not store.files("alice")
    assert [each.id for each in store.batches("alice")] == [batch.id]
    job = store.take("alice", batch.id)
    assert job is not None
    job.batch.status = "completed"
    job.save()
    job.release()
    store.remove_old(-1)
    assert not store.batches("alice")
