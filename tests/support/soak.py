"""Soaking: real processes under load and random faults, and an audit of every request.

What a client got is held against what the engines say (`tests.support.fake_engine` is deterministic, so every answer is known). Allowed are
the right answer, whole; and, if something that explains it was broken at the time or shortly before, a clear error: a status with OpenAI's
shape, or an error event in a stream whose text so far is the beginning of the right answer. Never allowed is anything else. A fault
explains only what it can do: no worker's death may be seen by a client, and a connection breaks only where its own proxy is killed or
restarted.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Set
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import openai

from tests.support.deployment import Deployment, Node
from tests.support.fake_engine import FakeEngine, Misbehaviour, Mode, answer_to
from tests.support.faults import TcpProxy, freeze, full_disk, thaw
from tests.support.processes import listening_ports

GRACE_S = 20.0
"""For so long after a fault is over it explains an error: a frozen node's requests, a worker that must come back."""
RUSH_CODES = {
    "overloaded",
    "no_worker",
    "worker_lost",
    "upstream_timeout",
    "engine_unavailable",
    "request_timeout",
    "no_room",
    "worker_error",
}
UNSEEN = frozenset({"kill_worker", "restart_worker", "kill_bootstrap", "slow_door"})
"""Faults that clients must not notice by themselves."""
PROXY_GONE = frozenset({"kill_proxy", "restart_proxy"})
"""Those of the second proxy, which alone end its clients' connections."""
MAX_TOKENS = 24
CLIENT_TIMEOUT_S = 60.0


@dataclass(slots=True)
class Got:
    """What one client got. ``text`` of the answer, or of the stream so far."""

    kind: str
    messages: list[dict[str, Any]]
    max_tokens: int
    began: float
    ended: float = 0.0
    status: int = 0
    text: str = ""
    finish: str = ""
    done: bool = False
    error: str = ""
    """The error's code, in the body or in an event."""
    broken: str = ""
    """How the connection ended, if not properly."""
    usage: int | None = None
    proxy: str = ""


def judge(got: Got, *, broken: Set[str]) -> tuple[str, str]:
    """What an outcome was, in a word, and why it is not to be explained, empty if it is. ``broken``: the faults at the time."""
    right = answer_to(got.messages, got.max_tokens)
    if got.kind == "bad":
        return ("refused", "") if got.status == 400 and got.error else judge_error(got, broken)
    if got.kind == "cancelled" and not got.error and not got.broken:
        return ("cancelled", "") if right.startswith(got.text) else ("cancelled", f"wrong text {got.text!r} of {right!r}")
    if got.text == right and got.done and not got.error and not got.broken:
        if got.finish != "length":
            return "ok", f"finish_reason {got.finish!r}"
        if got.kind in ("stream", "plain") and got.usage != got.max_tokens:
            return "ok", f"usage says {got.usage} of {got.max_tokens} tokens"
        return "ok", ""
    if not right.startswith(got.text):
        return "wrong", f"{got.text!r} instead of {right!r}"
    if got.done and not got.error:
        return "truncated", f"a clean end after {got.text!r} of {right!r}"
    return judge_error(got, broken)


def judge_error(got: Got, broken: Set[str]) -> tuple[str, str]:
    what = got.error or got.broken or f"status {got.status}"
    if not got.error and not got.broken:
        return "nothing", f"neither an answer nor an error: {got}"
    if got.error == "unavailable" and got.proxy == "p2" and "restart_proxy" in broken:
        return what, ""  # its drain would have waited for ever
    if got.error and got.error not in RUSH_CODES:
        return what, f"an error of no fault: {got.error} {got.status}"
    if "Timeout" in got.broken and "spoil_engine" in broken:
        return what, ""  # what an engine hangs on, it hangs on for ever
    if got.broken:
        return what, "" if broken & PROXY_GONE and got.proxy == "p2" else f"{what} while its proxy was well, beside {sorted(broken)}"
    return what, "" if broken - UNSEEN else f"{what} while nothing was broken but {sorted(broken)}"


