"""What is kept of prompts: without secrets, sealed, for its time, within its room."""

from __future__ import annotations

import json
import random
import stat
import string
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.errors import BadSignature, ProtocolError
from mesh.prompts import (
    MAX_SEALED_BYTES,
    PAGE_BYTES,
    Kept,
    PromptQuery,
    encode_page,
    encode_query,
    open_record,
    parse_page,
    parse_query,
    seal_record,
)
from proxy.prompts.record import MAX_ANSWER_TEXT, MAX_PROMPT_TEXT, make_record
from proxy.prompts.redact import WINDOW, redact
from proxy.prompts.store import PromptStore, Record

KEY = X25519PrivateKey.generate()
PUBLIC = KEY.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
WHERE = {"project": "search", "endpoint": "chat", "request_id": "req_1"}
SECRETS = {
    "alice@example.org": "[email]",
    "jörg.müller+x@mail.example.co.uk": "[email]",
    "+49 30 901820": "[phone]",
    "0171-555 23 41 99": "[phone]",
    "(555) 123-4567": "[phone]",
    "0044 20 7946 0018": "[phone]",
    "4111 1111 1111 1111": "[card]",
    "5500-0000-0000-0004": "[card]",
    "378282246310005": "[card]",
    "sk-proj-abcdefGHIJKL0123456789": "[key]",
    "im_1Abcdefghijklmnopqrstuvwxyz0": "[key]",
    "ghp_16C7e42F292c6912E7710c838347Ae178B4a": "[key]",
    "AKIAIOSFODNN7EXAMPLE": "[key]",
    "AIzaSyA1234567890abcdefghijklmnopqrstuv": "[key]",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P": "[key]",
    "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08": "[key]",
    "Bearer abcdefghijklmnop": "Bearer [key]",
    "password: hunter2": "password: [key]",
    "API_KEY='abc$%&'": "API_KEY='[key]'",
    '"client_secret": "x y"': '"client_secret": "x y"',
}
PLAIN = (
    "Tell me of the year 1989, at 10:30 on 2026-11-21, in 14 words; pi is 3.14159265358979.",
    "The implementation of an imperative skill-based token bucket; see https://example.org/a/path/that/is/rather/long/indeed",
    "1 2 3 4 5 6, room 1204, 99.95 EUR, version 1.2.3, a ratio of 16:9",
    "def f(x): return x @ y",
)


@pytest.mark.parametrize(("secret", "put"), list(SECRETS.items()))
def test_what_leads_to_somebody_or_opens_something_is_taken_out(secret: str, put: str) -> None:
    assert redact(secret) == put
    assert redact(f"It is {secret}, I think.").startswith(f"It is {put}")


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_harmless_stays(text: str) -> None:
    assert redact(text) == text


def test_a_private_key_goes_whole_also_one_without_an_end() -> None:
    pem = "-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc=\n-----END RSA PRIVATE KEY-----"
    assert redact(f"a {pem} b {pem} c") == "a [key] b [key] c"
    assert redact("a " + pem[:40]) == "a [key]"


