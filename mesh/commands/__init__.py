"""The subcommands of `mesh`, a file for each kind of person: operator, user, and whoever tries it on one machine."""
