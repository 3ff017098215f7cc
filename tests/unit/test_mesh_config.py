"""Settings: where a value may come from, who wins, and what is said when it makes no sense."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner

from mesh.config import NodeConfig
from mesh.errors import ConfigError, UsageError
from mesh.options import node_command
from mesh.settings import describe, load, parse_duration_s, parse_size_bytes, setting, variables
from mesh.trust import Role


@dataclass(frozen=True, kw_only=True)
class Room(NodeConfig):
    """A room with one setting of every kind."""

    role: ClassVar[Role] = Role.PROXY
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"wan": {"patience_s": 60.0}}

    port: int = setting(8080, help="A port.")
    patience_s: float = setting(30.0, help="A time.")
    largest_bytes: int = setting(1 << 20, help="A size.")
    share: float = setting(0.5, help="A number.")
    shy: bool = setting(False, help="A choice.")
    certificate: Path | None = setting(None, help="A file.")
    names: tuple[str, ...] = setting((), help="Several.")
    password: str = setting("", secret=True, help="A secret.")
    rest: tuple[str, ...] = setting((), rest=True, help="For somebody else.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.share <= 1, "share", "must be from 0 to 1")
        self.require(self.password != "weak", "password", "is too weak")


def settings(
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    toml: str | None = None,
    preset: str | None = None,
    *,
    home: Path,
) -> Room:
    if toml is not None:
        (home / "config.toml").write_text(toml)
    return load(Room, flags or {}, environ={"MESH_HOME": str(home)} | dict(environ or {}), preset=preset)


def test_defaults_hold_when_nothing_is_said(tmp_path: Path) -> None:
    room = settings(home=tmp_path)
    assert (room.port, room.patience_s, room.shy, room.names, room.certificate) == (8080, 30.0, False, (), None)


def test_later_sources_win_over_earlier_ones(tmp_path: Path) -> None:
    toml = "[proxy]\npatience = '3s'\n"
    environ = {"MESH_PROXY_PATIENCE": "4s"}
    assert settings(preset="wan", home=tmp_path).patience_s == 60.0
    assert settings(preset="wan", toml=toml, home=tmp_path).patience_s == 3.0
    assert settings(preset="wan", toml=toml, environ=environ, home=tmp_path).patience_s == 4.0
    flags = {"patience_s": "5s"}
    assert settings(flags, environ, toml, "wan", home=tmp_path).patience_s == 5.0


def test_preset_may_be_named_by_flag_environment_or_file(tmp_path: Path) -> None:
    assert settings(environ={"MESH_PRESET": "wan"}, home=tmp_path).patience_s == 60.0
    assert settings(toml="preset = 'wan'", home=tmp_path).patience_s == 60.0
    assert settings(toml="preset = 'wan'", preset="lan", home=tmp_path).patience_s == 30.0


def test_preset_of_all_nodes_holds_in_every_room(tmp_path: Path) -> None:
    assert settings(preset="local", home=tmp_path).host == "127.0.0.1"


def test_shared_settings_come_from_shared_names_and_own_names_win(tmp_path: Path) -> None:
    assert settings(environ={"MESH_REGION": "eu"}, home=tmp_path).region == "eu"
    assert settings(environ={"MESH_REGION": "eu", "MESH_PROXY_REGION": "us"}, home=tmp_path).region == "us"
    assert settings(toml="[node]\nregion = 'eu'", home=tmp_path).region == "eu"
    assert settings(toml="[node]\nregion = 'eu'\n[proxy]\nregion = 'us'", home=tmp_path).region == "us"


def test_every_kind_is_read_from_text(tmp_path: Path) -> None:
    room = settings(
        {"names": ("a", "b")},
        {
            "MESH_PROXY_LARGEST": "2MiB",
            "MESH_PROXY_SHY": "yes",
            "MESH_PROXY_CERTIFICATE": "~/x.pem",
            "MESH_BOOTSTRAP": "a.example:1, b.example:2",
            "MESH_PROXY_REST": "--flag 'two words'",
            "MESH_PROXY_SHARE": "0.25",
        },
        home=tmp_path,
    )
    assert (room.largest_bytes, room.shy, room.certificate, room.share) == (2 << 20, True, Path.home() / "x.pem", 0.25)
    assert (room.names, room.bootstrap, room.rest) == (("a", "b"), ("a.example:1", "b.example:2"), ("--flag", "two words"))


def test_every_kind_is_read_from_toml(tmp_path: Path) -> None:
    toml = "[proxy]\nport = 9\npatience = 2\nlargest = 5\nshare = 1\nshy = true\ncertificate = 'c'\nnames = ['a']\nrest = ['--x']"
    room = settings(toml=toml, home=tmp_path)
    assert (room.port, room.patience_s, room.largest_bytes, room.share, room.shy) == (9, 2.0, 5, 1.0, True)
    assert (room.certificate, room.names, room.rest) == (Path("c"), ("a",), ("--x",))


@pytest.mark.parametrize(
    ("environ", "toml", "message"),
    [
        ({"MESH_PROXY_PORT": "abc"}, None, r"--port: must be a whole number \(got 'abc' from MESH_PROXY_PORT\)"),
        ({"MESH_PROXY_PORT": "99999"}, None, r"--port: .*65535 \(got '99999' from MESH_PROXY_PORT\)"),
        ({"MESH_PROXY_PATIENCE": "soon"}, None, "--patience: 'soon' is not a time"),
        ({"MESH_PROXY_LARGEST": "huge"}, None, "--largest: 'huge' is not a size"),
        ({"MESH_PROXY_SHY": "maybe"}, None, "--shy: must be true or false"),
        ({"MESH_DRAIN": "-1s"}, None, "--drain"),
        ({"MESH_BOOTSTRAP": "nonsense"}, None, "--bootstrap: 'nonsense' is not an address.* from MESH_BOOTSTRAP"),
        ({"MESH_LOG_LEVEL": "loud"}, None, "--log-level: must be one of debug, info"),
        ({"MESH_PRESET": "moon"}, None, "preset must be one of local, lan, wan, not 'moon' .from MESH_PRESET"),
        ({}, "[proxy]\nport = 1.5", r"--port: must be a whole number .*\[proxy\] port"),
        ({}, "[proxy]\nport = true", "--port: has the wrong type"),
        ({}, "[proxy]\nnames = 5", "--names: must be a list"),
        ({}, "[proxy]\nregion = 5", "--region: must be text"),
        ({}, "[proxy]\nshare = 7", r"--share: must be from 0 to 1 \(got '7' from .*\[proxy\] share\)"),
        ({}, "[proxy]\nprot = 1", "'prot' is not a setting; did you mean 'port'"),
        ({}, "[proxy]\nzzz = 1", "'zzz' is not a setting; known are"),
        ({}, "[node]\nport = 1", r"\[node\] 'port' is not a setting"),
        ({}, "[prxy]\n", "did you mean 'proxy'"),
        ({}, "proxy = 1", r"\[proxy\] must be a table"),
        ({}, "not toml", r"config\.toml cannot be read"),
    ],
)
def test_error_names_the_setting_and_where_its_value_came_from(
    tmp_path: Path, environ: dict[str, str], toml: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(environ=environ, toml=toml, home=tmp_path)


def test_other_rooms_sections_are_left_alone(tmp_path: Path) -> None:
    assert settings(toml="[worker]\nanything = 1\n[bootstrap]\n", home=tmp_path).port == 8080


def test_named_file_must_exist_and_the_usual_one_need_not(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load(Room, {}, environ={"MESH_HOME": str(tmp_path)}, file=tmp_path / "missing.toml")


def test_secret_appears_neither_in_repr_nor_in_errors(tmp_path: Path) -> None:
    assert "hunter2" not in repr(settings({"password": "hunter2"}, home=tmp_path))
    assert "imjoin_x" not in repr(settings({"join": "imjoin_x"}, home=tmp_path))
    with pytest.raises(ConfigError) as caught:
        settings({"password": "weak"}, home=tmp_path)
    assert "--password: is too weak" in str(caught.value)
    assert "'weak'" not in str(caught.value)


def test_state_lies_under_home_by_role_and_name(tmp_path: Path) -> None:
    assert settings(home=tmp_path).state_dir == tmp_path / "nodes" / "proxy"
    assert settings({"name": "a"}, home=tmp_path).state_dir == tmp_path / "nodes" / "proxy-a"
    assert settings({"state_dir": str(tmp_path / "x")}, home=tmp_path).state_dir == tmp_path / "x"
    with pytest.raises(ConfigError, match="--name"):
        settings({"name": "../x"}, home=tmp_path)


def test_advertised_addresses_take_the_listeners_port_where_none_is_given(tmp_path: Path) -> None:
    room = settings({"advertise": ("a.example", "b.example:1")}, home=tmp_path)
    assert room.addresses(77) == ("a.example:77", "b.example:1")
    assert settings(preset="local", home=tmp_path).addresses(77) == ("127.0.0.1:77",)


@pytest.mark.parametrize(
    ("text", "seconds"), [("250ms", 0.25), ("30s", 30.0), ("1.5m", 90.0), ("2h", 7200.0), ("90d", 7_776_000.0), ("7", 7.0)]
)
def test_times(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize(("text", "size"), [("64MiB", 64 << 20), ("10MB", 10**7), ("1.5KiB", 1536), ("7", 7), ("2gb", 2 * 10**9)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size_bytes(text) == size


@pytest.mark.parametrize("text", ["", "s", "-1s", "1w", "1 2", "nan", "inf", "1e5", "٣s", "1s1s"])
def test_times_and_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        parse_duration_s(text)
    with pytest.raises(UsageError):
        parse_size_bytes(text)


def rooms() -> list[type[NodeConfig]]:
    from bootstrap.config import BootstrapConfig
    from proxy.config import ProxyConfig
    from worker.config import WorkerConfig

    return [BootstrapConfig, ProxyConfig, WorkerConfig]


@pytest.mark.parametrize("room", rooms(), ids=lambda room: str(room.role))
def test_every_setting_explains_itself_and_has_a_name_of_its_own(room: type[NodeConfig]) -> None:
    described = describe(room)
    assert len({item.name for item in described}) == len(described)
    for item in described:
        assert len(item.about.help) > 10, item.field
        assert item.about.help.rstrip("]").endswith((".", "[HOME/nodes/ROLE[-NAME", "[the source's own name")) or "[" in item.about.help
        assert variables(room, item)[0].startswith(f"MESH_{room.role.upper()}_")


@pytest.mark.parametrize("room", rooms(), ids=lambda room: str(room.role))
def test_presets_change_only_settings_there_are(room: type[NodeConfig]) -> None:
    fields = {item.field for item in describe(room)}
    for owner in room.__mro__:
        for preset, deltas in vars(owner).get("presets", {}).items():
            assert preset in ("local", "lan", "wan")
            assert set(deltas) <= fields


def test_command_has_an_option_for_every_setting_and_an_example() -> None:
    command = node_command(Room, lambda _settings: pytest.fail("must not run"), help="Run it.", example="mesh-proxy --x")
    shown = CliRunner().invoke(command, ["--help"])
    assert shown.exit_code == 0
    for item in describe(Room):
        assert item.about.rest or item.flag in shown.output
    assert "Example:" in shown.output


def test_command_with_a_wrong_setting_is_one_line_on_stderr_and_exit_code_2(tmp_path: Path) -> None:
    command = node_command(Room, lambda _settings: pytest.fail("must not run"), help="Run it.", example="x")
    result = CliRunner().invoke(command, ["--home", str(tmp_path), "--port", "70000"])
    assert result.exit_code == 2
    assert result.stderr == "error: --port: must be a port from 0 to 65535 (got '70000' from --port)\n"
    assert result.stdout == ""


def test_node_takes_secrets_out_of_the_environment_its_engine_would_inherit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bool]] = []

    def run(room: Room) -> Any:
        seen.append((room.join, "MESH_JOIN" in os.environ))
        raise ConfigError("enough")

    monkeypatch.setenv("MESH_JOIN", "imjoin_x")
    command = node_command(Room, run, help="Run it.", example="x")
    assert CliRunner().invoke(command, ["--home", str(tmp_path)]).exit_code == 2
    assert seen == [("imjoin_x", False)]
