"""Fuzzing of every parser that reads what strangers or malicious members send: seeded, so that a number names a run.

A target makes inputs from a generator and says what came of one: "refused", or what else is fine. It raises `Hole` where a thing was
accepted that must not be; any other exception is a hole too. `scripts/fuzz` runs millions, the default suite a sample and the corpus
(tests/corpus/fuzz.json): inputs that were refused for reasons of their own.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import string
import time
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgpack
import structlog
from aiohttp import HttpVersion11

from mesh.apikey import APIKEY_DOMAIN, PREFIX, ApiKey, KeyVerifier, _checksum, decode_base62, encode_base62, mint, mint_with
from mesh.authority import KEYS_KID, NODES_KID
from mesh.clock import SystemClock
from mesh.delegation import Delegation, Signer, seal_delegation
from mesh.documents import DOCUMENT_DOMAIN, Document, parse_document, seal_document
from mesh.envelope import seal
from mesh.errors import InvalidRequest, MeshError, TrustError
from mesh.identity import Identity, Peer
from mesh.invite import Invite, parse_token, seal_invite, verify_invite
from mesh.link.frames import MAX_PAYLOAD_BYTES, Frame, encode_control, encode_credit, encode_frame, encode_tokens
from mesh.link.link import Link
from mesh.membership import MEMBERSHIP_DOMAIN, MembershipCache, parse_membership
from mesh.orders import ORDER_DOMAIN, Action, Order, parse_order, seal_order
from mesh.receipts import RECEIPTS_DOMAIN, parse_batch, seal_batch
from mesh.records import RECORD_DOMAIN, ModelEntry, Record, State, parse_record
from mesh.revocations import parse_revocations
from mesh.scope import UNBOUNDED, Scope
from mesh.trust import KEYSET_DOMAIN, Role, Trust, parse_keyset, raw_public_key
from proxy.downstream import Downstream
from proxy.fleet import Fleet
from proxy.forward import Attempt
from proxy.openai import TASKS, parse_call, priority_of, prompt_of
from tests.support.answers import read_answer
from tests.support.authority import make_mesh
from tests.support.front import ProxyOwner, StandInEngine
from tests.support.pipe import Owner, PipeTransport
from tests.support.records import NOW, Scribe
from worker.admission import Admission
from worker.engine import ModelSpec, Task
from worker.gateway import Gateway
from worker.usage import EventStream, engine_complaint, engine_failure, prepare_body
from worker.usage import read_answer as read_engine_answer

CORPUS = Path(__file__).parents[1] / "corpus" / "fuzz.json"


class Hole(AssertionError):
    """Something was accepted that must not be."""


# -- how bytes are spoilt


def spoil(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """One to three changes: a bit, a byte, a piece left out, doubled, put in, cut off, or taken from another."""
    spoilt = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(spoilt) + 1)
        match rng.randrange(9):
            case 0 | 1 if spoilt:
                spoilt[at % len(spoilt)] ^= 1 << rng.randrange(8)
            case 2 if spoilt:
                spoilt[at % len(spoilt)] = rng.choice((0, 1, 0x7F, 0x80, 0x81, 0xC0, 0xC4, 0xDF, 0xFF, rng.randrange(256)))
            case 3:
                del spoilt[at : at + rng.randint(1, 40)]
            case 4:
                spoilt[at:at] = rng.randbytes(rng.randint(1, 40))
            case 5:
                del spoilt[at:]
            case 6:
                other = rng.choice(others)
                spoilt[at:] = other[rng.randrange(len(other) + 1) :]
            case 7:
                piece = spoilt[at : at + rng.randint(1, 60)]
                spoilt[at:at] = piece
            case _:
                spoilt += rng.randbytes(rng.choice((1, 64, 2000)))
    return bytes(spoilt)


def odd_value(rng: random.Random, depth: int = 0) -> Any:
    """Anything msgpack can say."""
    match rng.randrange(12 if depth < 3 else 9):
        case 0:
            return None
        case 1:
            return rng.random() < 0.5
        case 2:
            return rng.choice((0, 1, -1, 2**31, 2**63 - 1, -(2**63), 2**64 - 1, rng.randrange(10**6)))
        case 3:
            return rng.choice((0.0, -0.0, float("nan"), float("inf"), float("-inf"), 1e308, rng.random()))
        case 4:
            return "".join(rng.choices(string.printable + "\u00e9\u202e\u0000\U0001f600", k=rng.choice((0, 3, 300))))
        case 5:
            return rng.randbytes(rng.choice((0, 8, 32, 300)))
        case 6:
            return rng.choice(("worker", "proxy", "ready", "invoker", "admin", "m", "*"))
        case 7:
            return int(NOW) + rng.randint(-(10**7), 10**7)
        case 8:
            return int(NOW * 1000) + rng.randint(-(10**9), 10**9)
        case 9 | 10:
            return [odd_value(rng, depth + 1) for _ in range(rng.choice((0, 1, 3, 70)))]
        case _:
            return {str(odd_value(rng, 3))[:20]: odd_value(rng, depth + 1) for _ in range(rng.randrange(4))}


def odd_payload(payload: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A payload with one to three fields gone, changed or put in."""
    changed = dict(payload)
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice([*payload, "x", "r", "exp"])
        if rng.random() < 0.25:
            changed.pop(name, None)
        else:
            changed[name] = odd_value(rng)
    return changed


