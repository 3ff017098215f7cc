"""Who is let in: the decisions of enrolment and renewal, apart from how they are asked for."""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import structlog

from bootstrap.ledger import Ledger, check_uses
from mesh.authority import Admission, encode_admission
from mesh.clock import Clock
from mesh.errors import InvalidRequest, RateLimited, Revoked, TrustError
from mesh.identity import Credentials, Peer, encode_credentials, parse_request
from mesh.invite import verify_invite
from mesh.revocations import RevocationList
from mesh.trust import Role, Trust, key_id, raw_public_key

log = structlog.get_logger(__name__)

ATTEMPTS_BURST = 100.0
ATTEMPTS_PER_S = 5.0
"""Enrolments from one address: enough for a rack behind one NAT that starts at once, too few to search for a token."""
ADDRESSES_KEPT = 10_000
MAX_TOLD = 2_000
"""Nodes of one token told to another bootstrap node: the uses of a token for more than so many nodes are counted at each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """Admits nodes. ``known_bootstraps`` is asked at each answer, as they come and go; ``tell_others`` says to the other bootstrap
    nodes that a node uses a token and returns the nodes they know to use it."""

    admission: Admission
    trust: Trust
    ledger: Ledger
    clock: Clock
    known_bootstraps: Callable[[], tuple[str, ...]]
    tell_others: Callable[[bytes, bytes], Awaitable[set[bytes]]]
    revoked: RevocationList = field(default_factory=RevocationList)

    @property
    def present(self) -> Admission:
        """What admits nodes, with the newest keyset there is: newcomers are told of every issuer at once."""
        return replace(self.admission, keyset=self.trust.keyset)

    def about(self) -> dict[str, Any]:
        """What anybody may know of this mesh: enough to check everything else."""
        return {
            "mesh_id": self.trust.mesh_id.hex(),
            "root_certificate": self.admission.root_certificate.decode(),
            "keyset": self.trust.keyset.signed.hex(),
        }

    async def enrol(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Admit a newcomer for its join token. Raises `InvalidRequest`, a `TrustError` or `TokenSpent`."""
        now = self.clock.wall()
        signed = _read_hex(body, "token")
        invite = verify_invite(signed, self.trust, now=now)
        if self.revoked.newest.refuses_invite(invite.id):
            raise Revoked("this join token has been revoked; ask for another")
        if body.get("role") != str(invite.role):
            raise TrustError(f"this join token admits a {invite.role} and nothing else")
        public_key = parse_request(_read_text(body, "request").encode())
        node_id = key_id(raw_public_key(public_key))
        nodes = await self.ledger.spend(invite, node_id, now=now)
        elsewhere = await self.tell_others(signed, node_id)
        if not elsewhere <= nodes:
            nodes = await self.ledger.note(invite, elsewhere, now=now)
            check_uses(invite, nodes)
        left = invite.uses - len(nodes)
        log.info("enrol.admitted", role=str(invite.role), id=node_id.hex()[:12], token=invite.id.hex()[:8], uses_left=left)
        return self._answer(self.present.admit(public_key, invite.role, now=now), invite.role)

    async def spent(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Another bootstrap node has admitted a node for a token: note it, and say who else has used it."""
        now = self.clock.wall()
        invite = verify_invite(_read_hex(body, "token"), self.trust, now=now)
        node_id = _read_hex(body, "node")
        if len(node_id) != 32:
            raise InvalidRequest("'node' must be a node id", param="node")
        nodes = await self.ledger.note(invite, (node_id,), now=now)
        return {"nodes": sorted(node.hex() for node in nodes)[:MAX_TOLD]}

    def renew(self, peer: Peer, body: Mapping[str, Any]) -> dict[str, Any]:
        """Fresh credentials, same key, same role, for a node that TLS has proved to be ``peer``."""
        public_key = parse_request(_read_text(body, "request").encode())
        if key_id(raw_public_key(public_key)) != peer.node_id:
            raise TrustError("a renewal keeps the node's key: the signing request was made with another")
        log.info("enrol.renewed", role=str(peer.role), id=peer.node_id.hex()[:12])
        return self._answer(self.present.admit(public_key, peer.role, now=self.clock.wall()), peer.role)

    def _answer(self, credentials: Credentials, role: Role) -> dict[str, Any]:
        answer: dict[str, Any] = {
            "credentials": encode_credentials(credentials),
            "bootstraps": list(self.known_bootstraps()),
        }
        if role == Role.BOOTSTRAP:
            answer["admission"] = encode_admission(self.present)
        return answer


class AttemptLimit:
    """A token bucket per client address (per /64 for IPv6). Pure: time comes in as ``now``, monotonic seconds."""

    def __init__(self, *, burst: float = ATTEMPTS_BURST, per_s: float = ATTEMPTS_PER_S, size: int = ADDRESSES_KEPT) -> None:
        self._burst, self._per_s, self._size = burst, per_s, size
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, host: str, *, now: float) -> None:
        """Count one attempt. Raises `RateLimited` with the time to wait."""
        network = _network(host)
        tokens, since = self._buckets.pop(network, (self._burst, now))
        tokens = min(self._burst, tokens + (now - since) * self._per_s)
        allowed = tokens >= 1.0
        self._buckets[network] = (tokens - 1.0 if allowed else tokens, now)
        if len(self._buckets) > self._size:
            self._buckets.popitem(last=False)
        if not allowed:
            raise RateLimited("too many enrolments from this address; try again shortly", retry_after_s=(1 - tokens) / self._per_s)


def _network(host: str) -> str:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if address.version == 6 and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


def _read_text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value.isascii():
        raise InvalidRequest(f"'{name}' must be a string", param=name)
    return value


def _read_hex(body: Mapping[str, Any], name: str) -> bytes:
    try:
        return bytes.fromhex(_read_text(body, name))
    except ValueError:
        raise InvalidRequest(f"'{name}' must be hexadecimal", param=name) from None
