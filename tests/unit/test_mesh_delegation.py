"""Delegations: whatever the chain, a key can do nothing that something above it cannot."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.apikey import APIKEY_DOMAIN, ApiKey, KeyRole, KeyVerifier, encode_base62, mint_with, parse_key, verify_key
from mesh.apikey import _checksum as checksum
from mesh.authority import KEYS_KID
from mesh.delegation import DELEGATION_DOMAIN, MAX_CHAIN, Delegation, Signer, open_chain, seal_delegation
from mesh.envelope import read_unverified, seal
from mesh.errors import BadSignature, Expired, MalformedEnvelope, NotYetValid, OutOfScope, Revoked, TrustError, UnknownSigner
from mesh.revocations import NONE, RevocationList, Revocations
from mesh.scope import LISTS, NUMBERS, UNBOUNDED, Scope
from mesh.trust import Issuer, Purpose, Trust, parse_keyset, raw_public_key, seal_keyset
from tests.support.authority import make_mesh

NOW = 1_800_000_000.0
DAY_S = 86_400.0
MESH = make_mesh(now=NOW)
ISSUER = Signer(kid=KEYS_KID, key=MESH.keys_issuer, scope=UNBOUNDED, expires=NOW + 365 * DAY_S)
KEYS = [Ed25519PrivateKey.from_private_bytes(random.Random(number).randbytes(32)) for number in range(MAX_CHAIN + 2)]
CLAIMS = ApiKey(
    id=b"12345678", project="search", roles=frozenset({"invoker"}), not_before=NOW, expires=NOW + DAY_S, models=frozenset({"a"}), rps=5.0
)


def below(
    signer: Signer, scope: Scope, number: int, *, expires: float = NOW + 30 * DAY_S, not_before: float = NOW
) -> tuple[Signer, Delegation]:
    """Whoever holds key ``number``, delegated to by ``signer``, honestly or not."""
    draft = Delegation(
        id=number.to_bytes(8), public_key=raw_public_key(KEYS[number].public_key()), scope=scope, not_before=not_before, expires=expires
    )
    payload = {"id": draft.id, "pub": draft.public_key, "nbf": int(not_before), "exp": int(expires)} | scope.payload()
    delegation = replace(draft, signed=seal(DELEGATION_DOMAIN, signer.name, signer.key, payload))
    return Signer(
        kid=f"d{number}", key=KEYS[number], scope=UNBOUNDED, expires=expires, chain=(*signer.chain, delegation.signed)
    ), delegation


def unbounded(signer: Signer) -> Signer:
    """As one who does not keep to what it was given."""
    return replace(signer, scope=UNBOUNDED)


def test_a_key_made_with_a_delegation_holds_and_says_so() -> None:
    signer, delegation = below(ISSUER, Scope(projects=frozenset({"search"}), models=frozenset({"a", "b"}), rps=10.0), 0)
    key = verify_key(mint_with(CLAIMS, signer), MESH.trust(), now=NOW)
    assert replace(key, kid="", delegations=()) == CLAIMS
    assert (key.kid, key.delegations) == (KEYS_KID, (delegation.id,))


def test_a_chain_of_the_greatest_length_holds_and_one_more_does_not() -> None:
    signer = ISSUER
    for number in range(MAX_CHAIN):
        signer, _ = below(signer, UNBOUNDED, number)
    assert len(verify_key(mint_with(CLAIMS, signer), MESH.trust(), now=NOW).delegations) == MAX_CHAIN
    longer, _ = below(signer, UNBOUNDED, MAX_CHAIN)
    with pytest.raises(MalformedEnvelope):
        verify_key(mint_with(CLAIMS, longer), MESH.trust(), now=NOW)
    with pytest.raises(OutOfScope):
        seal_delegation(Delegation(id=bytes(8), public_key=bytes(32), scope=UNBOUNDED, not_before=NOW, expires=NOW + 1), signer)


def test_what_is_sealed_keeps_within_its_signer() -> None:
    bounded = replace(ISSUER, scope=Scope(models=frozenset({"a"})))
    draft = Delegation(id=bytes(8), public_key=bytes(32), scope=Scope(models=frozenset({"a"})), not_before=NOW, expires=NOW + 1)
    assert seal_delegation(draft, bounded).signed
    with pytest.raises(OutOfScope, match="models"):
        seal_delegation(replace(draft, scope=UNBOUNDED), bounded)


@pytest.mark.parametrize(
    ("scope", "claims"),
    [
        (Scope(projects=frozenset({"ads"})), {}),
        (Scope(models=frozenset({"b"})), {}),
        (Scope(models=frozenset({"a"})), {"models": None}),
        (Scope(endpoints=frozenset({"chat"})), {}),
        (Scope(regions=frozenset({"eu"})), {}),
        (Scope(regions=frozenset({"eu"})), {"region": "us"}),
        (Scope(roles=frozenset({"viewer"})), {}),
        (Scope(roles=frozenset({"invoker"})), {"roles": frozenset({"invoker", "admin"})}),
        (Scope(rps=4.0), {}),
        (Scope(tps=1.0), {}),
        (Scope(concurrency=1.0), {"concurrency": 2.0}),
        (Scope(tokens_per_day=1.0), {}),
        (Scope(budget=1.0), {}),
        (Scope(ttl_s=DAY_S - 1), {}),
    ],
    ids=str,
)
def test_each_bound_binds(scope: Scope, claims: dict[str, Any]) -> None:
    signer, _ = below(ISSUER, scope, 0)
    text = mint_with(replace(CLAIMS, **claims), unbounded(signer))
    with pytest.raises(OutOfScope, match="issuer may not sign for its"):
        verify_key(text, MESH.trust(), now=NOW)


def test_a_bounded_issuer_of_the_keyset_binds_its_keys_and_delegations() -> None:
    key = KEYS[0]
    issuer = Issuer(
        kid="search-1",
        public_key=raw_public_key(key.public_key()),
        may=frozenset({Purpose.KEY}),
        not_before=NOW,
        expires=NOW + DAY_S,
        scope=Scope(projects=frozenset({"search"}), rps=5.0),
    )
    keyset = parse_keyset(seal_keyset(MESH.root, name="t", seq=2, issued=NOW, issuers=[issuer]), mesh_id=MESH.mesh_id)
    trust, signer = Trust(keyset), Signer(kid="search-1", key=key, scope=UNBOUNDED, expires=issuer.expires)
    assert keyset.issuers[0].scope == issuer.scope
    verify_key(mint_with(CLAIMS, signer), trust, now=NOW)
    with pytest.raises(OutOfScope):
        verify_key(mint_with(replace(CLAIMS, project="ads"), signer), trust, now=NOW)
    wider, _ = below(signer, Scope(projects=frozenset({"search"})), 1)
    with pytest.raises(OutOfScope):
        verify_key(mint_with(CLAIMS, wider), trust, now=NOW)


def test_a_chain_ends_with_whatever_ends_first() -> None:
    outer, _ = below(ISSUER, UNBOUNDED, 0, expires=NOW + 100)
    inner, _ = below(outer, UNBOUNDED, 1, expires=NOW + 1000)
    verifier, text = KeyVerifier(MESH.trust()), mint_with(CLAIMS, inner)
    verifier.verify(text, now=NOW + 99)
    with pytest.raises(Expired):
        verifier.verify(text, now=NOW + 100)
    later, _ = below(ISSUER, UNBOUNDED, 0, not_before=NOW + 1000)
    with pytest.raises(NotYetValid):
        verify_key(mint_with(CLAIMS, later), MESH.trust(), now=NOW)


def test_only_an_issuer_of_keys_delegates() -> None:
    nodes = Signer(kid="nodes-1", key=MESH.admission.key, scope=UNBOUNDED, expires=NOW + DAY_S)
    with pytest.raises(UnknownSigner):
        verify_key(mint_with(CLAIMS, below(nodes, UNBOUNDED, 0)[0]), MESH.trust(), now=NOW)
    other = make_mesh(now=NOW)
    stranger = replace(ISSUER, key=other.keys_issuer)
    with pytest.raises(BadSignature):
        verify_key(mint_with(CLAIMS, below(stranger, UNBOUNDED, 0)[0]), MESH.trust(), now=NOW)


def test_nobody_puts_himself_into_somebody_elses_chain() -> None:
    honest, delegation = below(ISSUER, UNBOUNDED, 0)
    thief = replace(honest, key=KEYS[1])  # his key, another's delegation
    with pytest.raises(UnknownSigner):
        verify_key(mint_with(CLAIMS, thief), MESH.trust(), now=NOW)
    skipped, _ = below(honest, Scope(models=frozenset({"a"})), 1)
    direct = replace(skipped, chain=skipped.chain[1:])  # without what stands above
    with pytest.raises(TrustError):
        verify_key(mint_with(CLAIMS, direct), MESH.trust(), now=NOW)
    swapped = replace(skipped, chain=skipped.chain[::-1])
    with pytest.raises(TrustError):
        verify_key(mint_with(CLAIMS, swapped), MESH.trust(), now=NOW)
    with pytest.raises(TrustError):
        open_chain((delegation.signed[:-1] + bytes([delegation.signed[-1] ^ 1]),), MESH.trust(), now=NOW)


def test_a_key_of_the_issuer_itself_gains_nothing_by_carrying_a_chain() -> None:
    """What a chain allows counts only for the one it names."""
    _, delegation = below(ISSUER, UNBOUNDED, 0)
    payload = dict(read_unverified(parse_key(mint_with(CLAIMS, ISSUER))).payload) | {"d": [delegation.signed], "p": "ads"}
    bounded = parse_keyset(
        seal_keyset(
            MESH.root,
            name="t",
            seq=2,
            issued=NOW,
            issuers=[
                replace(issuer, scope=Scope(projects=frozenset({"search"}))) if issuer.kid == KEYS_KID else issuer
                for issuer in MESH.keyset.issuers
            ],
        ),
        mesh_id=MESH.mesh_id,
    )
    text = "im_" + encode_base62(seal(APIKEY_DOMAIN, KEYS_KID.encode(), MESH.keys_issuer, payload))
    with pytest.raises(OutOfScope):
        verify_key(text + checksum(text), Trust(bounded), now=NOW)


def test_revoking_a_delegation_revokes_what_was_made_with_it_and_below() -> None:
    outer, first = below(ISSUER, UNBOUNDED, 0)
    inner, second = below(outer, UNBOUNDED, 1)
    text, sibling = mint_with(CLAIMS, inner), mint_with(CLAIMS, outer)
    for revoked_id, refused in ((first.id, (text, sibling)), (second.id, (text,))):
        revoked = RevocationList()
        verifier = KeyVerifier(MESH.trust(), revoked=revoked)
        for each in (text, sibling):
            verifier.verify(each, now=NOW)
        take(revoked, NONE.with_key(revoked_id, end=NOW + 30 * DAY_S))
        for each in (text, sibling):
            if each in refused:
                with pytest.raises(Revoked):
                    verifier.verify(each, now=NOW)
            else:
                verifier.verify(each, now=NOW)


def take(revoked: RevocationList, newest: Revocations) -> None:
    revoked.newest = newest
    for callback in revoked._on_change:
        callback()


# -- random chains

NAMES = st.frozensets(st.sampled_from(["a", "b", "c"]), min_size=1)
MAYBE = st.one_of(st.none(), NAMES)
NUMBER = st.one_of(st.none(), st.sampled_from([1.0, 2.0, 5.0]))
SCOPES = st.builds(
    Scope,
    projects=MAYBE,
    models=MAYBE,
    endpoints=MAYBE,
    regions=MAYBE,
    roles=st.one_of(st.none(), st.frozensets(st.sampled_from([str(role) for role in KeyRole]), min_size=1)),
    rps=NUMBER,
    tps=NUMBER,
    concurrency=NUMBER,
    tokens_per_day=NUMBER,
    budget=NUMBER,
    ttl_s=st.one_of(st.none(), st.sampled_from([600.0, 3600.0, DAY_S])),
)


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[Scope], ApiKey, list[float]]:
    """Bounds from the top down, each drawn at random and often narrowed to what stands above; then a key, often within the last of them."""
    scopes: list[Scope] = []
    for _ in range(draw(st.integers(1, MAX_CHAIN))):
        scope = draw(SCOPES)
        if scopes and draw(st.integers(0, 9)):
            scope = within(scope, scopes[-1])
        scopes.append(scope)
    last = scopes[-1] if draw(st.integers(0, 9)) else UNBOUNDED
    asked = within(draw(SCOPES), last)
    claims = ApiKey(
        id=os.urandom(8),
        project=min(asked.projects or {"a"}),
        roles=asked.roles or frozenset({"invoker"}),
        not_before=NOW,
        expires=NOW + (asked.ttl_s or DAY_S),
        models=asked.models,
        endpoints=asked.endpoints,
        region=min(asked.regions) if asked.regions else None,
        rps=asked.rps,
        tps=asked.tps,
        concurrency=asked.concurrency,
        tokens_per_day=asked.tokens_per_day,
        budget=asked.budget,
    )
    return scopes, claims, [draw(st.sampled_from([600.0, DAY_S, 30 * DAY_S])) for _ in scopes]


def within(inner: Scope, outer: Scope) -> Scope:
    """The narrower of both."""
    bounds: dict[str, Any] = {}
    for _, name in LISTS:
        mine, theirs = getattr(inner, name), getattr(outer, name)
        bounds[name] = mine if theirs is None else (mine & theirs or theirs) if mine is not None else theirs
    for _, name in NUMBERS:
        amounts = [value for value in (getattr(inner, name), getattr(outer, name)) if value is not None]
        bounds[name] = min(amounts, default=None)
    return Scope(**bounds)


def allows(bound: frozenset[str] | None, value: str) -> bool:
    return bound is None or value in bound


def can(scope: Scope, act: dict[str, Any]) -> bool:
    """Whether somebody with these bounds could do this one thing: written apart from the code under test, act by act."""
    return (
        allows(scope.projects, act["project"])
        and allows(scope.models, act["model"])
        and allows(scope.endpoints, act["endpoint"])
        and allows(scope.regions, act["region"])
        and allows(scope.roles, act["role"])
        and all(
            most is None or act["amount"] <= most for most in (scope.rps, scope.tps, scope.concurrency, scope.tokens_per_day, scope.budget)
        )
    )


def acts(rng: random.Random, count: int) -> Sequence[dict[str, Any]]:
    return [
        {
            **{name: rng.choice("abcd") for name in ("project", "model", "endpoint", "region")},
            "role": rng.choice([str(role) for role in KeyRole]),
            "amount": rng.choice([1.0, 2.0, 3.0, 6.0]),
        }
        for _ in range(count)
    ]


@given(chains(), st.integers(0, 2**32))
@settings(deadline=None, max_examples=120)
def test_a_narrowed_key_can_never_do_what_its_parent_cannot(chain: tuple[list[Scope], ApiKey, list[float]], seed: int) -> None:
    scopes, claims, lives = chain
    signer = ISSUER
    for number, (scope, life_s) in enumerate(zip(scopes, lives, strict=True)):
        signer, _ = below(signer, scope, number, expires=NOW + life_s)
    now = NOW + 300.0
    text, trust = mint_with(claims, signer), MESH.trust()
    try:
        key = verify_key(text, trust, now=now)
    except OutOfScope:
        levels = [*scopes, claims.scope]
        wider = [inner.beyond(outer) for outer, inner in itertools.pairwise(levels)]
        assert any(wider), "refused although every link keeps within the one above"
        return
    for outer in scopes:
        assert outer.ttl_s is None or key.expires - key.not_before <= outer.ttl_s
    for act in acts(random.Random(seed), 200):
        if can(key.scope, act):
            assert all(can(outer, act) for outer in scopes), (act, scopes)
    for moment in (NOW + 599, NOW + 601, NOW + DAY_S + 1):
        if moment >= min(key.expires, *(NOW + life_s for life_s in lives)):
            with pytest.raises(Expired):
                verify_key(text, trust, now=moment)


@given(st.lists(st.binary(max_size=300), max_size=6), st.binary(max_size=64))
@settings(deadline=None, max_examples=100)
def test_no_chain_of_any_bytes_raises_anything_but_a_trust_error(chain: list[bytes], data: bytes) -> None:
    with pytest.raises(TrustError):
        open_chain(chain, MESH.trust(), now=NOW)
    signer = replace(ISSUER, chain=tuple(chain) or (data,))
    try:
        text = mint_with(CLAIMS, signer)
    except Exception:  # too long to be a key
        return
    with pytest.raises(TrustError):
        verify_key(text, MESH.trust(), now=NOW)
