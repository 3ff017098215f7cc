"""An answer that is kept as it passes."""

from __future__ import annotations

import asyncio

from aiohttp import web

from proxy.downstream import Downstream
from proxy.openai import Call
from proxy.prompts.record import MAX_ANSWER_BYTES


class Watched(Downstream):
    """A client's answer of which a copy is kept, up to `MAX_ANSWER_BYTES`; ``whole`` says whether that is all of it."""

    __slots__ = ("answer", "call", "whole")

    def __init__(self, request: web.BaseRequest, transport: asyncio.Transport, *, keep_alive: bool, call: Call) -> None:
        super().__init__(request, transport, keep_alive=keep_alive)
        self.call = call
        self.answer = bytearray()
        self.whole = True

    def write(self, data: bytes) -> None:
        super().write(data)
        if self.whole and len(self.answer) + len(data) <= MAX_ANSWER_BYTES:
            self.answer += data
        else:
            self.whole = False

    def forget_head(self) -> None:
        super().forget_head()
        self.answer.clear()
        self.whole = True