_DIGITS = string.digits + string.ascii_uppercase + string.ascii_lowercase
_PAIRS = [high + low for high in _DIGITS for low in _DIGITS]


def quick_base62(data: bytes) -> str:
    """As `mesh.apikey.encode_base62`, ten digits at a time: most of a run's time went into it."""
    number, words = int.from_bytes(data), list[str]()
    while number:
        number, word = divmod(number, 62**10)
        pairs = []
        for _ in range(5):
            word, pair = divmod(word, 62**2)
            pairs.append(_PAIRS[pair])
        words.append("".join(reversed(pairs)))
    return "".join(reversed(words)).lstrip("0")


def why(error: MeshError) -> str:
    """An error's kind and message, without what differs from input to input."""
    return f"{type(error).__name__}: {re.sub(r'[0-9]+', '#', error.message)[:80]}"


# -- keys, records, documents


class Keys:
    """API keys. What a real issuer signed for now and for keys is not the fuzzer's to make; everything else must be refused."""

    name = "keys"

    def __init__(self) -> None:
        scribe = Scribe(7)
        self._mesh = scribe.mesh
        stranger = make_mesh(now=NOW, entropy=random.Random(8).randbytes)
        self._verifier = KeyVerifier(self._mesh.trust(), size=100)
        self._base = ApiKey(
            id=b"12345678", project="search", roles=frozenset({"invoker"}), not_before=NOW - 60, expires=NOW + 3600, models=frozenset({"m"})
        )
        self._issuer, self._nodes, self._stranger = self._mesh.keys_issuer, self._mesh.admission.key, stranger.keys_issuer
        self._good = [
            mint(claims, self._issuer, KEYS_KID)
            for claims in (
                self._base,
                replace(self._base, models=None, rps=5.0, budget=1.5, region="eu-1"),
                replace(
                    self._base, project="p" * 60, roles=frozenset({"viewer", "admin"}), models=frozenset(f"model-{n}" for n in range(40))
                ),
            )
        ]
        # A delegate: what it may sign is for one project, one model, one role, and an hour.
        self._scope = Scope(projects=frozenset({"search"}), models=frozenset({"m"}), roles=frozenset({"invoker"}), rps=5.0)
        self._delegate = scribe.node().key
        issuer = Signer(kid=KEYS_KID, key=self._issuer, scope=UNBOUNDED, expires=NOW + 10**6)
        delegation = Delegation(
            id=b"delegate",
            public_key=raw_public_key(self._delegate.public_key()),
            scope=self._scope,
            not_before=NOW - 60,
            expires=NOW + 3600,
        )
        self._chain = [seal_delegation(delegation, issuer).signed]
        delegated = Signer(kid="d", key=self._delegate, scope=self._scope, expires=NOW + 3600, chain=tuple(self._chain))
        self._good.append(mint_with(replace(self._base, rps=5.0), delegated))
        self._envelopes = [decode_base62(key[len(PREFIX) : -6]) for key in self._good]
        payload = {"id": b"12345678", "p": "search", "r": ["invoker"], "nbf": int(NOW) - 60, "exp": int(NOW) + 3600}
        self._payload = payload
        for key, envelope in zip(self._good, self._envelopes, strict=True):
            self._verifier.verify(key, now=NOW)
            assert self._text(envelope) == key.encode()

    def make(self, rng: random.Random) -> bytes:
        match rng.randrange(12):
            case 10 | 11:  # a delegate that asks for more than it may give
                claims = {**self._payload, "m": ["m"], "rps": 5.0, "d": self._chain}
                claims = odd_payload({**claims, "r": rng.choice((["invoker"], ["admin", "invoker"])), "exp": int(NOW) + 60}, rng)
                if rng.random() < 0.2:
                    claims["d"] = [spoil(self._chain[0], rng, self._chain)]
                return self._text(seal(APIKEY_DOMAIN, raw_public_key(self._delegate.public_key()), self._delegate, claims))
            case 0 | 1 | 2:
                return spoil(rng.choice(self._good).encode(), rng, [key.encode() for key in self._good])
            case 3 | 4 | 5 | 6:
                return self._text(spoil(rng.choice(self._envelopes), rng, self._envelopes))
            case 7:  # signed, but not by who may, for this, in this mesh
                domain, kid, signer = rng.choice(
                    [
                        (APIKEY_DOMAIN, KEYS_KID, self._stranger),
                        (APIKEY_DOMAIN, NODES_KID, self._nodes),
                        (APIKEY_DOMAIN, KEYS_KID, self._nodes),
                        (APIKEY_DOMAIN, "keys-2", self._issuer),
                        (RECORD_DOMAIN, KEYS_KID, self._issuer),
                        (DOCUMENT_DOMAIN, KEYS_KID, self._issuer),
                        (MEMBERSHIP_DOMAIN, KEYS_KID, self._issuer),
                    ]
                )
                return self._text(seal(domain, kid.encode(), signer, {**self._payload, "p": f"p{rng.randrange(10**6)}"}))
            case 8:  # signed by who may, at the wrong time
                begin = NOW + rng.choice((-1, 1)) * rng.uniform(100 * 24 * 3600, 10**9)
                claims = {**self._payload, "nbf": int(begin), "exp": int(begin + rng.uniform(1, 90 * 24 * 3600))}
                return self._text(seal(APIKEY_DOMAIN, KEYS_KID.encode(), self._issuer, claims))
            case _:  # signed by who may, for too long, in roles there are none, too large
                wrong = rng.choice(
                    [
                        {"exp": int(NOW) + rng.randint(91 * 24 * 3600, 10**9)},
                        {"r": ["root", "invoker"]},
                        {"m": ["m" * 250] * rng.randint(12, 16)},
                        {"id": rng.randbytes(rng.choice((0, 7, 9, 64)))},
                        {"p": rng.choice((None, 5, "x" * 65, "a\nb", b"p"))},
                        {"nbf": rng.choice((None, "now", float("nan"), float("inf"), True))},
                        {"rps": rng.choice((-1, "5", float("inf"), float("nan"), True, None))},
                    ]
                )
                return self._text(seal(APIKEY_DOMAIN, KEYS_KID.encode(), self._issuer, {**self._payload, **wrong}))

    def run(self, data: bytes) -> str:
        text = data.decode("latin-1")
        if text in self._good:
            return "unchanged"
        try:
            key = self._verifier.verify(text, now=NOW)
        except TrustError as error:
            return why(error)
        within = key.project == "search" and key.models is not None and key.models <= {"m"} and key.roles <= {"invoker"}
        if key.delegations and within and key.rps is not None and key.rps <= 5.0:
            return "what a delegate may give"
        raise Hole("a key nobody issued was accepted")

    @staticmethod
    def _text(envelope: bytes) -> bytes:
        if len(envelope) > 3200:
            return (PREFIX + "1" * 4100).encode()  # too long for a key, and long to write out
        text = PREFIX + quick_base62(envelope)
        return (text + _checksum(text)).encode()


