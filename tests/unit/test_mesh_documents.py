"""Documents: signed, numbered, chained; kept newest first and never taken back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.authority import KEYS_KID, NODES_KID
from mesh.dht.documents import Answer, DocumentStore
from mesh.documents import MAX_BODY_BYTES, Document, document_key, next_version, parse_document, seal_document
from mesh.envelope import seal
from mesh.errors import BadSignature, MalformedEnvelope, NotYetValid, TrustError, UnknownSigner
from tests.support.records import NOW, Scribe

SCRIBE = Scribe()
OTHER_MESH = Scribe(2)


def write(former: Document | None, body: bytes = b"body", *, scribe: Scribe = SCRIBE, name: str = "chat") -> Document:
    version = next_version(former, kind="endpoint", name=name, body=body, now=NOW)
    return seal_document(version, scribe.mesh.keys_issuer, KEYS_KID)


def parse(data: bytes, *, now: float = NOW) -> Document:
    return parse_document(data, SCRIBE.mesh.trust(), now=now)


def offer(store: DocumentStore, document: Document, *, previous: bytes | None = None, source: bytes = b"peer") -> Answer:
    judged = store.judge(document.key, document.seq, document.digest, previous, source=source)
    return store.take(document, judged=judged)


def put(store: DocumentStore, document: Document) -> Answer:
    return offer(store, document, previous=document.previous)


# the document itself


def test_what_an_issuer_signs_reads_the_same() -> None:
    first = write(None, b"\x00" * MAX_BODY_BYTES)
    assert parse(first.signed) == first
    second = write(first)
    assert (second.seq, second.previous) == (2, first.digest)
    assert first.key == document_key("endpoint", "chat") != document_key("endpoint", "embed")


def test_a_body_too_large_is_refused_at_once() -> None:
    with pytest.raises(MalformedEnvelope):
        write(None, bytes(MAX_BODY_BYTES + 1))


def test_only_issuers_of_documents_sign_them() -> None:
    version = next_version(None, kind="endpoint", name="chat", body=b"", now=NOW)
    with pytest.raises(UnknownSigner):
        parse(seal_document(version, SCRIBE.mesh.admission.key, NODES_KID).signed)
    with pytest.raises(BadSignature):
        parse(seal_document(version, SCRIBE.mesh.admission.key, KEYS_KID).signed)
    with pytest.raises(TrustError):
        parse(write(None, scribe=OTHER_MESH).signed)


def test_something_else_signed_by_the_same_key_is_no_document() -> None:
    payload = {"kind": "a", "name": "b", "seq": 1, "prev": b"", "iat": int(NOW), "exp": 0, "body": b""}
    with pytest.raises(BadSignature):
        parse(seal("infermesh/apikey", KEYS_KID.encode(), SCRIBE.mesh.keys_issuer, payload))


def test_a_document_from_the_future_has_to_wait() -> None:
    early = replace(next_version(None, kind="endpoint", name="chat", body=b"", now=NOW), issued=NOW + 3_600)
    with pytest.raises(NotYetValid):
        parse(seal_document(early, SCRIBE.mesh.keys_issuer, KEYS_KID).signed)


def test_a_chain_has_no_loose_ends() -> None:
    loose = replace(write(None), seq=2)
    with pytest.raises(MalformedEnvelope):
        parse(seal_document(loose, SCRIBE.mesh.keys_issuer, KEYS_KID).signed)
    tied = replace(write(None), previous=b"x" * 32)
    with pytest.raises(MalformedEnvelope):
        parse(seal_document(tied, SCRIBE.mesh.keys_issuer, KEYS_KID).signed)


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    with pytest.raises(TrustError):
        parse(data)


# keeping it


def test_versions_follow_each_other_and_the_last_are_readable() -> None:
    store = DocumentStore(SCRIBE.mesh.trust(), None)
    version: Document | None = None
    for number in range(1, 13):
        version = write(version, str(number).encode())
        assert put(store, version) is Answer.ACCEPTED
    key = document_key("endpoint", "chat")
    assert [document.seq for document in store.history(key)] == list(range(12, 4, -1))
    assert store.newest(key) == version
    old = store.version(key, 7)
    assert old is not None
    assert old.body == b"7"
    assert store.version(key, 2) is None


def test_a_write_that_missed_another_is_refused() -> None:
    store = DocumentStore(SCRIBE.mesh.trust(), None)
    first = write(None)
    put(store, first)
    alices, bobs = write(first, b"alice"), write(first, b"bob")
    assert put(store, alices) is Answer.ACCEPTED
    assert put(store, bobs) is Answer.CONFLICT
    assert put(store, write(bobs, b"on top of what was refused")) is Answer.CONFLICT
    assert store.newest(first.key) == alices


def test_the_same_version_twice_is_had() -> None:
    store = DocumentStore(SCRIBE.mesh.trust(), None)
    first = write(None)
    assert [put(store, first), put(store, first)] == [Answer.ACCEPTED, Answer.HAVE]


def test_a_rollback_is_refused() -> None:
    store = DocumentStore(SCRIBE.mesh.trust(), None)
    first = write(None)
    second = write(first)
    offer(store, second)
    assert offer(store, first) is Answer.STALE
    assert put(store, first) is Answer.STALE


def test_a_holder_that_missed_versions_takes_the_newest_passed_on() -> None:
    store = DocumentStore(SCRIBE.mesh.trust(), None)
    first = write(None)
    put(store, first)
    fourth = write(write(write(first)))
    assert offer(store, fourth) is Answer.ACCEPTED


def test_of_two_that_split_the_holders_the_majoritys_wins_everywhere() -> None:
    store = DocumentStore(SCRIBE.mesh.trust(), None)
    first = write(None)
    alices, bobs = write(first, b"alice"), write(first, b"bob")
    put(store, first)
    put(store, alices)
    assert [offer(store, bobs, source=bytes((holder,))) for holder in (1, 1, 2)] == [Answer.CONFLICT] * 3
    assert offer(store, bobs, source=b"\x03") is Answer.ACCEPTED
    assert store.newest(first.key) == bobs


def test_what_was_seen_is_still_refused_to_be_rolled_back_after_a_restart(tmp_path: Path) -> None:
    store = DocumentStore(SCRIBE.mesh.trust(), tmp_path)
    first = write(None)
    second = write(first)
    put(store, first)
    put(store, second)
    again = DocumentStore(SCRIBE.mesh.trust(), tmp_path)
    again.load(now=NOW)
    assert again.newest(first.key) == second
    assert [document.seq for document in again.history(first.key)] == [2, 1]
    assert offer(again, first) is Answer.STALE
    assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("documents/*/*.doc")} == {0o600}


def test_a_tampered_file_is_left_out(tmp_path: Path) -> None:
    store = DocumentStore(SCRIBE.mesh.trust(), tmp_path)
    first = write(None)
    put(store, first)
    put(store, write(first))
    (newest,) = tmp_path.glob("documents/*/000000000002.doc")
    newest.write_bytes(newest.read_bytes()[:-1] + b"\x00")
    (newest.parent / "000000000009.doc").write_bytes(b"junk")
    again = DocumentStore(SCRIBE.mesh.trust(), tmp_path)
    again.load(now=NOW)
    assert again.newest(first.key) == first


def test_only_the_last_versions_stay_on_disk(tmp_path: Path) -> None:
    store = DocumentStore(SCRIBE.mesh.trust(), tmp_path)
    version: Document | None = None
    for _ in range(12):
        version = write(version)
        put(store, version)
    assert len(list(tmp_path.glob("documents/*/*.doc"))) == 8
