"""The keyset: who may sign what, and nobody else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mesh.envelope import seal
from mesh.errors import BadSignature, Expired, MalformedEnvelope, NotYetValid, TrustError, UnknownSigner, WrongMesh
from mesh.scope import Scope
from mesh.trust import (
    KEYSET_DOMAIN,
    Issuer,
    Purpose,
    Trust,
    key_id,
    parse_keyset,
    raw_public_key,
    read_public_key,
    seal_keyset,
)
from tests.support.vectors import fixed_key

NOW = 1_800_000_000.0
ROOT, ALICE, BOB = fixed_key("root"), fixed_key("alice"), fixed_key("bob")
MESH_ID = key_id(raw_public_key(ROOT.public_key()))

ALICES = Issuer(
    kid="alice",
    public_key=raw_public_key(ALICE.public_key()),
    may=frozenset({Purpose.KEY}),
    not_before=NOW,
    expires=NOW + 100.0,
    scope=Scope(projects=frozenset({"search"}), models=frozenset()),
)
BOBS = replace(ALICES, kid="bob", public_key=raw_public_key(BOB.public_key()), may=frozenset({Purpose.NODE}), scope=Scope())


def keyset(*issuers: Issuer, seq: int = 1) -> bytes:
    return seal_keyset(ROOT, name="lab", seq=seq, issued=NOW, issuers=issuers)


def trust(*issuers: Issuer) -> Trust:
    return Trust(parse_keyset(keyset(*issuers), mesh_id=MESH_ID))


def test_keyset_reads_back_as_it_was_signed() -> None:
    parsed = parse_keyset(keyset(ALICES, BOBS, seq=3), mesh_id=MESH_ID)
    assert (parsed.name, parsed.seq, parsed.issuers) == ("lab", 3, (ALICES, BOBS))
    assert parsed.signed == keyset(ALICES, BOBS, seq=3)


def test_empty_restriction_is_not_the_same_as_none() -> None:
    parsed = parse_keyset(keyset(ALICES, BOBS), mesh_id=MESH_ID)
    assert parsed.issuers[0].models == frozenset()
    assert parsed.issuers[1].projects is None


def test_keyset_of_another_mesh_is_refused() -> None:
    other = seal_keyset(ALICE, name="lab", seq=9, issued=NOW, issuers=[ALICES])
    with pytest.raises(WrongMesh):
        parse_keyset(other, mesh_id=MESH_ID)


def test_keyset_signed_by_another_key_in_the_roots_name_is_refused() -> None:
    forged = seal(KEYSET_DOMAIN, raw_public_key(ROOT.public_key()), ALICE, {"name": "lab", "seq": 2, "issuers": []})
    with pytest.raises(BadSignature):
        parse_keyset(forged, mesh_id=MESH_ID)


def test_signer_that_is_no_key_is_refused() -> None:
    with pytest.raises(TrustError):
        parse_keyset(seal(KEYSET_DOMAIN, b"root", ROOT, {"name": "lab", "seq": 2, "issuers": []}), mesh_id=MESH_ID)


def test_issuer_signs_for_its_purpose_only() -> None:
    known = trust(ALICES, BOBS)
    assert known.issuer("alice", Purpose.KEY, now=NOW) == ALICES
    with pytest.raises(UnknownSigner):
        known.issuer("alice", Purpose.NODE, now=NOW)
    with pytest.raises(UnknownSigner):
        known.issuer("bob", Purpose.KEY, now=NOW)


@pytest.mark.parametrize("kid", ["carol", "", b"\xff\xfe", b"alice\x00"])
def test_unlisted_issuer_is_unknown(kid: str | bytes) -> None:
    with pytest.raises(UnknownSigner):
        trust(ALICES).issuer(kid, Purpose.KEY, now=NOW)


def test_issuer_outside_its_time_is_refused() -> None:
    known = trust(ALICES)
    with pytest.raises(Expired):
        known.issuer("alice", Purpose.KEY, now=NOW + 100.0)
    with pytest.raises(NotYetValid):
        known.issuer("alice", Purpose.KEY, now=NOW - 100.0)


def test_newer_keyset_replaces_the_older_and_never_the_other_way_round() -> None:
    known = trust(ALICES)
    seen: list[int] = []
    known.on_change(lambda: seen.append(known.keyset.seq))
    assert known.update(parse_keyset(keyset(BOBS, seq=2), mesh_id=MESH_ID))
    assert not known.update(parse_keyset(keyset(ALICES, seq=2), mesh_id=MESH_ID))
    assert not known.update(parse_keyset(keyset(ALICES, seq=1), mesh_id=MESH_ID))
    assert seen == [2]
    with pytest.raises(UnknownSigner):
        known.issuer("alice", Purpose.KEY, now=NOW)


def test_keyset_of_another_mesh_cannot_update() -> None:
    other_id = key_id(raw_public_key(ALICE.public_key()))
    other = parse_keyset(seal_keyset(ALICE, name="x", seq=99, issued=NOW, issuers=[]), mesh_id=other_id)
    with pytest.raises(WrongMesh):
        trust(ALICES).update(other)


def test_opening_needs_the_named_issuers_own_signature() -> None:
    known = trust(ALICES, BOBS)
    issuer, opened = known.open("infermesh/x", seal("infermesh/x", b"alice", ALICE, {"a": 1}), Purpose.KEY, now=NOW)
    assert (issuer.kid, opened.payload) == ("alice", {"a": 1})
    with pytest.raises(BadSignature):
        known.open("infermesh/x", seal("infermesh/x", b"alice", BOB, {"a": 1}), Purpose.KEY, now=NOW)


def test_malformed_issuer_in_a_well_signed_keyset_is_refused() -> None:
    for issuers in ([{"kid": "a"}], [{**ALICES.to_payload(), "pub": b"short"}], [{**ALICES.to_payload(), "may": "key"}], "x"):
        data = seal(KEYSET_DOMAIN, raw_public_key(ROOT.public_key()), ROOT, {"name": "lab", "seq": 1, "issuers": issuers})
        with pytest.raises(MalformedEnvelope):
            parse_keyset(data, mesh_id=MESH_ID)


def test_key_of_the_wrong_length_is_malformed() -> None:
    with pytest.raises(MalformedEnvelope):
        read_public_key(b"x" * 31)


def test_key_id_is_the_hash_of_the_spki() -> None:
    import hashlib

    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    spki = ALICE.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert key_id(raw_public_key(ALICE.public_key())) == hashlib.sha256(spki).digest()
