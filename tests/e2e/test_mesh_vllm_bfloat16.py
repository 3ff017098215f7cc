"""A stream that outlives its engine, on real vLLM in bfloat16: what it says after the cut is what the other engine says itself.

Needs `eval "$(scripts/real-vllm --export)"`. A mesh of its own for one check, so it is run by hand: `pytest -m large` and this file.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.local_up import LocalUp
from tests.support.processes import descendants
from tests.support.vllm import MARKS, NAME, vllm_mesh

ANSWER_TOKENS = 80

pytestmark = [pytest.mark.large, *(mark for mark in MARKS if mark.name != "real_vllm")]


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalUp]:
    with vllm_mesh(tmp_path_factory.mktemp("home"), dtype="bfloat16") as started:
        yield started


def streams(up: LocalUp) -> dict[str, int]:
    return dict(json.loads(up.mesh("status", "--json").stdout)["proxy"]["streams"])


def test_stream_that_loses_its_engine_goes_on_as_the_other_would(up: LocalUp) -> None:
    """In bfloat16 an answer computed in one piece may differ from one computed in two, so what follows the cut is held against what the
    other engine itself answers to the prompt and the tokens so far."""
    asked: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}
    question = [{"role": "user", "content": "Tell me a story about a lighthouse."}]
    client: Any = up.client()
    pids = {node["id"]: node["pid"] for node in up.about["nodes"] if node["role"] == "worker"}
    before, text = streams(up), ""
    stream = client.chat.completions.create(model=NAME, messages=question, max_tokens=ANSWER_TOKENS, stream=True, **asked)
    victim = next(pid for node, pid in pids.items() if node.startswith(stream.response.headers["x-mesh-worker"]))
    for number, piece in enumerate(stream):
        text += piece.choices[0].delta.content or ""
        if number == 12:
            for pid in descendants(victim):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    after = streams(up)
    assert (after["moved"] - before["moved"], after["stuck"]) == (1, before["stuck"])
    count = after["tokens"] - before["tokens"]
    assert 0 < count < ANSWER_TOKENS

    asked["extra_body"] |= {"return_token_ids": True}
    begun = client.chat.completions.create(model=NAME, messages=question, max_tokens=count, **asked)
    prompt, ids = begun.prompt_token_ids, begun.choices[0].token_ids
    assert len(ids) == count
    assert text.startswith(begun.choices[0].message.content)
    rest = client.completions.create(model=NAME, prompt=prompt + ids, max_tokens=ANSWER_TOKENS - count, **asked)
    assert text == begun.choices[0].message.content + rest.choices[0].text
