"""A proxy that writes no receipts: what another one's cost is held against. Run in the place of `mesh-proxy`."""

from __future__ import annotations

from typing import Any

import proxy.node
from proxy.cli import main
from proxy.metering import Meter


def without(ledger: Any) -> Meter:
    return Meter(None)


proxy.node.Meter = without  # type: ignore[assignment, misc]
main(prog_name="mesh-proxy")
