"""CPU time of some nodes of a simulation, told from that of all the others in the same thread.

Whatever a node does runs in its own tasks, timers and callbacks, and they inherit a context; datagrams enter the receiver's context
when they arrive. So every callback of the loop can be billed to whom it belongs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import Any

from tests.support.network import Address, Host, Network
from tests.support.virtual_time import VirtualLoop

_MINE: ContextVar[bool] = ContextVar("mine", default=False)


class Meter:
    """``cpu_s`` grows with what the metered hosts do; ``datagrams`` counts what reaches them."""

    def __init__(self, loop: VirtualLoop, network: Network) -> None:
        self.cpu_s = 0.0
        self.datagrams = 0
        self._hosts: dict[str, None] = {}
        self._others = copy_context()
        self._mine = copy_context()
        self._mine.run(_MINE.set, True)
        self._hook(loop, network)

    def spawn(self, address: str, work: Callable[[], Coroutine[Any, Any, Any]]) -> asyncio.Task[Any]:
        """Run a coroutine as the host at ``address``, which is metered from now on."""
        self._hosts[address] = None
        return asyncio.get_running_loop().create_task(work(), context=self._mine.copy())

    def run(self, call: Callable[[], Any]) -> Any:
        """Call something as a metered host; what it starts is metered."""
        return self._mine.copy().run(call)

    def _timed(self, callback: Callable[..., Any], *args: Any) -> None:
        began = time.thread_time()
        callback(*args)
        self.cpu_s += time.thread_time() - began

    def _hook(self, loop: VirtualLoop, network: Network) -> None:
        soon, at, carry, deliver = loop.call_soon, loop.call_at, network._carry, network._deliver

        def is_mine(context: Context | None) -> bool:
            return _MINE.get() if context is None else context.get(_MINE, False)

        def call_soon(callback: Callable[..., Any], *args: Any, context: Context | None = None) -> asyncio.Handle:
            if is_mine(context):
                return soon(self._timed, callback, *args, context=context)
            return soon(callback, *args, context=context)

        def call_at(when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> asyncio.TimerHandle:
            if is_mine(context):
                return at(when, self._timed, callback, *args, context=context)
            return at(when, callback, *args, context=context)

        def carry_outside(sender: Host, receiver: Host, source: Address, target: Address, data: bytes) -> None:
            self._others.copy().run(carry, sender, receiver, source, target, data)

        def deliver_inside(receiver: Host, source: Address, target: Address, data: bytes) -> None:
            if target[0] in self._hosts:
                self.datagrams += 1
                self._mine.copy().run(self._timed, deliver, receiver, source, target, data)
            else:
                deliver(receiver, source, target, data)

        loop.call_soon, loop.call_at = call_soon, call_at  # type: ignore[method-assign,assignment]
        network._carry, network._deliver = carry_outside, deliver_inside  # type: ignore[method-assign]
