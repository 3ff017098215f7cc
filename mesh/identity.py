"""A node's identity: its key, its certificate, its membership, and the TLS contexts they make.

``SHA-256(SPKI)`` of the node's Ed25519 key *is* the node id, on links and in the directory. The X.509 chain is
leaf ← issuer ← root, so TLS itself refuses strangers before any of our code runs.
"""

from __future__ import annotations

import datetime
import json
import os
import ssl
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mesh.errors import ConfigError, MalformedEnvelope, TrustError, WrongMesh
from mesh.membership import Membership, parse_membership
from mesh.trust import Role, Trust, key_id, parse_keyset, raw_public_key

ALPN = "infermesh/1"
CERTIFICATE_LIFETIME_S = 24 * 3600.0
_SKEW = datetime.timedelta(minutes=5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Who is at the other end of a TLS connection, as its certificate proves."""

    node_id: bytes
    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkKey:
    """The symmetric key of one epoch that seals directory datagrams. Known to members only."""

    epoch: int
    key: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """All that enrolment gives a node besides its own key. PEM and envelopes as received."""

    certificate_chain: bytes
    root_certificate: bytes
    membership: bytes
    keyset: bytes
    network_keys: tuple[NetworkKey, ...]


class Identity:
    """A node that may speak: key and credentials, checked against the mesh id it was told to trust."""

    def __init__(self, key: Ed25519PrivateKey, credentials: Credentials, *, mesh_id: bytes, now: float) -> None:
        self.key = key
        self.public_key = raw_public_key(key.public_key())
        self.node_id = key_id(self.public_key)
        self.trust = Trust(parse_keyset(credentials.keyset, mesh_id=mesh_id))
        self.credentials = credentials
        self.membership = self._check(credentials, now)
        self._on_renewal: list[Callable[[], None]] = []
        self.trust.on_change(self._note_keyset)

    @property
    def role(self) -> Role:
        return self.membership.role

    @property
    def mesh_id(self) -> bytes:
        return self.trust.mesh_id

    def renew(self, credentials: Credentials, *, now: float) -> None:
        """Take fresh credentials; live TLS contexts pick them up through `on_renewal`. Raises a `TrustError`."""
        self.trust.update(parse_keyset(credentials.keyset, mesh_id=self.mesh_id))  # first: it may name the new issuer
        membership = self._check(credentials, now)
        self.credentials, self.membership = replace(credentials, keyset=self.trust.keyset.signed), membership
        for callback in self._on_renewal:
            callback()

    def _note_keyset(self) -> None:
        """What is kept of the credentials must never go back to an older keyset than was once known."""
        self.credentials = replace(self.credentials, keyset=self.trust.keyset.signed)

    def on_renewal(self, callback: Callable[[], None]) -> None:
        self._on_renewal.append(callback)

    def _check(self, credentials: Credentials, now: float) -> Membership:
        if key_id(root_key_of(credentials.root_certificate)) != self.mesh_id:
            raise WrongMesh("the root certificate belongs to another mesh")
        membership = parse_membership(credentials.membership, self.trust, now=now)
        if membership.public_key != self.public_key:
            raise TrustError("the membership is for another key")
        peer = peer_of(_leaf_of(credentials.certificate_chain), self.mesh_id)
        if peer != Peer(node_id=self.node_id, role=membership.role):
            raise TrustError("the certificate and the membership are not for the same node and role")
        return membership


class TlsContexts:
    """The two TLS 1.3 contexts of a node (dialling and listening), kept fresh across renewals."""

    def __init__(self, identity: Identity, directory: Path) -> None:
        self._identity = identity
        self._chain_path = directory / "node.pem"
        self.client = self._context(ssl.PROTOCOL_TLS_CLIENT)
        self.server = self._context(ssl.PROTOCOL_TLS_SERVER)
        self._load()
        identity.on_renewal(self._load)

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # a node is its key, not its address; link/peers.py checks the node id
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=self._identity.credentials.root_certificate.decode())
        context.set_alpn_protocols([ALPN])
        if protocol == ssl.PROTOCOL_TLS_SERVER:
            context.num_tickets = 0
        return context

    def _load(self) -> None:
        pem = private_key_pem(self._identity.key) + self._identity.credentials.certificate_chain
        write_private(self._chain_path, pem)
        for context in (self.client, self.server):
            context.load_cert_chain(self._chain_path)


def peer_of(certificate: bytes, mesh_id: bytes) -> Peer:
    """Who a DER leaf belongs to, once TLS has verified its chain. Raises a `TrustError`."""
    leaf = x509.load_der_x509_certificate(certificate)
    public_key = leaf.public_key()
    if not isinstance(public_key, Ed25519PublicKey):
        raise MalformedEnvelope("node certificates hold Ed25519 keys")
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise MalformedEnvelope("the certificate names no node") from None
    node_id = key_id(raw_public_key(public_key))
    for role in Role:
        if node_uri(mesh_id, role, node_id) in names.get_values_for_type(x509.UniformResourceIdentifier):
            return Peer(node_id=node_id, role=role)
    raise WrongMesh("the certificate is not a node of this mesh")


def issuer_of(certificate: bytes) -> str:
    """Who signed a DER leaf, once TLS has verified its chain: an issuer's own certificate bears that name by the root's word."""
    names = x509.load_der_x509_certificate(certificate).issuer.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def require_role(context: ssl.SSLContext, mesh_id: bytes, roles: Collection[Role]) -> ssl.SSLContext:
    """Make ``context`` fail the handshake unless the peer's verified certificate is a node of this mesh in one of ``roles``.

    Python's ``ssl`` has no verify callback, but it lets a context name the class of its TLS objects: the check runs as the last
    step of the handshake, before any of our bytes are sent or any of the peer's are read. A peer that shows no certificate
    passes only where the context does not require one.
    """

    class Checked(ssl.SSLObject):
        def do_handshake(self) -> None:
            super().do_handshake()
            certificate = self.getpeercert(binary_form=True)
            if certificate is None and context.verify_mode == ssl.CERT_OPTIONAL:
                return
            try:
                role = peer_of(certificate or b"", mesh_id).role
            except (TrustError, ValueError) as error:
                raise ssl.SSLCertVerificationError(f"not a node of this mesh: {error}") from None
            if role not in roles:
                raise ssl.SSLCertVerificationError(f"the peer is a {role}, which may not do this")

    context.sslobject_class = Checked
    return context


def node_uri(mesh_id: bytes, role: Role, node_id: bytes) -> str:
    """The URI in a node certificate's subjectAltName."""
    return f"infermesh://{mesh_id.hex()}/{role}/{node_id.hex()}"


def make_root_certificate(root: Ed25519PrivateKey, *, name: str, now: float, lifetime_s: float) -> bytes:
    """A self-signed CA certificate (PEM) of the root key."""
    subject = _subject(f"{name} root")
    return _sign(subject, subject, root.public_key(), root, now, lifetime_s, ca_depth=1)


def make_issuer_certificate(
    root: Ed25519PrivateKey,
    root_certificate: bytes,
    issuer: Ed25519PublicKey,
    *,
    kid: str,
    now: float,
    lifetime_s: float,
) -> bytes:
    """A CA certificate (PEM) that lets an issuer sign leaves and nothing deeper."""
    parent = x509.load_pem_x509_certificate(root_certificate).subject
    return _sign(_subject(kid), parent, issuer, root, now, lifetime_s, ca_depth=0)


def make_node_certificate(
    issuer: Ed25519PrivateKey,
    issuer_certificate: bytes,
    node: Ed25519PublicKey,
    *,
    mesh_id: bytes,
    role: Role,
    now: float,
    lifetime_s: float = CERTIFICATE_LIFETIME_S,
) -> bytes:
    """A leaf (PEM) for a node, good for both ends of a connection."""
    node_id = key_id(raw_public_key(node))
    parent = x509.load_pem_x509_certificate(issuer_certificate).subject
    uri = node_uri(mesh_id, role, node_id)
    return _sign(_subject(node_id.hex()), parent, node, issuer, now, lifetime_s, uri=uri)


def make_request(key: Ed25519PrivateKey) -> bytes:
    """A certificate signing request (PEM): proof that the sender holds the key. What it asks for is ignored."""
    node_id = key_id(raw_public_key(key.public_key()))
    request = x509.CertificateSigningRequestBuilder().subject_name(_subject(node_id.hex())).sign(key, None)
    return request.public_bytes(Encoding.PEM)


def parse_request(data: bytes) -> Ed25519PublicKey:
    """The key a signing request proves possession of. Raises `MalformedEnvelope`."""
    try:
        request = x509.load_pem_x509_csr(data)
        public_key = request.public_key()
        valid = request.is_signature_valid
    except Exception as error:  # the parser raises many kinds; each means the same here
        raise MalformedEnvelope(f"not a certificate signing request ({type(error).__name__})") from None
    if not isinstance(public_key, Ed25519PublicKey) or not valid:
        raise MalformedEnvelope("the signing request must be made with an Ed25519 key and signed by it")
    return public_key


def root_key_of(certificate: bytes) -> bytes:
    """The raw public key in a root certificate (PEM). Raises `MalformedEnvelope`."""
    try:
        key = x509.load_pem_x509_certificate(certificate).public_key()
    except ValueError:
        raise MalformedEnvelope("not a certificate") from None
    if not isinstance(key, Ed25519PublicKey):
        raise MalformedEnvelope("a mesh's root key is an Ed25519 key")
    return raw_public_key(key)


def _leaf_of(chain: bytes) -> bytes:
    """The first certificate (DER) of a PEM chain. Raises `MalformedEnvelope`."""
    try:
        return x509.load_pem_x509_certificate(chain).public_bytes(Encoding.DER)
    except ValueError:
        raise MalformedEnvelope("not a certificate chain") from None


def private_key_pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def load_private_key(path: Path) -> Ed25519PrivateKey:
    """Read a key file. Raises `ConfigError` if it is missing, unreadable or not an Ed25519 key."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as a private key: {error}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path} does not hold an Ed25519 key")
    return key


def write_private(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a file only its owner can read (0600), whole or not at all; ``durable`` waits for the disk."""
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")  # threads and processes never share one
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(data)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    temporary.replace(path)


def encode_credentials(credentials: Credentials) -> dict[str, object]:
    """As JSON-ready values: what enrolment answers and what a node keeps on disk."""
    return {
        "certificate_chain": credentials.certificate_chain.decode(),
        "root_certificate": credentials.root_certificate.decode(),
        "membership": credentials.membership.hex(),
        "keyset": credentials.keyset.hex(),
        "network_keys": {str(item.epoch): item.key.hex() for item in credentials.network_keys},
    }


def parse_credentials(data: object) -> Credentials:
    """From JSON values. Raises `MalformedEnvelope`; signatures are checked by `Identity`."""
    try:
        if not isinstance(data, dict):
            raise TypeError
        keys = tuple(NetworkKey(epoch=int(epoch), key=bytes.fromhex(key)) for epoch, key in sorted(data["network_keys"].items()))
        if not keys or any(len(item.key) != 32 for item in keys):
            raise ValueError
        return Credentials(
            certificate_chain=data["certificate_chain"].encode(),
            root_certificate=data["root_certificate"].encode(),
            membership=bytes.fromhex(data["membership"]),
            keyset=bytes.fromhex(data["keyset"]),
            network_keys=keys,
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise MalformedEnvelope("not a set of node credentials") from None


class IdentityStore:
    """A node's state folder: ``node.key``, ``credentials.json`` and the mesh id it trusts, all 0600."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @property
    def enrolled(self) -> bool:
        return (self.directory / "credentials.json").exists()

    def key(self) -> Ed25519PrivateKey:
        """The node's key, made on first use."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self.directory / "node.key"
        if not path.exists():
            write_private(path, private_key_pem(Ed25519PrivateKey.generate()))
        return load_private_key(path)

    def save(self, credentials: Credentials, mesh_id: bytes) -> None:
        data = encode_credentials(credentials) | {"mesh_id": mesh_id.hex()}
        write_private(self.directory / "credentials.json", json.dumps(data, indent=1).encode())

    def load(self, *, now: float) -> Identity:
        """Raises `ConfigError` if the folder cannot be read, a `TrustError` if what it holds no longer holds."""
        path = self.directory / "credentials.json"
        try:
            data = json.loads(path.read_bytes())
            mesh_id = bytes.fromhex(data["mesh_id"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from None
        return Identity(self.key(), parse_credentials(data), mesh_id=mesh_id, now=now)


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _sign(
    subject: x509.Name,
    parent: x509.Name,
    public_key: Ed25519PublicKey,
    signing_key: Ed25519PrivateKey,
    now: float,
    lifetime_s: float,
    *,
    ca_depth: int | None = None,
    uri: str | None = None,
) -> bytes:
    start = datetime.datetime.fromtimestamp(now, datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(parent)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - _SKEW)
        .not_valid_after(start + datetime.timedelta(seconds=lifetime_s))
        .add_extension(x509.BasicConstraints(ca=ca_depth is not None, path_length=ca_depth), critical=True)
        .add_extension(_key_usage(ca=ca_depth is not None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key()), critical=False)
    )
    if uri is not None:
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH])
        builder = builder.add_extension(usage, critical=False)
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(signing_key, None).public_bytes(Encoding.PEM)


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