@given(st.integers(0, 12 * WINDOW), st.integers(0, 2**32), st.sampled_from([secret for secret, put in SECRETS.items() if put != secret]))
@settings(deadline=None, max_examples=40)
def test_a_secret_is_found_wherever_it_stands_in_a_long_text(at: int, seed: int, secret: str) -> None:
    rng = random.Random(seed)
    words = iter(lambda: "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 9))), None)
    text = " ".join(word for word, _ in zip(words, range(12 * WINDOW // 5), strict=False))
    at = text.find(" ", min(at, len(text) - 20))
    found = redact(f"{text[:at]} {secret} {text[at:]}")
    assert secret.split()[-1] not in found
    assert len(found) < len(text) + 40


@pytest.mark.parametrize("secret", [secret for secret, put in SECRETS.items() if put != secret])
def test_a_secret_is_found_across_the_edge_of_a_window(secret: str) -> None:
    for before in range(WINDOW - len(secret) - 20, WINDOW + 2):
        words = ("word and " * before)[: before - 1] + " "
        found = redact(f"{words}{secret} and more{' and more' * 10}")
        assert found.count(SECRETS[secret].split()[-1]) == 1
        assert secret.split()[-1] not in found


@pytest.mark.parametrize(
    "piece", ["a@", "1 ", "1-", "-----BEGIN ", "(", "eyJ", "a.", "sk-", "0", "+1", "/a1", "password=", "@a.", "x" * 31 + " "]
)
def test_no_text_takes_long(piece: str) -> None:
    text = piece * (200_000 // len(piece))
    assert len(redact(text)) < 2 * len(text)  # that it comes back is the point: what takes quadratic time here takes hours


@given(st.text(max_size=300))
def test_any_text_can_be_redacted_and_then_stays(text: str) -> None:
    once = redact(text)
    assert redact(once) == once


def record(body: Any, answer: bytes = b"", *, stream: bool = False, full: bool = False) -> dict[str, Any]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    made: dict[str, Any] = json.loads(make_record(raw, len(raw), answer, stream=stream, full=full, about={"request": "req_1"}))
    return made


def test_a_record_holds_what_was_said_without_secrets() -> None:
    body = {
        "model": "chat",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "I am bob@example.org"}, {"image_url": "data:image/png;base64,AAAA"}]}
        ],
        "metadata": {"password": "hunter2", "bob@example.org": 4111111111111111},
        "tokens": list(range(40)),
    }
    kept = record(body, b'{"choices": [{"message": {"content": "Hello bob@example.org"}}]}')
    assert kept["request"] == "req_1"
    assert kept["prompt"]["messages"][0]["content"][0]["text"] == "I am [email]"
    assert kept["prompt"]["messages"][0]["content"][1]["image_url"] == "[data of 26 characters]"
    assert kept["prompt"]["metadata"] == {"password": "[key]", "[email]": "[card]"}
    assert kept["prompt"]["tokens"] == "[40 numbers]"
    assert kept["answer"]["choices"][0]["message"]["content"] == "Hello [email]"
    full = record(body, b'{"choices": []}', full=True)
    assert full["prompt"]["metadata"] == body["metadata"]


def test_a_stream_is_put_together_before_it_is_redacted() -> None:
    deltas = [{"role": "assistant", "content": ""}, {"content": "bo"}, {"content": "b@exam"}, {"content": "ple.org!"}]
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks += [
        {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}}]}
        for piece in ("sk-abcdef", "0123456789")
    ]
    events = b"".join(b"data: %b\n\n" % json.dumps(chunk).encode() for chunk in chunks) + b"data: [DONE]\n\n" + b'data: {"choices": [{"ind'
    kept = record({}, events, stream=True)["answer"]
    assert kept["choices.0.delta.content"] == "[email]!"
    assert kept["choices.0.delta.tool_calls.0.function.arguments"] == "[key]"
    responses = [{"type": "response.output_text.delta", "output_index": 0, "delta": piece} for piece in ("al", "ice@ex", "ample.org")]
    events = b"".join(b"event: x\ndata: %b\n\n" % json.dumps(event).encode() for event in responses)
    assert record({}, events, stream=True)["answer"] == {"response.output_text.delta.0": "[email]"}


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000, b'{"a":' * 50_000, b'"\\ud800"', b"1e999"])
def test_nothing_that_is_sent_or_said_cannot_be_recorded(body: bytes) -> None:
    for stream in (False, True):
        assert set(record(body, b"data: " + body + b"\n\n" if stream else body, stream=stream)) == {"request", "prompt", "answer"}


@pytest.mark.parametrize("char", ['"', "\\", "x ", "é", "\x00", "\u2028"])
def test_a_record_fits_however_long_its_text(char: str) -> None:
    body = {"messages": [{"role": "user", "content": char * 100_000 + " the end"}]}
    answer = json.dumps({"choices": [{"message": {"content": "the beginning " + char * 100_000}}]}).encode()
    made = make_record(json.dumps(body).encode(), 0, answer, stream=False, full=True, about={"request": "r" * 64, "model": "m" * 256})
    assert len(seal_record(made, PUBLIC, **WHERE)) <= MAX_SEALED_BYTES
    kept = json.loads(made)
    assert "the end" in kept["prompt"][-40:]
    assert "the beginning" in kept["answer"][:80]
    assert len(kept["prompt"].encode()) <= MAX_PROMPT_TEXT + 8
    assert len(kept["answer"].encode()) <= MAX_ANSWER_TEXT + 8


def test_what_is_too_long_is_counted_and_not_kept() -> None:
    kept = json.loads(make_record(None, 5_000_000, None, stream=False, full=False, about={}))
    assert kept == {"prompt": "[5000000 bytes, too long to be kept]", "answer": "[too long to be kept]"}


