"""Who may pass: every kind of bad key, each with its reason, and none of it repeats the key."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from typing import cast

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from mesh.apikey import APIKEY_DOMAIN, PREFIX, ApiKey, KeyRole, encode_base62, mint
from mesh.authority import KEYS_KID, NODES_KID
from mesh.envelope import seal
from mesh.errors import InvalidKey, KeyNotAllowed, RevocationsStale
from mesh.freshness import Freshness
from mesh.invite import Invite, seal_invite
from mesh.revocations import NONE, RevocationList
from mesh.trust import Issuer, Purpose, Role, key_id, parse_keyset, raw_public_key, seal_keyset
from proxy.gate import Gate
from proxy.gate_metrics import GateCollector
from proxy.respond import error_response
from tests.support.authority import make_mesh
from tests.support.clocks import StoppedClock

NOW = 1_800_000_000.0
MESH, OTHER = make_mesh(now=NOW), make_mesh(now=NOW, name="other")
CLAIMS = ApiKey(id=b"12345678", project="search", roles=frozenset({"invoker"}), not_before=NOW, expires=NOW + 3600)
GOOD = mint(CLAIMS, MESH.keys_issuer, KEYS_KID)


def gate(*, now: float = NOW, region: str = "") -> Gate:
    return Gate(MESH.trust(), clock=StoppedClock(now), region=region)


def with_checksum(envelope: bytes) -> str:
    """A key's text around any bytes whatever."""
    text = PREFIX + encode_base62(envelope)
    return text + encode_base62(zlib.crc32(text.encode()).to_bytes(4)).rjust(6, "0")


def refusal(authorization: str | None, at: Gate | None = None) -> InvalidKey:
    with pytest.raises(InvalidKey) as caught:
        (at or gate()).authenticate(authorization)
    return caught.value


def test_good_key_passes_with_its_claims() -> None:
    key = gate().authenticate(f"Bearer {GOOD}")
    assert (key.id, key.project, key.kid) == (CLAIMS.id, "search", KEYS_KID)


@pytest.mark.parametrize("form", ["bearer {}", "BEARER {}", "Bearer  {} ", "Bearer {}\t"])
def test_scheme_is_read_as_http_says(form: str) -> None:
    assert gate().authenticate(form.format(GOOD)).project == "search"


BAD_KEYS: dict[str, tuple[str, str]] = {
    "not a key": ("Bearer hello", "looks like im_"),
    "another provider's key": ("Bearer sk-proj-abcdefghijklmnopqrstuvwxyz0123456789", "looks like im_"),
    "nothing after the scheme": ("Bearer ", "looks like im_"),
    "a typo": (f"Bearer {GOOD[:20]}{'a' if GOOD[20] != 'a' else 'b'}{GOOD[21:]}", "checksum"),
    "cut off": (f"Bearer {GOOD[:-3]}", "checksum"),
    "too long": (f"Bearer {GOOD}{'A' * 5000}", "looks like im_"),
    "two keys": (f"Bearer {GOOD} {GOOD}", "looks like im_"),
    "not ASCII": (f"Bearer {GOOD}ü", "looks like im_"),
    "undecodable bytes": (f"Bearer {GOOD}\udcff", "looks like im_"),
    "another scheme": (f"Basic {GOOD}", "Bearer im_"),
    "no scheme": (GOOD, "Bearer im_"),
    "another mesh": (f"Bearer {mint(CLAIMS, OTHER.keys_issuer, KEYS_KID)}", "signature does not hold"),
    "signed by a stranger": (f"Bearer {mint(CLAIMS, Ed25519PrivateKey.generate(), KEYS_KID)}", "signature does not hold"),
    "an issuer nobody knows": (f"Bearer {mint(CLAIMS, MESH.keys_issuer, 'keys-9')}", "not issued for this mesh"),
    "an issuer of nodes": (f"Bearer {mint(CLAIMS, MESH.admission.key, NODES_KID)}", "not issued for this mesh"),
    "no envelope": (f"Bearer {with_checksum(bytes([1]) * 100)}", "Incorrect API key"),
    "an empty envelope": (f"Bearer {with_checksum(bytes([1]))}", "Incorrect API key"),
    "another domain": (
        f"Bearer {with_checksum(seal('infermesh/other', KEYS_KID.encode(), MESH.keys_issuer, {'id': b'12345678'}))}",
        "signature does not hold",
    ),
    "claims missing": (
        f"Bearer {with_checksum(seal(APIKEY_DOMAIN, KEYS_KID.encode(), MESH.keys_issuer, {'p': 'search'}))}",
        "'r' is missing",
    ),
}


