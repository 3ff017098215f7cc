"""A worker whose engine costs nothing: the project's own node, link and frames, and tokens made in place instead of asked for by HTTP.

A Python worker that reads thousands of streams from an engine needs more of a core than the proxy in front of it. On a machine with one
core for everything but the proxy it would be what is measured. This one takes the worker's options (`mesh-worker --help`) and replaces
only its gateway: each step, every open stream gets a token as `engine.c` would have sent it, stamp included, all in one write. A proxy that
keeps trails gets them, as with an engine that tells token ids.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import worker.node
from mesh.errors import WorkerError
from mesh.link.link import IncomingStream
from worker.cli import main
from worker.gateway import Gateway
from worker.moving.trail import encode_event

STEP_S = 0.02
BODY_DEADLINE_S = 30.0
EVENT = (
    b'data: {"id":"chatcmpl-%016x","object":"chat.completion.chunk","created":1790000000,"model":"bench",'
    b'"choices":[{"index":0,"delta":{"content":"@%b"},"logprobs":null,"finish_reason":null}]}\n\n'
)
ANSWER = (
    b'{"id":"chatcmpl-%016x","object":"chat.completion","created":1790000000,"model":"bench","choices":[{"index":0,"message":'
    b'{"role":"assistant","content":"Hello there, this is an answer of a typical short length."},"logprobs":null,'
    b'"finish_reason":"stop"}],"usage":{"prompt_tokens":12,"completion_tokens":16,"total_tokens":28}}'
)
STAMP = b"%019d"
TRAIL = encode_event(20, [100_000])


class _Flow:
    """One open stream of tokens: what comes before and after the stamp, and how many are left."""

    __slots__ = ("after", "arrived", "before", "left", "stream", "total", "trail")

    def __init__(self, stream: IncomingStream, number: int, tokens: int, *, trail: bool) -> None:
        self.stream = stream
        self.trail = TRAIL if trail else None
        self.before, self.after = (EVENT % (number, b"\0")).split(b"\0")
        self.left = self.total = tokens
        self.arrived = STAMP % time.monotonic_ns()


class TokenGateway(Gateway):
    """In the place of `worker.gateway.Gateway`."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._flows: dict[IncomingStream, _Flow] = {}
        self._serving: set[asyncio.Task[None]] = set()
        self._stepping: asyncio.Task[None] | None = None

    def open(self, stream: IncomingStream, head: dict[str, Any]) -> None:
        self._stepping = self._stepping or asyncio.create_task(self._tick())
        task = asyncio.create_task(self._hand_out(stream, trail="trail" in head))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def stop(self) -> None:
        for task in (*self._serving, *((self._stepping,) if self._stepping else ())):
            task.cancel()
        await super().stop()

    async def _hand_out(self, stream: IncomingStream, *, trail: bool) -> None:
        try:
            async with asyncio.timeout(BODY_DEADLINE_S):
                body = json.loads(await stream.read_body(max_bytes=1 << 30))
        except (TimeoutError, ValueError):
            stream.fail(WorkerError("no body"))
            return
        self.served += 1
        stream.accept()
        if body.get("stream"):
            stream.send_head({"status": 200, "type": "text/event-stream"})
            self._flows[stream] = _Flow(stream, self.served, int(body.get("max_tokens") or 16), trail=trail)
            return
        answer = ANSWER % self.served
        stream.send_head({"status": 200, "type": "application/json", "length": len(answer)})
        await stream.send(answer)
        stream.end({"prompt_tokens": 12, "completion_tokens": 16, "total_tokens": 28})

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due = max(due + STEP_S, loop.time())
            await asyncio.sleep(max(0.0, due - loop.time()))
            stamp = STAMP % time.monotonic_ns()
            over = [stream for stream, flow in self._flows.items() if not self._step(stream, flow, stamp)]
            for stream in over:
                del self._flows[stream]

    def _step(self, stream: IncomingStream, flow: _Flow, stamp: bytes) -> bool:
        """Send a token; whether more are to come. A stream without credit skips the step."""
        if stream.done:
            return False
        if flow.arrived:
            stamp, flow.arrived = stamp + b"," + flow.arrived, b""
        event = flow.before + stamp + flow.after
        if stream.send_now(event) if flow.trail is None else stream.send_tokens_now(flow.trail, event):
            flow.left -= 1
        if flow.left:
            return True
        if stream.send_now(b"data: [DONE]\n\n"):
            stream.end({"prompt_tokens": 12, "completion_tokens": flow.total, "total_tokens": 12 + flow.total})
            return False
        flow.left = 1
        return True


if __name__ == "__main__":
    setattr(worker.node, "Gateway", TokenGateway)  # noqa: B010
    main()
