"""The mesh command, as far as it goes without a network: what it makes, prints and refuses."""

from __future__ import annotations

import json
import stat
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from mesh.apikey import verify_key
from mesh.authority import open_mesh
from mesh.cli import main
from mesh.client import parse_url, resolve
from mesh.commands.shared import ago
from mesh.commands.user import printable
from mesh.errors import ConfigError, UsageError
from mesh.invite import parse_token, verify_invite
from mesh.up import DEFAULT_MODEL, DEFAULT_SERVED_NAME, Plan

NAMES = ("MESH_API_KEY", "MESH_URL", "MESH_HOME")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    assert mesh(tmp_path, "create", "--name", "lab", "--bootstrap", "b.example").exit_code == 0
    return tmp_path


def mesh(home: Path, *arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, [*arguments, "--home", str(home)], input=stdin)


def answer(home: Path, *arguments: str) -> dict[str, Any]:
    result = mesh(home, *arguments, "--json")
    assert result.exit_code == 0, result.output
    value: dict[str, Any] = json.loads(result.stdout)
    return value


def commands() -> Iterator[tuple[str, ...]]:
    def walk(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        if isinstance(command, click.Group):
            for name, inner in command.commands.items():
                yield from walk(inner, (*path, name))
        else:
            yield path

    return walk(main, ())


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
def test_every_command_has_json_and_help_with_an_example(path: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(main, [*path, "--help"])
    assert shown.exit_code == 0
    assert "Example" in shown.output
    assert "--json" in shown.output
    assert f"mesh {' '.join(path)}" in shown.output.partition("Example")[2]


@pytest.mark.parametrize("arguments", [["--nonsense"], ["nonsense"], ["create", "--nonsense"], ["invite", "king"], ["invite"]])
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(main, arguments).exit_code == 2


def test_create_makes_a_mesh_and_refuses_to_do_so_twice(home: Path) -> None:
    assert open_mesh(home / "mesh").name == "lab"
    again = mesh(home, "create")
    assert again.exit_code == 2
    assert again.stderr.startswith("error: ")
    assert len(again.stderr.splitlines()) == 1


def test_create_tells_machines_the_mesh_id(tmp_path: Path) -> None:
    made = answer(tmp_path, "create", "--name", "lab")
    assert open_mesh(tmp_path / "mesh").mesh_id.hex() == made["mesh_id"]


def test_invite_makes_a_token_that_the_mesh_honours(home: Path) -> None:
    made = answer(home, "invite", "worker", "--uses", "4", "--ttl", "2h")
    token = parse_token(made["token"])
    trust = open_mesh(home / "mesh").trust
    invite = verify_invite(token.signed, trust, now=made["expires"] - 7199.0)
    assert (invite.role, invite.uses, token.bootstraps) == ("worker", 4, ("b.example:7600",))


def test_invite_prints_the_token_alone_so_that_it_can_be_piped(home: Path) -> None:
    result = mesh(home, "invite", "proxy", "--bootstrap", "c.example:1")
    assert parse_token(result.stdout).bootstraps == ("c.example:1",)
    assert "mesh-proxy --join" in result.stderr


def test_invite_warns_of_what_a_bootstrap_token_is_worth(home: Path) -> None:
    assert "issuer key" in mesh(home, "invite", "bootstrap").stderr


def test_invite_without_a_known_bootstrap_node_says_what_to_do(tmp_path: Path) -> None:
    mesh(tmp_path, "create")
    result = mesh(tmp_path, "invite", "worker")
    assert result.exit_code == 2
    assert "--bootstrap HOST:PORT" in result.stderr


@pytest.mark.parametrize("arguments", [["--ttl", "0s"], ["--ttl", "31d"], ["--ttl", "soon"], ["--uses", "0"], ["--bootstrap", "a b"]])
def test_invitations_that_cannot_be_are_refused(home: Path, arguments: list[str]) -> None:
    assert mesh(home, "invite", "worker", *arguments).exit_code == 2


def test_key_has_the_claims_it_was_asked_for(home: Path) -> None:
    options = ("--model", "a", "--model", "b", "--role", "invoker", "--role", "viewer", "--ttl", "10d", "--rps", "5", "--tps", "100")
    made = answer(home, "key", "create", "--project", "search", *options, "--concurrency", "7", "--region", "eu")
    claims = verify_key(made["key"], open_mesh(home / "mesh").trust, now=made["not_before"] + 1.0)
    assert (claims.project, claims.models, claims.roles) == ("search", frozenset({"a", "b"}), frozenset({"invoker", "viewer"}))
    assert (claims.rps, claims.tps, claims.concurrency, claims.region) == (5.0, 100.0, 7.0, "eu")
    assert claims.expires - claims.not_before == pytest.approx(864_000.0, abs=1.0)


def test_key_is_an_invokers_for_all_models_unless_told_otherwise(home: Path) -> None:
    made = answer(home, "key", "create", "--project", "p")
    assert (made["roles"], made["models"]) == (["invoker"], None)


def test_key_is_printed_alone_so_that_it_can_be_piped(home: Path) -> None:
    result = mesh(home, "key", "create", "--project", "p")
    assert result.stdout.startswith("im_")
    assert len(result.stdout.split()) == 1


@pytest.mark.parametrize(
    "arguments", [["--ttl", "91d"], ["--ttl", "0s"], ["--role", "king"], ["--rps", "0"], ["--rps", "-1"], ["--project", ""], []]
)
def test_keys_that_cannot_be_are_refused(home: Path, arguments: list[str]) -> None:
    project = [] if not arguments or arguments[0] == "--project" else ["--project", "p"]
    assert mesh(home, "key", "create", *project, *arguments).exit_code == 2
    assert answer(home, "key", "list") == {"keys": []}


def test_list_shows_claims_and_no_file_holds_the_key(home: Path) -> None:
    made = answer(home, "key", "create", "--project", "search", "--note", "for the crawler")
    answer(home, "key", "create", "--project", "ads")
    (listed,) = answer(home, "key", "list", "--project", "search")["keys"]
    assert (listed["id"], listed["note"], listed["expired"]) == (made["id"], "for the crawler", False)
    assert "for the crawler" in mesh(home, "key", "list").stdout
    for path in home.rglob("*"):
        if path.is_file():
            assert made["key"][10:40].encode() not in path.read_bytes()
    assert stat.S_IMODE((home / "mesh" / "keys.jsonl").stat().st_mode) == 0o600


def test_broken_list_names_the_line(home: Path) -> None:
    answer(home, "key", "create", "--project", "p")
    with (home / "mesh" / "keys.jsonl").open("a") as file:
        file.write("{\n")
    result = mesh(home, "key", "list")
    assert result.exit_code == 2
    assert "line 2" in result.stderr


def test_inspect_tells_a_good_key_from_a_foreign_one(home: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    good = answer(home, "key", "create", "--project", "p")["key"]
    shown = answer(home, "key", "inspect", good)
    assert (shown["valid"], shown["project"]) == (True, "p")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    assert answer(elsewhere, "key", "inspect", good)["valid"] is None
    mesh(elsewhere, "create")
    foreign = mesh(elsewhere, "key", "inspect", good, "--json")
    assert foreign.exit_code == 1
    assert json.loads(foreign.stdout)["valid"] is False


def test_inspect_takes_the_key_from_standard_input_or_environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = answer(home, "key", "create", "--project", "p")["key"]
    assert "good" in mesh(home, "key", "inspect", "-", stdin=f"{key}\n").stdout
    monkeypatch.setenv("MESH_API_KEY", key)
    assert "good" in mesh(home, "key", "inspect").stdout


@pytest.mark.parametrize("key", ["im_nonsense", "sk-abc", "im_" + "a" * 200])
def test_inspect_of_what_is_no_key_fails_in_one_line(home: Path, key: str) -> None:
    result = mesh(home, "key", "inspect", key)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", [("key", "create", "--project", "p"), ("key", "list"), ("invite", "worker")])
def test_operators_commands_without_a_mesh_say_what_to_do(tmp_path: Path, command: tuple[str, ...]) -> None:
    result = mesh(tmp_path, *command)
    assert result.exit_code == 2
    assert "mesh create" in result.stderr


@pytest.mark.parametrize("arguments", [[], ["m", "--role", "worker"]])
def test_look_up_wants_a_model_or_a_role(tmp_path: Path, arguments: list[str]) -> None:
    result = mesh(tmp_path, "lookup", *arguments)
    assert result.exit_code == 2
    assert "--role" in result.stderr


def test_init_stores_privately_and_later_commands_read_it(tmp_path: Path) -> None:
    assert answer(tmp_path, "init", "--url", "http://a.example:8080/v1/", "--api-key", "im_abc")["url"] == "http://a.example:8080"
    path = tmp_path / "client.toml"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert tomllib.loads(path.read_text()) == {"url": "http://a.example:8080", "api_key": "im_abc"}
    assert resolve(tmp_path, url=None, api_key=None, environ={}).base_url == "http://a.example:8080/v1"


def test_init_takes_the_key_from_standard_input(tmp_path: Path) -> None:
    result = mesh(tmp_path, "init", "--url", "http://a.example", stdin="im_abc\n")
    assert result.exit_code == 0
    assert resolve(tmp_path, url=None, api_key=None, environ={}).api_key == "im_abc"


def test_flag_wins_over_environment_and_environment_over_what_is_stored(tmp_path: Path) -> None:
    mesh(tmp_path, "init", "--url", "http://stored", "--api-key", "im_stored")
    environ = {"MESH_URL": "http://environ", "MESH_API_KEY": "im_environ"}
    found = resolve(tmp_path, url=None, api_key=None, environ=environ)
    assert (found.url, found.api_key) == ("http://environ", "im_environ")
    found = resolve(tmp_path, url="http://flag", api_key="im_flag", environ=environ)
    assert (found.url, found.api_key) == ("http://flag", "im_flag")


@pytest.mark.parametrize("command", ["models", "workers", "status", "peers", "doctor"])
def test_users_commands_without_settings_say_what_to_do(tmp_path: Path, command: str) -> None:
    result = mesh(tmp_path, command)
    assert result.exit_code == 2
    assert "mesh init" in result.stderr


def test_key_never_shows_in_the_settings_repr(tmp_path: Path) -> None:
    assert "im_secret" not in repr(resolve(tmp_path, url="http://a", api_key="im_secret", environ={}))


def test_broken_settings_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "client.toml").write_text("not toml")
    with pytest.raises(ConfigError, match=r"client\.toml"):
        resolve(tmp_path, url=None, api_key=None, environ={})


@pytest.mark.parametrize("text", ["", "a.example", "ftp://a", "http://", "http://a:b", "http://a:0", "http://a?x=1", "http://[::1"])
def test_urls_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        parse_url(text)


@pytest.mark.parametrize("key", ["im_a b", "im_ü", "im_a\nX-Evil: 1", " "])
def test_keys_that_cannot_be_a_header_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(UsageError):
        resolve(tmp_path, url="http://a", api_key=key, environ={})


def test_models_words_cannot_drive_the_terminal() -> None:
    assert printable("fine\n\ttext 👩‍💻 ü") == "fine\n\ttext 👩‍💻 ü"
    assert printable("\x1b[2J\x07\x9b31m\r") == r"\x1b[2J\x07\x9b31m\x0d"


def test_moments_are_told_in_the_largest_fitting_unit() -> None:
    assert (ago(90_000.0, 0.0), ago(0.0, 3700.0), ago(0.0, 5.0), ago(60.0, 0.0)) == ("in 1d", "1h ago", "5s ago", "in 1m")


def test_down_without_anything_up_is_no_failure(tmp_path: Path) -> None:
    assert answer(tmp_path, "down") == {"stopped": []}


def test_plan_without_a_model_is_the_demo_model_with_the_cores_shared() -> None:
    arguments = Plan(home=Path("/x"), workers=2).worker_arguments()
    assert arguments[:6] == ("--engine", "llamacpp", "--model", DEFAULT_MODEL, "--served-name", DEFAULT_SERVED_NAME)
    assert "--threads" in arguments


def test_plan_hands_engine_arguments_on_after_two_dashes() -> None:
    plan = Plan(home=Path("/x"), engine="vllm", models=("m",), engine_args=("--max-model-len", "1024"))
    assert plan.worker_arguments() == ("--engine", "vllm", "--model", "m", "--", "--max-model-len", "1024")


@pytest.mark.parametrize("arguments", [["--engine", "external"], ["--engine", "vllm"], ["--workers", "0"], ["--port", "70000"]])
def test_plans_that_cannot_be_are_refused_before_anything_is_made(tmp_path: Path, arguments: list[str]) -> None:
    assert mesh(tmp_path, "up", *arguments).exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["create", "chat", "--model", "m"],
        ["create", "chat", "--project", "p"],
        ["create", "a/b", "--model", "m", "--project", "p"],
        ["create", "chat", "--model", "", "--project", "p"],
        ["create", "chat", "--model", "m", "--project", "p", "--timeout", "2d"],
        ["create", "chat", "--model", "m", "--project", "p", "--burst", "0"],
        ["create", "chat", "--model", "m", "--project", "p", "--keep", "1h"],
        ["create", "chat", "--model", "m", "--project", "p", "--prompts", "redacted"],
        ["create", "chat", "--model", "m", "--project", "p", "--prompts", "full", "--key", "KEY", "--keep", "91d"],
        ["create", "chat", "--model", "m", "--project", "p", "--prompts", "full", "--key", "OTHER"],
        ["set", "chat", "--project", "p"],
    ],
    ids=" ".join,
)
def test_endpoints_that_cannot_be_are_refused_before_anybody_is_asked(home: Path, arguments: list[str]) -> None:
    (home / "OTHER").write_text("no key")
    named = [str(home / text) if text in ("KEY", "OTHER") else text for text in arguments]
    result = mesh(home, "endpoint", *named, "--url", "http://127.0.0.1:9")
    assert result.exit_code == 2, result.output
    assert "cannot reach" not in result.output
    assert "Traceback" not in result.output


def test_who_holds_only_an_api_key_is_told_what_signing_an_endpoint_takes(tmp_path: Path) -> None:
    result = mesh(tmp_path, "endpoint", "create", "chat", "--model", "m", "--project", "p")
    assert result.exit_code == 2
    assert "mesh issuer import" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [["--prompts"], ["--prompts", "--endpoint", "chat"], ["--key", "KEY"], ["--prompts", "--endpoint", "chat", "--key", "KEY", "--follow"]],
)
def test_prompts_take_an_endpoint_and_its_key(home: Path, arguments: list[str]) -> None:
    result = mesh(home, "logs", *arguments, "--all", "--url", "http://127.0.0.1:9")
    assert result.exit_code == 2
    assert "--prompts goes with" in result.stderr


def test_a_key_for_endpoints_says_so(home: Path) -> None:
    made = mesh(home, "key", "create", "--project", "p", "--endpoint", "chat")
    assert "endpoints chat" in made.stderr
    assert "all models" not in made.stderr
