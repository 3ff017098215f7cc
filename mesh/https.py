"""HTTPS calls to bootstrap nodes: by newcomers, by nodes that renew, and by bootstrap nodes among themselves.

JSON in and out, one call a connection, bounded in time and size. What the other end proves in the handshake decides whether
anything is sent at all.
"""

from __future__ import annotations

import json
import os
import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp

from mesh.address import parse_address
from mesh.errors import EnrolError, EnrolRefused
from mesh.identity import Identity, private_key_pem, require_role, write_private
from mesh.trust import Role

MAX_ANSWER_BYTES = 256 * 1024
CALL_DEADLINE_S = 15.0
CONNECT_S = 5.0


def unverified_context() -> ssl.SSLContext:
    """For reading what is public from someone who has proved nothing. Nothing secret may be sent over it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def bootstrap_context(root_certificate: bytes, mesh_id: bytes) -> ssl.SSLContext:
    """For calls to a bootstrap node: the handshake fails unless the peer is one, of this mesh."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # a node is its key, not its address: `require_role` checks whose key
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=root_certificate.decode("ascii"))
    return require_role(context, mesh_id, {Role.BOOTSTRAP})


def member_context(identity: Identity, directory: Path) -> ssl.SSLContext:
    """As `bootstrap_context`, and this node shows its own certificate.

    Blocks on the disk: Python's ``ssl`` reads key and chain from a file only, kept at ``directory/call.pem``.
    """
    context = bootstrap_context(identity.credentials.root_certificate, identity.mesh_id)
    path = directory / "call.pem"
    write_private(path, private_key_pem(identity.key) + identity.credentials.certificate_chain, durable=False)
    context.load_cert_chain(path)
    return context


async def call(
    method: str,
    address: str,
    path: str,
    context: ssl.SSLContext,
    body: Mapping[str, Any] | None = None,
    *,
    deadline_s: float = CALL_DEADLINE_S,
) -> dict[str, Any]:
    """One exchange. Raises `EnrolError`, or `EnrolRefused` for a considered no."""
    where = parse_address(address)
    timeout = aiohttp.ClientTimeout(total=deadline_s, sock_connect=CONNECT_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, trust_env=False) as session,
            session.request(method, f"https://{where}{path}", ssl=context, json=body, allow_redirects=False) as response,
        ):
            data = await _read_capped(response)
            status = response.status
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        raise EnrolError(_describe(error, deadline_s)) from None
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        raise EnrolError(f"it answered {status} with something that is not JSON") from None
    if not isinstance(answer, dict):
        raise EnrolError(f"it answered {status} with JSON of the wrong shape")
    if status == 200:
        return answer
    error_body = answer.get("error")
    reason = error_body.get("message") if isinstance(error_body, dict) else None
    kind = EnrolRefused if 400 <= status < 500 and status not in (408, 429) else EnrolError
    raise kind(str(reason)[:300] if reason else f"it answered {status}")


async def _read_capped(response: aiohttp.ClientResponse) -> bytes:
    data = bytearray()
    async for chunk in response.content.iter_any():
        data += chunk
        if len(data) > MAX_ANSWER_BYTES:
            raise ValueError("its answer is too large")
    return bytes(data)


def _describe(error: Exception, deadline_s: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {deadline_s:g} s"
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"cannot connect ({plain_reason(error.os_error)})"
    if isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError):
        return "it closed the connection (is this node's certificate still good?)"
    return str(error) or type(error).__name__


def plain_reason(error: OSError) -> str:
    """Why a connection failed, without the names of C files and the errno of something else."""
    if isinstance(error, ssl.SSLError):
        return re.sub(r"^\[[^\]]*\] *| *\(_ssl\.c:\d+\)$", "", str(error))
    return os.strerror(error.errno).lower() if error.errno else str(error)
