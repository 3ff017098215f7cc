"""What nodes say while they run: one event a line, ``key=value`` for people or JSON for machines.

An event has a dotted name and fields (``log.info("engine.ready", port=…)``), and the request's id when one is bound. A prompt
is never logged. Neither is a key or a token: whatever looks like one is blotted out here as a last line of defence.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

_SECRET = re.compile(r"\b(im_|imjoin_|sk-|hf_)[A-Za-z0-9_-]{8,}")


def configure(*, level: str = "info", json: bool = False, colours: bool | None = None) -> None:
    """Set up logging for this process, to stderr; library loggers come out in the same shape, from ``warning`` up."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    if json:
        last: list[Processor] = [structlog.processors.format_exc_info, blot, structlog.processors.JSONRenderer()]
    else:
        shown = sys.stderr.isatty() if colours is None else colours
        last = [structlog.processors.format_exc_info, blot, structlog.dev.ConsoleRenderer(colors=shown, pad_event_to=28)]
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for library in ("aiohttp", "asyncio", "kademlia", "rpcudp"):
        logging.getLogger(library).setLevel(max(logging.WARNING, root.level))


@contextmanager
def bound(**fields: Any) -> Iterator[None]:
    """Put fields (a request id) on every event logged by this task and its children until the block ends."""
    with structlog.contextvars.bound_contextvars(**fields):
        yield


def blot(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Replace whatever looks like a key or a join token."""
    for name, value in event.items():
        if isinstance(value, str):
            event[name] = _SECRET.sub(r"\1…", value)
    return event
