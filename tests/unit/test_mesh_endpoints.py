"""Endpoints as documents: what is written is what is read, who may sign them, and that a key never gets further through one."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.apikey import ApiKey
from mesh.documents import ENDPOINT_KIND, Document, next_version, parse_document, seal_document
from mesh.endpoints import MAX_KEEP_S, MIN_KEEP_S, Catalogue, Endpoint, Recording, encode_endpoint, parse_endpoint, unknown_fields
from mesh.errors import MalformedEnvelope, UnknownSigner
from mesh.limits import Limit
from mesh.scope import Scope
from mesh.trust import Issuer, Purpose, Trust, parse_keyset, raw_public_key, seal_keyset
from tests.support.authority import make_mesh
from tests.unit.test_mesh_limits import LIMITS

NOW = 1_800_000_000.0
CHAT = Endpoint(project="search", name="chat", model="qwen3-8b")
RECORDINGS = st.builds(
    Recording, public_key=st.binary(min_size=32, max_size=32), keep_s=st.integers(MIN_KEEP_S, MAX_KEEP_S), full=st.booleans()
)
ENDPOINTS = st.builds(
    Endpoint,
    project=st.just("search"),
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True),
    model=st.text(st.characters(categories=("L", "N")), min_size=1, max_size=256),
    timeout_s=st.just(0.0) | st.integers(1, 86_400_000).map(lambda ms: ms / 1000),
    limit=LIMITS,
    recording=st.none() | RECORDINGS,
)


def document(body: bytes, *, project: str = "search", name: str = "chat", expires: float = 0.0) -> Document:
    return Document(kind=ENDPOINT_KIND, name=name, project=project, seq=1, previous=b"", issued=NOW, body=body, expires=expires)


@given(ENDPOINTS)
def test_endpoints_are_read_as_they_were_written(endpoint: Endpoint) -> None:
    assert parse_endpoint(document(encode_endpoint(endpoint), name=endpoint.name)) == endpoint


def test_what_only_a_later_version_knows_is_passed_over_and_can_be_told() -> None:
    body = msgpack.packb({"m": "qwen3-8b", "replicas": {"min": 2, "max": 20}})
    assert parse_endpoint(document(body)) == CHAT
    assert unknown_fields(body) == {"replicas"}
    assert not unknown_fields(encode_endpoint(replace(CHAT, timeout_s=3.0, limit=Limit(rps=1.0))))


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"m": ""},
        {"m": 7},
        {"m": "x" * 257},
        {"m": "a\nb"},
        {"m": "a", "dl": 0},
        {"m": "a", "dl": 86_400_001},
        {"m": "a", "dl": 1.5},
        {"m": "a", "lim": 7},
        {"m": "a", "lim": {"rps": -1}},
        {"m": "a", "rec": {}},
        {"m": "a", "rec": {"pub": bytes(31), "keep": 3600}},
        {"m": "a", "rec": {"pub": bytes(32), "keep": MIN_KEEP_S - 1}},
        {"m": "a", "rec": {"pub": bytes(32), "keep": MAX_KEEP_S + 1}},
        {"m": "a", "rec": {"pub": bytes(32), "keep": 3600, "full": 1}},
        {"m": "a", "rec": [1]},
        {"m": "a", "rec": {b"pub": bytes(32)}},
        {"gone": 1},
        [],
    ],
)
def test_what_makes_no_sense_is_refused_whole(body: object) -> None:
    with pytest.raises(MalformedEnvelope):
        parse_endpoint(document(msgpack.packb(body)))


@pytest.mark.parametrize(
    "where", [{"project": ""}, {"name": ""}, {"name": "a/b"}, {"name": "a:b"}, {"name": ".a"}, {"name": "a" * 64}, {"expires": NOW + 60}]
)
def test_an_endpoint_is_a_projects_has_a_plain_name_and_no_end(where: dict[str, Any]) -> None:
    with pytest.raises(MalformedEnvelope):
        parse_endpoint(document(encode_endpoint(CHAT), **where))


@given(st.binary(max_size=200))
def test_no_body_raises_anything_else(data: bytes) -> None:
    try:
        parse_endpoint(document(data))
    except MalformedEnvelope:
        return


def test_a_catalogue_goes_by_the_newest_and_keeps_what_held_where_that_cannot_be_read() -> None:
    catalogue = Catalogue()
    assert catalogue.take(document(encode_endpoint(CHAT)))
    assert catalogue.find("search", "chat") == CHAT
    assert catalogue.find("ads", "chat") is None
    with pytest.raises(MalformedEnvelope):
        catalogue.take(document(b"?"))
    assert list(catalogue.listed()) == list(catalogue.listed("search")) == [CHAT]
    assert catalogue.take(document(encode_endpoint(None)))
    assert catalogue.take(document(encode_endpoint(None))), "it may come again"
    assert not catalogue.projects
    assert not catalogue.take(replace(document(encode_endpoint(CHAT)), kind="limits"))


def test_a_body_that_cannot_be_read_leaves_no_trace_of_its_project() -> None:
    catalogue = Catalogue()
    with pytest.raises(MalformedEnvelope):
        catalogue.take(document(b"?"))
    assert not catalogue.projects


@pytest.mark.parametrize(
    ("scope", "holds"),
    [
        (Scope(), True),
        (Scope(projects=frozenset({"search"})), True),
        (Scope(projects=frozenset({"ads"})), False),
        (Scope(models=frozenset({"qwen3-8b"})), False),
        (Scope(roles=frozenset({"invoker", "viewer"})), False),
        (Scope(roles=frozenset({"deployer"})), True),
        (Scope(roles=frozenset({"admin"})), True),
        (Scope(projects=frozenset({"search"}), roles=frozenset({"deployer", "viewer"})), True),
        (Scope(endpoints=frozenset({"chat"})), True),
        (Scope(endpoints=frozenset({"embed"})), False),
    ],
    ids=str,
)
def test_only_an_issuer_that_may_deploy_in_the_project_signs_its_endpoints(scope: Scope, holds: bool) -> None:
    mesh, key = make_mesh(now=NOW), Ed25519PrivateKey.generate()
    issuer = Issuer(
        kid="some",
        public_key=raw_public_key(key.public_key()),
        may=frozenset({Purpose.DOCUMENT}),
        not_before=0,
        expires=NOW * 2,
        scope=scope,
    )
    trust = Trust(parse_keyset(seal_keyset(mesh.root, name="m", seq=9, issued=NOW, issuers=[issuer]), mesh_id=mesh.mesh_id))
    version = next_version(None, kind=ENDPOINT_KIND, name="chat", project="search", body=encode_endpoint(CHAT), now=NOW)
    with nullcontext() if holds else pytest.raises(UnknownSigner):
        assert parse_endpoint(parse_document(seal_document(version, key, "some").signed, trust, now=NOW)) == CHAT


LISTED = st.none() | st.frozensets(st.sampled_from("abc"))


@given(LISTED, LISTED, LISTED, LISTED, st.sampled_from("abc"), st.sampled_from(["", *"abc"]))
@settings(max_examples=400)
def test_a_narrowed_key_reaches_nothing_through_endpoints_that_its_parent_does_not(
    outer_models: frozenset[str] | None,
    outer_endpoints: frozenset[str] | None,
    models: frozenset[str] | None,
    endpoints: frozenset[str] | None,
    model: str,
    endpoint: str,
) -> None:
    parent = ApiKey(
        id=bytes(8), project="search", roles=frozenset(), not_before=0.0, expires=1.0, models=outer_models, endpoints=outer_endpoints
    )
    child = replace(parent, models=models, endpoints=endpoints)
    if child.scope.beyond(parent.scope) is None and child.may_use(model, endpoint):
        assert parent.may_use(model, endpoint)


def test_a_key_for_an_endpoint_calls_that_and_no_model_past_it() -> None:
    key = ApiKey(id=bytes(8), project="search", roles=frozenset(), not_before=0.0, expires=1.0, endpoints=frozenset({"chat"}))
    assert key.may_use("qwen3-8b", "chat")
    assert key.may_use("qwen3-14b", "chat"), "whatever it leads to"
    assert not key.may_use("qwen3-8b")
    assert not key.may_use("qwen3-8b", "embed")
    bounded = replace(key, models=frozenset({"qwen3-8b"}))
    assert bounded.may_use("qwen3-8b", "chat")
    assert not bounded.may_use("qwen3-14b", "chat"), "an endpoint takes no key further than its models"
