"""How documents travel: offered by whoever has them, fetched in pages by whoever lacks them.

=========== ===================================================== ============================================================
request     body                                                  reply
=========== ===================================================== ============================================================
DOC_OFFER   [key, seq, digest, digest before or nil, document     [answer, newest seq here, its digest]
            if it is short or empty]
DOC_GET     [key, seq or 0 for the newest, offset]                [seq, digest, size, offset, bytes], in parts; size 0: not here
DOC_LIST    [key]                                                 [[seq, digest, issued], …], the newest first
=========== ===================================================== ============================================================

An offer costs a hundred bytes. Who wants the document fetches it from the offerer, who finds out by offering again. Holders offer what they
have to the nodes nearest to its key now and then, so a document outlives its writer, its first holders and any restart.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgpack

from mesh.clock import Clock
from mesh.dht.config import DirectoryConfig
from mesh.dht.documents import Answer, DocumentStore
from mesh.dht.protocol import MeshProtocol, Op
from mesh.dht.routing import ID_BYTES, Contact
from mesh.dht.rpc import Reply, Request
from mesh.dht.tasks import Tasks
from mesh.documents import DIGEST_BYTES, MAX_BODY_BYTES, Document, parse_document
from mesh.envelope import MAX_ENVELOPE_BYTES
from mesh.errors import DirectoryError, MalformedEnvelope, TrustError
from mesh.identity import Identity

_INLINE_BYTES = 700
_PART_FRAME_BYTES = 64
_TRIES = 24
_POLL_S = 0.05
_MAX_PULLS = 16

Walk = Callable[[bytes], Awaitable[list[Contact]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One version as a holder lists it: unverified until it is fetched."""

    seq: int
    digest: bytes
    issued: float


