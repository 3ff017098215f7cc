"""Who a peer is, proven once and then cheaply with every datagram.

An *introduction* is an envelope signed by the node's key: its membership, an X25519 key made for this start of the node, and
the session id its datagrams carry. Two nodes that hold each other's introductions share a pair key, and each datagram between
them carries a MAC under it: 1 µs in place of a signature's 100. A *cookie*, echoed, shows that a node receives what is sent to
its address.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections import OrderedDict
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from mesh.dht.address import Address, encode_address
from mesh.dht.introduction import Introduction, seal_introduction
from mesh.dht.seal import ReplayWindow
from mesh.dht.verify import Verifier
from mesh.errors import MalformedEnvelope
from mesh.identity import Identity

MAC_BYTES = 16
COOKIE_BYTES = 16
_COOKIE_LIFE_S = 600.0
_ADDRESSES_PER_PEER = 4
_SILENT_S = 30.0


@dataclass(slots=True, kw_only=True)
class Session:
    """What is known of a peer that has introduced itself."""

    introduction: Introduction
    key: bytes
    window: ReplayWindow = field(default_factory=ReplayWindow)
    proven: OrderedDict[Address, None] = field(default_factory=OrderedDict)
    heard: float = 0.0
    """Monotonic seconds of the last datagram under its MAC."""
    cookie: bytes = b""
    """The cookie this peer gave us, to be echoed until it stops asking."""

    @property
    def node_id(self) -> bytes:
        return self.introduction.member.node_id

    @property
    def serve(self) -> bool:
        return self.introduction.serve

    def prove(self, address: Address) -> None:
        self.proven[address] = None
        self.proven.move_to_end(address)
        if len(self.proven) > _ADDRESSES_PER_PEER:
            self.proven.popitem(last=False)


class Sessions:
    """Our own introduction, and the sessions with at most ``size`` peers."""

    def __init__(self, identity: Identity, verifier: Verifier, *, boot: int, serve: bool, size: int) -> None:
        self._identity = identity
        self._verifier = verifier
        self._boot = boot
        self._serve = serve
        self._size = size
        self._exchange = X25519PrivateKey.generate()
        self.sid = int.from_bytes(os.urandom(8))
        self._by_sid: OrderedDict[int, Session] = OrderedDict()
        self._by_node: dict[bytes, Session] = {}
        self.introduction = self._introduce()

    def _introduce(self) -> bytes:
        public = self._exchange.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        membership = self._identity.credentials.membership
        return seal_introduction(self._identity.key, membership, exchange_key=public, sid=self.sid, boot=self._boot, serve=self._serve)

    def renew(self) -> None:
        """Introduce with the membership of the day."""
        self.introduction = self._introduce()

    def __len__(self) -> int:
        return len(self._by_sid)

    def by_sid(self, sid: int) -> Session | None:
        session = self._by_sid.get(sid)
        if session is not None:
            self._by_sid.move_to_end(sid)
        return session

    def by_node(self, node_id: bytes) -> Session | None:
        return self._by_node.get(node_id)

    def drop(self, session: Session) -> None:
        if self._by_sid.get(session.introduction.sid) is session:
            del self._by_sid[session.introduction.sid]
        if self._by_node.get(session.node_id) is session:
            del self._by_node[session.node_id]

    def known(self, data: bytes, sid: int) -> Session | None:
        """The session this very introduction made earlier."""
        session = self._by_sid.get(sid)
        return session if session is not None and session.introduction.signed == data else None

    def admit(self, data: bytes, sid: int, *, now: float, at: float) -> Session:
        """Verify an introduction that came with session id ``sid``; returns its session. Raises a `TrustError`.

        ``now`` is wall time, ``at`` monotonic. A peer that has started again replaces its former session; an introduction older than a
        session in use is refused (a peer whose clock went back gets in once the former session has been silent).
        """
        introduction = self._verifier.introduction(data, now=now)
        if introduction.sid != sid:
            raise MalformedEnvelope("the introduction belongs to another session id")
        node_id = introduction.member.node_id
        holder = self._by_sid.get(sid)
        if holder is not None and holder.node_id != node_id and at - holder.heard < _SILENT_S:
            raise MalformedEnvelope("the session id belongs to another node")
        former = self._by_node.get(node_id)
        if former is not None:
            if introduction.boot < former.introduction.boot and at - former.heard < _SILENT_S:
                raise MalformedEnvelope("an introduction from before the peer's restart")
            if former.introduction.sid == sid and former.introduction.exchange_key == introduction.exchange_key:
                former.introduction = introduction
                return former
            self.drop(former)
        session = Session(introduction=introduction, key=self._pair_key(introduction), heard=at)
        self._by_sid[sid] = session
        self._by_node[node_id] = session
        if len(self._by_sid) > self._size:
            self.drop(next(iter(self._by_sid.values())))
        return session

    def _pair_key(self, introduction: Introduction) -> bytes:
        try:
            shared = self._exchange.exchange(X25519PublicKey.from_public_bytes(introduction.exchange_key))
        except ValueError:
            raise MalformedEnvelope("bad exchange key") from None
        ends = sorted((self._identity.node_id, introduction.member.node_id))
        return hashlib.blake2s(b"".join(ends), key=shared, person=b"im-pair1").digest()


def mac(key: bytes, header: bytes, plain: bytes) -> bytes:
    """What a datagram carries under the pair key. The header's session id tells the direction."""
    return hashlib.blake2s(header + plain, key=key, digest_size=MAC_BYTES).digest()


def mac_holds(key: bytes, header: bytes, plain: bytes, given: bytes) -> bool:
    return hmac.compare_digest(mac(key, header, plain), given)


class Cookies:
    """Proof of address without memory: a MAC over peer and address under a secret that changes."""

    def __init__(self) -> None:
        self._secrets = [os.urandom(32), os.urandom(32)]
        self._turned = float("-inf")

    def make(self, node_id: bytes, address: Address, *, now: float) -> bytes:
        if now - self._turned > _COOKIE_LIFE_S:
            self._secrets = [os.urandom(32), self._secrets[0]]
            self._turned = now
        return self._cookie(self._secrets[0], node_id, address)

    def holds(self, cookie: bytes, node_id: bytes, address: Address) -> bool:
        return any(hmac.compare_digest(self._cookie(secret, node_id, address), cookie) for secret in self._secrets)

    @staticmethod
    def _cookie(secret: bytes, node_id: bytes, address: Address) -> bytes:
        return hashlib.blake2s(node_id + encode_address(address), key=secret, digest_size=COOKIE_BYTES).digest()