@pytest.mark.parametrize("name", BAD_KEYS)
def test_bad_key_is_refused_with_its_reason_and_never_repeated(name: str) -> None:
    authorization, reason = BAD_KEYS[name]
    error = refusal(authorization)
    assert reason in error.message
    assert GOOD[10:40] not in error.message
    secret = authorization.partition(" ")[2].strip()
    assert len(secret) < 6 or secret not in error.message
    response = error_response(error, request_id="req_1")
    assert response.status == 401
    assert json.loads(cast(bytes, response.body))["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("authorization", [None, "", " "])
def test_no_key_is_told_how_to_send_one(authorization: str | None) -> None:
    assert "Bearer im_" in refusal(authorization).message


def test_join_token_is_no_key() -> None:
    invite = Invite(id=bytes(16), role=Role.WORKER, uses=1, issued=NOW, expires=NOW + 3600)
    token = seal_invite(MESH.keys_issuer, KEYS_KID, invite, mesh_id=MESH.mesh_id, bootstraps=("127.0.0.1:1",))
    assert "looks like im_" in refusal(f"Bearer {token}").message


def test_key_is_refused_before_its_time_and_from_its_last_second() -> None:
    assert "not valid yet" in refusal(f"Bearer {GOOD}", gate(now=NOW - 60)).message
    assert "expired" in refusal(f"Bearer {GOOD}", gate(now=NOW + 3600)).message
    assert gate(now=NOW + 3599).authenticate(f"Bearer {GOOD}")


def test_key_that_was_good_a_moment_ago_expires_out_of_memory() -> None:
    clock = StoppedClock(NOW)
    memory = Gate(MESH.trust(), clock=clock)
    memory.authenticate(f"Bearer {GOOD}")
    clock.now += 3600
    assert "expired" in refusal(f"Bearer {GOOD}", memory).message


def test_key_ends_with_its_issuer() -> None:
    clock, trust = StoppedClock(NOW), MESH.trust()
    memory = Gate(trust, clock=clock)
    memory.authenticate(f"Bearer {GOOD}")
    nodes = Issuer(
        kid=NODES_KID,
        public_key=raw_public_key(MESH.admission.key.public_key()),
        may=frozenset({Purpose.NODE}),
        not_before=NOW,
        expires=NOW + 1e6,
    )
    signed = seal_keyset(MESH.root, name="test", seq=2, issued=NOW, issuers=[nodes])
    trust.update(parse_keyset(signed, mesh_id=key_id(raw_public_key(MESH.root.public_key()))))
    assert "not issued for this mesh" in refusal(f"Bearer {GOOD}", memory).message


def test_key_bound_to_a_region_passes_there_and_nowhere_else() -> None:
    bound = mint(replace(CLAIMS, region="eu-1"), MESH.keys_issuer, KEYS_KID)
    assert gate(region="eu-1").authenticate(f"Bearer {bound}")
    assert "region" in refusal(f"Bearer {bound}", gate(region="us-1")).message
    assert "region" in refusal(f"Bearer {bound}", gate()).message


@given(st.text(max_size=80))
def test_any_header_is_a_key_or_an_invalid_key(text: str) -> None:
    assert refusal(text).message
    assert refusal(f"Bearer {text}").message
    assert refusal(f"Bearer im_{text}").message


def test_scope_is_checked_by_role_and_model() -> None:
    at = gate()
    at.authorize(CLAIMS, "anything")
    at.authorize(replace(CLAIMS, models=frozenset({"a"})), "a")
    with pytest.raises(KeyNotAllowed) as caught:
        at.authorize(replace(CLAIMS, models=frozenset({"a"})), "b")
    assert caught.value.param == "model"
    with pytest.raises(KeyNotAllowed):
        at.authorize(replace(CLAIMS, models=frozenset()), "a")
    for roles in (set(), {"viewer"}, {"admin"}, {"deployer"}):
        with pytest.raises(KeyNotAllowed):
            at.authorize(replace(CLAIMS, roles=frozenset(roles)), "a")


def test_looking_takes_the_role_or_an_admins() -> None:
    at = gate()
    at.require(replace(CLAIMS, roles=frozenset({"viewer"})), KeyRole.VIEWER)
    at.require(replace(CLAIMS, roles=frozenset({"admin"})), KeyRole.VIEWER)
    with pytest.raises(KeyNotAllowed):
        at.require(CLAIMS, KeyRole.VIEWER)


def test_metrics_tell_refusals_and_how_old_the_news_of_revoked_keys_is() -> None:
    clock, revoked = StoppedClock(NOW), RevocationList()
    freshness = Freshness(stale_s=600.0, looked=True, confirmed=NOW - 90, fresh_until=NOW + 510)
    at = Gate(MESH.trust(), clock=clock, region="eu", revoked=revoked, freshness=freshness)

    def shown() -> dict[str, float]:
        samples = [sample for family in GateCollector(at).collect() for sample in family.samples]
        return {sample.name + "".join(f" {value}" for value in sample.labels.values()): sample.value for sample in samples}

    assert shown()["infermesh_revocations_confirmed_seconds"] == 0, "of a mesh that has revoked nothing"
    revoked.newest = replace(NONE, seq=7, keys={CLAIMS.id: NOW + 9000}, projects={"ads": NOW})
    elsewhere = mint(replace(CLAIMS, id=b"abcdefgh", region="us"), MESH.keys_issuer, KEYS_KID)
    expired = mint(replace(CLAIMS, not_before=NOW - 9, expires=NOW - 1), MESH.keys_issuer, KEYS_KID)
    for text in (GOOD, GOOD, expired, elsewhere, "sk-other"):
        refusal(f"Bearer {text}", at)
    clock.now = NOW + 600
    with pytest.raises(RevocationsStale):
        at.authenticate(f"Bearer {mint(replace(CLAIMS, id=b'abcdefgh'), MESH.keys_issuer, KEYS_KID)}")
    told = shown()
    reasons = {name.split()[1]: count for name, count in told.items() if name.startswith("infermesh_keys_refused_total")}
    assert reasons == {"revoked": 2, "expired": 1, "region": 1, "malformed_envelope": 1, "revocations_stale": 1}
    assert (
        told["infermesh_revocations_epoch"],
        told["infermesh_revocations_listed keys"],
        told["infermesh_revocations_listed projects"],
    ) == (7, 1, 1)
    assert (told["infermesh_revocations_confirmed_seconds"], told["infermesh_revocations_stale"]) == (690, 1)