class Exchange:
    """One node's part in keeping documents. Every node answers for what it holds; one that serves also takes what it is offered."""

    def __init__(
        self,
        identity: Identity,
        protocol: MeshProtocol,
        store: DocumentStore,
        config: DirectoryConfig,
        clock: Clock,
        rng: random.Random,
        tasks: Tasks,
        walk: Walk,
        *,
        serve: bool,
    ) -> None:
        self._identity = identity
        self._protocol = protocol
        self._store = store
        self._config = config
        self._clock = clock
        self._rng = rng
        self._tasks = tasks
        self._walk = walk
        self._pulling: dict[bytes, None] = {}
        self._offering: dict[bytes, Document] = {}
        self.on_document: Callable[[Document], None] = lambda document: None
        protocol.handlers |= {Op.DOC_GET: self.rpc_get, Op.DOC_LIST: self.rpc_list}
        if serve:
            protocol.handlers[Op.DOC_OFFER] = self.rpc_offer

    # answering

    def rpc_offer(self, request: Request) -> list[list[Any]]:
        key, seq, digest, previous, data = _fields(request, 5)
        offered = _version(key, seq, digest)
        if not (previous is None or isinstance(previous, bytes)) or not isinstance(data, bytes):
            raise MalformedEnvelope("bad offer")
        request.require_proof()
        answer = self._store.judge(key, seq, digest, previous, source=request.node_id)
        if answer is Answer.WANT and data:
            answer = self._take(data, key, offered, previous, request.node_id)
        elif answer is Answer.WANT:
            self._pull(key, offered, previous, Contact(request.node_id, request.address))
        newest = self._store.newest(key)
        self._protocol.counts.add(f"document_{answer.name.lower()}")
        return [[int(answer), newest.seq if newest else 0, newest.digest if newest else b""]]

    def rpc_get(self, request: Request) -> list[list[Any]]:
        key, seq, offset = _fields(request, 3)
        _version(key, seq, bytes(DIGEST_BYTES))
        if type(offset) is not int or not 0 <= offset <= MAX_ENVELOPE_BYTES:
            raise MalformedEnvelope("bad offset")
        request.require_proof()
        document = self._store.version(key, seq) or self._own(key, seq)
        if document is None:
            return [[0, b"", 0, 0, b""]]
        room, data = request.room - _PART_FRAME_BYTES, document.signed
        starts = range(offset, len(data), room)[: request.parts]
        return [[document.seq, document.digest, len(data), at, data[at : at + room]] for at in starts] or [
            [document.seq, document.digest, len(data), len(data), b""]
        ]

    def rpc_list(self, request: Request) -> list[list[Any]]:
        (key,) = _fields(request, 1)
        _version(key, 0, bytes(DIGEST_BYTES))
        request.require_proof()
        return [[[document.seq, document.digest, int(document.issued)] for document in self._store.history(key)]]

    def _own(self, key: bytes, seq: int) -> Document | None:
        document = self._offering.get(key)
        return document if document is not None and seq in (0, document.seq) else None

    def _take(self, data: bytes, key: bytes, offered: Version, previous: bytes | None, source: bytes) -> Answer:
        """Verify and keep; what does not hold is refused as stale, whoever offered it."""
        try:
            document = parse_document(data, self._identity.trust, now=self._protocol.time.now())
        except TrustError as error:
            self._protocol.counts.refuse(f"document_{error.code}", source.hex()[:12], now=self._clock.monotonic())
            return Answer.STALE
        if document.key != key or document.seq != offered.seq or document.digest != offered.digest:
            self._protocol.counts.refuse("document_not_as_offered", source.hex()[:12], now=self._clock.monotonic())
            return Answer.STALE
        before = previous if previous is None else document.previous
        judged = self._store.judge(key, document.seq, document.digest, before, source=source)
        answer = self._store.take(document, judged=judged)
        if answer is Answer.ACCEPTED:
            self.on_document(document)
        return answer

    def _pull(self, key: bytes, offered: Version, previous: bytes | None, contact: Contact) -> None:
        if offered.digest in self._pulling or len(self._pulling) >= _MAX_PULLS:
            return
        self._pulling[offered.digest] = None

        async def pull() -> None:
            try:
                data = await self._fetch(contact, key, offered)
                if data is not None:
                    self._take(data, key, offered, previous, contact.id)
            finally:
                self._pulling.pop(offered.digest, None)

        if self._tasks.start(pull(), name="directory document") is None:
            self._pulling.pop(offered.digest, None)

    # asking

    async def put(self, document: Document) -> int:
        """Store a new version with the nodes nearest to its key; returns how many have it.

        Raises `DirectoryError` if a majority does not: another version came first, or too few holders can be reached.
        """
        contacts = (await self._walk(document.key))[: self._config.holders]
        self._offering[document.key] = document
        try:
            own = self._offer_to_self(document)
            answers = await asyncio.gather(*(self._offer_until_settled(contact, document) for contact in contacts))
        finally:
            self._offering.pop(document.key, None)
        counted = Counter([*answers, *([own] if not contacts else [])])
        have = counted[Answer.ACCEPTED] + counted[Answer.HAVE]
        if have > (len(contacts) or 1) // 2:
            return have
        if counted[Answer.CONFLICT] or counted[Answer.STALE]:
            raise DirectoryError(f"'{document.kind}/{document.name}' has changed meanwhile: read it again, then write")
        raise DirectoryError(f"'{document.kind}/{document.name}' could not be stored: {have} of {len(contacts)} holders answered")

    def _offer_to_self(self, document: Document) -> Answer:
        """A node that remembers documents remembers its own."""
        own = self._identity.node_id
        judged = self._store.judge(document.key, document.seq, document.digest, document.previous, source=own)
        return self._store.take(document, judged=judged)

    async def _offer_until_settled(self, contact: Contact, document: Document) -> Answer | None:
        for attempt in range(_TRIES):
            answer = await self._offer(contact, document, previous=document.previous)
            if answer is not Answer.WANT:
                return answer
            await self._clock.sleep(_POLL_S * (1 + attempt / 4))
        return None

    async def _offer(self, contact: Contact, document: Document, *, previous: bytes | None) -> Answer | None:
        data = document.signed if len(document.signed) <= _INLINE_BYTES else b""
        body = msgpack.packb([document.key, document.seq, document.digest, previous, data])
        reply = await self._protocol.request(contact.address, Op.DOC_OFFER, body, node_id=contact.id)
        try:
            return Answer(reply.bodies[0][0]) if reply is not None else None
        except (IndexError, ValueError, TypeError):
            return None

    async def get(self, key: bytes, *, seq: int = 0) -> Document | None:
        """The newest version (or version ``seq``) that verifies, of all that the nodes nearest to the key and we ourselves have.

        Never older than what this node has already seen.
        """
        held = self._store.version(key, seq)
        best = held.seq if held is not None and seq == 0 else 0
        candidates = [version for version in await self._versions(key) if version[0].seq == seq or (seq == 0 and version[0].seq > best)]
        if seq and held is not None:
            return held
        for version, contact in candidates:
            data = await self._fetch(contact, key, version)
            document = self._verified(data, key) if data is not None else None
            if document is not None:
                if seq == 0:
                    judged = self._store.judge(key, document.seq, document.digest, None, source=contact.id)
                    self._store.take(document, judged=judged)
                return document
        return held

    async def history(self, key: bytes) -> list[Version]:
        """The versions that holders list, the newest first; those with most holders where they differ."""
        found: dict[int, Version] = {}
        for version, _ in await self._versions(key):
            found.setdefault(version.seq, version)
        for document in self._store.history(key):
            found[document.seq] = Version(seq=document.seq, digest=document.digest, issued=document.issued)
        return [found[seq] for seq in sorted(found, reverse=True)]

    async def _versions(self, key: bytes) -> list[tuple[Version, Contact]]:
        """Every version that some holder lists: the newest first, of two with one seq the one with more holders."""
        contacts = (await self._walk(key))[: self._config.read_width]
        body = msgpack.packb([key])
        replies = await asyncio.gather(
            *(self._protocol.request(contact.address, Op.DOC_LIST, body, node_id=contact.id) for contact in contacts)
        )
        listed: list[tuple[Version, Contact]] = []
        for contact, reply in zip(contacts, replies, strict=True):
            listed += [(version, contact) for version in _parse_list(reply)]
        votes = Counter(version.digest for version, _ in listed)
        return sorted(listed, key=lambda item: (item[0].seq, votes[item[0].digest]), reverse=True)

    def _verified(self, data: bytes, key: bytes) -> Document | None:
        try:
            document = parse_document(data, self._identity.trust, now=self._protocol.time.now())
        except TrustError as error:
            self._protocol.counts.refuse(f"document_{error.code}", "a holder", now=self._clock.monotonic())
            return None
        return document if document.key == key else None

    async def _fetch(self, contact: Contact, key: bytes, version: Version) -> bytes | None:
        """All of one version from one node, page by page; parts that were lost are asked for again."""
        pieces: dict[int, bytes] = {}
        size = 0
        for _ in range(_TRIES):
            offset = _first_gap(pieces)
            if size and offset >= size:
                return b"".join(pieces[at] for at in sorted(pieces))
            body = msgpack.packb([key, version.seq, offset])
            reply = await self._protocol.request(contact.address, Op.DOC_GET, body, node_id=contact.id)
            if reply is None:
                return None
            for part in reply.bodies:
                piece = _parse_part(part, version)
                if piece is None:
                    return None
                size, at, data = piece
                pieces[at] = data
        return None

    async def keep_alive(self) -> float:
        """Offer each document held to the nodes nearest to its key. Returns when to do so again."""
        for document in self._store:
            for contact in (await self._walk(document.key))[: self._config.holders]:
                await self._offer(contact, document, previous=None)
        return self._config.document_offer_s * self._rng.uniform(0.75, 1.25)