class Records:
    """What is signed in a mesh but keys: records, memberships, keysets, documents, orders and receipts."""

    name = "records"

    def __init__(self) -> None:
        scribe = Scribe(9)
        self._trust: Trust = scribe.mesh.trust()
        self._members = MembershipCache(self._trust)
        self._mesh_id = scribe.mesh.mesh_id
        self._nodes: list[Identity] = [scribe.node(), scribe.node(Role.PROXY)]
        stranger = Scribe(10)
        outsider = stranger.node()
        records = [scribe.record(node) for node in self._nodes] + [stranger.record(outsider)]
        self._good: dict[bytes, list[bytes]] = {
            b"r": [record.signed for record in records[:2]],
            b"m": [node.credentials.membership for node in self._nodes],
            b"k": [scribe.mesh.keyset.signed],
            b"o": [
                seal_order(
                    Order(node_id=b"n" * 32, action=Action.DRAIN, issued=NOW, expires=NOW + 60), scribe.mesh.keys_issuer, KEYS_KID
                ).signed
            ],
            b"b": [
                seal_batch(node.key, node.credentials.membership, number=1, count=1, root=bytes(32), previous=b"", at=int(NOW * 1000))
                for node in self._nodes
            ],
            b"d": [
                seal_document(
                    Document(kind="limits", name="a", seq=n, previous=b"", issued=NOW, body=bytes(n * 100)),
                    scribe.mesh.keys_issuer,
                    KEYS_KID,
                ).signed
                for n in (1, 2)
            ],
        }
        self._others = [signed for each in self._good.values() for signed in each] + [records[2].signed, outsider.credentials.membership]
        self._signers = [*(node.key for node in self._nodes), outsider.key, scribe.mesh.keys_issuer, scribe.mesh.admission.key]
        self._own = {node.node_id: raw_public_key(node.key.public_key()) for node in self._nodes}
        self._memberships = [*(node.credentials.membership for node in self._nodes), outsider.credentials.membership]

    def make(self, rng: random.Random) -> bytes:
        kind = rng.choice((b"r", b"r", b"r", b"m", b"k", b"d", b"o", b"b"))
        if rng.random() < 0.05:
            return b"i" + self._issuers_word(rng)
        if rng.random() < 0.6:
            return kind + spoil(rng.choice(self._good[kind]), rng, self._others)
        if kind in (b"r", b"b"):  # a member's own words, or what it puts into another's mouth
            node = rng.choice(self._nodes)
            payload = msgpack.unpackb(self._good[kind][0][34:-64])
            payload["mem"] = rng.choice(self._memberships)
            signer = rng.choice([*self._own.values(), rng.randbytes(32)])
            return kind + seal(
                RECORD_DOMAIN if kind == b"r" else RECEIPTS_DOMAIN,
                signer,
                rng.choice([node.key, *self._signers]),
                odd_payload(payload, rng),
            )
        # signed by somebody who may not sign such a thing
        domain = rng.choice((RECORD_DOMAIN, MEMBERSHIP_DOMAIN, DOCUMENT_DOMAIN, APIKEY_DOMAIN, KEYSET_DOMAIN))
        signer_name = rng.choice((KEYS_KID.encode(), NODES_KID.encode(), b"x", *self._own.values()))
        key = rng.choice(self._signers[:3])
        good = rng.choice(self._good[kind])
        payload = msgpack.unpackb(good[2 + good[1] : -64])
        return kind + seal(domain, signer_name, key, odd_payload(payload, rng) if rng.random() < 0.5 else payload)

    def _issuers_word(self, rng: random.Random) -> bytes:
        """An issuer may say what it likes, but nothing that a reader breaks on."""
        kind, domain = rng.choice(((b"o", ORDER_DOMAIN), (b"d", DOCUMENT_DOMAIN)))
        good = self._good[kind][0]
        payload = msgpack.unpackb(good[2 + good[1] : -64])
        if kind == b"d":
            revoked = {"keys": bytes(16), "invites": b"", "projects": {"p": 5}, "issuers": {}, "before": 0}
            payload["body"] = msgpack.packb(odd_payload(revoked, rng))
        signed = seal(domain, KEYS_KID.encode(), self._signers[3], odd_payload(payload, rng) if rng.random() < 0.5 else payload)
        return kind + signed

    def run(self, data: bytes) -> str:
        kind, signed = data[:1], data[1:]
        if signed in self._good.get(kind, ()):
            return "unchanged"
        try:
            match kind:
                case b"r":
                    record = parse_record(signed, self._members, now=NOW)
                    if self._own.get(record.node_id) != signed[2:34]:
                        raise Hole("a record in somebody else's name was accepted")
                    return "a member's own word"
                case b"m":
                    parse_membership(signed, self._trust, now=NOW)
                case b"k":
                    parse_keyset(signed, mesh_id=self._mesh_id)
                case b"o":
                    parse_order(signed, self._trust, now=NOW)
                case b"b":
                    batch = parse_batch(signed, self._trust, now=NOW)
                    if self._own.get(batch.node_id) != signed[2:34]:
                        raise Hole("receipts in somebody else's name were accepted")
                    return "a member's own word"
                case b"i":
                    parse_order(signed[1:], self._trust, now=NOW) if signed[:1] == b"o" else parse_revocations(
                        parse_document(signed[1:], self._trust, now=NOW)
                    )
                    return "an issuer's own word"
                case _:
                    parse_document(signed, self._trust, now=NOW)
        except TrustError as error:
            return why(error)
        raise Hole(f"{kind!r} that nobody issued was accepted")


