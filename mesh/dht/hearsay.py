"""Nodes we have heard of and never met.

In a mesh of hundreds everybody comes to know everybody, slowly and in the background: then a look-up begins at a holder, a record goes
straight to its holders, and nobody has to be introduced while somebody waits. In a larger one the table holds but a part of all nodes, and
whom it holds is decided by talk.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from mesh.dht.peers import PeerMemory
from mesh.dht.routing import Contact, Table

_MOST = 512


class Hearsay:
    """At most so many of them, those heard of last. ``now`` is monotonic seconds."""

    def __init__(self, table: Table, memory: PeerMemory) -> None:
        self._table = table
        self._memory = memory
        self._heard: OrderedDict[bytes, Contact] = OrderedDict()

    def __len__(self) -> int:
        return len(self._heard)

    def hear(self, contacts: Iterable[Contact]) -> None:
        """Somebody spoke of these: unproven."""
        for contact in contacts:
            if self._table.get(contact.id) is None and contact.id != self._table.node.id:
                self._heard[contact.id] = contact
        while len(self._heard) > _MOST:
            self._heard.popitem(last=False)

    def take(self, now: float) -> Contact | None:
        """One that is worth meeting: unknown still, not silent lately, and the table has room for it."""
        while self._heard:
            _, contact = self._heard.popitem()
            if self._table.get(contact.id) is None and self._table.has_room(contact.id) and not self._memory.shunned(contact.id, now):
                return contact
        return None