def _first_gap(pieces: dict[int, bytes]) -> int:
    at = 0
    while pieces.get(at):
        at += len(pieces[at])
    for start in [start for start in pieces if start > at]:
        del pieces[start]  # pages follow each other from the gap on; what lies beyond comes again
    return at


def _parse_part(part: list[Any], version: Version) -> tuple[int, int, bytes] | None:
    """Size of the whole, offset and bytes of one part; None if it is of another version or makes no sense."""
    if len(part) != 5 or part[0] != version.seq or part[1] != version.digest:
        return None
    _, _, size, at, data = part
    if type(size) is not int or not 0 < size <= MAX_ENVELOPE_BYTES or type(at) is not int or not isinstance(data, bytes):
        return None
    return (size, at, data) if 0 <= at <= size and at + len(data) <= size else None


def _parse_list(reply: Reply | None) -> list[Version]:
    """What a holder lists; whatever makes no sense is left out."""
    items = reply.bodies[0] if reply is not None and reply.bodies else []
    return [
        Version(seq=item[0], digest=item[1], issued=float(item[2]))
        for item in items[:32]
        if isinstance(item, list)
        and len(item) == 3
        and type(item[0]) is int
        and 0 < item[0] < 2**63
        and isinstance(item[1], bytes)
        and len(item[1]) == DIGEST_BYTES
        and type(item[2]) is int
        and 0 <= item[2] < 2**53
    ]


def _version(key: object, seq: object, digest: object) -> Version:
    if not isinstance(key, bytes) or len(key) != ID_BYTES or type(seq) is not int or not 0 <= seq < 2**63:
        raise MalformedEnvelope("bad document key or seq")
    if not isinstance(digest, bytes) or len(digest) != DIGEST_BYTES:
        raise MalformedEnvelope("bad digest")
    return Version(seq=seq, digest=digest, issued=0.0)


def _fields(request: Request, count: int) -> list[Any]:
    if len(request.body) != count:
        raise MalformedEnvelope(f"expected {count} fields")
    return request.body


__all__ = ["MAX_BODY_BYTES", "Exchange", "Version"]
