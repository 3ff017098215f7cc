"""A strict reader of HTTP/1.1 answers: says whether one is complete, and refuses whatever a client could misread."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) [A-Za-z ]+")
_HEADER = re.compile(rb"([A-Za-z0-9-]+): ?([\x20-\x7e]*)")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer. ``complete``: it ended as its framing promised; ``rest`` is what follows it."""

    status: int
    headers: dict[str, str]
    body: bytes
    complete: bool
    rest: bytes = b""

    def json(self) -> Any:
        assert self.headers["content-type"].startswith("application/json")
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The data of each server-sent event; JSON parsed, [DONE] as it is."""
        found = []
        for event in self.body.replace(b"\r\n", b"\n").split(b"\n\n"):
            data = b"\n".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
            if data:
                found.append("[DONE]" if data == b"[DONE]" else json.loads(data))
        return found


def read_answer(data: bytes, *, ended: bool = False) -> Answer | None:
    """The first answer in ``data``; None while not even its head is there. ``ended``: the connection was closed after this."""
    head, separator, body = data.partition(b"\r\n\r\n")
    if not separator:
        return None
    first, *lines = head.split(b"\r\n")
    status = _STATUS.fullmatch(first)
    assert status, first
    headers: dict[str, str] = {}
    for line in lines:
        match = _HEADER.fullmatch(line)
        assert match, line
        name = match[1].decode().lower()
        assert name not in headers, f"{name} twice"
        headers[name] = match[2].decode()
    code = int(status[1])
    if headers.get("transfer-encoding") == "chunked":
        assert "content-length" not in headers
        content, complete, rest = _chunks(body)
    elif "content-length" in headers:
        length = int(headers["content-length"])
        content, complete, rest = body[:length], len(body) >= length, body[length:]
    elif code < 200:
        content, complete, rest = b"", True, body
    else:
        assert headers.get("connection") == "close", "an answer without length whose connection stays open"
        content, complete, rest = body, ended, b""
    return Answer(status=code, headers=headers, body=content, complete=complete, rest=rest)


def _chunks(data: bytes) -> tuple[bytes, bool, bytes]:
    content = bytearray()
    while True:
        line, separator, after = data.partition(b"\r\n")
        if not separator:
            return bytes(content), False, b""
        size = int(line, 16)
        if len(after) < size + 2:
            return bytes(content + after[:size]), False, b""
        assert after[size : size + 2] == b"\r\n"
        if size == 0:
            return bytes(content), True, after[2:]
        content += after[:size]
        data = after[size + 2 :]


def assert_openai_error(answer: Answer, status: int, code: str, *, kind: str | None = None, param: str | None = None) -> str:
    """Every error has this shape and these headers, whatever went wrong. Returns its message."""
    assert answer.complete
    assert answer.status == status, answer
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.headers["x-request-id"].startswith("req_")
    body = answer.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert isinstance(error["message"], str)
    assert error["message"]
    assert kind is None or error["type"] == kind
    assert error["param"] == param
    if status in (429, 503):
        assert int(answer.headers["retry-after"]) >= 1
        assert int(answer.headers["retry-after-ms"]) >= 1
    if status == 401:
        assert answer.headers["www-authenticate"] == "Bearer"
    message: str = error["message"]
    return message
