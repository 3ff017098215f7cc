"""A stream that loses its worker, as its client reads it: the same answer as without, or an error that says why not.

The front is real, on a real socket; workers are real gateways over stand-in engines, linked in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import structlog
import uvloop

from tests.support.answers import Answer
from tests.support.authority import make_mesh
from tests.support.fake_engine import FakeEngine, Misbehaviour, Mode
from tests.support.front import Front, Wire, Worker, post

pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy.")
MESH = make_mesh(now=time.time() - 3600)
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Say something"}]
TOKENS = 14


@pytest.fixture
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy()


@dataclass
class Stage:
    """A front and its workers, the first of which gets the first request."""

    front: Front
    engines: list[FakeEngine] = field(default_factory=list)
    workers: list[Worker] = field(default_factory=list)
    log: list[Any] = field(default_factory=list)
    stack: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    async def add(self, *, token_ids: bool = True, digest: str = "", **engine: Any) -> FakeEngine:
        made = await self.stack.enter_async_context(FakeEngine(**engine))
        worker, _ = await self.stack.enter_async_context(self.front.gateway(made, token_ids=token_ids, digest=digest))
        self.engines.append(made)
        self.workers.append(worker)
        return made

    async def begin(self, path: str = CHAT, **body: Any) -> Wire:
        given = {"messages": MESSAGES} if path == CHAT else {"prompt": "Once upon a time"}
        wire = await self.front.connect()
        whole = {"model": "m", "stream": True, "max_tokens": TOKENS, **given, **body}
        await wire.send(post(path, json.dumps(whole).encode(), self.front.key(roles=frozenset({"invoker", "viewer"}))))
        return wire

    async def ask(self, path: str = CHAT, **body: Any) -> Answer:
        wire = await self.begin(path, **body)
        try:
            return await wire.answer()
        finally:
            wire.close()

    async def status(self) -> dict[str, Any]:
        wire = await self.front.connect()
        await wire.send(post("/mesh/v1/status", b"", self.front.key(roles=frozenset({"viewer"}))).replace(b"POST", b"GET", 1))
        answer = await wire.answer()
        wire.close()
        return dict(answer.json()["proxy"]["streams"])


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    with structlog.testing.capture_logs() as log:
        async with Front(MESH, tmp_path, routing="round-robin") as front:
            stage = Stage(front, log=log)
            async with stage.stack:
                yield stage
    assert [event for event in log if event["event"] in ("request.crashed", "task.unhandled")] == []


@dataclass
class Read:
    """A stream as a client reads it."""

    text: str
    finish: list[str]
    usage: list[dict[str, Any]]
    names: set[tuple[str, str, int, str]]
    roles: int
    done: int
    errors: list[dict[str, Any]]


def read(answer: Answer) -> Read:
    events = answer.events()
    chunks = [event for event in events if event != "[DONE]" and "error" not in event]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return Read(
        text="".join(choice["text"] if "text" in choice else choice["delta"].get("content") or "" for choice in choices),
        finish=[choice["finish_reason"] for choice in choices if choice["finish_reason"]],
        usage=[{name: count for name, count in chunk["usage"].items() if count is not None} for chunk in chunks if chunk.get("usage")],
        names={(chunk["id"], chunk["object"], chunk["created"], chunk["model"]) for chunk in chunks},
        roles=sum("role" in choice.get("delta", {}) for choice in choices),
        done=events.count("[DONE]"),
        errors=[event["error"] for event in events if event != "[DONE]" and "error" in event],
    )


def assert_same(moved: Answer, undisturbed: Answer) -> None:
    """What its client cannot tell from an answer whose worker lived."""
    got, wanted = read(moved), read(undisturbed)
    assert moved.complete
    assert (got.text, got.finish, got.usage, got.done, got.errors) == (wanted.text, wanted.finish, wanted.usage, 1, [])
    assert got.roles == wanted.roles
    assert len(got.names) == 1
    assert {name[1:] for name in got.names} == {name[1:] for name in wanted.names}
    assert [
        choice["token_ids"] for event in moved.events() if event != "[DONE]" for choice in event["choices"] if choice.get("token_ids")
    ] == []


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("split", [False, True], ids=["words", "halves of characters"])
@pytest.mark.parametrize("stops", [False, True], ids=["without stops", "stops"])
async def test_stream_cut_after_any_token_goes_on_as_if_nothing_had_happened(stage: Stage, path: str, split: bool, stops: bool) -> None:
    one, two, _ = [await stage.add(split_utf8=split) for _ in range(3)]
    wish: dict[str, Any] = {"stream_options": {"include_usage": True}}
    undisturbed = await stage.ask(path, **wish)
    if stops:
        wish["stop"] = ["never said", read(undisturbed).text[-12:-6]]  # from within one word into another
        undisturbed = await stage.ask(path, **wish)
        assert read(undisturbed).finish == ["stop"]
    tokens = read(undisturbed).usage[0]["completion_tokens"]
    for after in range(tokens):
        for _ in range(4):
            assert (await stage.ask(path, max_tokens=1)).complete  # a worker that never succeeds would be left alone
        one.misbehave(Misbehaviour(mode=Mode.CUT, times=1, after_tokens=after))
        two.misbehave(Misbehaviour(mode=Mode.CUT, times=1, after_tokens=min(2, after)))
        for _ in range(3):
            assert_same(await stage.ask(path, **wish), undisturbed)
    counts = await stage.status()
    assert counts["moved"] > tokens
    assert counts["stuck"] == 0
