"""Orders: only the mesh's own issuers give them, only the node they are for obeys, and never twice."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from mesh.authority import KEYS_KID, NODES_KID
from mesh.cordon import CERTIFICATE_LOOK_S, ORDER_FILE, Cordon
from mesh.documents import DOCUMENT_DOMAIN
from mesh.envelope import seal
from mesh.errors import BadSignature, Expired, MalformedEnvelope, NotYetValid, TrustError, UnknownSigner
from mesh.identity import Identity
from mesh.orders import MAX_ORDER_BYTES, ORDER_DOMAIN, ORDER_LIFE_S, Action, Order, parse_order, seal_order
from mesh.scope import Scope
from mesh.trust import Issuer, Purpose, Role, Trust, key_id, parse_keyset, raw_public_key, seal_keyset
from tests.support import vectors
from tests.support.authority import make_mesh
from tests.support.clocks import StoppedClock

NOW = 1_800_000_000.0
MESH = make_mesh(now=NOW)
OTHER = make_mesh(now=NOW, name="other")
WORKER = MESH.identity(Role.WORKER, now=NOW)


def order(action: Action = Action.DRAIN, *, node: Identity = WORKER, at: float = NOW, reason: str = "") -> Order:
    unsigned = Order(node_id=node.node_id, action=action, issued=at, expires=at + ORDER_LIFE_S, reason=reason)
    return seal_order(unsigned, MESH.keys_issuer, KEYS_KID)


def parse(data: bytes, *, now: float = NOW, trust: Trust | None = None) -> Order:
    return parse_order(data, trust or MESH.trust(), now=now)


def test_what_an_issuer_signs_reads_the_same() -> None:
    made = order(reason="new driver", at=NOW + 0.125)
    assert parse(made.signed) == made
    assert len(order(reason="x" * 80).signed) <= MAX_ORDER_BYTES


def test_committed_vector_is_what_is_written_today() -> None:
    vector = vectors.read("order.json")
    assert vectors.build()["order.json"] == vector
    keyset = parse_keyset(bytes.fromhex(vector["keyset"]), mesh_id=bytes.fromhex(vector["mesh_id"]))
    found = parse(bytes.fromhex(vector["order"]), now=vector["now"], trust=Trust(keyset))
    assert (found.node_id.hex(), str(found.action), found.reason) == (vector["node"], vector["action"], vector["reason"])
    assert (found.issued, found.expires) == (vector["issued"], vector["expires"])


def test_order_holds_for_minutes_and_no_longer() -> None:
    made = order()
    assert parse(made.signed, now=NOW + ORDER_LIFE_S - 1)
    with pytest.raises(Expired):
        parse(made.signed, now=NOW + ORDER_LIFE_S)
    with pytest.raises(NotYetValid):
        parse(made.signed, now=NOW - 60)
    long = seal_order(replace(made, expires=NOW + 10 * ORDER_LIFE_S), MESH.keys_issuer, KEYS_KID)
    with pytest.raises(MalformedEnvelope):
        parse(long.signed)


def test_only_an_issuer_of_this_mesh_that_may_sign_documents_of_all_of_it_gives_orders() -> None:
    made = order()
    with pytest.raises(BadSignature):
        parse(seal_order(made, OTHER.keys_issuer, KEYS_KID).signed)
    with pytest.raises(UnknownSigner):
        parse(seal_order(made, MESH.admission.key, NODES_KID).signed)
    with pytest.raises(UnknownSigner):
        parse(seal_order(made, MESH.keys_issuer, "nobody").signed)
    for field in ("projects", "models", "endpoints", "regions"):
        root, key = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
        issuer = Issuer(
            kid="part",
            public_key=raw_public_key(key.public_key()),
            may=frozenset({Purpose.DOCUMENT}),
            not_before=NOW,
            expires=NOW + 1e6,
            scope=Scope(**{field: frozenset({"search"})}),
        )
        signed = seal_keyset(root, name="x", seq=1, issued=NOW, issuers=[issuer])
        trust = Trust(parse_keyset(signed, mesh_id=key_id(raw_public_key(root.public_key()))))
        with pytest.raises(UnknownSigner):
            parse(seal_order(made, key, "part").signed, trust=trust)


def test_document_is_no_order_nor_the_other_way_round() -> None:
    payload = {"node": WORKER.node_id, "act": "drain", "iat": round(NOW * 1000), "exp": round((NOW + 60) * 1000)}
    assert parse(seal(ORDER_DOMAIN, KEYS_KID.encode(), MESH.keys_issuer, payload))
    with pytest.raises(BadSignature):
        parse(seal(DOCUMENT_DOMAIN, KEYS_KID.encode(), MESH.keys_issuer, payload))


@pytest.mark.parametrize(
    "odd",
    [{"node": b"short"}, {"act": "explode"}, {"act": 1}, {"iat": "now"}, {"iat": -1}, {"exp": None}, {"why": "x" * 81}, {"why": "a\nb"}],
)
def test_odd_orders_are_malformed(odd: dict[str, object]) -> None:
    payload = {"node": WORKER.node_id, "act": "drain", "iat": round(NOW * 1000), "exp": round((NOW + 60) * 1000)} | odd
    with pytest.raises(MalformedEnvelope):
        parse(seal(ORDER_DOMAIN, KEYS_KID.encode(), MESH.keys_issuer, payload))


SIGNED = order(reason="why").signed


@given(st.integers(0, len(SIGNED) * 8 - 1))
def test_no_bit_of_an_order_may_change(bit: int) -> None:
    changed = bytearray(SIGNED)
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(TrustError):
        parse(bytes(changed))


# -- the node that obeys


class Node:
    """A node's cordon in a folder, and what it told."""

    def __init__(self, folder: Path) -> None:
        self.clock = StoppedClock(NOW)
        self.told: list[str] = []
        self.identity = MESH.identity(Role.WORKER, now=NOW)
        self.folder = folder
        self.start()

    def start(self) -> None:
        self.cordon = Cordon(self.identity, self.folder, clock=self.clock, on_change=lambda: self.told.append(self.cordon.why))

    def order(self, action: Action, *, at: float, reason: str = "") -> bool:
        return self.cordon.obey(order(action, node=self.identity, at=at, reason=reason).signed)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_drained_node_says_why_and_undrain_ends_it(node: Node) -> None:
    assert node.cordon.why == ""
    assert node.order(Action.DRAIN, at=NOW, reason="new driver")
    assert node.cordon.why == "drained by the operator: new driver"
    assert node.order(Action.UNDRAIN, at=NOW + 1)
    assert node.cordon.why == ""
    assert node.told == ["drained by the operator: new driver", ""]


