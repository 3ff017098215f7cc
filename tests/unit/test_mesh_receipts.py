"""Receipts: bytes and back, whatever the bytes; batches that hold for whom they say; proofs of single receipts."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import BadSignature, MalformedEnvelope, NotYetValid, TrustError
from mesh.merkle import audit_path, leaf_hash, root_hash, verify_path
from mesh.receipts import (
    MAX_RECEIPT_BYTES,
    Batch,
    Kind,
    Proof,
    check_chain,
    encode_receipt,
    parse_batch,
    parse_receipt,
    seal_batch,
    verify_proof,
)
from mesh.trust import Role, Trust, parse_keyset
from tests.support import vectors
from tests.support.authority import TestMesh, make_mesh
from tests.support.ledgers import AT, make_receipt

NOW = AT / 1000
printable = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), max_size=32)
counts = st.integers(0, 10**9)


@pytest.fixture(scope="module")
def mesh() -> TestMesh:
    return make_mesh(now=NOW - 60)


@given(printable, counts, counts, counts, st.booleans(), st.sampled_from(["", "gguf", "sha256:" + "0f" * 32]))
def test_a_receipt_comes_back_as_it_was(text: str, prompt: int, completion: int, resumed: int, flag: bool, digest: str) -> None:
    receipt = make_receipt(
        project=text,
        model=text,
        status=text or "ok",
        digest=digest,
        prompt=prompt,
        completion=completion,
        resumed=resumed,
        own_count=flag,
        final=flag,
        side=Role.PROXY if flag else Role.WORKER,
        kind=Kind.UPTIME if flag else Kind.CALL,
        gpus=8,
    )
    assert parse_receipt(encode_receipt(receipt)) == receipt


def test_an_ordinary_receipt_is_small() -> None:
    assert len(encode_receipt(make_receipt())) < 220


def test_the_largest_receipt_there_can_be_is_taken() -> None:
    wide = make_receipt(
        id="i" * 64, project="p" * 64, endpoint="e" * 128, model="m" * 256, adapter="a" * 256, task="t" * 32, status="s" * 64
    )
    assert parse_receipt(encode_receipt(replace(wide, gpus=1024, done=10**13))).model == "m" * 256


@given(st.binary(max_size=400))
def test_any_bytes_are_a_receipt_or_malformed(data: bytes) -> None:
    with suppress(MalformedEnvelope):
        parse_receipt(data)


@given(st.integers(0, 300), st.binary(min_size=1, max_size=1))
def test_a_changed_receipt_is_another_or_malformed(at: int, byte: bytes) -> None:
    data = encode_receipt(make_receipt())
    at %= len(data)
    changed = data[:at] + byte + data[at + 1 :]
    try:
        parsed = parse_receipt(changed)
    except MalformedEnvelope:
        return
    assert (changed == data) <= (parsed == make_receipt())


@pytest.mark.parametrize(
    "fields",
    [{"id": "x" * 65}, {"attempt": -1}, {"attempt": 1001}, {"at": 10**13 + 1}, {"key": b"123"}, {"peer": b"1"}, {"model": "a\nb"}],
)
def test_a_field_out_of_bounds_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(MalformedEnvelope):
        parse_receipt(encode_receipt(make_receipt(**fields)))


def test_a_receipt_that_is_too_large_is_refused_unread() -> None:
    with pytest.raises(MalformedEnvelope, match="at most"):
        parse_receipt(b"\x80" + b"\x00" * MAX_RECEIPT_BYTES)


def test_the_vector_holds(mesh: TestMesh) -> None:
    vector = vectors.read("receipts.json")
    assert vectors.build()["receipts.json"] == vector
    keyset = parse_keyset(bytes.fromhex(vector["keyset"]), mesh_id=bytes.fromhex(vector["mesh_id"]))
    path = tuple(map(bytes.fromhex, vector["path_of_the_second"]))
    proof = Proof(receipt=bytes.fromhex(vector["receipts"][1]), index=1, path=path, batch=bytes.fromhex(vector["batch"]))
    receipt, batch = verify_proof(proof, Trust(keyset), now=vector["now"] + 2)
    assert (receipt.id, receipt.resumed, receipt.partial, batch.count) == ("req_2", 7, True, 3)


# -- Merkle


def rfc_root(leaves: list[bytes]) -> bytes:
    """RFC 6962's own recursive definition."""
    if len(leaves) == 1:
        return leaves[0]
    cut = 1
    while cut * 2 < len(leaves):
        cut *= 2
    return sha256(b"\x01" + rfc_root(leaves[:cut]) + rfc_root(leaves[cut:])).digest()


