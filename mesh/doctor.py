"""What is wrong with the directory as one node sees it, judged from facts. Pure: `mesh.dht.explain` gathers the facts.

Each check takes the facts and returns findings. A finding says what is so, what stands behind it and, unless all is well, what to do.
``fail``: something does not work or soon will not; ``warn``: it works, and somebody should look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median

from mesh.authority import EPOCH_S
from mesh.claims import CLOCK_SKEW_S

CLOCK_WARN_S = 5.0
LOST_WITHIN_S = 300.0
"""A peer that went away longer ago is no news."""
STALE_SHARE = 0.4
"""Of a record's life left: an owner refreshes at a quarter of it, so two refreshes have been missed."""
STALE_SHARE_LARGE = 1 / 8
"""In a large mesh records are refreshed, and views read, less often: see `DirectoryConfig.large_mesh`."""
YOUNG_S = 5.0
"""A node that has just started may take so long until it is linked."""
RENEWAL_SHARE = 0.4
"""Of a membership's life left: nodes renew at half of it."""
LATE_RENEWAL_S, LAST_RENEWAL_S = 6 * 3_600.0, 3_600.0
"""A certificate lives for a day and is renewed at noon, so to speak."""
LAST_SHARE = 0.1
CUT_SHORT_SHARE = 0.1
MOST_NAMED = 8


