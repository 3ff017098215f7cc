"""The gateway's part in moving streams: what to ask an engine for, and passing on what is to be tracked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import msgspec

from mesh.errors import EngineUnavailable, NotResumed
from worker.engine.base import ModelSpec, Task
from worker.engine.client import EngineClient
from worker.moving.ids import WISHES
from worker.moving.movable import read_asked
from worker.moving.tracked import Piece
from worker.usage import NO_WISH, Prepared, Usage, prepare_body

MAX_ANSWER_BYTES = 16 << 20


class Events(Protocol):
    """An engine's events in, pieces for the client out. ``over``: all has been said, whatever the engine may add; ``failure`` is the
    event in which it said that it gave up."""

    usage: Usage
    complete: bool
    over: bool
    failure: bytes | None

    def usual(self, data: bytes) -> Piece | None:
        """The quick way for one token like those before it, so never the first of an answer; None for what must be `feed`."""
        ...

    def feed(self, data: bytes) -> list[Piece]: ...
    def close(self) -> list[Piece]: ...

    @property
    def so_far(self) -> Usage:
        """What has been said by now, counted by the engine's token ids."""
        ...


def prepare(body: bytes | bytearray, task: Task, model: ModelSpec, *, engine_model: str | None) -> Prepared:
    """The body for the engine, asking for token ids if the stream can move with them; ``fixed`` says why not. Raises `InvalidRequest`."""
    asked = read_asked(body, task)
    fixed, wish = asked if isinstance(asked, str) else "", NO_WISH
    if not fixed:
        if model.token_ids is None:
            fixed = "engine"
        else:
            wish = WISHES[model.token_ids, task]
    return replace(prepare_body(body, task=task, engine_model=engine_model, wish=wish), fixed=fixed)


class EngineRoutes:
    """Small questions to an engine: `worker.moving.resume.Ask`."""

    def __init__(self, client: EngineClient, base_url: str, headers: dict[str, str]) -> None:
        self._client = client
        self._base_url = base_url
        self._headers = headers

    async def __call__(self, path: str, fields: dict[str, Any]) -> dict[str, Any]:
        """Raises `NotResumed` if the engine refuses or answers nonsense, aiohttp's errors if it cannot be reached."""
        body = msgspec.json.encode(fields)
        async with await self._client.post(self._base_url + path, data=body, headers=self._headers) as response:
            raw = bytearray()
            async for piece in response.content.iter_any():
                raw += piece
                if len(raw) > MAX_ANSWER_BYTES:
                    raise NotResumed(f"This worker's engine has no end of an answer on {path}")
            if response.status >= 500 or response.status == 429:
                raise EngineUnavailable(f"The worker's engine answered {response.status} on {path}")
            if response.status != 200:
                raise NotResumed(f"This worker's engine answered {response.status} on {path}")
        try:
            return msgspec.json.decode(raw, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise NotResumed(f"This worker's engine answered nonsense on {path}") from None
