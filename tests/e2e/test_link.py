"""Links over real sockets and real TLS: who gets in and who does not. On both event loops: nodes run on uvloop, most tests on asyncio's."""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvloop
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mesh.clock import SystemClock
from mesh.errors import WorkerLost
from mesh.identity import ALPN, Identity, TlsContexts, make_node_certificate, private_key_pem
from mesh.link.frames import Frame, encode_control
from mesh.link.link import IncomingStream, Link
from mesh.link.peers import LinkConfig, Peers
from mesh.membership import MembershipCache
from mesh.records import Record, State, seal_record
from mesh.trust import Role
from tests.support.authority import TestMesh, make_mesh
from tests.support.pipe import Room, Sink

NOW = time.time()
MESH = make_mesh(now=NOW - 3 * 86400)
OTHER = make_mesh(now=NOW - 3 * 86400, name="other")
DEADLINE_S = 20.0
pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy.")


@pytest.fixture(params=["asyncio", "uvloop"])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy() if request.param == "uvloop" else asyncio.DefaultEventLoopPolicy()


@pytest.fixture(autouse=True)
async def strict() -> AsyncIterator[None]:
    """Nothing may go unhandled in any callback or task."""
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    yield
    assert problems == []


class Node:
    """One node's `Peers` on loopback."""

    def __init__(self, identity: Identity, folder: Path, *, accept: Role, boot: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.identity = identity
        self.room = Served()
        self.tls = TlsContexts(identity, folder)
        self.port = 0
        self.boot = boot or int(NOW * 1000)
        self.seq = 0
        self.peers = Peers(
            identity,
            self.tls,
            self.room,
            accept=frozenset({accept}),
            record=self.record,
            members=MembershipCache(identity.trust),
            clock=SystemClock(),
            rng=random.Random(1),
            config=LinkConfig(heartbeat_s=0.2, silent_s=2.0, handshake_s=2.0),
        )

    @property
    def id(self) -> bytes:
        return self.identity.node_id

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def record(self) -> Record:
        self.seq += 1
        record = Record(
            node_id=self.id,
            role=self.identity.role,
            boot=self.boot,
            seq=self.seq,
            issued=time.time(),
            expires=time.time() + 20.0,
            state=State.READY,
            addresses=(self.address,) if self.port else (),
        )
        return seal_record(record, self.identity.key, self.identity.membership.signed)

    async def until(self, true: Callable[[], object]) -> None:
        """Wait until it is true; looked at whenever something happens at this node."""
        async with asyncio.timeout(DEADLINE_S):
            while not true():
                self.room.changed.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.room.changed.wait(), 0.05)


class Served(Room):
    """A room that says whenever something happens, and echoes what streams send."""

    def __init__(self) -> None:
        super().__init__()
        self.changed = asyncio.Event()
        self.tasks: set[asyncio.Task[None]] = set()

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_"):
            object.__getattribute__(self, "changed").set()
        return object.__getattribute__(self, name)

    def on_open(self, stream: IncomingStream, head: dict[str, Any]) -> None:
        super().on_open(stream, head)
        task = asyncio.create_task(echo(stream))
        stream.on_cancel = task
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


async def echo(stream: IncomingStream) -> None:
    body = await stream.read_body(max_bytes=1 << 30)
    stream.send_head({"status": 200})
    await stream.send(body)
    stream.end({"size": len(body)})


