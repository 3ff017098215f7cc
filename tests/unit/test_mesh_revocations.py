"""The revocation list: what it refuses, how it is written, what it forgets."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.apikey import ApiKey, KeyVerifier, mint
from mesh.authority import KEYS_KID
from mesh.bulletin import LINK_BYTES
from mesh.documents import Document, next_version, seal_document
from mesh.errors import MalformedEnvelope, Revoked, TrustError, UsageError
from mesh.revocations import KIND, NAME, NONE, RevocationList, Revocations, encode_revocations, parse_revocations
from mesh.scope import MAX_LIFETIME_S
from tests.support.authority import make_mesh

NOW = 1_800_000_000.0
MESH = make_mesh(now=NOW - 3600)
KEY = ApiKey(
    id=b"12345678",
    project="search",
    roles=frozenset({"invoker"}),
    not_before=NOW - 60,
    expires=NOW + 3600,
    kid=KEYS_KID,
    delegations=(b"dddddddd",),
)


def document(revoked: Revocations, *, seq: int = 1) -> Document:
    version = next_version(None, kind=KIND, name=NAME, body=encode_revocations(revoked), now=NOW)
    return seal_document(replace(version, seq=seq, previous=b"" if seq == 1 else bytes(32)), MESH.keys_issuer, KEYS_KID)


@pytest.mark.parametrize(
    ("revoked", "reason"),
    [
        (NONE, None),
        (NONE.with_key(b"12345678", end=NOW + 1), "it has been revoked"),
        (NONE.with_key(b"dddddddd", end=NOW + 1), "what it was made with has been revoked"),
        (NONE.with_key(b"87654321", end=NOW + 1), None),
        (NONE.with_project("search", before=NOW), "all keys of its time have been revoked"),
        (NONE.with_project("search", before=NOW - 60), None),
        (NONE.with_project("ads", before=NOW), None),
        (NONE.with_issuer(KEYS_KID, before=NOW), "all keys of its time have been revoked"),
        (NONE.with_issuer("keys-2", before=NOW), None),
        (NONE.with_all(before=NOW), "all keys of its time have been revoked"),
        (NONE.with_all(before=NOW - 60), None),
        (NONE.with_key(b"12345678", end=NOW + 99, begin=NOW), "it has been revoked"),
        (NONE.with_key(b"12345678", end=NOW + 99, begin=NOW + 1), None),
        (NONE.with_key(b"dddddddd", end=NOW + 99, begin=NOW + 1), None),
    ],
)
def test_what_is_refused_and_why(revoked: Revocations, reason: str | None) -> None:
    assert revoked.refuses(KEY, now=NOW) == reason
    assert parse_revocations(document(revoked)).refuses(KEY, now=NOW) == reason, "also once it has been written and read"


def test_what_is_revoked_stays_so_whatever_is_asked_later() -> None:
    at_once = NONE.with_key(KEY.id, end=NOW + 9)
    assert at_once.with_key(KEY.id, end=NOW + 9, begin=NOW + 5).refuses(KEY, now=NOW)
    later = NONE.with_key(KEY.id, end=NOW + 9, begin=NOW + 5)
    assert later.with_key(KEY.id, end=NOW + 9, begin=NOW + 8).later[KEY.id] == NOW + 5
    assert later.with_key(KEY.id, end=NOW + 9).refuses(KEY, now=NOW)
    assert NONE.with_project("search", before=NOW).with_project("search", before=NOW - 99).projects["search"] == NOW


IDS = st.binary(min_size=8, max_size=8)
TIMES = st.integers(1, 2**31).map(float)
LISTS = st.builds(
    Revocations,
    keys=st.dictionaries(IDS, TIMES, max_size=5),
    invites=st.dictionaries(IDS, TIMES, max_size=5),
    projects=st.dictionaries(st.sampled_from(["search", "ads"]), TIMES),
    issuers=st.dictionaries(st.sampled_from([KEYS_KID, "keys-2"]), TIMES),
    before=st.integers(0, 2**31).map(float),
)


@given(LISTS, LISTS)
@settings(deadline=None)
def test_a_union_refuses_what_either_does_and_comes_back_as_written(one: Revocations, other: Revocations) -> None:
    joined = one.union(other)
    for key_id in (*one.keys, *other.keys, KEY.id):
        key = replace(KEY, id=key_id)
        assert (joined.refuses(key, now=NOW) is None) == (one.refuses(key, now=NOW) is None and other.refuses(key, now=NOW) is None)
    assert replace(parse_revocations(document(joined)), seq=0, issued=0.0) == joined


def test_the_list_forgets_what_cannot_live_any_more() -> None:
    full = NONE.with_key(b"a" * 8, end=NOW).with_key(b"b" * 8, end=NOW + 9, begin=NOW - 1).with_key(b"c" * 8, end=NOW + 9, begin=NOW + 1)
    full = full.with_invite(b"i" * 16, end=NOW).with_invite(b"j" * 16, end=NOW + 1)
    full = (
        full.with_project("old", before=NOW - MAX_LIFETIME_S)
        .with_project("new", before=NOW)
        .with_issuer("old", before=1.0)
        .with_all(before=1.0)
    )
    left = full.pruned(NOW)
    assert left.keys == {b"b" * 8: NOW + 9, b"c" * 8: NOW + 9}
    assert left.later == {b"c" * 8: NOW + 1}
    assert left.invites == {b"j" * 8: NOW + 1}
    assert (left.projects, left.issuers, left.before) == ({"new": NOW}, {}, 0.0)
    assert left.refuses_invite(b"j" * 16)
    assert not left.refuses_invite(b"i" * 16)


def test_five_thousand_ids_fit_a_frame_and_more_are_refused_with_what_to_do() -> None:
    ids = {os.urandom(8): NOW + 1 for _ in range(5_000)}
    full = NONE.with_project("p" * 64, before=NOW)
    assert len(document(replace(full, keys=ids)).signed) <= LINK_BYTES
    with pytest.raises(UsageError, match="whole project"):
        encode_revocations(replace(full, keys=ids | {os.urandom(8): NOW + 1 for _ in range(1_000)}))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x80",
        encode_revocations(NONE)[:-1],
        encode_revocations(NONE).replace(b"\xa8projects\x80", b"\xa8projects\x01"),
        encode_revocations(NONE).replace(b"\xa4keys\xc4\x00", b"\xa4keys\xc4\x01x"),
    ],
)
def test_a_list_that_makes_no_sense_leaves_the_last_in_force(body: bytes) -> None:
    revoked = RevocationList()
    revoked.take(document(NONE.with_key(KEY.id, end=NOW + 1)))
    with pytest.raises(MalformedEnvelope):
        revoked.take(replace(document(NONE), body=body))
    assert revoked.newest.refuses(KEY, now=NOW)


@given(st.binary(max_size=100))
@settings(deadline=None)
def test_no_body_raises_anything_else(body: bytes) -> None:
    with pytest.raises(TrustError):
        parse_revocations(replace(document(NONE), body=body))


# -- the verifier


def test_a_remembered_key_is_refused_from_the_moment_the_list_comes() -> None:
    revoked = RevocationList()
    verifier = KeyVerifier(MESH.trust(), revoked=revoked)
    mine, others = (mint(replace(KEY, id=key_id), MESH.keys_issuer, KEYS_KID) for key_id in (KEY.id, b"another!"))
    kept = verifier.verify(others, now=NOW)
    verifier.verify(mine, now=NOW)
    revoked.take(document(NONE.with_key(KEY.id, end=NOW + 3600)))
    with pytest.raises(Revoked):
        verifier.verify(mine, now=NOW)
    assert verifier.verify(others, now=NOW) is kept, "nobody else is verified again"


def test_a_remembered_key_is_refused_from_the_moment_it_was_told_for() -> None:
    for known_before in (True, False):
        revoked = RevocationList()
        verifier = KeyVerifier(MESH.trust(), revoked=revoked)
        text = mint(KEY, MESH.keys_issuer, KEYS_KID)
        if known_before:
            verifier.verify(text, now=NOW)
        revoked.take(document(NONE.with_key(KEY.id, end=NOW + 3600, begin=NOW + 60)))
        verifier.verify(text, now=NOW + 59)
        with pytest.raises(Revoked):
            verifier.verify(text, now=NOW + 60)
