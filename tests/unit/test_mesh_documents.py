"""Documents: signed, numbered, chained; kept newest first and never taken back."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.authority import KEYS_KID, NODES_KID
from mesh.dht.documents import PROJECT_ROOM, Answer, DocumentStore, write_files
from mesh.documents import DOCUMENT_DOMAIN, MAX_BODY_BYTES, Document, document_key, next_version, parse_document, seal_document
from mesh.envelope import seal
from mesh.errors import BadSignature, MalformedEnvelope, NotYetValid, TrustError, UnknownSigner
from mesh.scope import Scope
from mesh.trust import Issuer, Keyset, Purpose, Trust, parse_keyset, raw_public_key, seal_keyset
from tests.support import vectors
from tests.support.records import NOW, Scribe

SCRIBE = Scribe()
OTHER_MESH = Scribe(2)


def write(former: Document | None, body: bytes = b"body", *, scribe: Scribe = SCRIBE, name: str = "chat", project: str = "") -> Document:
    version = next_version(former, kind="endpoint", name=name, project=project, body=body, now=NOW)
    return seal_document(version, scribe.mesh.keys_issuer, KEYS_KID)


def parse(data: bytes, *, now: float = NOW) -> Document:
    return parse_document(data, SCRIBE.mesh.trust(), now=now)


def offer(store: DocumentStore, document: Document) -> Answer:
    """Passed on by somebody."""
    return store.take(document)


def put(store: DocumentStore, document: Document) -> Answer:
    """Written: held to its predecessor."""
    return store.take(document, cas=True)


def save(store: DocumentStore) -> None:
    assert not write_files(store.unsaved())


def saved(directory: Path) -> list[str]:
    return sorted(path.name.lstrip("0") for path in directory.glob("documents/*/*.doc"))


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


@pytest.mark.parametrize(
    ("scope", "project", "holds"),
    [
        ({"scope": Scope(projects=frozenset({"acme"}))}, "acme", True),
        ({"scope": Scope(projects=frozenset({"acme"}))}, "globex", False),
        ({"scope": Scope(projects=frozenset({"acme"}))}, "", False),
        ({"scope": Scope(models=frozenset({"qwen3-8b"}))}, "acme", False),
        ({"node_roles": frozenset({"worker"})}, "", True),
    ],
)
def test_a_restricted_issuer_signs_for_its_projects_and_nothing_else(scope: dict[str, Any], project: str, holds: bool) -> None:
    mesh, key = SCRIBE.mesh, Ed25519PrivateKey.generate()
    issuer = Issuer(
        kid="some", public_key=raw_public_key(key.public_key()), may=frozenset({Purpose.DOCUMENT}), not_before=0, expires=NOW * 2, **scope
    )
    keyset = parse_keyset(seal_keyset(mesh.root, name="m", seq=99, issued=NOW, issuers=[issuer]), mesh_id=mesh.mesh_id)
    version = next_version(None, kind="limits", name="chat", project=project, body=b"", now=NOW)
    signed = seal_document(version, key, "some").signed
    with nullcontext() if holds else pytest.raises(UnknownSigner):
        assert parse_document(signed, Trust(keyset), now=NOW).project == project


def test_no_two_names_meet_at_one_key() -> None:
    names = [("a", "b/c", ""), ("a/b", "c", ""), ("a", "c", "b"), ("a", "", "b/c"), ("a", "b", "c"), ("a", "bc", "")]
    assert len({document_key(*name) for name in names}) == len(names)


def test_a_document_without_a_kind_is_none() -> None:
    with pytest.raises(MalformedEnvelope):
        parse(seal_document(next_version(None, kind="", name="chat", body=b"", now=NOW), SCRIBE.mesh.keys_issuer, KEYS_KID).signed)


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


@given(st.integers(min_value=0), st.integers(min_value=0, max_value=7))
@settings(deadline=None)
def test_no_changed_bit_goes_unnoticed(at: int, bit: int) -> None:
    data = bytearray(write(None).signed)
    data[at % len(data)] ^= 1 << bit
    with pytest.raises(TrustError):
        parse(bytes(data))


JUNK = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=40)
    | st.binary(max_size=40)
    | st.lists(st.none())
)
FIELDS = ("kind", "name", "proj", "seq", "prev", "iat", "exp", "body")


@given(st.dictionaries(st.sampled_from(FIELDS), JUNK), st.sets(st.sampled_from(FIELDS)))
@settings(deadline=None)
def test_a_signed_payload_of_any_shape_is_a_document_or_a_trust_error(changed: dict[str, object], missing: set[str]) -> None:
    payload: dict[str, object] = {"kind": "a", "name": "b", "seq": 1, "prev": b"", "iat": int(NOW), "exp": 0, "body": b""}
    payload = {name: value for name, value in (payload | changed).items() if name not in missing}
    with suppress(TrustError):
        document = parse(seal(DOCUMENT_DOMAIN, KEYS_KID.encode(), SCRIBE.mesh.keys_issuer, payload))
        assert document.seq >= 1
        assert document.kind
        assert len(document.previous) == (32 if document.seq > 1 else 0)


def test_the_vector_reads_as_written() -> None:
    vector = vectors.read("document.json")
    assert vectors.build()["document.json"] == vector
    keyset = parse_keyset(bytes.fromhex(vector["keyset"]), mesh_id=bytes.fromhex(vector["mesh_id"]))
    document = parse_document(bytes.fromhex(vector["document"]), Trust(keyset), now=vector["now"])
    assert (document.kind, document.project, document.name, document.seq) == ("endpoint", "search", "chat", 3)
    assert (document.key.hex(), document.digest.hex()) == (vector["key"], vector["digest"])
    assert document.body.hex() == vector["body"]


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


def test_of_two_with_one_number_the_first_stays_unless_most_holders_have_the_other() -> None:
    store = DocumentStore(SCRIBE.mesh.trust(), None)
    first = write(None)
    alices, bobs = write(first, b"alice"), write(first, b"bob")
    put(store, first)
    put(store, alices)
    for _ in range(10):
        assert offer(store, bobs) is Answer.CONFLICT, "however often it is offered"
    assert store.take(bobs, outvoted=True) is Answer.ACCEPTED
    assert store.history(first.key) == [bobs, first]
    assert store.take(write(None, b"older"), outvoted=True) is Answer.STALE


def test_what_was_seen_is_still_refused_to_be_rolled_back_after_a_restart(tmp_path: Path) -> None:
    store = DocumentStore(SCRIBE.mesh.trust(), tmp_path)
    first = write(None)
    second = write(first)
    put(store, first)
    put(store, second)
    save(store)
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
    save(store)
    (newest,) = tmp_path.glob("documents/*/000000000002.doc")
    newest.write_bytes(newest.read_bytes()[:-1] + b"\x00")
    (newest.parent / "000000000009.doc").write_bytes(b"junk")
    with (newest.parent / "000000000010.doc").open("wb") as file:
        file.truncate(1 << 40)
    again = DocumentStore(SCRIBE.mesh.trust(), tmp_path)
    again.load(now=NOW)
    assert again.newest(first.key) == first


def test_only_the_last_versions_stay_on_disk(tmp_path: Path) -> None:
    store = DocumentStore(SCRIBE.mesh.trust(), tmp_path)
    version: Document | None = None
    for _ in range(12):
        version = write(version)
        put(store, version)
        save(store)
    assert len(saved(tmp_path)) == 8


def test_a_full_disk_costs_no_document_and_is_tried_again(tmp_path: Path) -> None:
    store = DocumentStore(SCRIBE.mesh.trust(), tmp_path)
    (tmp_path / "documents").write_text("in the way")
    first = write(None)
    assert put(store, first) is Answer.ACCEPTED
    failed = write_files(store.unsaved())
    assert len(failed) == 1
    store.still_unsaved(failed)
    (tmp_path / "documents").unlink()
    save(store)
    assert saved(tmp_path) == ["1.doc"]


def test_projects_cannot_take_the_room_of_the_mesh() -> None:
    store = DocumentStore(SCRIBE.mesh.trust(), None)
    answers = [put(store, write(None, name=str(number), project="acme")) for number in range(PROJECT_ROOM.documents + 2)]
    assert answers == [Answer.ACCEPTED] * PROJECT_ROOM.documents + [Answer.NO_ROOM] * 2
    first = next(iter(store))
    assert store.newest(document_key("endpoint", first.name)) is None, "a document of the mesh with the same name is another"
    assert put(store, write(first, name=first.name, project="acme")) is Answer.ACCEPTED, "what is there can go on"
    assert put(store, write(None, project="globex")) is Answer.ACCEPTED
    assert put(store, write(None)) is Answer.ACCEPTED


def test_large_documents_in_numbers_keep_one_version_each() -> None:
    store = DocumentStore(SCRIBE.mesh.trust(), None)
    documents = [write(None, bytes(MAX_BODY_BYTES), name=str(number), project="acme") for number in range(PROJECT_ROOM.documents)]
    accepted = [document for document in documents if put(store, document) is Answer.ACCEPTED]
    assert accepted == documents
    for document in accepted:
        assert put(store, write(document, bytes(MAX_BODY_BYTES), name=document.name, project="acme")) is Answer.ACCEPTED
    assert {len(store.history(document.key)) for document in accepted} == {1}


def test_what_a_removed_issuer_signed_goes_with_it(tmp_path: Path) -> None:
    """A stolen issuer has written a version nobody could ever count beyond."""
    mesh = Scribe(3).mesh
    trust, good, stolen = mesh.trust(), Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()

    def keyset(seq: int, **keys: Ed25519PrivateKey) -> Keyset:
        issuers = [
            Issuer(kid=kid, public_key=raw_public_key(key.public_key()), may=frozenset({Purpose.DOCUMENT}), not_before=0, expires=NOW * 2)
            for kid, key in keys.items()
        ]
        return parse_keyset(seal_keyset(mesh.root, name="m", seq=seq, issued=NOW, issuers=issuers), mesh_id=mesh.mesh_id)

    assert trust.update(keyset(10, good=good, stolen=stolen))
    store = DocumentStore(trust, tmp_path)
    first = seal_document(next_version(None, kind="limits", name="", body=b"ours", now=NOW), good, "good")
    theirs = seal_document(replace(next_version(first, kind="limits", name="", body=b"theirs", now=NOW), seq=2**62), stolen, "stolen")
    other = seal_document(next_version(None, kind="limits", name="x", body=b"theirs", now=NOW), stolen, "stolen")
    assert [offer(store, document) for document in (first, theirs, other)] == [Answer.ACCEPTED] * 3
    save(store)
    assert trust.update(keyset(11, good=good))
    store.recheck(now=NOW)
    assert list(store) == [first]
    save(store)
    assert saved(tmp_path) == ["1.doc"]


def test_an_issuer_whose_time_is_over_does_not_open_the_way_back() -> None:
    mesh = Scribe(4).mesh
    trust, key = mesh.trust(), Ed25519PrivateKey.generate()
    for seq, expires in ((10, NOW + 10), (11, NOW + 20)):
        issuer = Issuer(
            kid="k", public_key=raw_public_key(key.public_key()), may=frozenset({Purpose.DOCUMENT}), not_before=0, expires=expires
        )
        trust.update(parse_keyset(seal_keyset(mesh.root, name="m", seq=seq, issued=NOW, issuers=[issuer]), mesh_id=mesh.mesh_id))
        if seq == 10:
            store = DocumentStore(trust, None)
            first = seal_document(next_version(None, kind="limits", name="", body=b"", now=NOW), key, "k")
            offer(store, first)
    store.recheck(now=NOW + 100)
    assert store.newest(first.key) == first
