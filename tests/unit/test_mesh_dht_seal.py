"""Sealed datagrams: members only, once each."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.authority import EPOCH_S, network_keys
from mesh.dht.seal import HEADER, MAX_DATAGRAM_BYTES, ReplayWindow, Sealer, SeenNonces
from mesh.errors import DirectoryError

NOW = 20_000 * EPOCH_S + 1_000.0
SECRET, MESH_ID = b"s" * 32, b"m" * 32


def sealer(sid: int = 7, *, secret: bytes = SECRET, now: float = NOW) -> Sealer:
    made = Sealer(sid, ident(sid))
    made.set_keys(network_keys(secret, MESH_ID, now=now))
    return made


def ident(sid: int) -> bytes:
    return bytes((sid,)) * 32


def sealed(by: Sealer, plain: bytes, now: float = NOW, *, to: int = 2) -> bytes:
    return by.seal(by.header(by.next_counter(), now), plain, now, to=ident(to) if to else b"")


def test_what_alice_seals_bob_opens() -> None:
    alice, bob = sealer(1), sealer(2)
    opened = bob.open(sealed(alice, b"hello"), NOW)
    assert opened is not None
    assert (opened.sid, opened.counter, opened.plain, opened.addressed) == (1, 1, b"hello", True)


def test_what_is_for_bob_is_not_for_carol_and_what_is_for_anybody_says_so() -> None:
    alice, carol = sealer(1), sealer(3)
    assert carol.open(sealed(alice, b"hello", to=2), NOW) is None
    opened = carol.open(sealed(alice, b"hello", to=0), NOW)
    assert opened is not None
    assert not opened.addressed


def test_another_meshs_secret_opens_nothing() -> None:
    assert sealer(2, secret=b"x" * 32).open(sealed(sealer(1), b"hello"), NOW) is None


def test_every_changed_byte_is_noticed() -> None:
    alice, bob = sealer(1), sealer(2)
    data = sealed(alice, b"hello")
    for at in range(len(data)):
        assert bob.open(data[:at] + bytes((data[at] ^ 1,)) + data[at + 1 :], NOW) is None


@given(st.binary(max_size=1_400))
@settings(max_examples=200, deadline=None)
def test_no_bytes_whatever_open_or_raise(data: bytes) -> None:
    assert sealer(2).open(data, NOW) is None


def test_the_epochs_before_and_after_are_accepted_and_no_other() -> None:
    alice = sealer(1)
    bob = sealer(2)
    for epochs_away, accepted in ((0, True), (1, True), (2, False)):
        data = sealed(alice, b"hello", NOW)
        assert (bob.open(data, NOW + epochs_away * EPOCH_S) is not None) is accepted


def test_a_clock_a_little_ahead_of_midnight_is_understood() -> None:
    midnight = 20_001 * EPOCH_S
    ahead = sealed(sealer(1, now=midnight), b"hello", midnight + 20.0)
    assert sealer(2, now=midnight - 20.0).open(ahead, midnight - 20.0) is not None


def test_a_node_without_any_key_for_the_day_says_so() -> None:
    with pytest.raises(DirectoryError):
        sealer(1).header(1, NOW + 30 * EPOCH_S)


def test_a_datagram_too_long_or_too_short_is_not_tried() -> None:
    bob = sealer(2)
    assert bob.open(b"\x01" + bytes(HEADER.size), NOW) is None
    assert bob.open(sealed(sealer(1), bytes(MAX_DATAGRAM_BYTES)), NOW) is None


def test_a_window_accepts_each_counter_once_in_any_order() -> None:
    window = ReplayWindow()
    assert [window.accept(counter) for counter in (5, 3, 5, 4, 3, 6)] == [True, True, False, True, False, True]


def test_a_window_refuses_what_is_older_than_it_remembers() -> None:
    window = ReplayWindow()
    assert window.accept(5_000)
    assert window.accept(5_000 - 1_023)
    assert not window.accept(5_000 - 1_024)
    assert window.accept(100_000)
    assert not window.accept(5_000)


@given(st.lists(st.integers(1, 3_000), max_size=200))
@settings(deadline=None)
def test_a_window_never_accepts_twice(counters: list[int]) -> None:
    window = ReplayWindow()
    accepted = [counter for counter in counters if window.accept(counter)]
    assert len(accepted) == len(set(accepted))


def test_seen_nonces_are_bounded_and_forget_the_oldest() -> None:
    seen = SeenNonces(size=2)
    assert [seen.accept(1, 1), seen.accept(1, 1), seen.accept(1, 2), seen.accept(1, 3)] == [True, False, True, True]
    assert seen.accept(1, 1)
