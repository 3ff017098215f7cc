"""The listening side: aiohttp's low-level HTTP server, OpenAI-shaped answers to what is not even HTTP, TLS that reloads.

`App` never sees a request that the parser refused; such a one gets its 400 from `proxy.connections`.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path
from typing import Any

import structlog
from aiohttp import StreamReader, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.web_protocol import RequestHandler

from mesh.errors import ConfigError
from mesh.runtime import file_limit
from proxy.app import App
from proxy.config import ProxyConfig
from proxy.connections import ConnectionLimits, Connections, ConnectionServer

log = structlog.get_logger(__name__)

BACKLOG = 4096
TLS_RELOAD_S = 2.0
CLOSE_S = 0.5
"""What `HttpServer.stop` gives requests that are still running; draining comes before it."""
LEAVE_LOOK_S = 0.05
MAX_LINE_BYTES = 8190
OTHER_FILES = 512
"""Of the files a process may open, those kept for links, the log and the directory; the rest may be clients' connections."""


class HttpServer:
    """The OpenAI API on a socket. ``await start()``, later ``await stop(deadline_s)``."""

    def __init__(self, app: App, config: ProxyConfig) -> None:
        self._app = app
        self._config = config
        self._runner: web.ServerRunner | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.connections = Connections(_limits(config))
        self._loop = asyncio.get_running_loop()

    async def start(self) -> int:
        """Listen; returns the port. Raises `ConfigError` if the address or the certificate cannot be used."""
        config = self._config
        server = ConnectionServer(
            self.connections,
            self._app.handle,
            request_factory=self._make_request,
            handler_cancellation=True,
            access_log=None,
            logger=logging.getLogger("aiohttp.server"),
            keepalive_timeout=config.idle_timeout_s,
            lingering_time=2.0,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=config.max_head_bytes,
            max_headers=config.max_headers,
            auto_decompress=False,  # a compressed body is refused, and a bomb in one never opened
        )
        self._runner = web.ServerRunner(server, shutdown_timeout=CLOSE_S)
        await self._runner.setup()
        context = self._tls_context()
        site = web.TCPSite(
            self._runner,
            config.host,
            config.port,
            backlog=BACKLOG,
            ssl_context=context,
            reuse_port=True if config.reuse_port else None,
        )
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(f"cannot listen on {config.host}:{config.port}: {error.strerror or error}", param="port") from None
        self._tasks.append(asyncio.create_task(self.connections.sweep()))
        if context is not None:
            self._tasks.append(asyncio.create_task(self._reload(context)))
        port: int = self._runner.addresses[0][1]
        return port

    async def close_listener(self) -> None:
        """Take no new connections; those that are open go on."""
        if self._runner is not None:
            for site in list(self._runner.sites):
                await site.stop()

    async def leave(self, polite_s: float) -> None:
        """Wait until clients have gone, having been told so with their last answer; those still idle after ``polite_s`` are closed.

        A connection that is closed while it is idle may meet a request that was just sent: so clients get time to use it once more.
        """
        until = self._loop.time() + polite_s
        while True:
            if not len(self.connections) or self._loop.time() >= until:
                break
            await asyncio.sleep(LEAVE_LOOK_S)
        self.connections.close_idle()

    async def stop(self) -> None:
        """Close every connection."""
        for task in self._tasks:
            task.cancel()
        if self._runner is not None:
            await self._runner.cleanup()

    def _make_request(
        self,
        message: Any,
        payload: StreamReader,
        protocol: RequestHandler,
        writer: AbstractStreamWriter,
        task: asyncio.Task[None],
    ) -> web.BaseRequest:
        return web.BaseRequest(message, payload, protocol, writer, task, self._loop, client_max_size=self._config.max_body_bytes)

    # -- TLS

    def _tls_context(self) -> ssl.SSLContext | None:
        cert, key = self._config.tls_cert, self._config.tls_key
        if cert is None or key is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(cert, key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"{cert} and {key} cannot be used for TLS: {error}", param="tls_cert") from None
        return context

    async def _reload(self, context: ssl.SSLContext) -> None:
        """Load the certificate again when its files change; a bad pair is reported and the old one kept."""
        cert, key = self._config.tls_cert, self._config.tls_key
        assert cert is not None
        assert key is not None
        seen = _stamp(cert, key)
        while True:
            await asyncio.sleep(TLS_RELOAD_S)
            stamp = _stamp(cert, key)
            if stamp == seen or stamp is None:
                continue
            try:
                # Tried on a context of its own first: a half-written pair must not touch the live one.
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
                context.load_cert_chain(cert, key)
            except (OSError, ssl.SSLError) as error:
                log.warning("tls.reload_failed", error=str(error))
                continue
            seen = stamp
            log.info("tls.reloaded", certificate=str(cert))


def _limits(config: ProxyConfig) -> ConnectionLimits:
    """Never more connections than the process may open files: the system's own refusal would stop the links too."""
    room = max(1, file_limit() - OTHER_FILES)
    return ConnectionLimits(
        total=min(config.max_connections, room),
        per_address=config.max_connections_per_address,
        head_s=config.head_timeout_s,
        head_bytes=config.max_head_bytes,
    )


def _stamp(*paths: Path) -> tuple[tuple[int, int], ...] | None:
    try:
        return tuple((path.stat().st_mtime_ns, path.stat().st_size) for path in paths)
    except OSError:
        return None
