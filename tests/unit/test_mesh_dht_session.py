"""Introductions, pair keys and cookies."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mesh.dht.address import Address
from mesh.dht.introduction import MAX_INTRODUCTION_BYTES, parse_introduction, seal_introduction
from mesh.dht.session import Cookies, Session, Sessions, mac, mac_holds
from mesh.errors import BadSignature, Expired, MalformedEnvelope, TrustError, UnknownSigner
from mesh.identity import CERTIFICATE_LIFETIME_S, Identity
from mesh.membership import MembershipCache
from mesh.trust import Role
from tests.support.records import NOW, Scribe

HERE, THERE = Address("198.51.100.1", 7400), Address("198.51.100.2", 7400)


@pytest.fixture
def scribe() -> Scribe:
    return Scribe()


def sessions(scribe: Scribe, node: Identity, *, boot: int = 1, size: int = 16, serve: bool = True) -> Sessions:
    return Sessions(node, scribe.verifier(), boot=boot, serve=serve, size=size)


def admit(own: Sessions, other: Sessions, *, at: float = 0.0) -> Session:
    return own.admit(other.introduction, other.sid, now=NOW, at=at)


def test_two_that_are_introduced_share_a_key_nobody_else_has(scribe: Scribe) -> None:
    alice, bob, carol = (sessions(scribe, scribe.node()) for _ in range(3))
    assert admit(alice, bob).key == admit(bob, alice).key
    assert admit(carol, bob).key != admit(alice, bob).key


def test_an_introduction_says_who_and_whether_it_serves(scribe: Scribe) -> None:
    alice, node = sessions(scribe, scribe.node()), scribe.node(Role.PROXY)
    session = admit(alice, sessions(scribe, node, serve=False))
    assert session.node_id == node.node_id
    assert session.introduction.member.role is Role.PROXY
    assert not session.serve


def test_an_introduction_fits_a_datagram_with_room_to_spare(scribe: Scribe) -> None:
    assert len(sessions(scribe, scribe.node()).introduction) <= 320 <= MAX_INTRODUCTION_BYTES


def test_an_introduction_under_another_session_id_is_refused(scribe: Scribe) -> None:
    alice, bob = sessions(scribe, scribe.node()), sessions(scribe, scribe.node())
    with pytest.raises(MalformedEnvelope):
        alice.admit(bob.introduction, bob.sid ^ 1, now=NOW, at=0.0)


def test_a_changed_introduction_is_refused(scribe: Scribe) -> None:
    alice, bob = sessions(scribe, scribe.node()), sessions(scribe, scribe.node())
    broken = bob.introduction[:-1] + bytes((bob.introduction[-1] ^ 1,))
    with pytest.raises(BadSignature):
        alice.admit(broken, bob.sid, now=NOW, at=0.0)


def test_anothers_membership_does_not_introduce(scribe: Scribe) -> None:
    thief, owner = scribe.node(), scribe.node()
    stolen = seal_introduction(thief.key, owner.credentials.membership, exchange_key=b"x" * 32, sid=1, boot=1, serve=True)
    with pytest.raises(UnknownSigner):
        parse_introduction(stolen, MembershipCache(scribe.mesh.trust()), now=NOW)


def test_a_foreign_membership_does_not_introduce(scribe: Scribe) -> None:
    foreign = sessions(Scribe(2), Scribe(2).node())
    with pytest.raises(TrustError):
        admit(sessions(scribe, scribe.node()), foreign)


def test_an_expired_membership_does_not_introduce(scribe: Scribe) -> None:
    alice, bob = sessions(scribe, scribe.node()), sessions(scribe, scribe.node())
    with pytest.raises(Expired):
        alice.admit(bob.introduction, bob.sid, now=NOW + CERTIFICATE_LIFETIME_S, at=0.0)


def test_a_peer_that_started_again_replaces_its_former_session(scribe: Scribe) -> None:
    alice, node = sessions(scribe, scribe.node()), scribe.node()
    old, new = sessions(scribe, node, boot=1), sessions(scribe, node, boot=2)
    admit(alice, old)
    current = admit(alice, new)
    assert alice.by_node(node.node_id) is current
    assert alice.by_sid(old.sid) is None
    assert len(alice) == 1


def test_an_introduction_from_before_the_restart_does_not_bring_the_old_session_back(scribe: Scribe) -> None:
    alice, node = sessions(scribe, scribe.node()), scribe.node()
    old, new = sessions(scribe, node, boot=1), sessions(scribe, node, boot=2)
    admit(alice, new, at=10.0)
    with pytest.raises(MalformedEnvelope):
        admit(alice, old, at=11.0)
    assert admit(alice, old, at=100.0), "a peer whose clock was set back gets in once its session has been silent"


def test_a_session_id_in_use_cannot_be_taken(scribe: Scribe) -> None:
    alice, bob, thief = sessions(scribe, scribe.node()), sessions(scribe, scribe.node()), scribe.node()
    admit(alice, bob, at=10.0)
    mimic = seal_introduction(thief.key, thief.credentials.membership, exchange_key=b"x" * 32, sid=bob.sid, boot=9, serve=True)
    with pytest.raises(MalformedEnvelope):
        alice.admit(mimic, bob.sid, now=NOW, at=11.0)


def test_sessions_are_bounded_and_the_unused_go_first(scribe: Scribe) -> None:
    alice = sessions(scribe, scribe.node(), size=2)
    others = [sessions(scribe, scribe.node()) for _ in range(3)]
    for other in others[:2]:
        admit(alice, other)
    alice.by_sid(others[0].sid)
    admit(alice, others[2])
    assert [alice.by_sid(other.sid) is not None for other in others] == [True, False, True]


def test_a_renewed_membership_keeps_the_session(scribe: Scribe) -> None:
    alice, node = sessions(scribe, scribe.node()), scribe.node()
    bob = sessions(scribe, node)
    before = admit(alice, bob)
    node.credentials = replace(
        node.credentials, membership=scribe.mesh.admission.admit(node.key.public_key(), Role.WORKER, now=NOW + 10).membership
    )
    bob.renew()
    after = admit(alice, bob)
    assert after is before
    assert after.introduction.signed == bob.introduction


def test_a_bad_exchange_key_is_refused(scribe: Scribe) -> None:
    alice, node = sessions(scribe, scribe.node()), scribe.node()
    weak = seal_introduction(node.key, node.credentials.membership, exchange_key=bytes(32), sid=1, boot=1, serve=True)
    with pytest.raises(MalformedEnvelope):
        alice.admit(weak, 1, now=NOW, at=0.0)


def test_a_mac_holds_for_its_bytes_only() -> None:
    code = mac(b"k" * 32, b"header", b"plain")
    assert mac_holds(b"k" * 32, b"header", b"plain", code)
    assert not mac_holds(b"k" * 32, b"header", b"other", code)
    assert not mac_holds(b"j" * 32, b"header", b"plain", code)
    assert not mac_holds(b"k" * 32, b"header", b"plain", b"")


def test_a_cookie_is_good_for_one_node_at_one_address_for_a_while() -> None:
    cookies = Cookies()
    cookie = cookies.make(b"a" * 32, HERE, now=0.0)
    assert cookies.holds(cookie, b"a" * 32, HERE)
    assert not cookies.holds(cookie, b"a" * 32, THERE)
    assert not cookies.holds(cookie, b"b" * 32, HERE)
    cookies.make(b"a" * 32, HERE, now=700.0)
    assert cookies.holds(cookie, b"a" * 32, HERE)
    cookies.make(b"a" * 32, HERE, now=1_400.0)
    assert not cookies.holds(cookie, b"a" * 32, HERE)


def test_a_session_remembers_a_few_proven_addresses(scribe: Scribe) -> None:
    session = admit(sessions(scribe, scribe.node()), sessions(scribe, scribe.node()))
    for port in range(10):
        session.prove(Address("198.51.100.1", port))
    assert len(session.proven) == 4
