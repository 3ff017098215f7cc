"""The documents a node holds: the last versions of each, on disk where the node is one that remembers.

A version is taken only if it is newer than the newest here. So a rollback is refused by whoever has seen better, and a node that was
offline goes on from what it last wrote to its disk, not from nothing. For the same reason one that has expired stays.

Only verified versions come in, so no peer can fill the store; and what projects sign for themselves has a part of the room that leaves the
mesh's own documents theirs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import structlog

from mesh.documents import Document, document_key, parse_document
from mesh.envelope import MAX_ENVELOPE_BYTES, signer_of
from mesh.errors import Expired, MalformedEnvelope, NotYetValid, TrustError
from mesh.identity import write_private
from mesh.trust import KEYSET_KIND, Issuer, Trust, parse_keyset

log = structlog.get_logger(__name__)

HISTORY = 8
"""Versions kept of each document."""
_FOLDER = "documents"


class Answer(IntEnum):
    """What becomes of an offered version; also its code on the wire."""

    ACCEPTED = 0
    HAVE = 1
    WANT = 2
    STALE = 3
    CONFLICT = 4
    NO_ROOM = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How many documents there may be, and from how many bytes on there is no room for another, nor for more than one version of each."""

    documents: int
    bytes: int


MESH_ROOM = Room(documents=1_024, bytes=32 << 20)
PROJECT_ROOM = Room(documents=64, bytes=4 << 20)
PROJECTS_ROOM = Room(documents=3_072, bytes=32 << 20)
"""Of all projects together."""


