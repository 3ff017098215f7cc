"""The unmodified openai package, raw sockets and the `mesh` command against a whole mesh with the real embedded engine."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from tests.support.local_up import LocalUp, mesh_command, mesh_up

MODEL = "smollm2-135m-instruct"


def chat(client: openai.OpenAI, text: str = "Say hello.", **more: Any) -> Any:
    return client.chat.completions.create(
        model=more.pop("model", MODEL), messages=[{"role": "user", "content": text}], max_tokens=more.pop("max_tokens", 12), **more
    )


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalUp]:
    with mesh_up(tmp_path_factory.mktemp("home"), "--workers", "2") as started:
        yield started


def test_up_prints_one_object_with_what_a_client_and_an_operator_need(up: LocalUp) -> None:
    assert up.about["models"] == [MODEL]
    assert sorted(node["role"] for node in up.about["nodes"]) == ["bootstrap", "proxy", "worker", "worker"]
    for node in up.about["nodes"]:
        os.kill(node["pid"], 0)
        assert len(bytes.fromhex(node["id"])) == 32


def test_second_up_in_the_same_home_refuses_and_changes_nothing(up: LocalUp) -> None:
    again = up.mesh("up", "--detach", "--json")
    assert again.returncode == 1
    assert "mesh down" in again.stderr
    assert [model.id for model in up.client().models.list()] == [MODEL]


def test_models_are_listed_and_found_by_name(up: LocalUp) -> None:
    assert [model.id for model in up.client().models.list()] == [MODEL]
    assert up.client().models.retrieve(MODEL).object == "model"
    with pytest.raises(openai.NotFoundError):
        up.client().models.retrieve("nothing")


def test_chat_answers_with_usage(up: LocalUp) -> None:
    answer = chat(up.client())
    assert answer.choices[0].message.content
    assert answer.usage.prompt_tokens > 0
    assert answer.usage.completion_tokens <= 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streamed_chat_equals_the_whole_answer(up: LocalUp) -> None:
    whole = chat(up.client(), "Count to five.", temperature=0, seed=1, max_tokens=24)
    pieces = list(chat(up.client(), "Count to five.", temperature=0, seed=1, max_tokens=24, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == whole.choices[0].message.content
    assert pieces[-1].choices[0].finish_reason in ("stop", "length")
    assert all(piece.usage is None for piece in pieces), "usage is for those who ask"


def test_streamed_usage_is_given_to_those_who_ask_and_is_the_same_as_unstreamed(up: LocalUp) -> None:
    whole = chat(up.client(), "Name a colour.", temperature=0, seed=1)
    pieces = list(chat(up.client(), "Name a colour.", temperature=0, seed=1, stream=True, stream_options={"include_usage": True}))
    assert pieces[-1].choices == []
    assert pieces[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_text_completions_answer_and_stream(up: LocalUp) -> None:
    client = up.client()
    whole = client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=8, temperature=0, seed=1)
    pieces = list(client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=8, temperature=0, seed=1, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == whole.choices[0].text


def test_embeddings_come_as_vectors_where_the_model_can(up: LocalUp) -> None:
    answer = up.client().embeddings.create(model=MODEL, input=["one", "two"])
    assert len(answer.data) == 2
    assert len(answer.data[0].embedding) > 100
    assert answer.data[0].embedding != answer.data[1].embedding


def test_responses_answer_and_stream(up: LocalUp) -> None:
    whole = up.client().responses.create(model=MODEL, input="Say hello.", max_output_tokens=16)
    assert whole.output_text
    kinds = [event.type for event in up.client().responses.create(model=MODEL, input="Say hello.", max_output_tokens=16, stream=True)]
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")


@pytest.mark.parametrize(
    "mangle",
    [
        lambda key: "",
        lambda key: "sk-something-else",
        lambda key: key[:-1],
        lambda key: key[:-7] + ("A" if key[-7] != "A" else "B") + key[-6:],
        lambda key: key[:40],
    ],
    ids=["none", "foreign", "cut", "mistyped", "truncated"],
)
def test_bad_keys_get_401_in_openais_shape(up: LocalUp, mangle: Any) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        up.client(mangle(up.key) or "-").models.list()
    assert_error(caught.value, 401, "invalid_api_key")
    assert up.key[8:] not in caught.value.message


def test_expired_key_is_refused(up: LocalUp) -> None:
    now = time.time()
    with pytest.raises(openai.AuthenticationError) as caught:
        chat(up.client(up.mint(not_before=now - 10, expires=now - 1)))
    assert_error(caught.value, 401, "invalid_api_key")
    assert "expired" in caught.value.message


def test_key_without_the_model_gets_403_and_sees_no_model(up: LocalUp) -> None:
    client = up.client(up.mint(models=frozenset(["another"])))
    assert list(client.models.list()) == []
    with pytest.raises(openai.PermissionDeniedError) as caught:
        chat(client)
    assert_error(caught.value, 403, "key_not_allowed")


def test_key_without_the_invoker_role_may_look_but_not_call(up: LocalUp) -> None:
    client = up.client(up.mint(roles=frozenset(["viewer"])))
    assert [model.id for model in client.models.list()] == [MODEL]
    with pytest.raises(openai.PermissionDeniedError):
        chat(client)


def test_unknown_model_gets_404(up: LocalUp) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        chat(up.client(), model="gpt-nonsense")
    assert_error(caught.value, 404, "model_not_found")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{not json", None),
        (b"[]", None),
        (b'{"model": 7, "messages": []}', "model"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "model"),
        (b'{"model": "%b", "messages": []}' % MODEL.encode(), "messages"),
        (b'{"model": "%b", "messages": "hello"}' % MODEL.encode(), "messages"),
        (b'{"model": "%b", "messages": [{"role": "user", "content": "x"}], "stream": "yes"}' % MODEL.encode(), "stream"),
        (b"\xff\xfe", None),
    ],
)
def test_bad_bodies_get_400_naming_the_parameter(up: LocalUp, body: bytes, param: str | None) -> None:
    status, _, answer = raw_post(up, "/chat/completions", body)
    assert status == 400
    error = json.loads(answer)["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


def test_every_answer_has_a_request_id(up: LocalUp) -> None:
    for path, body in (("/chat/completions", b"{}"), ("/nowhere", b"{}"), ("/embeddings", b"x")):
        _, headers, _ = raw_post(up, path, body)
        assert headers["x-request-id"].startswith("req_")


def test_stream_ends_with_done_over_a_raw_socket(up: LocalUp) -> None:
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "stream": True}).encode()
    _, headers, answer = raw_post(up, "/chat/completions", body)
    assert headers["content-type"].startswith("text/event-stream")
    assert answer.rstrip().endswith(b"data: [DONE]")


def test_pipelined_requests_are_answered_in_order(up: LocalUp) -> None:
    where = urlsplit(up.base_url)
    request = f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {up.key}\r\n\r\n"
    refused = "GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with socket.create_connection((where.hostname, where.port), timeout=20) as connection:
        connection.sendall((request + request + refused).encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.count(b"HTTP/1.1 200 OK") == 2
    assert answer.count(b"HTTP/1.1 401") == 1
    assert answer.index(b"HTTP/1.1 401") > answer.rindex(b"HTTP/1.1 200 OK")


def test_health_readiness_and_metrics(up: LocalUp) -> None:
    root = up.base_url.removesuffix("/v1")
    for path in ("/health", "/readyz"):
        with urllib.request.urlopen(root + path, timeout=20) as response:
            assert response.status == 200
    chat(up.client())
    with urllib.request.urlopen(root + "/metrics", timeout=20) as response:
        text = response.read().decode()
    assert f'infermesh_requests_total{{code="ok",model="{MODEL}",task="chat"}}' in text
    assert 'infermesh_workers{state="ready"} 2.0' in text


def test_chat_command_streams_and_takes_its_key_from_flag_environment_or_home(up: LocalUp, tmp_path: Path) -> None:
    streamed = up.mesh("chat", "--stream", "--max-tokens", "8", "Say hello.")
    assert streamed.returncode == 0, streamed.stderr
    assert streamed.stdout.strip()
    bad = up.mesh("chat", "--max-tokens", "8", "Say hello.", MESH_API_KEY="im_nothing")
    assert bad.returncode == 1, "the environment wins over what was stored"
    assert "key" in bad.stderr.lower()
    flagged = up.mesh("chat", "--max-tokens", "8", "--api-key", up.key, "Say hello.", MESH_API_KEY="im_nothing")
    assert flagged.returncode == 0, "the flag wins over the environment"
    elsewhere = mesh_command("init", "--url", up.base_url, "--api-key", up.key, home=tmp_path)
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert mesh_command("chat", "--max-tokens", "8", "Say hello.", home=tmp_path).returncode == 0


def test_looking_commands_speak_json(up: LocalUp) -> None:
    workers = json.loads(up.mesh("workers", "--json").stdout)
    workers = workers["workers"] if isinstance(workers, dict) else workers
    assert [entry["state"] for entry in workers] == ["ready", "ready"]
    assert all(entry["linked"] for entry in workers)
    status = json.loads(up.mesh("status", "--json").stdout)
    assert status["proxy"]["models"] == [MODEL]
    assert MODEL in up.mesh("models").stdout


@pytest.mark.timeout(600)  # on a starved machine its engines take minutes
def test_kill_of_a_worker_under_load_on_the_real_engine(up: LocalUp) -> None:
    """Last in this file: it leaves the mesh with one worker."""
    victim = next(node for node in up.about["nodes"] if node["role"] == "worker")
    outcomes: list[tuple[bool, str]] = []
    begun = threading.Barrier(13, timeout=120)

    def ask(n: int) -> None:
        stream = n % 2 == 0
        text, result, first = "", "incomplete", True
        try:
            if not stream:
                begun.wait()
                result = "done" if chat(up.client(), f"Tell me about {n}.", max_tokens=40).choices else "empty"
            else:
                for piece in chat(up.client(), f"Write a long story about {n}.", max_tokens=120, stream=True):
                    if first:
                        first = False
                        begun.wait()
                    if piece.choices:
                        text += piece.choices[0].delta.content or ""
                        result = "done" if piece.choices[0].finish_reason else result
        except openai.APIError as error:
            result = "error" if stream and text is not None else f"failed: {error}"
        outcomes.append((stream, result))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    begun.wait()
    os.kill(victim["pid"], signal.SIGKILL)
    for thread in threads:
        thread.join(150)
    assert len(outcomes) == 12
    assert [result for stream, result in outcomes if not stream] == ["done"] * 6
    results = [result for stream, result in outcomes if stream]
    assert results == ["done"] * 6, "streams go on at the other worker"
    assert json.loads(up.mesh("status", "--json").stdout)["proxy"]["streams"]["moved"] > 0, "the killed worker had begun streams"


def raw_post(up: LocalUp, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
    """One request over a plain socket; returns status, headers (lower case) and the body with chunked framing removed."""
    where = urlsplit(up.base_url)
    head = f"POST /v1{path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {up.key}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((where.hostname, where.port), timeout=60) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    top, _, rest = answer.partition(b"\r\n\r\n")
    lines = top.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    if headers.get("transfer-encoding") == "chunked":
        pieces, complete = [], False
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            if int(size, 16) == 0:
                complete = True
                break
            pieces.append(rest[: int(size, 16)])
            rest = rest[int(size, 16) + 2 :]
        assert complete, "the stream ended cleanly"
        rest = b"".join(pieces)
    return int(lines[0].split()[1]), headers, rest


def assert_error(error: openai.APIStatusError, status: int, code: str) -> None:
    """OpenAI's error shape, all of it."""
    assert error.status_code == status
    body = error.response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == code
    assert error.response.headers["x-request-id"]
