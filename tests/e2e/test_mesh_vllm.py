"""A whole mesh over two real vLLM engines. Needs `eval "$(scripts/real-vllm --export)"`; both engines share this machine's CPU."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import openai
import pytest

from tests.support.local_up import LocalUp
from tests.support.processes import descendants, listening_ports
from tests.support.vllm import CONTEXT_TOKENS, MARKS, NAME, moved, vllm_mesh

pytestmark = MARKS
T = TypeVar("T")


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalUp]:
    with vllm_mesh(tmp_path_factory.mktemp("home"), dtype="bfloat16") as started:
        yield started


def ask(client: openai.OpenAI, text: str, **options: Any) -> Any:
    return client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": text}], **options)


class Vllm:
    """One worker's vLLM, seen from outside: its own metrics, found by the port its process listens on."""

    def __init__(self, worker_pid: int) -> None:
        self.worker_pid = worker_pid
        urls = (f"http://127.0.0.1:{port}" for port in listening_ports(*descendants(worker_pid)))
        self.url = next(url for url in urls if "vllm:" in _get(f"{url}/metrics"))

    def metric(self, name: str) -> float:
        """The sum over its labels; a vLLM that is hard at work may let us wait for it."""
        line = re.compile(rf"^vllm:{name}(?:{{[^}}]*}})? ([0-9.e+]+)$", re.MULTILINE)
        found = wait_for(lambda: line.findall(_get(f"{self.url}/metrics")), f"vLLM to show {name}")
        return sum(map(float, found))


@pytest.fixture(scope="module")
def engines(up: LocalUp) -> list[Vllm]:
    return [Vllm(node["pid"]) for node in up.about["nodes"] if node["role"] == "worker"]


def total(engines: list[Vllm], name: str) -> float:
    return sum(engine.metric(name) for engine in engines)


def test_models_and_answers(up: LocalUp, engines: list[Vllm]) -> None:
    client = up.client()
    assert [model.id for model in client.models.list()] == [NAME]
    answer = ask(client, "What is the capital of France?", max_tokens=16, temperature=0)
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens <= 16


def test_streams_say_the_same_as_whole_answers_to_both_kinds_of_client(up: LocalUp) -> None:
    pieces = list(ask(up.client(), "Count to ten.", max_tokens=24, temperature=0, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert pieces[-1].choices[0].finish_reason in ("stop", "length")
    assert all(piece.usage is None for piece in pieces)


def test_usage_equals_vllms_own_counts(up: LocalUp, engines: list[Vllm]) -> None:
    before = total(engines, "prompt_tokens_total"), total(engines, "generation_tokens_total")
    prompt = completion = 0
    for n in range(6):
        stream = n % 2 == 0
        options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        answer = ask(up.client(), f"Tell me {n} things about the number {n}.", max_tokens=10 + n, **options)
        usage = list(answer)[-1].usage if stream else answer.usage
        prompt += usage.prompt_tokens
        completion += usage.completion_tokens

    def counted() -> bool:
        now = total(engines, "prompt_tokens_total"), total(engines, "generation_tokens_total")
        return now == (before[0] + prompt, before[1] + completion)

    wait_for(counted, "vLLM's counters to agree with the usage that the clients were told")
    assert _proxy_tokens(up, "completion") > 0


def test_cancel_is_seen_in_vllms_metrics(up: LocalUp, engines: list[Vllm]) -> None:
    before = total(engines, "generation_tokens_total")
    stream = ask(up.client(), "Write an endless story.", max_tokens=900, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    wait_for(lambda: total(engines, "num_requests_running") == 1, "vLLM to run the request")
    stream.close()
    wait_for(lambda: total(engines, "num_requests_running") == 0, "vLLM to stop working for a client that has gone")
    assert before < total(engines, "generation_tokens_total") < before + 900, "it was not computed to its end"


def test_both_engines_get_work(up: LocalUp, engines: list[Vllm]) -> None:
    before = [engine.metric("prompt_tokens_total") for engine in engines]
    threads = [threading.Thread(target=ask, args=(up.client(), f"Hello {n}"), kwargs={"max_tokens": 8}) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    wait_for(
        lambda: all(engine.metric("prompt_tokens_total") > then for engine, then in zip(engines, before, strict=True)),
        "both engines to have computed prompts",
    )


def test_mistake_that_only_vllm_can_see_is_a_400_with_its_own_words(up: LocalUp) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(up.client(), "word " * 3000, max_tokens=10)
    assert str(CONTEXT_TOKENS) in caught.value.message


def test_kill_of_one_worker_loses_no_stream(up: LocalUp) -> None:
    """Last in this file: it leaves the mesh with one worker. Stream 0's, which by then has most probably come to its end and gone on.

    Stream 0 has most of its tokens yet to come then, however far its client lags behind the engine.
    """
    results: list[str] = []
    workers: dict[int, str] = {}
    begun = threading.Event()

    def stream(n: int) -> None:
        result = "cut and silent"
        try:
            text, tokens = (f"Story {n}", 300) if n else ("Say hi.", 900)
            pieces = ask(up.client(), text, max_tokens=tokens, stream=True, extra_body={"ignore_eos": True})
            workers[n] = pieces.response.headers["x-mesh-worker"]
            for number, piece in enumerate(pieces):
                if n == 0 and number == 60:
                    begun.set()
                if piece.choices and piece.choices[0].finish_reason:
                    result = "done"
        except openai.APIError as error:
            result = f"error: {error}"
        results.append(result)

    threads = [threading.Thread(target=stream, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    assert begun.wait(120), results
    os.kill(next(node["pid"] for node in up.about["nodes"] if node["id"].startswith(workers[0])), signal.SIGKILL)
    answers = [ask(up.client(), f"Hello {n}", max_tokens=4) for n in range(4)]
    for thread in threads:
        thread.join(300)
    assert all(answer.choices for answer in answers), "what had no byte yet succeeds on the other"
    assert results == ["done"] * 8, "streams that had begun go on at the other"
    assert moved(up)["moved"] > 0


def wait_for(look: Callable[[], T], what: str, within_s: float = 60) -> T:
    """What ``look`` returns, once that is true: vLLM's metrics lag behind by up to seconds."""
    end = time.monotonic() + within_s
    while not (seen := look()):
        assert time.monotonic() < end, f"waited {within_s:.0f} s in vain for {what}"
        time.sleep(0.2)
    return seen


def _proxy_tokens(up: LocalUp, kind: str) -> float:
    text = _get(up.base_url.removesuffix("/v1") + "/metrics")
    return float(re.findall(rf'^infermesh_tokens_total{{kind="{kind}",model="{NAME}"}} ([0-9.e+]+)$', text, re.MULTILINE)[0])


def _get(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return str(response.read().decode())
    except OSError:
        return ""
