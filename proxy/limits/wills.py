"""What an owner may have used of a budget when it dies or is cut off. Pure.

Owners know what the others have in hand, since they granted it, so of a proxy that is out of reach as much counts as used. Of an owner
only its heir can know, if it has been told: so an owner tells the heir up to where it may get, and goes no further than the heir has said
that it knows. It tells early enough that in steady use nothing waits for that.
"""

from __future__ import annotations

from dataclasses import dataclass

from proxy.limits.messages import Count

MAX_WILLS = 65_536


@dataclass(slots=True, eq=False)
class _Will:
    """``told`` the heir; ``kept`` by it, as it says."""

    heir: bytes
    told: float = 0.0
    kept: float = 0.0


class Wills:
    """Of this proxy's own buckets what their heirs have been told; of others' what this proxy, as an heir, has."""

    def __init__(self) -> None:
        self._made: dict[bytes, _Will] = {}
        self._heard: dict[bytes, dict[bytes, Count]] = {}

    def make(self, bucket: bytes, heir: bytes, most: float, *, spare: float) -> float:
        """This proxy may have used ``most`` of a bucket of its own soon: what its heir must be told now, 0 if that can wait. What is used
        meanwhile is half of ``spare`` at most, where the heir answers in time."""
        will = self._made.get(bucket)
        if will is None or will.heir != heir:
            if len(self._made) >= MAX_WILLS:
                self._made.clear()
            will = self._made[bucket] = _Will(heir)
        if most + spare / 2 <= will.told:
            return 0.0
        will.told = most + spare
        return will.told

    def keep(self, bucket: bytes, heir: bytes, most: float) -> bool:
        """The heir says that it has been told so much. False if that is no news."""
        will = self._made.get(bucket)
        if will is None or will.heir != heir or not will.kept < most <= will.told:
            return False
        will.kept = most
        return True

    def kept(self, bucket: bytes, heir: bytes) -> float:
        """Up to where this proxy may use a bucket of its own."""
        will = self._made.get(bucket)
        return will.kept if will is not None and will.heir == heir else 0.0

    def lost(self, peer: bytes) -> None:
        """It may have forgotten what it was told as an heir."""
        self._made = {bucket: will for bucket, will in self._made.items() if will.heir != peer}

    def hear(self, owner: bytes, count: Count) -> bool:
        """An owner says what it may have used. False if it cannot be kept."""
        of_owner = self._heard.setdefault(owner, {})
        if count.bucket not in of_owner and len(of_owner) >= MAX_WILLS:
            return False
        of_owner[count.bucket] = count
        return True

    def forget(self, bucket: bytes, owner: bytes) -> None:
        """It is the owner no more: it asks like others."""
        if (of_owner := self._heard.get(owner)) is not None:
            of_owner.pop(bucket, None)

    def open(self, owner: bytes) -> list[tuple[bytes, float, float]]:
        """It is out of reach: buckets, what it may have used of each, and when each ends (wall-clock seconds)."""
        return [(bucket, count.most, count.ends) for bucket, count in self._heard.pop(owner, {}).items()]

    def expire(self, wall: float) -> None:
        """Drop what is over."""
        self._heard = {
            owner: kept
            for owner, told in self._heard.items()
            if (kept := {bucket: count for bucket, count in told.items() if count.ends >= wall})
        }
