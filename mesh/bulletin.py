"""Documents over links: what one node learns, every node it is linked with has a moment later.

A new document that is short goes out whole; a longer one, or one that came over a link itself, is announced, and whoever lacks it asks.
When a link comes up each end tells all it holds, so what was missed while two nodes were apart is made good the moment they meet; proxies
say it again now and then. What is too large for a frame is read from the directory.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import structlog

from mesh.claims import read_bool, read_bytes, read_int, read_maps, read_str
from mesh.clock import Clock
from mesh.documents import DIGEST_BYTES, MAX_KIND_CHARS, MAX_NAME_CHARS, MAX_PROJECT_CHARS, Document
from mesh.envelope import MAX_ENVELOPE_BYTES
from mesh.errors import MalformedEnvelope, ProtocolError
from mesh.link.frames import MAX_PAYLOAD_BYTES, Frame
from mesh.link.link import Link
from mesh.trust import KEYSET_KIND, Role

log = structlog.get_logger(__name__)

CLOSE = frozenset({"revocations", KEYSET_KIND, "limits"})
"""The kinds that proxies must not be behind with."""
ACCOUNT_S = 15.0
"""How often proxies tell each other what they hold of the kinds that matter most."""
FULL_EVERY = 20
"""Every so many times, all that they hold."""
WHOLE_BYTES = 8 * 1024
"""A document up to this size is pushed whole; of a larger one its name goes first."""
LINK_BYTES = MAX_PAYLOAD_BYTES - 64
"""The largest document that fits a frame."""
READ_S = 30.0
"""How often the kinds that matter most are read from the directory."""
MAX_LISTED = 200
"""Entries of one frame; a longer account takes several."""
BURST = 1_024.0
PER_S = 16.0
"""Documents and questions taken from one link: the burst, and what comes after. What is over is made good with the next account."""
FOR_WORKERS = frozenset({KEYSET_KIND})
"""The kinds that workers hear of; proxies hear of all."""


class Shelf(Protocol):
    """Where documents are kept: `mesh.directory.Directory`."""

    def accept_document(self, signed: bytes) -> bool:
        """Take a version from anywhere: True if it holds and was new."""
        ...

    def held_documents(self, kind: str = "") -> Sequence[Document]: ...

    def held_document(self, kind: str, name: str, *, project: str = "") -> Document | None: ...

    def on_document(self, callback: Callable[[Document], None]) -> None: ...

    async def get_document(self, kind: str, name: str, *, project: str = "") -> Document | None: ...


@dataclass(slots=True)
class _Allowance:
    """A token bucket. ``at`` is monotonic seconds."""

    left: float
    at: float

    def take(self, now: float) -> bool:
        self.left = min(BURST, self.left + (now - self.at) * PER_S)
        self.at = now
        if self.left < 1.0:
            return False
        self.left -= 1.0
        return True


class Bulletin:
    """One node's part. ``links`` are those that are up now; ``start`` runs a coroutine beside the read loop."""

    def __init__(
        self,
        shelf: Shelf,
        *,
        role: Role,
        links: Callable[[], Iterable[Link]],
        start: Callable[[Coroutine[Any, Any, Any]], object],
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self._shelf = shelf
        self._role = role
        self._links = links
        self._start = start
        self._clock = clock
        self._rng = rng
        self._allowances: WeakKeyDictionary[Link, _Allowance] = WeakKeyDictionary()
        self._source: Link | None = None
        self.on_agreed: Callable[[Link], None] = lambda link: None
        """A proxy has told all that it holds, and none of it is newer than what is held here."""
        shelf.on_document(self._spread)

    async def keep(self) -> None:
        """A task for as long as the node runs: tell the linked proxies what is held here."""
        for turn in itertools.count(1):
            await self._clock.sleep(ACCOUNT_S * self._rng.uniform(0.75, 1.0))
            held = self._shelf.held_documents()
            if turn % FULL_EVERY:
                held = [document for document in held if document.kind in CLOSE]
            for link in list(self._links()):
                if _role(link) == Role.PROXY:
                    self._tell(link, held)

    def on_up(self, link: Link) -> None:
        self._tell(link, self._shelf.held_documents())

    def on_frame(self, link: Link, fields: dict[str, Any]) -> None:
        """A DOCUMENT frame. Raises `ProtocolError` where it makes no sense; a document that does not hold is left alone."""
        try:
            if "doc" in fields:
                self._take(link, read_bytes(fields, "doc", max_len=LINK_BYTES))
            for entry in read_maps(fields, "want", max_items=MAX_LISTED):
                self._give(link, _Entry.read(entry))
            if "have" in fields:
                listed = [_Entry.read(entry) for entry in read_maps(fields, "have", max_items=MAX_LISTED)]
                self._compare(link, listed, close=read_bool(fields, "close", default=False))
        except MalformedEnvelope as error:
            raise ProtocolError(f"bad DOCUMENT: {error.message}") from None

    # -- inside

    def _spread(self, document: Document) -> None:
        """A version is new here: tell whoever should have it, but not whom it came from."""
        first_hand = self._source is None
        for link in list(self._links()):
            if link is self._source or not self._concerns(link, document.kind):
                continue
            if first_hand and len(document.signed) <= WHOLE_BYTES:
                link.send_control(Frame.DOCUMENT, {"doc": document.signed})
            else:
                link.send_control(Frame.DOCUMENT, {"have": [_Entry.of(document).fields()]})

    def _tell(self, link: Link, documents: Iterable[Document]) -> None:
        """The kinds that matter most come first, so that one frame holds all of them."""
        passed = sorted(
            (document for document in documents if self._concerns(link, document.kind)), key=lambda item: item.kind not in CLOSE
        )
        for at in range(0, max(1, len(passed)), MAX_LISTED):
            have = [_Entry.of(document).fields() for document in passed[at : at + MAX_LISTED]]
            link.send_control(Frame.DOCUMENT, {"have": have, "close": True} if at == 0 else {"have": have})

    def _take(self, link: Link, signed: bytes) -> None:
        if not self._allowed(link):
            return
        self._source = link
        try:
            self._shelf.accept_document(signed)
        finally:
            self._source = None

    def _give(self, link: Link, wanted: _Entry) -> None:
        document = self._shelf.held_document(wanted.kind, wanted.name, project=wanted.project)
        if document is not None and self._concerns(link, document.kind) and len(document.signed) <= LINK_BYTES and self._allowed(link):
            link.send_control(Frame.DOCUMENT, {"doc": document.signed})

    def _compare(self, link: Link, listed: list[_Entry], *, close: bool) -> None:
        """Ask for what the peer has and we lack; what it lacks, it asks for when it hears what we have."""
        wants: list[dict[str, Any]] = []
        agreed = close
        for theirs in listed:
            ours = self._shelf.held_document(theirs.kind, theirs.name, project=theirs.project)
            if not self._concerns(link, theirs.kind) or (ours is not None and ours.seq > theirs.seq):
                continue
            if ours is not None and ours.seq == theirs.seq:
                agreed = agreed and ours.digest == theirs.digest
                continue
            agreed = False
            if theirs.size <= LINK_BYTES:
                wants.append(theirs.fields())
            elif self._allowed(link):
                self._start(self._shelf.get_document(theirs.kind, theirs.name, project=theirs.project))
        if wants:
            link.send_control(Frame.DOCUMENT, {"want": wants})
        if agreed and _role(link) == Role.PROXY:
            self.on_agreed(link)

    def _concerns(self, link: Link, kind: str) -> bool:
        """Whether documents of this kind pass between the two ends."""
        return kind in FOR_WORKERS or (self._role == Role.PROXY and _role(link) == Role.PROXY)

    def _allowed(self, link: Link) -> bool:
        now = self._clock.monotonic()
        return self._allowances.setdefault(link, _Allowance(BURST, now)).take(now)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """A version as it is announced: enough to know whether it is newer, and whether it fits a frame."""

    kind: str
    name: str
    project: str
    seq: int
    digest: bytes
    size: int

    @classmethod
    def of(cls, document: Document) -> _Entry:
        return cls(
            kind=document.kind,
            name=document.name,
            project=document.project,
            seq=document.seq,
            digest=document.digest,
            size=len(document.signed),
        )

    @classmethod
    def read(cls, fields: dict[str, Any]) -> _Entry:
        return cls(
            kind=read_str(fields, "kind", max_len=MAX_KIND_CHARS),
            name=read_str(fields, "name", max_len=MAX_NAME_CHARS),
            project=read_str(fields, "proj", default="", max_len=MAX_PROJECT_CHARS),
            seq=read_int(fields, "seq", low=1),
            digest=read_bytes(fields, "dig", size=DIGEST_BYTES),
            size=read_int(fields, "size", high=MAX_ENVELOPE_BYTES),
        )

    def fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = {"kind": self.kind, "name": self.name, "seq": self.seq, "dig": self.digest, "size": self.size}
        return fields | {"proj": self.project} if self.project else fields


def _role(link: Link) -> Role:
    assert link.peer is not None
    return link.peer.role


async def watch_documents(shelf: Shelf, clock: Clock, rng: random.Random) -> None:
    """A task of every node that keeps documents: read the kinds that matter most from the directory often, and the others in turn.

    A link may be missing and a push may be lost; this makes good whatever was.
    """
    others: list[Document] = []
    while True:
        await clock.sleep(READ_S * rng.uniform(0.75, 1.0))
        wanted = [(KEYSET_KIND, KEYSET_KIND, ""), ("revocations", "keys", "")]
        wanted += [(document.kind, document.name, document.project) for document in shelf.held_documents("limits")]
        others = others or [document for document in shelf.held_documents() if document.kind not in CLOSE]
        if others:
            document = others.pop()
            wanted.append((document.kind, document.name, document.project))
        for kind, name, project in wanted:
            try:
                await shelf.get_document(kind, name, project=project)
            except Exception:  # what a peer answered must not end the node
                log.exception("documents.unread", kind=kind)
