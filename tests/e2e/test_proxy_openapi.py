"""The proxy against its own description: what it says it takes and gives, it takes and gives, whatever schemathesis thinks of."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

from proxy.access import ACCESS
from tests.e2e.conftest import external
from tests.support.deployment import Deployment
from tests.support.fake_engine import FakeEngine


@dataclass
class Served:
    url: str
    key: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A proxy and a worker over the stand-in engine, started and kept by a thread of its own."""
    ready, found, stop = threading.Event(), list[Served](), list[Any]()

    async def serve() -> None:
        event = asyncio.Event()
        stop.extend((asyncio.get_running_loop(), event))
        async with Deployment(tmp_path_factory.mktemp("openapi")) as mesh, FakeEngine() as engine:
            await mesh.bootstrap()
            proxy = await mesh.proxy()
            worker = await external(mesh, "w1", engine)
            await mesh.until_ready(proxy, worker)
            found.append(Served(proxy.root, mesh.key("invoker", "viewer", "deployer", "admin")))
            ready.set()
            await event.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert ready.wait(90)
    yield found[0]
    stop[0].call_soon_threadsafe(stop[1].set)
    thread.join(30)


@pytest.fixture(scope="module")
def schema(served: Served) -> Any:
    return schemathesis.openapi.from_url(f"{served.url}/openapi.json")


LEFT_OUT = {
    "positive_data_acceptance",  # what passes the proxy may still be the engine's to refuse
    "missing_required_header",
    "unsupported_method",  # asked for elsewhere: what is sent here, TRACE, the client itself refuses
    "use_after_free",
    "ensure_resource_availability",
}
USED = [check for check in CHECKS.get_all() if check.__name__ not in LEFT_OUT]


@pytest.mark.parametrize("mode", list(GenerationMode), ids=str)
def test_answers_are_as_described(schema: Any, served: Served, mode: GenerationMode) -> None:
    asked = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        try:
            strategy = operation.as_strategy(generation_mode=mode)
        except Unsatisfiable:
            continue  # nothing about it can be wrong

        @seed(1)
        @settings(max_examples=7, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        @given(case=strategy)
        def ask(case: schemathesis.Case) -> None:
            nonlocal asked
            asked += 1
            case.call_and_validate(headers={"Authorization": f"Bearer {served.key}"}, checks=USED, timeout=30)

        with suppress(Unsatisfiable):
            ask()
    assert asked > 50


def test_description_is_public_and_names_every_route(schema: Any, served: Served) -> None:
    described = {(method.upper(), path) for path, methods in schema.raw_schema["paths"].items() for method in methods}
    routes = {path.rstrip("/").partition("{")[0].rstrip("/") for _, path in described}
    for method, path in ACCESS:
        if path.startswith("/v1") or path in ("/health", "/readyz", "/metrics", "/openapi.json"):
            assert path.rstrip("/") in routes, (method, path)
