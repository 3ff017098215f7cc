"""From what a client sent and what went back to the record that is kept. Pure.

A stream is put together again first: what is redacted is the text that was said, not the pieces that it came in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec

from proxy.prompts.redact import names_secret, redact

MAX_BODY_BYTES = 1 << 20
"""A longer body is not kept; it is counted."""
MAX_ANSWER_BYTES = 4 << 20
"""As it came, events and all."""
MAX_PROMPT_TEXT = 32 * 1024
MAX_ANSWER_TEXT = 16 * 1024
"""Bytes of what is kept: of a longer prompt its end, of a longer answer its beginning. Twice both fit `mesh.prompts.MAX_SEALED_BYTES`."""
MANY = 16
"""A longer list of numbers is tokens, or an embedding: how many there are is kept."""
MAX_DEPTH = 64
MAX_PARTS = 64
MAX_NAME_CHARS = 64


def make_record(
    body: bytes | bytearray | None, size: int, answer: bytes | bytearray | None, *, stream: bool, full: bool, about: dict[str, Any]
) -> bytes:
    """JSON: ``about``, then ``prompt`` and ``answer``. ``body`` None: it had ``size`` bytes, too many; ``answer`` None likewise."""
    prompt = f"[{size} bytes, too long to be kept]" if body is None else _read(body, full)
    said: Any = "[too long to be kept]"
    if answer is not None:
        said = _tidy(_spoken(answer), full) if stream else _read(answer, full)
    record = about | {"prompt": _end_of(prompt), "answer": _beginning_of(said)}
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "replace")


def _read(text: bytes | bytearray, full: bool) -> Any:
    try:
        return _tidy(msgspec.json.decode(text), full) if text else ""
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return "[not JSON that can be read]"


def _tidy(value: Any, full: bool, depth: int = 0) -> Any:
    """Without what is no text, and redacted unless ``full``."""
    if depth > MAX_DEPTH:
        return "[nested too deeply]"
    if isinstance(value, str):
        if value.startswith("data:"):
            return f"[data of {len(value)} characters]"
        return value if full else redact(value)
    if isinstance(value, dict):
        return {name if full else redact(name): _tidy_named(name, item, full, depth + 1) for name, item in value.items()}
    if isinstance(value, list):
        if len(value) > MANY and all(isinstance(item, int | float) for item in value):
            return f"[{len(value)} numbers]"
        return [_tidy(item, full, depth + 1) for item in value]
    if not full and type(value) is int and redact(text := str(value)) != text:
        return redact(text)
    return value


def _tidy_named(name: str, value: Any, full: bool, depth: int) -> Any:
    return "[key]" if not full and isinstance(value, str) and names_secret(name) else _tidy(value, full, depth)


def _spoken(answer: bytes | bytearray) -> dict[str, str]:
    """What a stream's events say, by where in an event it stands: ``choices.0.delta.content``. An event cut off at the end is left out."""
    parts: dict[str, list[str]] = {}
    for line in answer.split(b"\n"):
        if not line.startswith(b"data:"):
            continue
        try:
            decoded = msgspec.json.decode(line[5:].strip())
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
        if isinstance(decoded, dict):
            for name, text in _texts(decoded):
                if name in parts or len(parts) < MAX_PARTS:
                    parts.setdefault(name, []).append(text)
    return {name: "".join(pieces) for name, pieces in parts.items()}


def _texts(event: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The new text of one event of chat, completions or responses."""
    if isinstance(event.get("delta"), str):
        yield f"{str(event.get('type'))[:MAX_NAME_CHARS]}.{event.get('output_index', 0)!s:.8}", event["delta"]
    choices = event.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict):
            said = {name: choice.get(name) for name in ("text", "delta", "finish_reason")}
            yield from _strings(said, f"choices.{choice.get('index', 0)!s:.8}", 0)


def _strings(value: Any, name: str, depth: int) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict) and depth < 8:
        for key, item in value.items():
            if key not in ("index", "type", "id"):
                yield from _strings(item, f"{name}.{key[:MAX_NAME_CHARS]}", depth + 1)
    elif isinstance(value, list) and depth < 8:
        for at, item in enumerate(value):
            index = item.get("index", at) if isinstance(item, dict) else at
            yield from _strings(item, f"{name}.{index!s:.8}", depth + 1)


def _end_of(prompt: Any) -> Any:
    text = json.dumps(prompt, ensure_ascii=False).encode("utf-8", "replace")
    return prompt if len(text) <= MAX_PROMPT_TEXT else "[…]" + text[-MAX_PROMPT_TEXT:].decode(errors="ignore")


def _beginning_of(answer: Any) -> Any:
    text = json.dumps(answer, ensure_ascii=False).encode("utf-8", "replace")
    return answer if len(text) <= MAX_ANSWER_TEXT else text[:MAX_ANSWER_TEXT].decode(errors="ignore") + "[…]"
