"""Join tokens, as the newcomer reads them and as the bootstrap node does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.apikey import decode_base62, encode_base62
from mesh.envelope import seal
from mesh.errors import BadSignature, Expired, MalformedEnvelope, NotYetValid, TrustError, UnknownSigner, UsageError
from mesh.invite import INVITE_DOMAIN, PREFIX, Invite, parse_token, seal_invite, verify_invite
from mesh.trust import Role, Trust, parse_keyset
from tests.support import vectors
from tests.support.authority import make_mesh

NOW = 1_800_000_000.0
MESH, OTHER = make_mesh(now=NOW), make_mesh(now=NOW)
CLAIMS = Invite(id=b"0123456789abcdef", role=Role.WORKER, uses=3, issued=NOW, expires=NOW + 3600.0)
AT = ("mesh.example.org:7600", "192.0.2.1:7600")


def token(**changes: Any) -> str:
    return seal_invite(MESH.keys_issuer, "keys-1", replace(CLAIMS, **changes), mesh_id=MESH.mesh_id, bootstraps=AT)


def payload(**changes: Any) -> bytes:
    fields = {
        "id": CLAIMS.id,
        "mesh": MESH.mesh_id,
        "at": list(AT),
        "role": "worker",
        "uses": 1,
        "iat": int(NOW),
        "exp": int(NOW) + 60,
    }
    merged = {name: value for name, value in (fields | changes).items() if value is not ...}
    return seal(INVITE_DOMAIN, b"keys-1", MESH.keys_issuer, merged)


def test_newcomer_learns_whom_to_trust_and_where_to_go() -> None:
    read = parse_token(f"  {token()}\n")
    assert (read.mesh_id, read.bootstraps, read.role) == (MESH.mesh_id, AT, Role.WORKER)


def test_bootstrap_node_reads_what_was_invited() -> None:
    assert verify_invite(parse_token(token()).signed, MESH.trust(), now=NOW) == CLAIMS


def test_committed_vector_is_what_is_made_today_and_holds() -> None:
    vector = vectors.read("invite.json")
    assert vectors.build()["invite.json"] == vector
    trust = Trust(parse_keyset(bytes.fromhex(vector["keyset"]), mesh_id=bytes.fromhex(vector["mesh_id"])))
    invite = verify_invite(parse_token(vector["token"]).signed, trust, now=vector["now"])
    assert (invite.id.hex(), invite.uses) == (vector["claims"]["id"], vector["claims"]["uses"])


def test_token_must_name_a_bootstrap_node() -> None:
    with pytest.raises(UsageError, match="--bootstrap"):
        seal_invite(MESH.keys_issuer, "keys-1", CLAIMS, mesh_id=MESH.mesh_id, bootstraps=())


def test_typo_is_noticed_by_the_newcomer() -> None:
    text = token()
    for position in range(len(text)):
        wrong = "x" if text[position] != "x" else "y"
        with pytest.raises(MalformedEnvelope):
            parse_token(text[:position] + wrong + text[position + 1 :])


@given(st.text(max_size=100) | st.from_regex(r"\Aimjoin_[0-9A-Za-z]{0,200}\Z") | st.just(PREFIX + "a" * 5000))
def test_arbitrary_text_is_malformed(text: str) -> None:
    with pytest.raises(MalformedEnvelope):
        parse_token(text)


def test_every_flipped_bit_is_refused_at_the_bootstrap_node() -> None:
    data, trust = parse_token(token()).signed, MESH.trust()
    for position in range(len(data) * 8):
        mutated = bytearray(data)
        mutated[position // 8] ^= 1 << position % 8
        with pytest.raises(TrustError):
            verify_invite(bytes(mutated), trust, now=NOW)


def test_truncated_token_is_refused() -> None:
    data, trust = parse_token(token()).signed, MESH.trust()
    for length in range(len(data)):
        with pytest.raises(TrustError):
            verify_invite(data[:length], trust, now=NOW)


def test_token_outside_its_time_is_refused() -> None:
    with pytest.raises(Expired, match="join token"):
        verify_invite(parse_token(token()).signed, MESH.trust(), now=NOW + 3600.0)
    with pytest.raises(NotYetValid):
        verify_invite(parse_token(token(issued=NOW + 100.0)).signed, MESH.trust(), now=NOW)


def test_token_of_another_mesh_is_refused() -> None:
    foreign = seal_invite(OTHER.keys_issuer, "keys-1", CLAIMS, mesh_id=OTHER.mesh_id, bootstraps=AT)
    with pytest.raises(BadSignature):
        verify_invite(parse_token(foreign).signed, MESH.trust(), now=NOW)


def test_token_that_names_another_mesh_is_refused_though_well_signed() -> None:
    with pytest.raises(TrustError, match="another mesh"):
        verify_invite(payload(mesh=OTHER.mesh_id), MESH.trust(), now=NOW)


def test_issuer_of_nodes_cannot_invite() -> None:
    forged = seal_invite(MESH.admission.key, "nodes-1", CLAIMS, mesh_id=MESH.mesh_id, bootstraps=AT)
    with pytest.raises(UnknownSigner):
        verify_invite(parse_token(forged).signed, MESH.trust(), now=NOW)


def test_api_key_is_no_invitation() -> None:
    data = seal("infermesh/apikey", b"keys-1", MESH.keys_issuer, {"id": CLAIMS.id})
    with pytest.raises(BadSignature):
        verify_invite(data, MESH.trust(), now=NOW)


@pytest.mark.parametrize(
    "changes",
    [{"role": "king"}, {"role": ...}, {"uses": 0}, {"uses": 10**6}, {"uses": True}, {"id": b"short"}, {"exp": ...}, {"mesh": b"x"}],
)
def test_nonsense_signed_by_the_issuer_is_malformed(changes: dict[str, Any]) -> None:
    with pytest.raises(MalformedEnvelope):
        verify_invite(payload(**changes), MESH.trust(), now=NOW)


@pytest.mark.parametrize("changes", [{"at": []}, {"at": "host:1"}, {"at": ["a\n"]}, {"mesh": b"x"}, {"role": "king"}])
def test_newcomer_refuses_a_token_it_could_not_use(changes: dict[str, Any]) -> None:
    import zlib

    data = payload(**changes)
    with pytest.raises(MalformedEnvelope):
        parse_token(PREFIX + encode_base62(data + zlib.crc32(data).to_bytes(4)))


def test_token_decodes_to_its_envelope_and_checksum() -> None:
    assert decode_base62(token()[len(PREFIX) :])[:-4] == parse_token(token()).signed
