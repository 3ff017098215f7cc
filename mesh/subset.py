"""Which workers a proxy keeps links to, when there are too many for all of them. Pure.

Every proxy decides alone, from the same records, without a word to the others:

* *Deterministic*: each worker ranks the proxies by a hash of both and belongs to the first ``copies`` of them.
* *Balanced*: a worker is linked by as many proxies as any other; the load of a proxy is binomial around the mean.
* *Stable*: a proxy that comes or goes moves only the workers that gain or lose it; another worker coming or going moves nobody.

``copies`` is as many as keeps the mean number of links of a proxy at ``size``, but at least `MIN_COPIES`, so that losing one or two proxies
takes no worker out of service.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

MIN_COPIES = 3


def copies_for(workers: int, proxies: int, *, size: int) -> int:
    """How many proxies link to each worker: size · proxies / workers, at least `MIN_COPIES`, at most all."""
    if not workers or workers <= size:
        return proxies
    return max(1, min(proxies, max(MIN_COPIES, size * proxies // workers)))


def place_of(worker: bytes, proxy: bytes, proxies: Iterable[bytes]) -> int:
    """How many of ``proxies`` come before ``proxy`` in the worker's ranking (highest random weight, Thaler 1996)."""
    own = _weight(worker, proxy)
    return sum(other != proxy and _weight(worker, other) < own for other in proxies)


def subset(workers: Iterable[bytes], proxy: bytes, proxies: Iterable[bytes], *, size: int) -> list[bytes]:
    """The node ids of the workers that ``proxy`` should link to, about ``size`` of them or all if there are no more.

    ``proxies`` are the node ids of all live proxies, with or without ``proxy`` itself.
    """
    all_workers = list(workers)
    all_proxies = sorted({*proxies, proxy})
    copies = copies_for(len(all_workers), len(all_proxies), size=size)
    if copies >= len(all_proxies):
        return all_workers
    return [worker for worker in all_workers if place_of(worker, proxy, all_proxies) < copies]


def _weight(worker: bytes, proxy: bytes) -> bytes:
    return hashlib.blake2s(worker + proxy, digest_size=8).digest()
