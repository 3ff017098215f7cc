"""Request smuggling: no request of the corpus is read by the proxy in one way and by whoever stands before or behind it in another."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import uvloop

from tests.support.authority import make_mesh
from tests.support.front import Front
from tests.support.smuggling import Echo, first, read_corpus, run_behind_nginx, run_direct, smuggled

pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy.")
MESH = make_mesh(now=time.time() - 3600)
VECTORS = read_corpus()


@pytest.fixture
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy()


@pytest.fixture
async def front(tmp_path: Path) -> AsyncIterator[Front]:
    async with Front(MESH, tmp_path) as front:
        yield front


async def test_vectors_do_what_the_corpus_says_and_each_answer_is_its_requests(front: Front) -> None:
    echo = Echo()
    await front.worker(echo)
    results = await run_direct(front, echo, VECTORS)
    for mark, (vector, (read, reached)) in enumerate(zip(VECTORS, results, strict=True)):
        assert read.broken == "", vector.name
        assert read.echoes == reached, vector.name
        kinds = tuple({first(mark): "first", smuggled(mark): "smuggled"}[prompt] for prompt in reached)
        assert (tuple(read.statuses), kinds) == (vector.statuses, vector.reached), vector.name
    assert len(VECTORS) >= 200


def test_what_is_no_http_reaches_nobody_and_ends_its_connection() -> None:
    """The corpus itself: after a request that is refused as no HTTP, nothing more of the connection is heard."""
    for vector in VECTORS:
        for number, status in enumerate(vector.statuses):
            assert status not in (408, 431) or number == len(vector.statuses) - 1, vector.name
    refused = [vector for vector in VECTORS if not vector.reached]
    assert len(refused) >= 120
    both = [
        vector
        for vector in VECTORS
        if "Transfer-Encoding: chunked" in vector.data and "Content-Length: " in vector.data.partition("\r\n\r\n")[0]
    ]
    assert all(vector.statuses == (400,) and not vector.reached for vector in both if not vector.data.startswith("HEAD"))


@pytest.mark.skipif(shutil.which("nginx") is None and not Path("/usr/sbin/nginx").exists(), reason="nginx is not installed")
async def test_behind_nginx_every_client_gets_the_answer_to_its_own_request(front: Front) -> None:
    echo = Echo()
    await front.worker(echo)
    assert await run_behind_nginx(front, echo, VECTORS) == []
    assert len(echo.reached) > 4 * len(VECTORS), "the victims were served"
