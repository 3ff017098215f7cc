"""Whose links are whose: workers are the fleet's, other proxies are here.

Proxies are linked each with each. What they tell one another (limits, revocations) is small and seldom, so a link costs little more than
its heartbeat; nothing on a request's path waits for another proxy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mesh.errors import InvalidRequest, ProtocolError
from mesh.link.frames import Frame
from mesh.link.link import IncomingStream, Link
from mesh.link.peers import PeersOwner
from mesh.link.questions import Questions
from mesh.records import Record, State
from mesh.trust import Role


class Limits(Protocol):
    """Who shares limits with the other proxies: `proxy.limits.limiter.Limiter`."""

    def up(self, node_id: bytes, boot: int, *, serving: bool) -> None: ...

    def serves(self, node_id: bytes, serving: bool) -> None: ...

    def down(self, node_id: bytes) -> None: ...

    def on_frame(self, node_id: bytes, kind: Frame, fields: dict[str, Any]) -> None: ...


class ByRole:
    """Implements `mesh.link.peers.PeersOwner` for a proxy: what a link brings goes to whoever owns peers of that role."""

    def __init__(self, owners: Mapping[Role, PeersOwner]) -> None:
        self._owners = owners

    def on_up(self, link: Link, record: Record) -> None:
        self._owner(link).on_up(link, record)

    def on_down(self, link: Link, reason: str) -> None:
        self._owner(link).on_down(link, reason)

    def on_record(self, link: Link, record: Record) -> None:
        self._owner(link).on_record(link, record)

    def on_load(self, link: Link, fields: dict[str, Any]) -> None:
        self._owner(link).on_load(link, fields)

    def on_prefix(self, link: Link, fields: dict[str, Any]) -> None:
        self._owner(link).on_prefix(link, fields)

    def on_drain(self, link: Link) -> None:
        self._owner(link).on_drain(link)

    def on_frame(self, link: Link, kind: Frame, fields: dict[str, Any]) -> None:
        self._owner(link).on_frame(link, kind, fields)

    def on_open(self, stream: IncomingStream, head: dict[str, Any]) -> None:
        self._owner(stream.link).on_open(stream, head)

    def _owner(self, link: Link) -> PeersOwner:
        assert link.peer is not None
        return self._owners[link.peer.role]


@dataclass(slots=True, eq=False)
class Proxy:
    """A linked proxy and its newest record."""

    link: Link
    record: Record

    @property
    def serving(self) -> bool:
        return self.record.state == State.READY and not self.link.draining


class Proxies:
    """Implements `mesh.link.peers.PeersOwner` for a proxy's links to other proxies."""

    def __init__(self, *, on_record: Callable[[Record], None]) -> None:
        self.linked: dict[bytes, Proxy] = {}
        self.on_order: Callable[[Link, dict[str, Any]], None] = lambda link, fields: None
        self.questions: dict[str, Questions] = {}
        """What they may ask this one, by OPEN's task."""
        self.limits: Limits | None = None
        self._on_record = on_record

    def on_up(self, link: Link, record: Record) -> None:
        self.linked[record.node_id] = Proxy(link, record)
        self._on_record(record)
        if self.limits is not None:
            self.limits.up(record.node_id, record.boot, serving=record.state == State.READY)

    def on_down(self, link: Link, reason: str) -> None:
        proxy = self.linked.get(link.node_id)
        if proxy is not None and proxy.link is link:
            del self.linked[link.node_id]
            if self.limits is not None:
                self.limits.down(link.node_id)

    def on_record(self, link: Link, record: Record) -> None:
        proxy = self.linked.get(link.node_id)
        if proxy is not None and record.order > proxy.record.order:
            proxy.record = record
            self._served(proxy)
        self._on_record(record)

    def on_load(self, link: Link, fields: dict[str, Any]) -> None:
        raise ProtocolError("a proxy has no load")

    def on_prefix(self, link: Link, fields: dict[str, Any]) -> None:
        raise ProtocolError("a proxy holds no prefixes")

    def on_drain(self, link: Link) -> None:
        if (proxy := self.linked.get(link.node_id)) is not None:
            self._served(proxy)

    def on_frame(self, link: Link, kind: Frame, fields: dict[str, Any]) -> None:
        if kind == Frame.ORDER:
            self.on_order(link, fields)
        elif self.limits is not None and kind in (Frame.SHARES, Frame.ASK, Frame.GRANT):
            self.limits.on_frame(link.node_id, kind, fields)

    def send(self, short: bytes, kind: Frame, fields: dict[str, Any]) -> None:
        """Send a control frame to the linked proxy whose node id begins so, if there is one."""
        proxy = next((proxy for node_id, proxy in self.linked.items() if node_id.startswith(short)), None)
        if proxy is not None:
            proxy.link.send_control(kind, fields)

    def _served(self, proxy: Proxy) -> None:
        if self.limits is not None:
            self.limits.serves(proxy.record.node_id, proxy.serving)

    def on_open(self, stream: IncomingStream, head: dict[str, Any]) -> None:
        task = head.get("task")
        questions = self.questions.get(task) if isinstance(task, str) else None
        if questions is not None:
            questions.open(stream, head)
        else:
            stream.fail(InvalidRequest("a proxy serves no requests of other proxies"))
