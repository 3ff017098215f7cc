"""What a proxy knows of its workers' prefixes: exactly what they told, whatever was lost between, and what it hopes for a while."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import ProtocolError
from mesh.prefix import MAX_HASHES_PER_FRAME, MAX_HELD, Chain, PrefixNews, encode_news, news_frames, parse_news
from proxy.prefixes import HOPE_S, MAX_HOPED, NEWS_BURST, PrefixIndex
from worker.prefixes import HeldPrefixes


def chain(*names: int) -> Chain:
    return tuple(name.to_bytes(8) for name in names)


def index(*workers: str) -> PrefixIndex[str]:
    made: PrefixIndex[str] = PrefixIndex()
    for worker in workers:
        made.join(worker, now=0)
    return made


def dump(*names: int) -> PrefixNews:
    return PrefixNews(anew=True, added=chain(*names))


def test_depth_of_each_worker_is_found_at_once() -> None:
    known = index("a", "b", "c", "d")
    known.take("a", dump(1, 2, 3), now=1)
    known.take("b", dump(1, 2, 3, 4, 5), now=1)
    known.take("c", dump(1, 3, 4), now=1)
    known.take("d", dump(2, 3), now=1)
    assert known.find(chain(1, 2, 3, 4)) == {"a": 3, "b": 4, "c": 1}
    assert known.find(chain(9)) == known.find(()) == {}


def test_worker_that_leaves_takes_everything_with_it_and_its_place_is_free() -> None:
    known = index("a", "b")
    known.take("a", dump(1, 2), now=1)
    known.take("b", dump(2), now=1)
    known.hope("a", chain(7), now=1)
    known.leave("a")
    assert len(known) == 1
    known.join("c", now=2)
    assert known.find(chain(1, 2)) == {}
    assert known.find(chain(2)) == {"b": 1}
    known.take("a", dump(1), now=3)  # late
    known.hope("a", chain(1), now=3)
    known.leave("a")
    assert known.find(chain(1)) == {}


def test_hope_holds_until_the_worker_has_had_time_to_say_so() -> None:
    known = index("a")
    known.hope("a", chain(1, 2), now=10)
    assert known.find(chain(1, 2, 3)) == {"a": 2}
    known.take("a", PrefixNews(added=chain(1)), now=10.1)
    known.take("a", PrefixNews(), now=10.1 + HOPE_S)
    assert known.find(chain(1, 2)) == {"a": 1}


def test_dump_does_not_end_hope_and_removal_ends_what_was_told_alone() -> None:
    known = index("a")
    known.take("a", dump(1), now=1)
    known.hope("a", chain(1, 2), now=2)
    known.take("a", dump(), now=2.1)
    assert known.find(chain(2)) == {"a": 1}
    assert known.find(chain(1)) == {}


def test_doubt_ends_hope_but_not_what_was_told() -> None:
    known = index("a")
    known.take("a", dump(1), now=1)
    known.hope("a", chain(1, 2), now=2)
    known.doubt("a", chain(1, 2))
    known.doubt("nobody", chain(1))
    assert known.find(chain(1, 2)) == {"a": 1}


def test_hope_is_bounded() -> None:
    known = index("a")
    known.hope("a", chain(*range(2 * MAX_HOPED)), now=1)
    assert len(known) == MAX_HOPED


def test_worker_that_tells_of_too_many_is_stopped() -> None:
    known = index("a")
    frames = list(news_frames(chain(*range(MAX_HELD + 1)), ()))
    for news in frames[:-1]:
        known.take("a", news, now=1)
    with pytest.raises(ProtocolError):
        known.take("a", frames[-1], now=1)


def test_worker_that_tells_too_often_is_stopped_and_an_honest_pace_is_not() -> None:
    known = index("a", "b")
    news = PrefixNews(added=chain(*range(MAX_HASHES_PER_FRAME)))
    for at in range(100):
        known.take("a", news, now=1 + at)
    for _ in range(NEWS_BURST // MAX_HASHES_PER_FRAME - 1):
        known.take("b", news, now=1)
    with pytest.raises(ProtocolError):
        known.take("b", PrefixNews(added=news.added, removed=news.added), now=1)


class Wire:
    """From a worker's index to a proxy's, over links that break: as `worker.announce` sends and `proxy.fleet` takes."""

    def __init__(self) -> None:
        self.held = HeldPrefixes(capacity_tokens=3_000)
        self.known: PrefixIndex[str] = PrefixIndex()
        self.linked = self.informed = False
        self.under_way: list[dict[str, object]] = []

    def link(self) -> None:
        self.lose()
        self.linked, self.informed = True, False
        self.known.join("w", now=0)

    def lose(self) -> None:
        if self.linked:
            self.known.leave("w")
        self.linked = False
        self.under_way.clear()

    def push(self) -> None:
        added, removed = self.held.take_changes()
        if self.linked:
            frames: Iterable[PrefixNews] = news_frames(added, removed)
            if not self.informed:
                frames, self.informed = news_frames(self.held.hashes(), (), anew=True), True
            self.under_way += [encode_news(news) for news in frames]

    def arrive(self, count: int) -> None:
        for fields in self.under_way[:count]:
            self.known.take("w", parse_news(fields), now=0)
        del self.under_way[:count]


@given(st.integers())
def test_proxy_comes_to_know_exactly_what_the_worker_holds_whatever_was_lost_on_the_way(seed: int) -> None:
    rng, wire = random.Random(seed), Wire()
    for _ in range(rng.randint(1, 60)):
        match rng.randint(0, 7):
            case 0:
                wire.link()
            case 1:
                wire.lose()
            case 2 | 3:
                wire.push()
            case 4:
                wire.arrive(rng.randint(0, 3))
            case 5:
                start = rng.randint(0, 30)
                wire.held.drop(chain(*range(start, start + 3)))
            case 6 if rng.random() < 0.2:
                wire.held.clear()
            case _:
                start = rng.randint(0, 30)
                wire.held.add(chain(*range(start, start + rng.randint(0, 20))))
    if not wire.linked:
        wire.link()
    wire.push()
    wire.arrive(len(wire.under_way))
    assert wire.known.held_by("w") == set(wire.held.hashes())
    assert wire.known.find(chain(*range(5, 20))).get("w", 0) == wire.held.depth(chain(*range(5, 20)))
    assert len(wire.known) == len(wire.held.hashes())
