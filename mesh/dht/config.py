"""The directory's settings, each with its formula or trade-off."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryConfig:
    """Durations in seconds, sizes in bytes. The defaults suit a mesh over the internet; see `lan` and `local`."""

    k: int = 20
    """Bucket size. 20 survives the loss of half of all nodes (Kademlia, section 2.1)."""
    alpha: int = 3
    """Requests each path of a look-up keeps in flight."""
    paths: int = 3
    """Disjoint paths of a look-up (S/Kademlia): a liar spoils only the path that reached it."""
    read_width: int = 8
    """How many of the nearest live nodes a look-up must have heard: the holders, and as many newcomers as may stand before them."""
    holders: int = 5
    """Copies of each record. All of five gone at once with a third of all nodes dead: 0.4% of records, until the next refresh."""
    spares: int = 2
    """Further copies, refreshed half as often: with 30% of all nodes gone at once 0.3⁷ = 0.02% of records are out of reach."""
    publish_quorum: int = 3
    """`publish` returns once so many holders accepted and the slow ones have had their usual time."""
    refresh_s: float = 5.0
    """How often an owner makes a fresh record."""
    record_ttl_s: float = 20.0
    """How long a record lives: three missed refreshes and a margin."""
    lookup_timeout_s: float = 1.0
    """The hard deadline of a look-up; it then answers with what it has."""
    initial_timeout_s: float = 0.3
    """The patience with a peer before any round trip was measured."""
    min_timeout_s: float = 0.04
    """Below this a busy machine looks like a dead one."""
    max_timeout_s: float = 1.0
    """The longest wait for one reply."""
    hard_timeout_factor: float = 3.0
    """A reply later than usual opens the way for another request; later than this many times usual, the peer has failed."""
    shard_size: int = 160
    """Records under one key before the overflow goes to its eight sub-keys. 160 records are about 69 KB, 63 datagrams, and the tags of all
    of them fit into one."""
    ascend_interval_s: float = 300.0
    """How often, give or take half, whoever went to a sub-key asks at the key above whether there is room again, with the next record it
    signs. For three such intervals a holder that turned somebody away sends readers to the sub-keys."""
    max_records: int = 50_000
    """Records one node holds, of all keys together: about 50 MB."""
    max_stores_per_peer: int = 256
    """Records of other nodes that one peer may have placed here (its own always fit)."""
    max_sessions: int = 4_096
    """Peers whose pair key is remembered; the least recently used goes first."""
    requests_per_s: float = 400.0
    """Requests served per peer and second, with a burst of twice that."""
    introductions_per_s: float = 1_500.0
    """New introductions verified per second (200 µs each), from everybody together."""
    large_mesh: int = 500
    """From so many nodes on, records that say nothing new are refreshed at half of their life, and views read less often."""
    probe_interval_s: float = 4.0
    """One contact that has been silent longest is probed this often."""
    refresh_bucket_s: float = 600.0
    """A bucket nobody touched for so long is looked up."""
    walk_interval_s: float = 120.0
    """Holders of a published key are searched anew this often even if all answer (joined nodes may be nearer)."""
    subnet_limit: int = 16
    """Table entries from one /24 (IPv4) or /56 (IPv6) of public addresses; loopback and private ranges are free."""
    subnet_bucket_limit: int = 4
    """The same, per bucket."""
    bootstrap_retry_s: float = 1.0
    """First pause between attempts to reach a bootstrap node while alone; doubles up to `bootstrap_retry_max_s`, with jitter."""
    bootstrap_retry_max_s: float = 15.0
    bootstrap_recheck_s: float = 60.0
    """A node that has peers looks at its bootstrap nodes this often: so two halves of a healed partition meet."""
    document_offer_s: float = 300.0
    """How often a holder offers its documents to the nodes nearest to their keys."""
    remembered_peers: int = 200
    save_interval_s: float = 30.0
    watch_lease_s: float = 30.0
    """How long a holder pushes changes to a watcher before it must ask again."""

    @classmethod
    def local(cls) -> DirectoryConfig:
        """Everything on one machine."""
        return replace(cls(), initial_timeout_s=0.15, bootstrap_retry_s=0.2, bootstrap_retry_max_s=3.0)

    @classmethod
    def lan(cls) -> DirectoryConfig:
        return replace(cls(), initial_timeout_s=0.2, bootstrap_retry_max_s=5.0)

    @classmethod
    def wan(cls) -> DirectoryConfig:
        return replace(cls(), initial_timeout_s=0.5, lookup_timeout_s=2.0)
