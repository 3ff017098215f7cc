"""Limits as documents: what is written is what is read, and nothing else is taken."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.documents import Document
from mesh.errors import MalformedEnvelope, UsageError
from mesh.limits import MAX_MODELS, Limit, Limits, Rules, encode_limits, parse_limits, project_name

NUMBERS = st.none() | st.floats(0, 1e12)
LIMITS = st.builds(
    Limit,
    rps=NUMBERS,
    tps=NUMBERS,
    concurrency=NUMBERS,
    tokens_per_day=NUMBERS,
    money_per_month=NUMBERS,
    burst_s=st.none() | st.floats(0.1, 60),
)


def document(name: str, limits: Limits, *, project: str = "", kind: str = "limits", seq: int = 1) -> Document:
    return Document(kind=kind, name=name, project=project, seq=seq, previous=b"", issued=0.0, body=encode_limits(limits))


@given(LIMITS, st.dictionaries(st.text(st.characters(categories=("L", "N")), min_size=1, max_size=20), LIMITS, max_size=5))
def test_limits_are_read_as_they_were_written(whole: Limit, models: dict[str, Limit]) -> None:
    limits = Limits(whole=whole, models=models)
    assert parse_limits(encode_limits(limits)) == limits


@pytest.mark.parametrize(
    "body",
    [
        {"rps": -1},
        {"tps": "1"},
        {"con": float("nan")},
        {"burst": 0.01},
        {"models": [{"rps": 1}]},
        {"models": [{"m": 1}]},
        {"models": 7},
        [],
    ],
)
def test_what_makes_no_sense_is_refused_whole(body: object) -> None:
    with pytest.raises(MalformedEnvelope):
        parse_limits(msgpack.packb(body))


def test_unknown_fields_are_left_for_newer_readers() -> None:
    assert parse_limits(msgpack.packb({"rps": 3, "later": {}})) == Limits(whole=Limit(rps=3.0))


def test_too_many_models_are_not_written() -> None:
    with pytest.raises(UsageError):
        encode_limits(Limits(models={str(number): Limit(rps=1) for number in range(MAX_MODELS + 1)}))


def test_project_has_its_own_limits_or_else_the_default_and_may_tighten_them() -> None:
    rules = Rules()
    assert rules.of_project("p") == (Limits(), Limits())
    assert rules.take(document("default", Limits(whole=Limit(rps=100))))
    assert rules.take(document(project_name("p"), Limits(whole=Limit(tps=5))))
    assert rules.take(document("own", Limits(whole=Limit(rps=1)), project="p"))
    assert rules.take(document("models", Limits(models={"m": Limit(rps=7)})))
    assert rules.of_project("p") == (Limits(whole=Limit(tps=5)), Limits(whole=Limit(rps=1)))
    assert rules.of_project("q") == (Limits(whole=Limit(rps=100)), Limits())
    assert rules.models.models["m"].rps == 7


def test_project_cannot_speak_for_the_mesh_nor_for_another() -> None:
    rules = Rules()
    for name in ("default", "models", project_name("p"), project_name("q")):
        assert not rules.take(document(name, Limits(whole=Limit(rps=1e6)), project="p"))
    assert rules.of_project("p") == rules.of_project("q") == (Limits(), Limits())


def test_other_documents_say_nothing_of_limits() -> None:
    rules = Rules()
    assert not rules.take(document("default", Limits(whole=Limit(rps=1)), kind="prices"))
    assert not rules.take(document("something", Limits(whole=Limit(rps=1))))


def test_document_that_cannot_be_read_changes_nothing() -> None:
    rules = Rules([document("default", Limits(whole=Limit(rps=1)))])
    broken = Document(kind="limits", name="default", seq=2, previous=b"x" * 32, issued=0.0, body=msgpack.packb({"rps": "many"}))
    with pytest.raises(MalformedEnvelope):
        rules.take(broken)
    assert rules.default == Limits(whole=Limit(rps=1))
