"""The newcomer's side of enrolment, and a node's renewal of its certificate.

A node starts with a join token and nothing else. The token names the mesh by the hash of its root key, so:

1. over a connection that is *not* verified, ask a bootstrap node for the mesh's root certificate: public, and checked
   against the hash in the token;
2. over a second connection, verified against that root and closed in the handshake unless the peer is a bootstrap node of this
   mesh, show the token and a signing request. The secret never crosses a connection that was not verified;
3. keep what comes back; at half its life, with jitter, renew it over mutual TLS at any bootstrap node.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import tenacity
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from mesh.address import parse_address
from mesh.authority import Admission, parse_admission
from mesh.clock import Clock
from mesh.config import NodeConfig
from mesh.errors import ConfigError, EnrolError, EnrolRefused, Expired, MalformedEnvelope, MeshError, TrustError, UsageError, WrongMesh
from mesh.https import bootstrap_context, call, member_context, unverified_context
from mesh.identity import (
    Credentials,
    Identity,
    IdentityStore,
    make_request,
    parse_credentials,
    root_key_of,
    write_private,
)
from mesh.invite import JoinToken, parse_token
from mesh.membership import Membership
from mesh.trust import Role, key_id

log = structlog.get_logger(__name__)

MESH_PATH = "/v1/mesh"
ENROL_PATH = "/v1/enrol"
RENEW_PATH = "/v1/renew"
SPENT_PATH = "/v1/spent"
"""Among bootstrap nodes only: which nodes a join token has admitted."""
ENROL_FOR_S = 60.0
"""A newcomer keeps trying this long: its bootstrap node may still be starting."""
RENEW_AT = 0.5
RENEW_JITTER = 0.1
"""Of the certificate's life: renewals of nodes started together drift apart."""
LOOK_AGAIN_S = 300.0
RENEW_RETRY_S = (5.0, 300.0)
"""First and longest pause between attempts to renew."""
MAX_BOOTSTRAPS = 64
_PEERS_FILE = "bootstraps.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """What a bootstrap node answered: credentials, where bootstrap nodes are and, to a bootstrap node, what admits others."""

    credentials: Credentials
    bootstraps: tuple[str, ...]
    admission: Admission | None = None


async def open_identity(config: NodeConfig, role: Role, clock: Clock, rng: random.Random | None = None) -> Identity:
    """This node's identity: the one in its state folder, or a new one for the join token in ``config``.

    Raises `ConfigError` or `EnrolError`, with what to do next.
    """
    store = IdentityStore(config.state_dir)
    token = _token(config, role)
    if store.enrolled:
        try:
            return _resume(store, role, token, clock)
        except Expired as error:
            if token is None:
                raise EnrolError(
                    f"{error.message}: this {role} was away for longer than its certificate lives. "
                    f"Make a token with `mesh invite {role}` and start it once with --join TOKEN"
                ) from None
    if token is None:
        raise ConfigError(f"this {role} is not enrolled yet: make a token with `mesh invite {role}` and start it with --join TOKEN")
    key = await asyncio.to_thread(store.key)
    candidates = tuple(dict.fromkeys((*config.bootstrap, *token.bootstraps)))
    admitted = await enrol(token, key, candidates, clock=clock, rng=rng or random.Random())
    return await asyncio.to_thread(keep, store, key, token.mesh_id, admitted, role, candidates, clock.wall())


def keep(
    store: IdentityStore,
    key: Ed25519PrivateKey,
    mesh_id: bytes,
    admitted: Admitted,
    role: Role,
    asked: tuple[str, ...],
    now: float,
) -> Identity:
    """Write what a bootstrap node answered to the state folder. Raises a `TrustError` where it does not hold."""
    identity = Identity(key, admitted.credentials, mesh_id=mesh_id, now=now)
    _check_role(identity, role, store)
    if admitted.admission is not None:
        admitted.admission.save(store.directory)
    remember_bootstraps(store.directory, admitted.bootstraps or asked)
    store.save(admitted.credentials, mesh_id)
    log.info("node.enrolled", role=str(role), id=identity.node_id.hex()[:16], until=int(identity.membership.expires))
    return identity


async def enrol(token: JoinToken, key: Ed25519PrivateKey, bootstraps: tuple[str, ...], *, clock: Clock, rng: random.Random) -> Admitted:
    """Be admitted by any of ``bootstraps``, tried in random order until `ENROL_FOR_S`. Raises `EnrolError`."""
    request = {"token": token.signed.hex(), "role": str(token.role), "request": make_request(key).decode()}

    async def attempt(address: str) -> Admitted:
        root = await _fetch_root(address, token.mesh_id)
        context = bootstrap_context(root, token.mesh_id)
        admitted = _parse_admitted(await call("POST", address, ENROL_PATH, context, request))
        Identity(key, admitted.credentials, mesh_id=token.mesh_id, now=clock.wall())  # raises where it does not hold
        return admitted

    return await any_bootstrap(attempt, bootstraps, clock=clock, rng=rng, stop=_stop_after(clock, ENROL_FOR_S), pauses_s=(0.25, 5.0))


async def keep_renewed(
    identity: Identity,
    store: IdentityStore,
    bootstraps: tuple[str, ...],
    clock: Clock,
    rng: random.Random,
    *,
    renewed: Callable[..., Awaitable[Admitted]] | None = None,
) -> None:
    """A task for as long as the node runs: `renew` at half life, at any bootstrap node, again and again.

    Ends only with an `EnrolError`, when the certificate ran out because no bootstrap node answered all that time.
    """
    renewed = renewed or renew
    while True:
        await until_half_life(identity.membership, clock, rng)
        admitted = await renewed(identity, store.directory, bootstraps, clock=clock, rng=rng)
        bootstraps = admitted.bootstraps or bootstraps
        await asyncio.to_thread(store.save, identity.credentials, identity.mesh_id)
        await asyncio.to_thread(remember_bootstraps, store.directory, bootstraps)
        log.info("node.renewed", until=int(identity.membership.expires))


async def keep_keyset(identity: Identity, store: IdentityStore) -> None:
    """A task for as long as the node runs: a keyset that came in between is on disk before the next start."""
    changed = asyncio.Event()
    identity.trust.on_change(changed.set)
    while True:
        await changed.wait()
        changed.clear()
        log.info("node.keyset", seq=identity.trust.keyset.seq)
        try:
            await asyncio.to_thread(store.save, identity.credentials, identity.mesh_id)
        except OSError as error:
            log.warning("node.keyset_unsaved", error=str(error))


async def until_half_life(member: Membership, clock: Clock, rng: random.Random) -> None:
    """Wait until half of a membership's life is over, more or less. Looks at the wall clock often: a machine may have slept."""
    life_s = member.expires - member.issued
    due = member.issued + life_s * (RENEW_AT + rng.uniform(-RENEW_JITTER, RENEW_JITTER))
    while (left_s := due - clock.wall()) > 0:
        await clock.sleep(min(left_s, LOOK_AGAIN_S))