def test_order_that_is_not_newer_is_not_obeyed_not_even_after_a_restart(node: Node) -> None:
    drain, undrain = order(node=node.identity).signed, order(Action.UNDRAIN, node=node.identity, at=NOW + 1).signed
    assert node.cordon.obey(drain)
    assert node.cordon.obey(undrain)
    assert not node.cordon.obey(drain)
    node.start()
    assert not node.cordon.obey(drain), "played back"
    assert node.cordon.why == ""


def test_drained_state_survives_a_restart(node: Node) -> None:
    node.order(Action.DRAIN, at=NOW)
    node.start()
    assert node.cordon.why.startswith("drained by the operator")
    assert node.order(Action.UNDRAIN, at=NOW + 2)
    node.start()
    assert node.cordon.why == ""


@pytest.mark.parametrize("kept", ["", "{}", "[]", '{"issued": "x", "action": "drain"}', "\x00"])
def test_unreadable_memory_of_orders_stops_no_node(node: Node, kept: str) -> None:
    (node.folder / ORDER_FILE).write_text(kept)
    node.start()
    assert node.cordon.why == ""
    assert node.order(Action.DRAIN, at=NOW)
    assert json.loads((node.folder / ORDER_FILE).read_text())["action"] == "drain"


def test_another_nodes_order_is_not_obeyed_and_a_bad_frame_does_no_harm(node: Node) -> None:
    assert not node.cordon.obey(order().signed)
    signed = order(node=node.identity).signed
    forged = signed[:-1] + bytes([signed[-1] ^ 1])
    for fields in ({}, {"order": 5}, {"order": b"x" * 600}, {"order": forged}):
        node.cordon.obey_frame(fields)
    assert node.told == []
    node.cordon.obey_frame({"order": order(node=node.identity).signed})
    assert len(node.told) == 1


async def test_node_leaves_before_its_certificate_ends_and_comes_back_once_it_is_renewed(node: Node) -> None:
    watching = asyncio.create_task(node.cordon.watch_certificate())
    await asyncio.sleep(0)
    assert node.told == []
    node.clock.now = node.identity.membership.expires - 30
    while not node.told:
        await asyncio.sleep(0)
    assert "certificate" in node.cordon.why
    assert node.clock.slept[0] == CERTIFICATE_LOOK_S
    node.identity.renew(MESH.identity(Role.WORKER, now=node.clock.now, key=node.identity.key).credentials, now=node.clock.now)
    while node.cordon.why:
        await asyncio.sleep(0)
    watching.cancel()
