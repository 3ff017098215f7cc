"""What a new TLS connection costs the front's process: full handshakes, no resumption, one after the other."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from bench import peers, processes


def make_certificate(folder: Path) -> peers.Tls:
    """A self-signed P-256 certificate for localhost, as most fronts carry."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.IPv4Address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    cert_pem = certificate.public_bytes(serialization.Encoding.PEM)
    key_pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    tls = peers.Tls(cert=folder / "cert.pem", key=folder / "key.pem", both=folder / "both.pem")
    tls.cert.write_bytes(cert_pem)
    tls.key.write_bytes(key_pem)
    tls.both.write_bytes(cert_pem + key_pem)
    return tls


def handshakes(port: int, pids: Callable[[], list[int]], count: int) -> dict[str, Any]:
    """CPU microseconds of the front's processes for one connection, and the time a client waits for it, milliseconds."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    took_ms = []
    version = ""
    for number in range(-20, count):
        if number == 0:
            time.sleep(0.2)
            before = processes.cpu_s(pids())
        began = time.perf_counter()
        with socket.create_connection(("127.0.0.1", port), timeout=10) as raw, context.wrap_socket(raw) as wrapped:
            version = wrapped.version() or ""
            if number >= 0:
                took_ms.append((time.perf_counter() - began) * 1e3)
    time.sleep(0.3)
    cpu_us = (processes.cpu_s(pids()) - before) / count * 1e6
    return {
        "cpu_us": round(cpu_us, 1),
        "p50_ms": round(statistics.median(took_ms), 3),
        "count": count,
        "version": version,
    }
