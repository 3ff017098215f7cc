"""Who is let in, decided without a network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bootstrap.enrol import AttemptLimit, Desk
from bootstrap.ledger import Ledger
from mesh.authority import encode_admission
from mesh.errors import BadSignature, Expired, InvalidRequest, MalformedEnvelope, RateLimited, TokenSpent, TrustError, UnknownSigner
from mesh.identity import Identity, Peer, make_request, parse_credentials
from mesh.invite import Invite, parse_token, seal_invite
from mesh.trust import Role, parse_keyset, raw_public_key, seal_keyset
from tests.support.authority import make_mesh
from tests.support.bootstraps import nobody
from tests.support.clocks import StoppedClock
from tests.support.vectors import fixed_key

NOW = 1_800_000_000.0
MESH, OTHER = make_mesh(now=NOW), make_mesh(now=NOW)
ALICE, BOB = fixed_key("alice"), fixed_key("bob")
INVITE = Invite(id=b"0123456789abcdef", role=Role.WORKER, uses=1, issued=NOW, expires=NOW + 600.0)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    ledger = Ledger(tmp_path / "tokens.db")
    yield Desk(
        admission=MESH.admission,
        trust=MESH.trust(),
        ledger=ledger,
        clock=StoppedClock(NOW),
        known_bootstraps=lambda: ("b.example:7600",),
        tell_others=nobody,
    )
    ledger.close()


def asking(invite: Invite = INVITE, key: Any = ALICE, **changes: Any) -> dict[str, Any]:
    text = seal_invite(MESH.keys_issuer, "keys-1", invite, mesh_id=MESH.mesh_id, bootstraps=("b.example:7600",))
    body = {"token": parse_token(text).signed.hex(), "role": str(invite.role), "request": make_request(key).decode()}
    return {name: value for name, value in (body | changes).items() if value is not ...}


async def test_newcomer_with_a_good_token_gets_a_whole_identity(desk: Desk) -> None:
    answer = await desk.enrol(asking())
    identity = Identity(ALICE, parse_credentials(answer["credentials"]), mesh_id=MESH.mesh_id, now=NOW)
    assert identity.role == Role.WORKER
    assert answer["bootstraps"] == ["b.example:7600"]
    assert "admission" not in answer


async def test_only_a_bootstrap_node_is_told_how_to_admit_others(desk: Desk) -> None:
    for role in (Role.PROXY, Role.WORKER):
        assert "admission" not in await desk.enrol(asking(replace(INVITE, role=role, id=str(role).ljust(16).encode())))
    answer = await desk.enrol(asking(replace(INVITE, role=Role.BOOTSTRAP)))
    assert answer["admission"] == encode_admission(MESH.admission)


async def test_token_admits_one_node_once(desk: Desk) -> None:
    await desk.enrol(asking())
    with pytest.raises(TokenSpent, match="mesh invite"):
        await desk.enrol(asking(key=BOB))


async def test_node_that_lost_the_answer_may_ask_again(desk: Desk) -> None:
    await desk.enrol(asking())
    await desk.enrol(asking())


async def test_token_for_several_admits_as_many_nodes(desk: Desk) -> None:
    invite = replace(INVITE, uses=3)
    for name in ("a", "b", "c"):
        await desk.enrol(asking(invite, fixed_key(name)))
    with pytest.raises(TokenSpent):
        await desk.enrol(asking(invite, fixed_key("d")))


async def test_use_known_elsewhere_counts_here(desk: Desk) -> None:
    async def elsewhere(_token: bytes, _node_id: bytes) -> set[bytes]:
        return {b"x" * 32}

    with pytest.raises(TokenSpent):
        await replace(desk, tell_others=elsewhere).enrol(asking())
    with pytest.raises(TokenSpent):
        await desk.enrol(asking())  # learned, and not forgotten


async def test_other_bootstrap_nodes_use_is_noted_and_answered(desk: Desk) -> None:
    body = asking() | {"node": ("ab" * 32)}
    assert await desk.spent(body) == {"nodes": ["ab" * 32]}
    with pytest.raises(TokenSpent):
        await desk.enrol(asking())


async def test_expired_token_is_refused(desk: Desk) -> None:
    with pytest.raises(Expired):
        await desk.enrol(asking(replace(INVITE, expires=NOW)))


async def test_token_of_another_mesh_is_refused(desk: Desk) -> None:
    foreign = seal_invite(OTHER.keys_issuer, "keys-1", INVITE, mesh_id=OTHER.mesh_id, bootstraps=("b:1",))
    with pytest.raises(BadSignature):
        await desk.enrol(asking(token=parse_token(foreign).signed.hex()))


async def test_token_of_an_issuer_that_was_taken_off_the_keyset_is_refused(desk: Desk) -> None:
    remaining = [issuer for issuer in MESH.keyset.issuers if issuer.kid != "keys-1"]
    signed = seal_keyset(MESH.root, name="test", seq=2, issued=NOW, issuers=remaining)
    desk.trust.update(parse_keyset(signed, mesh_id=MESH.mesh_id))
    with pytest.raises(UnknownSigner):
        await desk.enrol(asking())


async def test_token_for_a_worker_admits_no_proxy(desk: Desk) -> None:
    with pytest.raises(TrustError, match="admits a worker"):
        await desk.enrol(asking(role="proxy"))


@pytest.mark.parametrize(
    "changes",
    [
        {"token": ...},
        {"token": 1},
        {"token": "zz"},
        {"token": "ü"},
        {"token": ""},
        {"request": ...},
        {"request": []},
        {"request": "nonsense"},
        {"role": ...},
        {"role": {}},
    ],
)
async def test_request_of_the_wrong_shape_is_refused_and_costs_no_use(desk: Desk, changes: dict[str, Any]) -> None:
    with pytest.raises((InvalidRequest, TrustError)):
        await desk.enrol(asking(**changes))
    await desk.enrol(asking(key=BOB))


async def test_renewal_keeps_key_and_role(desk: Desk) -> None:
    peer = Peer(node_id=MESH.identity(Role.PROXY, now=NOW, key=ALICE).node_id, role=Role.PROXY)
    answer = desk.renew(peer, {"request": make_request(ALICE).decode(), "role": "bootstrap"})
    assert Identity(ALICE, parse_credentials(answer["credentials"]), mesh_id=MESH.mesh_id, now=NOW).role == Role.PROXY
    with pytest.raises(TrustError, match="another"):
        desk.renew(peer, {"request": make_request(BOB).decode()})
    with pytest.raises(MalformedEnvelope):
        desk.renew(peer, {"request": "x"})


def test_public_answer_holds_nothing_secret(desk: Desk) -> None:
    about = desk.about()
    assert set(about) == {"mesh_id", "root_certificate", "keyset"}
    assert MESH.admission.secret.hex() not in str(about)


def test_attempts_are_limited_by_address_and_come_back_with_time() -> None:
    limit = AttemptLimit(burst=2, per_s=1.0)
    limit.take("192.0.2.1", now=0.0)
    limit.take("192.0.2.1", now=0.0)
    with pytest.raises(RateLimited) as caught:
        limit.take("192.0.2.1", now=0.5)
    assert caught.value.retry_after_s == pytest.approx(0.5)
    limit.take("192.0.2.2", now=0.5)
    limit.take("192.0.2.1", now=1.0)


def test_one_ipv6_network_is_one_address() -> None:
    limit = AttemptLimit(burst=1, per_s=1.0)
    limit.take("2001:db8::1", now=0.0)
    with pytest.raises(RateLimited):
        limit.take("2001:db8::2", now=0.0)
    limit.take("2001:db8:0:1::1", now=0.0)
    limit.take("::ffff:192.0.2.1", now=0.0)
    limit.take("::ffff:192.0.2.2", now=0.0)
    limit.take("fe80::1%eth0", now=0.0)
    limit.take("", now=0.0)


def test_attempt_limit_is_bounded() -> None:
    limit = AttemptLimit(size=10)
    for n in range(100):
        limit.take(f"192.0.2.{n}", now=0.0)
    assert len(limit._buckets) == 10


def test_node_id_in_the_answer_is_the_requests_own_key() -> None:
    assert MESH.identity(Role.WORKER, now=NOW, key=ALICE).public_key == raw_public_key(ALICE.public_key())