async def renew(identity: Identity, directory: Path, bootstraps: tuple[str, ...], *, clock: Clock, rng: random.Random) -> Admitted:
    """Give ``identity`` fresh credentials over mutual TLS. Tries until the present ones end, then raises `EnrolError`."""
    request = {"request": make_request(identity.key).decode()}

    async def attempt(address: str) -> Admitted:
        context = await asyncio.to_thread(member_context, identity, directory)
        admitted = _parse_admitted(await call("POST", address, RENEW_PATH, context, request))
        identity.renew(admitted.credentials, now=clock.wall())
        return admitted

    expires = identity.membership.expires

    def over(_state: tenacity.RetryCallState) -> bool:
        return clock.wall() >= expires

    return await any_bootstrap(attempt, bootstraps, clock=clock, rng=rng, stop=over, pauses_s=RENEW_RETRY_S, refusals=False)


def remember_bootstraps(directory: Path, addresses: Iterable[str]) -> None:
    write_private(directory / _PEERS_FILE, json.dumps(sorted(set(addresses))).encode())


def known_bootstraps(config: NodeConfig) -> tuple[str, ...]:
    """Bootstrap addresses: what the settings say, else what enrolment answered, else what the join token says."""
    if config.bootstrap:
        return config.bootstrap
    try:
        stored = json.loads((config.state_dir / _PEERS_FILE).read_bytes())
        remembered = tuple(_addresses(stored)) if isinstance(stored, list) else ()
    except (OSError, ValueError):
        remembered = ()
    return remembered or (parse_token(config.join).bootstraps if config.join else ())


