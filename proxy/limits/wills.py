"""What an owner may have used of a budget when it dies. Pure.

Owners know what the others have in hand, since they granted it, so of a proxy that dies as much counts as used. Of an owner only its heir
can know, if it has been told: before it grants itself more of a budget, an owner tells the heir up to where it may get.
"""

from __future__ import annotations

from proxy.limits.messages import Count

MAX_WILLS = 65_536


class Wills:
    """Of this proxy's own buckets what their heirs have been told; of others' what this proxy, as an heir, has."""

    def __init__(self) -> None:
        self._made: dict[bytes, tuple[bytes, float]] = {}
        self._heard: dict[bytes, dict[bytes, Count]] = {}

    def make(self, bucket: bytes, heir: bytes, most: float, *, spare: float) -> float:
        """This proxy may have used ``most`` of a bucket of its own soon: what its heir must be told, 0 where it knows as much already."""
        if (told := self._made.get(bucket)) is not None and told[0] == heir and most <= told[1]:
            return 0.0
        if len(self._made) >= MAX_WILLS:
            self._made.clear()
        self._made[bucket] = heir, most + spare
        return most + spare

    def hear(self, owner: bytes, count: Count) -> None:
        """An owner says what it may have used."""
        of_owner = self._heard.setdefault(owner, {})
        if count.bucket in of_owner or len(of_owner) < MAX_WILLS:
            of_owner[count.bucket] = count

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
