"""A node's identity: key, certificate, membership, and what TLS makes of them."""

from __future__ import annotations

import json
import ssl
import stat
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from mesh.authority import NODES_KID
from mesh.errors import ConfigError, Expired, MalformedEnvelope, TrustError, WrongMesh
from mesh.identity import (
    CERTIFICATE_LIFETIME_S,
    Identity,
    IdentityStore,
    Peer,
    TlsContexts,
    encode_credentials,
    load_private_key,
    make_issuer_certificate,
    make_request,
    parse_credentials,
    parse_request,
    peer_of,
    require_role,
    root_key_of,
    write_private,
)
from mesh.trust import Issuer, Purpose, Role, key_id, raw_public_key, seal_keyset
from tests.support.authority import TestMesh, make_mesh
from tests.support.vectors import fixed_key

NOW = 1_800_000_000.0
MESH, OTHER = make_mesh(now=NOW), make_mesh(now=NOW, name="other")
ALICE, BOB = fixed_key("alice"), fixed_key("bob")


def alice(role: Role = Role.WORKER, mesh: TestMesh = MESH) -> Identity:
    return mesh.identity(role, now=NOW, key=ALICE)


def leaf_of(identity: Identity) -> bytes:
    return x509.load_pem_x509_certificate(identity.credentials.certificate_chain).public_bytes(Encoding.DER)


def test_node_id_is_the_hash_of_its_public_key() -> None:
    assert alice().node_id == key_id(raw_public_key(ALICE.public_key()))


def test_certificate_names_mesh_role_and_node() -> None:
    assert peer_of(leaf_of(alice(Role.PROXY)), MESH.mesh_id) == Peer(node_id=alice().node_id, role=Role.PROXY)


def test_certificate_of_another_mesh_is_nobody_here() -> None:
    with pytest.raises(WrongMesh):
        peer_of(leaf_of(alice(mesh=OTHER)), MESH.mesh_id)


def test_certificate_with_another_kind_of_key_is_malformed() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    root = x509.load_pem_x509_certificate(MESH.admission.root_certificate)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(root.not_valid_before_utc)
        .not_valid_after(root.not_valid_after_utc)
        .sign(MESH.root, None)
    )
    with pytest.raises(MalformedEnvelope):
        peer_of(certificate.public_bytes(Encoding.DER), MESH.mesh_id)


def test_certificate_that_names_no_node_is_malformed() -> None:
    root = x509.load_pem_x509_certificate(MESH.admission.root_certificate).public_bytes(Encoding.DER)
    with pytest.raises(MalformedEnvelope):
        peer_of(root, MESH.mesh_id)


def test_credentials_survive_json() -> None:
    credentials = alice().credentials
    assert parse_credentials(json.loads(json.dumps(encode_credentials(credentials)))) == credentials


@pytest.mark.parametrize("field", ["certificate_chain", "root_certificate", "membership", "keyset", "network_keys"])
@pytest.mark.parametrize("value", [None, 1, [], {}, "zz", {"1": "00"}, {"x": "00" * 32}])
def test_credentials_of_the_wrong_shape_are_refused(field: str, value: object) -> None:
    data = encode_credentials(alice().credentials) | {field: value}
    with pytest.raises(TrustError):
        Identity(ALICE, parse_credentials(data), mesh_id=MESH.mesh_id, now=NOW)


@pytest.mark.parametrize("foreign", ["certificate_chain", "root_certificate", "membership", "keyset"])
def test_any_part_from_another_mesh_is_refused(foreign: str) -> None:
    others = OTHER.admission.admit(ALICE.public_key(), Role.WORKER, now=NOW)
    mixed = replace(alice().credentials, **{foreign: getattr(others, foreign)})
    with pytest.raises(TrustError):
        Identity(ALICE, mixed, mesh_id=MESH.mesh_id, now=NOW)


def test_credentials_for_another_key_are_refused() -> None:
    with pytest.raises(TrustError, match="another key"):
        Identity(BOB, alice().credentials, mesh_id=MESH.mesh_id, now=NOW)