class Tokens:
    """Join tokens, as a newcomer reads them and a bootstrap node verifies them."""

    name = "tokens"

    def __init__(self) -> None:
        scribe = Scribe(11)
        self._trust, mesh = scribe.mesh.trust(), scribe.mesh
        self._good = [
            seal_invite(
                mesh.keys_issuer,
                KEYS_KID,
                Invite(id=bytes(16), role=role, uses=3, issued=NOW, expires=NOW + 3600),
                mesh_id=mesh.mesh_id,
                bootstraps=("192.0.2.1:7600",),
            ).encode()
            for role in (Role.WORKER, Role.BOOTSTRAP)
        ]
        self._envelopes = [decode_base62(good.decode()[len("imjoin_") :])[:-4] for good in self._good]

    def make(self, rng: random.Random) -> bytes:
        if rng.random() < 0.4:
            return spoil(rng.choice(self._good), rng, self._good)
        spoilt = spoil(rng.choice(self._envelopes), rng, self._envelopes)
        return b"imjoin_" + encode_base62(b"\x01" + spoilt + zlib.crc32(b"\x01" + spoilt).to_bytes(4)).encode()

    def run(self, data: bytes) -> str:
        try:
            token = parse_token(data.decode("latin-1"))
            verify_invite(token.signed, self._trust, now=NOW)
        except TrustError as error:
            return why(error)
        if token.signed not in self._envelopes:
            raise Hole("an invitation that nobody issued was accepted")
        return "unchanged"


