"""A node's own record: fresh, signed, and never silently absent."""

from __future__ import annotations

import random
from typing import cast

from mesh.directory import Directory
from mesh.membership import MembershipCache
from mesh.node import About, Announcer
from mesh.records import MAX_RECORD_BYTES, ModelEntry, State, parse_record
from mesh.trust import Role
from tests.support.authority import make_mesh
from tests.support.clocks import StoppedClock

NOW = 1_800_000_000.0
MESH = make_mesh(now=NOW)


class Told:
    """What a node says of itself, for the test to change."""

    def __init__(self) -> None:
        self.about = About(state=State.READY, models=(ModelEntry(name="m"),))

    def __call__(self) -> About:
        return self.about


def announcer(told: Told, clock: StoppedClock) -> Announcer:
    identity = MESH.identity(Role.WORKER, now=NOW)
    return Announcer(identity, cast(Directory, None), about=told, record_ttl_s=20.0, version="1", clock=clock, rng=random.Random(1))


async def test_record_is_signed_once_and_again_when_it_gets_old() -> None:
    clock, told = StoppedClock(NOW), Told()
    own = announcer(told, clock)
    first = own.record()
    assert own.record() is first
    clock.now += 11
    second = own.record()
    assert second.order > first.order
    assert second.expires > first.expires
    found = parse_record(second.signed, MembershipCache(MESH.trust()), now=clock.now)
    assert (found.state, [entry.name for entry in found.models]) == (State.READY, ["m"])


async def test_record_too_large_to_publish_is_announced_as_failed_with_the_reason() -> None:
    told = Told()
    told.about = About(state=State.READY, models=tuple(ModelEntry(name=f"a-rather-long-model-name-{number}") for number in range(60)))
    record = announcer(told, StoppedClock(NOW)).record()
    assert len(record.signed) <= MAX_RECORD_BYTES
    found = parse_record(record.signed, MembershipCache(MESH.trust()), now=NOW)
    assert (found.state, found.models) == (State.FAILED, ())
    assert "more than 1000" in found.reason
