"""``python -m mesh``: the same as the `mesh` command."""

from mesh.cli import main

main(prog_name="mesh")
