"""Streams that outlive their worker, on real vLLM in float32, where greedy decoding is exact.

Needs `eval "$(scripts/real-vllm --export)"`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.local_up import LocalUp
from tests.support.processes import descendants
from tests.support.vllm import MARKS, NAME, moved, vllm_mesh

TOKENS = 48

pytestmark = MARKS
ASKED: tuple[dict[str, Any], ...] = (
    {"text": "Say hi.", "max_tokens": 256, "extra_body": {"ignore_eos": True}, "begun_after": 60},
    {"text": "Tell me a story about a lighthouse.", "max_tokens": 256, "extra_body": {"ignore_eos": True}},
    {"text": "Say something nice in emojis, many of them."},
    {"text": "Write a haiku, and then one in Japanese."},
    {"text": "Count from one to a hundred.", "stop": ["twelve", "thirteen fourteen"]},
    {"text": "List the planets.", "max_tokens": 12},
    {"text": "Say hello.", "max_tokens": 160, "stop": "never to be said", "extra_body": {"ignore_eos": True}},
    {"text": "Count from one to a hundred.", "stop": "twelve, thirteen", "extra_body": {"include_stop_str_in_output": True}},
    {"text": "What is the capital of France? One word."},
    {"text": "Once upon a time", "completion": True},
    {"text": "def fibonacci(n):", "completion": True, "stop": "\n\n"},
)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalUp]:
    with vllm_mesh(tmp_path_factory.mktemp("home"), dtype="float32") as started:
        yield started


class Client:
    """One stream, read in a thread of its own."""

    def __init__(self, up: LocalUp, asked: dict[str, Any]) -> None:
        self._up = up
        self._asked = dict(asked)
        self.text = self.finish = self.error = ""
        self.usage: tuple[int, int] = (0, 0)
        self.ids: set[str] = set()
        self.worker = ""
        """The first letters of the id of the node that the stream began on."""
        self.begun = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    @property
    def answer(self) -> tuple[str, str, tuple[int, int], str]:
        return self.text, self.finish, self.usage, self.error

    def _run(self) -> None:
        asked = {"temperature": 0, "max_tokens": TOKENS, "stream": True, "stream_options": {"include_usage": True}, **self._asked}
        text, begun_after, client = asked.pop("text"), asked.pop("begun_after", 3), self._up.client()
        try:
            if asked.pop("completion", False):
                stream = client.completions.create(model=NAME, prompt=text, **asked)
            else:
                stream = client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": text}], **asked)
            self.worker = stream.response.headers["x-mesh-worker"]
            for number, piece in enumerate(stream):
                self.ids.add(piece.id)
                for choice in piece.choices:
                    self.text += (choice.text if hasattr(choice, "text") else choice.delta.content) or ""
                    self.finish = choice.finish_reason or self.finish
                if piece.usage is not None:
                    self.usage = piece.usage.prompt_tokens, piece.usage.completion_tokens
                if number > begun_after:
                    self.begun.set()
        except Exception as error:
            self.error = repr(error)
        finally:
            self.begun.set()


def ask_all(up: LocalUp) -> list[Client]:
    return [Client(up, asked) for asked in ASKED]


def answers(clients: list[Client]) -> list[tuple[str, str, tuple[int, int], str]]:
    for client in clients:
        client.thread.join(300)
    assert all(len(client.ids) == 1 for client in clients)
    return [client.answer for client in clients]


def test_death_of_a_worker_changes_no_token(up: LocalUp) -> None:
    """It leaves the mesh with one worker: not the one whose answer has come to its end and goes on after it, which is asked to."""
    undisturbed = answers(ask_all(up))
    assert [error for *_, error in undisturbed] == [""] * len(ASKED)
    pids = {node["id"]: node["pid"] for node in up.about["nodes"] if node["role"] == "worker"}

    clients = ask_all(up)
    assert clients[0].begun.wait(120), "and with it most of the others"
    victim = next(pid for node, pid in pids.items() if node.startswith(clients[0].worker))
    engine = descendants(victim)
    os.kill(victim, signal.SIGKILL)
    for pid in engine:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert answers(clients) == undisturbed
    counts = moved(up)
    assert counts["moved"] > 0
    assert counts["stuck"] == 0
