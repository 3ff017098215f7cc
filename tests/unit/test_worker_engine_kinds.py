"""How each kind of engine is started, and what is refused before anything is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mesh.errors import ConfigError, EngineError
from worker.engine import EngineKind, EngineSpec, Task, make_engine
from worker.engine.base import ListedModel
from worker.engine.external import ExternalEngine, parse_base_url
from worker.engine.llamacpp import default_threads
from worker.engine.secret import read_key
from worker.models import ModelKind, ResolvedModel

HUB = ResolvedModel(path="Qwen/Qwen3-8B", name="Qwen/Qwen3-8B", kind=ModelKind.HUB)
GGUF = ResolvedModel(path="/models/tiny.gguf", name="tiny", kind=ModelKind.GGUF, digest="sha256:00")


def vllm(**fields: Any) -> Any:
    base: dict[str, Any] = {"source": "Qwen/Qwen3-8B", "vllm_command": f"{sys.executable} serve"}
    return make_engine(EngineSpec(kind=EngineKind.VLLM, **(base | fields)))


# --------------------------------------------------------------------------------------------------------------- vllm


def test_vllm_serve_takes_the_model_positionally() -> None:
    command = vllm(served_name="q").command(HUB, 1234)
    assert command.argv == (
        *(sys.executable, "serve", "Qwen/Qwen3-8B", "--served-model-name", "q"),
        *("--host", "127.0.0.1", "--port", "1234", "--disable-uvicorn-access-log"),
    )


def test_vllm_api_server_takes_the_model_as_an_option() -> None:
    command = vllm(vllm_command=f"'{sys.executable}' -m vllm.entrypoints.openai.api_server").command(HUB, 1234)
    assert command.argv[:5] == (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "Qwen/Qwen3-8B")


def test_vllm_gets_what_the_operator_wrote_last_and_as_it_is() -> None:
    engine = vllm(args=("--dtype", "bfloat16", "--rope-scaling", '{"a": 1}', ""), context_tokens=4096)
    assert engine.command(HUB, 1).argv[-7:] == ("--max-model-len", "4096", "--dtype", "bfloat16", "--rope-scaling", '{"a": 1}', "")


def test_vllm_key_is_in_its_environment_and_not_among_its_arguments() -> None:
    engine = vllm(env={"HF_HUB_OFFLINE": "1"})
    command = engine.command(HUB, 1)
    key = command.env["VLLM_API_KEY"]
    assert engine.headers == {"Authorization": f"Bearer {key}"}
    assert not any(key in argument for argument in command.argv)
    assert command.env["HF_HUB_OFFLINE"] == "1"
    assert key not in repr(engine)


@pytest.mark.parametrize("args", [("--api-key", "own"), ("--api-key=own",)])
def test_vllm_key_the_operator_gave_is_the_one_used(args: tuple[str, ...]) -> None:
    assert vllm(args=args).headers == {"Authorization": "Bearer own"}


@pytest.mark.parametrize("arg", ["--port", "--port=1", "--host", "--served-model-name", "--model=x"])
def test_vllm_arguments_that_would_cut_it_off_are_refused(arg: str) -> None:
    with pytest.raises(ConfigError, match="worker's to decide"):
        vllm(args=(arg, "1"))


@pytest.mark.parametrize(
    ("command", "complaint"),
    [("", "--vllm-command is empty"), ("'", "not a command line"), ("/nowhere/vllm serve", "not there to be run")],
)
def test_vllm_command_that_cannot_work_is_refused(command: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        vllm(vllm_command=command or " ")


# ----------------------------------------------------------------------------------------------------------- llamacpp


def llamacpp(**fields: Any) -> Any:
    return make_engine(EngineSpec(kind=EngineKind.LLAMACPP, **({"source": "/models/tiny.gguf"} | fields)))


def test_llamacpp_is_told_its_options() -> None:
    command = llamacpp(served_name="m", context_tokens=512, parallel=2, threads=3).command(GGUF, 1234)
    options = json.loads(command.argv[-1])
    assert options == {
        "model": "/models/tiny.gguf",
        "alias": "m",
        "port": 1234,
        "context_tokens": 512,
        "parallel": 2,
        "threads": 3,
        "connections": 512,
        "embeddings": True,
    }
    assert Path(command.argv[-2]).is_file()


def test_llamacpp_without_embeddings_when_they_are_not_asked_for() -> None:
    command = llamacpp(tasks=(Task.CHAT,)).command(GGUF, 1)
    assert json.loads(command.argv[-1])["embeddings"] is False


def test_llamacpp_refuses_arguments_for_vllm() -> None:
    with pytest.raises(ConfigError, match="for vLLM"):
        llamacpp(args=("--dtype", "bfloat16"))


@pytest.mark.parametrize(
    ("processors", "quota", "threads"),
    [(2, "", 1), (1, "", 1), (16, "max 100000\n", 8), (64, "400000 100000\n", 2), (64, "50000 100000", 1), (8, "odd", 4)],
)
def test_default_threads_are_half_of_what_may_be_used(processors: int, quota: str, threads: int) -> None:
    assert default_threads(processors, quota) == threads


# ----------------------------------------------------------------------------------------------------------- external


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000"),
        (" https://host/openai/v1 ", "https://host/openai"),
        ("http://[::1]:8000/v1", "http://[::1]:8000"),
    ],
)
def test_external_url_is_taken_with_and_without_v1(url: str, base: str) -> None:
    assert parse_base_url(url) == base


@pytest.mark.parametrize(
    "url", ["", "host:8000", "ftp://host", "http://", "http://h:0x/", "http://h:99999", "http://h/?a=1", "http://u:p@h/"]
)
def test_external_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        parse_base_url(url)


def external(**fields: Any) -> ExternalEngine:
    return ExternalEngine(spec=EngineSpec(kind=EngineKind.EXTERNAL, url="http://127.0.0.1:1", **fields))


A, B = ListedModel(id="a", context_tokens=99), ListedModel(id="b")


@pytest.mark.parametrize(
    ("fields", "listed", "served"),
    [
        ({}, (A, B), [("a", "a"), ("b", "b")]),
        ({"source": "b"}, (A, B), [("b", "b")]),
        ({"served_name": "a"}, (A, B), [("a", "a")]),
        ({"source": "a", "served_name": "public"}, (A, B), [("public", "a")]),
        ({"served_name": "public"}, (A,), [("public", "a")]),
        ({"source": "a"}, (), [("a", "a")]),
    ],
    ids=["all", "one by its name", "one by ours", "renamed", "the only one renamed", "no listing"],
)
def test_external_models_are_those_asked_for(
    fields: dict[str, Any], listed: tuple[ListedModel, ...], served: list[tuple[str, str]]
) -> None:
    assert [(model.name, model.engine_name) for model in external(**fields).models(None, listed)] == served


@pytest.mark.parametrize(
    ("fields", "listed"),
    [({}, ()), ({"source": "c"}, (A, B)), ({"served_name": "c"}, (A, B)), ({}, tuple(ListedModel(id=f"m{n}") for n in range(50)))],
)
def test_external_model_that_is_not_plain_is_asked_for(fields: dict[str, Any], listed: tuple[ListedModel, ...]) -> None:
    with pytest.raises(EngineError):
        external(**fields).models(None, listed)


def test_key_comes_from_the_environment_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("from-file\n")
    assert read_key({"K": " from-env "}, "K", None) == "from-env"
    assert read_key({}, None, file) == "from-file"
    assert read_key({}, None, None) is None


def test_key_that_was_named_but_is_not_there_is_refused(tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.touch()
    binary.write_bytes(b"\xff\x00")
    with pytest.raises(ConfigError, match="K with the engine's key is not set"):
        read_key({}, "K", None)
    for file in (empty, binary, tmp_path / "missing"):
        with pytest.raises(ConfigError):
            read_key({}, None, file)
    with pytest.raises(ConfigError, match="no key has"):
        read_key({"K": "two\nlines"}, "K", None)