# -- frames


class _Client(asyncio.Transport):
    """The connection to a client: takes everything."""

    def __init__(self) -> None:
        super().__init__()
        self.got = bytearray()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.got += data

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return False


class _Owner(ProxyOwner):
    """As the proxy's, with the prefixes that a worker tells."""

    def on_control(self, link: Link, kind: Frame, fields: dict[str, Any]) -> None:
        if kind == Frame.PREFIX:
            self._fleet.on_prefix(link, fields)
        super().on_control(link, kind, fields)

    def on_lost(self, link: Link, reason: str) -> None:
        self.lost.append(reason)
        super().on_lost(link, reason)


ALLOWED_HEADERS = {
    "content-type",
    "content-length",
    "transfer-encoding",
    "cache-control",
    "connection",
    "openai-processing-ms",
    "x-request-id",
}


OPENED = encode_control(Frame.OPEN, 2**32 - 1, {}) + encode_frame(Frame.CANCEL, 2**32 - 1)


class Frames:
    """Frames from an enrolled member: a worker's to a proxy with three clients waiting, a proxy's to a worker."""

    name = "frames"

    def __init__(self) -> None:
        structlog.configure(processors=[_drop])
        self._runner = asyncio.Runner()
        self._problems: list[dict[str, Any]] = []
        self._runner.get_loop().set_exception_handler(lambda _, context: self._problems.append(context))
        self._record = Record(
            node_id=b"w" * 32,
            role=Role.WORKER,
            boot=1,
            seq=1,
            issued=NOW,
            expires=NOW + 10**9,
            state=State.READY,
            models=(ModelEntry(name="m"),),
        )
        self._clock = SystemClock()
        self._fed = self._opened = 0

    def make(self, rng: random.Random) -> bytes:
        to_proxy = rng.random() < 0.6
        self._opened = -1
        frames = [encode_control(Frame.HELLO, 0, {"v": 1})] if rng.random() < 0.95 else []
        for _ in range(rng.randint(5, 200)):
            with suppress(ValueError):  # too large for a frame
                frames.append(self._frame(rng, to_proxy) if rng.random() < 0.05 else self._honest(rng, to_proxy))
        data = b"".join(frames)
        if rng.random() < 0.15:
            data = spoil(data, rng, [data])
        return bytes((to_proxy,)) + data

    def _honest(self, rng: random.Random, to_proxy: bool) -> bytes:
        """What an honest peer might send, if seldom just now."""
        if not to_proxy:
            self._opened += 2
            fields = {"id": "req_1", "task": "chat", "model": "m", "stream": True, "size": 2, "project": "p", "key": b"12345678", "pri": 1}
            body = encode_frame(Frame.DATA, self._opened, b"{}") + encode_control(Frame.END, self._opened, {})
            return encode_control(Frame.OPEN, self._opened, fields) + rng.choice((b"", body, encode_frame(Frame.CANCEL, self._opened)))
        stream = rng.choice((1, 3, 5))
        return rng.choice(
            (
                encode_control(Frame.ACCEPTED, stream, {}),
                encode_control(Frame.PROGRESS, stream, {"running": 1}),
                encode_control(Frame.HEAD, stream, {"status": 200, "type": "text/event-stream"}),
                encode_control(Frame.HEAD, stream, {"status": 200, "type": "application/json", "length": 6}),
                encode_control(Frame.END, stream, {"in": 1, "out": 2}),
                encode_control(Frame.LOAD, 0, {"run": 1, "wait": 0, "kv": 0.1, "yours": 1}),
                encode_frame(Frame.PING, 0, bytes(8)),
            )
        )

    def _frame(self, rng: random.Random, to_proxy: bool) -> bytes:
        stream = rng.choice((1, 1, 1, 3, 3, 5, 0, 2, 4, rng.randrange(12), 2**32 - 1))
        match rng.randrange(12):
            case 0:
                return encode_frame(rng.randrange(256), stream, rng.randbytes(rng.choice((0, 1, 4, 8, 60))))
            case 1:
                return encode_frame(rng.choice(list(Frame)), stream, msgpack.packb(odd_value(rng)))
            case 2:
                return encode_credit(stream, rng.choice((0, 1, 2**31, 2**32 - 1, rng.randrange(10**6))))
            case 3 | 4 if to_proxy:
                return encode_frame(
                    Frame.DATA,
                    stream,
                    rng.choice(
                        (b"data: x\n\n", b"", b"0\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", bytes(rng.choice((10, 5000, MAX_PAYLOAD_BYTES))))
                    ),
                )
            case 5 if to_proxy:
                return encode_tokens(stream, rng.randbytes(rng.randrange(8)), rng.choice((b"", b"data: y\n\n")))
            case 6 | 7 if to_proxy:
                return encode_control(Frame.HEAD, stream, self._odd_head(rng))
            case 8 if to_proxy:
                return encode_control(Frame.END, stream, {"in": odd_value(rng), "out": 5, "cached": odd_value(rng)})
            case 9:
                fields = {
                    "code": rng.choice(("overloaded", "worker_lost", "rerouted", "invalid_request", odd_value(rng))),
                    "message": odd_value(rng),
                }
                return encode_control(Frame.ERROR, stream, {**fields, "retry": odd_value(rng), "param": odd_value(rng)})
            case 10:
                fields = {"run": 1, "wait": 0, "kv": 0.1, "yours": 1, "n": 3, "pre": 5, "rate": 7, "last": 1}
                return encode_control(Frame.LOAD, 0, odd_payload(fields, rng) if rng.random() < 0.5 else fields)
            case 11 if to_proxy:
                return encode_control(Frame.PREFIX, 0, odd_payload({"new": True, "add": rng.randbytes(16), "del": rng.randbytes(8)}, rng))
        if to_proxy:
            return encode_frame(rng.choice((Frame.ACCEPTED, Frame.PING, Frame.PONG, Frame.DRAIN)), rng.choice((0, stream)), b"\x80")
        fields = {"id": "req_1", "task": "chat", "model": "m", "stream": True, "size": 2, "project": "p", "key": b"12345678", "pri": 1}
        kind = rng.choice((Frame.OPEN, Frame.OPEN, Frame.DATA, Frame.END, Frame.CANCEL))
        if kind == Frame.OPEN:
            return encode_control(kind, stream, odd_payload(fields, rng) if rng.random() < 0.5 else fields)
        return encode_frame(
            kind, stream, {Frame.DATA: rng.choice((b"{}", b"", bytes(MAX_PAYLOAD_BYTES))), Frame.END: b"\x80"}.get(kind, b"")
        )

    def _odd_head(self, rng: random.Random) -> dict[str, Any]:
        head: dict[str, Any] = rng.choice(
            [
                {"status": 200, "type": "text/event-stream"},
                {"status": 200, "type": "application/json", "length": rng.randrange(20)},
                {
                    "status": 200,
                    "type": rng.choice(("text/html\r\nX-Evil: 1", "a/b\r\n\r\n", "text/plain\n", "x" * 5000, "a/b; charset=x\0")),
                    "length": 5,
                },
                {"status": rng.choice((100, 101, 204, 304, 500, 2000, True)), "type": "text/event-stream"},
            ]
        )
        return odd_payload(head, rng) if rng.random() < 0.4 else head

    def count(self, data: bytes) -> int:
        """Frames that were looked at in the last run."""
        return self._fed

    def _feed(self, link: Link, data: bytes) -> None:
        """Frame by frame, as long as somebody listens."""
        at = 0
        while at < len(data) and not link.closed:
            end = at + 9 + int.from_bytes(data[at : at + 4])
            link.data_received(data[at:end])
            self._fed += 1
            at = end

    def run(self, data: bytes) -> str:
        self._fed = 0
        outcome = self._runner.run(self._to_proxy(data[1:]) if data[0] else self._to_worker(data[1:]))
        if self._problems:
            problem = self._problems.pop()
            raise Hole(f"unhandled: {problem.get('message')} {problem.get('exception')!r}")
        return outcome

    async def _to_proxy(self, data: bytes) -> str:
        fleet = Fleet(on_record=lambda record: None)
        owner = _Owner(fleet, self._record)
        link = Link(owner, clock=self._clock, dialled=True)
        link.connection_made(PipeTransport(link))
        at = 9 + int.from_bytes(data[:4]) if data[8:9] == bytes((Frame.HELLO,)) else 0
        self._feed(link, data[:at])
        clients, tasks = [], []
        worker = fleet.workers.get(self._record.node_id)
        if worker is not None:
            for _ in range(3):
                client = _Client()
                request = SimpleNamespace(version=HttpVersion11)
                attempt = Attempt(
                    worker,
                    Downstream(cast(Any, request), client, keep_alive=True),
                    "x-request-id: req_1\r\n",
                    loop=asyncio.get_running_loop(),
                    now=0.0,
                )
                tasks.append(asyncio.create_task(attempt.run({"id": "req_1"}, b"{}")))
                clients.append(client)
            await asyncio.sleep(0)
        self._feed(link, data[at:])
        reason = owner.lost[0] if link.closed else ""
        link.abort("enough")
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, BaseException) and not isinstance(result, MeshError):
                raise result
        for client in clients:
            check_answer(bytes(client.got))
        return f"proxy: {re.sub('[0-9]+', '#', reason)}"

    async def _to_worker(self, data: bytes) -> str:
        owner = Owner(Peer(node_id=b"p" * 32, role=Role.PROXY))
        link = Link(owner, clock=self._clock, dialled=False)
        engine = StandInEngine(None, (ModelSpec(name="m", engine_name="m", tasks=frozenset(Task)),))
        gateway = Gateway(
            engine, cast(Any, None), headers={}, admission=Admission(limit=5, queue_limit=5), on_load=lambda: None, clock=self._clock
        )
        owner.on_stream = gateway.open
        link.connection_made(PipeTransport(link))
        self._feed(link, data)
        for _ in range(5):
            await asyncio.sleep(0)
        link.data_received(OPENED)
        reason = owner.lost[0] if link.closed else ""
        link.abort("enough")
        await gateway.stop()
        return f"worker: {re.sub('[0-9]+', '#', reason)}"


