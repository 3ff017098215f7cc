"""A mesh of real processes for end-to-end tests: every node as a user starts it, on loopback, with ports the system chose.

async with Deployment(tmp_path) as mesh:
    await mesh.bootstrap("b1")
    worker = await mesh.worker("w1", "--engine", "external", "--engine-url", engine.url)
    proxy = await mesh.proxy("p1")
    await mesh.until_ready(proxy, "fake")
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

from mesh.apikey import ApiKey
from mesh.authority import Authority, create_mesh
from mesh.runtime import read_announced
from mesh.trust import Role
from tests.support.nursery import Child, Nursery

START_S = 60.0
PATIENCE_S = 90.0


@dataclass
class Node:
    """One running node process. ``about`` is its node.json."""

    role: Role
    name: str
    process: asyncio.subprocess.Process | Child
    state_dir: Path
    log: Path
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return str(self.about["id"])

    @property
    def api(self) -> str:
        """A proxy's base URL, as given to OpenAI clients."""
        return str(self.about["api"])

    @property
    def root(self) -> str:
        return self.api.removesuffix("/v1")

    def refresh(self) -> dict[str, Any]:
        self.about = read_announced(self.state_dir) or self.about
        return self.about

    async def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self.process.kill()
        await self.process.wait()

    async def terminate(self) -> int:
        """SIGTERM; returns the exit code."""
        if self.process.returncode is None:
            self.process.terminate()
        return await asyncio.wait_for(self.process.wait(), 60)

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