@pytest.mark.parametrize("count", [*range(1, 20), 64, 65, 100])
def test_every_leaf_has_its_path_and_no_other(count: int) -> None:
    leaves = [leaf_hash(bytes([number])) for number in range(count)]
    root = root_hash(leaves)
    assert root == rfc_root(leaves)
    for index, leaf in enumerate(leaves):
        path = audit_path(leaves, index)
        assert verify_path(leaf, index, count, path, root)
        assert not verify_path(leaf_hash(b"other"), index, count, path, root)
        assert not verify_path(leaf, index, count, [*path, leaf], root)
        assert not verify_path(leaf, index + count, count, path, root)
        if path:
            assert not verify_path(leaf, index, count, path[:-1], root)


# -- batches


def sealed(
    mesh: TestMesh, *, role: Role = Role.WORKER, at: int = AT, number: int = 1, previous: bytes = b"", count: int = 3
) -> tuple[bytes, list[bytes]]:
    identity = mesh.identity(role, now=NOW - 50)
    bodies = [encode_receipt(make_receipt(number, side=role)) for number in range(count)]
    root = root_hash([leaf_hash(body) for body in bodies])
    signed = seal_batch(identity.key, identity.membership.signed, number=number, count=count, root=root, previous=previous, at=at)
    return signed, bodies


def proof_of(signed: bytes, bodies: list[bytes], index: int) -> Proof:
    path = audit_path([leaf_hash(body) for body in bodies], index)
    return Proof(receipt=bodies[index], index=index, path=tuple(path), batch=signed)


def test_a_receipt_in_a_signed_batch_is_its_nodes(mesh: TestMesh) -> None:
    signed, bodies = sealed(mesh)
    receipt, batch = verify_proof(proof_of(signed, bodies, 1), mesh.trust(), now=NOW)
    assert receipt == make_receipt(1)
    assert batch.role == Role.WORKER


def test_a_batch_holds_long_after_its_nodes_membership_has_ended(mesh: TestMesh) -> None:
    signed, _ = sealed(mesh)
    assert parse_batch(signed, mesh.trust(), now=NOW + 400 * 86_400).count == 3


def test_a_batch_from_before_its_nodes_membership_does_not_hold(mesh: TestMesh) -> None:
    signed, _ = sealed(mesh, at=AT - 86_400_000)
    with pytest.raises(TrustError):
        parse_batch(signed, mesh.trust(), now=NOW)


def test_a_batch_from_the_future_does_not_hold(mesh: TestMesh) -> None:
    signed, _ = sealed(mesh, at=AT + 3_600_000)
    with pytest.raises(NotYetValid):
        parse_batch(signed, mesh.trust(), now=NOW)


def test_a_batch_signed_with_another_key_than_its_members_does_not_hold(mesh: TestMesh) -> None:
    mine, theirs = mesh.identity(Role.WORKER, now=NOW - 50), mesh.identity(Role.WORKER, now=NOW - 50)
    signed = seal_batch(mine.key, theirs.membership.signed, number=1, count=1, root=b"r" * 32, previous=b"", at=AT)
    with pytest.raises(BadSignature):
        parse_batch(signed, mesh.trust(), now=NOW)


def test_another_meshs_batch_does_not_hold(mesh: TestMesh) -> None:
    signed, _ = sealed(make_mesh(now=NOW - 60))
    with pytest.raises(TrustError):
        parse_batch(signed, mesh.trust(), now=NOW)


def test_a_worker_cannot_prove_a_proxys_receipt(mesh: TestMesh) -> None:
    identity = mesh.identity(Role.WORKER, now=NOW - 50)
    body = encode_receipt(make_receipt(side=Role.PROXY))
    signed = seal_batch(identity.key, identity.membership.signed, number=1, count=1, root=leaf_hash(body), previous=b"", at=AT)
    with pytest.raises(BadSignature, match="role"):
        verify_proof(Proof(receipt=body, index=0, path=(), batch=signed), mesh.trust(), now=NOW)


def test_a_receipt_that_is_not_in_the_batch_is_refused(mesh: TestMesh) -> None:
    signed, bodies = sealed(mesh)
    forged = replace(proof_of(signed, bodies, 1), receipt=encode_receipt(make_receipt(1, completion=2000)))
    with pytest.raises(BadSignature, match="not in the batch"):
        verify_proof(forged, mesh.trust(), now=NOW)


TRUST = make_mesh(now=NOW - 60).trust()


@given(st.binary(max_size=720))
def test_any_bytes_are_no_batch(data: bytes) -> None:
    with pytest.raises(TrustError):
        parse_batch(data, TRUST, now=NOW)


def test_a_batch_taken_out_of_the_chain_shows(mesh: TestMesh) -> None:
    identity = mesh.identity(Role.WORKER, now=NOW - 50)
    chain: list[Batch] = []
    for number in range(1, 5):
        signed = seal_batch(
            identity.key,
            identity.membership.signed,
            number=number,
            count=1,
            root=bytes([number]) * 32,
            previous=chain[-1].digest if chain else b"",
            at=AT,
        )
        chain.append(parse_batch(signed, mesh.trust(), now=NOW))
    check_chain(chain)
    with pytest.raises(BadSignature):
        check_chain([chain[0], *chain[2:]])