def check_answer(got: bytes) -> None:
    """A client must be able to read what it got as the beginning of one answer, with no header but the proxy's own."""
    if not got:
        return
    try:
        answer = read_answer(got)
    except (AssertionError, ValueError) as error:
        raise Hole(f"a client got {got[:200]!r}: {error}") from None
    if answer is None or answer.status != 200 or set(answer.headers) - ALLOWED_HEADERS or answer.rest:
        raise Hole(f"a client got {got[:200]!r}")


# -- what engines say


class Engines:
    """An engine's events and answers."""

    name = "engines"
    _TOKEN = b'data: {"id": "c", "choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": null}]}\n\n'
    _EVENTS = (
        _TOKEN,
        _TOKEN,
        b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}}\n\n',
        b"data: [DONE]\n\n",
        b'data: {"error": {"message": "died", "code": 500}}\n\n',
        b": comment\n\n",
        b'event: response.completed\ndata: {"type": "response.completed", "response": {"usage": {"input_tokens": 1}}}\n\n',
        b'data: {"choices": [{"delta": {"content": "\\"usage\\" [DONE]"}}]}\r\n\r\n',
        b'data: {"usage": {"prompt_tokens": 1e308, "completion_tokens": -5}}\n\n',
        b"data: \xff\xfe\n\n",
        b"\n\n",
        b"data: {\n\n",
    )

    def make(self, rng: random.Random) -> bytes:
        data = b"".join(rng.choices(self._EVENTS, k=rng.randint(1, 12)))
        if rng.random() < 0.8:
            data = spoil(data, rng, list(self._EVENTS))
        return rng.randrange(2**16).to_bytes(2) + data

    def run(self, data: bytes) -> str:
        rng, data = random.Random(data[:2]), data[2:]
        pieces = []
        at = 0
        while at < len(data):
            size = rng.choice((1, 2, 5, 40, 400))
            pieces.append(data[at : at + size])
            at += size
        read_engine_answer(data)
        engine_complaint(data, 500)
        engine_failure(data)
        show = rng.random() < 0.5
        once, cut = EventStream(show_usage=show), EventStream(show_usage=show)
        whole = self._read(once, [data]), once
        said = self._read(cut, pieces)
        if (events(said), cut.complete, cut.failure, cut.usage) != (
            events(whole[0]),
            whole[1].complete,
            whole[1].failure,
            whole[1].usage,
        ):
            raise Hole(f"other pieces, another answer: {events(said)} {cut.complete} {events(whole[0])} {whole[1].complete}")
        return "failed" if cut.failure is not None else "complete" if cut.complete else "cut off"

    @staticmethod
    def _read(stream: EventStream, pieces: list[bytes]) -> bytes:
        said = b""
        for piece in pieces:
            said += stream.feed(piece)
            if stream.failure is not None:
                return said
        return said + stream.close()


