"""Why the directory is as it is, for people: the routing table, a look-up in full, and what is wrong.

Unlike `proxy.views` this asks the network, so it takes time and costs peers something: only a few at once, each with a deadline.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

from mesh.address import Address, parse_address
from mesh.claims import CLOCK_SKEW_S
from mesh.clock import Clock
from mesh.dht.exchange import Standing
from mesh.dht.explain import Explained, Found, Probe, compare_documents, explain, knock, probe
from mesh.dht.verify import peek
from mesh.directory import Directory
from mesh.doctor import (
    LOST_WITHIN_S,
    STALE_SHARE,
    Answer,
    BadRecord,
    DocumentFact,
    Facts,
    Finding,
    RecordFact,
    SharingFact,
    Unlinked,
    WorkerFact,
    diagnose,
    worst,
)
from mesh.errors import InvalidRequest, RateLimited, UsageError
from mesh.https import plain_reason
from mesh.identity import Identity
from mesh.records import Record, State, member_until
from mesh.trust import Role
from proxy.fleet import Fleet, Worker
from proxy.views import Views

AT_ONCE = 2
LOOKUP_S = 5.0
DIAL_S = 1.0
MOST_DIALLED = 16
MOST_LOST = 16
MOST_COMPARED = 16
MAX_NAME = 256
_BREATHE_EVERY = 256
_HARMLESS = frozenset({"good", "older", "expired"})


class Explainer:
    """JSON-ready answers. ``wants`` says which workers are this proxy's to link with; ``more`` gives what else the doctor says."""

    def __init__(
        self,
        fleet: Fleet,
        directory: Directory,
        views: Views,
        *,
        identity: Identity,
        clock: Clock,
        wants: Callable[[Record], bool] = lambda record: True,
        sharing: Callable[[], SharingFact] = SharingFact,
    ) -> None:
        self._fleet = fleet
        self._directory = directory
        self._views = views
        self._identity = identity
        self._clock = clock
        self._wants = wants
        self._sharing = sharing
        self.more: Callable[[], Iterable[Finding]] = tuple
        self._gate = asyncio.Semaphore(AT_ONCE)

    def peers(self) -> dict[str, Any]:
        """The routing table, from memory."""
        node = self._directory.node
        listed = [
            {
                "id": peer.node_id.hex(),
                "name": _short(peer.node_id),
                "role": self._role(peer.node_id),
                "address": peer.address,
                "seen_s": round(peer.seen_s, 3),
                "rtt_s": round(peer.rtt_s, 6),
                "failing": peer.failing,
            }
            for peer in sorted(self._directory.peers(), key=lambda peer: peer.node_id)
        ]
        return {"peers": listed, "nodes_estimated": node.table.estimate_nodes(), "clock_offset_s": round(node.time.offset_s, 3)}

    async def lookup(self, *, model: str | None, role: str | None) -> dict[str, Any]:
        """A real look-up, now. Exactly one of ``model`` and ``role``. Raises `InvalidRequest`, `RateLimited`."""
        kind, name = _index(model, role)
        async with self._turn():
            return self._told(await explain(self._directory.node, kind, name, timeout_s=LOOKUP_S))

    async def doctor(self) -> dict[str, Any]:
        """What is wrong, if anything. Raises `RateLimited`."""
        async with self._turn():
            began = self._clock.monotonic()
            findings = [*diagnose(await self._facts()), *self.more()]
        return {
            "worst": str(worst(findings)),
            "took_s": round(self._clock.monotonic() - began, 3),
            "proxy": self._identity.node_id.hex(),
            "findings": [_finding(finding) for finding in findings],
        }

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        if self._gate.locked():
            raise RateLimited("This proxy is already looking into the directory for somebody; try again shortly", retry_after_s=1.0)
        async with self._gate:
            yield

    def _role(self, node_id: bytes) -> str:
        session = self._directory.node.sessions.by_node(node_id)
        return str(session.introduction.member.role) if session is not None else ""

    # -- a look-up

    def _told(self, explained: Explained) -> dict[str, Any]:
        good = {one.node_id for one in explained.found if one.verdict == "good"}
        return {
            "kind": explained.kind,
            "name": explained.name,
            "took_s": round(explained.took_s, 4),
            "lookup_s": round(explained.crawl_s, 4),
            "complete": explained.complete,
            "nodes": len(good),
            "path": [
                {
                    "shard": shard,
                    "id": hop.contact.id.hex(),
                    "name": _short(hop.contact.id),
                    "role": self._role(hop.contact.id),
                    "address": str(hop.contact.address),
                    "path": hop.path,
                    "asked_s": round(hop.asked_s, 4),
                    "took_s": round(hop.took_s, 4),
                    "outcome": hop.fate.name.lower(),
                    "records": hop.records,
                }
                for shard, hop in explained.hops
            ],
            "holders": [
                {
                    "shard": holder.shard,
                    "id": holder.node_id.hex(),
                    "name": _short(holder.node_id),
                    "role": str(Role.PROXY) if holder.own else self._role(holder.node_id),
                    "address": holder.address,
                    "own": holder.own,
                    "records": holder.records,
                    "complete": holder.complete,
                    "took_s": round(holder.took_s, 4),
                }
                for holder in explained.holders
            ],
            "records": [self._found(one) for one in explained.found],
        }

    def _found(self, one: Found) -> dict[str, Any]:
        told: dict[str, Any] = {
            "id": one.node_id.hex(),
            "name": _short(one.node_id),
            "verdict": one.verdict,
            "reason": one.reason,
            "order": {"boot": one.order[0], "seq": one.order[1]},
            "holders": [_short(holder) for holder in one.holders],
            "linked": one.node_id in self._fleet.workers,
        }
        record = one.record
        if record is None:
            return told
        return told | {
            "role": str(record.role),
            "state": str(record.state),
            "models": [entry.name for entry in record.models],
            "address": record.addresses[0] if record.addresses else "",
            "age_s": round(self._directory.node.time.now() - record.confirmed, 1),
            "expires_in_s": round(record.expires - self._clock.wall(), 1),
        }

    # -- the doctor's facts

    async def _facts(self) -> Facts:
        node, directory = self._directory.node, self._directory
        table = sorted(node.table, key=lambda contact: contact.seen)
        gone = [(contact, gone_s) for contact, gone_s in node.lost() if gone_s <= LOST_WITHIN_S][:MOST_LOST]
        records = await self._record_facts()
        missing = [record for record in self._views.records(Role.WORKER) if record.node_id not in self._fleet.workers]
        ours = [record for record in missing if self._wants(record)]
        peers, lost, (doors, tcp_doors), seen, unlinked, standings = await asyncio.gather(
            probe(node, table),
            probe(node, [contact for contact, _ in gone]),
            asyncio.gather(knock(node), _knock_tcp(node.bootstraps[:MOST_DIALLED])),
            explain(node, "role", str(Role.WORKER), timeout_s=LOOKUP_S),
            self._unlinked(ours),
            compare_documents(node, MOST_COMPARED),
        )
        offsets = node.time.offsets()
        member = self._identity.membership
        holders = node.publisher.holders()
        now = self._clock.wall()
        away = {contact.id: gone_s for contact, gone_s in gone}
        return Facts(
            now=node.time.now(),
            offsets={_short(one.node_id): offsets[one.node_id] for one in peers if one.node_id in offsets and one.rtt_s is not None},
            peers=tuple(_answer(one) for one in peers),
            lost=tuple(_answer(one, away.get(one.node_id or b"")) for one in lost),
            doors=tuple(_answer(one) for one in doors),
            tcp_doors=tcp_doors,
            table_size=len(table),
            failing=sum(peer.failing for peer in directory.peers()),
            reachable=self._reachable(),
            records=records,
            linked=len(self._fleet.workers),
            ready=sum(worker.routable for worker in self._fleet.workers.values()),
            unlinked=unlinked,
            out=tuple(fact for worker in self._fleet.workers.values() if (fact := _out(worker)) is not None),
            others_share=len(missing) - len(ours),
            documents_held=len(node.documents),
            documents_unsaved=node.documents.unsaved_count,
            documents=tuple(_document(one) for one in standings),
            epochs=frozenset(key.epoch for key in self._identity.credentials.network_keys),
            member_issued=member.issued,
            member_expires=member.expires,
            lookup_s=seen.crawl_s,
            lookup_complete=seen.complete,
            lookup_answered=len({hop.contact.id for _, hop in seen.hops if hop.fate.name == "ANSWERED"}),
            bad=tuple(_bad(one) for one in seen.found if one.verdict not in _HARMLESS or _long_over(one, now)),
            own_copies=min((len(contacts) for contacts in holders.values()), default=0),
            wanted_copies=node.config.holders,
            large=node.is_large,
            sharing=self._sharing(),
            counts=directory.stats(),
        )

    def _others(self) -> Iterable[Record]:
        own = self._identity.node_id
        return (record for role in Role for record in self._views.records(role) if record.node_id != own)

    def _reachable(self) -> int:
        return sum(bool(record.addresses) for record in self._others())

    async def _record_facts(self) -> tuple[RecordFact, ...]:
        """Of every live record; a view of thousands is gone through without holding up what runs besides."""
        facts = []
        now = self._clock.wall()
        for number, record in enumerate(self._others()):
            if number % _BREATHE_EVERY == _BREATHE_EVERY - 1:
                await asyncio.sleep(0)
            name, role, left_s = _short(record.node_id), str(record.role), record.expires - now
            member_left_s = member_until(record) - now
            facts.append(RecordFact(name=name, role=role, life_s=_life_s(record), left_s=left_s, member_left_s=member_left_s))
        return tuple(facts)

    async def _unlinked(self, missing: list[Record]) -> tuple[Unlinked, ...]:
        why = await asyncio.gather(*(_why_unlinked(record) for record in missing[:MOST_DIALLED]))
        why += ["not looked into"] * (len(missing) - len(why))
        now = self._clock.wall()
        return tuple(
            Unlinked(
                name=_short(record.node_id),
                state=str(record.state),
                why=reason,
                up_s=self._directory.node.time.now() - record.boot / 1000,
                stale=record.expires - now < STALE_SHARE * _life_s(record),
            )
            for record, reason in zip(missing, why, strict=True)
        )


