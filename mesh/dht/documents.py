"""The documents a node holds: the last versions of each, on disk where the node is one that remembers.

A version is taken only if it is newer than the newest here. So a rollback is refused by whoever has seen better, and a node that was
offline goes on from what it last wrote to its disk, not from nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

import structlog

from mesh.documents import Document, parse_document
from mesh.errors import TrustError
from mesh.identity import write_private
from mesh.trust import Trust

log = structlog.get_logger(__name__)

_HISTORY = 8
_MAX_KEYS = 1_024
_MAX_BYTES = 64 << 20
_MAJORITY = 3
_FOLDER = "documents"


class Answer(IntEnum):
    """What becomes of an offered version; also its code on the wire."""

    ACCEPTED = 0
    HAVE = 1
    WANT = 2
    STALE = 3
    CONFLICT = 4
    NO_ROOM = 5


@dataclass(slots=True, eq=False)
class _Chain:
    """The versions of one document, the newest last. ``rivals`` are other bytes offered under the newest seq, and by whom."""

    versions: list[Document] = field(default_factory=list)
    rivals: dict[bytes, dict[bytes, None]] = field(default_factory=dict)

    @property
    def newest(self) -> Document:
        return self.versions[-1]


class DocumentStore:
    """``directory`` is where versions are kept, None for a node that forgets."""

    def __init__(self, trust: Trust, directory: Path | None) -> None:
        self._trust = trust
        self._directory = directory / _FOLDER if directory is not None else None
        self._chains: OrderedDict[bytes, _Chain] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._chains)

    def __iter__(self) -> Iterator[Document]:
        """The newest version of each."""
        return iter([chain.newest for chain in self._chains.values()])

    def load(self, *, now: float) -> None:
        """Read what was kept. What cannot be read or does not hold is left out with a warning."""
        if self._directory is None or not self._directory.is_dir():
            return
        found: list[Document] = []
        for path in sorted(self._directory.glob("*/*.doc")):
            try:
                found.append(parse_document(path.read_bytes(), self._trust, now=now))
            except (OSError, TrustError) as error:
                log.warning("directory.document_unreadable", path=str(path), error=str(error))
        for document in sorted(found, key=lambda document: document.seq):
            self._append(document)

    def newest(self, key: bytes) -> Document | None:
        chain = self._chains.get(key)
        return chain.newest if chain is not None else None

    def version(self, key: bytes, seq: int) -> Document | None:
        """A version by its number; 0 is the newest."""
        chain = self._chains.get(key)
        if chain is None:
            return None
        return next((document for document in reversed(chain.versions) if seq in (0, document.seq)), None)

    def history(self, key: bytes) -> list[Document]:
        """The versions held, the newest first."""
        chain = self._chains.get(key)
        return list(reversed(chain.versions)) if chain is not None else []

    def judge(self, key: bytes, seq: int, digest: bytes, previous: bytes | None, *, source: bytes) -> Answer:
        """Whether a version is wanted, before its bytes are in hand.

        A writer gives ``previous`` and is held to it (compare-and-swap); one who only passes a version on gives None. Of two versions with
        one seq the first to come stays, until a majority of holders offers the other.
        """
        chain = self._chains.get(key)
        if chain is None:
            return Answer.WANT if len(self._chains) < _MAX_KEYS and self._bytes < _MAX_BYTES else Answer.NO_ROOM
        newest = chain.newest
        if digest == newest.digest:
            return Answer.HAVE
        if seq < newest.seq:
            return Answer.STALE
        if seq == newest.seq:
            return self._rival(chain, digest, source) if previous is None else Answer.CONFLICT
        if previous is not None and (seq != newest.seq + 1 or previous != newest.digest):
            return Answer.CONFLICT
        return Answer.WANT

    @staticmethod
    def _rival(chain: _Chain, digest: bytes, source: bytes) -> Answer:
        offered_by = chain.rivals.setdefault(digest, {})
        offered_by[source] = None
        if len(chain.rivals) > _HISTORY:
            chain.rivals.pop(next(iter(chain.rivals)))
        return Answer.WANT if len(offered_by) >= _MAJORITY else Answer.CONFLICT

    def take(self, document: Document, *, judged: Answer) -> Answer:
        """Keep a verified version that `judge` wanted (again now: another may have come in between)."""
        if judged is not Answer.WANT:
            return judged
        self._append(document)
        self._write(document)
        return Answer.ACCEPTED

    def _append(self, document: Document) -> None:
        chain = self._chains.setdefault(document.key, _Chain())
        while chain.versions and chain.versions[-1].seq >= document.seq:
            self._forget(chain.versions.pop())
        chain.versions.append(document)
        chain.rivals.clear()
        self._bytes += len(document.signed)
        while len(chain.versions) > _HISTORY:
            self._forget(chain.versions.pop(0))

    def _path(self, document: Document) -> Path | None:
        return self._directory / document.key.hex() / f"{document.seq:012d}.doc" if self._directory is not None else None

    def _write(self, document: Document) -> None:
        path = self._path(document)
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_private(path, document.signed)
        except OSError as error:
            log.warning("directory.document_unsaved", path=str(path), error=str(error))

    def _forget(self, document: Document) -> None:
        self._bytes -= len(document.signed)
        path = self._path(document)
        if path is not None:
            path.unlink(missing_ok=True)
