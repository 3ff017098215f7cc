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

Two versions with one seq are both signed: two operators wrote at once, and one of them was told so. The first to come stays, until this
node itself finds, by looking, that more of the nodes nearest to the key have the other. What peers merely say of it counts for nothing.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgpack
import structlog

from mesh.clock import Clock
from mesh.dht.config import DirectoryConfig
from mesh.dht.documents import Answer, DocumentStore, write_files
from mesh.dht.pages import PART_FRAME_BYTES, Version, fetch, parse_list, parts_of
from mesh.dht.protocol import MeshProtocol, Op
from mesh.dht.routing import ID_BYTES, Contact
from mesh.dht.rpc import Request
from mesh.dht.tasks import Tasks
from mesh.documents import DIGEST_BYTES, Document, parse_document
from mesh.envelope import MAX_ENVELOPE_BYTES
from mesh.errors import BadSignature, DirectoryError, DocumentConflict, MalformedEnvelope, TrustError
from mesh.identity import Identity

log = structlog.get_logger(__name__)

INLINE_BYTES = 700
_TRIES = 24
_POLL_S = 0.05
_MAX_PULLS = 16
_MAX_PULLS_PER_PEER = 4
_LIAR_S = 60.0
_MAX_LIARS = 1_024
_SETTLE_EVERY_S = 30.0
_MAX_SETTLING = 1_024