class Soak:
    """The mesh, its faults and its clients. ``await run()`` returns the report."""

    def __init__(self, home: Path, *, seed: int, seconds: float, per_s: float, tell: Callable[[str], None]) -> None:
        self._rng = random.Random(seed)
        self._seconds = seconds
        self._per_s = per_s
        self._tell = tell
        self._home = home
        self._began = 0.0
        self._broken: dict[str, float] = {}
        """What is broken now: its name and since when."""
        self._mended: dict[str, float] = {}
        """What was broken last when."""
        self._over = False
        self.outcomes: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        """What clients were told, and what was broken then."""
        self.unexplained: list[str] = []
        self.memory: dict[str, tuple[int, int]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._numbers = 0
        self.clients: dict[str, openai.AsyncOpenAI] = {}
        self._former: list[openai.AsyncOpenAI] = []
        self._stack = AsyncExitStack()

    def broken_since(self, began: float) -> set[str]:
        """What was broken at any time since ``began``, or not long before."""
        return {*self._broken, *(name for name, ended in self._mended.items() if ended > began - GRACE_S)}

    async def run(self) -> dict[str, Any]:
        async with self._stack:
            await self._set_up()
            await self._calm(10.0)
            before = self._figures()
            self._began = time.monotonic()
            breaking = asyncio.create_task(self._break_things())
            progress = asyncio.create_task(self._progress())
            due = self._began
            warm: dict[str, tuple[int, int]] | None = None
            while (now := time.monotonic()) < self._began + self._seconds:
                if warm is None and now > self._began + self._seconds * 0.3:
                    warm = self._figures()
                self._spawn(self._one())
                due += self._rng.expovariate(self._per_s)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
            self._over = True  # a fault in the middle of which it ends would leave a node half restarted
            (ended,) = await asyncio.gather(breaking, return_exceptions=True)
            if ended is not None:
                self.unexplained.append(f"nothing was broken any more after: {ended!r}")
            await self._mend_all()
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=CLIENT_TIMEOUT_S + 30)
            for task in self._tasks:
                self.unexplained.append(f"a request that never ends: {task}")
                task.cancel()
            progress.cancel()
            await self._end_well()
            for client in (*self.clients.values(), *self._former):
                await client.close()
            await self.http.close()
            await self.mesh.http.close()
            await self._calm(8.0)
            self._audit_processes(before, warm or before, self._figures())
            return self.report()

    def report(self) -> dict[str, Any]:
        return {
            "seconds": round(time.monotonic() - self._began),
            "requests": sum(self.outcomes.values()),
            "outcomes": dict(self.outcomes.most_common()),
            "errors": {name: count for name, count in self.errors.most_common() if count},
            "faults": dict(self.faults),
            "memory_growth": {name: round(after / before - 1, 3) for name, (before, after) in self.memory.items()},
            "unexplained": self.unexplained,
        }

    # -- the mesh: b1, p1 and w1 live through it all; b2, p2, w2 and w3 are killed and come back

    async def _set_up(self) -> None:
        enter = self._stack.enter_async_context
        self.mesh = mesh = await enter(Deployment(self._home))
        self.engines = [await enter(FakeEngine(tokens_per_s=40)) for _ in range(3)]
        self.http = await enter(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=CLIENT_TIMEOUT_S)))
        self.doors = [await enter(TcpProxy(("127.0.0.1", 0))) for _ in range(2)]
        self.bootstraps = [await mesh.bootstrap("b1"), await mesh.bootstrap("b2", join=True)]
        self.proxies = [await self._start_proxy(number, fresh=True) for number in range(2)]
        self.workers = [await self._start_worker(number, fresh=True) for number in range(3)]
        self.key = mesh.key(ttl_s=7200)
        for proxy in self.proxies:
            await mesh.until_ready(proxy, *self.workers)
        for proxy in self.proxies:
            self._meet(proxy)

    def _meet(self, proxy: Node) -> None:
        if proxy.name in self.clients:
            self._former.append(self.clients[proxy.name])
        self.clients[proxy.name] = openai.AsyncOpenAI(base_url=proxy.api, api_key=self.key, max_retries=0, timeout=CLIENT_TIMEOUT_S)

    async def _start_proxy(self, number: int, *, fresh: bool) -> Node:
        """Its door for links is a `TcpProxy`; workers that dial out come through it."""
        door = self.doors[number]
        node = await self.mesh.proxy(f"p{number + 1}", "--advertise", door.address, fresh=fresh)
        api = int(node.api.rsplit(":", 1)[1].split("/")[0])
        (port,) = listening_ports(node.process.pid) - {api}
        door.target = ("127.0.0.1", port)
        return node

    async def _start_worker(self, number: int, *, fresh: bool) -> Node:
        outbound = ("--outbound",) if number == 1 else ()
        return await self.mesh.worker(
            f"w{number + 1}", "--engine", "external", "--engine-url", self.engines[number].url, *outbound, fresh=fresh
        )

    # -- faults

    async def _break_things(self) -> None:
        faults = [
            self._kill_worker,
            self._kill_worker,
            self._kill_proxy,
            self._restart_worker,
            self._restart_proxy,
            self._freeze_worker,
            self._freeze_proxy,
            self._blackhole,
            self._reset_links,
            self._kill_bootstrap,
            self._fill_disk,
            self._spoil_engine,
            self._slow_door,
        ]
        while not self._over:
            await asyncio.sleep(self._rng.uniform(1.0, 5.0))
            fault = self._rng.choice(faults)
            name = fault.__name__.strip("_")
            self.faults[name] += 1
            self._broken[name] = time.monotonic()
            try:
                await fault()
            finally:
                self._broken.pop(name, None)
                self._mended[name] = time.monotonic()

    async def _kill_worker(self) -> None:
        number = self._rng.choice((1, 2))
        await self.workers[number].kill()
        await asyncio.sleep(self._rng.uniform(0.0, 4.0))
        self.workers[number] = await self._start_worker(number, fresh=False)
        await self._until_serving()

    async def _restart_worker(self) -> None:
        number = self._rng.choice((1, 2))
        code = await self.workers[number].terminate()
        if code != 0:
            self.unexplained.append(f"{self.workers[number].name} ended with {code} when told to stop:\n{self.workers[number].tail(10)}")
        self.workers[number] = await self._start_worker(number, fresh=False)
        await self._until_serving()

    async def _kill_proxy(self) -> None:
        await self.proxies[1].kill()
        await asyncio.sleep(self._rng.uniform(0.0, 2.0))
        self.proxies[1] = await self._start_proxy(1, fresh=False)
        self._meet(self.proxies[1])
        await self._until_serving()

    async def _restart_proxy(self) -> None:
        code = await self.proxies[1].terminate()
        if code != 0:
            self.unexplained.append(f"p2 ended with {code} when told to stop:\n{self.proxies[1].tail(10)}")
        self.proxies[1] = await self._start_proxy(1, fresh=False)
        self._meet(self.proxies[1])
        await self._until_serving()

    async def _kill_bootstrap(self) -> None:
        node = self.bootstraps[1]
        port = node.about["addresses"][0].rsplit(":", 1)[1]
        await node.kill()
        await asyncio.sleep(self._rng.uniform(0.0, 4.0))
        self.bootstraps[1] = await self.mesh._start(node.role, "b2", ("--port", port), "")

    async def _freeze(self, node: Node) -> None:
        freeze(node.process.pid)
        try:
            await asyncio.sleep(self._rng.uniform(0.5, 8.0))
        finally:
            thaw(node.process.pid)

    async def _freeze_worker(self) -> None:
        await self._freeze(self._rng.choice(self.workers))

    async def _freeze_proxy(self) -> None:
        await self._freeze(self._rng.choice(self.proxies))

    async def _blackhole(self) -> None:
        door = self._rng.choice(self.doors)
        door.blackhole()
        try:
            await asyncio.sleep(self._rng.uniform(0.5, 8.0))
        finally:
            door.blackhole(False)
            door.reset()  # what was held must not come through minutes later, as no network would bring it

    async def _slow_door(self) -> None:
        door = self._rng.choice(self.doors)
        door.faults.latency_s, door.faults.jitter_s = 0.05, 0.2
        try:
            await asyncio.sleep(self._rng.uniform(1.0, 6.0))
        finally:
            door.faults.latency_s = door.faults.jitter_s = 0.0

    async def _reset_links(self) -> None:
        self._rng.choice(self.doors).reset()

    async def _fill_disk(self) -> None:
        with full_disk(self._rng.choice([*self.workers, *self.proxies, *self.bootstraps]).process.pid):
            await asyncio.sleep(self._rng.uniform(1.0, 6.0))

    async def _spoil_engine(self) -> None:
        engine = self._rng.choice(self.engines)
        mode = self._rng.choice(
            (Mode.STATUS, Mode.CUT, Mode.END, Mode.ERROR_EVENT, Mode.GARBAGE, Mode.DRIBBLE, Mode.HANG, Mode.STALL, Mode.SLOW)
        )
        engine.misbehave(Misbehaviour(mode=mode, after_tokens=self._rng.randrange(5)))
        try:
            await asyncio.sleep(self._rng.uniform(0.5, 4.0))
        finally:
            engine.misbehave(None)

    async def _until_serving(self) -> None:
        """A fault is over once every proxy has every worker again."""
        for proxy in self.proxies:
            with suppress(AssertionError, aiohttp.ClientError, TimeoutError):
                await asyncio.wait_for(self.mesh.until_ready(proxy, *self.workers), 30)

    async def _mend_all(self) -> None:
        for node in [*self.workers, *self.proxies, *self.bootstraps]:
            with suppress(ProcessLookupError):
                thaw(node.process.pid)
        for door in self.doors:
            door.blackhole(False)
        for engine in self.engines:
            engine.misbehave(None)
        self._mended |= dict.fromkeys(self._broken, time.monotonic())
        self._broken.clear()

    async def _end_well(self) -> None:
        """With nothing broken any more, everybody serves everything within a minute, and a last round of requests succeeds."""
        try:
            for number, node in enumerate(self.workers):
                if node.process.returncode is not None:
                    self.workers[number] = await self._start_worker(number, fresh=False)
            if self.proxies[1].process.returncode is not None:
                self.proxies[1] = await self._start_proxy(1, fresh=False)
                self._meet(self.proxies[1])
            for proxy in self.proxies:
                await asyncio.wait_for(self.mesh.until_ready(proxy, *self.workers), 60)
        except (AssertionError, TimeoutError, aiohttp.ClientError) as error:
            self.unexplained.append(f"not well a minute after the last fault: {error}")
            return
        await asyncio.sleep(GRACE_S)
        await asyncio.gather(*(self._one(kind="stream" if number % 2 else "plain") for number in range(60)))

    # -- clients

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _one(self, kind: str = "") -> None:
        self._numbers += 1
        rng = random.Random(self._rng.random())
        kind = kind or rng.choices(("stream", "plain", "cancelled", "slow", "bad"), weights=(40, 30, 10, 10, 10))[0]
        messages = [{"role": "user", "content": f"request {self._numbers} " + "word " * rng.choice((0, 5, 300))}]
        got = Got(kind=kind, messages=messages, max_tokens=rng.randint(1, MAX_TOKENS), began=time.monotonic())
        proxy = rng.choice(self.proxies)
        got.proxy = proxy.name
        try:
            await getattr(self, f"_ask_{kind}")(got, proxy, rng)
        except (openai.APIConnectionError, openai.APITimeoutError, aiohttp.ClientError, OSError, TimeoutError) as error:
            got.broken = type(error).__name__
        except openai.APIStatusError as error:
            got.status, got.error = error.status_code, _code(error.body)
        except openai.APIError as error:  # an error event in a stream
            got.error = str(error.code or _code(error.body))
        except Exception as error:
            self.unexplained.append(f"{kind} request {self._numbers}: the client library raised {error!r}")
            return
        got.ended = time.monotonic()
        broken = self.broken_since(got.began)
        what, why = judge(got, broken=broken)
        self.outcomes[f"{kind}: {what}"] += 1
        if got.error or got.broken:
            self.errors[f"{what} over {proxy.name}, {', '.join(sorted(broken))}"] += kind != "bad"
        if why:
            self.unexplained.append(f"at {got.began - self._began:.1f} s, {kind} over {proxy.name}: {why}")

    async def _ask_stream(self, got: Got, proxy: Node, rng: random.Random) -> None:
        stream = await self.clients[proxy.name].chat.completions.create(
            model="fake",
            messages=got.messages,
            max_tokens=got.max_tokens,
            stream=True,
            stream_options={"include_usage": True},  # type: ignore[arg-type]
        )
        async with stream:
            async for chunk in stream:
                for choice in chunk.choices:
                    got.text += choice.delta.content or ""
                    got.finish = choice.finish_reason or got.finish
                if chunk.usage is not None:
                    got.usage = chunk.usage.completion_tokens
        got.done = True

    async def _ask_plain(self, got: Got, proxy: Node, rng: random.Random) -> None:
        answer = await self.clients[proxy.name].chat.completions.create(
            model="fake",
            messages=got.messages,
            max_tokens=got.max_tokens,  # type: ignore[arg-type]
        )
        got.text, got.finish = answer.choices[0].message.content or "", answer.choices[0].finish_reason
        got.usage, got.done = answer.usage.completion_tokens if answer.usage else None, True

    async def _ask_cancelled(self, got: Got, proxy: Node, rng: random.Random) -> None:
        left = rng.randrange(6)
        stream = await self.clients[proxy.name].chat.completions.create(
            model="fake",
            messages=got.messages,
            max_tokens=got.max_tokens,
            stream=True,  # type: ignore[arg-type]
        )
        async with stream:
            async for chunk in stream:
                got.text += chunk.choices[0].delta.content or "" if chunk.choices else ""
                left -= 1
                if left < 0:
                    return

    async def _ask_slow(self, got: Got, proxy: Node, rng: random.Random) -> None:
        """Sends slowly, reads slowly."""
        body = json.dumps({"model": "fake", "messages": got.messages, "max_tokens": got.max_tokens, "stream": True}).encode()

        async def pieces() -> Any:
            for at in range(0, len(body), 40):
                yield body[at : at + 40]
                await asyncio.sleep(rng.uniform(0, 0.05))

        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        async with self.http.post(f"{proxy.api}/chat/completions", data=pieces(), headers=headers) as response:
            got.status = response.status
            if response.status != 200:
                got.error = _code(await response.json())
                return
            rest = b""
            async for piece in response.content.iter_chunked(200):
                rest += piece
                await asyncio.sleep(rng.uniform(0, 0.02))
                *events, rest = rest.replace(b"\r\n", b"\n").split(b"\n\n")
                for event in events:
                    lines = [line for line in event.split(b"\n") if line.startswith(b"data:")]  # an engine may put comments between
                    self._take_event(got, b"\n".join(line[5:].strip() for line in lines))

    def _take_event(self, got: Got, data: bytes) -> None:
        if got.done and data:
            got.error = f"{data[:40]!r} after the end"
        elif data == b"[DONE]":
            got.done = True
        elif data:
            event = json.loads(data)
            if "error" in event:
                got.error = _code(event)
            for choice in event.get("choices", ()):
                got.text += choice["delta"].get("content") or ""
                got.finish = choice.get("finish_reason") or got.finish

    async def _ask_bad(self, got: Got, proxy: Node, rng: random.Random) -> None:
        body = rng.choice((b"{", b'{"model": "fake"}', b'{"model": "fake", "model": "x", "messages": [1]}', b"\xff" * 100, b"[" * 10_000))
        headers = {"Authorization": f"Bearer {self.key}"}
        async with self.http.post(f"{proxy.api}/chat/completions", data=body, headers=headers) as response:
            got.status, got.error = response.status, _code(await response.json())

    # -- watching

    async def _calm(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def _progress(self) -> None:
        while True:
            await asyncio.sleep(10.0)
            elapsed = time.monotonic() - self._began
            ok = sum(count for name, count in self.outcomes.items() if name.endswith(": ok"))
            total = sum(self.outcomes.values())
            now = ", ".join(self._broken) or "nothing broken"
            faults, unexplained = sum(self.faults.values()), len(self.unexplained)
            self._tell(f"{elapsed:.0f} s: {total} requests, {ok} ok, {unexplained} unexplained, {faults} faults; {now}")

    def _figures(self) -> dict[str, tuple[int, int]]:
        """By name and pid of each node: resident bytes, open file descriptors."""
        found = {}
        for node in [*self.bootstraps, *self.proxies, *self.workers]:
            with suppress(OSError):
                pages = int(Path(f"/proc/{node.process.pid}/statm").read_text().split()[1])
                found[f"{node.name}/{node.process.pid}"] = (
                    pages * os.sysconf("SC_PAGE_SIZE"),
                    len(os.listdir(f"/proc/{node.process.pid}/fd")),
                )
        return found

    def _audit_processes(
        self, before: dict[str, tuple[int, int]], warm: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]
    ) -> None:
        for name, (memory, files) in after.items():
            if name in warm:
                self.memory[name] = (warm[name][0], memory)
                if memory > warm[name][0] * 1.05 + (4 << 20):
                    self.unexplained.append(f"{name} grew from {warm[name][0] >> 20} to {memory >> 20} MiB after its warm-up")
            if name in before and files > before[name][1] + 12:
                self.unexplained.append(f"{name} had {before[name][1]} files open and has {files}")
        for node in [*self.bootstraps, *self.proxies, *self.workers]:
            for line in node.log.read_text(errors="replace").splitlines():
                if any(word in line for word in ("task.unhandled", "request.crashed", "http.failed", "node.crashed", "Traceback")):
                    self.unexplained.append(f"{node.name}: {line[:300]}")


def _code(body: Any) -> str:
    found = body.get("error", body) if isinstance(body, dict) else None
    return str((found.get("code") if isinstance(found, dict) else found) or "")
