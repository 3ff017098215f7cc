"""``HOST:PORT``, read strictly, and the address under which this machine is likely to be reached."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass

from mesh.errors import UsageError

_HOST = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9]([A-Za-z0-9_-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9_-]*[A-Za-z0-9])?)*\.?\Z")


@dataclass(frozen=True, slots=True)
class Address:
    """A host name or IP address, and a TCP or UDP port (1 to 65535)."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str, *, default_port: int | None = None) -> Address:
    """Read ``host:port``, ``1.2.3.4:port`` or ``[::1]:port``. Raises `UsageError`; so does no port without a default."""
    bracketed = re.fullmatch(r"\[([^\]]*)\](?::([0-9]{1,5}))?", text)
    if bracketed:
        host, port = bracketed.groups()
        valid = _is_ip(host, 6)
    else:
        host, _, port = text.partition(":")
        valid = _is_ip(host, 4) or (_HOST.match(host) is not None and not re.fullmatch(r"[0-9.]+", host))
    if not valid or (port and not re.fullmatch(r"[0-9]+", port)) or (not port and (text.endswith(":") or default_port is None)):
        raise UsageError(f"'{text[:300]}' is not an address; write HOST:PORT, for example mesh.example.org:7600 or [::1]:7600")
    number = int(port) if port else default_port
    if number is None or not 1 <= number <= 65535:
        raise UsageError(f"'{text[:300]}': a port is a number from 1 to 65535")
    return Address(host, number)


def reachable_host(bind_host: str) -> str:
    """The host to tell others for a socket bound to ``bind_host``.

    A specific address is its own answer. For a wildcard it is the source address this machine would use for the wider
    network; no packet is sent to find out. Falls back to the host name.
    """
    if bind_host not in ("", "0.0.0.0", "::"):
        return bind_host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # TEST-NET-1, RFC 5737: routed like any other address, owned by nobody
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()


def _is_ip(text: str, version: int) -> bool:
    try:
        return ipaddress.ip_address(text).version == version
    except ValueError:
        return False
