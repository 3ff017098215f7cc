"""What is pure about engines: readiness, load, listings, warm-up."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import EngineError
from worker.engine.base import (
    HISTORY,
    EngineKind,
    EngineLoad,
    EngineSpec,
    ListedModel,
    Readiness,
    Stage,
    Task,
    is_answer,
    own_model,
    parse_listing,
    parse_samples,
    warm_up_body,
)
from worker.engine.external import ExternalEngine
from worker.engine.vllm import parse_vllm_load


def test_readiness_keeps_every_stage_with_its_time() -> None:
    readiness = Readiness.begin(100.0).enter(Stage.LOADING, 101.0).enter(Stage.WARMING, 107.5).enter(Stage.READY, 108.0)
    assert [(entry.stage, entry.at_s) for entry in readiness.history] == [
        (Stage.STARTING, 100.0),
        (Stage.LOADING, 101.0),
        (Stage.WARMING, 107.5),
        (Stage.READY, 108.0),
    ]
    assert readiness.is_ready
    assert readiness.at_s(Stage.LOADING) == 101.0
    assert readiness.at_s(Stage.DOWNLOADING) is None


def test_readiness_entered_again_is_the_same_but_for_a_new_reason() -> None:
    failed = Readiness.begin(1.0).enter(Stage.FAILED, 2.0, "out of memory")
    assert failed.enter(Stage.FAILED, 3.0, "out of memory") is failed
    assert failed.enter(Stage.FAILED, 3.0, "no such model").reason == "no such model"


def test_draining_is_final() -> None:
    draining = Readiness.begin(1.0).enter(Stage.READY, 2.0).enter(Stage.DRAINING, 3.0)
    assert draining.enter(Stage.READY, 4.0) is draining
    assert draining.enter(Stage.FAILED, 4.0, "crashed") is draining


def test_readiness_of_an_engine_that_crashes_for_ever_stays_small() -> None:
    readiness = Readiness.begin(0.0)
    for second in range(10_000):
        readiness = readiness.enter(Stage.LOADING if second % 2 else Stage.STARTING, float(second), "crashed").restarted()
    assert len(readiness.history) == HISTORY
    assert readiness.restarts == 10_000


VLLM_METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.5
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 64.0
vllm:prefix_cache_hits_total{engine="0",model_name="a } b"} 32.0
"""


def test_load_of_vllm_adds_up_its_cores_and_takes_the_fullest_cache() -> None:
    assert parse_vllm_load(VLLM_METRICS) == EngineLoad(running=7, waiting=2, kv_use=0.5, prefix_queries=64, prefix_hits=32)


def test_steps_of_an_engine_are_told_by_counters_and_a_long_prompt_moves_its_cache() -> None:
    text = "vllm:num_requests_running 1\nvllm:generation_tokens_total 5\nvllm:kv_cache_usage_perc "
    first, same, next_step = (parse_vllm_load(text + used) for used in ("0.25\n", "0.25\n", "0.5\n"))
    assert first is not None
    assert same is not None
    assert next_step is not None
    assert first.steps == same.steps != next_step.steps
    llama = ExternalEngine(spec=EngineSpec(kind=EngineKind.EXTERNAL, url="http://127.0.0.1:1"))
    loads = [llama.parse_load(f"llamacpp:requests_processing 1\nllamacpp:n_decode_total {count}\n") for count in (1, 2)]
    assert loads[0] != loads[1]
    gauge = parse_vllm_load("vllm:num_requests_running 1\nvllm:kv_cache_usage_perc 0.5\n")
    assert gauge is not None
    assert gauge.steps is None, "a gauge alone says nothing about steps"


def test_load_of_an_older_vllm_is_read_by_its_older_names() -> None:
    text = "vllm:num_requests_running 1\nvllm:num_requests_waiting 0\nvllm:gpu_cache_usage_perc 0.75\n"
    assert parse_vllm_load(text) == EngineLoad(running=1, waiting=0, kv_use=0.75)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("llamacpp:requests_processing 2\nllamacpp:requests_deferred 5\n", EngineLoad(running=2, waiting=5)),
        ("sglang:num_running_reqs 2\nsglang:num_queue_reqs 1\nsglang:token_usage 0.5", EngineLoad(running=2, waiting=1, kv_use=0.5)),
        ("python_gc_objects_collected_total 1\n", None),
        ("", None),
    ],
    ids=["llama.cpp", "sglang", "something else", "nothing"],
)
def test_load_of_an_external_engine_is_read_by_whatever_names_it_uses(text: str, expected: EngineLoad | None) -> None:
    engine = ExternalEngine(spec=EngineSpec(kind=EngineKind.EXTERNAL, url="http://127.0.0.1:1"))
    assert engine.parse_load(text) == expected


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-1", "1e400", "x", "9" * 60, ""])
def test_load_that_is_no_load_is_passed_over(value: str) -> None:
    assert parse_samples(f"vllm:num_requests_running {value}\n", ["vllm:num_requests_running"]) == {}


