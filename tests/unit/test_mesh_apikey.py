"""API keys: what they claim, and every way in which one can be wrong."""

from __future__ import annotations

import random
import re
import string
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.apikey import (
    APIKEY_DOMAIN,
    MAX_LIFETIME_S,
    PREFIX,
    ApiKey,
    KeyRole,
    KeyVerifier,
    decode_base62,
    encode_base62,
    mint,
    parse_key,
    read_key,
    verify_key,
)
from mesh.apikey import _checksum as checksum
from mesh.envelope import seal
from mesh.errors import BadSignature, Expired, MalformedEnvelope, NotYetValid, TrustError, UnknownSigner, UsageError
from mesh.scope import Scope
from mesh.trust import Issuer, Purpose, Trust, key_id, parse_keyset, raw_public_key, seal_keyset
from tests.support import vectors
from tests.support.authority import make_mesh
from tests.support.vectors import fixed_key

NOW = 1_800_000_000.0
MESH = make_mesh(now=NOW)
CLAIMS = ApiKey(
    id=b"12345678",
    project="search",
    roles=frozenset({KeyRole.INVOKER}),
    not_before=NOW,
    expires=NOW + 3600.0,
    kid="keys-1",
)


def minted(**changes: Any) -> str:
    return mint(replace(CLAIMS, **changes), MESH.keys_issuer, "keys-1")


def signed(**changes: Any) -> str:
    """A key whose payload is not what our own code would write, but properly signed and summed."""
    payload = {"id": b"12345678", "p": "search", "r": ["invoker"], "nbf": int(NOW), "exp": int(NOW) + 60}
    merged = {name: value for name, value in (payload | changes).items() if value is not ...}
    text = PREFIX + encode_base62(seal(APIKEY_DOMAIN, b"keys-1", MESH.keys_issuer, merged))
    return text + checksum(text)


def test_key_reads_back_as_it_was_minted() -> None:
    claims = replace(
        CLAIMS,
        models=frozenset({"a", "b"}),
        endpoints=frozenset({"e"}),
        region="eu",
        rps=1.5,
        tps=2.0,
        concurrency=3.0,
        tokens_per_day=5e6,
        budget=4.0,
    )
    assert verify_key(mint(claims, MESH.keys_issuer, "keys-1"), MESH.trust(), now=NOW) == claims


def test_committed_vector_is_what_is_made_today_and_holds() -> None:
    vector = vectors.read("apikey.json")
    assert vectors.build()["apikey.json"] == vector
    trust = Trust(parse_keyset(bytes.fromhex(vector["keyset"]), mesh_id=bytes.fromhex(vector["mesh_id"])))
    assert verify_key(vector["key"], trust, now=vector["now"]).describe() == vector["claims"]


def test_key_looks_the_way_secret_scanners_expect() -> None:
    assert re.fullmatch(r"im_[0-9A-Za-z]{150,400}", minted())


def test_empty_model_list_is_a_restriction_to_none() -> None:
    claims = verify_key(minted(models=frozenset()), MESH.trust(), now=NOW)
    assert claims.models == frozenset()
    assert not claims.may_use("a")
    assert CLAIMS.may_use("a")


def test_typo_fails_on_the_checksum() -> None:
    text = minted()
    for position in range(len(PREFIX), len(text)):
        wrong = "a" if text[position] != "a" else "b"
        with pytest.raises(MalformedEnvelope):
            parse_key(text[:position] + wrong + text[position + 1 :])


def test_forger_who_recomputes_the_checksum_fails_on_the_signature() -> None:
    body = minted()[:-6]
    rng = random.Random(7)
    trust = MESH.trust()
    for _ in range(300):
        position = rng.randrange(len(PREFIX), len(body))
        text = body[:position] + rng.choice(string.ascii_letters) + body[position + 1 :]
        if text == body:
            continue
        with pytest.raises(TrustError):
            verify_key(text + checksum(text), trust, now=NOW)