def _index(model: str | None, role: str | None) -> tuple[str, str]:
    """What is looked up. Raises `InvalidRequest`."""
    if (model is None) == (role is None):
        raise InvalidRequest("Say what to look up: ?model=NAME or ?role=worker", param="model")
    if model is not None:
        if not 0 < len(model) <= MAX_NAME:
            raise InvalidRequest(f"A model's name has 1 to {MAX_NAME} characters", param="model")
        return "model", model
    if role not in tuple(Role):
        raise InvalidRequest(f"A role is one of: {', '.join(Role)}", param="role")
    return "role", str(role)


async def _why_unlinked(record: Record) -> str:
    """What a connection to the worker's port meets right now."""
    if record.state == State.DRAINING:
        return "it is draining"
    if not record.addresses:
        return "it only dials out, and has not reached this proxy's --link-port"
    try:
        where = parse_address(record.addresses[0])
        async with asyncio.timeout(DIAL_S):
            _, writer = await asyncio.open_connection(where.host, where.port)
    except TimeoutError:
        return f"{record.addresses[0]} does not answer"
    except (OSError, UsageError) as error:
        return f"{record.addresses[0]}: {plain_reason(error) if isinstance(error, OSError) else error.message}"
    writer.close()
    return f"{record.addresses[0]} takes connections, but no link came about; see link.dial_failed with --log-level debug"


