"""One attempt of one request on one worker: the link's stream in, the client's bytes out."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from mesh.errors import InvalidRequest, MeshError, ProtocolError, UpstreamTimeout, WorkerLost
from mesh.link.link import OutgoingStream
from proxy.downstream import Downstream
from proxy.fleet import Worker
from proxy.moves import Passage

SLOW_CLIENT_BYTES = 64 * 1024
"""With more than this unsent to the client, the worker gets no more credit until it has drained."""
QUIET_STREAM_S = 10.0
"""So long a stream that could go on elsewhere waits for an engine that stands still, unless that has been stopped."""
SLOW_CLIENT_S = 60.0
"""A client that takes not a byte for so long, with an answer waiting for it, is given up."""
MOST_TOKENS = 10**9
"""A worker that claims to have counted more is not believed."""


class Attempt:
    """Implements `mesh.link.link.StreamSink`. ``await run()`` returns the worker's trailer or raises what went wrong.

    ``tokens`` is the prefill it gives the worker to do, 0 if that is too little to count; ``loop`` the running one, ``now`` its time.
    ``passage`` follows a stream, so that it can go on at another worker; this attempt goes on with it if it has begun.
    """

    __slots__ = (
        "_client_seen",
        "_done",
        "_downstream",
        "_draining",
        "_flow",
        "_headers",
        "_held",
        "_loop",
        "_passage",
        "_resumes",
        "_sent_before",
        "_started_at",
        "_stream",
        "_tokens",
        "_transport",
        "_worker_seen",
        "accepted_at",
        "first_byte_at",
        "last_sign_at",
        "may_move",
        "worker",
    )

    def __init__(
        self,
        worker: Worker,
        downstream: Downstream,
        headers: str,
        *,
        loop: asyncio.AbstractEventLoop,
        now: float,
        tokens: int = 0,
        passage: Passage | None = None,
    ) -> None:
        self.worker = worker
        self.accepted_at: float | None = None
        self.first_byte_at: float | None = None
        self.last_sign_at = now
        self.may_move = False
        """Whether it may still be tried elsewhere because its worker's engine stands still; once is enough."""
        self._downstream = downstream
        self._transport = downstream.transport
        self._headers = headers
        self._tokens = tokens
        self._passage = passage
        self._resumes = downstream.started
        self._sent_before = downstream.bytes_sent
        self._started_at = now
        self._held = 0
        self._worker_seen = (0, 0)
        self._client_seen = (now, 0)
        self._flow: tuple[float, int] | None = None
        self._draining: asyncio.Task[None] | None = None
        self._stream: OutgoingStream | None = None
        self._loop = loop
        self._done: asyncio.Future[dict[str, Any]] = loop.create_future()

    async def run(self, head: Mapping[str, Any], body: bytes | bytearray) -> dict[str, Any]:
        """Send the request, pass the answer on, return the trailer. Raises a `MeshError`; cancelling it cancels the worker's work."""
        stream = self._stream = self.worker.link.open(head, self)
        if self._tokens:
            self.worker.sent(stream.number, self._tokens)
        try:
            if self._passage is not None:
                stream.trail = self._passage.trail
            if self._resumes or not stream.send_whole(body):
                try:
                    if self._resumes and self._passage is not None:
                        await stream.send(bytes(self._passage.trail))
                    await stream.send(body)
                except WorkerLost:
                    return await self._done  # the answer came early, or the link broke: either way it is said there
                stream.end()
            return await self._done
        finally:
            stream.cancel()
            self._stream = None  # each would keep the other, and all that the request had, until the cycle collector comes
            if self._tokens:
                self.worker.settled(stream.number)
            if self._draining is not None:
                self._draining.cancel()
            if self._done.done() and not self._done.cancelled():
                self._done.exception()  # whoever cancelled this does not want to hear of it

    def fail(self, error: MeshError) -> None:
        """Give up on this attempt."""
        if not self._done.done():
            self._done.set_exception(error)
            if self._stream is not None:
                self._stream.cancel()

    def check_time(self, now: float, *, patience_s: float, most_s: float) -> None:
        """Fail if the worker was silent for ``patience_s``, or the client took nothing for `SLOW_CLIENT_S`. Called about once a second.

        Not silent is a worker that sends bytes, reports progress or takes the request's body. Progress alone buys ``most_s``, no more.
        """
        if self.may_move and self.worker.stuck and (self.first_byte_at is None or self._gone_quiet(now)):
            self.fail(WorkerLost("the worker's engine stands still"))
        if self.first_byte_at is None and now - self._started_at > most_s:
            self.fail(UpstreamTimeout(f"the answer did not begin within {most_s:.0f} s"))
        if self._held:
            self.last_sign_at = now
            unsent = self._transport.get_write_buffer_size()
            if unsent != self._client_seen[1]:
                self._client_seen = (now, unsent)
            elif now - self._client_seen[0] > SLOW_CLIENT_S:
                self.fail(InvalidRequest("The client stopped reading the answer"))
            return
        self._client_seen = (now, 0)
        seen = (self._downstream.bytes_sent, self._stream.granted if self._stream is not None else 0)
        if seen != self._worker_seen:
            self._worker_seen, self.last_sign_at = seen, now
        elif now - self.last_sign_at > patience_s:
            self.fail(UpstreamTimeout(f"the worker gave no sign for {patience_s:.0f} s"))

    def _gone_quiet(self, now: float) -> bool:
        """Whether a stream that had begun should go on elsewhere: later than one that had not, since moving it costs a prefill, and a step
        over a long prompt looks the same. A stopped process is no step.
        """
        movable = self._passage is not None and not self._passage.fixed and bool(self._passage.trail)
        return movable and not self._held and (self.worker.halted or now - self.last_sign_at > QUIET_STREAM_S)

    def measure(self, now: float, tokens: int = 0) -> None:
        """Tell its worker's health how fast the answer has come since this was last called.

        ``tokens``, once it is complete, are those of an answer that came as a whole. A first byte tells something only of a short prompt,
        and an answer that waits for its client nothing.
        """
        if self.first_byte_at is None or self.accepted_at is None:
            return
        health, flow = self.worker.health, self._flow
        if not self._downstream.is_stream:
            if tokens:
                health.whole.add(tokens, now - self.accepted_at)
            return
        sent = self._downstream.bytes_sent
        self._flow = (now, sent)
        if self._held:
            return
        if flow is not None:
            health.stream.add(sent - flow[1], now - flow[0])
            return
        health.stream.add(sent - self._sent_before, now - self.first_byte_at)
        if not self._tokens:
            health.first.add(self.first_byte_at - self.accepted_at, 1.0)

    # -- StreamSink

    def on_accepted(self) -> None:
        self.accepted_at = self._loop.time()

    def on_progress(self, info: dict[str, Any]) -> None:
        if self.first_byte_at is not None:
            return  # from then on only bytes are a sign: a worker cannot hold a client for ever by saying that it is at it
        self.last_sign_at = self._loop.time()

    def on_head(self, head: dict[str, Any]) -> None:
        if self._tokens and self._stream is not None:
            self.worker.settled(self._stream.number)
        ago_ms = head.get("acc")
        if self.accepted_at is None and type(ago_ms) is int and ago_ms >= 0:
            self.accepted_at = max(self._started_at, self._loop.time() - ago_ms / 1000)
        try:
            if self._resumes and self._passage is not None:
                self._passage.resume(head, self.worker)
                self._resumes = False
                return
            if self._passage is not None:
                self._passage.begin(head)
            took_ms = round((self._loop.time() - self._started_at) * 1000)
            self._downstream.prepare(head, f"{self._headers}openai-processing-ms: {took_ms}\r\n")
        except ProtocolError as error:
            self.fail(error)

    def on_data(self, data: bytes) -> None:
        if self._transport.is_closing() or self._done.done():
            return
        if self.first_byte_at is None:
            self.first_byte_at = self._loop.time()
            if self._resumes:
                self.fail(ProtocolError("DATA before HEAD"))
                return
        try:
            self._downstream.write(data)
        except ProtocolError as error:
            self.fail(error)
            return
        if self._transport.get_write_buffer_size() > SLOW_CLIENT_BYTES:
            self._hold(len(data))
        elif self._stream is not None:
            self._stream.consumed(len(data))

    def on_end(self, trailer: dict[str, Any]) -> None:
        if self._done.done():
            return
        try:
            if self._resumes:
                raise ProtocolError("END before HEAD")
            self._downstream.finish()
        except ProtocolError as error:
            self._done.set_exception(error)
        else:
            self._done.set_result(trailer)

    def on_error(self, error: MeshError) -> None:
        if not self._done.done():
            self._done.set_exception(error)

    # -- slow clients

    def _hold(self, count: int) -> None:
        self._held += count
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        """Give the held credit back once the client has read what it was sent."""
        writer = self._downstream.request.writer
        while self._held and not self._transport.is_closing():
            try:
                await writer.drain()
            except ConnectionError:
                return  # the client is gone, and the request's task hears of it by itself
            if self._transport.get_write_buffer_size() > SLOW_CLIENT_BYTES // 2:
                await asyncio.sleep(0.02)
                continue
            held, self._held = self._held, 0
            if self._stream is not None:
                self._stream.consumed(held)
        self._draining = None


def cached_of(trailer: Mapping[str, Any]) -> int:
    """Prompt tokens that the engine found cached; zero where a worker sent nonsense."""
    cached = trailer.get("cached", 0)
    return cached if type(cached) is int and 0 <= cached <= MOST_TOKENS else 0


def usage_of(trailer: Mapping[str, Any]) -> tuple[int, int]:
    """Prompt and completion tokens of the whole answer from the last trailer; zeros where a worker sent nonsense."""
    prompt, completion, resumed = trailer.get("in", 0), trailer.get("out", 0), trailer.get("base", 0)
    if not type(prompt) is type(completion) is type(resumed) is int:
        return 0, 0
    if not (0 <= resumed <= prompt <= MOST_TOKENS and 0 <= completion <= MOST_TOKENS):
        return 0, 0
    return prompt - resumed, completion + resumed