def test_certificate_and_membership_must_agree_on_the_role() -> None:
    proxy = alice(Role.PROXY).credentials
    mixed = replace(alice(Role.WORKER).credentials, certificate_chain=proxy.certificate_chain)
    with pytest.raises(TrustError, match="same node and role"):
        Identity(ALICE, mixed, mesh_id=MESH.mesh_id, now=NOW)


def test_expired_credentials_are_refused() -> None:
    with pytest.raises(Expired):
        Identity(ALICE, alice().credentials, mesh_id=MESH.mesh_id, now=NOW + CERTIFICATE_LIFETIME_S)


def test_renewal_moves_the_expiry_and_tells_who_asked() -> None:
    identity, told = alice(), []
    identity.on_renewal(lambda: told.append(identity.membership.expires))
    later = NOW + 1000.0
    identity.renew(MESH.admission.admit(ALICE.public_key(), Role.WORKER, now=later), now=later)
    assert told == [later + CERTIFICATE_LIFETIME_S]


def test_renewal_brings_a_rotated_issuer_with_it() -> None:
    identity, nodes_2 = alice(), fixed_key("nodes-2")
    issuer = Issuer(
        kid="nodes-2",
        public_key=raw_public_key(nodes_2.public_key()),
        may=frozenset({Purpose.NODE}),
        not_before=NOW,
        expires=NOW + 1e7,
    )
    signed = seal_keyset(MESH.root, name="test", seq=2, issued=NOW, issuers=[issuer])
    certificate = make_issuer_certificate(
        MESH.root, MESH.admission.root_certificate, nodes_2.public_key(), kid="nodes-2", now=NOW, lifetime_s=1e7
    )
    keyset = replace(MESH.keyset, seq=2, issuers=(issuer,), signed=signed)
    rotated = replace(MESH.admission, kid="nodes-2", key=nodes_2, certificate=certificate, keyset=keyset)
    identity.renew(rotated.admit(ALICE.public_key(), Role.WORKER, now=NOW), now=NOW)
    assert identity.trust.keyset.issuer(NODES_KID) is None


def test_bad_renewal_leaves_the_identity_as_it_was() -> None:
    identity = alice()
    before = (identity.credentials, identity.membership)
    with pytest.raises(TrustError):
        identity.renew(OTHER.admission.admit(ALICE.public_key(), Role.WORKER, now=NOW), now=NOW)
    assert (identity.credentials, identity.membership) == before


def test_signing_request_proves_the_key() -> None:
    assert raw_public_key(parse_request(make_request(ALICE))) == raw_public_key(ALICE.public_key())


def test_signing_request_with_a_changed_signature_is_refused() -> None:
    der = bytearray(x509.load_pem_x509_csr(make_request(ALICE)).public_bytes(Encoding.DER))
    der[-1] ^= 1
    with pytest.raises(MalformedEnvelope):
        parse_request(x509.load_der_x509_csr(bytes(der)).public_bytes(Encoding.PEM))


def test_signing_request_of_another_kind_of_key_is_refused() -> None:
    from cryptography.hazmat.primitives import hashes

    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    request = x509.CertificateSigningRequestBuilder().subject_name(name)
    signed = request.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    with pytest.raises(MalformedEnvelope):
        parse_request(signed.public_bytes(Encoding.PEM))


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_no_request_and_no_root(data: bytes) -> None:
    with pytest.raises(MalformedEnvelope):
        parse_request(data)
    with pytest.raises(MalformedEnvelope):
        root_key_of(data)


def test_store_keeps_key_and_credentials_private(tmp_path: Path) -> None:
    store = IdentityStore(tmp_path / "state")
    key = store.key()
    store.save(MESH.admission.admit(key.public_key(), Role.WORKER, now=NOW), MESH.mesh_id)
    assert store.enrolled
    assert store.load(now=NOW).node_id == key_id(raw_public_key(key.public_key()))
    for path in store.directory.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700


def test_store_makes_its_key_once(tmp_path: Path) -> None:
    assert raw_public_key(IdentityStore(tmp_path).key().public_key()) == raw_public_key(IdentityStore(tmp_path).key().public_key())


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"mesh_id": "zz"}', b'{"mesh_id": 1}', b"\xff"])
def test_broken_store_is_a_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "credentials.json").write_bytes(content)
    with pytest.raises((ConfigError, TrustError), match=r"credentials"):
        IdentityStore(tmp_path).load(now=NOW)


