"""The `mesh-proxy` command."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from mesh.options import node_command
from mesh.runtime import Stop
from proxy.config import ProxyConfig


def _node(settings: ProxyConfig) -> Callable[[Stop], Awaitable[int]]:
    from proxy.node import run  # here, so that --help need not load the node

    return lambda stop: run(settings, stop)


main = node_command(
    ProxyConfig,
    _node,
    help="Run a proxy: the OpenAI API of the mesh.",
    example="mesh-proxy --join imjoin_… --port 8080",
)