async def _knock_tcp(doors: Iterable[tuple[str, int]]) -> tuple[Answer, ...]:
    """Whether bootstrap nodes' ports take TCP connections: there nodes join and renew."""
    return tuple(await asyncio.gather(*(_connect(host, port) for host, port in doors)))


async def _connect(host: str, port: int) -> Answer:
    name = str(Address(host, port))
    began = time.perf_counter()
    try:
        async with asyncio.timeout(DIAL_S):
            _, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        return Answer(name="", address=name, rtt_s=None, error="no connection over TCP")
    except OSError as error:
        return Answer(name="", address=name, rtt_s=None, error=plain_reason(error))
    writer.close()
    return Answer(name="", address=name, rtt_s=time.perf_counter() - began)


def _document(standing: Standing) -> DocumentFact:
    document = standing.document
    return DocumentFact(
        title=document.title,
        seq=document.seq,
        asked=standing.asked,
        same=standing.same,
        newer=standing.newer,
        rival=standing.rival,
    )


def _life_s(record: Record) -> float:
    claim = peek(record.signed)
    return claim.expires - claim.issued


def _out(worker: Worker) -> WorkerFact | None:
    """Of a worker that is up, and yet gets no requests or hardly any."""
    if worker.record.state == State.DRAINING:
        return WorkerFact(name=_short(worker.node_id), standing="draining", reason=worker.record.reason)
    if worker.routable and worker.standing != "trusted":
        return WorkerFact(name=_short(worker.node_id), standing=worker.standing, reason=worker.standing_reason)
    return None


def _long_over(one: Found, now: float) -> bool:
    """A holder may hand out what ends this moment; what ended long ago should be nobody's."""
    return one.verdict == "expired" and (one.record is None or one.record.expires < now - CLOCK_SKEW_S)


def _bad(one: Found) -> BadRecord:
    return BadRecord(node=_short(one.node_id), verdict=one.verdict, holders=tuple(_short(holder) for holder in one.holders))


def _answer(one: Probe, gone_s: float | None = None) -> Answer:
    return Answer(name=_short(one.node_id or b""), address=one.address, rtt_s=one.rtt_s, gone_s=gone_s, error=one.error)


def _finding(finding: Finding) -> dict[str, str]:
    return {
        "severity": str(finding.severity),
        "check": finding.check,
        "what": finding.what,
        "detail": finding.detail,
        "advice": finding.advice,
    }


def _short(node_id: bytes) -> str:
    return node_id.hex()[:12]
