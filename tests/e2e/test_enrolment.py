"""Enrolment and renewal over real TLS on loopback: good newcomers, impostors on either side, and hostile bytes."""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import aiohttp
import pytest
import uvloop
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from bootstrap.config import BootstrapConfig
from bootstrap.enrol import AttemptLimit
from bootstrap.node import open_admission
from bootstrap.server import MAX_BODY_BYTES, ServerLimits
from mesh.clock import SystemClock
from mesh.config import NodeConfig
from mesh.enrol import ENROL_PATH, MESH_PATH, RENEW_PATH, SPENT_PATH, keep_renewed, known_bootstraps, open_identity, renew
from mesh.errors import ConfigError, EnrolError, EnrolRefused
from mesh.https import call, member_context, unverified_context
from mesh.identity import Identity, IdentityStore, TlsContexts, make_node_certificate, make_request, peer_of, private_key_pem
from mesh.invite import parse_token
from mesh.trust import Role
from tests.support.authority import TestMesh, make_mesh
from tests.support.bootstraps import Bootstrap, signed_of

CLOCK = SystemClock()


@dataclass(frozen=True, kw_only=True)
class Worker(NodeConfig):
    role: ClassVar[Role] = Role.WORKER


@pytest.fixture(scope="module")
def mesh() -> TestMesh:
    return make_mesh(now=time.time())


@pytest.fixture(scope="module")
def other() -> TestMesh:
    return make_mesh(now=time.time(), name="other")


@pytest.fixture
async def b1(mesh: TestMesh, tmp_path: Path) -> AsyncIterator[Bootstrap]:
    async with Bootstrap(mesh, tmp_path / "b1", CLOCK) as bootstrap:
        yield bootstrap


async def enrol(config: NodeConfig) -> Identity:
    return await open_identity(config, config.role, CLOCK, random.Random(7))


def newcomer(tmp_path: Path, token: str, name: str = "alice") -> Worker:
    return Worker(home=tmp_path, join=token, name=name)