class Waiting(Sink):
    """A sink that can be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.over = asyncio.Event()

    def on_end(self, trailer: dict[str, Any]) -> None:
        super().on_end(trailer)
        self.over.set()

    def on_error(self, error: Any) -> None:
        super().on_error(error)
        self.over.set()


Make = Callable[..., Awaitable[Node]]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    """``await make(role)``: a node listening on loopback, unless ``outbound``."""
    nodes: list[Node] = []

    async def build(
        role: Role,
        *,
        mesh: TestMesh = MESH,
        accept: Role | None = None,
        issued: float = NOW,
        outbound: bool = False,
        identity: Identity | None = None,
    ) -> Node:
        accept = accept or (Role.WORKER if role == Role.PROXY else Role.PROXY)
        identity = identity or mesh.identity(role, now=issued)
        node = Node(identity, tmp_path / str(len(nodes)), accept=accept)
        nodes.append(node)
        if not outbound:
            node.port = (await node.peers.listen("127.0.0.1", 0))[1]
        node.peers.start()
        return node

    yield build
    for node in nodes:
        await node.peers.stop()


async def link(proxy: Node, worker: Node) -> tuple[Link, Link]:
    proxy.peers.want(worker.record())
    await proxy.until(lambda: worker.id in proxy.peers.links)
    await worker.until(lambda: proxy.id in worker.peers.links)
    return proxy.peers.links[worker.id], worker.peers.links[proxy.id]


async def ask(over: Link, body: bytes) -> Waiting:
    sink = Waiting()
    sink.stream = over.open({"size": len(body)}, sink)
    await sink.stream.send(body)
    sink.stream.end()
    await asyncio.wait_for(sink.over.wait(), DEADLINE_S)
    return sink


# -- who gets in


async def test_request_and_answer_of_megabytes_pass_over_tls(make: Make) -> None:
    proxy, worker = await make(Role.PROXY), await make(Role.WORKER)
    over, _ = await link(proxy, worker)
    body = random.Random(1).randbytes(3_000_000)
    for sink in await asyncio.gather(*(ask(over, body[at:]) for at in (0, 1_000_000, 2_999_999, 3_000_000))):
        assert sink.errors == []
        assert sink.trailer == {"size": len(sink.data)}
        assert body.endswith(bytes(sink.data))


async def test_outbound_worker_serves_over_the_link_it_dialled(make: Make) -> None:
    proxy, worker = await make(Role.PROXY), await make(Role.WORKER, outbound=True)
    worker.peers.want(proxy.record())
    await proxy.until(lambda: worker.id in proxy.peers.links)
    sink = await ask(proxy.peers.links[worker.id], b"hello")
    assert bytes(sink.data) == b"hello"


async def test_both_dialling_at_once_end_with_the_same_single_link(make: Make) -> None:
    proxy, worker = await make(Role.PROXY), await make(Role.WORKER)
    proxy.peers.want(worker.record())
    worker.peers.want(proxy.record())
    await proxy.until(lambda: worker.id in proxy.peers.links and len(proxy.peers._open) == 1)
    await worker.until(lambda: proxy.id in worker.peers.links and len(worker.peers._open) == 1)
    here, there = proxy.peers.links[worker.id], worker.peers.links[proxy.id]
    assert here.transport is not None
    assert there.transport is not None
    assert here.transport.get_extra_info("peername")[1] == there.transport.get_extra_info("sockname")[1]
    assert here.dialled != there.dialled


async def test_killed_connection_fails_its_requests_and_comes_back(make: Make) -> None:
    proxy, worker = await make(Role.PROXY), await make(Role.WORKER)
    over, there = await link(proxy, worker)
    sink = Waiting()
    sink.stream = over.open({}, sink)
    await worker.until(lambda: worker.room.opened)
    assert there.transport is not None
    there.transport.abort()
    await asyncio.wait_for(sink.over.wait(), DEADLINE_S)
    assert [type(error) for error in sink.errors] == [WorkerLost]
    await proxy.until(lambda: proxy.peers.links.get(worker.id, over) is not over)
    again = await ask(proxy.peers.links[worker.id], b"again")
    assert bytes(again.data) == b"again"


async def test_worker_let_go_stays_away_until_the_proxy_wants_it_again(make: Make) -> None:
    """Both know each other's addresses and records; the link that ends is one that the worker dialled."""
    proxy, worker = await make(Role.PROXY), await make(Role.WORKER)
    worker.peers.want(proxy.record())
    await proxy.until(lambda: worker.id in proxy.peers.links)
    over = proxy.peers.links[worker.id]
    sink = Waiting()
    sink.stream = over.open({"size": 0}, sink)
    proxy.peers.let_go(worker.id)
    assert not over.closed, "it is in use"
    sink.stream.end()
    await asyncio.wait_for(sink.over.wait(), DEADLINE_S)
    proxy.peers.let_go(worker.id)
    await worker.until(lambda: not worker.peers.links)
    worker.peers.want(proxy.record())
    assert not worker.peers._dials
    over, _ = await link(proxy, worker)
    assert over.dialled