def test_a_record_opens_with_its_key_and_as_what_it_is() -> None:
    sealed = seal_record(b"a prompt", PUBLIC, **WHERE)
    assert b"prompt" not in sealed
    assert open_record(sealed, KEY, **WHERE) == b"a prompt"
    with pytest.raises(BadSignature):
        open_record(sealed, X25519PrivateKey.generate(), **WHERE)
    for field in WHERE:
        with pytest.raises(BadSignature):
            open_record(sealed, KEY, **(WHERE | {field: "other"}))
    for at in range(0, len(sealed), 7):
        with pytest.raises(BadSignature):
            open_record(sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :], KEY, **WHERE)
    for low_order in (bytes(32), (1).to_bytes(32, "little")):
        with pytest.raises(ValueError, match=r"."):
            seal_record(b"a prompt", low_order, **WHERE)


def test_questions_and_pages_read_as_they_were_written() -> None:
    query = PromptQuery(project="search", endpoint="chat", since=5, until=9, after=3)
    assert parse_query(encode_query(query)) == query
    kept = (Kept(id="req_1", at=7, sealed=b"x" * 1000), Kept(id="req_2", at=8, sealed=b""))
    page = parse_page(encode_page(kept), {"more": True, "last": 4})
    assert (page.kept, page.more, page.last) == (kept, True, 4)
    with pytest.raises(ProtocolError):
        parse_query({"only": "search"})


@given(st.binary(max_size=200))
def test_no_page_raises_anything_but_a_protocol_error(data: bytes) -> None:
    for trailer in ({"more": False, "last": 0}, {}, {"more": 1}):
        try:
            parse_page(data, trailer)
        except ProtocolError:
            continue


def store(folder: Path, **room: int) -> PromptStore:
    return PromptStore(folder / "prompts.db", **room)


def put(kept: PromptStore, number: int, *, size: int = 100, ends: int = 1_000_000, endpoint: str = "chat") -> None:
    kept.add([Record("search", endpoint, Kept(id=f"req_{number}", at=number, sealed=number.to_bytes(4) * (size // 4)), ends)])


def ids(kept: PromptStore, now: int = 0, **asked: Any) -> list[str]:
    """Of all pages."""
    found: list[str] = []
    after = 0
    while True:
        page = kept.page(PromptQuery(**({"project": "search", "endpoint": "chat", "after": after} | asked)), now)
        assert sum(len(record.sealed) for record in page.kept) <= PAGE_BYTES
        found += [record.id for record in page.kept]
        if not page.more:
            return found
        after = page.last


def test_what_is_kept_is_there_until_its_end_and_then_nowhere(tmp_path: Path) -> None:
    kept = store(tmp_path)
    put(kept, 1, ends=100)
    put(kept, 2, ends=200)
    put(kept, 3, endpoint="other")
    assert ids(kept, now=99) == ["req_1", "req_2"]
    assert ids(kept, now=100) == ["req_2"], "also where it has not been swept away yet"
    assert ids(kept, project="ads") == []
    assert ids(kept, since=2) == ["req_2"]
    assert ids(kept, until=2) == ["req_1"]
    assert kept.sweep(100) == 1
    assert ids(kept) == ["req_2"]
    kept.close()
    assert stat.S_IMODE((tmp_path / "prompts.db").stat().st_mode) == 0o600
    on_disk = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert (2).to_bytes(4) * 25 in on_disk
    assert (1).to_bytes(4) * 25 not in on_disk, "what is over is overwritten"
    again = store(tmp_path)
    assert ids(again) == ["req_2"]
    again.close()


def test_pages_hold_all_between_them(tmp_path: Path) -> None:
    kept = store(tmp_path)
    for number in range(30):
        put(kept, number, size=MAX_SEALED_BYTES if number % 7 == 0 else 20_000)
    assert ids(kept) == [f"req_{number}" for number in range(30)]
    kept.close()


def test_the_oldest_make_room(tmp_path: Path) -> None:
    kept = store(tmp_path, room_bytes=100_000)
    for number in range(200):
        put(kept, number, size=1_000)
    left = ids(kept)
    assert left[-1] == "req_199"
    assert 30 <= len(left) <= 100
    assert left == [f"req_{number}" for number in range(200 - len(left), 200)]
    kept.close()
