"""What no longer holds although its signature does: the revocation list. Pure.

One document of kind ``revocations``, name ``keys``, signed by an issuer that may sign documents. Its body::

    keys      n × (id (8) ‖ end (4))      keys, and delegations with all that is below them; until they would have ended anyway
    later     n × (id (8) ‖ from (4))     of those, which are revoked only from a moment on
    invites   n × (first 8 bytes of the id ‖ end (4))     join tokens
    projects  {project: T}                keys of the project that begin before T
    issuers   {kid: T}                    keys of the issuer that begin before T
    before    T                           all keys that begin before T

Times are whole seconds; an ``end`` of an entry is the moment after which nothing with that id can hold, so the list forgets it; a ``T`` is
forgotten 90 days after it, when no key that began before can live. 5,000 ids fit. A list that would be longer is refused when it is made:
revoke the project or the issuer before a time, which is one entry.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import msgpack

from mesh.claims import read_bytes, read_number
from mesh.documents import Document
from mesh.envelope import parse_payload
from mesh.errors import MalformedEnvelope, UsageError
from mesh.scope import MAX_LIFETIME_S

KIND, NAME = "revocations", "keys"
MAX_BYTES = 65_000
"""So that the list fits a frame of a link: 5,000 ids and some dozens of names."""
NEVER = float("inf")
ID_BYTES = 8
_ENTRY = struct.Struct(">8sI")


class Claims(Protocol):
    """What is looked at in an `mesh.apikey.ApiKey`."""

    @property
    def id(self) -> bytes: ...
    @property
    def delegations(self) -> tuple[bytes, ...]: ...
    @property
    def kid(self) -> str: ...
    @property
    def project(self) -> str: ...
    @property
    def not_before(self) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Revocations:
    """One version of the list. ``seq`` is its document's, 0 for none; ``issued`` when it was signed. Ends and times in wall seconds."""

    keys: Mapping[bytes, float] = field(default_factory=dict)
    later: Mapping[bytes, float] = field(default_factory=dict)
    invites: Mapping[bytes, float] = field(default_factory=dict)
    projects: Mapping[str, float] = field(default_factory=dict)
    issuers: Mapping[str, float] = field(default_factory=dict)
    before: float = 0.0
    seq: int = 0
    issued: float = 0.0

    def refuses(self, key: Claims, *, now: float) -> str | None:
        """Why a key no longer holds, in a few words; None if it does. A microsecond, and only when the list or the key is new."""
        for number, item in enumerate((key.id, *key.delegations)):
            if item in self.keys and now >= self.later.get(item, 0.0):
                return "what it was made with has been revoked" if number else "it has been revoked"
        begins = key.not_before
        if begins < self.before or begins < self.projects.get(key.project, 0.0) or begins < self.issuers.get(key.kid, 0.0):
            return "all keys of its time have been revoked"
        return None

    def holds_until(self, key: Claims) -> float:
        """When a key that holds now is revoked."""
        if not self.later:
            return NEVER
        return min((self.later[item] for item in (key.id, *key.delegations) if item in self.later), default=NEVER)

    def refuses_invite(self, invite_id: bytes) -> bool:
        return invite_id[:ID_BYTES] in self.invites

    def pruned(self, now: float) -> Revocations:
        """Without what can no longer hold in any case."""
        oldest = now - MAX_LIFETIME_S

        def living(times: Mapping[str, float]) -> dict[str, float]:
            return {name: at for name, at in times.items() if at > oldest}

        keys = {item: end for item, end in self.keys.items() if end > now}
        return replace(
            self,
            keys=keys,
            later={item: at for item, at in self.later.items() if at > now and item in keys},
            invites={item: end for item, end in self.invites.items() if end > now},
            projects=living(self.projects),
            issuers=living(self.issuers),
            before=self.before if self.before > oldest else 0.0,
        )

    def with_key(self, key_id: bytes, *, end: float, begin: float = 0.0) -> Revocations:
        """``begin`` is from when it is revoked; 0 at once. What is revoked already does not come back."""
        later = dict(self.later)
        if begin and (key_id not in self.keys or key_id in later):
            later[key_id] = min(begin, later.get(key_id, begin))
        else:
            later.pop(key_id, None)
        return replace(self, keys=dict(self.keys) | {key_id: max(end, self.keys.get(key_id, 0.0))}, later=later)

    def union(self, other: Revocations) -> Revocations:
        """What either revokes, numbered as this one."""
        joined = self
        for key_id, end in other.keys.items():
            joined = joined.with_key(key_id, end=end, begin=other.later.get(key_id, 0.0))
        for project, before in other.projects.items():
            joined = joined.with_project(project, before=before)
        for kid, before in other.issuers.items():
            joined = joined.with_issuer(kid, before=before)
        return replace(joined, invites=dict(other.invites) | dict(self.invites)).with_all(before=other.before)

    def with_invite(self, invite_id: bytes, *, end: float) -> Revocations:
        return replace(self, invites=dict(self.invites) | {invite_id[:ID_BYTES]: end})

    def with_project(self, project: str, *, before: float) -> Revocations:
        return replace(self, projects=dict(self.projects) | {project: max(before, self.projects.get(project, 0.0))})

    def with_issuer(self, kid: str, *, before: float) -> Revocations:
        return replace(self, issuers=dict(self.issuers) | {kid: max(before, self.issuers.get(kid, 0.0))})

    def with_all(self, *, before: float) -> Revocations:
        return replace(self, before=max(before, self.before))