def events(said: bytes) -> list[bytes]:
    """As a client counts them."""
    return [event.strip(b"\n") for event in said.replace(b"\r\n", b"\n").split(b"\n\n") if event.strip(b"\n")]


# -- what clients say


class Bodies:
    """Request bodies. What the proxy takes must mean the same to an engine that reads it with Python's json, as vLLM does."""

    name = "bodies"
    _GOOD = (
        b'{"model": "m", "messages": [{"role": "user", "content": "\\u00e9\\ud83d\\ude00"}], "stream": true, "max_tokens": 5}',
        b'{"model":"m","prompt":["a",1,[2]],"n":2,"temperature":0.5,"stream_options":{"include_usage":true},"stream":true}',
        b'{"input": "text", "model": "m", "service_tier": "flex", "user": "u", "tools": [{"model": "x"}]}',
        b'{"model":"m","model":"x","messages":[1]}',
        b'{"messages":[{}],"Model":"x","model":"m","stream":false}',
    )

    def make(self, rng: random.Random) -> bytes:
        data = spoil(rng.choice(self._GOOD), rng, list(self._GOOD)) if rng.random() < 0.7 else self._said(rng)
        return bytes((rng.randrange(len(TASKS)),)) + data

    def _said(self, rng: random.Random) -> bytes:
        names = [
            "model",
            "messages",
            "prompt",
            "input",
            "stream",
            "max_tokens",
            "n",
            "user",
            "stream_options",
            "temperature",
            "service_tier",
            "x",
        ]
        values = [
            "m",
            True,
            None,
            0,
            -1,
            5,
            2**31,
            2**70,
            1e300,
            0.1,
            "",
            "x" * 300,
            [],
            [1],
            {},
            {"include_usage": True},
            {"model": "x"},
            "\ud800",
        ]
        fields = [(name, rng.choice(values)) for name in rng.sample(names, rng.randint(0, 3))]
        fields += [("model", "m")] * (rng.random() < 0.9) + [(rng.choice(("messages", "prompt", "input")), rng.choice(([1], "x")))]
        return ("{" + ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in fields) + "}").encode()

    def run(self, data: bytes) -> str:
        path, body = list(TASKS)[data[0]], data[1:]
        try:
            body.decode()  # as `proxy.body` does before
            call = parse_call(path, body)
            prompt_of(call)
            priority_of(call, None)
            prepared = prepare_body(body, task=call.task, engine_model="engine's own")
        except UnicodeDecodeError:
            return "not UTF-8"
        except InvalidRequest as error:
            return why(error)
        twice: list[str] = []
        names: list[list[str]] = []

        def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
            names.append([name for name, _ in found])
            return dict(found)

        read = json.loads(body, object_pairs_hook=pairs)
        twice = [name for name in names[-1] if names[-1].count(name) > 1]
        if twice or read["model"] != call.model or bool(read.get("stream")) != call.stream:
            raise Hole(f"the proxy and the engine read different things: {twice} {read!r} {call.model!r}")
        if json.loads(prepared.body)["model"] != "engine's own":
            raise Hole("the engine's own name did not get through")
        return "taken"