def test_file_that_is_no_private_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    with pytest.raises(ConfigError, match="does not exist"):
        load_private_key(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match=r"node\.key"):
        load_private_key(path)


def test_private_file_is_private_even_over_a_public_one(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"old")
    path.chmod(0o644)
    write_private(path, b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [item.name for item in tmp_path.iterdir()] == ["secret"]


class Wire:
    """Two TLS endpoints in memory."""

    def __init__(self, client: ssl.SSLContext, server: ssl.SSLContext) -> None:
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = client.wrap_bio(to_client, to_server)
        self.server = server.wrap_bio(to_server, to_client, server_side=True)

    def handshake(self) -> None:
        """Raises `ssl.SSLError` from whichever end refuses."""
        done = {id(self.client): False, id(self.server): False}
        for _ in range(10):
            for end in (self.client, self.server):
                if not done[id(end)]:
                    try:
                        end.do_handshake()
                        done[id(end)] = True
                    except ssl.SSLWantReadError:
                        pass
        assert all(done.values())


@dataclass(frozen=True)
class Parties:
    """Two members of one mesh, and one of another; in real time, as OpenSSL knows no other."""

    mesh_id: bytes
    alice: TlsContexts
    bob: TlsContexts
    stranger: TlsContexts


@pytest.fixture
def parties(tmp_path: Path) -> Parties:
    now = time.time()
    mesh, other = make_mesh(now=now), make_mesh(now=now)

    def contexts(name: str, of: TestMesh, role: Role) -> TlsContexts:
        (tmp_path / name).mkdir()
        return TlsContexts(of.identity(role, now=now), tmp_path / name)

    return Parties(
        mesh.mesh_id,
        alice=contexts("alice", mesh, Role.WORKER),
        bob=contexts("bob", mesh, Role.PROXY),
        stranger=contexts("stranger", other, Role.WORKER),
    )


def test_two_members_shake_hands(parties: Parties) -> None:
    wire = Wire(parties.alice.client, parties.bob.server)
    wire.handshake()
    assert wire.client.version() == "TLSv1.3"
    assert wire.client.selected_alpn_protocol() == "infermesh/1"


@pytest.mark.parametrize(("dialler", "listener"), [("alice", "stranger"), ("stranger", "alice")])
def test_members_of_two_meshes_do_not(parties: Parties, dialler: str, listener: str) -> None:
    with pytest.raises(ssl.SSLError):
        Wire(getattr(parties, dialler).client, getattr(parties, listener).server).handshake()


def test_nobody_without_a_certificate_is_let_in(parties: Parties) -> None:
    naked = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    naked.check_hostname, naked.verify_mode = False, ssl.CERT_NONE
    with pytest.raises(ssl.SSLError):
        Wire(naked, parties.alice.server).handshake()


def test_older_tls_is_refused(parties: Parties) -> None:
    parties.alice.client.minimum_version = ssl.TLSVersion.TLSv1_2
    parties.alice.client.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        Wire(parties.alice.client, parties.bob.server).handshake()


def test_required_role_is_checked_in_the_handshake(parties: Parties) -> None:
    require_role(parties.alice.client, parties.mesh_id, {Role.PROXY})
    Wire(parties.alice.client, parties.bob.server).handshake()
    require_role(parties.alice.client, parties.mesh_id, {Role.BOOTSTRAP})
    with pytest.raises(ssl.SSLCertVerificationError, match="proxy"):
        Wire(parties.alice.client, parties.bob.server).handshake()


def test_renewed_certificate_is_shown_by_live_contexts(tmp_path: Path) -> None:
    mesh = make_mesh(now=time.time())
    identity = mesh.identity(Role.WORKER, now=time.time(), key=Ed25519PrivateKey.generate())
    contexts = TlsContexts(identity, tmp_path)

    def shown() -> bytes:
        wire = Wire(contexts.client, contexts.server)
        wire.handshake()
        certificate = wire.client.getpeercert(binary_form=True)
        assert certificate
        return certificate

    before = shown()
    identity.renew(mesh.admission.admit(identity.key.public_key(), Role.WORKER, now=time.time()), now=time.time())
    assert shown() != before
