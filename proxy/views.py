"""What the proxy can tell about the mesh: its links and the directory's view, merged. For people and for GET /v1/models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mesh.clock import Clock
from mesh.directory import Directory
from mesh.records import Record, State, newest
from mesh.trust import Role
from proxy.fleet import Fleet
from proxy.peers import Proxies


class Views:
    """JSON-ready answers. Reads only what is in memory."""

    def __init__(self, fleet: Fleet, proxies: Proxies, directory: Directory, *, own: Callable[[], Record], mesh: str, clock: Clock) -> None:
        self._fleet = fleet
        self._proxies = proxies
        self._directory = directory
        self._own = own
        self._mesh = mesh
        self._clock = clock

    def ready_models(self) -> set[str]:
        """The models that can be asked for now: those of linked ready workers and of live ready records in the directory."""
        return self._fleet.models() | _names(record for record in self.records(Role.WORKER) if record.state == State.READY)

    def knows(self, model: str) -> bool:
        """Whether any live worker, ready or not, names this model."""
        return model in _names(self.records(Role.WORKER))

    def workers(self) -> list[dict[str, Any]]:
        return [self._worker(record) for record in self.records(Role.WORKER)]

    def status(self, *, in_flight: int, draining: bool, moves: Mapping[str, int], retries: Mapping[str, int]) -> dict[str, Any]:
        return {
            "mesh": self._mesh,
            "proxy": {
                "id": self._own().node_id.hex(),
                "in_flight": in_flight,
                "draining": draining,
                "streams": dict(moves),
                "retries": dict(retries),
                "ejections": {str(cause): count for cause, count in sorted(self._fleet.watch.ejections.items())},
                "models": sorted(self._fleet.models()),
            },
            "proxies": self._all_proxies(),
            "bootstraps": [_node(record) for record in self.records(Role.BOOTSTRAP)],
            "workers": self.workers(),
            "directory": self._directory.stats(),
        }

    def _all_proxies(self) -> list[dict[str, Any]]:
        """Every proxy, this one too; ``linked`` is what this one has a link to."""
        records = newest([*self.records(Role.PROXY), self._own()], now=self._clock.wall()).values()
        return [_node(record) | {"linked": record.node_id in self._proxies.linked} for record in records]

    def record_ages(self) -> dict[str, list[float]]:
        """By role, how many seconds ago each live record of the directory's view was signed, by the mesh's clock."""
        now = self._directory.node.time.now()
        return {str(role): [max(0.0, now - record.confirmed) for record in self._directory.known(role)] for role in Role}

    def records(self, role: Role) -> list[Record]:
        """The newest live record of every node of a role; a broken link ends a worker's listing sooner than its record does."""
        linked = [worker.record for worker in self._fleet.workers.values() if role == Role.WORKER]
        found = newest([*linked, *self._directory.known(role)], now=self._clock.wall())
        return sorted(found.values(), key=lambda record: record.node_id)

    def _worker(self, record: Record) -> dict[str, Any]:
        linked = self._fleet.workers.get(record.node_id)
        capability = record.capability
        return _node(record) | {
            "models": [entry.name for entry in record.models],
            "tasks": sorted({task for entry in record.models for task in entry.tasks}),
            "engine": capability.engine,
            "linked": linked is not None,
            "outbound": record.outbound_only,
            "running": record.load.running,
            "waiting": linked.waiting if linked else record.load.waiting,
            "kv_use": linked.kv_use if linked else record.load.kv_use,
            "in_flight": linked.in_flight if linked else 0,
            "served": linked.served if linked else 0,
            "failed": linked.failed if linked else 0,
            "standing": linked.standing if linked else "",
            "standing_reason": linked.standing_reason if linked else "",
            "expires_in_s": round(record.expires - self._clock.wall(), 1),
            "capability": {
                "gpu": capability.gpu,
                "gpu_count": capability.gpu_count,
                "memory_bytes": capability.memory_bytes,
                "tier": capability.tier,
                "max_concurrency": capability.max_concurrency,
            },
        }


def _names(records: Iterable[Record]) -> set[str]:
    return {name for record in records for entry in record.models for name in (entry.name, *entry.adapters)}


def _node(record: Record) -> dict[str, Any]:
    return {
        "id": record.node_id.hex(),
        "name": record.node_id.hex()[:12],
        "state": str(record.state),
        "reason": record.reason,
        "address": record.addresses[0] if record.addresses else "",
        "api": record.api,
        "region": record.capability.region,
        "version": record.version,
    }