class Severity(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """``check`` is a stable name for scripts; the rest is for people."""

    check: str
    severity: Severity
    what: str
    detail: str = ""
    advice: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Who was asked for a sign of life. ``rtt_s`` is None if none came; ``gone_s`` how long ago it fell out of the table, if it did."""

    name: str
    address: str
    rtt_s: float | None
    gone_s: float | None = None
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordFact:
    """A live record of the view: the life its owner gave it, and what is left of that."""

    name: str
    role: str
    life_s: float
    left_s: float
    member_left_s: float = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFact:
    """A linked worker that gets no requests, or hardly any, though its link is up and its record says ready or draining."""

    name: str
    standing: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unlinked:
    """A worker with a live record and no link to this proxy. ``up_s`` is how long ago it started."""

    name: str
    state: str
    why: str
    up_s: float
    stale: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRecord:
    """A version of a record that a holder handed out and that does not hold."""

    node: str
    verdict: str
    holders: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentFact:
    """A document this proxy holds. So many of ``asked`` nodes nearest to its key list the same, a newer one, or another of this seq."""

    title: str
    seq: int
    asked: int
    same: int
    newer: int
    rival: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SharingFact:
    """How limits are shared: whether this proxy has its share, how many count, and who of them has not been heard of."""

    has_share: bool = True
    proxies: int = 1
    missed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Times are wall-clock seconds as the mesh counts them. ``reachable`` is how many nodes the view knows that could be peers."""

    now: float
    offsets: Mapping[str, float]
    peers: tuple[Answer, ...]
    lost: tuple[Answer, ...]
    doors: tuple[Answer, ...]
    tcp_doors: tuple[Answer, ...]
    table_size: int
    failing: int
    reachable: int
    records: tuple[RecordFact, ...]
    linked: int
    ready: int
    unlinked: tuple[Unlinked, ...]
    out: tuple[WorkerFact, ...] = ()
    others_share: int
    documents_held: int
    documents_unsaved: int
    documents: tuple[DocumentFact, ...]
    epochs: frozenset[int]
    member_issued: float
    member_expires: float
    lookup_s: float
    lookup_complete: bool
    lookup_answered: int
    bad: tuple[BadRecord, ...]
    own_copies: int
    wanted_copies: int
    large: bool
    sharing: SharingFact = field(default_factory=SharingFact)
    counts: Mapping[str, float] = field(default_factory=dict)


def diagnose(facts: Facts) -> list[Finding]:
    """All findings, the worst first."""
    found = [finding for check in CHECKS for finding in check(facts)]
    order = list(reversed(Severity))
    return sorted(found, key=lambda finding: order.index(finding.severity))


def worst(findings: Iterable[Finding]) -> Severity:
    order = list(Severity)
    return max((finding.severity for finding in findings), key=order.index, default=Severity.OK)


def check_clock(facts: Facts) -> list[Finding]:
    """Ours against the median of the peers' clocks, then each peer's against that median."""
    advice = "keep the clock right with chrony or systemd-timesyncd; compare `date -u` on both machines"
    if not facts.offsets:
        return [Finding(check="clock", severity=Severity.OK, what="no peer's clock to compare with")]
    middle = median(facts.offsets.values())
    size = f"median of {_count(len(facts.offsets), 'peer')}: {middle:+.1f} s against ours"
    if abs(middle) >= CLOCK_WARN_S:
        severity = Severity.FAIL if abs(middle) >= CLOCK_SKEW_S else Severity.WARN
        what = f"this proxy's clock is {abs(middle):.1f} s {'behind' if middle > 0 else 'ahead'}"
        return [Finding(check="clock", severity=severity, what=what, detail=size, advice=advice)]
    off = {name: offset - middle for name, offset in facts.offsets.items() if abs(offset - middle) >= CLOCK_WARN_S}
    if off:
        detail = _names(f"{name} {offset:+.1f} s" for name, offset in sorted(off.items(), key=lambda item: -abs(item[1])))
        what = f"the clocks of {_count(len(off), 'peer')} are off"
        severity = Severity.FAIL if max(map(abs, off.values())) >= CLOCK_SKEW_S else Severity.WARN
        return [Finding(check="clock", severity=severity, what=what, detail=detail, advice=advice)]
    return [Finding(check="clock", severity=Severity.OK, what="clocks agree", detail=size)]


def check_peers(facts: Facts) -> list[Finding]:
    """How many there are, and whether they answer."""
    found = [_table(facts)]
    silent = [answer for answer in facts.peers if answer.rtt_s is None]
    if silent and len(silent) == len(facts.peers):
        what = "no peer answers"
        advice = "is UDP to and from this machine's --dht-port let through? Requests go on over links that are up"
        found.append(Finding(check="unreachable", severity=Severity.FAIL, what=what, detail=_answers(silent), advice=advice))
    elif silent:
        what = f"{_count(len(silent), 'peer')} of {len(facts.peers)} asked {'does' if len(silent) == 1 else 'do'} not answer"
        advice = "look whether the machine is up and lets UDP through; a peer that stays silent is dropped by itself"
        found.append(Finding(check="unreachable", severity=Severity.WARN, what=what, detail=_answers(silent), advice=advice))
    elif facts.peers:
        slowest = max(answer.rtt_s or 0.0 for answer in facts.peers)
        what = f"{_count(len(facts.peers), 'peer')} asked, all answer"
        found.append(Finding(check="unreachable", severity=Severity.OK, what=what, detail=f"slowest {slowest * 1000:.1f} ms"))
    gone = [answer for answer in facts.lost if answer.rtt_s is None and answer.gone_s is not None and answer.gone_s <= LOST_WITHIN_S]
    if gone:
        what = f"{_count(len(gone), 'peer')} went silent within the last {LOST_WITHIN_S / 60:.0f} minutes"
        advice = "nothing to do if it was stopped on purpose; otherwise look at its machine and log"
        found.append(Finding(check="lost", severity=Severity.WARN, what=what, detail=_answers(gone), advice=advice))
    return found


def _table(facts: Facts) -> Finding:
    detail = f"{facts.failing} failing lately; {facts.reachable} reachable nodes are known by their records"
    if not facts.table_size:
        advice = "see the findings about bootstrap nodes and the clock; is UDP blocked?"
        return Finding(check="peers", severity=Severity.FAIL, what="this proxy has no peer in the directory", detail=detail, advice=advice)
    if facts.table_size == 1 or 2 * facts.table_size < min(facts.reachable, 20):
        advice = "with so few peers one failure cuts this proxy off; is UDP blocked to some, or has it only just started?"
        what = f"only {_count(facts.table_size, 'peer')} in the routing table"
        return Finding(check="peers", severity=Severity.WARN, what=what, detail=detail, advice=advice)
    return Finding(check="peers", severity=Severity.OK, what=f"{facts.table_size} peers in the routing table", detail=detail)


def check_bootstraps(facts: Facts) -> list[Finding]:
    """Over UDP, where the directory is, and over TCP, where nodes join and renew."""
    if not facts.doors:
        advice = "name one with --bootstrap, so that this proxy finds its way back after a long absence"
        return [Finding(check="bootstraps", severity=Severity.WARN, what="this proxy knows of no bootstrap node", advice=advice)]
    return [_doors(facts), _tcp_doors(facts)]


def _doors(facts: Facts) -> Finding:
    silent = [door for door in facts.doors if door.rtt_s is None]
    detail = _answers(silent)
    if len(silent) == len(facts.doors):
        what = "no bootstrap node answers"
        left = _span(facts.member_expires - facts.now)
        advice = f"start one again: until then nobody can join or renew, and this proxy's credentials end in {left}; traffic goes on"
        return Finding(check="bootstraps", severity=Severity.FAIL, what=what, detail=detail, advice=advice)
    if silent:
        what = f"{len(silent)} of {_count(len(facts.doors), 'bootstrap node')} do not answer"
        advice = "start them again, or take them out of --bootstrap if they are gone for good"
        return Finding(check="bootstraps", severity=Severity.WARN, what=what, detail=detail, advice=advice)
    slowest = max(door.rtt_s or 0.0 for door in facts.doors)
    what = f"{_count(len(facts.doors), 'bootstrap node')}, all answer" if len(facts.doors) > 1 else "the bootstrap node answers"
    return Finding(check="bootstraps", severity=Severity.OK, what=what, detail=f"slowest {slowest * 1000:.1f} ms")


def _tcp_doors(facts: Facts) -> Finding:
    closed = [door for door in facts.tcp_doors if door.rtt_s is None]
    if len(closed) == len(facts.tcp_doors):
        severity, what = Severity.FAIL, "no bootstrap node takes TCP connections"
    elif closed:
        severity, what = Severity.WARN, f"{len(closed)} of {_count(len(facts.tcp_doors), 'bootstrap node')} take no TCP connections"
    else:
        slowest = max(door.rtt_s or 0.0 for door in facts.tcp_doors)
        what = "nodes can join and renew over TCP"
        return Finding(check="enrolment", severity=Severity.OK, what=what, detail=f"slowest connection {slowest * 1000:.1f} ms")
    left = _span(facts.member_expires - facts.now)
    advice = f"let TCP through to its --port as well as UDP: nodes join and renew there, and this proxy's credentials end in {left}"
    return Finding(check="enrolment", severity=severity, what=what, detail=_answers(closed), advice=advice)


def check_records(facts: Facts) -> list[Finding]:
    """Live records whose owners seem to have stopped refreshing them. What lives for a moment only is a good-bye."""
    share = STALE_SHARE_LARGE if facts.large else STALE_SHARE
    stale = [record for record in facts.records if record.life_s > YOUNG_S and record.left_s < share * record.life_s]
    if stale:
        what = f"{_count(len(stale), 'record')} of {len(facts.records)} {'has' if len(stale) == 1 else 'have'} not been refreshed"
        detail = _names(f"{one.role} {one.name} ends in {max(0.0, one.left_s):.0f} s of {one.life_s:.0f} s" for one in stale)
        advice = "its owner is probably gone or cut off: look at its machine and log; the record ends by itself"
        return [Finding(check="records", severity=Severity.WARN, what=what, detail=detail, advice=advice)]
    oldest = max((record.life_s - record.left_s for record in facts.records), default=0.0)
    what = f"{_count(len(facts.records), 'record')} known, all fresh" if facts.records else "no records of other nodes are known"
    return [Finding(check="records", severity=Severity.OK, what=what, detail=f"oldest {max(0.0, oldest):.1f} s" if facts.records else "")]


def check_links(facts: Facts) -> list[Finding]:
    """Workers that are known and not linked, and why."""
    if not facts.linked and not facts.unlinked:
        advice = "start one: `mesh invite worker` makes the token"
        return [Finding(check="links", severity=Severity.WARN, what="no worker is known", advice=advice)]
    missing = [one for one in facts.unlinked if one.up_s >= YOUNG_S]
    linked = f"{_count(facts.linked, 'worker')} linked, {facts.ready} ready"
    if facts.others_share:
        linked += f"; {facts.others_share} more are other proxies' share"
    if not missing:
        young = f"; {_count(len(facts.unlinked), 'worker')} just started" if facts.unlinked else ""
        severity = Severity.OK if facts.ready or facts.unlinked else Severity.WARN
        advice = "" if severity is Severity.OK else "`mesh workers` shows what each is doing"
        return [Finding(check="links", severity=severity, what=linked + young, advice=advice)]
    severity = Severity.WARN if facts.linked else Severity.FAIL
    detail = _names(f"{one.name} ({one.state}): {one.why}" + (", and its record is not refreshed" if one.stale else "") for one in missing)
    what = f"{_count(len(missing), 'worker')} known but not linked ({linked})"
    advice = "if it died, nothing: its record ends by itself; else check --advertise and the firewall, or start it with --outbound"
    return [Finding(check="links", severity=severity, what=what, detail=detail, advice=advice)]


def check_workers(facts: Facts) -> list[Finding]:
    """Linked workers that are out of service for what they did, or because somebody said so."""
    bad = [one for one in facts.out if one.standing != "draining"]
    told = [one for one in facts.out if one.standing == "draining"]
    found = []
    if bad:
        what = f"{_count(len(bad), 'worker')} linked but not trusted with requests"
        advice = "each is tried again by itself, one request at a time; look at its engine.log and its machine, or `mesh drain` it"
        detail = _names(f"{one.name} ({one.standing}): {one.reason}" for one in bad)
        found.append(Finding(check="workers", severity=Severity.WARN, what=what, detail=detail, advice=advice))
    if told:
        what = f"{_count(len(told), 'worker')} drained"
        detail = _names(f"{one.name}: {one.reason}" for one in told)
        found.append(
            Finding(check="drained", severity=Severity.WARN, what=what, detail=detail, advice="`mesh undrain` puts it back into service")
        )
    return found or [Finding(check="workers", severity=Severity.OK, what="no linked worker is out of service")]


def check_certificates(facts: Facts) -> list[Finding]:
    """Nodes that should have renewed their certificates long ago: when one ends, its links do."""
    late = [one for one in facts.records if one.member_left_s < LATE_RENEWAL_S]
    if not late:
        return []
    severity = Severity.FAIL if min(one.member_left_s for one in late) < LAST_RENEWAL_S else Severity.WARN
    what = f"{_count(len(late), 'node')} {'has not renewed its certificate' if len(late) == 1 else 'have not renewed their certificates'}"
    detail = _names(f"{one.name} ({one.role}): ends in {_span(one.member_left_s)}" for one in late)
    advice = "it leaves when it ends: look whether it reaches a bootstrap node over TCP (`enrol.attempt_failed` in its log), and its clock"
    return [Finding(check="certificates", severity=severity, what=what, detail=detail, advice=advice)]


def check_documents(facts: Facts) -> list[Finding]:
    """What this proxy holds against what the nodes nearest to each document's key list."""
    held = _count(facts.documents_held, "document")
    if facts.documents_unsaved:
        what = f"{_count(facts.documents_unsaved, 'change')} of documents could not be written to disk"
        advice = "make room in --state-dir: after a restart this proxy would not know which versions are old"
        return [Finding(check="documents", severity=Severity.FAIL, what=what, detail=f"{held} held", advice=advice)]
    apart = [one for one in facts.documents if one.rival or one.newer]
    alone = [one for one in facts.documents if one.asked and not one.same and one not in apart]
    if apart:
        what = f"nodes disagree about {_count(len(apart), 'document')}"
        advice = "it passes within minutes; if it stays, two were written at once or a holder is broken: write the document again"
        return [Finding(check="documents", severity=Severity.WARN, what=what, detail=_names(map(_standing, apart)), advice=advice)]
    if alone:
        what = f"{_count(len(alone), 'document')} held by none of the nodes that should"
        advice = "it is offered to them every five minutes; see the findings about peers if it stays so"
        return [Finding(check="documents", severity=Severity.WARN, what=what, detail=_names(map(_standing, alone)), advice=advice)]
    detail = _names(f"{one.title} seq {one.seq}, {one.same} of {_count(one.asked, 'node')}" for one in facts.documents)
    return [Finding(check="documents", severity=Severity.OK, what=f"{held} held", detail=detail)]


def _standing(one: DocumentFact) -> str:
    others = f"a newer one at {one.newer}, another at {one.rival}"
    return f"{one.title}: seq {one.seq} here and at {one.same} of {_count(one.asked, 'node')}, {others}"


def check_limits(facts: Facts) -> list[Finding]:
    """Whether this proxy and all others can use the whole of every limit."""
    sharing = facts.sharing
    if sharing.missed:
        what = f"{_count(len(sharing.missed), 'proxy', 'proxies')} of {sharing.proxies} gone without a good-bye; limits lack their share"
        advice = "start it again, or see why it is out of reach; if it is gone for good and this lasts, restart this proxy"
        return [Finding(check="limits", severity=Severity.WARN, what=what, detail=_names(sharing.missed), advice=advice)]
    if not sharing.has_share:
        advice = "it has just started, is draining, or a proxy it knows of is out of reach: see `mesh status` for those that are not linked"
        what = "this proxy has no share of any limit yet; it asks others for what it needs"
        return [Finding(check="limits", severity=Severity.WARN, what=what, advice=advice)]
    alone = "this proxy keeps all limits by itself"
    what = alone if sharing.proxies == 1 else f"limits are shared by {_count(sharing.proxies, 'proxy', 'proxies')}"
    return [Finding(check="limits", severity=Severity.OK, what=what)]


def check_credentials(facts: Facts) -> list[Finding]:
    """The directory's keys of this epoch and the next, and how long this node is a member."""
    current = int(facts.now // EPOCH_S)
    ends_s = (current + 1) * EPOCH_S - facts.now
    held = f"epoch {current} ends in {_span(ends_s)}; keys held: {', '.join(map(str, sorted(facts.epochs))) or 'none'}"
    renew = "a bootstrap node must answer, over TCP as well, for this node to renew; see `enrol.attempt_failed` in its log, and its clock"
    if current not in facts.epochs:
        epoch = Finding(
            check="epoch", severity=Severity.FAIL, what="the directory's key of this epoch is missing", detail=held, advice=renew
        )
    elif current + 1 not in facts.epochs:
        severity = Severity.WARN if ends_s > EPOCH_S / 4 else Severity.FAIL
        epoch = Finding(
            check="epoch", severity=severity, what="the directory's key of the next epoch is missing", detail=held, advice=renew
        )
    else:
        epoch = Finding(check="epoch", severity=Severity.OK, what="the directory's keys of this epoch and the next are held", detail=held)
    left_s, life_s = facts.member_expires - facts.now, facts.member_expires - facts.member_issued
    what = f"credentials end in {_span(left_s)}" if left_s > 0 else "credentials have ended"
    severity = Severity.FAIL if left_s < LAST_SHARE * life_s else Severity.WARN if left_s < RENEWAL_SHARE * life_s else Severity.OK
    detail = f"of {_span(life_s)}; they are renewed at half of that"
    advice = "" if severity is Severity.OK else renew
    return [epoch, Finding(check="credentials", severity=severity, what=what, detail=detail, advice=advice)]


def check_lookup(facts: Facts) -> list[Finding]:
    """The look-up that was made for this, and how long our own record would outlive its holders."""
    took = f"{facts.lookup_s * 1000:.0f} ms, {_count(facts.lookup_answered, 'node')} answered"
    lookups, cut = facts.counts.get("lookups", 0), facts.counts.get("lookups_cut_short", 0)
    found = []
    if not facts.lookup_complete:
        advice = "`mesh lookup --role worker` shows who was slow; a lossy or blocked network is the usual cause"
        found.append(Finding(check="lookup", severity=Severity.WARN, what="a look-up ran into its deadline", detail=took, advice=advice))
    elif lookups >= 20 and cut / lookups > CUT_SHORT_SHARE:
        detail = f"{cut:.0f} of {lookups:.0f} since the start; the last took {took}"
        advice = "packets are lost or peers are dying; see the findings about peers"
        found.append(
            Finding(check="lookup", severity=Severity.WARN, what="many look-ups run into their deadline", detail=detail, advice=advice)
        )
    else:
        found.append(Finding(check="lookup", severity=Severity.OK, what="a look-up finds its way", detail=took))
    if facts.bad:
        detail = _names(f"{one.verdict} record of {one.node or 'nobody'} from {', '.join(one.holders)}" for one in facts.bad)
        advice = "it was refused and harms nobody; a holder that keeps handing it out is broken or hostile: look at that node"
        what = f"{_count(len(facts.bad), 'record')} handed out that {'does' if len(facts.bad) == 1 else 'do'} not hold"
        found.append(Finding(check="forged", severity=Severity.WARN, what=what, detail=detail, advice=advice))
    found.append(_copies(facts))
    return found


def _copies(facts: Facts) -> Finding:
    what = f"this proxy's own record has {_count(facts.own_copies, 'holder')}"
    wanted = min(facts.wanted_copies, facts.table_size)
    if facts.own_copies >= max(1, wanted // 2):
        return Finding(check="copies", severity=Severity.OK, what=what, detail=f"{facts.wanted_copies} are wanted")
    advice = "others find this proxy late or not at all; see the findings about peers and the clock"
    severity = Severity.WARN if facts.own_copies else Severity.FAIL
    return Finding(check="copies", severity=severity, what=what, detail=f"{facts.wanted_copies} are wanted", advice=advice)


def check_refusals(facts: Facts) -> list[Finding]:
    """What has been refused since the start. Strangers' datagrams are no trouble; members' forgeries are."""
    refused = {name.removeprefix("refused_"): count for name, count in facts.counts.items() if name.startswith("refused_") and count}
    if not refused:
        return [Finding(check="refused", severity=Severity.OK, what="nothing has been refused since the start")]
    detail = _names(f"{reason} {count:.0f}" for reason, count in sorted(refused.items(), key=lambda item: -item[1]))
    if "forged_record" in refused:
        advice = "a member stores what it may not sign: the log names its address (`directory.refused`)"
        what = "forged records have been offered and refused"
        return [Finding(check="refused", severity=Severity.WARN, what=what, detail=detail, advice=advice)]
    return [Finding(check="refused", severity=Severity.OK, what="some datagrams have been refused since the start", detail=detail)]


CHECKS: tuple[Callable[[Facts], list[Finding]], ...] = (
    check_clock,
    check_peers,
    check_bootstraps,
    check_records,
    check_links,
    check_workers,
    check_certificates,
    check_documents,
    check_limits,
    check_credentials,
    check_lookup,
    check_refusals,
)


def _count(number: int, noun: str, plural: str = "") -> str:
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def _span(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _answers(answers: Iterable[Answer]) -> str:
    def one(answer: Answer) -> str:
        named = f"{answer.name} at {answer.address}" if answer.name else answer.address
        gone = f", silent for {_span(answer.gone_s)}" if answer.gone_s is not None else ""
        return named + gone + (f": {answer.error}" if answer.error else "")

    return _names(one(answer) for answer in answers)


def _names(names: Iterable[str]) -> str:
    listed = list(names)
    more = f"; and {len(listed) - MOST_NAMED} more" if len(listed) > MOST_NAMED else ""
    return "; ".join(listed[:MOST_NAMED]) + more