async def post(address: str, path: str, body: Any, context: ssl.SSLContext | None = None) -> tuple[int, dict[str, Any]]:
    """As anybody may, verifying nothing."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"https://{address}{path}", data=data, ssl=context or unverified_context()) as response,
    ):
        return response.status, json.loads(await response.read())


def showing(identity: Identity, folder: Path, chain: bytes | None = None) -> ssl.SSLContext:
    """A client that verifies nothing and shows this certificate."""
    context = unverified_context()
    path = folder / f"shown-{random.getrandbits(40)}.pem"
    path.write_bytes(private_key_pem(identity.key) + (chain or identity.credentials.certificate_chain))
    context.load_cert_chain(path)
    return context


# -- good newcomers


async def test_newcomer_enrols_and_remembers(b1: Bootstrap, mesh: TestMesh, tmp_path: Path) -> None:
    config = newcomer(tmp_path, b1.token())
    identity = await enrol(config)
    assert identity.role == Role.WORKER
    assert identity.mesh_id == mesh.mesh_id
    assert known_bootstraps(config) == (b1.address,)
    again = await enrol(Worker(home=tmp_path, name="alice"))
    assert again.node_id == identity.node_id
    assert b1.desk.asked == ["enrol"]


async def test_enrolled_nodes_can_shake_hands(b1: Bootstrap, tmp_path: Path) -> None:
    token = b1.token(uses=2)
    contexts = []
    for name in ("alice", "bob"):
        config = newcomer(tmp_path, token, name)
        contexts.append(TlsContexts(await enrol(config), config.state_dir))
    server = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0, ssl=contexts[0].server)
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname(), ssl=contexts[1].client)
        assert await reader.read() == b""
        writer.close()


async def test_token_admits_one_node_and_the_second_is_told_why(b1: Bootstrap, tmp_path: Path) -> None:
    token = b1.token()
    await enrol(newcomer(tmp_path, token, "alice"))
    with pytest.raises(EnrolRefused, match="used up; make another"):
        await enrol(newcomer(tmp_path, token, "bob"))


async def test_node_that_lost_its_answer_enrols_with_the_same_token(b1: Bootstrap, tmp_path: Path) -> None:
    config = newcomer(tmp_path, b1.token())
    first = await enrol(config)
    (config.state_dir / "credentials.json").unlink()
    assert (await enrol(config)).node_id == first.node_id


async def test_dead_bootstrap_node_does_not_matter_while_another_lives(b1: Bootstrap, tmp_path: Path) -> None:
    config = Worker(home=tmp_path, join=b1.token(), bootstrap=("127.0.0.1:1", "127.0.0.1:2"))
    assert (await enrol(config)).role == Role.WORKER


async def test_bootstrap_node_that_is_still_starting_is_waited_for(mesh: TestMesh, tmp_path: Path) -> None:
    async with Bootstrap(mesh, tmp_path / "b0", CLOCK) as bootstrap:
        token, port = bootstrap.token(), bootstrap.port
    waiting = asyncio.create_task(enrol(newcomer(tmp_path, token)))
    late = Bootstrap(mesh, tmp_path / "b1", CLOCK)
    late.port = port
    async with late:
        assert (await waiting).role == Role.WORKER


async def test_second_bootstrap_node_learns_to_admit(b1: Bootstrap, mesh: TestMesh, tmp_path: Path) -> None:
    config = BootstrapConfig(home=tmp_path / "elsewhere", join=b1.token(Role.BOOTSTRAP))
    config.state_dir.mkdir(parents=True)
    admission = await open_admission(config, CLOCK, random.Random(7))
    async with Bootstrap(mesh, tmp_path / "b2", CLOCK, admission=admission) as b2:
        assert (await enrol(newcomer(tmp_path, b2.token()))).role == Role.WORKER
    again = await open_admission(BootstrapConfig(home=tmp_path / "elsewhere"), CLOCK, random.Random(7))
    assert again.secret == mesh.admission.secret


async def test_token_spent_at_one_bootstrap_node_is_spent_at_the_other(b1: Bootstrap, mesh: TestMesh, tmp_path: Path) -> None:
    async with Bootstrap(mesh, tmp_path / "b2", CLOCK) as b2:
        b1.others.append(b2)
        token = b1.token()
        await enrol(newcomer(tmp_path, token, "alice"))
        assert b2.desk.asked == ["spent"]
        with pytest.raises(EnrolRefused, match="used up"):
            await enrol(Worker(home=tmp_path, join=token, name="bob", bootstrap=(b2.address,)))


async def test_bootstrap_node_that_is_down_keeps_nobody_out(b1: Bootstrap, mesh: TestMesh, tmp_path: Path) -> None:
    async with Bootstrap(mesh, tmp_path / "b2", CLOCK) as b2:
        b1.others.append(b2)
    assert (await enrol(newcomer(tmp_path, b1.token()))).role == Role.WORKER


# -- bad tokens


async def test_expired_token_is_refused(b1: Bootstrap, tmp_path: Path) -> None:
    with pytest.raises(EnrolRefused, match="expired"):
        await enrol(newcomer(tmp_path, b1.token(life_s=-0.5)))


async def test_token_signed_by_another_mesh_never_leaves_the_newcomer(b1: Bootstrap, other: TestMesh, tmp_path: Path) -> None:
    with pytest.raises(EnrolRefused, match="another mesh"):
        await enrol(newcomer(tmp_path, b1.token(mesh=other)))
    assert b1.desk.asked == []


async def test_token_of_another_mesh_shown_anyway_is_refused(b1: Bootstrap, other: TestMesh) -> None:
    body = {"token": signed_of(b1.token(mesh=other)), "role": "worker", "request": make_request(Ed25519PrivateKey.generate()).decode()}
    status, answer = await post(b1.address, ENROL_PATH, body)
    assert (status, answer["error"]["code"]) == (403, "bad_signature")


async def test_token_for_another_role_is_refused_at_both_ends(b1: Bootstrap, tmp_path: Path) -> None:
    token = b1.token(Role.PROXY)
    with pytest.raises(ConfigError, match="admits a proxy"):
        await enrol(newcomer(tmp_path, token))
    body = {"token": signed_of(token), "role": "worker", "request": make_request(Ed25519PrivateKey.generate()).decode()}
    status, answer = await post(b1.address, ENROL_PATH, body)
    assert (status, "admits a proxy" in answer["error"]["message"]) == (403, True)


# -- impostors that play bootstrap node


class Impostor:
    """An HTTPS server that shows any certificate it likes, tells the public truth, and writes down what it is sent."""

    def __init__(self, mesh: TestMesh, identity: Identity, folder: Path) -> None:
        self.sent: list[bytes] = []
        self._about = {"root_certificate": mesh.admission.root_certificate.decode()}
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        path = folder / "impostor.pem"
        path.write_bytes(private_key_pem(identity.key) + identity.credentials.certificate_chain)
        self._context.load_cert_chain(path)

    async def _handle(self, request: web.BaseRequest) -> web.Response:
        if request.path == MESH_PATH:
            return web.json_response(self._about)
        self.sent.append(await request.read())
        return web.json_response({})

    async def __aenter__(self) -> Impostor:
        loop = asyncio.get_running_loop()
        self._front = web.Server(self._handle)
        self._server = await loop.create_server(self._front, "127.0.0.1", 0, ssl=self._context)
        host, port = self._server.sockets[0].getsockname()
        self.address = f"{host}:{port}"
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._server.close()
        await self._front.shutdown(1.0)


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.enrol.ENROL_FOR_S", 0.0)


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("role", [Role.WORKER, Role.PROXY])
async def test_member_that_plays_bootstrap_node_never_sees_the_token(b1: Bootstrap, mesh: TestMesh, tmp_path: Path, role: Role) -> None:
    async with Impostor(mesh, mesh.identity(role, now=time.time()), tmp_path) as mallory:
        config = Worker(home=tmp_path, join=_leading_to(b1, mallory.address), bootstrap=(mallory.address,))
        with pytest.raises(EnrolError, match=f"the peer is a {role}"):
            await enrol(config)
        assert mallory.sent == []


@pytest.mark.usefixtures("_impatient")
async def test_stranger_that_plays_bootstrap_node_never_sees_the_token(
    b1: Bootstrap, mesh: TestMesh, other: TestMesh, tmp_path: Path
) -> None:
    async with Impostor(mesh, other.identity(Role.BOOTSTRAP, now=time.time()), tmp_path) as mallory:
        config = Worker(home=tmp_path, join=_leading_to(b1, mallory.address))
        with pytest.raises(EnrolError, match="certificate verify failed"):
            await enrol(config)
        assert mallory.sent == []


def _leading_to(b1: Bootstrap, address: str) -> str:
    """A good token whose only address is another's: as if DNS had been taken over."""
    port, b1.port = b1.port, int(address.rpartition(":")[2])
    try:
        return b1.token()
    finally:
        b1.port = port


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nnope",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]",
        b'HTTP/1.1 200 OK\r\ncontent-length: 23\r\n\r\n{"root_certificate":1  }',
        b'HTTP/1.1 200 OK\r\ncontent-length: 26\r\n\r\n{"root_certificate":"abc"}',
        b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"10000\r\n" + b"[" * 65536 + b"\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 600_000,
        b"\x00" * 1000,
        b"HTTP/1.1 500 no\r\ncontent-length: 34\r\n\r\n" + b'{"error": {"message": "so sorry"}}',
    ],
)
async def test_any_answer_of_a_broken_server_is_one_clear_error(b1: Bootstrap, other: TestMesh, tmp_path: Path, answer: bytes) -> None:
    async def answer_and_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    pem = tmp_path / "x.pem"
    identity = other.identity(Role.BOOTSTRAP, now=time.time())
    pem.write_bytes(private_key_pem(identity.key) + identity.credentials.certificate_chain)
    context.load_cert_chain(pem)
    server = await asyncio.start_server(answer_and_close, "127.0.0.1", 0, ssl=context)
    async with server:
        token = _leading_to(b1, f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
        with pytest.raises(EnrolError, match="no bootstrap node admitted this node"):
            await enrol(newcomer(tmp_path, token))


@pytest.mark.usefixtures("_impatient")
def test_handshakes_refuse_the_same_on_uvloop_which_has_a_tls_of_its_own(mesh: TestMesh, other: TestMesh, tmp_path: Path) -> None:
    async def all_of_it() -> None:
        async with (
            Bootstrap(mesh, tmp_path / "b1", CLOCK) as b1,
            Impostor(mesh, mesh.identity(Role.WORKER, now=time.time()), tmp_path) as mallory,
        ):
            assert (await enrol(newcomer(tmp_path, b1.token(), "alice"))).role == Role.WORKER
            with pytest.raises(EnrolError, match="the peer is a worker"):
                await enrol(newcomer(tmp_path, _leading_to(b1, mallory.address), "bob"))
            stranger = other.identity(Role.WORKER, now=time.time())
            with pytest.raises((aiohttp.ClientError, ConnectionError)):
                await post(b1.address, RENEW_PATH, {}, showing(stranger, tmp_path))
            assert (mallory.sent, b1.desk.asked) == ([], ["enrol"])

    uvloop.run(all_of_it())


# -- renewal


async def test_renewal_moves_the_certificate_on_and_live_contexts_show_it(b1: Bootstrap, tmp_path: Path) -> None:
    config = newcomer(tmp_path, b1.token())
    identity = await enrol(config)
    contexts = TlsContexts(identity, config.state_dir)
    before = identity.credentials.certificate_chain
    await renew(identity, config.state_dir, (b1.address,), clock=CLOCK, rng=random.Random(7))
    assert identity.credentials.certificate_chain != before
    assert identity.role == Role.WORKER
    seen: list[bytes] = []

    def note(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(writer.get_extra_info("ssl_object").getpeercert(binary_form=True))
        writer.close()

    server = await asyncio.start_server(note, "127.0.0.1", 0, ssl=contexts.server)
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname(), ssl=contexts.client)
        await reader.read()
        writer.close()
    leaf = x509.load_pem_x509_certificate(identity.credentials.certificate_chain)
    assert seen == [leaf.public_bytes(Encoding.DER)]
    assert peer_of(seen[0], identity.mesh_id).node_id == identity.node_id


async def test_running_node_renews_by_itself(b1: Bootstrap, tmp_path: Path) -> None:
    class Hurried(SystemClock):
        """Half a day passes in a moment, once; the next one never ends."""

        def __init__(self) -> None:
            self.ahead_s = 0.0

        def wall(self) -> float:
            return time.time() + self.ahead_s

        async def sleep(self, delay_s: float) -> None:
            if self.ahead_s:
                await asyncio.Event().wait()
            self.ahead_s = 15 * 3600.0

    config, clock = newcomer(tmp_path, b1.token()), Hurried()
    identity = await enrol(config)
    renewed = asyncio.Event()
    identity.on_renewal(renewed.set)
    store = IdentityStore(config.state_dir)
    task = asyncio.create_task(keep_renewed(identity, store, known_bootstraps(config), clock, random.Random(7)))
    await renewed.wait()
    task.cancel()
    assert b1.desk.asked == ["enrol", "renew"]


async def test_renewal_without_a_certificate_is_refused(b1: Bootstrap) -> None:
    status, answer = await post(b1.address, RENEW_PATH, {"request": make_request(Ed25519PrivateKey.generate()).decode()})
    assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
    assert b1.desk.asked == []


@pytest.mark.parametrize("path", [RENEW_PATH, ENROL_PATH, SPENT_PATH, MESH_PATH])
async def test_certificate_of_another_mesh_enters_no_handler(b1: Bootstrap, other: TestMesh, tmp_path: Path, path: str) -> None:
    stranger = other.identity(Role.WORKER, now=time.time())
    with pytest.raises((aiohttp.ClientError, ConnectionError)):
        await post(b1.address, path, {"request": make_request(stranger.key).decode()}, showing(stranger, tmp_path))
    assert b1.desk.asked == []


async def test_self_made_certificate_enters_no_handler(b1: Bootstrap, mesh: TestMesh, other: TestMesh, tmp_path: Path) -> None:
    """The right names, signed by the wrong issuer."""
    forged = other.admission.key
    key = Ed25519PrivateKey.generate()
    leaf = make_node_certificate(
        forged, mesh.admission.certificate, key.public_key(), mesh_id=mesh.mesh_id, role=Role.BOOTSTRAP, now=time.time()
    )
    identity = mesh.identity(Role.BOOTSTRAP, now=time.time(), key=key)
    with pytest.raises((aiohttp.ClientError, ConnectionError)):
        await post(b1.address, SPENT_PATH, {}, showing(identity, tmp_path, leaf + mesh.admission.certificate))
    assert b1.desk.asked == []


async def test_expired_certificate_enters_no_handler(b1: Bootstrap, mesh: TestMesh, tmp_path: Path) -> None:
    past = time.time() - 25 * 3600.0
    key = Ed25519PrivateKey.generate()
    credentials = mesh.admission.admit(key.public_key(), Role.WORKER, now=past)
    identity = mesh.identity(Role.WORKER, now=time.time(), key=key)
    with pytest.raises((aiohttp.ClientError, ConnectionError)):
        await post(
            b1.address,
            RENEW_PATH,
            {"request": make_request(key).decode()},
            showing(identity, tmp_path, credentials.certificate_chain),
        )
    assert b1.desk.asked == []


async def test_renewal_cannot_change_the_key(b1: Bootstrap, mesh: TestMesh, tmp_path: Path) -> None:
    alice = mesh.identity(Role.WORKER, now=time.time())
    body = {"request": make_request(Ed25519PrivateKey.generate()).decode()}
    status, answer = await post(b1.address, RENEW_PATH, body, showing(alice, tmp_path))
    assert (status, answer["error"]["code"]) == (403, "untrusted")


@pytest.mark.parametrize("role", [Role.WORKER, Role.PROXY])
async def test_only_bootstrap_nodes_may_tell_of_spent_tokens(b1: Bootstrap, mesh: TestMesh, tmp_path: Path, role: Role) -> None:
    mallory = mesh.identity(role, now=time.time())
    body = {"token": signed_of(b1.token()), "node": "00" * 32}
    status, _answer = await post(b1.address, SPENT_PATH, body, showing(mallory, tmp_path))
    assert status == 403
    assert b1.desk.asked == []


async def test_renewal_goes_on_until_a_bootstrap_node_is_back(mesh: TestMesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.enrol.RENEW_RETRY_S", (0.01, 0.02))
    async with Bootstrap(mesh, tmp_path / "b0", CLOCK) as gone:
        port = gone.port
    alice = mesh.identity(Role.WORKER, now=time.time())
    waiting = asyncio.create_task(renew(alice, tmp_path, (f"127.0.0.1:{port}",), clock=CLOCK, rng=random.Random(7)))
    late = Bootstrap(mesh, tmp_path / "b1", CLOCK)
    late.port = port
    async with late:
        await waiting
    assert late.desk.asked == ["renew"]


# -- hostile bytes


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"null", 400),
        (b"[" * 10_000, 400),
        (b'{"token": 1e400}', 400),
        (b'{"token": "zz"}', 400),
        (b'{"token": "\\ud800"}', 400),
        (b'{"token": "00"}', 403),
        (b"\xff\xfe{}", 400),
        (b'{"a": "' + b"x" * MAX_BODY_BYTES + b'"}', 413),
        (b'{"n": ' + b"9" * 10_000 + b"}", 400),
    ],
)
async def test_bad_body_is_answered_in_json_with_the_right_status(b1: Bootstrap, body: bytes, status: int) -> None:
    answered, answer = await post(b1.address, ENROL_PATH, body)
    assert answered == status
    assert set(answer["error"]) == {"code", "message"}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/enrol", 405),
        ("POST", "/v1/mesh", 405),
        ("GET", "/v1/mesh/../mesh/x", 404),
        ("GET", "/health", 200),
        ("GET", "/v1/mesh", 200),
        ("DELETE", "/health", 405),
        ("GET", "/" + "a" * 5000, 404),
    ],
)
async def test_routes(b1: Bootstrap, method: str, path: str, status: int) -> None:
    async with aiohttp.ClientSession() as session:
        url = f"https://{b1.address}{path}"
        async with session.request(method, url, ssl=unverified_context()) as response:
            assert response.status == status
            assert response.content_type == "application/json"
            assert response.headers["connection"] == "close"


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /health HTTP/1.1\r\nhost: x\r\nx: ",
        b"POST /v1/enrol HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{",
        b"POST /v1/enrol HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{",
    ],
    ids=["nothing", "half a header", "half a body", "half a chunk"],
)
async def test_slow_client_is_shown_the_door(mesh: TestMesh, tmp_path: Path, sent: bytes) -> None:
    limits = ServerLimits(connection_s=0.2, body_s=0.1)
    async with Bootstrap(mesh, tmp_path / "b", CLOCK, limits=limits) as bootstrap:
        reader, writer = await asyncio.open_connection("127.0.0.1", bootstrap.port, ssl=unverified_context())
        writer.write(sent)
        async with asyncio.timeout(30):
            with_body = await _read_all(reader)
        assert b"200" not in with_body[:20]
        writer.close()


