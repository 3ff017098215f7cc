"""Pulses: only the owner makes them, each later one of the same record, and only so far."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mesh.pulse import MAX_PULSE, PULSE_BYTES, Pulse, anchor_of, follows, make_pulse

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
BOOT, SEQ = 1_800_000_000_000, 7
ANCHOR = Pulse(0, anchor_of(KEY, BOOT, SEQ))


def test_every_pulse_follows_the_anchor_and_those_before_it() -> None:
    pulses = [make_pulse(KEY, BOOT, SEQ, n) for n in range(MAX_PULSE + 1)]
    assert pulses[0] == ANCHOR
    assert len({pulse.proof for pulse in pulses}) == MAX_PULSE + 1
    for pulse in pulses[1:]:
        assert follows(pulse, ANCHOR)
    assert follows(pulses[9], pulses[3])
    assert not follows(pulses[3], pulses[9])
    assert not follows(pulses[3], pulses[3])


def test_a_known_vector() -> None:
    assert ANCHOR.proof.hex() == "48a81837919517102ef5701869853814"
    assert make_pulse(KEY, BOOT, SEQ, MAX_PULSE).proof.hex() == "c1ed8afe04061b271eafffa54244a558"


@pytest.mark.parametrize(
    "pulse",
    [
        Pulse(5, bytes(PULSE_BYTES)),
        Pulse(6, make_pulse(KEY, BOOT, SEQ, 5).proof),
        make_pulse(KEY, BOOT, SEQ + 1, 5),
        make_pulse(KEY, BOOT + 1, SEQ, 5),
        make_pulse(Ed25519PrivateKey.from_private_bytes(bytes(32)), BOOT, SEQ, 5),
        Pulse(MAX_PULSE + 1, bytes(PULSE_BYTES)),
    ],
    ids=["made up", "of another second", "of another record", "of another start", "of another node", "too late"],
)
def test_no_other_pulse_follows(pulse: Pulse) -> None:
    assert not follows(pulse, ANCHOR)
