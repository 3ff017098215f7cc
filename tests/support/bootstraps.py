"""A bootstrap node's parts in the test's own process: a desk that counts, and its HTTPS server on a port the system chose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from bootstrap.enrol import AttemptLimit, Desk
from bootstrap.ledger import Ledger
from bootstrap.others import Others
from bootstrap.server import EnrolServer, ServerLimits
from mesh.authority import Admission
from mesh.clock import Clock
from mesh.identity import Identity, Peer
from mesh.invite import Invite, parse_token, seal_invite
from mesh.trust import Role
from tests.support.authority import TestMesh


async def nobody(_token: bytes, _node_id: bytes) -> set[bytes]:
    """There are no other bootstrap nodes to tell."""
    return set()


@dataclass(frozen=True, kw_only=True)
class CountingDesk(Desk):
    """Notes what it is asked, before it decides anything."""

    asked: list[str] = field(default_factory=list)

    async def enrol(self, body: Mapping[str, Any]) -> dict[str, Any]:
        self.asked.append("enrol")
        return await super().enrol(body)

    def renew(self, peer: Peer, body: Mapping[str, Any]) -> dict[str, Any]:
        self.asked.append("renew")
        return super().renew(peer, body)

    async def spent(self, body: Mapping[str, Any]) -> dict[str, Any]:
        self.asked.append("spent")
        return await super().spent(body)


class Bootstrap:
    """``async with Bootstrap(mesh, folder, clock) as b1: … b1.address … b1.desk.asked``.

    ``identity`` stands in for the bootstrap node's own, to see what happens when a node of another kind plays one.
    """

    def __init__(
        self,
        mesh: TestMesh,
        folder: Path,
        clock: Clock,
        *,
        identity: Identity | None = None,
        admission: Admission | None = None,
        limits: ServerLimits | None = None,
        attempts: AttemptLimit | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.mesh = mesh
        self.identity = identity or mesh.identity(Role.BOOTSTRAP, now=clock.wall())
        self.ledger = Ledger(folder / "tokens.db")
        self.others: list[Bootstrap] = []
        self.port = 0
        self.desk = CountingDesk(
            admission=admission or mesh.admission,
            trust=mesh.trust(),
            ledger=self.ledger,
            clock=clock,
            known_bootstraps=lambda: tuple(item.address for item in (self, *self.others)),
            tell_others=Others(self.identity, folder, lambda: tuple(item.address for item in self.others)).tell,
        )
        self._clock = clock
        self._server = EnrolServer(self.desk, self.identity, folder, clock, limits=limits or ServerLimits(), attempts=attempts)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def token(self, role: Role = Role.WORKER, *, uses: int = 1, life_s: float = 600.0, mesh: TestMesh | None = None) -> str:
        """A join token that leads here; ``mesh`` says who signs it."""
        mesh, now = mesh or self.mesh, self._clock.wall()
        claims = Invite(id=self._clock_id(), role=role, uses=uses, issued=now - 1.0, expires=now + life_s)
        return seal_invite(mesh.keys_issuer, "keys-1", claims, mesh_id=mesh.mesh_id, bootstraps=(self.address,))

    async def __aenter__(self) -> Bootstrap:
        self.port = await self._server.start("127.0.0.1", self.port)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._server.stop()
        self.ledger.close()

    def _clock_id(self) -> bytes:
        self._minted = getattr(self, "_minted", 0) + 1
        return self._minted.to_bytes(16)


def signed_of(token: str) -> str:
    """What a newcomer shows of its token, as it goes over the wire."""
    return parse_token(token).signed.hex()
