"""Who finds whom: late workers, outbound workers, two proxies, restarts with the bootstrap nodes down, strangers."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import aiohttp

from mesh.authority import create_mesh
from mesh.runtime import read_announced
from mesh.trust import Role
from tests.e2e.conftest import SmallMesh, chat_body, external
from tests.support.deployment import Deployment, until
from tests.support.fake_engine import FakeEngine
from tests.support.processes import listening_ports


async def test_worker_started_later_is_found_and_used(small: SmallMesh) -> None:
    async with FakeEngine(model="late") as engine:
        late = await external(small.mesh, "w3", engine)
        await small.mesh.until_ready(small.proxy, late)
        assert await small.mesh.models(small.proxy, small.key) == ["fake", "late"]
        body = chat_body() | {"model": "late"}
        async with small.mesh.http.post(small.chat_url, json=body, headers=small.headers) as response:
            assert response.status == 200
            assert response.headers["x-mesh-worker"] == late.id[:12]


async def test_load_is_spread_over_all_ready_workers(small: SmallMesh) -> None:
    async def one(n: int) -> int:
        async with small.mesh.http.post(small.chat_url, json=chat_body(f"n {n}"), headers=small.headers) as response:
            return response.status

    assert await asyncio.gather(*(one(n) for n in range(40))) == [200] * 40
    served = [entry["served"] for entry in (await small.mesh.workers(small.proxy, small.key)).values()]
    assert sorted(served) == [20, 20]


async def test_outbound_worker_serves_without_a_listening_port(deployment: Deployment) -> None:
    await deployment.bootstrap()
    proxy = await deployment.proxy()
    async with FakeEngine() as engine:
        worker = await external(deployment, "w1", engine, "--outbound")
        await deployment.until_ready(proxy, worker)
        key = deployment.key()
        assert (await deployment.workers(proxy, key))[worker.id]["outbound"] is True
        assert listening_ports(worker.process.pid) == set()
        assert listening_ports(proxy.process.pid), "the check sees listeners where there are some"
        async with deployment.http.post(
            f"{proxy.api}/chat/completions", json=chat_body(), headers={"Authorization": f"Bearer {key}"}
        ) as response:
            assert response.status == 200


async def test_two_proxies_find_each_other_and_the_same_workers(small: SmallMesh) -> None:
    second = await small.mesh.proxy("p2")
    await small.mesh.until_ready(second, *small.workers)

    async def known() -> bool:
        _, status = await small.mesh.get(f"{small.proxy.root}/mesh/v1/status", small.key)
        return {small.proxy.id, second.id} <= {entry["id"] for entry in status["proxies"]}

    await until(known, what="one proxy to know the other")
    async with small.mesh.http.post(f"{second.api}/chat/completions", json=chat_body(), headers=small.headers) as response:
        assert response.status == 200


async def test_proxy_restarted_without_bootstrap_nodes_finds_its_workers_again(small: SmallMesh) -> None:
    await small.mesh.until_remembered(small.proxy, *small.workers)
    await small.bootstrap.kill()
    await small.proxy.kill()
    again = await small.mesh.proxy("p1", fresh=False)
    await small.mesh.until_ready(again, *small.workers)
    async with small.mesh.http.post(f"{again.api}/chat/completions", json=chat_body(), headers=small.headers) as response:
        assert response.status == 200


async def test_worker_restarted_without_bootstrap_nodes_comes_back(small: SmallMesh) -> None:
    await small.mesh.until_remembered(small.workers[0], small.proxy, small.workers[1])
    await small.bootstrap.kill()
    await small.workers[0].kill()
    again = await small.mesh.worker("w1", "--engine", "external", "--engine-url", small.engines[0].url, fresh=False)
    assert again.id == small.workers[0].id
    await small.mesh.until_ready(small.proxy, again, small.workers[1])


async def test_traffic_flows_on_while_every_bootstrap_node_is_down(small: SmallMesh) -> None:
    await small.bootstrap.kill()
    for n in range(5):
        async with small.mesh.http.post(small.chat_url, json=chat_body(f"n {n}"), headers=small.headers) as response:
            assert response.status == 200


async def test_second_bootstrap_node_admits_when_the_first_is_down(deployment: Deployment) -> None:
    first = await deployment.bootstrap("b1")
    await deployment.bootstrap("b2", join=True)
    await first.kill()
    proxy = await deployment.proxy()
    async with FakeEngine() as engine:
        worker = await external(deployment, "w1", engine)
        await deployment.until_ready(proxy, worker)


async def test_worker_of_another_mesh_is_not_admitted_and_serves_nothing(small: SmallMesh, tmp_path: Path) -> None:
    stranger = create_mesh(tmp_path / "other" / "mesh", name="other", now=time.time())
    token = stranger.invite(Role.WORKER, ttl_s=600, uses=1, bootstraps=tuple(small.mesh.bootstraps), now=time.time())
    own, small.mesh.invite = small.mesh.invite, lambda role, **_: token  # type: ignore[method-assign,assignment]
    try:
        worker = await small.mesh.worker("stranger", "--engine", "external", "--engine-url", small.engines[0].url, wait=False)
    finally:
        small.mesh.invite = own  # type: ignore[method-assign]
    assert await asyncio.wait_for(worker.process.wait(), 60) != 0
    assert "another mesh" in worker.tail()
    assert len(await small.mesh.workers(small.proxy, small.key)) == 2


async def test_join_token_admits_only_as_often_as_it_says(small: SmallMesh) -> None:
    token = small.mesh.invite(Role.WORKER)
    own, small.mesh.invite = small.mesh.invite, lambda role, **_: token  # type: ignore[method-assign,assignment]
    try:
        admitted = await external(small.mesh, "w3", small.engines[0])
        refused = await small.mesh.worker("w4", "--engine", "external", "--engine-url", small.engines[0].url, wait=False)
    finally:
        small.mesh.invite = own  # type: ignore[method-assign]
    await small.mesh.until_ready(small.proxy, admitted)
    assert await asyncio.wait_for(refused.process.wait(), 60) != 0


async def test_processes_share_a_port_and_one_that_dies_is_started_again(small: SmallMesh) -> None:
    several = await small.mesh.proxy("p2", "--processes", "2", uses=2)
    children = several.about["processes"]
    assert len({child["id"] for child in children}) == 2, "each is a node of its own"
    await small.mesh.until_ready(several, *small.workers)

    async def served_by() -> set[str]:
        """Which of the processes answer on the port: each connection goes to one of them."""
        found = set()
        for _ in range(20):
            async with aiohttp.ClientSession(headers=small.headers) as session, session.get(f"{several.root}/mesh/v1/status") as response:
                found.add((await response.json())["proxy"]["id"])
        return found

    async def both() -> bool:
        return await served_by() == {child["id"] for child in children}

    await until(both, what="both processes to take connections")
    os.kill(children[0]["pid"], signal.SIGKILL)

    async def back() -> bool:
        about = read_announced(several.state_dir / "0")
        return about is not None and about["pid"] != children[0]["pid"] and await both()

    await until(back, what="the killed process to be back under its own identity")
    assert await several.terminate() == 0


async def test_proxies_link_with_each_other_also_those_of_one_machine_that_share_a_port(deployment: Deployment) -> None:
    await deployment.bootstrap()
    first = await deployment.proxy("p1")
    shared = await deployment.proxy("p2", "--processes", "2", uses=2)
    key = deployment.key()
    everyone = {first.id, *(process["id"] for process in shared.about["processes"])}

    async def linked() -> bool:
        _, status = await deployment.get(f"{first.root}/mesh/v1/status", key)
        return {entry["id"] for entry in status["proxies"] if entry["linked"]} == everyone - {first.id}

    async def linked_among_themselves() -> bool:
        seen = {}
        for _ in range(20):  # whichever process takes the connection
            async with deployment.http.get(
                f"{shared.root}/mesh/v1/status", headers={"Authorization": f"Bearer {key}", "Connection": "close"}
            ) as response:
                status = await response.json()
                seen[status["proxy"]["id"]] = {entry["id"] for entry in status["proxies"] if entry["linked"]}
        return set(seen) == everyone - {first.id} and all(others == everyone - {one} for one, others in seen.items())

    await until(linked, what="one proxy to link with both processes of the other")
    await until(linked_among_themselves, what="the processes to link with each other")
    async with deployment.http.post(
        f"{first.api}/chat/completions", json=chat_body(), headers={"Authorization": f"Bearer {key}"}
    ) as response:
        assert response.status == 404, "no proxy is taken for a worker"
