"""Memberships: an issuer's word that a key belongs to the mesh in a role."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mesh.envelope import seal
from mesh.errors import BadSignature, Expired, MalformedEnvelope, TrustError, UnknownSigner
from mesh.membership import MAX_MEMBERSHIP_BYTES, MEMBERSHIP_DOMAIN, MembershipCache, parse_membership, seal_membership
from mesh.trust import Issuer, Purpose, Role, Trust, key_id, parse_keyset, raw_public_key, seal_keyset
from tests.support.authority import make_mesh
from tests.support.vectors import fixed_key

NOW = 1_800_000_000.0
MESH = make_mesh(now=NOW)
ALICE = raw_public_key(fixed_key("alice").public_key())


def membership(
    *,
    issuer: Ed25519PrivateKey = MESH.admission.key,
    kid: str = MESH.admission.kid,
    role: Role = Role.WORKER,
    expires: float = NOW + 3600.0,
) -> bytes:
    return seal_membership(issuer, kid, public_key=ALICE, role=role, issued=NOW, expires=expires)


def test_membership_names_node_role_and_time() -> None:
    member = parse_membership(membership(), MESH.trust(), now=NOW)
    assert (member.node_id, member.public_key, member.role) == (key_id(ALICE), ALICE, Role.WORKER)
    assert (member.issued, member.expires) == (NOW, NOW + 3600.0)


def test_membership_fits_its_limit() -> None:
    assert len(membership(role=Role.BOOTSTRAP)) < MAX_MEMBERSHIP_BYTES


def test_issuer_of_keys_cannot_admit_nodes() -> None:
    with pytest.raises(UnknownSigner):
        parse_membership(membership(issuer=MESH.keys_issuer, kid="keys-1"), MESH.trust(), now=NOW)


def test_another_mesh_cannot_admit_nodes() -> None:
    other = make_mesh(now=NOW)
    with pytest.raises(BadSignature):
        parse_membership(membership(issuer=other.admission.key), MESH.trust(), now=NOW)


def test_expired_membership_is_refused() -> None:
    with pytest.raises(Expired):
        parse_membership(membership(expires=NOW + 10.0), MESH.trust(), now=NOW + 10.0)


def test_issuer_restricted_to_workers_cannot_admit_a_proxy() -> None:
    root, nodes = fixed_key("root"), fixed_key("nodes")
    issuer = Issuer(
        kid="n",
        public_key=raw_public_key(nodes.public_key()),
        may=frozenset({Purpose.NODE}),
        not_before=NOW,
        expires=NOW + 1e6,
        node_roles=frozenset({Role.WORKER}),
    )
    signed = seal_keyset(root, name="t", seq=1, issued=NOW, issuers=[issuer])
    trust = Trust(parse_keyset(signed, mesh_id=key_id(raw_public_key(root.public_key()))))
    parse_membership(membership(issuer=nodes, kid="n"), trust, now=NOW)
    with pytest.raises(UnknownSigner):
        parse_membership(membership(issuer=nodes, kid="n", role=Role.PROXY), trust, now=NOW)


@pytest.mark.parametrize("change", [{"role": "king"}, {"role": 1}, {"pub": b"short"}, {"pub": "text"}, {"exp": "never"}, {"iat": None}])
def test_nonsense_signed_by_the_issuer_is_malformed(change: dict[str, object]) -> None:
    payload = {"pub": ALICE, "role": "worker", "iat": int(NOW), "exp": int(NOW) + 60} | change
    data = seal(MEMBERSHIP_DOMAIN, MESH.admission.kid.encode(), MESH.admission.key, payload)
    with pytest.raises(MalformedEnvelope):
        parse_membership(data, MESH.trust(), now=NOW)


def test_truncated_membership_is_refused_at_every_length() -> None:
    data, trust = membership(), MESH.trust()
    for length in range(len(data)):
        with pytest.raises(TrustError):
            parse_membership(data[:length], trust, now=NOW)


def test_cache_remembers_a_good_verdict_until_it_expires() -> None:
    cache = MembershipCache(MESH.trust())
    data = membership(expires=NOW + 10.0)
    assert cache.parse(data, now=NOW) is cache.parse(data, now=NOW + 9.0)
    with pytest.raises(Expired):
        cache.parse(data, now=NOW + 10.0)


def test_cache_forgets_when_the_issuer_leaves_the_keyset() -> None:
    trust = MESH.trust()
    cache = MembershipCache(trust)
    cache.parse(membership(), now=NOW)
    emptied = seal_keyset(MESH.root, name="test", seq=2, issued=NOW, issuers=[])
    trust.update(parse_keyset(emptied, mesh_id=MESH.mesh_id))
    with pytest.raises(UnknownSigner):
        cache.parse(membership(), now=NOW)


def test_cache_is_bounded() -> None:
    cache = MembershipCache(MESH.trust(), size=2)
    for n in range(5):
        cache.parse(membership(expires=NOW + 100.0 + n), now=NOW)
    assert len(cache._known) == 2