@given(st.text())
def test_metrics_of_any_text_are_read_without_harm(text: str) -> None:
    parse_vllm_load(text)
    parse_vllm_load("vllm:num_requests_running" + text)


def test_listing_gives_names_context_and_adapters() -> None:
    listing = {
        "object": "list",
        "data": [
            {"id": "base", "max_model_len": 1024, "parent": None},
            {"id": "lora", "parent": "base"},
            {"id": "llama", "meta": {"n_ctx": 2048}},
            {"id": ""},
            {"id": "x" * 300},
            {"id": "bad\nname"},
            {"id": 5},
            "no object",
            {"id": "odd", "max_model_len": True, "meta": [], "parent": {}},
        ],
    }
    assert parse_listing(json.dumps(listing).encode()) == (
        ListedModel(id="base", context_tokens=1024),
        ListedModel(id="lora", parent="base"),
        ListedModel(id="llama", context_tokens=2048),
        ListedModel(id="odd"),
    )


@pytest.mark.parametrize("raw", [b"", b"[]", b"null", b'{"data": 5}', b"\xff", b"[" * 100_000, b'{"data": null}'])
def test_listing_that_is_none_is_refused(raw: bytes) -> None:
    with pytest.raises(EngineError):
        parse_listing(raw)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_listing_of_any_json_is_read_or_refused(data: Any) -> None:
    assert isinstance(parse_listing(json.dumps({"data": [data, {"id": data}]}).encode()), tuple)


def test_own_model_is_the_one_we_named_with_its_adapters() -> None:
    spec = EngineSpec(kind=EngineKind.VLLM, source="x/y", context_tokens=512)
    listed = (ListedModel(id="m"), ListedModel(id="b", parent="m"), ListedModel(id="a", parent="m"))
    (model,) = own_model(spec, "m", listed, "sha256:00")
    assert (model.adapters, model.context_tokens, model.digest) == (("a", "b"), 512, "sha256:00")
    assert model.tasks == frozenset(Task)


def test_somebody_else_on_our_port_is_not_taken_for_our_engine() -> None:
    with pytest.raises(EngineError, match="not our engine"):
        own_model(EngineSpec(kind=EngineKind.VLLM, source="x/y"), "m", (ListedModel(id="other"),), None)


@pytest.mark.parametrize("task", list(Task))
def test_warm_up_names_the_engines_own_name(task: Task) -> None:
    assert warm_up_body(task, "m")["model"] == "m"
    assert task.path.startswith("/v1/")


@pytest.mark.parametrize("raw", [b"", b"<html>", b"[]", b"{}", b'{"choices": []}', b'{"choices": {}}', b'{"data": 1}', b"{" * 9])
def test_nonsense_is_no_answer(raw: bytes) -> None:
    assert not any(is_answer(task, raw) for task in Task)


def test_answers_are_told_apart_by_task() -> None:
    chat, vectors = b'{"choices": [{}]}', b'{"data": [{}]}'
    assert is_answer(Task.CHAT, chat)
    assert not is_answer(Task.EMBEDDINGS, chat)
    assert is_answer(Task.EMBEDDINGS, vectors)
    assert is_answer(Task.RESPONSES, b'{"output": [{}]}')


def test_room_of_vllms_cache_is_its_blocks_times_their_size_over_all_cores() -> None:
    info = 'vllm:cache_config_info{block_size="16",engine="%d",num_gpu_blocks="%s",sliding_window="None"} 1.0\n'
    load = parse_vllm_load(VLLM_METRICS + info % (0, "1000") + info % (1, "500"))
    assert load is not None
    assert load.kv_tokens == 24_000


@pytest.mark.parametrize(
    "odd", ['block_size="x",num_gpu_blocks="5"', 'block_size="16"', 'block_size="16",num_gpu_blocks="-4"', 'block_size="16', ""]
)
def test_odd_room_is_passed_over(odd: str) -> None:
    load = parse_vllm_load(VLLM_METRICS + "vllm:cache_config_info{" + odd + "} 1\n")
    assert load is not None
    assert load.kv_tokens is None