def _token(config: NodeConfig, role: Role) -> JoinToken | None:
    if not config.join:
        return None
    try:
        token = parse_token(config.join)
    except MalformedEnvelope as error:
        raise ConfigError(f"--join: {error.message}") from None
    if token.role != role:
        raise ConfigError(f"--join: this token admits a {token.role}, not a {role}; make one with `mesh invite {role}`")
    return token


def _resume(store: IdentityStore, role: Role, token: JoinToken | None, clock: Clock) -> Identity:
    identity = store.load(now=clock.wall())
    _check_role(identity, role, store)
    if token is not None and token.mesh_id != identity.mesh_id:
        raise ConfigError(
            f"{store.directory} belongs to another mesh than the join token; choose another --state-dir, or remove that folder"
        )
    return identity


def _check_role(identity: Identity, role: Role, store: IdentityStore) -> None:
    if identity.role != role:
        raise ConfigError(f"{store.directory} belongs to a {identity.role}, not a {role}; choose another --state-dir")


async def _fetch_root(address: str, mesh_id: bytes) -> bytes:
    """The mesh's root certificate from someone not yet trusted: only its hash makes it good."""
    answer = await call("GET", address, MESH_PATH, unverified_context())
    root = answer.get("root_certificate")
    if not isinstance(root, str) or not root.isascii():
        raise MalformedEnvelope("the answer holds no root certificate")
    if key_id(root_key_of(root.encode())) != mesh_id:
        raise WrongMesh("it is a node of another mesh than the join token's")
    # Only the first certificate is kept: what was hashed is what TLS will trust, and nothing smuggled in behind it.
    return x509.load_pem_x509_certificate(root.encode()).public_bytes(Encoding.PEM)


def _parse_admitted(answer: Mapping[str, Any]) -> Admitted:
    bootstraps = answer.get("bootstraps", [])
    admission = answer.get("admission")
    if not isinstance(bootstraps, list):
        raise MalformedEnvelope("the answer of the bootstrap node has the wrong shape")
    return Admitted(
        credentials=parse_credentials(answer.get("credentials")),
        bootstraps=tuple(_addresses(bootstraps)),
        admission=None if admission is None else parse_admission(admission),
    )


def _addresses(texts: list[Any]) -> Iterator[str]:
    """Those that are addresses; nodes that named something else have only made themselves unfindable."""
    for text in texts[:MAX_BOOTSTRAPS]:
        with contextlib.suppress(UsageError):
            yield str(parse_address(str(text)))


async def any_bootstrap(
    attempt: Callable[[str], Awaitable[Admitted]],
    bootstraps: tuple[str, ...],
    *,
    clock: Clock,
    rng: random.Random,
    stop: Callable[[tenacity.RetryCallState], bool],
    pauses_s: tuple[float, float],
    refusals: bool = True,
) -> Admitted:
    """Rounds over all bootstrap nodes with growing pauses, until one admits, all refuse (where that is final) or ``stop``."""
    if not bootstraps:
        raise ConfigError("no bootstrap node is known: give --bootstrap HOST:PORT")
    problems: dict[str, MeshError] = {}

    async def one_round() -> Admitted:
        problems.clear()
        for address in rng.sample(bootstraps, len(bootstraps)):
            try:
                answer = await attempt(address)
            except (EnrolError, TrustError) as error:
                problems[address] = error
                log.warning("enrol.attempt_failed", bootstrap=address, reason=error.message)
            else:
                return answer
        summary = "; ".join(f"{address}: {error.message}" for address, error in sorted(problems.items()))
        final = refusals and all(isinstance(error, EnrolRefused | TrustError) for error in problems.values())
        raise (EnrolRefused if final else EnrolError)(f"no bootstrap node admitted this node ({summary})")

    first_s, longest_s = pauses_s
    retrying = tenacity.AsyncRetrying(
        sleep=clock.sleep,
        stop=stop,
        wait=lambda state: min(longest_s, first_s * 2 ** min(state.attempt_number - 1, 16)) * rng.uniform(0.5, 1.0),
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, EnrolError) and not isinstance(error, EnrolRefused)),
        reraise=True,
    )
    result: Admitted = await retrying(one_round)
    return result


def _stop_after(clock: Clock, within_s: float) -> Callable[[tenacity.RetryCallState], bool]:
    end = clock.monotonic() + within_s
    return lambda _state: clock.monotonic() >= end
