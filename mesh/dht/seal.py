"""Datagrams that only members can read or write.

::

    version (1) ‖ epoch mod 2¹⁶ (2) ‖ sender's session id (8) ‖ counter (4) ‖ ChaCha20-Poly1305 ciphertext and tag

The 15-byte header is authenticated with the rest, and so is the node id of whom it is for, which is not sent: said to another, it does
not open. Only who does not know yet whom it will meet, a newcomer at a bootstrap node's address, seals it for anybody. Session id and
counter make the nonce: the session id is random for each start of a node, the counter never repeats within it, and together they name the
datagram for replies and replay windows. A datagram that does not open earns its sender nothing, not one byte.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from mesh.authority import EPOCH_S
from mesh.errors import DirectoryError
from mesh.identity import NetworkKey

VERSION = 1
MAX_DATAGRAM_BYTES = 1200
HEADER = struct.Struct("!BHQI")
TAG_BYTES = 16
OVERHEAD_BYTES = HEADER.size + TAG_BYTES
_WINDOW = 1024


class Opened(NamedTuple):
    """A datagram that some member sealed: who says it, which one of its datagrams it is, and the plain bytes. ``addressed``: it is for this
    node and no other."""

    sid: int
    counter: int
    header: bytes
    plain: bytes
    addressed: bool


class Sealer:
    """Seals and opens under the epoch keys in hand: this epoch, the one before and the one after. ``own_id`` is this node's id."""

    def __init__(self, sid: int, own_id: bytes) -> None:
        self.sid = sid
        self._own_id = own_id
        self._counter = 0
        self._keys: tuple[NetworkKey, ...] = ()
        self._ciphers: dict[int, ChaCha20Poly1305] = {}

    def set_keys(self, keys: tuple[NetworkKey, ...]) -> None:
        self._keys = keys
        self._ciphers = {item.epoch: ChaCha20Poly1305(item.key) for item in keys}

    def epoch(self, now: float) -> int:
        """The epoch to seal under at wall time ``now``. Raises `DirectoryError` when no key is left."""
        current = int(now // EPOCH_S)
        if current in self._ciphers:
            return current
        usable = [epoch for epoch in self._ciphers if abs(epoch - current) <= 1]
        if not usable:
            raise DirectoryError("no directory key for this day: renew this node's credentials, or check its clock")
        return max(usable)

    def next_counter(self) -> int:
        """Takes the next datagram's number; 2³² of them are enough for a year at 100 a second."""
        self._counter += 1
        return self._counter

    def header(self, counter: int, now: float) -> bytes:
        return HEADER.pack(VERSION, self.epoch(now) & 0xFFFF, self.sid, counter)

    def seal(self, header: bytes, plain: bytes, now: float, *, to: bytes) -> bytes:
        """``to`` is the node id of whom it is for, empty for anybody."""
        return header + self._ciphers[self.epoch(now)].encrypt(header[3:], plain, header + to)

    def open(self, data: bytes, now: float) -> Opened | None:
        """None for whatever is not a datagram of this mesh and time."""
        if not OVERHEAD_BYTES < len(data) <= MAX_DATAGRAM_BYTES or data[0] != VERSION:
            return None
        header = data[: HEADER.size]
        _, low, sid, counter = HEADER.unpack(header)
        current = int(now // EPOCH_S)
        for epoch in (current, current - 1, current + 1):
            if epoch & 0xFFFF == low and epoch in self._ciphers:
                for to in (self._own_id, b""):
                    try:
                        plain = self._ciphers[epoch].decrypt(header[3:], data[HEADER.size :], header + to)
                    except InvalidTag:
                        continue
                    return Opened(sid, counter, header, plain, bool(to))
                return None
        return None


class ReplayWindow:
    """Which of one sender's counters were seen: the highest, and a bitmap of the 1,024 below it."""

    __slots__ = ("_bits", "_highest")

    def __init__(self) -> None:
        self._highest = 0
        self._bits = 0

    def accept(self, counter: int) -> bool:
        """True once for each counter that is not too old."""
        ahead = counter - self._highest
        if ahead > 0:
            self._bits = ((self._bits << ahead) | 1) & ((1 << _WINDOW) - 1) if ahead < _WINDOW else 1
            self._highest = counter
            return True
        if -ahead >= _WINDOW or self._bits >> -ahead & 1:
            return False
        self._bits |= 1 << -ahead
        return True


class SeenNonces:
    """Datagrams of senders without a session yet: each is answered once."""

    def __init__(self, size: int = 16_384) -> None:
        self._size = size
        self._seen: OrderedDict[tuple[int, int], None] = OrderedDict()

    def accept(self, sid: int, counter: int) -> bool:
        nonce = (sid, counter)
        if nonce in self._seen:
            return False
        self._seen[nonce] = None
        if len(self._seen) > self._size:
            self._seen.popitem(last=False)
        return True
