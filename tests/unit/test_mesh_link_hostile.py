"""An enrolled peer that is malicious: whatever it sends, it loses its own link and costs nobody else anything. Honest peers never do."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mesh.errors import EngineUnavailable, ProtocolError
from mesh.link.allowance import BURST, LATE_BYTES, PER_S, Allowance
from mesh.link.frames import MAX_PAYLOAD_BYTES, Frame, encode_control, encode_credit, encode_frame
from mesh.link.link import MAX_INCOMING_STREAMS, WINDOW_BYTES, IncomingStream
from tests.support.clocks import StoppedClock
from tests.support.pipe import Attacked, Pair, Sink, attacked, linked

OPEN = encode_control(Frame.OPEN, 1, {})


async def answering(victim: Attacked, *, eager: bool = True) -> Sink:
    """The victim has asked its peer something, on stream 1."""
    sink = Sink(eager=eager)
    sink.stream = victim.link.open({}, sink)
    return sink


# -- floods


FLOODS: dict[str, Callable[[int], bytes]] = {
    "pings": lambda _: encode_frame(Frame.PING, 0, bytes(8)),
    "pongs": lambda _: encode_frame(Frame.PONG, 0, bytes(8)),
    "loads": lambda _: encode_control(Frame.LOAD, 0, {}),
    "large loads": lambda _: encode_control(Frame.LOAD, 0, {"x": bytes(60_000)}),
    "records": lambda _: encode_control(Frame.RECORD, 0, {}),
    "frames of the future": lambda _: encode_frame(200, 0),
    "streams opened and cancelled": lambda n: encode_control(Frame.OPEN, 1 + 2 * n, {}) + encode_frame(Frame.CANCEL, 1 + 2 * n),
    "credit of nothing": lambda n: (OPEN if not n else b"") + encode_credit(1, 0),
    "ends of a request": lambda n: (OPEN if not n else b"") + encode_control(Frame.END, 1, {}),
}


@pytest.mark.parametrize("name", FLOODS)
async def test_flood_of_frames_that_cost_the_sender_nothing_ends_its_link(name: str) -> None:
    victim, other = await attacked(clock=StoppedClock()), await linked()
    for start in range(0, int(BURST) + 1_000, 500):
        await victim.send(b"".join(FLOODS[name](number) for number in range(start, start + 500)))
        if victim.link.closed:
            break
    assert victim.link.closed
    assert victim.owner.lost == ["more control frames than an honest peer sends"]
    assert not other.alice.closed


@pytest.mark.parametrize("kind", [Frame.ACCEPTED, Frame.PROGRESS, Frame.HEAD])
async def test_flood_on_an_answer_ends_the_link(kind: Frame) -> None:
    victim = await attacked(dialled=True, clock=StoppedClock())
    await answering(victim)
    for _ in range(int(BURST) // 600 + 2):
        await victim.send(encode_control(kind, 1, {}) * 600)
    assert victim.link.closed


@pytest.mark.parametrize("dialled", [True, False])
async def test_data_without_a_byte_ends_the_link(dialled: bool) -> None:
    victim = await attacked(dialled=dialled)
    if dialled:
        await answering(victim)
    else:
        await victim.send(OPEN)
    await victim.send(encode_frame(Frame.DATA, 1, b""))
    assert victim.link.closed


async def test_data_on_streams_that_are_over_is_passed_over_as_far_as_it_can_have_been_under_way() -> None:
    victim = await attacked(dialled=True)
    sink = await answering(victim)
    sink.stream.cancel()
    piece = encode_frame(Frame.DATA, 1, bytes(MAX_PAYLOAD_BYTES))
    await victim.send(*[piece] * (WINDOW_BYTES // MAX_PAYLOAD_BYTES))
    assert not victim.link.closed
    await victim.send(*[piece] * (LATE_BYTES // MAX_PAYLOAD_BYTES))
    assert victim.owner.lost == ["DATA on streams that are over"]


@pytest.mark.parametrize("last", [encode_control(Frame.END, 1, {}), encode_control(Frame.ERROR, 1, {"code": "overloaded"})])
async def test_data_after_the_peers_own_end_ends_the_link(last: bytes) -> None:
    victim = await attacked(dialled=True)
    sink = await answering(victim)
    await victim.send(encode_frame(Frame.DATA, 1, b"x"), last, last, encode_frame(Frame.DATA, 1, b"y"))
    assert victim.link.closed
    assert (bytes(sink.data), len(sink.errors) + (sink.trailer is not None)) == (b"x", 1)


@pytest.mark.parametrize("stamp", [float("nan"), float("inf"), float("-inf"), 1e308, -1e308, 0.0])
async def test_pong_that_lies_about_the_time_is_no_round_trip(stamp: float) -> None:
    victim = await attacked()
    await victim.send(encode_frame(Frame.PONG, 0, struct.pack(">d", stamp)))
    assert 0.0 <= victim.link.stats.round_trip_s < 3600.0


async def test_honest_storm_is_no_attack() -> None:
    """All streams a link may have, opened, answered in part, and cancelled at one moment with their windows full."""
    pair = await linked()
    sinks = [pair.open(eager=False) for _ in range(MAX_INCOMING_STREAMS)]
    await pair.settle()
    for stream, _ in pair.bob_owner.opened[:100]:
        for _ in range(WINDOW_BYTES // MAX_PAYLOAD_BYTES):
            assert stream.send_now(bytes(MAX_PAYLOAD_BYTES))
    for stream, _ in pair.bob_owner.opened[100:]:
        stream.send_head({"status": 200})
        stream.send_now(b"x")
    for sink in sinks:
        sink.stream.cancel()
    await pair.settle()
    assert not pair.alice.closed
    assert not pair.bob.closed


async def test_refused_streams_may_still_send_their_bodies() -> None:
    victim = await attacked()
    numbers = [1 + 2 * index for index in range(MAX_INCOMING_STREAMS + 5)]
    await victim.send(b"".join(encode_control(Frame.OPEN, number, {}) for number in numbers))
    await victim.send(*[encode_frame(Frame.DATA, numbers[-1], bytes(MAX_PAYLOAD_BYTES))] * 4, encode_control(Frame.END, numbers[-1], {}))
    assert not victim.link.closed


def test_allowance_comes_back_with_time() -> None:
    allowance = Allowance(0.0)
    now = 0.0
    for _ in range(20):
        now += 1.0
        for _ in range(int(PER_S)):
            if not allowance.spend(Frame.PING, 8):
                allowance.refill(now)
    for _ in range(4):
        while allowance.spend(Frame.PING, 8):
            pass
        if allowance._at < now:
            allowance.refill(now)
    with pytest.raises(ProtocolError):
        allowance.refill(now)


# -- state machines


class HonestPeers(RuleBasedStateMachine):
    """Two honest ends, whatever they do and however the network delays it: every byte arrives once, in order, and the link stays up."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.problems: list[dict[str, Any]] = []
        self.runner.get_loop().set_exception_handler(lambda _, context: self.problems.append(context))
        self.pair: Pair = self.runner.run(linked())
        self.asked: list[_Asked] = []
        self.rng = random.Random(0)

    def run(self, step: Callable[[], Any]) -> None:
        async def main() -> None:
            result = step()
            if asyncio.iscoroutine(result):
                await result

        self.runner.run(main())

    def open_requests(self) -> list[_Asked]:
        return [asked for asked in self.asked if not asked.over]

    def pick(self, number: int) -> _Asked:
        asked = self.open_requests()
        return asked[number % len(asked)]

    @rule(eager=st.booleans())
    def open(self, eager: bool) -> None:
        self.run(lambda: self.asked.append(_Asked(self.pair, eager)))

    @precondition(lambda self: self.open_requests())
    @rule(which=st.integers(0, 50), size=st.sampled_from([1, 100, MAX_PAYLOAD_BYTES, WINDOW_BYTES, WINDOW_BYTES + 7]))
    def send_body(self, which: int, size: int) -> None:
        self.run(lambda: self.pick(which).send_body(self.rng.randbytes(size)))

    @precondition(lambda self: self.open_requests())
    @rule(which=st.integers(0, 50))
    def end_body(self, which: int) -> None:
        self.run(lambda: self.pick(which).end_body())

    @precondition(lambda self: self.open_requests())
    @rule(which=st.integers(0, 50), size=st.sampled_from([1, 50, 5000, MAX_PAYLOAD_BYTES + 1, WINDOW_BYTES * 2]))
    def answer(self, which: int, size: int) -> None:
        self.run(lambda: self.pick(which).answer(self.rng.randbytes(size)))

    @precondition(lambda self: self.open_requests())
    @rule(which=st.integers(0, 50), count=st.integers(1, WINDOW_BYTES))
    def consume(self, which: int, count: int) -> None:
        self.run(lambda: self.pick(which).consume(count))

    @precondition(lambda self: self.open_requests())
    @rule(which=st.integers(0, 50), how=st.sampled_from(["end", "fail", "cancel"]))
    def finish(self, which: int, how: str) -> None:
        self.run(lambda: self.pick(which).finish(how))

    @rule(piece=st.sampled_from([None, 1_000, 70_000]), hold=st.booleans(), mine=st.booleans())
    def network(self, piece: int | None, hold: bool, mine: bool) -> None:
        end = self.pair.alice_end if mine else self.pair.bob_end
        if piece is None or len(end._buffer) < 50 * piece:
            end.piece_bytes = piece
        self.run(end.hold if hold else end.release)

    @rule()
    def settle(self) -> None:
        self.run(self.pair.settle)

    @invariant()
    def nothing_is_wrong(self) -> None:
        assert self.problems == []
        assert not self.pair.alice.closed, self.pair.alice_owner.lost
        assert not self.pair.bob.closed, self.pair.bob_owner.lost
        for asked in self.asked:
            asked.check()

    def waits(self, asked: _Asked) -> bool:
        """Whether something of it is still on its way."""
        tasks = [task for task in (asked.sending, asked.answering) if task is not None]
        return not asked.over and (any(not task.done() for task in tasks) or len(asked.sink.data) < len(asked.answered))

    def teardown(self) -> None:
        async def rest() -> None:
            for end in (self.pair.alice_end, self.pair.bob_end):
                end.piece_bytes = None
                end.release()
            for _ in range(200):
                await self.pair.settle()
                for asked in self.asked:
                    asked.consume(10 * WINDOW_BYTES)
                    assert asked.over or asked.stream is not None
                if not any(self.waits(asked) for asked in self.asked):
                    break
            for asked in self.open_requests():
                asked.end_body()
                asked.finish("end")
            await self.pair.settle()
            for asked in self.asked:
                asked.check_whole()
            assert self.pair.alice.streams == self.pair.bob.streams == 0
            for task in [task for asked in self.asked for task in asked.tasks]:
                task.cancel()

        try:
            self.runner.run(rest())
            self.nothing_is_wrong()
        finally:
            self.runner.close()


