"""Documents of one node without a directory: what `mesh.bulletin` and `proxy.documents` ask of `mesh.directory.Directory`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mesh.clock import Clock
from mesh.dht.documents import Answer, DocumentStore, write_files
from mesh.dht.pages import Version
from mesh.documents import Document, document_key, parse_document
from mesh.errors import DocumentConflict, TrustError
from mesh.trust import Trust


class Shelf:
    """The real store; ``asked`` is what was looked for in the directory, of which there is none."""

    def __init__(self, trust: Trust, clock: Clock, folder: Path | None = None) -> None:
        self.trust = trust
        self.clock = clock
        self.store = DocumentStore(trust, folder)
        self.asked: list[tuple[str, str]] = []
        self.holders = 3
        self._listeners: list[Callable[[Document], None]] = []
        self.store.load(now=clock.wall())

    def accept_document(self, signed: bytes) -> bool:
        try:
            document = parse_document(signed, self.trust, now=self.clock.wall())
        except TrustError:
            return False
        if self.store.take(document) is not Answer.ACCEPTED:
            return False
        write_files(self.store.unsaved())
        for listener in self._listeners:
            listener(document)
        return True

    def held_documents(self, kind: str = "") -> list[Document]:
        return [document for document in self.store if kind in ("", document.kind)]

    def held_document(self, kind: str, name: str, *, project: str = "") -> Document | None:
        return self.store.newest(document_key(kind, name, project))

    def on_document(self, callback: Callable[[Document], None]) -> None:
        self._listeners.append(callback)

    async def get_document(self, kind: str, name: str, *, project: str = "", seq: int = 0) -> Document | None:
        self.asked.append((kind, name))
        return self.store.version(document_key(kind, name, project), seq)

    async def document_history(self, kind: str, name: str, *, project: str = "") -> list[Version]:
        versions = self.store.history(document_key(kind, name, project))
        return [Version(seq=document.seq, digest=document.digest, issued=document.issued) for document in versions]

    async def put_document(self, document: Document) -> int:
        if self.store.judge(document.key, document.seq, document.digest, document.previous) in (Answer.CONFLICT, Answer.STALE):
            raise DocumentConflict("changed meanwhile")
        self.accept_document(document.signed)
        return self.holders
