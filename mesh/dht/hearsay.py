"""Nodes we have heard of and never met.

In a mesh of hundreds everybody comes to know everybody, slowly and in the background: then a look-up begins at a holder, a record goes
straight to its holders, and nobody has to be introduced while somebody waits. In a larger one the table holds but a part of all nodes, and
whom it holds is decided by talk.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from mesh.dht.address import subnet_of
from mesh.dht.limits import Buckets
from mesh.dht.peers import PeerMemory
from mesh.dht.routing import Contact, Table

_MOST = 512
_SUBNET_PER_S = 0.1
"""A member that invents contacts shall not make everybody knock at somebody's door."""


class Hearsay:
    """At most so many of them, those heard of last. ``now`` is monotonic seconds."""

    def __init__(self, table: Table, memory: PeerMemory) -> None:
        self._table = table
        self._memory = memory
        self._heard: OrderedDict[bytes, Contact] = OrderedDict()
        self._subnets = Buckets(_SUBNET_PER_S, 1.0)

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
        """One that is worth meeting: unknown still, not silent lately, of a public subnet that was left alone for a while, and one that the
        table has room for."""
        while self._heard:
            _, contact = self._heard.popitem()
            if self._table.get(contact.id) is None and self._table.has_room(contact.id) and not self._memory.shunned(contact.id, now):
                subnet = subnet_of(contact.address.host)
                if subnet is None or self._subnets.take(subnet, now):
                    return contact
        return None
