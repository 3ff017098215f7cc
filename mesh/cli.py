"""The `mesh` command: for operators, for users, and for trying it all on one machine."""

from __future__ import annotations

import click

from mesh import __version__
from mesh.commands.bill import bill
from mesh.commands.directory import doctor, lookup, peers
from mesh.commands.endpoints import endpoint
from mesh.commands.issuers import issuer
from mesh.commands.limits import limits
from mesh.commands.local import down, up
from mesh.commands.logs import logs
from mesh.commands.nodes import drain, undrain
from mesh.commands.operator import create, invite, key
from mesh.commands.prices import prices
from mesh.commands.usage import usage
from mesh.commands.user import chat, init, models, status, workers


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Try it on this machine: mesh up",
)
@click.version_option(__version__, prog_name="mesh")
def main() -> None:
    """One OpenAI-compatible API in front of GPU machines anywhere, with no central anything."""


_LOOKING = (models, status, workers, peers, lookup, doctor, usage, logs, bill)
for _command in (up, down, create, invite, key, issuer, endpoint, limits, init, chat, *_LOOKING, prices, drain, undrain):
    main.add_command(_command)
