"""Records: what nodes say of themselves, and what others make of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.envelope import seal
from mesh.errors import BadSignature, Expired, MalformedEnvelope, NotYetValid, TrustError, UnknownSigner
from mesh.membership import MembershipCache
from mesh.records import (
    MAX_LIFETIME_S,
    MAX_RECORD_BYTES,
    RECORD_DOMAIN,
    Capability,
    Load,
    ModelEntry,
    Record,
    State,
    directory_key,
    model_key,
    newest,
    parse_record,
    record_keys,
    role_key,
    seal_record,
)
from mesh.trust import Role, Trust, key_id, parse_keyset, raw_public_key
from tests.support import vectors
from tests.support.authority import make_mesh
from tests.support.vectors import fixed_key

NOW = 1_800_000_000.0
MESH = make_mesh(now=NOW)
ALICE, BOB = fixed_key("alice"), fixed_key("bob")
ALICES = MESH.identity(Role.WORKER, now=NOW, key=ALICE).membership.signed
BOBS = MESH.identity(Role.WORKER, now=NOW, key=BOB).membership.signed

PLAIN = Record(
    node_id=key_id(raw_public_key(ALICE.public_key())),
    role=Role.WORKER,
    boot=int(NOW * 1000) - 1000,
    seq=1,
    issued=NOW,
    expires=NOW + 20.0,
    state=State.READY,
    addresses=("192.0.2.1:7700",),
    models=(ModelEntry(name="m"),),
)


def members() -> MembershipCache:
    return MembershipCache(MESH.trust())


def sealed(**changes: Any) -> bytes:
    return seal_record(replace(PLAIN, **changes), ALICE, ALICES).signed


def payload(**changes: Any) -> bytes:
    """A record signed by alice whose payload is not what our own code would write."""
    fields = {"mem": ALICES, "boot": 1, "seq": 1, "iat": int(NOW * 1000), "exp": int(NOW * 1000) + 20_000, "st": "ready"}
    merged = {name: value for name, value in (fields | changes).items() if value is not ...}
    return seal(RECORD_DOMAIN, raw_public_key(ALICE.public_key()), ALICE, merged)


def test_record_reads_back_as_it_was_signed() -> None:
    record = replace(
        PLAIN,
        models=(ModelEntry(name="m", digest="d", tasks=("embeddings",), adapters=("a",), context_tokens=8), ModelEntry(name="n")),
        capability=Capability(gpu="L4", gpu_count=2, memory_bytes=48 << 30, region="eu", tier="spot", engine="vllm", max_concurrency=9),
        load=Load(running=1, waiting=2, kv_use=0.5),
        reason="because",
        api="http://192.0.2.1:8080/v1",
        version="0.1.0",
    )
    signed = seal_record(record, ALICE, ALICES)
    assert parse_record(signed.signed, members(), now=NOW) == signed


def test_committed_vector_is_what_is_made_today_and_holds() -> None:
    vector = vectors.read("record.json")
    assert vectors.build()["record.json"] == vector
    trust = Trust(parse_keyset(bytes.fromhex(vector["keyset"]), mesh_id=bytes.fromhex(vector["mesh_id"])))
    record = parse_record(bytes.fromhex(vector["record"]), MembershipCache(trust), now=vector["now"] + 1.0)
    assert record.node_id.hex() == vector["node_id"]
    assert [entry.name for entry in record.models] == ["qwen3-8b", "minilm"]


def test_plain_record_is_about_three_hundred_bytes() -> None:
    assert len(sealed()) < 400


def test_record_that_would_be_too_large_is_refused_by_its_own_node() -> None:
    with pytest.raises(MalformedEnvelope, match="fewer models"):
        sealed(models=tuple(ModelEntry(name=f"model-{n}" * 5) for n in range(40)))


def test_every_flipped_bit_is_noticed() -> None:
    data, cache = sealed(), members()
    for position in range(len(data) * 8):
        mutated = bytearray(data)
        mutated[position // 8] ^= 1 << position % 8
        with pytest.raises(TrustError):
            parse_record(bytes(mutated), cache, now=NOW)


def test_every_truncation_is_noticed() -> None:
    data, cache = sealed(), members()
    for length in range(len(data)):
        with pytest.raises(TrustError):
            parse_record(data[:length], cache, now=NOW)


def test_oversized_record_is_refused() -> None:
    with pytest.raises(MalformedEnvelope):
        parse_record(payload(why="x", pad=b"x" * MAX_RECORD_BYTES), members(), now=NOW)


def test_bob_cannot_speak_with_alices_membership() -> None:
    with pytest.raises(UnknownSigner):
        parse_record(seal_record(PLAIN, BOB, ALICES).signed, members(), now=NOW)


def test_bob_cannot_sign_in_alices_name() -> None:
    forged = seal(RECORD_DOMAIN, raw_public_key(ALICE.public_key()), BOB, {"mem": ALICES})
    with pytest.raises(BadSignature):
        parse_record(forged, members(), now=NOW)


def test_record_of_another_mesh_is_refused() -> None:
    other = make_mesh(now=NOW)
    membership = other.identity(Role.WORKER, now=NOW, key=ALICE).membership.signed
    with pytest.raises(TrustError):
        parse_record(seal_record(PLAIN, ALICE, membership).signed, members(), now=NOW)


def test_envelope_of_another_domain_is_no_record() -> None:
    data = seal("infermesh/other", raw_public_key(ALICE.public_key()), ALICE, {"mem": ALICES})
    with pytest.raises(BadSignature):
        parse_record(data, members(), now=NOW)


def test_record_is_dead_from_its_expiry_on() -> None:
    assert parse_record(sealed(), members(), now=NOW + 19.9).alive(NOW + 19.9)
    with pytest.raises(Expired):
        parse_record(sealed(), members(), now=NOW + 20.0)


def test_record_from_the_future_is_refused() -> None:
    with pytest.raises(NotYetValid):
        parse_record(sealed(issued=NOW + 60.0, expires=NOW + 80.0), members(), now=NOW)


def test_no_record_lives_longer_than_a_minute_whatever_it_says() -> None:
    record = parse_record(sealed(expires=NOW + 1e6), members(), now=NOW)
    assert record.expires == NOW + MAX_LIFETIME_S


def test_record_does_not_outlive_its_owners_membership() -> None:
    end = MESH.identity(Role.WORKER, now=NOW, key=ALICE).membership.expires
    record = parse_record(sealed(issued=end - 5.0, expires=end + 15.0), members(), now=end - 4.0)
    assert record.expires == end


def test_boot_from_the_future_cannot_outrank_every_later_start() -> None:
    with pytest.raises(MalformedEnvelope, match="boot"):
        parse_record(sealed(boot=int(NOW * 1000) + 3_600_000), members(), now=NOW)


@pytest.mark.parametrize(
    "changes",
    [
        {"mem": ...},
        {"mem": b""},
        {"mem": "text"},
        {"seq": -1},
        {"seq": 1.5},
        {"boot": ...},
        {"st": "happy"},
        {"st": 1},
        {"addr": "host:1"},
        {"addr": [1]},
        {"addr": ["a"] * 9},
        {"mod": [{"n": 1}]},
        {"mod": [{}]},
        {"mod": ["m"]},
        {"mod": [{"n": "m", "t": "chat"}]},
        {"mod": [{"n": "m", "c": -1}]},
        {"mod": [{"n": "esc\x1b[0m"}]},
        {"load": [1, 2]},
        {"load": 5},
        {"load": [1, 2, 1001]},
        {"load": ["1", 2, 3]},
        {"why": "x" * 121},
        {"gpus": 10**9},
        {"exp": "soon"},
    ],
)
def test_nonsense_signed_by_a_member_is_malformed(changes: dict[str, Any]) -> None:
    with pytest.raises(MalformedEnvelope):
        parse_record(payload(**changes), members(), now=NOW)


@given(st.dictionaries(st.sampled_from(["st", "addr", "mod", "load", "why", "gpu", "mb", "api", "boot", "exp"]), st.from_type(object)))
def test_no_payload_raises_anything_but_a_trust_error(changes: dict[str, Any]) -> None:
    try:
        data = payload(**{name: value for name, value in changes.items() if isinstance(value, int | str | bytes | bool | float)})
    except (OverflowError, ValueError):
        return
    try:
        parse_record(data, members(), now=NOW)
    except TrustError:
        return


def test_ready_worker_is_found_by_role_and_by_model_others_by_role_only() -> None:
    ready = replace(PLAIN, models=(ModelEntry(name="m"), ModelEntry(name="n")))
    assert list(record_keys(ready)) == [role_key(Role.WORKER), model_key("m"), model_key("n")]
    assert list(record_keys(replace(ready, state=State.LOADING))) == [role_key(Role.WORKER)]


def test_directory_keys_of_different_things_differ() -> None:
    keys = {directory_key("a", "bc"), directory_key("ab", "c"), directory_key("a", "bc", 1), model_key("bc"), role_key(Role.PROXY)}
    assert len(keys) == 5
    assert all(len(key) == 32 for key in keys)


def test_newest_takes_the_highest_boot_then_seq_and_drops_the_dead() -> None:
    old, new = replace(PLAIN, seq=9), replace(PLAIN, boot=PLAIN.boot + 1, seq=0)
    bob = replace(PLAIN, node_id=b"b" * 32, seq=3)
    dead = replace(PLAIN, node_id=b"d" * 32, expires=NOW)
    for order in ([old, new, bob, dead], [dead, bob, new, old]):
        assert newest(order, now=NOW) == {PLAIN.node_id: new, bob.node_id: bob}


def test_outbound_only_node_has_no_address() -> None:
    assert replace(PLAIN, addresses=()).outbound_only
    assert not PLAIN.outbound_only


def test_record_knows_what_it_serves() -> None:
    assert PLAIN.serves("m")
    assert not PLAIN.serves("n")


@pytest.mark.parametrize("skew_s", [-45.0, -25.0, 0.0, 25.0])
def test_record_straight_from_its_owner_lives_from_its_arrival_whatever_the_owners_clock(skew_s: float) -> None:
    arrived = parse_record(sealed(boot=int(NOW * 1000) - 100_000), members(), now=NOW - skew_s, first_hand=True)
    assert arrived.issued == NOW - skew_s
    assert arrived.expires == pytest.approx(NOW - skew_s + 20.0)


@pytest.mark.parametrize(("skew_s", "error"), [(-70.0, Expired), (70.0, NotYetValid)])
def test_clock_that_is_minutes_off_is_told_and_not_believed(skew_s: float, error: type[TrustError]) -> None:
    with pytest.raises(error):
        parse_record(sealed(boot=int(NOW * 1000) - 100_000), members(), now=NOW - skew_s, first_hand=True)


def test_record_from_elsewhere_gets_no_such_grace() -> None:
    with pytest.raises(Expired):
        parse_record(sealed(), members(), now=NOW + 25.0)
