"""The real engine keeps the seam's promises, and vLLM is still where we reach into it."""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import aclosing
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import pytest
from contract import CHECKS, PROMPT, outputs_of
from serving import Running, running_gauge, wait_until

from synthia_vllm.engine.base import EngineRequest, Grammar, Sampling
from synthia_vllm.engine.vllm.client import VllmEngine
from synthia_vllm.engine.vllm.hub import check_model
from synthia_vllm.engine.vllm.options import check_options
from synthia_vllm.errors import InvalidRequest, StartupError, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(live: Running, check: Callable[[Any], Any]) -> None:
    """The same checks as for the fake engine, see tests/unit/test_fake.py."""
    live.run(check(live.engine))


def test_leaving_frees_the_engine(live: Running) -> None:
    """A stream that is closed half-way leaves nothing running or waiting in the engine core."""

    async def leave() -> int:
        tokens = await live.engine.tokenize(PROMPT)
        sampling = Sampling(max_tokens=1500, ignore_eos=True)
        request = EngineRequest(request_id="leaving", prompt_token_ids=tokens, sampling=sampling)
        async with aclosing(outputs_of(live.engine, request)) as steps:
            await anext(steps)
            await asyncio.sleep(0.3)
            return int(live.engine._llm.output_processor.get_num_unfinished_requests())  # type: ignore[attr-defined]

    before = live.run(leave())
    assert before == 1
    llm = live.engine._llm  # type: ignore[attr-defined]
    wait_until(lambda: llm.output_processor.get_num_unfinished_requests() == 0)

    async def one_more() -> None:  # the gauges are set with each step of the engine
        tokens = await live.engine.tokenize("USER: Hello!\nASSISTANT:")
        request = EngineRequest(
            request_id="next", prompt_token_ids=tokens, sampling=Sampling(max_tokens=3)
        )
        async with aclosing(outputs_of(live.engine, request)) as steps:
            async for _ in steps:
                pass

    live.run(one_more())
    wait_until(lambda: running_gauge(live) == 0)


def test_queue_bound_is_an_answer(live: Running) -> None:
    """vLLM's own bound on its queue becomes our 503, before anything is generated."""
    config = live.engine._llm.scheduler_config  # type: ignore[attr-defined]
    config.max_num_queued_reqs = 0

    async def refused() -> None:
        request = EngineRequest(
            request_id="full", prompt_token_ids=[1, 2], sampling=Sampling(max_tokens=2)
        )
        async with aclosing(outputs_of(live.engine, request)) as steps:
            await anext(steps)

    try:
        with pytest.raises(Unavailable, match="full"):
            live.run(refused())
    finally:
        config.max_num_queued_reqs = None


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"$ref": "#/nowhere"},
        {"type": "string", "pattern": "("},
        {"type": "object", "properties": 5},
    ],
)
def test_schema_that_cannot_be_is_a_400(live: Running, schema: dict[str, Any]) -> None:
    """A JSON schema the engine cannot compile is the client's error, named."""

    async def refused() -> None:
        request = EngineRequest(
            request_id="schema",
            prompt_token_ids=[1, 2],
            sampling=Sampling(max_tokens=2, grammar=Grammar("json", json.dumps(schema), "here")),
        )
        async with aclosing(outputs_of(live.engine, request)) as steps:
            await anext(steps)

    with pytest.raises(InvalidRequest) as caught:
        live.run(refused())
    assert caught.value.param is not None
    assert caught.value.param.startswith("here.")


