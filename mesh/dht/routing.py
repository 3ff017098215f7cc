"""The routing table: kademlia's buckets over 2²⁵⁶ ids, with the true k nearest, subnet limits and the best replacement.

Only nodes that proved key, membership and address are added; `protocol` sees to that.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator

from kademlia.node import Node
from kademlia.routing import KBucket, RoutingTable

from mesh.dht.address import Address, encode_address, parse_address, subnet_of
from mesh.dht.config import DirectoryConfig
from mesh.errors import MalformedEnvelope

ID_BITS = 256
ID_BYTES = 32
_REPLACEMENTS = 2
_SEEN_S = 1.0
"""Signs of life closer together than this count as one."""
FEW = 3
"""With so many contacts a range of ids is known: a newcomer meets them in each, and a half that has fewer counts as never looked up."""


class Contact(Node):  # type: ignore[misc]
    """A node id and where it answers. ``seen`` is monotonic seconds of the last proof of life."""

    id: bytes
    long_id: int

    __slots__ = ("_packed", "address", "seen")

    def __init__(self, node_id: bytes, address: Address, *, seen: float = 0.0) -> None:
        super().__init__(node_id, address.host, address.port)
        self.address = address
        self.seen = seen
        self._packed = b""

    @property
    def packed(self) -> bytes:
        """As it travels: id and address."""
        if not self._packed:
            self._packed = self.id + encode_address(self.address)
        return self._packed

    def __hash__(self) -> int:
        return hash(self.id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Contact) and other.id == self.id and other.address == self.address

    def __repr__(self) -> str:
        return f"{self.id.hex()[:12]}@{self.address}"


def distance(one: bytes, other: bytes) -> int:
    return int.from_bytes(one) ^ int.from_bytes(other)


def encode_contacts(contacts: list[Contact], room: int) -> bytes:
    """As many contacts, in the order given, as fit into ``room`` bytes."""
    packed = [contact.packed for contact in contacts]
    while sum(map(len, packed)) > room:
        packed.pop()
    return b"".join(packed)


def parse_contacts(data: object, *, limit: int) -> list[Contact]:
    """Contacts somebody told us of: unproven. Raises `MalformedEnvelope`."""
    if not isinstance(data, bytes):
        raise MalformedEnvelope("contacts must be bytes")
    contacts: list[Contact] = []
    at = 0
    while at < len(data):
        node_id = data[at : at + ID_BYTES]
        address, at = parse_address(data, at + ID_BYTES)
        contacts.append(Contact(node_id, address))
        if len(contacts) > limit:
            raise MalformedEnvelope("too many contacts")
    return contacts


class Bucket(KBucket):  # type: ignore[misc]
    """Contacts of one range of ids, the longest silent first. ``range`` is inclusive at both ends."""

    nodes: dict[bytes, Contact]
    replacement_nodes: dict[bytes, Contact]
    range: tuple[int, int]

    def __init__(self, low: int, high: int, k: int) -> None:
        super().__init__(low, high, k, replacementNodeFactor=_REPLACEMENTS)
        self.low = low
        self.bits = (high - low).bit_length()
        self.touched = float("-inf")

    def halves(self) -> tuple[Bucket, Bucket]:
        low, high = self.range
        middle = (low + high) // 2
        one, two = Bucket(low, middle, self.ksize), Bucket(middle + 1, high, self.ksize)
        for contact in self.nodes.values():
            (one if contact.long_id <= middle else two).nodes[contact.id] = contact
        for contact in self.replacement_nodes.values():
            (one if contact.long_id <= middle else two).replacement_nodes[contact.id] = contact
        for half in (one, two):
            if len(half.nodes) >= FEW:
                half.touched = self.touched  # else whoever looked for something here may not have come that far
        return one, two

    def promote(self) -> Contact | None:
        """Fill a gap with the replacement heard from last; returns it."""
        if not self.replacement_nodes or len(self.nodes) >= self.ksize:
            return None
        newest = max(self.replacement_nodes.values(), key=lambda contact: contact.seen)
        del self.replacement_nodes[newest.id]
        self.nodes[newest.id] = newest
        return newest


class Table(RoutingTable):  # type: ignore[misc]
    """Buckets split where our own id lies, and, as kademlia does, a little beyond (b = 5)."""

    buckets: list[Bucket]

    def __init__(self, node_id: bytes, config: DirectoryConfig) -> None:
        self._config = config
        self._subnets: dict[str, int] = {}
        self.on_added: Callable[[Contact], None] = lambda contact: None
        self.on_removed: Callable[[Contact], None] = lambda contact: None
        super().__init__(None, config.k, Contact(node_id, Address("0.0.0.0", 0)))

    def flush(self) -> None:
        self.buckets = [Bucket(0, (1 << ID_BITS) - 1, self.ksize)]
        self._subnets = {}
        self._ids: list[int] = []
        self._contacts: dict[int, Contact] = {}

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[Contact]:
        for bucket in self.buckets:
            yield from bucket.nodes.values()

    def bucket_of(self, long_id: int) -> Bucket:
        return self.buckets[self._index(long_id)]

    def _index(self, long_id: int) -> int:
        low, high = 0, len(self.buckets) - 1
        while low < high:
            middle = (low + high) // 2
            if long_id <= self.buckets[middle].range[1]:
                high = middle
            else:
                low = middle + 1
        return low

    def get(self, node_id: bytes) -> Contact | None:
        return self._contacts.get(int.from_bytes(node_id))

    def has_room(self, node_id: bytes) -> bool:
        """Whether one of this id would be added now, its subnet aside."""
        bucket = self.bucket_of(int.from_bytes(node_id))
        return len(bucket.nodes) < self.ksize or self._may_split(bucket)

    def seen(self, node_id: bytes, address: Address, now: float) -> Contact | None:
        """A proven node gave a sign of life. Returns the contact that ought to be probed to make room, if any."""
        known = self.get(node_id)
        if known is not None and known.address == address:
            if now - known.seen >= _SEEN_S:
                known.seen = now
                bucket = self.bucket_of(known.long_id)
                bucket.nodes[node_id] = bucket.nodes.pop(node_id)
            return None
        if known is not None:
            self.remove(node_id)
        return self._add(Contact(node_id, address, seen=now))

    def _add(self, contact: Contact) -> Contact | None:
        if contact.id == self.node.id or self._subnet_full(contact):
            return None
        while True:
            index = self._index(contact.long_id)
            bucket = self.buckets[index]
            if bucket.add_node(contact):
                bucket.replacement_nodes.pop(contact.id, None)
                self._enter(contact)
                self.on_added(contact)
                return None
            if not self._may_split(bucket):
                oldest: Contact = bucket.head()
                return oldest
            bucket.replacement_nodes.pop(contact.id, None)
            self.buckets[index : index + 1] = bucket.halves()
            self._fill(self.buckets[index])
            self._fill(self.buckets[index + 1])

    def _may_split(self, bucket: Bucket) -> bool:
        low, high = bucket.range
        if low == high:
            return False
        depth = ID_BITS - (high - low).bit_length()
        return low <= self.node.long_id <= high or depth % 5 != 0

    def remove(self, node_id: bytes) -> None:
        """Forget a contact; the best replacement takes its place."""
        bucket = self.bucket_of(int.from_bytes(node_id))
        bucket.replacement_nodes.pop(node_id, None)
        gone = bucket.nodes.pop(node_id, None)
        if gone is None:
            return
        self._leave(gone)
        self.on_removed(gone)
        self._fill(bucket)

    def _fill(self, bucket: Bucket) -> None:
        while (promoted := bucket.promote()) is not None:
            self._enter(promoted)
            self.on_added(promoted)

    def _subnet_full(self, contact: Contact) -> bool:
        subnet = subnet_of(contact.address.host)
        if subnet is None:
            return False
        known = self._subnets.get(subnet, 0)
        if known >= self._config.subnet_limit:
            return True
        if known < self._config.subnet_bucket_limit:
            return False
        bucket = self.bucket_of(contact.long_id)
        inside = sum(subnet_of(other.address.host) == subnet for other in bucket.nodes.values())
        return inside >= self._config.subnet_bucket_limit

    def _enter(self, contact: Contact) -> None:
        insort(self._ids, contact.long_id)
        self._contacts[contact.long_id] = contact
        subnet = subnet_of(contact.address.host)
        if subnet is not None:
            self._subnets[subnet] = self._subnets.get(subnet, 0) + 1

    def _leave(self, contact: Contact) -> None:
        del self._ids[bisect_left(self._ids, contact.long_id)]
        del self._contacts[contact.long_id]
        subnet = subnet_of(contact.address.host)
        if subnet is not None:
            self._subnets[subnet] -= 1
            if not self._subnets[subnet]:
                del self._subnets[subnet]

    def nearest(self, target: bytes, count: int, *, accept: Callable[[Contact], bool] | None = None) -> list[Contact]:
        """The ``count`` contacts truly nearest to ``target``, nearest first.

        All ids that begin as the target does are nearer to it than any that do not, and stand side by side among the sorted ids: so the
        beginning is shortened bit by bit, and of each bit only those that come with it are put in order.
        """
        goal, ids, contacts = int.from_bytes(target), self._ids, self._contacts
        found: list[Contact] = []
        shift = ID_BITS - max(0, (len(ids) // count).bit_length() - 2)
        low = high = bisect_left(ids, goal)
        while high - low < len(ids):
            start = goal >> shift << shift
            left, right = bisect_left(ids, start, 0, low), bisect_left(ids, start + (1 << shift), high)
            for long_id in sorted(ids[left:low] + ids[high:right], key=goal.__xor__):
                contact = contacts[long_id]
                if accept is None or accept(contact):
                    found.append(contact)
                    if len(found) == count:
                        return found
            low, high = left, right
            shift += 1
        return found

    def estimate_nodes(self) -> int:
        """How many nodes the network has, judged by how near our nearest k are: k / (distance of the k-th / 2^256)."""
        nearest = self.nearest(self.node.id, self.ksize)
        if len(nearest) < self.ksize:
            return len(nearest) + 1
        farthest: int = nearest[-1].long_id ^ self.node.long_id
        return max(len(self), int(self.ksize) * (1 << ID_BITS) // farthest)

    def stale_ranges(self, now: float, older_than_s: float) -> list[tuple[int, int]]:
        """Ranges of buckets that no look-up touched for so long."""
        return [bucket.range for bucket in self.buckets if now - bucket.touched > older_than_s]

    def touch(self, target: bytes, now: float) -> None:
        self.bucket_of(int.from_bytes(target)).touched = now

    def longest_silent(self) -> Contact | None:
        heads = [next(iter(bucket.nodes.values())) for bucket in self.buckets if bucket.nodes]
        return min(heads, key=lambda contact: contact.seen, default=None)
