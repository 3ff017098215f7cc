"""Questions to an engine over its own HTTP: is it well, what does it serve, does it really answer, how loaded is it.

Answers are read up to a bound, redirects are not followed, proxies of the environment are not used.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from mesh.errors import EngineError
from worker.engine.base import (
    TOKEN_IDS_ASKED,
    TOKENIZING,
    Engine,
    EngineLoad,
    ListedModel,
    Task,
    TokenIds,
    is_answer,
    parse_listing,
    tells_token_ids,
    warm_up_body,
)

MAX_ANSWER_BYTES = 8 << 20
NO_SUCH_ROUTE = frozenset({404, 405, 501})
KEY_REFUSED = frozenset({401, 403})


class Unanswered(EngineError):
    """The engine did not answer, or not well; asking again may help."""


class Refused(EngineError):
    """Nobody listens at the engine's address."""


class Probe:
    """Asks one engine at one address. `deadline_s` holds for each question but the warm-up, whose caller sets it."""

    def __init__(self, engine: Engine, base_url: str, session: aiohttp.ClientSession, deadline_s: float) -> None:
        self._engine = engine
        self._base_url = base_url
        self._session = session
        self._deadline_s = deadline_s

    async def health(self) -> None:
        """Return when the engine is loaded and alive. Raises Unanswered or Refused."""
        status, path = 404, "/health"
        for path in self._engine.health_paths:
            status, _ = await self._get(path)
            if status == 200:
                return
            if status not in NO_SUCH_ROUTE:
                break
        raise Unanswered(_refusal(path, status) if status in KEY_REFUSED else f"its health check says {status}")

    async def listing(self) -> tuple[ListedModel, ...]:
        """What `/v1/models` lists; nothing when the server has no such route. Raises EngineError."""
        status, raw = await self._get("/v1/models")
        if status in NO_SUCH_ROUTE:
            return ()
        if status != 200:
            raise EngineError(_refusal("/v1/models", status))
        return parse_listing(raw)

    async def load(self) -> EngineLoad | None:
        """Its load; None when it does not tell."""
        if self._engine.metrics_path is None:
            return None
        try:
            status, raw = await self._get(self._engine.metrics_path)
        except EngineError:
            return None
        return self._engine.parse_load(raw.decode("utf-8", "replace")) if status == 200 else None

    async def answers(self, task: Task, engine_name: str) -> bool:
        """Whether the model can do `task`, found out by asking for the least of it. Raises EngineError when it should
        be able to and fails."""
        body = json.dumps(warm_up_body(task, engine_name)).encode()
        status, raw = await self._ask("POST", task.path, body)
        if status == 200:
            return is_answer(task, raw)
        if status in KEY_REFUSED or status == 429 or (status >= 500 and status not in NO_SUCH_ROUTE):
            raise EngineError(_refusal(task.path, status))
        return False

    async def token_ids(self, engine_name: str) -> TokenIds | None:
        """How the engine tells token ids, found out by asking for one; None if it does not, or does not do all that goes with it."""
        for way, fields in TOKEN_IDS_ASKED.items():
            asked = {"model": engine_name, "prompt": "Hi", "max_tokens": 1, "ignore_eos": True, **fields}
            answer = await self._json("/v1/completions", asked)
            if not tells_token_ids(way, answer):
                continue
            for path, question, field in TOKENIZING[way]:
                if field not in await self._json(path, {"model": engine_name, **question}):
                    break
            else:
                return way
        return None

    async def _json(self, path: str, fields: dict[str, Any]) -> dict[str, Any]:
        """The object that the engine answers; empty if it does not."""
        try:
            status, raw = await self._ask("POST", path, json.dumps(fields).encode())
            answer = json.loads(raw) if status == 200 else None
        except Refused:
            raise
        except (EngineError, ValueError, RecursionError):
            return {}
        return answer if isinstance(answer, dict) else {}

    async def _get(self, path: str) -> tuple[int, bytes]:
        try:
            async with asyncio.timeout(self._deadline_s):
                return await self._ask("GET", path, None)
        except TimeoutError as error:
            raise Unanswered(f"it is silent for {self._deadline_s:g} s on {path}") from error

    async def _ask(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            async with self._session.request(method, self._base_url + path, data=body, headers=headers, allow_redirects=False) as response:
                raw = bytearray()
                async for chunk in response.content.iter_chunked(64 << 10):
                    raw += chunk
                    if len(raw) > MAX_ANSWER_BYTES:
                        raise Unanswered(f"its answer on {path} has no end")
                return response.status, bytes(raw)
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.os_error, ConnectionRefusedError):
                raise Refused("nobody listens there") from error
            raise Unanswered(f"it cannot be reached: {error.os_error}") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise Unanswered(f"it broke off on {path}: {type(error).__name__}") from error


@asynccontextmanager
async def session(engine: Engine) -> AsyncIterator[aiohttp.ClientSession]:
    """The HTTP client for an engine's probes."""
    async with aiohttp.ClientSession(
        headers=dict(engine.headers),
        timeout=aiohttp.ClientTimeout(total=None),
        cookie_jar=aiohttp.DummyCookieJar(),
        connector=aiohttp.TCPConnector(limit=4, force_close=True),  # a question a second: not worth the doubt about a kept connection
    ) as client:
        yield client


def _refusal(path: str, status: int) -> str:
    if status in KEY_REFUSED:
        return f"the engine refused the key on {path} ({status}): give the right one by --engine-key-env or -file"
    return f"the engine answered {status} on {path}"
