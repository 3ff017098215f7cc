"""Receipts and ledgers for tests."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from mesh.clock import Clock, SystemClock
from mesh.identity import Identity
from mesh.ledger import LEDGER_FILE, Ledger, signer
from mesh.receipts import Receipt
from mesh.trust import Role

AT = 1_800_000_000_000
"""A moment, in ms."""


def make_receipt(number: int = 1, **fields: Any) -> Receipt:
    """A worker's receipt of a completed request of its own."""
    base: dict[str, Any] = {
        "id": f"req_{number:024x}",
        "attempt": 1,
        "at": AT + number,
        "side": Role.WORKER,
        "peer": b"p" * 32,
        "project": "search",
        "key": b"12345678",
        "model": "m",
        "digest": "sha256:" + "ab" * 32,
        "task": "chat",
        "prompt": 100,
        "cached": 40,
        "completion": 20,
        "events": 21,
        "size_bytes": 4000,
        "queue_ms": 3,
        "engine_ms": 500,
        "took_ms": 504,
        "done": AT + number + 504,
    }
    return Receipt(**(base | fields))


def random_receipt(rng: random.Random, number: int, **fields: Any) -> Receipt:
    """One of any project, model and size."""
    prompt = rng.randrange(5000)
    return make_receipt(
        number,
        **{
            "project": rng.choice(("search", "chat", "ads")),
            "model": rng.choice(("m", "n")),
            "prompt": prompt,
            "cached": rng.randint(0, prompt),
            "completion": rng.randrange(2000),
            **fields,
        },
    )


def open_ledger(folder: Path, identity: Identity, *, clock: Clock | None = None, keep_s: float = 86_400.0 * 365 * 100) -> Ledger:
    clock = clock or SystemClock()
    return Ledger(folder / LEDGER_FILE, sign=signer(identity, clock), clock=clock, keep_s=keep_s)