TARGETS: dict[str, Callable[[], Any]] = {kind.name: kind for kind in (Keys, Records, Tokens, Frames, Engines, Bodies)}


def _drop(*_: Any) -> Any:
    raise structlog.DropEvent


# -- running them


@dataclass
class Report:
    """What came of a run. ``holes`` are at most ten, in words, with the input."""

    target: str
    seed: int
    count: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    holes: list[str] = field(default_factory=list)

    @property
    def accepted(self) -> int:
        return sum("accepted" in hole for hole in self.holes)


def run_target(
    name: str, *, count: int, seed: int, most_s: float = 3600.0, tell: Callable[[Report], None] = lambda report: None, every: int = 10_000
) -> Report:
    """``count`` inputs (frames, where an input holds several), or as many as ``most_s`` allow."""
    target, rng, report = TARGETS[name](), random.Random(seed), Report(target=name, seed=seed)
    items = getattr(target, "count", lambda data: 1)
    started = time.monotonic()
    due = every
    while report.count < count and len(report.holes) < 10 and time.monotonic() - started < most_s:
        data = target.make(rng)
        try_one(target, data, report)
        report.count += items(data)  # of what was just tried
        if report.count >= due:
            due += every
            report.seconds = time.monotonic() - started
            tell(report)
    report.seconds = time.monotonic() - started
    return report


def try_one(target: Any, data: bytes, report: Report) -> None:
    try:
        report.outcomes[target.run(data)] += 1
    except Exception as error:
        report.holes.append(f"{type(error).__name__}: {error} -- {data[:4000].hex()}")


def read_corpus() -> dict[str, list[bytes]]:
    """By target, inputs worth trying again."""
    return {name: [bytes.fromhex(text) for text in texts] for name, texts in json.loads(CORPUS.read_text()).items()}


def collect_corpus(*, count: int, seed: int) -> dict[str, list[bytes]]:
    """For each target, the shortest of ``count`` inputs for each outcome."""
    found = {}
    for name, kind in TARGETS.items():
        target, rng = kind(), random.Random(seed)
        shortest: dict[str, bytes] = {}
        for _ in range(count):
            data = target.make(rng)
            outcome = target.run(data)
            if outcome not in shortest or len(data) < len(shortest[outcome]):
                shortest[outcome] = data
        found[name] = sorted(shortest.values())
    return found


def write_corpus(found: dict[str, list[bytes]]) -> None:
    CORPUS.write_text(json.dumps({name: [data.hex() for data in inputs] for name, inputs in found.items()}, indent=1) + "\n")
