"""`python -m bootstrap` is `mesh-bootstrap`."""

from bootstrap.cli import main

main(prog_name="mesh-bootstrap")