async def test_client_that_never_begins_the_handshake_is_shown_the_door(mesh: TestMesh, tmp_path: Path) -> None:
    async with Bootstrap(mesh, tmp_path / "b", CLOCK, limits=ServerLimits(handshake_s=0.2)) as bootstrap:
        reader, writer = await asyncio.open_connection("127.0.0.1", bootstrap.port)
        async with asyncio.timeout(30):
            assert await _read_all(reader) == b""
        writer.close()


async def test_connections_are_capped_and_the_rest_is_served_later(mesh: TestMesh, tmp_path: Path) -> None:
    async with Bootstrap(mesh, tmp_path / "b", CLOCK, limits=ServerLimits(connections=3)) as bootstrap:
        idle = [await asyncio.open_connection("127.0.0.1", bootstrap.port, ssl=unverified_context()) for _ in range(3)]
        with pytest.raises((aiohttp.ClientError, ConnectionError)):
            await post(bootstrap.address, ENROL_PATH, {})
        for _reader, writer in idle:
            writer.close()
            await writer.wait_closed()
        assert (await enrol(newcomer(tmp_path, bootstrap.token()))).role == Role.WORKER


async def test_too_many_attempts_from_one_address_are_told_to_wait(mesh: TestMesh, tmp_path: Path) -> None:
    async with Bootstrap(mesh, tmp_path / "b", CLOCK, attempts=AttemptLimit(burst=3, per_s=0.1)) as bootstrap:
        statuses = [(await post(bootstrap.address, ENROL_PATH, {}))[0] for _ in range(5)]
        assert statuses == [400, 400, 400, 429, 429]
        await call("GET", bootstrap.address, "/health", unverified_context())


