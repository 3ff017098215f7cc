"""The `mesh-bootstrap` command."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from bootstrap.config import BootstrapConfig
from mesh.options import node_command
from mesh.runtime import Stop


def _node(settings: BootstrapConfig) -> Callable[[Stop], Awaitable[int]]:
    from bootstrap.node import run  # here, so that --help need not load the node

    return lambda stop: run(settings, stop)


main = node_command(
    BootstrapConfig,
    _node,
    help="Run a bootstrap node: the well-known place where nodes enrol and first find the directory.",
    example="mesh-bootstrap --home ~/.infermesh --advertise mesh.example.org",
)
