"""The list of spent join tokens: what it must not forget, and what it may."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bootstrap.ledger import KEEP_EXPIRED_S, MAX_EXCESS, Ledger
from mesh.errors import ConfigError, TokenSpent
from mesh.invite import Invite
from mesh.trust import Role

NOW = 1_800_000_000.0
ONCE = Invite(id=b"0123456789abcdef", role=Role.WORKER, uses=1, issued=NOW, expires=NOW + 600.0)
ALICE, BOB = b"a" * 32, b"b" * 32


async def test_spent_token_stays_spent_after_a_restart(tmp_path: Path) -> None:
    first = Ledger(tmp_path / "tokens.db")
    await first.spend(ONCE, ALICE, now=NOW)
    first.close()
    second = Ledger(tmp_path / "tokens.db")
    with pytest.raises(TokenSpent):
        await second.spend(ONCE, BOB, now=NOW)
    assert await second.spend(ONCE, ALICE, now=NOW) == {ALICE}
    second.close()


def test_spent_token_stays_spent_after_kill_9(tmp_path: Path) -> None:
    program = (
        "import asyncio, os, signal, sys; from pathlib import Path; from bootstrap.ledger import Ledger;"
        "from mesh.invite import Invite; from mesh.trust import Role;"
        f"token = Invite(id={ONCE.id!r}, role=Role.WORKER, uses=1, issued={NOW}, expires={NOW + 600});"
        f"asyncio.run(Ledger(Path(sys.argv[1])).spend(token, {ALICE!r}, now={NOW}));"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path / "tokens.db")], check=False, timeout=60)
    assert ended.returncode == -9

    async def again() -> None:
        await Ledger(tmp_path / "tokens.db").spend(ONCE, BOB, now=NOW)

    with pytest.raises(TokenSpent):
        asyncio.run(again())


async def test_many_at_once_get_exactly_the_uses_there_are(tmp_path: Path) -> None:
    ledger, invite = Ledger(tmp_path / "tokens.db"), replace(ONCE, uses=5)
    nodes = [os.urandom(32) for _ in range(20)]
    results = await asyncio.gather(*(ledger.spend(invite, node, now=NOW) for node in nodes), return_exceptions=True)
    assert sum(isinstance(result, set) for result in results) == 5
    assert all(isinstance(result, set | TokenSpent) for result in results)
    ledger.close()


async def test_refused_node_is_not_noted(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "tokens.db")
    await ledger.spend(ONCE, ALICE, now=NOW)
    with pytest.raises(TokenSpent):
        await ledger.spend(ONCE, BOB, now=NOW)
    assert await ledger.note(ONCE, (), now=NOW) == {ALICE}
    ledger.close()


async def test_overused_token_is_refused_to_those_it_had_admitted_too(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "tokens.db")
    await ledger.spend(ONCE, ALICE, now=NOW)
    await ledger.note(ONCE, (BOB,), now=NOW)
    with pytest.raises(TokenSpent):
        await ledger.spend(ONCE, ALICE, now=NOW)
    ledger.close()


async def test_what_others_tell_is_bounded(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "tokens.db")
    known = await ledger.note(ONCE, (n.to_bytes(32) for n in range(1000)), now=NOW)
    assert len(known) == ONCE.uses + MAX_EXCESS
    assert await ledger.note(ONCE, (ALICE,), now=NOW) == known
    ledger.close()


async def test_uses_are_forgotten_only_long_after_the_token_expired(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "tokens.db")
    await ledger.spend(ONCE, ALICE, now=NOW)
    assert await ledger.note(ONCE, (), now=ONCE.expires + KEEP_EXPIRED_S) == {ALICE}
    assert await ledger.note(ONCE, (), now=ONCE.expires + KEEP_EXPIRED_S + 1) == set()
    ledger.close()


def test_file_is_private_and_a_broken_one_is_named(tmp_path: Path) -> None:
    Ledger(tmp_path / "tokens.db").close()
    assert stat.S_IMODE((tmp_path / "tokens.db").stat().st_mode) == 0o600
    (tmp_path / "broken.db").write_bytes(b"this is no database, and long enough to be read as one" * 100)
    with pytest.raises(ConfigError, match=r"broken\.db"):
        Ledger(tmp_path / "broken.db")
    with pytest.raises(ConfigError):
        Ledger(tmp_path / "missing" / "tokens.db")
