"""The operator's folder: what is made, what is kept apart, what is refused."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from mesh.apikey import ApiKey, KeyRole, verify_key
from mesh.authority import (
    EPOCH_S,
    create_mesh,
    encode_admission,
    load_admission,
    network_keys,
    open_mesh,
    parse_admission,
)
from mesh.errors import ConfigError, MalformedEnvelope, TrustError, UsageError
from mesh.identity import Identity
from mesh.invite import parse_token, verify_invite
from mesh.trust import Role
from tests.support.vectors import fixed_key

NOW = 1_800_000_000.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    create_mesh(tmp_path / "mesh", name="lab", now=NOW, bootstraps=("a.example:7600",))
    return tmp_path / "mesh"


def test_everything_made_is_readable_by_its_owner_only(folder: Path) -> None:
    for path in folder.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_root_key_lies_apart_and_daily_work_does_not_need_it(folder: Path) -> None:
    (folder / "root" / "root.key").unlink()
    (folder / "root").rmdir()
    authority = open_mesh(folder)
    token = authority.invite(Role.WORKER, ttl_s=60.0, uses=1, bootstraps=authority.bootstraps, now=NOW)
    assert verify_invite(parse_token(token).signed, authority.trust, now=NOW).role == Role.WORKER
    authority.admission().admit(fixed_key("alice").public_key(), Role.WORKER, now=NOW)


def test_existing_mesh_is_never_overwritten(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="already"):
        create_mesh(folder, name="other", now=NOW)
    (folder / "mesh.json").rename(folder / "mesh.json.gone")
    with pytest.raises(UsageError, match="already"):
        create_mesh(folder, name="other", now=NOW)
    (folder / "mesh.json.gone").rename(folder / "mesh.json")
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_keys_and_nodes_have_issuers_of_their_own(folder: Path) -> None:
    may = {issuer.kid: set(issuer.may) for issuer in open_mesh(folder).keyset.issuers}
    assert may == {"keys-1": {"key", "invite", "document"}, "nodes-1": {"node"}}


def test_minted_key_verifies(folder: Path) -> None:
    authority = open_mesh(folder)
    claims = ApiKey(id=b"12345678", project="p", roles=frozenset({KeyRole.VIEWER}), not_before=NOW, expires=NOW + 60.0, kid="keys-1")
    assert verify_key(authority.mint_key(claims), authority.trust, now=NOW) == claims


def test_admitted_node_has_a_whole_identity(folder: Path) -> None:
    authority, alice = open_mesh(folder), fixed_key("alice")
    credentials = authority.admission().admit(alice.public_key(), Role.PROXY, now=NOW)
    identity = Identity(alice, credentials, mesh_id=authority.mesh_id, now=NOW)
    assert identity.role == Role.PROXY
    assert identity.membership.expires == NOW + 86_400.0


def test_admission_survives_a_file_and_keeps_it_private(folder: Path, tmp_path: Path) -> None:
    admission = open_mesh(folder).admission()
    admission.save(tmp_path)
    assert encode_admission(load_admission(tmp_path)) == encode_admission(admission)
    assert stat.S_IMODE((tmp_path / "admission.json").stat().st_mode) == 0o600


@pytest.mark.parametrize("field", ["kid", "key", "certificate", "root_certificate", "keyset", "mesh_id", "secret"])
def test_admission_with_a_part_missing_or_broken_is_malformed(folder: Path, field: str) -> None:
    whole = encode_admission(open_mesh(folder).admission())
    without = {name: value for name, value in whole.items() if name != field}
    with pytest.raises(MalformedEnvelope):
        parse_admission(without)
    if field not in ("kid", "certificate", "root_certificate"):
        with pytest.raises(TrustError):
            parse_admission(whole | {field: "zz"})


@pytest.mark.parametrize("data", [None, [], 1, "x", {}])
def test_admission_of_the_wrong_shape_is_malformed(data: object) -> None:
    with pytest.raises(MalformedEnvelope):
        parse_admission(data)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"key": 1}'])
def test_broken_admission_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "admission.json").write_text(content)
    with pytest.raises(ConfigError, match=r"admission\.json"):
        load_admission(tmp_path)


def test_folder_without_a_mesh_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mesh create"):
        open_mesh(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", json.dumps({"mesh_id": "zz"})])
def test_broken_mesh_file_is_named(folder: Path, content: str) -> None:
    (folder / "mesh.json").write_text(content)
    with pytest.raises(ConfigError, match=r"mesh\.json"):
        open_mesh(folder)


def test_swapped_keyset_is_refused(folder: Path, tmp_path: Path) -> None:
    create_mesh(tmp_path / "other", name="other", now=NOW)
    (folder / "keyset").write_bytes((tmp_path / "other" / "keyset").read_bytes())
    with pytest.raises(TrustError):
        open_mesh(folder)


def test_network_keys_cover_a_certificates_life_and_neighbours_overlap() -> None:
    secret, mesh_id = b"s" * 32, b"m" * 32
    today = network_keys(secret, mesh_id, now=NOW)
    tomorrow = network_keys(secret, mesh_id, now=NOW + EPOCH_S)
    assert [item.epoch for item in today] == [int(NOW // EPOCH_S) + offset for offset in (-1, 0, 1, 2)]
    assert set(today) & set(tomorrow) == set(today[1:])
    assert len({item.key for item in today}) == 4
    assert set(today).isdisjoint(network_keys(b"t" * 32, mesh_id, now=NOW))
