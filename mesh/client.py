"""The client's side of the HTTP API: what `mesh init` stored, and calls to a proxy."""

from __future__ import annotations

import json
import ssl
import tomllib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from mesh.errors import ApiError, ConfigError, UsageError
from mesh.https import plain_reason
from mesh.identity import write_private

CLIENT_FILE = "client.toml"
MAX_ANSWER_BYTES = 64 << 20
MAX_EVENT_BYTES = 4 << 20
CONNECT_S = 10.0
SILENCE_S = 120.0
"""Longest wait for the next byte of an answer."""

_NEXT_STEP = {
    401: "make a key with `mesh key create --project NAME` and store it with `mesh init`",
    403: "`mesh key inspect` shows what the key may do",
    404: "`mesh models` lists what this key may use",
    429: "wait a moment and try again",
    503: "`mesh workers` shows the workers and what they are doing",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSettings:
    """Where the mesh's API is (without ``/v1``) and what opens it."""

    url: str
    api_key: str = field(repr=False)

    @property
    def base_url(self) -> str:
        """As OpenAI clients want it."""
        return f"{self.url}/v1"


def resolve(home: Path, *, url: str | None, api_key: str | None, environ: Mapping[str, str]) -> ClientSettings:
    """Flag, else environment (``MESH_URL``, ``MESH_API_KEY``), else what `mesh init` stored. Raises `ConfigError`."""
    stored = _read(home / CLIENT_FILE)
    found_url = url or environ.get("MESH_URL") or stored.get("url")
    found_key = api_key or environ.get("MESH_API_KEY") or stored.get("api_key")
    if not found_url:
        raise ConfigError("which mesh? give --url, set MESH_URL, or store it once: mesh init --url URL --api-key KEY")
    if not found_key:
        raise ConfigError("no API key: give --api-key, set MESH_API_KEY, or store it once: mesh init --url URL --api-key KEY")
    return ClientSettings(url=parse_url(found_url), api_key=_header_safe(found_key))


def store(home: Path, settings: ClientSettings) -> Path:
    """Keep the settings under ``home``, readable by their owner only."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    lines = (f"url = {json.dumps(settings.url)}", f"api_key = {json.dumps(settings.api_key)}")
    write_private(home / CLIENT_FILE, ("\n".join(lines) + "\n").encode())
    return home / CLIENT_FILE


def stored(home: Path) -> ClientSettings | None:
    """What `store` wrote, if both are there."""
    found = _read(home / CLIENT_FILE)
    if not found.get("url") or not found.get("api_key"):
        return None
    return ClientSettings(url=parse_url(found["url"]), api_key=found["api_key"])


def parse_url(text: str) -> str:
    """A base URL with or without ``/v1`` → without. Raises `UsageError`."""
    try:
        parts = urlsplit(text.strip())
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query and not parts.fragment
        valid = valid and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid:
        raise UsageError(f"'{text[:200]}' is not a base URL; write for example http://127.0.0.1:8080")
    return text.strip().rstrip("/").removesuffix("/v1").rstrip("/")


class Client:
    """Calls to one proxy. Use inside ``async with``; every error is an `ApiError` that says what to do next."""

    def __init__(self, settings: ClientSettings) -> None:
        self._settings = settings
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)
        headers = {"authorization": f"Bearer {self._settings.api_key}", "user-agent": "mesh"}
        self._session = aiohttp.ClientSession(timeout=timeout, headers=headers, read_bufsize=MAX_EVENT_BYTES)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def get(self, path: str) -> dict[str, Any]:
        """A JSON object."""
        async with self._request("GET", path, None) as response:
            return await _read_object(response)

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """A JSON object for a JSON body."""
        async with self._request("POST", path, body) as response:
            return await _read_object(response)

    async def post_bytes(self, path: str, body: bytes) -> dict[str, Any]:
        """A JSON object for bytes that are what they are."""
        async with self._request("POST", path, body) as response:
            return await _read_object(response)

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The events of a streamed answer. Raises `ApiError` on an in-band error and on an end without ``[DONE]``."""
        async with self._request("POST", path, {**body, "stream": True}) as response:
            async for data in _events(response):
                if data == b"[DONE]":
                    return
                event = _parse_object(data, response.status)
                if "error" in event:
                    raise ApiError(f"the answer broke off: {_message(event) or 'the worker failed'}; try again")
                yield event
        raise ApiError("the answer broke off without its end mark: what was printed is not complete; try again")

    @asynccontextmanager
    async def _request(self, method: str, path: str, body: Mapping[str, Any] | bytes | None) -> AsyncIterator[aiohttp.ClientResponse]:
        assert self._session is not None, "use `async with`"
        url = self._settings.url + path
        try:
            content: dict[str, Any] = {"data": body} if isinstance(body, bytes) else {"json": body}
            async with self._session.request(method, url, allow_redirects=False, **content) as response:
                if response.status != 200:
                    raise await _refusal(response)
                yield response
        except TimeoutError:
            raise ApiError(f"{self._settings.url} has been silent for too long; `mesh status` shows how it is") from None
        except aiohttp.ClientConnectorError as error:
            reason = plain_reason(error.os_error)
            hint = "" if isinstance(error.os_error, ssl.SSLError) else ": is the proxy running? `mesh up` starts a mesh on this machine"
            raise ApiError(f"cannot reach {self._settings.url} ({reason}){hint}") from None
        except aiohttp.ClientError as error:
            raise ApiError(f"the connection to {self._settings.url} broke: {error or type(error).__name__}") from None


async def _refusal(response: aiohttp.ClientResponse) -> ApiError:
    try:
        answer = await _read_object(response)
    except ApiError:
        answer = {}
    error = answer.get("error")
    code = error.get("code") if isinstance(error, dict) else None
    said = _message(answer) or response.reason or "no reason given"
    parts = [f"{response.status}{f' {code}' if code else ''}: {said.rstrip('.')}"]
    if response.status in _NEXT_STEP and "`mesh " not in said:
        parts.append(_NEXT_STEP[response.status])
    request_id = response.headers.get("x-request-id")
    return ApiError("; ".join(parts) + (f" (request {request_id})" if request_id else ""), status=response.status)


def _message(answer: Mapping[str, Any]) -> str:
    error = answer.get("error")
    message = error.get("message") if isinstance(error, dict) else error
    return "".join(char if char.isprintable() else " " for char in str(message))[:500] if message else ""


async def _read_object(response: aiohttp.ClientResponse) -> dict[str, Any]:
    data = bytearray()
    async for chunk in response.content.iter_any():
        data += chunk
        if len(data) > MAX_ANSWER_BYTES:
            raise ApiError("the answer is too large")
    return _parse_object(bytes(data), response.status)


def _parse_object(data: bytes, status: int) -> dict[str, Any]:
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise ApiError(f"the answer ({status}) is not a JSON object: is this the URL of a mesh's proxy?", status=status)
    return answer


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The ``data`` of server-sent events, one line each, as the OpenAI API sends them."""
    pending = bytearray()
    async for chunk in response.content.iter_any():
        pending += chunk
        while (end := pending.find(b"\n")) >= 0:
            line = bytes(pending[:end]).rstrip(b"\r")
            del pending[: end + 1]
            if line.startswith(b"data:"):
                yield line[5:].strip()
        if len(pending) > MAX_EVENT_BYTES:
            raise ApiError("the answer is not a stream of events")


def _read(path: Path) -> dict[str, str]:
    try:
        with path.open("rb") as opened:
            table = tomllib.load(opened)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; write it again with `mesh init`") from None
    return {name: value for name, value in table.items() if isinstance(value, str)}


def _header_safe(key: str) -> str:
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError("an API key is one word of letters and digits, starting with im_")
    return key
