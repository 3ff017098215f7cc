"""A stream that loses its worker, as its client reads it: the same answer as without, or an error that says why not.

The front is real, on a real socket; workers are real gateways over stand-in engines, linked in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import structlog
import uvloop

from mesh.errors import EngineUnavailable
from mesh.link.link import IncomingStream
from mesh.records import ModelEntry
from proxy import moves
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
async def stage(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Stage]:
    with structlog.testing.capture_logs() as log:
        async with Front(MESH, tmp_path, routing="round-robin", **getattr(request, "param", {})) as front:
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


async def cut_short(stage: Stage, engine: FakeEngine, **body: Any) -> Answer:
    """An answer that this engine broke off after three tokens."""
    engine.misbehave(Misbehaviour(mode=Mode.CUT, times=1, after_tokens=3))
    failed = engine.stats.failed
    while True:  # until it is its turn
        answer = await stage.ask(**body)
        if engine.stats.failed > failed:
            return answer


def error_of(answer: Answer) -> tuple[str, str]:
    """Code and message of the error that ends a stream."""
    found = read(answer)
    assert not answer.complete, "never a clean end without finish_reason"
    assert (found.done, found.finish, len(found.errors)) == (0, [], 1)
    return found.errors[0]["code"], found.errors[0]["message"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"presence_penalty": 0.5}, "penalty"),
        ({"logprobs": True}, "log probabilities"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "grammar"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {}}]}]}, "images"),
        ({"min_tokens": 3}, "parameter"),
        ({"skip_special_tokens": False}, "special"),
    ],
)
async def test_stream_that_cannot_be_exact_says_so_in_band(stage: Stage, body: dict[str, Any], reason: str) -> None:
    engines = [await stage.add() for _ in range(2)]
    code, message = error_of(await cut_short(stage, engines[1], **body))
    assert code == "not_movable"
    assert "broke" in message or "failed" in message, "what happened"
    assert reason in message, "and why it could not move"
    assert sum(engine.stats.started for engine in engines) == 1
    assert await stage.status() == {"moved": 0, "stuck": 1, "tokens": 0}


async def test_stream_of_an_endpoint_moves_like_its_models(stage: Stage) -> None:
    one, _ = [await stage.add() for _ in range(2)]
    stage.front.endpoint("chat", model="m")
    undisturbed = await stage.ask(model="chat")
    assert_same(await cut_short(stage, one, model="chat"), undisturbed)
    assert (await stage.status())["moved"] == 1


async def test_client_that_asked_for_token_ids_gets_them_and_stays(stage: Stage) -> None:
    await stage.add()
    answer = await stage.ask(return_token_ids=True)
    ids = [token for event in answer.events()[:-1] for choice in event["choices"] for token in choice.get("token_ids") or ()]
    assert len(ids) == TOKENS
    assert answer.events()[0]["prompt_token_ids"]


async def test_client_sees_the_same_bytes_with_and_without_tracking(stage: Stage) -> None:
    tracked, plain = await stage.add(), await stage.add(token_ids=False)
    for path in (CHAT, COMPLETIONS):
        one, other = await stage.ask(path), await stage.ask(path)
        assert one.body == other.body
    assert [engine.stats.started for engine in (tracked, plain)] == [2, 2]
    assert tracked.stats.requests[0]["return_token_ids"] is True
    assert "return_token_ids" not in plain.stats.requests[0]


async def test_stream_of_an_engine_without_token_ids_says_so(stage: Stage) -> None:
    engines = [await stage.add(token_ids=False) for _ in range(2)]
    code, message = error_of(await cut_short(stage, engines[0]))
    assert (code, "token ids" in message) == ("not_movable", True)


async def test_only_a_worker_of_the_same_version_goes_on(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "WAIT_S", 0.2)
    other, one, unknown = await stage.add(digest="sha256:bb"), await stage.add(digest="sha256:aa"), await stage.add()
    code, message = error_of(await cut_short(stage, one))
    assert (code, "no other worker serves the same model" in message) == ("no_worker", True)
    assert (other.stats.started, unknown.stats.started) == (0, 0)
    same = await stage.add(digest="sha256:aa")
    assert read(await cut_short(stage, one)).done == 1
    assert same.stats.tokenized == 1


async def test_stream_waits_for_a_worker_that_comes_soon(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "WAIT_S", 60.0)
    one = await stage.add()
    undisturbed = await stage.ask()
    one.misbehave(Misbehaviour(mode=Mode.STALL, times=1, after_tokens=3))
    wire = await stage.begin()
    await wire.until(b"finish_reason")
    await one.until(lambda stats: stats.completion_tokens >= TOKENS + 3)
    stage.workers[0].lose()
    while stage.front.fleet.workers:
        await asyncio.sleep(0.01)
    await stage.add()
    assert_same(await wire.answer(), undisturbed)
    assert (await stage.status())["moved"] == 1


async def test_engine_that_was_started_again_takes_its_own_stream_back(stage: Stage) -> None:
    one = await stage.add()
    undisturbed = await stage.ask()
    assert_same(await cut_short(stage, one), undisturbed)
    assert (await stage.status())["moved"] == 1


async def test_worker_that_cannot_go_on_exactly_is_not_the_last_to_be_asked(stage: Stage) -> None:
    one, wrong, _ = await stage.add(), await stage.add(), await stage.add()
    undisturbed = await stage.ask()
    wrong.tokenizes_wrongly = True
    for _ in range(3):
        assert_same(await cut_short(stage, one), undisturbed)
    assert wrong.stats.tokenized > 0


async def test_nobody_who_could_go_on_exactly_is_told(stage: Stage) -> None:
    two, one = await stage.add(), await stage.add()
    two.tokenizes_wrongly = True
    code, message = error_of(await cut_short(stage, one))
    assert (code, "other tokens" in message) == ("not_resumed", True)
    health = [worker.health.standing for worker in stage.front.fleet.workers.values()]
    assert [str(standing) for standing in health] == ["trusted", "trusted"], "not being able to is no failure"


async def test_full_workers_are_passed_by(stage: Stage) -> None:
    one, full, _ = await stage.add(), await stage.add(), await stage.add()
    undisturbed = await stage.ask()
    full.misbehave(Misbehaviour(mode=Mode.STATUS, status=429))
    for _ in range(3):
        assert_same(await cut_short(stage, one), undisturbed)
    assert full.stats.failed > 0


@pytest.mark.parametrize("stage", [{"move_streams": False}], indirect=True)
async def test_setting_turns_it_off(stage: Stage) -> None:
    engines = [await stage.add() for _ in range(2)]
    code, _ = error_of(await cut_short(stage, engines[0]))
    assert code == "engine_unavailable"
    assert "return_token_ids" not in engines[0].stats.requests[0]


async def test_successor_that_begins_anew_is_not_believed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that does not know how to go on would start from the beginning: its client would read everything twice."""
    monkeypatch.setattr(moves, "WAIT_S", 0.2)

    async def anew(stream: IncomingStream, head: dict[str, Any]) -> None:
        await stream.read_body(max_bytes=1 << 20)
        stream.send_head({"status": 200, "type": "text/event-stream"})
        stream.send_now(b'data: {"choices":[{"index":0,"delta":{"content":"again"}}]}\n\n')

    async def headless(stream: IncomingStream, head: dict[str, Any]) -> None:
        await stream.read_body(max_bytes=1 << 20)
        stream.send_now(b'data: {"choices":[{"index":0,"delta":{"content":"again"}}]}\n\n')

    async def ended(stream: IncomingStream, head: dict[str, Any]) -> None:
        await stream.read_body(max_bytes=1 << 20)
        stream.end({})

    one = await stage.add()
    for serve in (anew, headless, ended):
        await stage.front.worker(serve, name=serve.__name__, models=(ModelEntry(name="m", tasks=("chat",)),))
    one.misbehave(Misbehaviour(mode=Mode.CUT, times=1, after_tokens=3))
    while not one.stats.failed:  # the others may have been the first to be asked
        wire = await stage.begin()
        await asyncio.wait({asyncio.ensure_future(wire.answer())}, timeout=1)
        wire.close()
    assert b"again" not in wire.got
    assert b"error" in wire.got