async def test_renewed_certificate_serves_new_links_and_leaves_old_ones_up(make: Make) -> None:
    soon = MESH.identity(Role.WORKER, now=NOW - 86400 + 3600)
    proxy, worker = await make(Role.PROXY), await make(Role.WORKER, identity=soon)
    over, _ = await link(proxy, worker)
    before = presented(over)
    worker.identity.renew(MESH.admission.admit(worker.identity.key.public_key(), Role.WORKER, now=NOW), now=time.time())
    assert not over.closed
    second = await make(Role.PROXY)
    fresh, _ = await link(second, worker)
    assert presented(fresh) != before
    assert bytes((await ask(over, b"old")).data) == b"old"
    assert bytes((await ask(fresh, b"new")).data) == b"new"


def presented(over: Link) -> bytes:
    assert over.transport is not None
    certificate: bytes = over.transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
    return certificate


# -- who does not


async def knock(worker: Node, context: ssl.SSLContext, data: bytes = b"") -> bytes:
    """Connect as a stranger, say ``data``, read until the end. Whatever goes wrong in TLS is an end too."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", worker.port, ssl=context, server_hostname="")
            writer.write(data)
            try:
                return await reader.read()
            finally:
                writer.transport.abort()
    except OSError:
        return b""


def stranger(chain: Path | None = None, alpn: str | None = ALPN) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if alpn:
        context.set_alpn_protocols([alpn])
    if chain is not None:
        context.load_cert_chain(chain)
    return context


def chain_of(identity: Identity, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    TlsContexts(identity, folder)
    return folder / "node.pem"


async def assert_untouched(worker: Node, make: Make) -> None:
    """No handler was entered, and whoever may come in still can."""
    assert (worker.room.up, worker.room.down, worker.room.opened, worker.room.records) == ([], [], [], [])
    assert worker.peers.links == {}
    proxy = await make(Role.PROXY)
    await link(proxy, worker)


FIRST_WORDS = encode_control(Frame.HELLO, 0, {"v": 1}) + encode_control(Frame.OPEN, 1, {})


STRANGERS = [
    "no certificate",
    "another mesh",
    "expired",
    "not yet valid",
    "not of any mesh",
    "issued by a member",
    "in another's name",
    "wrong role",
    "no ALPN",
    "another ALPN",
    "plain TCP",
]


@pytest.mark.parametrize("who", STRANGERS)
async def test_stranger_enters_no_handler(make: Make, tmp_path: Path, who: str) -> None:
    worker = await make(Role.WORKER)
    good = MESH.identity(Role.PROXY, now=NOW)
    match who:
        case "no certificate":
            context = stranger()
        case "another mesh":
            context = stranger(chain_of(OTHER.identity(Role.PROXY, now=NOW), tmp_path / "s"))
        case "expired":
            context = stranger(chain_of(MESH.identity(Role.PROXY, now=NOW - 2 * 86400), tmp_path / "s"))
        case "not of any mesh":
            # The right names, signed by a root made up on the spot under the same name.
            impostor = replace(make_mesh(now=NOW).admission, keyset=MESH.keyset)
            key = Ed25519PrivateKey.generate()
            credentials = impostor.admit(key.public_key(), Role.PROXY, now=NOW)
            path = tmp_path / "impostor.pem"
            path.write_bytes(private_key_pem(key) + credentials.certificate_chain)
            context = stranger(path)
        case "not yet valid":
            context = stranger(chain_of(MESH.identity(Role.PROXY, now=NOW + 2 * 86400), tmp_path / "s"))
        case "issued by a member":
            # A member's own certificate used as if it were an issuer's.
            key, parent = Ed25519PrivateKey.generate(), good.credentials.certificate_chain
            leaf = make_node_certificate(good.key, parent, key.public_key(), mesh_id=MESH.mesh_id, role=Role.PROXY, now=NOW)
            path = tmp_path / "member.pem"
            path.write_bytes(private_key_pem(key) + leaf + parent)
            context = stranger(path)
        case "in another's name":
            # The issuer's name on it, and the stranger's own signature.
            key = Ed25519PrivateKey.generate()
            admission = MESH.admission
            leaf = make_node_certificate(key, admission.certificate, key.public_key(), mesh_id=MESH.mesh_id, role=Role.PROXY, now=NOW)
            path = tmp_path / "own.pem"
            path.write_bytes(private_key_pem(key) + leaf + admission.certificate)
            context = stranger(path)
        case "wrong role":
            context = stranger(chain_of(MESH.identity(Role.WORKER, now=NOW), tmp_path / "s"))
        case "no ALPN":
            context = stranger(chain_of(good, tmp_path / "s"), alpn=None)
        case "another ALPN":
            context = stranger(chain_of(good, tmp_path / "s"), alpn="h2")
        case _:
            reader, writer = await asyncio.open_connection("127.0.0.1", worker.port)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + FIRST_WORDS)
            async with asyncio.timeout(DEADLINE_S):
                with contextlib.suppress(ConnectionError):
                    await reader.read()
            writer.transport.abort()
            await assert_untouched(worker, make)
            return
    assert await knock(worker, context, FIRST_WORDS) == b""
    await assert_untouched(worker, make)


async def test_old_tls_is_refused(make: Make, tmp_path: Path) -> None:
    worker = await make(Role.WORKER)
    context = stranger(chain_of(MESH.identity(Role.PROXY, now=NOW), tmp_path / "s"))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert await knock(worker, context, FIRST_WORDS) == b""
    await assert_untouched(worker, make)


@pytest.mark.parametrize("who", ["another mesh", "expired", "wrong role", "another node", "plain TCP"])
async def test_dialler_refuses_whoever_is_not_the_node_it_wants(make: Make, who: str) -> None:
    proxy, wanted = await make(Role.PROXY), await make(Role.WORKER, outbound=True)
    seen = asyncio.Event()
    match who:
        case "another mesh":
            there = await make(Role.WORKER, mesh=OTHER)
        case "expired":
            there = await make(Role.WORKER, issued=NOW - 2 * 86400)
        case "wrong role":
            there = await make(Role.PROXY, accept=Role.PROXY)
        case "another node":
            there = await make(Role.WORKER)
        case _:
            server = await asyncio.start_server(lambda reader, writer: (seen.set(), writer.write(b"hello?")), "127.0.0.1", 0)
            wanted.port = server.sockets[0].getsockname()[1]
            there = wanted
    wanted.port = there.port
    dialled = await proxy.peers._dial(wanted.address, wanted.id)
    assert not dialled
    assert (proxy.room.up, proxy.peers.links, proxy.peers._open) == ([], {}, set())
    assert there.room.up == []
    if who == "plain TCP":
        assert seen.is_set()
        server.close()


async def test_connection_that_never_finishes_its_handshake_is_ended(make: Make) -> None:
    worker = await make(Role.WORKER)
    reader, writer = await asyncio.open_connection("127.0.0.1", worker.port)
    async with asyncio.timeout(DEADLINE_S):
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
    writer.close()
    await assert_untouched(worker, make)