NONE = Revocations()


def encode_revocations(revoked: Revocations) -> bytes:
    """The document's body. Raises `UsageError` if the list is too long."""
    body: bytes = msgpack.packb(
        {
            "keys": _pack(revoked.keys),
            "later": _pack(revoked.later),
            "invites": _pack(revoked.invites),
            "projects": {name: int(at) for name, at in revoked.projects.items()},
            "issuers": {name: int(at) for name, at in revoked.issuers.items()},
            "before": int(revoked.before),
        }
    )
    if len(body) > MAX_BYTES:
        raise UsageError(
            f"the list would have {len(body)} bytes, more than {MAX_BYTES}: revoke a whole project or issuer, which is one entry, or wait "
            "for entries to fall off (an id does when its key would have ended)"
        )
    return body


def parse_revocations(document: Document) -> Revocations:
    """From a verified document. Raises `MalformedEnvelope`."""
    payload = parse_payload(document.body)
    return Revocations(
        keys=_unpack(read_bytes(payload, "keys", max_len=MAX_BYTES)),
        later=_unpack(read_bytes(payload, "later", max_len=MAX_BYTES)),
        invites=_unpack(read_bytes(payload, "invites", max_len=MAX_BYTES)),
        projects=_read_times(payload.get("projects")),
        issuers=_read_times(payload.get("issuers")),
        before=read_number(payload, "before"),
        seq=document.seq,
        issued=document.issued,
    )


class RevocationList:
    """The newest list this process knows of; who caches verdicts is told when it changes."""

    def __init__(self) -> None:
        self.newest = NONE
        self._on_change: list[Callable[[], None]] = []

    def on_change(self, callback: Callable[[], None]) -> None:
        self._on_change.append(callback)

    def take(self, document: Document) -> None:
        """A version that the store of documents has accepted; those are never older than the last. Raises `MalformedEnvelope`."""
        self.newest = parse_revocations(document)
        for callback in self._on_change:
            callback()


def _pack(ids: Mapping[bytes, float]) -> bytes:
    return b"".join(_ENTRY.pack(item, min(int(end), 2**32 - 1)) for item, end in sorted(ids.items()))


def _unpack(data: bytes) -> dict[bytes, float]:
    if len(data) % _ENTRY.size:
        raise MalformedEnvelope("a list of ids is cut off")
    return {item: float(end) for item, end in _ENTRY.iter_unpack(data)}


def _read_times(value: object) -> dict[str, float]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise MalformedEnvelope("projects and issuers are maps from names to times")
    return {name: read_number(value, name) for name in value}
