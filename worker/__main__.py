"""`python -m worker` is `mesh-worker`."""

from worker.cli import main

main(prog_name="mesh-worker")
