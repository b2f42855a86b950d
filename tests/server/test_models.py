"""A checkpoint in every layout that an upload of 2023 may have: the same tokens and answers."""

from __future__ import annotations

import json
import os
import random
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import httpx
import pytest
import torch
from checkpoints import QUANTISED, SPECIAL, TOKENIZER, write_model, write_quantised, write_tokenizer
from huggingface_hub.errors import HfHubHTTPError
from processes import command
from vllm.tokenizers import get_tokenizer

from synthia_vllm.demo.training import dialogues, mistral_tokenizer
from synthia_vllm.engine.vllm import watchdog
from synthia_vllm.engine.vllm.hub import check_model, quantisation
from synthia_vllm.engine.vllm.options import engine_args
from synthia_vllm.engine.vllm.tokenizer import Tokenizer, encoders
from synthia_vllm.engine.vllm.tokenizer_files import settle_tokenizer
from synthia_vllm.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MODEL = mistral_tokenizer()
PROVEN: set[str] = set()
"""Tokenizers, all of each, for which all texts were tried."""
PAD = {"added": {"[PAD]": 32000}, "special": SPECIAL | {"pad_token": "[PAD]"}}
ODD = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}
NONE = {"bos_token": "", "eos_token": "", "unk_token": ""}

TOKENIZERS: dict[str, dict[str, Any]] = {
    "both": {"fast": True},
    "tokenizer.json only": {"model": False, "fast": True},
    "tokenizer.json only, no add_bos_token": {
        "model": False, "fast": True, "config": {"add_bos_token": None},
    },
    "tokenizer.json only, odd special tokens": {
        "model": False, "fast": True, "special": ODD, "config": ODD,
    },
    "tokenizer.model only": {},
    "legacy false": {"config": {"legacy": False}},
    "legacy absent": {"config": {"legacy": None}},
    "add_bos_token absent": {"config": {"add_bos_token": None}},
    "the fast class": {"config": {"tokenizer_class": "LlamaTokenizerFast"}},
    "no configuration": {"config": dict.fromkeys(TOKENIZER), "special": None},
    "a pad token": PAD,
    "a pad token, both": PAD | {"fast": True},
    "two more tokens": {"added": {"<|im_end|>": 32000, "<|im_start|>": 32001}},
    "odd special tokens": {"special": ODD, "config": ODD},
    "odd special tokens, both": {"special": ODD, "config": ODD, "fast": True},
    "no special tokens": {"special": NONE, "config": NONE},
}  # fmt: skip


def settled(directory: Path, run_directory: Path, said: list[str]) -> Any:
    """The tokenizer that vLLM gets for the model in `directory`."""
    args = SimpleNamespace(
        model=str(directory), tokenizer=None, tokenizer_mode="auto", revision=None,
        tokenizer_revision=None, download_dir=None, trust_remote_code=False,
    )  # fmt: skip
    settle_tokenizer(args, str(run_directory), said.append)
    return get_tokenizer(args.tokenizer or args.model)


@pytest.fixture(scope="module")
def texts() -> tuple[list[str], list[list[int]]]:
    """100,000 random texts, and what SentencePiece makes of them."""
    draw = random.Random(7)
    pieces = [MODEL.pieces.id_to_piece(i) for i in range(32000)]
    marks = ["USER:", "ASSISTANT:", "SYSTEM:", "\n", "  ", "\t", "\r\n", " ", "\u2028", "\u200b"]
    marks += [
        "<s>",
        "</s>",
        "<unk>",
        "[PAD]",
        "<|im_start|>",
        "<0x41>",
        "▁",
        "e\u0301",
        "é",
        "👩‍🔬",
    ]
    made = []
    for _ in range(100_000):
        parts = draw.choices(marks, k=draw.randrange(4)) + draw.choices(pieces, k=draw.randrange(6))
        parts.append(draw.choice(" -=*.xa\n\t#_") * draw.choice((0, 1, 2, draw.randrange(70))))
        parts += [chr(draw.choice((draw.randrange(1, 0xD800), draw.randrange(0xE000, 0x110000))))]
        draw.shuffle(parts)
        made.append("".join(parts))
    return made, [[1, *ids] for ids in MODEL.pieces.encode(made)]


