"""kill -9 of proxies and workers under load: no receipt that was told of is lost or there twice, and the books are the engines' own."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.support.crashes import CountingEngine, Ordeal
from tests.support.deployment import Deployment
from tests.support.nursery import Nursery


@pytest.mark.parametrize("kills", [4, pytest.param(40, marks=[pytest.mark.large, pytest.mark.timeout(900)])])
async def test_the_books_are_right_whoever_is_killed_when(tmp_path: Path, kills: int) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    async with (
        CountingEngine(tokens_per_s=40) as one,
        CountingEngine(tokens_per_s=40) as two,
        Nursery() as nursery,
        Deployment(tmp_path, nursery=nursery) as mesh,
    ):
        ordeal = Ordeal(mesh, {"w0": one, "w1": two}, rng=random.Random(seed))
        await ordeal.start()
        findings = await ordeal.run(kills)
    print(findings.describe())
    assert findings.kills.total() == kills
    assert findings.acknowledged > 0
    assert findings.whole > 0
    assert findings.right, findings.problems