async def test_trail_of_a_hostile_worker_hurts_only_its_own_stream(stage: Stage) -> None:
    async def hostile(stream: IncomingStream, head: dict[str, Any]) -> None:
        await stream.read_body(max_bytes=1 << 20)
        stream.send_head({"status": 200, "type": "text/event-stream"})
        stream.send_tokens_now(
            bytes(rng.randrange(256) for _ in range(200)), b'data: {"id":"x","object":"y","created":1,"model":"m","choices":[]}\n\n'
        )
        stream.fail(EngineUnavailable("now you"))

    rng = random.Random(1)
    honest = await stage.add()
    undisturbed = await stage.ask()
    await stage.front.worker(hostile, name="hostile", models=(ModelEntry(name="m", tasks=("chat",)),))
    stuck = 0
    for _ in range(12):
        answer = await stage.ask()
        if answer.complete:
            assert_same(answer, undisturbed)
        else:
            assert error_of(answer)[0] == "not_resumed"
            stuck += 1
    assert stuck > 0
    assert honest.stats.failed == 0
    assert all(not worker.link.closed for worker in stage.workers)


async def test_moved_stream_is_logged_and_counted(stage: Stage) -> None:
    _, one = await stage.add(), await stage.add()
    await cut_short(stage, one)
    (line,) = [event for event in stage.log if event["event"] == "stream.moved"]
    assert (line["code"], line["tokens"], line["worker"] != line["to"]) == ("engine_unavailable", 3, True)
    text = stage.front.metrics.render().decode()
    assert 'infermesh_streams_moved_total{code="engine_unavailable"} 1.0' in text
    assert "infermesh_moved_tokens_total 3.0" in text
    assert await stage.status() == {"moved": 1, "stuck": 0, "tokens": 3}


async def test_client_that_leaves_while_its_stream_moves_leaves_nothing_behind(stage: Stage) -> None:
    one = await stage.add()
    one.misbehave(Misbehaviour(mode=Mode.CUT, times=1, after_tokens=3))
    wire = await stage.begin()
    await wire.until(b"finish_reason")
    await one.until(lambda stats: stats.failed == 1)
    wire.close()
    async with asyncio.timeout(10):
        await stage.front.inference.drained()
    assert one.stats.running == 0
