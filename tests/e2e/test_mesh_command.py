"""The mesh command as a user runs it: against a stand-in API that may misbehave, and `mesh up` with real processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from click.testing import CliRunner

from mesh.cli import main
from mesh.runtime import process_start
from tests.support.fake_engine import FakeEngine
from tests.support.processes import gone

KEY = "im_" + "k" * 40


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


async def ask(home: Path, *arguments: str, stdin: str = "", **environ: str) -> Done:
    """Run one `mesh` command in a thread of this process: for those that only talk to an API."""
    runner = CliRunner(env=dict.fromkeys(("MESH_API_KEY", "MESH_URL")) | {"MESH_HOME": str(home)} | environ)
    result = await asyncio.to_thread(runner.invoke, main, arguments, input=stdin)
    if result.exc_info is not None and not isinstance(result.exception, SystemExit | None):
        raise result.exception
    return Done(result.exit_code, result.stdout, result.stderr)


async def mesh(home: Path, *arguments: str, stdin: str = "", **environ: str) -> Done:
    """Run one `mesh` command to its end, as a process."""
    process = await start(home, *arguments, **environ)
    out, err = await asyncio.wait_for(process.communicate(stdin.encode()), 170)
    return Done(process.returncode or 0, out.decode(), err.decode())


async def start(home: Path, *arguments: str, **environ: str) -> asyncio.subprocess.Process:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MESH_")}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from mesh.cli import main; main(prog_name='mesh')", *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=kept | {"MESH_HOME": str(home)} | environ,
    )


# -- against a stand-in API


@dataclass
class StandIn:
    """An API that answers what the test puts into ``answers`` by path, and notes what it was asked."""

    url: str = ""
    answers: dict[str, Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]] = field(default_factory=dict)
    keys: list[str | None] = field(default_factory=list)
    bodies: list[Any] = field(default_factory=list)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.keys.append(request.headers.get("authorization"))
        if request.can_read_body:
            self.bodies.append(await request.json())
        return await self.answers[request.path](request)

    def says(self, path: str, value: Any, status: int = 200, **headers: str) -> None:
        async def answer(_request: web.BaseRequest) -> web.StreamResponse:
            return web.json_response(value, status=status, headers=headers)

        self.answers[path] = answer

    def streams(self, *pieces: bytes, abort: bool = False) -> None:
        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            response = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await response.prepare(request)
            for piece in pieces:
                await response.write(piece)
            if abort and request.transport is not None:
                request.transport.abort()
            return response

        self.answers["/v1/chat/completions"] = answer


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[StandIn]:
    stand_in = StandIn()
    stand_in.says("/v1/models", {"data": [{"id": "m"}]})
    front = web.Server(stand_in.handle)
    server = await asyncio.get_running_loop().create_server(front, "127.0.0.1", 0)
    stand_in.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    done = await ask(tmp_path, "init", "--url", f"{stand_in.url}/v1", "--api-key", KEY)
    assert done.code == 0
    yield stand_in
    server.close()
    await front.shutdown(1.0)


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def token(text: str, finish: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": finish}])


DONE = b"data: [DONE]\n\n"


async def test_chat_streams_the_answer_of_the_only_model(api: StandIn, tmp_path: Path) -> None:
    api.streams(token("Hel"), token("lo"), token("", "stop"), DONE)
    done = await ask(tmp_path, "chat", "--stream", "Say", "hello")
    assert (done.code, done.out, done.err) == (0, "Hello\n", "")
    assert api.bodies[0]["model"] == "m"
    assert api.bodies[0]["messages"] == [{"role": "user", "content": "Say hello"}]
    assert set(api.keys) == {f"Bearer {KEY}"}


async def test_tokens_are_printed_as_they_come(api: StandIn, tmp_path: Path) -> None:
    seen = asyncio.Event()

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(token("first"))
        await seen.wait()
        await response.write(token(" second") + DONE)
        return response

    api.answers["/v1/chat/completions"] = answer
    process = await start(tmp_path, "chat", "--stream", "--model", "m", "x")
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readexactly(5), 60) == b"first"
    seen.set()
    assert await process.stdout.read() == b" second\n"
    assert await process.wait() == 0


async def test_chat_without_streaming_prints_the_whole_answer(api: StandIn, tmp_path: Path) -> None:
    api.says("/v1/chat/completions", {"choices": [{"message": {"content": "Hi \x1b[31mthere"}}]})
    done = await ask(tmp_path, "chat", "--no-stream", stdin="Say hello\n")
    assert (done.code, done.out) == (0, "Hi \\x1b[31mthere\n")
    assert api.bodies[0]["messages"][-1]["content"] == "Say hello"
    assert "stream" not in api.bodies[0]


async def test_chat_passes_options_on(api: StandIn, tmp_path: Path) -> None:
    api.says("/v1/chat/completions", {"choices": [{"message": {"content": "x"}}]})
    options = ("--system", "Be brief", "--max-tokens", "5", "--temperature", "0")
    assert (await ask(tmp_path, "chat", "--no-stream", "--model", "other", *options, "x")).code == 0
    body = api.bodies[0]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("other", 5, 0.0)
    assert body["messages"][0] == {"role": "system", "content": "Be brief"}


async def test_json_of_a_stream_is_one_object_with_usage(api: StandIn, tmp_path: Path) -> None:
    api.streams(token("Hel"), token("lo", "length"), event(choices=[], usage={"total_tokens": 9}), DONE)
    done = await ask(tmp_path, "chat", "--stream", "--json", "x")
    assert done.json == {"model": "m", "content": "Hello", "finish_reason": "length", "usage": {"total_tokens": 9}}


async def test_conversation_on_a_terminal_remembers_what_was_said(api: StandIn, tmp_path: Path) -> None:
    api.streams(token("Fine"), DONE)
    ours, theirs = os.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from mesh.cli import main; main()", "chat"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"MESH_HOME": str(tmp_path), "TERM": "dumb"},
    )
    os.close(theirs)
    for line in (b"How are you?\n", b"And now?\n", b"\n"):
        os.write(ours, line)
    shown = await asyncio.to_thread(read_terminal, ours)
    assert await process.wait() == 0
    assert shown.count("Fine") == 2
    assert [message["content"] for message in api.bodies[-1]["messages"]] == ["How are you?", "Fine", "And now?"]


def read_terminal(descriptor: int) -> str:
    """All that is shown until the last process on it ends."""
    shown = b""
    try:
        while piece := os.read(descriptor, 4096):
            shown += piece
    except OSError:  # the other end is closed
        pass
    finally:
        os.close(descriptor)
    return shown.decode()


@pytest.mark.parametrize(
    ("pieces", "abort", "said"),
    [
        ([token("Hel")], False, "broke off without its end mark"),
        ([token("Hel")], True, "broke"),
        ([token("Hel"), event(error={"message": "the worker died", "code": "worker_lost"})], False, "the worker died"),
        ([token("Hel"), b"data: nonsense\n\n"], False, "not a JSON object"),
        ([b"data: [1]\n\n"], False, "not a JSON object"),
        ([b"<html>"], False, "without its end mark"),
        ([], False, "without its end mark"),
    ],
    ids=["clean end", "reset", "error event", "not json", "array", "html", "nothing"],
)
async def test_stream_that_does_not_end_well_never_looks_finished(
    api: StandIn, tmp_path: Path, pieces: list[bytes], abort: bool, said: str
) -> None:
    api.streams(*pieces, abort=abort)
    done = await ask(tmp_path, "chat", "--stream", "x")
    assert done.code == 1
    assert said in done.err
    assert done.err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("status", "code", "hint"),
    [
        (401, "invalid_api_key", "mesh key create"),
        (403, "key_not_allowed", "mesh key inspect"),
        (404, "model_not_found", "mesh models"),
        (429, "rate_limit_exceeded", "wait"),
        (503, "no_worker", "mesh workers"),
    ],
)
async def test_refusal_says_why_what_to_do_next_and_which_request(api: StandIn, tmp_path: Path, status: int, code: str, hint: str) -> None:
    api.says("/v1/chat/completions", {"error": {"message": "No.", "code": code}}, status, **{"x-request-id": "r-1"})
    for streaming in ("--stream", "--no-stream"):
        done = await ask(tmp_path, "chat", streaming, "x")
        assert (done.code, done.out) == (1, "")
        assert len(done.err.splitlines()) == 1
        for part in (str(status), code, "No", hint, "r-1"):
            assert part in done.err
        assert KEY not in done.err


@pytest.mark.parametrize(("body", "status"), [(b"<html>", 200), (b"[]", 200), (b"", 502), (b"[" * 50_000, 200)])
async def test_answer_of_something_else_is_one_clear_error(api: StandIn, tmp_path: Path, body: bytes, status: int) -> None:
    async def answer(_request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=body, status=status)

    api.answers["/v1/models"] = answer
    done = await ask(tmp_path, "models")
    assert done.code == 1
    assert len(done.err.splitlines()) == 1


async def test_key_is_not_carried_to_where_a_redirect_points(api: StandIn, tmp_path: Path) -> None:
    async def answer(_request: web.BaseRequest) -> web.StreamResponse:
        raise web.HTTPFound(f"{api.url}/elsewhere")

    api.answers["/v1/models"] = answer
    assert (await ask(tmp_path, "models")).code == 1
    assert len(api.keys) == 1


async def test_key_comes_from_flag_then_environment_then_store(api: StandIn, tmp_path: Path) -> None:
    await ask(tmp_path, "models")
    await ask(tmp_path, "models", MESH_API_KEY="im_environ")
    await ask(tmp_path, "models", "--api-key", "im_flag", MESH_API_KEY="im_environ")
    assert api.keys == [f"Bearer {KEY}", "Bearer im_environ", "Bearer im_flag"]


async def test_nobody_listening_is_told_with_what_to_do(tmp_path: Path) -> None:
    done = await ask(tmp_path, "models", "--url", "http://127.0.0.1:1", "--api-key", KEY)
    assert done.code == 1
    assert "connection refused" in done.err
    assert "mesh up" in done.err


async def test_which_model_is_asked_when_there_are_several(api: StandIn, tmp_path: Path) -> None:
    api.says("/v1/models", {"data": [{"id": "a"}, {"id": "b"}]})
    done = await ask(tmp_path, "chat", "x")
    assert done.code == 2
    assert "--model a | b" in done.err


async def test_workers_and_status_of_any_shape_are_shown_without_a_crash(api: StandIn, tmp_path: Path) -> None:
    worker = {"id": "ab" * 32, "state": "ready", "models": ["m"], "kv_use": 0.5, "linked": True, "reason": "\x1b[2J[red]x"}
    shapes: list[Any] = [[worker, {}, {"id": 5, "models": "x", "kv_use": "?"}, "nonsense"], None, {}]
    for workers in shapes:
        api.says("/mesh/v1/workers", {"workers": workers})
        api.says("/mesh/v1/status", {"workers": workers, "mesh": "lab", "proxies": [{"id": None}, 3], "directory": {"a": [1]}})
        for command in ("workers", "status"):
            done = await ask(tmp_path, command)
            assert (done.code, bool(done.err)) == (0, workers is not shapes[0])
            assert "\x1b" not in done.out
            assert ("50%" in done.out) == (workers is shapes[0])


async def test_doctor_says_what_to_do_and_fails_when_something_does(api: StandIn, tmp_path: Path) -> None:
    fine = {"severity": "ok", "check": "clock", "what": "clocks agree", "detail": "", "advice": ""}
    bad = {"severity": "fail", "check": "bootstraps", "what": "nobody answers", "detail": "b:1 \x1b[2J[red]", "advice": "start one"}
    for worst, findings, code in (("ok", [fine], 0), ("warn", [fine], 0), ("fail", [bad, fine], 1)):
        api.says("/mesh/v1/doctor", {"worst": worst, "findings": findings})
        done = await ask(tmp_path, "doctor")
        assert done.code == code
        assert ("FAIL" in done.out and "→ start one" in done.out) == (worst == "fail")
        assert "\x1b" not in done.out
        assert (await ask(tmp_path, "doctor", "--json")).json["worst"] == worst


async def test_directory_answers_of_any_shape_are_shown_without_a_crash(api: StandIn, tmp_path: Path) -> None:
    odd: list[Any] = [{}, "nonsense", {"id": 5, "name": "\x1b[2J", "took_s": "x", "asked_s": None, "holders": "y", "order": 3, "age_s": []}]
    for items in (odd, None, {}):
        api.says("/mesh/v1/peers", {"peers": items})
        api.says("/mesh/v1/lookup", {"path": items, "holders": items, "records": items, "nodes": [1]})
        api.says("/mesh/v1/doctor", {"findings": items})
        for command, code in ((("peers",), 0), (("lookup", "m"), 0), (("doctor",), 1)):
            done = await ask(tmp_path, *command)
            assert done.code == code
            assert "\x1b" not in done.out


# -- mesh up


async def up(home: Path, *arguments: str) -> Done:
    return await mesh(home, "up", "--port", "0", *arguments)


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    async with FakeEngine(tokens_per_s=1000) as fake:
        yield fake


def external(engine: FakeEngine) -> tuple[str, ...]:
    return ("--engine", "external", "--engine-url", engine.url, "--model", "fake")


def check_running(node: dict[str, Any]) -> None:
    assert process_start(node["pid"]) is not None
    assert len(node["id"]) == 64
    assert Path(node["log"]).exists()


async def test_detached_mesh_is_told_in_one_object_answers_and_goes_down(engine: FakeEngine, tmp_path: Path) -> None:
    done = await up(tmp_path, *external(engine), "--workers", "2", "--detach", "--json")
    try:
        assert done.code == 0, done.err
        told = done.json
        assert [node["role"] for node in told["nodes"]] == ["bootstrap", "proxy", "worker", "worker"]
        assert told["models"] == ["fake"]
        for node in told["nodes"]:
            check_running(node)
        headers = {"authorization": f"Bearer {told['api_key']}"}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.get(f"{told['base_url']}/models") as response,
        ):
            assert [entry["id"] for entry in (await response.json())["data"]] == ["fake"]
        asked = await mesh(tmp_path, "chat", "--stream", "hello")
        assert (asked.code, bool(asked.out.strip())) == (0, True)
        listed = await mesh(tmp_path, "workers", "--json")
        assert {item["id"] for item in listed.json["workers"]} == {node["id"] for node in told["nodes"][2:]}
        assert "local" in (await mesh(tmp_path, "status")).out

        again = await up(tmp_path, *external(engine), "--detach")
        assert again.code == 1
        assert "already running" in again.err
    finally:
        down = await mesh(tmp_path, "down", "--json")
    assert [item["outcome"] for item in down.json["stopped"]] == ["stopped"] * 4
    assert all(process_start(node["pid"]) is None for node in told["nodes"])
    assert (await mesh(tmp_path, "down", "--json")).json == {"stopped": []}


async def test_second_start_in_the_same_home_keeps_mesh_key_and_node_ids(engine: FakeEngine, tmp_path: Path) -> None:
    told = []
    for _ in range(2):
        done = await up(tmp_path, *external(engine), "--detach", "--json")
        await mesh(tmp_path, "down")
        assert done.code == 0, done.err
        told.append(done.json)
    assert told[0]["api_key"] == told[1]["api_key"]
    assert [node["id"] for node in told[0]["nodes"]] == [node["id"] for node in told[1]["nodes"]]


async def test_killed_node_is_said_to_be_gone_and_the_rest_is_stopped(engine: FakeEngine, tmp_path: Path) -> None:
    done = await up(tmp_path, *external(engine), "--detach", "--json")
    worker = done.json["nodes"][-1]["pid"]
    os.kill(worker, signal.SIGKILL)
    await gone(worker)
    down = await mesh(tmp_path, "down", "--json")
    assert {item["name"]: item["outcome"] for item in down.json["stopped"]} == {
        "worker-1": "gone",
        "proxy": "stopped",
        "bootstrap": "stopped",
    }


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_mesh_in_the_foreground_ends_with_everything_it_started(engine: FakeEngine, tmp_path: Path, number: signal.Signals) -> None:
    process = await start(tmp_path, "up", "--port", "0", *external(engine), "--json")
    assert process.stdout is not None
    nodes = json.loads(await asyncio.wait_for(process.stdout.readline(), 120))["nodes"]
    process.send_signal(number)
    _out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, err.decode()
    assert all(process_start(node["pid"]) is None for node in nodes)
    assert not (tmp_path / "up.json").exists()


async def test_mesh_that_cannot_start_shows_the_log_and_leaves_nothing(tmp_path: Path) -> None:
    done = await up(tmp_path, "--engine", "llamacpp", "--model", str(tmp_path / "missing.gguf"), "--detach")
    assert done.code == 1
    assert "missing.gguf" in done.err
    assert "worker" in done.err
    assert not (tmp_path / "up.json").exists()


async def test_busy_port_is_told_before_anything_is_started(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = await mesh(tmp_path, "up", "--port", str(port), "--detach")
    assert done.code == 1
    assert f"port {port}" in done.err
    assert not (tmp_path / "logs").exists()


async def test_settings_for_another_mesh_are_kept_aside(engine: FakeEngine, tmp_path: Path) -> None:
    await mesh(tmp_path, "init", "--url", "http://production.example", "--api-key", KEY)
    done = await up(tmp_path, *external(engine), "--detach")
    await mesh(tmp_path, "down")
    assert done.code == 0, done.err
    assert KEY in (tmp_path / "client.toml.before-up").read_text()
    assert KEY not in (tmp_path / "client.toml").read_text()


async def test_printed_lines_can_be_pasted(engine: FakeEngine, tmp_path: Path) -> None:
    done = await up(tmp_path, *external(engine), "--detach")
    try:
        lines = [line for line in done.out.splitlines() if line.startswith(("curl ", "python -c "))]
        assert len(lines) == 2
        for line in lines:
            folder = Path(sys.executable).parent
            process = await asyncio.create_subprocess_shell(
                line,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"},
            )
            out, err = await asyncio.wait_for(process.communicate(), 60)
            assert process.returncode == 0, err.decode()
            assert out.strip()
    finally:
        await mesh(tmp_path, "down")


async def test_default_mesh_answers_with_the_real_model(tmp_path: Path) -> None:
    done = await up(tmp_path, "--detach", "--json")
    try:
        assert done.code == 0, done.err
        assert done.json["models"] == ["smollm2-135m-instruct"]
        asked = await mesh(tmp_path, "chat", "--stream", "--json", "--temperature", "0", "--max-tokens", "16", "What is two plus two?")
        assert asked.json["usage"]["completion_tokens"] > 1
        assert asked.json["content"].strip()
    finally:
        await mesh(tmp_path, "down")