Walk = Callable[[bytes], Awaitable[list[Contact]]]
Listener = Callable[[Document], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How a document held here compares with what the nodes nearest to its key list: so many of ``asked`` list the same, a higher seq, or
    another version with the same seq. What they list is not verified."""

    document: Document
    asked: int
    same: int
    newer: int
    rival: int


@dataclass(slots=True, kw_only=True)
class _Listed:
    """A version and who lists it."""

    version: Version
    holders: list[Contact] = field(default_factory=list)


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
        self._pulling: dict[bytes, bytes] = {}
        self._liars: OrderedDict[bytes, float] = OrderedDict()
        self._settled: OrderedDict[bytes, float] = OrderedDict()
        self._offering: dict[bytes, Document] = {}
        self._listeners: list[Listener] = []
        self._saving = asyncio.Lock()
        protocol.handlers |= {Op.DOC_GET: self.rpc_get, Op.DOC_LIST: self.rpc_list}
        if serve:
            protocol.handlers[Op.DOC_OFFER] = self.rpc_offer

    def hear(self, listener: Listener) -> None:
        """Call ``listener`` with every version that becomes the newest here, however it came."""
        self._listeners.append(listener)

    # answering

    def rpc_offer(self, request: Request) -> list[list[Any]]:
        key, seq, digest, previous, data = _fields(request, 5)
        offered = _version(key, seq, digest)
        if not (previous is None or isinstance(previous, bytes)) or not isinstance(data, bytes):
            raise MalformedEnvelope("bad offer")
        request.require_proof()
        answer = self._store.judge(key, seq, digest, previous)
        if answer is Answer.WANT and data:
            answer = self._take(data, key, offered, request.node_id, cas=previous is not None)
        elif answer is Answer.WANT:
            self._pull(key, offered, Contact(request.node_id, request.address), cas=previous is not None)
        newest = self._store.newest(key)
        if answer is Answer.CONFLICT and previous is None:
            self._settle(key)
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
        return parts_of(document, offset, request.room - PART_FRAME_BYTES, request.parts)

    def rpc_list(self, request: Request) -> list[list[Any]]:
        (key,) = _fields(request, 1)
        _version(key, 0, bytes(DIGEST_BYTES))
        request.require_proof()
        return [[[document.seq, document.digest, int(document.issued)] for document in self._store.history(key)]]

    def _own(self, key: bytes, seq: int) -> Document | None:
        document = self._offering.get(key)
        return document if document is not None and seq in (0, document.seq) else None

    def accept(self, data: bytes, source: str) -> bool:
        """Take in a version that came another way than through the directory; True if it holds and is newer than what is here."""
        document = self._open(data, source)
        if document is None:
            return False
        answer = self._keep(document)
        if answer is Answer.CONFLICT:
            self._settle(document.key)
        return answer is Answer.ACCEPTED

    def _take(self, data: bytes, key: bytes, offered: Version, source: bytes, *, cas: bool) -> Answer:
        """Verify and keep; what does not hold is refused as stale, whoever offered it."""
        document = self._as_listed(data, key, offered, source)
        return self._keep(document, cas=cas) if document is not None else Answer.STALE

    def _as_listed(self, data: bytes, key: bytes, listed: Version, source: bytes) -> Document | None:
        """The document, if it verifies and is the very version that ``source`` said it had."""
        document = self._open(data, source.hex()[:12], liar=source)
        if document is None or (document.key, document.seq, document.digest) == (key, listed.seq, listed.digest):
            return document
        self._protocol.counts.refuse("document_not_as_offered", source.hex()[:12], now=self._clock.monotonic())
        self._distrust(source)
        return None

    def _open(self, data: bytes, source: str, *, liar: bytes = b"") -> Document | None:
        try:
            return parse_document(data, self._identity.trust, now=self._protocol.time.now())
        except TrustError as error:
            self._protocol.counts.refuse(f"document_{error.code}", source, now=self._clock.monotonic())
            if liar and isinstance(error, BadSignature | MalformedEnvelope):
                self._distrust(liar)
            return None

    def _keep(self, document: Document, *, cas: bool = False, outvoted: bool = False) -> Answer:
        """The only way into the store."""
        answer = self._store.take(document, cas=cas, outvoted=outvoted)
        if answer is Answer.ACCEPTED:
            self._save_soon()
            for listener in self._listeners:
                try:
                    listener(document)
                except Exception:
                    log.exception("directory.listener_failed", document=document.title)
        return answer

    def _distrust(self, node_id: bytes) -> None:
        """It sent what it cannot have verified: nothing large is fetched from it for a while."""
        self._liars[node_id] = self._clock.monotonic() + _LIAR_S
        self._liars.move_to_end(node_id)
        if len(self._liars) > _MAX_LIARS:
            self._liars.popitem(last=False)

    def _pull(self, key: bytes, offered: Version, contact: Contact, *, cas: bool) -> None:
        """Fetch what was offered. A peer has its share of what may be fetched at once, and one that lied has none for a while."""
        theirs = sum(source == contact.id for source in self._pulling.values())
        lied = self._liars.get(contact.id, 0.0) > self._clock.monotonic()
        if offered.digest in self._pulling or len(self._pulling) >= _MAX_PULLS or theirs >= _MAX_PULLS_PER_PEER or lied:
            return
        self._pulling[offered.digest] = contact.id

        async def pull() -> None:
            try:
                data = await self._fetch(contact, key, offered)
                if data is not None:
                    self._take(data, key, offered, contact.id, cas=cas)
            finally:
                self._pulling.pop(offered.digest, None)

        if self._tasks.start(pull(), name="directory document") is None:
            self._pulling.pop(offered.digest, None)

    def _settle(self, key: bytes) -> None:
        """Somebody has another version under the seq of ours: see what the nodes nearest to the key have. Not again at once."""
        now = self._clock.monotonic()
        if self._settled.get(key, float("-inf")) + _SETTLE_EVERY_S > now:
            return
        self._settled[key] = now
        self._settled.move_to_end(key)
        if len(self._settled) > _MAX_SETTLING:
            self._settled.popitem(last=False)
        self._tasks.start(self._ask_again(key), name="directory document settling")

    async def _ask_again(self, key: bytes) -> None:
        await self.get(key)

    # keeping

    def recheck(self) -> None:
        """The keyset has changed: see `DocumentStore.recheck`."""
        self._store.recheck(now=self._protocol.time.now())
        self._save_soon()

    def _save_soon(self) -> None:
        if self._store.unsaved_count:
            self._tasks.start(self.save(), name="directory documents to disk")

    async def save(self) -> None:
        """Write to disk what has changed; what cannot be written is tried again with the next change, or when documents are offered."""
        async with self._saving:
            if changed := self._store.unsaved():
                failed = await asyncio.get_running_loop().run_in_executor(None, write_files, changed)
                self._store.still_unsaved(failed)

    async def keep_alive(self) -> float:
        """Offer each document held to the nodes nearest to its key. Returns when to do so again."""
        await self.save()
        for document in self._store:
            contacts = (await self._walk(document.key))[: self._config.holders]
            answers = [await self._offer(contact, document, previous=None) for contact in contacts]
            if Answer.STALE in answers:
                await self.get(document.key)
            elif Answer.CONFLICT in answers:
                self._settle(document.key)
        return self._config.document_offer_s * self._rng.uniform(0.75, 1.25)

    # asking

    async def put(self, document: Document) -> int:
        """Store a new version with the nodes nearest to its key; returns how many have it.

        Raises `TrustError` if it does not hold, `DocumentConflict` if another version came first, `DirectoryError` if too few holders can
        be reached.
        """
        document = parse_document(document.signed, self._identity.trust, now=self._protocol.time.now())
        own = self._store.judge(document.key, document.seq, document.digest, document.previous)
        if own in (Answer.STALE, Answer.CONFLICT):
            raise _changed(document)
        contacts = (await self._walk(document.key))[: self._config.holders]
        self._offering[document.key] = document
        try:
            answers = await asyncio.gather(*(self._offer_until_settled(contact, document) for contact in contacts))
        finally:
            self._offering.pop(document.key, None)
        counted = Counter(answers)
        have = counted[Answer.ACCEPTED] + counted[Answer.HAVE]
        if have > len(contacts) // 2 or not contacts:
            own = self._keep(document, cas=True)
            await self.save()
            have += own in (Answer.ACCEPTED, Answer.HAVE) and not contacts
        if have > len(contacts) // 2:
            return have
        if counted[Answer.CONFLICT] or counted[Answer.STALE]:
            raise _changed(document)
        raise DirectoryError(f"'{document.title}' could not be stored: {have} of {len(contacts)} holders took it")

    async def _offer_until_settled(self, contact: Contact, document: Document) -> Answer | None:
        for attempt in range(_TRIES):
            answer = await self._offer(contact, document, previous=document.previous)
            if answer is not Answer.WANT:
                return answer
            await self._clock.sleep(_POLL_S * (1 + attempt / 4))
        return None

    async def _offer(self, contact: Contact, document: Document, *, previous: bytes | None) -> Answer | None:
        data = document.signed if len(document.signed) <= INLINE_BYTES else b""
        body = msgpack.packb([document.key, document.seq, document.digest, previous, data])
        reply = await self._protocol.request(contact.address, Op.DOC_OFFER, body, node_id=contact.id)
        try:
            return Answer(reply.bodies[0][0]) if reply is not None else None
        except (IndexError, ValueError, TypeError):
            return None

    async def offer(self, document: Document, contacts: Iterable[Contact]) -> dict[bytes, Answer | None]:
        """Offer a version to certain nodes, whatever they are nearest to; returns what each says of it, None for one that is silent.

        Who has a newer one is asked for it.
        """
        nodes = list(contacts)
        answers = await asyncio.gather(*(self._offer(contact, document, previous=None) for contact in nodes))
        if Answer.STALE in answers:
            await self.get(document.key)
        return {contact.id: answer for contact, answer in zip(nodes, answers, strict=True)}

    async def get(self, key: bytes, *, seq: int = 0) -> Document | None:
        """The newest version (or version ``seq``) that verifies, of all that the nodes nearest to the key and we ourselves have.

        Never older than what this node has already seen, not even if it is started anew right after this. Of two with one seq, the one that
        more of them have.
        """
        if seq and (held := self._store.version(key, seq)) is not None:
            return held
        lied: dict[bytes, None] = {}
        for listed in await self._versions(key):
            version = listed.version
            newest = self._store.newest(key)
            if seq and version.seq != seq:
                continue
            if not seq and newest is not None and (version.seq < newest.seq or version.digest == newest.digest):
                return newest
            for contact in listed.holders:
                if contact.id in lied:
                    continue
                data = await self._fetch(contact, key, version)
                document = self._as_listed(data, key, version, contact.id) if data is not None else None
                if document is None:
                    lied[contact.id] = None
                    continue
                if not seq:
                    self._keep(document, outvoted=True)
                    await self.save()
                    return self._store.newest(key) or document
                return document
        return self._store.version(key, seq)

    async def history(self, key: bytes) -> list[Version]:
        """The versions up to the newest that verifies, as holders list them, the newest first; where they differ, what most of them say."""
        newest = await self.get(key)
        if newest is None:
            return []
        found: dict[int, Version] = {}
        for listed in await self._versions(key):
            if listed.version.seq <= newest.seq:
                found.setdefault(listed.version.seq, listed.version)
        for document in self._store.history(key):
            found[document.seq] = _version_of(document)
        return [found[number] for number in sorted(found, reverse=True)]

    async def compare(self, document: Document) -> Standing:
        """For a person to read."""
        lists = [listed for _, listed in await self._lists(document.key)]
        newest = [listed[max(listed)] for listed in lists if listed]
        return Standing(
            document=document,
            asked=len(lists),
            same=sum(version.digest == document.digest for version in newest),
            newer=sum(version.seq > document.seq for version in newest),
            rival=sum(version.seq == document.seq and version.digest != document.digest for version in newest),
        )

    async def _lists(self, key: bytes) -> list[tuple[Contact, dict[int, Version]]]:
        """What each of the nodes nearest to the key lists, by seq."""
        contacts = (await self._walk(key))[: self._config.read_width]
        body = msgpack.packb([key])
        replies = await asyncio.gather(
            *(self._protocol.request(contact.address, Op.DOC_LIST, body, node_id=contact.id) for contact in contacts)
        )
        return [(contact, parse_list(reply)) for contact, reply in zip(contacts, replies, strict=True)]

    async def _versions(self, key: bytes) -> list[_Listed]:
        """Every version that some holder lists, we among them: the newest first, of two with one seq the one with more holders."""
        found: dict[tuple[int, bytes], _Listed] = {}
        for contact, listed in await self._lists(key):
            for version in listed.values():
                found.setdefault((version.seq, version.digest), _Listed(version=version)).holders.append(contact)
        own = {(document.seq, document.digest): _version_of(document) for document in self._store.history(key)}
        for name, version in own.items():
            found.setdefault(name, _Listed(version=version))

        def weight(name: tuple[int, bytes]) -> tuple[int, int, bool]:
            return name[0], len(found[name].holders) + (name in own), name in own

        return [found[name] for name in sorted(found, key=weight, reverse=True)]

    async def _fetch(self, contact: Contact, key: bytes, version: Version) -> bytes | None:
        return await fetch(
            lambda body: self._protocol.request(contact.address, Op.DOC_GET, body, node_id=contact.id), self._clock, key, version
        )


def _changed(document: Document) -> DocumentConflict:
    return DocumentConflict(f"'{document.title}' has changed meanwhile: read it again, then write")


def _version_of(document: Document) -> Version:
    return Version(seq=document.seq, digest=document.digest, issued=document.issued)


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


__all__ = ["Exchange", "Standing", "Version"]
