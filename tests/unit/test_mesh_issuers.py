"""The operator's issuers, without a network: what the keyset says after each change, and who signs then."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from mesh.apikey import ApiKey, verify_key
from mesh.authority import KEYS_KID, NODES_KID, Authority, create_mesh, open_mesh
from mesh.documents import next_version, parse_document
from mesh.errors import ConfigError, Expired, MalformedEnvelope, OutOfScope, UnknownSigner, UsageError
from mesh.identity import Identity, issuer_of
from mesh.issuers import (
    Handover,
    adopt_keyset,
    create_issuer,
    delegate,
    keyset_document,
    load_root,
    retire_issuer,
    rotate_issuer,
    take_over,
)
from mesh.scope import UNBOUNDED, Scope
from mesh.trust import Purpose, Role, Trust

NOW = float(int(time.time()))
DAY_S = 86_400.0
SEARCH = Scope(projects=frozenset({"search"}), rps=5.0)
CLAIMS = ApiKey(id=b"12345678", project="search", roles=frozenset({"invoker"}), not_before=NOW, expires=NOW + 3600, rps=1.0)


@pytest.fixture
def mesh(tmp_path: Path) -> Authority:
    return create_mesh(tmp_path / "mesh", name="lab", now=NOW, bootstraps=("b.example:7600",))


def test_a_bounded_issuer_signs_when_it_is_asked_to_and_only_within_its_bounds(mesh: Authority) -> None:
    root = load_root(mesh, None)
    made = create_issuer(mesh, root, kid="search-1", may=frozenset({Purpose.KEY}), scope=SEARCH, now=NOW)
    assert made.keyset.seq == 2
    assert made.signer(now=NOW).kid == KEYS_KID, "the widest is the operator's own choice"
    assert verify_key(made.mint_key(CLAIMS, kid="search-1"), made.trust, now=NOW).kid == "search-1"
    with pytest.raises(OutOfScope):
        made.mint_key(replace(CLAIMS, project="ads"), kid="search-1")
    with pytest.raises(UnknownSigner):
        verify_key(made.mint_key(CLAIMS, kid="search-1"), mesh.trust, now=NOW)
    for kid in ("search-1", "", "../x", "a b", "x" * 32):
        with pytest.raises(UsageError):
            create_issuer(made, root, kid=kid, may=frozenset({Purpose.KEY}), scope=UNBOUNDED, now=NOW)


def test_rotation_overlaps_and_the_successor_signs_from_then_on(mesh: Authority) -> None:
    root, old = load_root(mesh, None), mesh.mint_key(CLAIMS)
    made, kid = rotate_issuer(mesh, root, KEYS_KID, overlap_s=600.0, now=NOW + 10)
    assert kid == "keys-2"
    assert made.signer(now=NOW + 10).kid == "keys-2"
    assert made.issuer_here(Purpose.DOCUMENT) == made.issuer_here(Purpose.INVITE) == "keys-2"
    verify_key(old, made.trust, now=NOW + 600)
    with pytest.raises(Expired):
        verify_key(old, made.trust, now=NOW + 610)
    again, kid = rotate_issuer(made, root, "keys-2", overlap_s=600.0, now=NOW + 20)
    assert (kid, again.keyset.seq) == ("keys-3", 3)


def test_an_issuer_of_nodes_is_rotated_with_a_certificate_that_admits(mesh: Authority) -> None:
    made, kid = rotate_issuer(mesh, load_root(mesh, None), NODES_KID, overlap_s=DAY_S, now=NOW)
    key, admission = Ed25519PrivateKey.generate(), made.admission()
    assert admission.kid == kid == "nodes-2"
    identity = Identity(key, admission.admit(key.public_key(), Role.WORKER, now=NOW), mesh_id=mesh.mesh_id, now=NOW)
    leaf = x509.load_pem_x509_certificate(identity.credentials.certificate_chain).public_bytes(Encoding.DER)
    assert issuer_of(leaf) == "nodes-2"


def test_what_a_retired_issuer_signed_holds_no_more_and_the_last_one_stays(mesh: Authority) -> None:
    root, old = load_root(mesh, None), mesh.mint_key(CLAIMS)
    for kid in (KEYS_KID, NODES_KID):
        with pytest.raises(UsageError, match="rotate it first"):
            retire_issuer(mesh, root, kid, now=NOW)
    made, _ = rotate_issuer(mesh, root, KEYS_KID, overlap_s=DAY_S, now=NOW)
    left = retire_issuer(made, root, KEYS_KID, now=NOW)
    with pytest.raises(UnknownSigner):
        verify_key(old, left.trust, now=NOW)
    with pytest.raises(UsageError, match="no issuer"):
        retire_issuer(left, root, KEYS_KID, now=NOW)


def test_a_keyset_is_verified_with_itself_wherever_it_comes_from(mesh: Authority) -> None:
    made, _ = rotate_issuer(mesh, load_root(mesh, None), KEYS_KID, overlap_s=DAY_S, now=NOW)
    document = made.sign_document(keyset_document(made, None, now=NOW))
    behind = Trust(mesh.keyset)
    assert parse_document(document.signed, behind, now=NOW).seq == 2
    assert behind.keyset.seq == 1, "taking it is the store's matter"
    other = next_version(None, kind="limits", name="x", body=b"", now=NOW)
    with pytest.raises(UnknownSigner):
        parse_document(made.sign_document(other).signed, behind, now=NOW)
    wrong = replace(keyset_document(made, None, now=NOW), seq=3)
    with pytest.raises(MalformedEnvelope, match="its own number"):
        parse_document(made.sign_document(wrong).signed, behind, now=NOW)
    assert adopt_keyset(mesh, made.keyset).keyset == adopt_keyset(made, mesh.keyset).keyset == made.keyset


def test_the_root_key_may_be_elsewhere_and_must_be_this_meshs(mesh: Authority, tmp_path: Path) -> None:
    away = tmp_path / "stick"
    (mesh.directory / "root").rename(away)
    with pytest.raises(ConfigError, match="--root"):
        load_root(mesh, None)
    assert load_root(mesh, away).private_bytes_raw() == load_root(mesh, away / "root.key").private_bytes_raw()
    other = create_mesh(tmp_path / "other", name="other", now=NOW)
    with pytest.raises(ConfigError, match="another mesh"):
        load_root(mesh, other.directory / "root")


def test_what_is_handed_over_makes_keys_and_can_be_passed_on(mesh: Authority, tmp_path: Path) -> None:
    file, theirs = tmp_path / "search.issuer", tmp_path / "theirs"
    made = delegate(mesh, name="search-admin", signer=mesh.signer(now=NOW), scope=SEARCH, lifetime_s=DAY_S, now=NOW)
    made.write(file)
    assert file.stat().st_mode & 0o777 == 0o600
    authority, kid = take_over(file, theirs)
    assert (authority.name, kid, authority.bootstraps) == ("lab", "search-admin", mesh.bootstraps)
    assert not (theirs / "root").exists()
    assert verify_key(authority.mint_key(CLAIMS), mesh.trust, now=NOW).delegations
    with pytest.raises(OutOfScope):
        authority.mint_key(replace(CLAIMS, rps=6.0))
    with pytest.raises(ConfigError):
        authority.sign_document(next_version(None, kind="limits", name="x", body=b"", now=NOW))
    with pytest.raises(UsageError, match="already"):
        take_over(file, theirs)
    with pytest.raises(OutOfScope):
        delegate(authority, name="wider", signer=authority.signer(now=NOW), scope=UNBOUNDED, lifetime_s=DAY_S, now=NOW)
    other = create_mesh(tmp_path / "other", name="other", now=NOW)
    with pytest.raises(UsageError, match="another mesh"):
        take_over(file, other.directory)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"mesh_id": "00", "kid": "a", "key": "x", "chain": [], "name": "", "bootstraps": [], "keyset": ""}']
)
def test_a_file_that_is_none_is_refused_and_leaves_nothing(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.issuer"
    file.write_text(text)
    with pytest.raises(ConfigError):
        take_over(file, tmp_path / "home")
    assert not (tmp_path / "home").exists()


def test_an_issuer_that_is_handed_over_is_one_of_the_keyset(mesh: Authority, tmp_path: Path) -> None:
    made = create_issuer(mesh, load_root(mesh, None), kid="search-1", may=frozenset({Purpose.KEY}), scope=SEARCH, now=NOW)
    Handover(authority=made, kid="search-1", key=made.signer("search-1", now=NOW).key).write(tmp_path / "f")
    authority, _ = take_over(tmp_path / "f", tmp_path / "theirs")
    assert verify_key(open_mesh(authority.directory).mint_key(CLAIMS), made.trust, now=NOW).kid == "search-1"
