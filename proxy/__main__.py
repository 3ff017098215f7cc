"""`python -m proxy` is `mesh-proxy`."""

from proxy.cli import main

main(prog_name="mesh-proxy")