class _Asked:
    """One request from Alice to Bob, and what each side should see of it."""

    def __init__(self, pair: Pair, eager: bool) -> None:
        self.pair = pair
        self.sink = pair.open({"n": len(pair.bob_owner.opened)}, eager=eager)
        self.eager = eager
        self.consumed = 0
        self.sent = bytearray()
        self.body_done = False
        self.answered = bytearray()
        self.over = ""
        self.tasks: list[asyncio.Task[Any]] = []
        self.body: asyncio.Task[Any] | None = None
        self.sending: asyncio.Task[Any] | None = None
        self.answering: asyncio.Task[Any] | None = None

    @property
    def stream(self) -> IncomingStream | None:
        """Bob's end, once the OPEN has come."""
        number = self.sink.stream.number
        found = next((stream for stream, _ in self.pair.bob_owner.opened if stream.number == number), None)
        if found is not None and self.body is None:
            self.body = self._task(found.read_body(max_bytes=1 << 30))
        return found

    def _task(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(work)
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        self.tasks.append(task)
        return task

    def send_body(self, data: bytes) -> None:
        if not self.body_done and (self.sending is None or self.sending.done()):
            self.sent += data
            self.sending = self._task(self.sink.stream.send(data))

    def end_body(self) -> None:
        if not self.body_done and (self.sending is None or self.sending.done()):
            self.body_done = True
            self.sink.stream.end()

    def answer(self, data: bytes) -> None:
        if self.stream is not None and (self.answering is None or self.answering.done()):
            self.answered += data
            self.answering = self._task(self.stream.send(data))

    def consume(self, count: int) -> None:
        if not self.eager:
            count = min(count, len(self.sink.data) - self.consumed)
            self.consumed += count
            self.sink.stream.consumed(count)

    def finish(self, how: str) -> None:
        if how == "cancel":
            self.over = how
            self.sink.stream.cancel()
        elif self.stream is not None and (self.answering is None or self.answering.done()):
            self.over = how
            if how == "end":
                self.stream.end({"n": 1})
            else:
                self.stream.fail(EngineUnavailable("died"))

    def check(self) -> None:
        assert self.sink.stream.unread <= WINDOW_BYTES
        assert self.answered.startswith(self.sink.data)
        assert len(self.sink.errors) + (self.sink.trailer is not None) <= 1
        assert not self.sink.errors or self.over == "fail"

    def check_whole(self) -> None:
        if self.over == "end" and self.sink.trailer is not None:
            assert self.sink.data == self.answered
        if self.over == "end":
            assert self.sink.trailer == {"n": 1}
        if self.body is not None and self.body.done() and not self.body.cancelled() and self.body.exception() is None:
            assert self.body.result() == self.sent


class HostilePeer(RuleBasedStateMachine):
    """A link against a peer that keeps the rules until it breaks one: up for as long as it keeps them, gone as soon as it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.problems: list[dict[str, Any]] = []
        self.runner.get_loop().set_exception_handler(lambda _, context: self.problems.append(context))
        self.broken = False

    @initialize(dialled=st.booleans())
    def begin(self, dialled: bool) -> None:
        self.victim: Attacked = self.runner.run(attacked(dialled=dialled))
        self.own = 2 if dialled else 1  # the peer's own streams
        self.newest = 0
        self.bodies: dict[int, int] = {}
        """The peer's open streams: credit it has left, -1 once it has ended the body."""
        self.sinks: dict[int, Sink] = {}
        self.credit: dict[int, int] = {}

    def send(self, *frames: bytes) -> None:
        self.runner.run(self.victim.send(*frames))

    def ask(self) -> None:
        async def main() -> None:
            sink = Sink(eager=False)
            sink.stream = self.victim.link.open({}, sink)
            self.sinks[sink.stream.number] = sink
            self.credit[sink.stream.number] = WINDOW_BYTES

        self.runner.run(main())

    @precondition(lambda self: not self.broken)
    @rule()
    def victim_asks(self) -> None:
        self.ask()

    @precondition(lambda self: not self.broken)
    @rule(skip=st.integers(0, 3))
    def open(self, skip: int) -> None:
        number = (self.newest + 2 if self.newest else self.own) + 2 * skip
        self.newest = number
        self.bodies[number] = WINDOW_BYTES
        self.send(encode_control(Frame.OPEN, number, {"size": 5}))

    @precondition(lambda self: not self.broken and any(left > 0 for left in self.bodies.values()))
    @rule(size=st.integers(1, MAX_PAYLOAD_BYTES))
    def body(self, size: int) -> None:
        number = next(number for number, left in self.bodies.items() if left > 0)
        size = min(size, self.bodies[number])
        self.bodies[number] -= size
        self.send(encode_frame(Frame.DATA, number, bytes(size)))

    @precondition(lambda self: not self.broken and self.bodies)
    @rule(last=st.booleans())
    def end_or_cancel(self, last: bool) -> None:
        number = next(iter(self.bodies))
        if last:
            del self.bodies[number]
            self.send(encode_frame(Frame.CANCEL, number))
        else:
            self.bodies[number] = -1
            self.send(encode_control(Frame.END, number, {}))

    @precondition(lambda self: not self.broken and self.sinks)
    @rule(size=st.integers(1, MAX_PAYLOAD_BYTES), kind=st.sampled_from(["data", "accepted", "progress", "head", "credit", "end", "error"]))
    def answer(self, size: int, kind: str) -> None:
        number, sink = next(iter(self.sinks.items()))
        match kind:
            case "data":
                size = min(size, self.credit[number])
                self.credit[number] -= size
                if size:
                    self.send(encode_frame(Frame.DATA, number, bytes(size)))
            case "credit":
                self.send(encode_credit(number, size))
            case "end":
                del self.sinks[number]
                self.send(encode_control(Frame.END, number, {"out": 1}))
                assert sink.trailer == {"out": 1}
            case "error":
                del self.sinks[number]
                self.send(encode_control(Frame.ERROR, number, {"code": "overloaded"}))
                assert len(sink.errors) == 1
            case _:
                self.send(encode_control(Frame[kind.upper()], number, {}))

    @precondition(lambda self: not self.broken)
    @rule(
        how=st.sampled_from(
            [
                "never opened",
                "back",
                "parity",
                "empty",
                "overdraft",
                "giant",
                "garbage",
                "hello",
                "link",
                "type",
                "after the end",
                "credit overflow",
            ]
        )
    )
    def break_a_rule(self, how: str) -> None:
        other = 3 - self.own
        open_body = next((number for number, left in self.bodies.items() if left >= 0), 0)
        ended_body = next((number for number, left in self.bodies.items() if left < 0), 0)
        match how:
            case "never opened":
                frame = encode_frame(Frame.DATA, other + 2000, b"x")
            case "back":
                if not self.newest:
                    return
                frame = encode_control(Frame.OPEN, self.newest, {})
            case "parity":
                frame = encode_control(Frame.OPEN, other + 2000, {})
            case "empty" if open_body:
                frame = encode_frame(Frame.DATA, open_body, b"")
            case "overdraft" if open_body:
                frame = encode_frame(Frame.DATA, open_body, bytes(MAX_PAYLOAD_BYTES)) * 5
            case "after the end" if ended_body:
                frame = encode_frame(Frame.DATA, ended_body, b"x")
            case "credit overflow" if self.bodies:
                frame = encode_credit(next(iter(self.bodies)), 2**31) * 2
            case "giant":
                frame = struct.pack(">IIB", MAX_PAYLOAD_BYTES + 1, 0, Frame.PING)
            case "garbage":
                frame = encode_frame(Frame.LOAD, 0, b"\xc1\xff")
            case "hello":
                frame = encode_control(Frame.HELLO, 0, {"v": 1})
            case "link":
                frame = encode_control(Frame.HEAD, 0, {})
            case "type" if open_body:
                frame = encode_control(Frame.HEAD, open_body, {})
            case _:
                return
        self.broken = True
        self.send(frame)

    @precondition(lambda self: self.broken)
    @rule()
    def go_on(self) -> None:
        """What comes after a broken rule is heard by nobody."""
        self.send(OPEN)

    @invariant()
    def link_is_up_as_long_as_the_peer_keeps_the_rules(self) -> None:
        assert self.problems == []
        if hasattr(self, "victim"):
            assert self.victim.link.closed == self.broken, self.victim.owner.lost
            if self.broken:
                assert self.victim.link.streams == 0
                assert all(len(sink.errors) == 1 for sink in self.sinks.values())

    def teardown(self) -> None:
        self.runner.close()


LIMITS = settings(max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TestHonestPeers = HonestPeers.TestCase
TestHonestPeers.settings = LIMITS
TestHostilePeer = HostilePeer.TestCase
TestHostilePeer.settings = LIMITS
