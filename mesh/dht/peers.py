"""What we remember of peers: how long they take, and which of them do not answer."""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import dataclass

from mesh.dht.config import DirectoryConfig

_BACKOFF_S = 4.0
_BACKOFF_MAX_S = 120.0


@dataclass(slots=True)
class _Peer:
    srtt_s: float = 0.0
    variance_s: float = 0.0
    failures: int = 0
    failed_at: float = 0.0
    shunned_until: float = 0.0


class PeerMemory:
    """Round-trip estimates (RFC 6298) and failures of at most ``size`` peers. ``now`` is monotonic seconds."""

    def __init__(self, config: DirectoryConfig, rng: random.Random, *, size: int = 8_192) -> None:
        self._config = config
        self._rng = rng
        self._size = size
        self._peers: OrderedDict[bytes, _Peer] = OrderedDict()
        self._failing: set[bytes] = set()
        self._usual_s = 0.0
        self._spread_s = 0.0

    def _peer(self, node_id: bytes) -> _Peer:
        peer = self._peers.get(node_id)
        if peer is None:
            peer = self._peers[node_id] = _Peer()
            if len(self._peers) > self._size:
                self._failing.discard(self._peers.popitem(last=False)[0])
        else:
            self._peers.move_to_end(node_id)
        return peer

    def answered(self, node_id: bytes, rtt_s: float | None) -> None:
        """``rtt_s`` is None where a retransmission makes the sample ambiguous (Karn's rule)."""
        peer = self._peer(node_id)
        peer.failures = 0
        peer.shunned_until = 0.0
        self._failing.discard(node_id)
        if rtt_s is None:
            return
        if peer.srtt_s == 0.0:
            peer.srtt_s, peer.variance_s = rtt_s, rtt_s / 2
        else:
            peer.variance_s += (abs(rtt_s - peer.srtt_s) - peer.variance_s) / 4
            peer.srtt_s += (rtt_s - peer.srtt_s) / 8
        if self._usual_s == 0.0:
            self._usual_s, self._spread_s = rtt_s, rtt_s / 2
        else:
            self._spread_s += (abs(rtt_s - self._usual_s) - self._spread_s) / 32
            self._usual_s += (rtt_s - self._usual_s) / 32

    def failed(self, node_id: bytes, now: float, *, sent_at: float) -> int:
        """A request of ``sent_at`` was not answered by its hard deadline. Returns how many times in a row; 0 if it was sent before the
        last failure was known, and so says nothing new."""
        peer = self._peer(node_id)
        if peer.failures and sent_at < peer.failed_at:
            return 0
        peer.failures += 1
        peer.failed_at = now
        self._failing.add(node_id)
        pause = min(_BACKOFF_MAX_S, _BACKOFF_S * 2 ** min(peer.failures - 1, 8))
        peer.shunned_until = now + pause * self._rng.uniform(0.75, 1.25)
        return peer.failures

    def shunned(self, node_id: bytes, now: float) -> bool:
        """Whether it has failed lately: a look-up does not wait for it."""
        return node_id in self._failing and now < self._peers[node_id].shunned_until

    def failing(self, node_id: bytes) -> bool:
        return node_id in self._failing

    def rtt_s(self, node_id: bytes) -> float:
        peer = self._peers.get(node_id)
        return peer.srtt_s if peer is not None and peer.srtt_s > 0.0 else self._usual_s

    def patience_s(self, node_id: bytes | None) -> float:
        """How long a reply of this peer usually takes at most: smoothed round trip plus four deviations."""
        peer = self._peers.get(node_id) if node_id is not None else None
        if peer is not None and peer.srtt_s > 0.0:
            estimate = peer.srtt_s + 4 * peer.variance_s
        elif self._usual_s > 0.0:
            estimate = self._usual_s + 4 * self._spread_s
        else:
            estimate = self._config.initial_timeout_s
        return min(max(estimate, self._config.min_timeout_s), self._config.max_timeout_s)

    def deadline_s(self, node_id: bytes | None) -> float:
        """How long after which it counts as failed."""
        patience = self.patience_s(node_id)
        return min(max(patience * self._config.hard_timeout_factor, 0.25), max(self._config.max_timeout_s, patience))