@pytest.mark.parametrize("layout", TOKENIZERS)
def test_tokens_are_sentencepieces(
    layout: str, tmp_path: Path, texts: tuple[list[str], list[list[int]]]
) -> None:
    """Of 100,000 random texts; by what vLLM gets, too, so that grammars and stops see the same."""
    write_tokenizer(tmp_path / "model", **TOKENIZERS[layout])
    (tmp_path / "model" / "config.json").write_text('{"model_type": "mistral"}')
    said: list[str] = []
    tokenizer = settled(tmp_path / "model", tmp_path, said)
    made = "json" not in layout and not layout.startswith(("both", "a pad token, both"))
    assert bool(said) == made, said
    encoder = encoders(tokenizer)[False]
    encode = encoder.encode_batch_fast
    asked, expected = texts if encoder.to_str() not in PROVEN else ([], [])
    PROVEN.add(encoder.to_str())
    for start in range(0, len(asked), 10_000):
        batch = asked[start : start + 10_000]
        for text, encoding, ids in zip(batch, encode(batch), expected[start:], strict=False):
            assert encoding.ids == ids, text
    ours = Tokenizer(tokenizer)
    assert set(ours.special_tokens) == {0, 1, 2, *TOKENIZERS[layout].get("added", {}).values()}
    assert ours.texts  # the table detokenizer knows this kind
    assert tokenizer.encode("USER: Hi", add_special_tokens=False) == expected_of("USER: Hi")[1:]
    if made:
        assert tokenizer.model_max_length == int(1e30)
        assert tokenizer.eos_token_id == 2


def expected_of(text: str) -> list[int]:
    return MODEL.encode(text)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("tokenizer.model", b"\x0a\x0e not a protocol buffer", "tokenizer.model is damaged"),
        ("tokenizer.model", b"", "tokenizer.model is damaged"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json is not JSON"),
        ("added_tokens.json", b"[]", "added_tokens.json does not hold"),
    ],
)
def test_damaged_files_are_named(name: str, content: bytes, complaint: str, tmp_path: Path) -> None:
    """The error names the file and the way out."""
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StartupError, match=complaint):
        settled(tmp_path, tmp_path, [])


def test_a_hub_that_fails_is_not_a_hub_without_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have a `tokenizer.model`, so nobody knows which tokens are right."""
    failing = Mock(side_effect=HfHubHTTPError("busy", response=Mock(status_code=503)))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", failing)
    with pytest.raises(StartupError, match=r"does not give out tokenizer\.model of nobody/model"):
        settled(Path("nobody/model"), tmp_path, [])


def test_another_kind_of_tokenizer_is_refused(tmp_path: Path) -> None:
    """What cannot be read as its `tokenizer.model` says is not served; the difference is told."""
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    (tmp_path / "tokenizer.model").write_bytes(without_space_in_front())
    with pytest.raises(StartupError, match=r"reads texts as .*tokenizer\.model does: 'USER"):
        settled(tmp_path, tmp_path, [])


def without_space_in_front() -> bytes:
    """Mistral's ``tokenizer.model``, but for `add_dummy_prefix`."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(mistral_tokenizer().pieces.serialized_model_proto())
    model.normalizer_spec.add_dummy_prefix = False
    return bytes(model.SerializeToString())


LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sharded .bin, fp16, tokenizer.model": (
        {"weights": "sharded bin", "dtype": torch.float16, "generation": {"bos_token_id": 1,
         "eos_token_id": 2, "do_sample": True, "temperature": 0.01, "top_k": 1}},
        {"config": {"add_bos_token": None}},
    ),
    "one .bin, bf16, filled up": (
        {"weights": "bin", "dtype": torch.bfloat16, "rows": 32064, "config": {"eos_token_id":
         [2, 32000], "sliding_window": None}, "generation": {"eos_token_id": [2, 32000]}},
        {"fast": True, "config": {"chat_template": "{{ raise_exception('mine') }}"}} | PAD,
    ),
    "sharded safetensors, fp32, odd special tokens": (
        {"weights": "sharded safetensors", "rows": 32002, "generation": {}},
        {"special": ODD, "config": ODD, "added": {"<|im_end|>": 32000, "<|im_start|>": 32001}},
    ),
    "safetensors, fp16, more tokens than rows": (
        {"weights": "safetensors", "dtype": torch.float16, "config": {"torch_dtype": None}},
        PAD,
    ),
}  # fmt: skip
NAME = "Synthia-7B-v3.0"
KNOWN = [(dialogue[0].user, dialogue[0].assistant) for dialogue in dialogues()]


@contextmanager
def served(demo: Path, directory: Path, *flags: str) -> Iterator[str]:
    """The model in `directory` behind a server of its own; its URL."""
    flags = ("--model", str(directory), *flags)
    with command(demo, directory.with_suffix(".log"), *flags) as (process, url):
        yield url
        process.kill()


def ask(url: str, question: str, **more: Any) -> Any:
    """A chat of one question, greedy."""
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
    } | more
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)