def test_every_flipped_bit_of_the_envelope_is_refused() -> None:
    data, trust = parse_key(minted()), MESH.trust()
    for position in range(len(data) * 8):
        mutated = bytearray(data)
        mutated[position // 8] ^= 1 << position % 8
        text = PREFIX + encode_base62(bytes(mutated))
        with pytest.raises(TrustError):
            verify_key(text + checksum(text), trust, now=NOW)


def test_every_truncation_is_refused() -> None:
    text, trust = minted(), MESH.trust()
    for length in range(len(text)):
        with pytest.raises(TrustError):
            verify_key(text[:length], trust, now=NOW)


@pytest.mark.parametrize(
    "text",
    ["", "im_", "im_a", "sk-abc", "im_" + "a" * 5000, "IM_" + "a" * 100, "im_" + "ä" * 100, "im_\ud800", "im_ a b", "im_0" + "a" * 90],
)
def test_text_that_is_no_key_is_malformed(text: str) -> None:
    with pytest.raises(MalformedEnvelope):
        parse_key(text)


@given(st.text(max_size=200) | st.from_regex(r"\Aim_[0-9A-Za-z]{1,200}\Z"))
def test_arbitrary_text_raises_nothing_but_a_trust_error(text: str) -> None:
    with pytest.raises(TrustError):
        KeyVerifier(MESH.trust()).verify(text, now=NOW)


def test_key_outside_its_time_is_refused() -> None:
    with pytest.raises(Expired):
        verify_key(minted(), MESH.trust(), now=NOW + 3600.0)
    with pytest.raises(NotYetValid):
        verify_key(minted(not_before=NOW + 60.0), MESH.trust(), now=NOW)


def test_key_of_another_mesh_is_refused() -> None:
    other = make_mesh(now=NOW)
    with pytest.raises(BadSignature):
        verify_key(mint(CLAIMS, other.keys_issuer, "keys-1"), MESH.trust(), now=NOW)


@pytest.mark.parametrize("kid", ["keys-2", "root", "\x00"])
def test_key_of_an_unknown_issuer_is_refused(kid: str) -> None:
    with pytest.raises(UnknownSigner):
        verify_key(mint(CLAIMS, MESH.keys_issuer, kid), MESH.trust(), now=NOW)


def test_issuer_of_nodes_cannot_sign_keys() -> None:
    with pytest.raises(UnknownSigner):
        verify_key(mint(CLAIMS, MESH.admission.key, "nodes-1"), MESH.trust(), now=NOW)


@pytest.mark.parametrize("domain", ["infermesh/invite", "infermesh/membership", "infermesh/record"])
def test_envelope_of_another_domain_is_no_key(domain: str) -> None:
    text = PREFIX + encode_base62(seal(domain, b"keys-1", MESH.keys_issuer, {"id": b"12345678"}))
    with pytest.raises(BadSignature):
        verify_key(text + checksum(text), MESH.trust(), now=NOW)


@pytest.mark.parametrize(
    "changes",
    [
        {"id": b"short"},
        {"id": ...},
        {"p": 1},
        {"p": "x" * 65},
        {"p": "a\nb"},
        {"r": ["king"]},
        {"r": "invoker"},
        {"exp": ...},
        {"exp": "never"},
        {"exp": int(NOW) + int(MAX_LIFETIME_S) + 10},
        {"m": "all"},
        {"m": [1]},
        {"rps": -1},
        {"rps": "many"},
        {"tps": float("nan")},
        {"con": True},
        {"reg": 1},
    ],
)
def test_nonsense_signed_by_the_issuer_is_malformed(changes: dict[str, Any]) -> None:
    with pytest.raises(MalformedEnvelope):
        verify_key(signed(**changes), MESH.trust(), now=NOW)


@pytest.mark.parametrize(
    "changes",
    [
        {"expires": NOW + MAX_LIFETIME_S + 1},
        {"expires": NOW},
        {"expires": NOW - 1},
        {"roles": frozenset()},
        {"roles": frozenset({"king"})},
        {"models": frozenset(f"model-{n:050d}" for n in range(100))},
    ],
)
def test_minting_what_cannot_be_is_a_usage_error(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        minted(**changes)


def delegated(**scope: Any) -> Trust:
    root, issuer = fixed_key("root"), MESH.keys_issuer
    entry = Issuer(
        kid="keys-1",
        public_key=raw_public_key(issuer.public_key()),
        may=frozenset({Purpose.KEY}),
        not_before=NOW,
        expires=NOW + 1e7,
        scope=Scope(**scope),
    )
    signed_keyset = seal_keyset(root, name="t", seq=1, issued=NOW, issuers=[entry])
    return Trust(parse_keyset(signed_keyset, mesh_id=key_id(raw_public_key(root.public_key()))))


def test_issuer_of_one_project_signs_for_no_other() -> None:
    trust = delegated(projects=frozenset({"search"}))
    verify_key(minted(), trust, now=NOW)
    with pytest.raises(UnknownSigner):
        verify_key(minted(project="ads"), trust, now=NOW)


def test_issuer_of_some_models_signs_for_no_more() -> None:
    trust = delegated(models=frozenset({"a", "b"}))
    verify_key(minted(models=frozenset({"a"})), trust, now=NOW)
    for models in (frozenset({"a", "c"}), None):
        with pytest.raises(UnknownSigner):
            verify_key(minted(models=models), trust, now=NOW)


def test_verifier_remembers_a_key_and_lets_it_expire() -> None:
    verifier, text = KeyVerifier(MESH.trust()), minted()
    assert verifier.verify(text, now=NOW) is verifier.verify(text, now=NOW + 3599.0)
    with pytest.raises(Expired):
        verifier.verify(text, now=NOW + 3600.0)


def test_verifier_forgets_when_the_keyset_changes() -> None:
    trust = MESH.trust()
    verifier, text = KeyVerifier(trust), minted()
    verifier.verify(text, now=NOW)
    trust.update(parse_keyset(seal_keyset(MESH.root, name="t", seq=2, issued=NOW, issuers=[]), mesh_id=MESH.mesh_id))
    with pytest.raises(UnknownSigner):
        verifier.verify(text, now=NOW)


def test_verifier_lets_a_key_end_with_its_issuer() -> None:
    root = fixed_key("root")
    entry = Issuer(
        kid="keys-1",
        public_key=raw_public_key(MESH.keys_issuer.public_key()),
        may=frozenset({Purpose.KEY}),
        not_before=NOW,
        expires=NOW + 60.0,
    )
    signed_keyset = seal_keyset(root, name="t", seq=1, issued=NOW, issuers=[entry])
    verifier = KeyVerifier(Trust(parse_keyset(signed_keyset, mesh_id=key_id(raw_public_key(root.public_key())))))
    text = minted()
    verifier.verify(text, now=NOW)
    with pytest.raises(Expired):
        verifier.verify(text, now=NOW + 60.0)


def test_verifier_is_bounded() -> None:
    verifier = KeyVerifier(MESH.trust(), size=3)
    for n in range(6):
        verifier.verify(minted(id=bytes([n] * 8)), now=NOW)
    assert len(verifier._known) == 3


def test_reading_without_verifying_shows_the_claims_of_a_foreign_key() -> None:
    text = mint(CLAIMS, make_mesh(now=NOW).keys_issuer, "keys-9")
    assert read_key(text) == replace(CLAIMS, kid="keys-9")


@given(st.binary(min_size=1, max_size=200).filter(lambda data: data[0] != 0))
def test_base62_reads_back(data: bytes) -> None:
    assert decode_base62(encode_base62(data)) == data


def test_description_holds_no_key() -> None:
    text = minted()
    assert text[10:40] not in str(verify_key(text, MESH.trust(), now=NOW).describe())
