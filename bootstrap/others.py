"""The other bootstrap nodes, as this one asks them: who has used this join token?

They are asked side by side and not waited for long: a bootstrap node that is down must not keep machines from joining. What that
costs is stated: while two bootstrap nodes cannot reach each other, a token may be used at each.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from pathlib import Path

import structlog

from mesh.enrol import SPENT_PATH
from mesh.errors import MeshError
from mesh.https import call, member_context
from mesh.identity import Identity

log = structlog.get_logger(__name__)

ASK_S = 2.0


class Others:
    """``addresses`` is asked each time: the bootstrap nodes that are up now, without this one."""

    def __init__(self, identity: Identity, directory: Path, addresses: Callable[[], tuple[str, ...]]) -> None:
        self._identity, self._directory, self._addresses = identity, directory, addresses

    async def tell(self, token: bytes, node_id: bytes) -> set[bytes]:
        """Say that ``node_id`` uses ``token``; returns all nodes that the others know to use it."""
        addresses = self._addresses()
        if not addresses:
            return set()
        context = await asyncio.to_thread(member_context, self._identity, self._directory)
        body = {"token": token.hex(), "node": node_id.hex()}
        answers = await asyncio.gather(*(_tell_one(address, context, body) for address in addresses))
        return set().union(*answers)


async def _tell_one(address: str, context: ssl.SSLContext, body: dict[str, str]) -> set[bytes]:
    try:
        answer = await call("POST", address, SPENT_PATH, context, body, deadline_s=ASK_S)
        nodes = {bytes.fromhex(text) for text in answer["nodes"]}
    except (MeshError, KeyError, TypeError, ValueError) as error:
        log.warning("enrol.other_unheard", bootstrap=address, reason=str(error))
        return set()
    return {node for node in nodes if len(node) == 32}