@pytest.mark.parametrize("junk", [b"\x00" * 1000, b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"a" * 500, b"SSH-2.0-x\r\n"])
async def test_junk_instead_of_tls_hurts_nobody(b1: Bootstrap, tmp_path: Path, junk: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", b1.port)
    writer.write(junk)
    async with asyncio.timeout(30):
        await _read_all(reader)
    writer.close()
    assert (await enrol(newcomer(tmp_path, b1.token()))).role == Role.WORKER


async def test_secrets_stay_off_the_log(b1: Bootstrap, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    token = b1.token()
    await enrol(newcomer(tmp_path, token, "alice"))
    with pytest.raises(EnrolRefused):
        await enrol(newcomer(tmp_path, token, "bob"))
    said = "".join(capfd.readouterr())
    assert parse_token(token).signed.hex() not in said
    assert token not in said
    assert "PRIVATE KEY" not in said


async def test_member_context_shows_this_nodes_certificate(b1: Bootstrap, mesh: TestMesh, tmp_path: Path) -> None:
    alice = mesh.identity(Role.BOOTSTRAP, now=time.time())
    body = {"token": signed_of(b1.token()), "node": "00" * 32}
    answer = await call("POST", b1.address, SPENT_PATH, member_context(alice, tmp_path), body)
    assert answer == {"nodes": ["00" * 32]}


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read()
    except (ConnectionError, ssl.SSLError):
        return b""
