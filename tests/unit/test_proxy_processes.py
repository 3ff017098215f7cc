"""The children of ``--processes``: one port for clients, ports of their own for peers."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh.errors import ConfigError
from proxy.config import ProxyConfig
from proxy.processes import _command


def option(argv: list[str], name: str) -> str:
    """The last one wins, as on a command line."""
    return argv[len(argv) - argv[::-1].index(name)]


def test_peers_reach_each_process_at_a_port_of_its_own_that_can_be_opened_in_a_firewall(tmp_path: Path) -> None:
    config = ProxyConfig(home=tmp_path, port=443, link_port=7701, dht_port=7801, processes=3)
    commands = [_command(config, number, 443) for number in range(3)]
    assert [option(argv, "--link-port") for argv in commands] == ["7701", "7702", "7703"]
    assert [option(argv, "--dht-port") for argv in commands] == ["7801", "7802", "7803"]
    assert {option(argv, "--port") for argv in commands} == {"443"}
    assert {option(argv, "--processes") for argv in commands} == {"1"}


def test_without_ports_for_peers_any_free_ones_are_taken(tmp_path: Path) -> None:
    argv = _command(ProxyConfig(home=tmp_path, processes=2), 1, 8080)
    assert (option(argv, "--link-port"), option(argv, "--dht-port")) == ("0", "0")


def test_ports_that_do_not_suffice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leaves no ports"):
        ProxyConfig(home=tmp_path, link_port=65534, processes=4)