class Deployment:
    """A mesh in ``home``. Its operator's folder is made at once; nodes are started one by one, or forked by a ``nursery``."""

    def __init__(self, home: Path, *, authority: Authority | None = None, nursery: Nursery | None = None) -> None:
        self.home = home
        self._nursery = nursery
        self.authority = authority or create_mesh(home / "mesh", name="e2e", now=time.time())
        self.nodes: list[Node] = []
        self.bootstraps: list[str] = []
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Deployment:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._session is not None:
            await self._session.close()
        for node in self.nodes:
            if node.process.returncode is None:
                node.process.send_signal(signal.SIGKILL if error else signal.SIGTERM)
        for node in self.nodes:
            try:
                await asyncio.wait_for(node.process.wait(), 40)
            except TimeoutError:
                node.process.kill()
                await node.process.wait()
        if error is not None:
            for node in self.nodes:
                print(f"--- {node.name}\n{node.tail()}", file=sys.stderr)

    @property
    def http(self) -> aiohttp.ClientSession:
        assert self._session is not None
        return self._session

    # -- nodes

    async def bootstrap(self, name: str = "b1", *arguments: str, join: bool = False) -> Node:
        token = self.invite(Role.BOOTSTRAP) if join else ""
        node = await self._start(Role.BOOTSTRAP, name, ("--port", "0", *arguments), token)
        self.bootstraps += [address for address in node.about["addresses"] if address not in self.bootstraps]
        return node

    async def proxy(self, name: str = "p1", *arguments: str, fresh: bool = True, uses: int = 1, program: Path | None = None) -> Node:
        """``program``: a script in the place of `mesh-proxy`."""
        token = self.invite(Role.PROXY, uses=uses) if fresh else ""
        return await self._start(Role.PROXY, name, ("--port", "0", *arguments), token, program=program)

    async def worker(self, name: str, *arguments: str, fresh: bool = True, wait: bool = True) -> Node:
        return await self._start(Role.WORKER, name, arguments, self.invite(Role.WORKER) if fresh else "", wait=wait)

    def invite(self, role: Role, *, ttl_s: float = 600, uses: int = 1) -> str:
        return self.authority.invite(role, ttl_s=ttl_s, uses=uses, bootstraps=tuple(self.bootstraps), now=time.time())

    def key(self, *roles: str, models: set[str] | None = None, project: str = "default", ttl_s: float = 3600) -> str:
        now = time.time()
        claims = ApiKey(
            id=os.urandom(8),
            project=project,
            roles=frozenset(roles or ("invoker", "viewer")),
            models=frozenset(models) if models is not None else None,
            not_before=now - 1,
            expires=now + ttl_s,
        )
        return self.authority.mint_key(claims)

    async def _start(
        self, role: Role, name: str, arguments: tuple[str, ...], token: str, *, wait: bool = True, program: Path | None = None
    ) -> Node:
        state_dir = self.home / "nodes" / name
        log = self.home / f"{name}.log"
        command = ["--home", str(self.home), "--state-dir", str(state_dir), "--name", name, "--preset", "local", *arguments]
        environ = {key: value for key, value in os.environ.items() if not key.startswith("MESH_")}
        if token:
            environ["MESH_JOIN"] = token
        process: asyncio.subprocess.Process | Child
        if self._nursery is not None and program is None:
            process = await self._nursery.start(role, command, environ, log)
        else:
            with log.open("ab") as output:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, *((str(program),) if program is not None else ("-m", str(role))), *command),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=environ,
                    start_new_session=True,
                )
        node = Node(role=role, name=name, process=process, state_dir=state_dir, log=log)
        self.nodes.append(node)
        if wait:
            await self.announced(node)
        return node

    async def announced(self, node: Node) -> Node:
        """Wait until the node listens."""
        async with asyncio.timeout(START_S):
            while True:
                about = read_announced(node.state_dir)
                if about is not None and about["pid"] == node.process.pid:
                    node.about = about
                    return node
                if node.process.returncode is not None:
                    raise AssertionError(f"{node.name} ended with {node.process.returncode}:\n{node.tail()}")
                await asyncio.sleep(0.02)

    def free_ports(self, count: int) -> list[int]:
        """Ports that were free a moment ago, for nodes that must come back at the same address."""
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
            return [int(one.getsockname()[1]) for one in held]

    # -- watching

    async def get(self, url: str, key: str | None = None) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with self.http.get(url, headers=headers) as response:
            return response.status, await response.json(content_type=None)

    async def models(self, proxy: Node, key: str) -> list[str]:
        status, body = await self.get(f"{proxy.api}/models", key)
        assert status == 200, body
        return [entry["id"] for entry in body["data"]]

    async def workers(self, proxy: Node, key: str) -> dict[str, dict[str, Any]]:
        """By node id, what `mesh workers` shows."""
        status, body = await self.get(f"{proxy.root}/mesh/v1/workers", key)
        assert status == 200, body
        return {entry["id"]: entry for entry in body["workers"]}

    async def until_ready(self, proxy: Node, *workers: Node) -> None:
        """Wait until the proxy has a link to each worker and each is ready."""
        key = self.key()

        async def ready() -> bool:
            seen = await self.workers(proxy, key)
            return all(worker.id in seen and seen[worker.id]["linked"] and seen[worker.id]["state"] == "ready" for worker in workers)

        await until(ready, what=f"{proxy.name} to have {', '.join(worker.name for worker in workers)} ready")

    async def until_remembered(self, node: Node, *others: Node) -> None:
        """Wait until a node has written down where one of the others is."""

        async def remembered() -> bool:
            return bool(remembered_peers(node) & {other.id for other in others})

        await until(remembered, what=f"{node.name} to remember its peers")


def remembered_peers(node: Node) -> set[str]:
    """Ids of the peers that a node has written down for its next start."""
    try:
        return {entry["id"] for entry in json.loads((node.state_dir / "peers.json").read_bytes())["peers"]}
    except FileNotFoundError:
        return set()


async def until(condition: Callable[[], Awaitable[bool]], *, what: str, within_s: float = PATIENCE_S) -> float:
    """Poll until ``condition`` holds; returns how long it took. Fails the test, saying ``what`` was waited for."""
    started = time.monotonic()
    while True:
        if await condition():
            return time.monotonic() - started
        if time.monotonic() - started > within_s:
            raise AssertionError(f"waited {within_s:.0f} s in vain for {what}")
        await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def events(response: aiohttp.ClientResponse) -> AsyncIterator[AsyncIterator[bytes]]:
    """The data of a response's server-sent events, one by one."""

    async def read() -> AsyncIterator[bytes]:
        rest = b""
        async for data in response.content.iter_any():
            rest += data
            while b"\n\n" in rest:
                event, rest = rest.split(b"\n\n", 1)
                for line in event.split(b"\n"):
                    if line.startswith(b"data:"):
                        yield line[5:].strip()

    yield read()
