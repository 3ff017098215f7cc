"""What the README promises about settings, holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from bootstrap.config import BootstrapConfig
from mesh.settings import Settings, describe
from proxy.config import ProxyConfig
from worker.config import WorkerConfig

README = (Path(__file__).parents[2] / "README.md").read_text()


@pytest.mark.parametrize("config", [BootstrapConfig, ProxyConfig, WorkerConfig])
def test_every_setting_is_in_the_readme_with_its_help(config: type[Settings]) -> None:
    for item in describe(config):
        name = "after `--`" if item.about.rest else f"`{item.flag}`"
        rows = [line for line in README.splitlines() if line.startswith(f"| {name} |")]
        assert any(item.about.help.replace("|", "\\|") in row for row in rows), f"{item.flag} of {config.__name__}"