class DocumentStore:
    """``directory`` is where versions are kept, None for a node that forgets. Writing to it is the caller's: see `unsaved`."""

    def __init__(self, trust: Trust, directory: Path | None) -> None:
        self._trust = trust
        self._directory = directory / _FOLDER if directory is not None else None
        self._chains: dict[bytes, list[Document]] = {}
        self._documents: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._unsaved: dict[Path, bytes | None] = {}
        self._issuers = _issuers(trust)

    def __len__(self) -> int:
        return len(self._chains)

    def __iter__(self) -> Iterator[Document]:
        """The newest version of each."""
        return iter([versions[-1] for versions in self._chains.values()])

    def load(self, *, now: float) -> None:
        """Read what was kept. What cannot be read or does not hold is left out, and where it is, with a warning."""
        if self._directory is None or not self._directory.is_dir():
            return
        found: list[Document] = []
        keysets = document_key(KEYSET_KIND, KEYSET_KIND).hex()
        for path in sorted(self._directory.glob("*/*.doc"), key=lambda path: (path.parent.name != keysets, path)):
            try:
                if path.stat().st_size > MAX_ENVELOPE_BYTES:
                    raise MalformedEnvelope("too large")
                document = parse_document(path.read_bytes(), self._trust, now=now)
                self._take_keyset(document)
                found.append(document)
            except (OSError, TrustError) as error:
                log.warning("directory.document_unreadable", path=str(path), error=str(error))
        for document in sorted(found, key=lambda document: document.seq):
            if self.judge(document.key, document.seq, document.digest, None) is Answer.WANT and self._has_room(document):
                self._append(document)

    def newest(self, key: bytes) -> Document | None:
        versions = self._chains.get(key)
        return versions[-1] if versions else None

    def version(self, key: bytes, seq: int) -> Document | None:
        """A version by its number; 0 is the newest."""
        return next((document for document in reversed(self._chains.get(key, [])) if seq in (0, document.seq)), None)

    def history(self, key: bytes) -> list[Document]:
        """The versions held, the newest first."""
        return list(reversed(self._chains.get(key, [])))

    def judge(self, key: bytes, seq: int, digest: bytes, previous: bytes | None) -> Answer:
        """Whether a version is wanted, before its bytes are in hand.

        A writer gives ``previous`` and is held to it (compare-and-swap); one who only passes a version on gives None. Of two versions with
        one seq the first to come stays.
        """
        newest = self.newest(key)
        if newest is None:
            return Answer.WANT if len(self._chains) < MESH_ROOM.documents + PROJECTS_ROOM.documents else Answer.NO_ROOM
        if digest == newest.digest:
            return Answer.HAVE
        if seq < newest.seq:
            return Answer.STALE
        if seq == newest.seq or (previous is not None and (seq != newest.seq + 1 or previous != newest.digest)):
            return Answer.CONFLICT
        return Answer.WANT

    def take(self, document: Document, *, cas: bool = False, outvoted: bool = False) -> Answer:
        """Keep a verified version that `judge` wants. ``cas`` holds it to its predecessor; ``outvoted`` says that of two versions with one
        seq most holders have this one and not ours."""
        answer = self.judge(document.key, document.seq, document.digest, document.previous if cas else None)
        newest = self.newest(document.key)
        if answer is Answer.CONFLICT and outvoted and newest is not None and newest.seq == document.seq:
            answer = Answer.WANT
        if answer is Answer.WANT and not self._has_room(document):
            answer = Answer.NO_ROOM
        if answer is not Answer.WANT:
            return answer
        self._append(document)
        self._note(document, document.signed)
        self._take_keyset(document)
        return Answer.ACCEPTED

    def _take_keyset(self, document: Document) -> None:
        if document.kind == KEYSET_KIND:
            self._trust.update(parse_keyset(document.body, mesh_id=self._trust.mesh_id))

    def recheck(self, *, now: float) -> None:
        """The keyset has changed: what an issuer signed who is gone, or is another now, goes with it, and what was before it counts again.

        An issuer whose time is merely over takes nothing with it: what it signed still says which versions are old.
        """
        former, self._issuers = self._issuers, _issuers(self._trust)
        changed = {kid for kid in former | self._issuers if former.get(kid) != self._issuers.get(kid)}
        held = [document for versions in self._chains.values() for document in versions]
        for document in held if changed else []:
            if signer_of(document.signed) in changed and not self._still_holds(document, now=now):
                self._remove(document)

    def _still_holds(self, document: Document, *, now: float) -> bool:
        try:
            parse_document(document.signed, self._trust, now=now)
        except (Expired, NotYetValid):
            return True
        except TrustError as error:
            log.warning("directory.document_dropped", document=document.title, seq=document.seq, error=str(error))
            return False
        return True

    def _has_room(self, document: Document) -> bool:
        """A further version of what is held always has room: it takes the place of an older one."""
        if document.key in self._chains:
            return True
        mine, project = "", document.project
        if not project:
            return self._documents[mine] < MESH_ROOM.documents and self._bytes[mine] < MESH_ROOM.bytes
        projects = Room(documents=len(self._chains) - self._documents[mine], bytes=self._bytes.total() - self._bytes[mine])
        return (
            self._documents[project] < PROJECT_ROOM.documents
            and self._bytes[project] < PROJECT_ROOM.bytes
            and projects.documents < PROJECTS_ROOM.documents
            and projects.bytes < PROJECTS_ROOM.bytes
        )

    def _append(self, document: Document) -> None:
        versions = self._chains.get(document.key)
        if versions is None:
            versions = self._chains[document.key] = []
            self._documents[document.project] += 1
        versions.append(document)
        self._bytes[document.project] += len(document.signed)
        room = PROJECT_ROOM if document.project else MESH_ROOM
        most = HISTORY if self._bytes[document.project] < room.bytes else 1
        rivals = [version for version in versions[:-1] if version.seq >= document.seq]
        for old in rivals + versions[: -most - len(rivals)]:
            self._remove(old)

    def _remove(self, document: Document) -> None:
        versions = self._chains[document.key]
        versions.remove(document)
        self._bytes[document.project] -= len(document.signed)
        self._note(document, None)
        if not versions:
            del self._chains[document.key]
            self._documents[document.project] -= 1

    # on disk

    @property
    def unsaved_count(self) -> int:
        return len(self._unsaved)

    def unsaved(self) -> dict[Path, bytes | None]:
        """What has changed since it was last asked for: files and their contents, None for one to be removed. See `write_files`."""
        changed, self._unsaved = self._unsaved, {}
        return changed

    def still_unsaved(self, files: Mapping[Path, bytes | None]) -> None:
        """These could not be written; they are, unless something newer is, part of what `unsaved` gives next."""
        self._unsaved = dict(files) | self._unsaved

    def _note(self, document: Document, data: bytes | None) -> None:
        if self._directory is not None:
            self._unsaved[self._directory / document.key.hex() / f"{document.seq:012d}.doc"] = data


def write_files(files: Mapping[Path, bytes | None]) -> dict[Path, bytes | None]:
    """Write and remove files; returns those for which that failed. Waits for the disk: not for the event loop's thread."""
    failed: dict[Path, bytes | None] = {}
    for path, data in files.items():
        try:
            if data is None:
                path.unlink(missing_ok=True)
            else:
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                write_private(path, data)
        except OSError as error:
            if not failed:
                log.warning("directory.document_unsaved", path=str(path), error=str(error))
            failed[path] = data
    return failed


def _issuers(trust: Trust) -> dict[bytes, Issuer]:
    return {issuer.kid.encode(): issuer for issuer in trust.keyset.issuers}
