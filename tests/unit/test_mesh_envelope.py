"""The one parser of signed things, from its owner's side and from an attacker's."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from mesh.envelope import MAX_ENVELOPE_BYTES, SIGNATURE_BYTES, open_envelope, parse_payload, read_unverified, seal, signer_of
from mesh.errors import BadSignature, MalformedEnvelope, TrustError, UnknownSigner
from tests.support import vectors
from tests.support.vectors import fixed_key

DOMAIN = "infermesh/test"
ALICE = fixed_key("alice")
BOB = fixed_key("bob")


def knows_alice(signer: bytes) -> bytes:
    if signer != b"alice":
        raise UnknownSigner
    return ALICE.public_key().public_bytes_raw()


def sealed_by(key: Ed25519PrivateKey, body: bytes) -> bytes:
    """A properly signed envelope around any bytes whatever."""
    return body + key.sign(DOMAIN.encode() + b"\x00" + body)


def test_sealed_payload_opens_to_the_same_values_and_names_its_signer() -> None:
    payload = {"a": 1, "b": b"\x00", "c": ["x", None, 2.5], "d": {"e": True}}
    opened = open_envelope(DOMAIN, seal(DOMAIN, b"alice", ALICE, payload), knows_alice)
    assert opened.payload == payload
    assert opened.signer == b"alice"


def test_sealing_twice_gives_the_same_bytes() -> None:
    assert seal(DOMAIN, b"alice", ALICE, {"a": 1}) == seal(DOMAIN, b"alice", ALICE, {"a": 1})


def test_committed_vector_is_what_is_made_today_and_opens() -> None:
    vector = vectors.read("envelope.json")
    assert vectors.build()["envelope.json"] == vector
    opened = open_envelope(
        vector["domain"], bytes.fromhex(vector["envelope"]), lambda _: fixed_key("keys-1").public_key().public_bytes_raw()
    )
    assert opened.payload["text"] == vector["payload"]["text"]


@pytest.mark.parametrize("domain", ["infermesh/tes", "infermesh/test2", "", "infermesh/apikey"])
def test_envelope_of_one_domain_holds_in_no_other(domain: str) -> None:
    with pytest.raises(BadSignature):
        open_envelope(domain, seal(DOMAIN, b"alice", ALICE, {"a": 1}), knows_alice)


def test_every_flipped_bit_is_noticed() -> None:
    data = seal(DOMAIN, b"alice", ALICE, {"project": "search", "expires": 1_800_000_000})
    for position in range(len(data) * 8):
        mutated = bytearray(data)
        mutated[position // 8] ^= 1 << position % 8
        with pytest.raises(TrustError):
            open_envelope(DOMAIN, bytes(mutated), knows_alice)


def test_every_truncation_and_every_extension_is_noticed() -> None:
    data = seal(DOMAIN, b"alice", ALICE, {"a": 1})
    for length in range(len(data)):
        with pytest.raises(TrustError):
            open_envelope(DOMAIN, data[:length], knows_alice)
    for extra in (b"\x00", b"\xff" * 64, data):
        with pytest.raises(TrustError):
            open_envelope(DOMAIN, data + extra, knows_alice)


def test_bobs_signature_under_alices_name_is_refused() -> None:
    with pytest.raises(BadSignature):
        open_envelope(DOMAIN, seal(DOMAIN, b"alice", BOB, {"a": 1}), knows_alice)


def test_unknown_signer_is_refused_before_any_cryptography() -> None:
    with pytest.raises(UnknownSigner):
        open_envelope(DOMAIN, seal(DOMAIN, b"mallory", BOB, {"a": 1}), knows_alice)


@pytest.mark.parametrize(
    "body",
    [
        b"\x02\x05alice\x80",  # another version
        b"\x01\x00\x80" + b"x" * 8,  # no signer
        b"\x01\x21" + b"a" * 33 + b"\x80",  # signer too long
        b"\x01\xffalice\x80",  # signer longer than the envelope
        b"\x01\x05alice",  # no payload
        b"\x01\x05alice\xc1",  # not msgpack
        b"\x01\x05alice\x80\x80",  # trailing bytes
        b"\x01\x05alice\x93\x01\x02\x03",  # not a map
        b"\x01\x05alice\x81\x01\x02",  # key is not a string
        b"\x01\x05alice\x81\xa1a\xd4\x01\x00",  # extension type
        b"\x01\x05alice\x81\xa1a\xdf\xff\xff\xff\xff",  # a map of four thousand million
        b"\x01\x05alice\x81\xa1a\xdd\xff\xff\xff\xff",  # an array of as many
        b"\x01\x05alice\x81\xa1a\xdb\xff\xff\xff\xff",  # a string of 4 GiB
        b"\x01\x05alice\x81\xa1a\xa1\xff",  # not UTF-8
        b"\x01\x05alice\x81\xa1a" + b"\x91" * 60_000,  # nested deeper than any stack
    ],
)
def test_well_signed_nonsense_is_one_clear_error(body: bytes) -> None:
    with pytest.raises(MalformedEnvelope):
        open_envelope(DOMAIN, sealed_by(ALICE, body), knows_alice)


def test_size_limit_holds_before_anything_is_parsed() -> None:
    def must_not_be_asked(_signer: bytes) -> bytes:
        raise AssertionError

    with pytest.raises(MalformedEnvelope):
        open_envelope(DOMAIN, b"\x01" * (MAX_ENVELOPE_BYTES + 1), must_not_be_asked)
    small = seal(DOMAIN, b"alice", ALICE, {"a": b"x" * 100})
    with pytest.raises(MalformedEnvelope):
        open_envelope(DOMAIN, small, must_not_be_asked, max_bytes=len(small) - 1)


@given(st.binary(max_size=400))
def test_arbitrary_bytes_raise_nothing_but_a_trust_error(data: bytes) -> None:
    for read in (lambda: open_envelope(DOMAIN, data, knows_alice), lambda: read_unverified(data), lambda: signer_of(data)):
        try:
            read()
        except TrustError:
            continue
        assert read is not None


JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=20) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(max_size=8), JSONISH, max_size=6))
def test_any_payload_of_plain_values_survives(payload: dict[str, Any]) -> None:
    assert open_envelope(DOMAIN, seal(DOMAIN, b"alice", ALICE, payload), knows_alice).payload == payload


def test_duplicate_keys_do_not_split_what_two_readers_see() -> None:
    body = b"\x01\x05alice\x82\xa1a\x01\xa1a\x02"
    assert open_envelope(DOMAIN, sealed_by(ALICE, body), knows_alice).payload == {"a": 2}


def test_unverified_reading_shows_claims_of_a_forgery_but_opening_does_not() -> None:
    forged = seal(DOMAIN, b"alice", BOB, {"a": 1})
    assert read_unverified(forged).payload == {"a": 1}
    with pytest.raises(BadSignature):
        open_envelope(DOMAIN, forged, knows_alice)


@pytest.mark.parametrize("signer", [b"", b"x" * 33])
def test_sealing_with_an_impossible_signer_is_our_own_mistake(signer: bytes) -> None:
    with pytest.raises(ValueError, match="signer"):
        seal(DOMAIN, signer, ALICE, {})


def test_payload_parser_takes_maps_with_string_keys_only() -> None:
    assert parse_payload(msgpack.packb({"a": 1})) == {"a": 1}
    for value in ([1], 1, "a", None, {1: 2}, {b"a": 1}):
        with pytest.raises(MalformedEnvelope):
            parse_payload(msgpack.packb(value))


def test_signature_length_is_ed25519s() -> None:
    assert len(ALICE.sign(b"")) == SIGNATURE_BYTES


@pytest.mark.parametrize("key", [b"\x01" + bytes(31), bytes(32), b"\xff" * 32], ids=["neutral", "small order", "not canonical"])
def test_a_weak_key_signs_nothing(key: bytes) -> None:
    """Under such a key one signature would hold for many messages."""
    body = b"\x01\x05alice" + msgpack.packb({"a": 1})
    for signature in (b"\x01" + bytes(63), bytes(64), key + bytes(32)):
        with pytest.raises(BadSignature):
            open_envelope(DOMAIN, body + signature, lambda _: key)