def test_special_tokens_in_text_are_text(live: Running) -> None:
    """`</s>` in somebody's message is text, unless the card's own behaviour is asked for."""
    text = "USER: a</s>b\nASSISTANT:"
    as_text = live.run(live.engine.tokenize(text))
    as_card = live.run(live.engine.tokenize(text, special_tokens=True))
    assert 2 not in as_text
    assert 2 in as_card
    assert as_text[0] == as_card[0] == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_modle_len": 5}, "max_modle_len"),
        ({"max_model_len": "long"}, "max-model-len"),
        ({"dtype": "float7"}, "float7"),
        ({"model": "x"}, "use `model`"),
    ],
)
def test_wrong_engine_options(options: dict[str, Any], said: str) -> None:
    """A wrong name or value under `engine:` is an error that names it, before any start."""
    with pytest.raises(StartupError, match=said):
        check_options(options)


def test_right_engine_options() -> None:
    """Numbers, switches both ways, lists and nested options get through to vLLM."""
    check_options(
        {
            "max_model_len": 512,
            "enforce_eager": False,
            "enable_prefix_caching": True,
            "compilation_config": {"mode": 0},
            "gpu_memory_utilization": 0.5,
        }
    )


def test_our_plugins_are_always_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice among vLLM's plugins leaves out neither the watchdog nor the bounds of grammars."""
    declared = {point.name for point in entry_points(group="vllm.general_plugins")}
    monkeypatch.setenv("VLLM_PLUGINS", "theirs")
    check_options({})
    chosen = os.environ["VLLM_PLUGINS"].split(",")
    assert chosen[0] == "theirs"
    assert {name for name in declared if name.startswith("synthia-vllm")} == set(chosen[1:])


def test_missing_models_name_the_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory without a model, a path that is not there, and a name the hub cannot give."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for model in (str(tmp_path), "/no/such/model", "nobody/no-such-model", "not a name"):
        with pytest.raises(StartupError) as caught:
            check_model(model, lambda _: None)
        assert "--model demo" in str(caught.value)
        assert "directory" in str(caught.value)


def test_a_broken_model_is_a_plain_error(tmp_path: Path) -> None:
    """A model vLLM cannot load ends in a `StartupError`, not in a traceback."""
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')

    async def start() -> None:
        engine = VllmEngine(str(tmp_path), {})
        try:
            await engine.start(lambda _: None)
        finally:
            await engine.close()

    with pytest.raises(StartupError, match="vLLM did not start"):
        asyncio.run(start())


def test_tokens_of_a_plain_stream_take_the_short_way(live: Running) -> None:
    """vLLM calls us with new tokens and makes no `RequestOutput`; for the others it does."""

    async def kinds(**sampling: Any) -> set[str]:
        tokens = await live.engine.tokenize(PROMPT)
        asked = Sampling(max_tokens=4, **sampling)
        request = EngineRequest(request_id="short", prompt_token_ids=tokens, sampling=asked)
        return {type(output).__name__ async for output in outputs_of(live.engine, request)}

    assert live.run(kinds()) == {"_Output"}
    assert live.run(kinds(logprobs=1)) == {"CompletionOutput"}
    assert live.run(kinds(n=2)) == {"CompletionOutput"}


def test_vllms_own_series_count_each_token(live: Running) -> None:
    """Taken in bulk, the inter-token latencies are as many as there were gaps."""

    def counted() -> float:
        return sum(
            sample.value
            for family in live.metrics.registry.collect()
            for sample in family.samples
            if sample.name == "vllm:inter_token_latency_seconds_count"
        )

    async def answer() -> int:
        tokens = await live.engine.tokenize(PROMPT)
        request = EngineRequest(
            request_id="gaps", prompt_token_ids=tokens, sampling=Sampling(max_tokens=8)
        )
        found = [len(o.token_ids) async for o in outputs_of(live.engine, request)]
        return sum(found)

    before = counted()
    tokens = live.run(answer())
    wait_until(lambda: counted() == before + tokens - 1)


def test_vllms_series_say_the_served_name(live: Running) -> None:
    """Not where the model lies on this machine."""
    names = {
        sample.labels["model_name"]
        for family in live.metrics.registry.collect()
        for sample in family.samples
        if sample.name.startswith("vllm:") and "model_name" in sample.labels
    }
    assert names == {"synthia-demo"}