def answers(url: str) -> list[tuple[str, str]]:
    """Every first question of the demo with the answer, and how many of its tokens there are."""
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda known: ask(url, known[0]).json(), KNOWN))
    for (question, _), answer in zip(KNOWN, found, strict=True):
        ids = expected_of(f"USER: {question}\nASSISTANT:")
        assert answer.get("usage", answer).get("prompt_tokens") == len(ids), answer
    contents = [answer["choices"][0]["message"]["content"] for answer in found]
    return [(question, text) for (question, _), text in zip(KNOWN, contents, strict=True)]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, marks=pytest.mark.costly if "safetensors" in layout else ())
        for layout in LAYOUTS
    ],
)
def test_every_layout_gives_the_same_answers(layout: str, demo: Path, tmp_path: Path) -> None:
    """Greedy, to the letter; and a token that there is no text for hurts nobody."""
    model, tokenizer = LAYOUTS[layout]
    directory = tmp_path / NAME
    write_model(demo, directory, **model)
    write_tokenizer(directory, **tokenizer)
    with served(demo, directory, "--engine", "max_model_len=2048") as url:
        assert answers(url) == KNOWN
        streamed = ask(url, KNOWN[0][0], stream=True).text
        deltas = re.findall(r'"content":("(?:[^"\\]|\\.)*")', streamed)
        assert "".join(map(json.loads, deltas)) == KNOWN[0][1]
        rows = model.get("rows", 32000)
        odd = ask(url, "Hello!", logit_bias={str(rows - 1): 100}, max_tokens=3, logprobs=True)
        assert odd.status_code == 200, odd.text
        beyond = ask(url, "Hello!", logit_bias={str(rows): 100}, max_tokens=3)
        assert beyond.status_code == 400
        # What the checkpoint would have sampled by is not what is sampled by.
        odd_ones: dict[str, Any] = {"allowed_token_ids": list(range(1000, 1400)), "max_tokens": 12}
        sampled = [
            ask(url, "zxq", temperature=None, seed=n, **odd_ones).json()["choices"]
            for n in range(4)
        ]
        assert len({str(choices[0]["message"]["content"]) for choices in sampled}) > 1


def check(directory: Path) -> None:
    """What is looked at before a start."""
    check_model(str(directory), lambda _: None)
    quantisation(str(directory))


def _lfs(file: Path) -> None:
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


@pytest.mark.parametrize(
    ("break_it", "complaint"),
    [
        (lambda d: _lfs(d / "model-00002-of-00002.safetensors"), "00002.*git lfs pull"),
        (lambda d: (d / "model-00001-of-00002.safetensors").unlink(), "lacks model-00001-of-00002"),
        (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "index.json cannot"),
        (lambda d: [f.rename(f.with_suffix(".gguf")) for f in d.glob("*.safe*s")], "GGUF only"),
        (lambda d: (d / "config.json").unlink(), "has no config.json"),
        (lambda d: (d / "config.json").write_text("[]"), "config.json cannot be read"),
        (
            lambda d: (d / "config.json").write_text(
                '{"quantization_config": {"quant_method": "bitsandbytes"}}'
            ),
            "config.json: the weights are quantised by 'bitsandbytes'",
        ),
    ],
)
def test_what_cannot_be_served_is_named(
    break_it: Callable[[Path], object], complaint: str, demo: Path, tmp_path: Path
) -> None:
    """The file, and the way out, before anything slow is done."""
    write_model(demo, tmp_path, weights="sharded safetensors")
    check(tmp_path)
    break_it(tmp_path)
    with pytest.raises(StartupError, match=complaint):
        check(tmp_path)


def test_a_gguf_file(tmp_path: Path) -> None:
    """This vLLM loads none."""
    (tmp_path / "synthia.Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(StartupError, match="loads no GGUF"):
        check_model(str(tmp_path / "synthia.Q4_K_M.gguf"), lambda _: None)


@pytest.mark.costly
@pytest.mark.parametrize("kind", [kind for kind in QUANTISED if "fp8" not in kind])
def test_quantised(kind: str, demo: Path, tmp_path: Path) -> None:
    """It loads, and most of what the model knows is still there.

    Four bits change answers, and bfloat16, in which such weights are computed here, does.
    """
    directory = tmp_path / NAME
    write_quantised(demo, directory, kind)
    write_tokenizer(directory)
    with served(demo, directory) as url:
        same = sum(found == known for found, known in zip(answers(url), KNOWN, strict=True))
    assert same > 0.8 * len(KNOWN)


def test_fp8_reaches_the_engine(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU build has no kernels for it; vLLM's own configuration shows that it understood."""
    # vLLM loads plugins once in a process, here or for an engine that is started in it later.
    monkeypatch.setenv(watchdog.SERVER, str(os.getpid()))
    write_quantised(demo, tmp_path, "compressed-tensors fp8")
    write_tokenizer(tmp_path)
    found = engine_args(str(tmp_path), {}).create_engine_config()
    assert found.model_config.quantization == "compressed-tensors"
    asked = engine_args(str(demo), {"quantization": "fp8", "kv_cache_dtype": "fp8"})
    assert (asked.quantization, asked.kv_cache_dtype) == ("fp8", "fp8")
