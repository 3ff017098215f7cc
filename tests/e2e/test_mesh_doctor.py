"""Looking into the directory of a running mesh: mesh peers, mesh lookup, mesh doctor, and what they say when nodes die."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.conftest import SmallMesh, external
from tests.support.deployment import Deployment, until
from tests.support.fake_engine import FakeEngine


async def mesh(small: SmallMesh, home: Path, *arguments: str, code: int = 0) -> Any:
    """One `mesh` command with --json, as a process."""
    where = ("--url", small.proxy.root, "--api-key", small.key, "--home", str(home), "--json")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "mesh", *arguments, *where), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == code, (out.decode(), err.decode())
    return json.loads(out)


async def findings(small: SmallMesh) -> dict[str, dict[str, str]]:
    """By check, what the doctor says."""
    status, body = await small.mesh.get(f"{small.proxy.root}/mesh/v1/doctor", small.key)
    assert status == 200, body
    return {finding["check"]: finding for finding in body["findings"]}


async def until_well(small: SmallMesh) -> None:
    async def well() -> bool:
        return all(finding["severity"] == "ok" for finding in (await findings(small)).values())

    await until(well, what="the doctor to find nothing wrong")


async def test_healthy_mesh_shows_peers_a_look_up_and_no_trouble(small: SmallMesh, tmp_path: Path) -> None:
    await until_well(small)
    workers = {worker.id for worker in small.workers}

    peers = await mesh(small, tmp_path, "peers")
    assert {entry["id"] for entry in peers["peers"]} == workers | {small.bootstrap.id}
    assert {entry["role"] for entry in peers["peers"]} == {"worker", "bootstrap"}
    assert not any(entry["failing"] for entry in peers["peers"])
    assert all(entry["rtt_s"] > 0 for entry in peers["peers"])

    for question in (("fake",), ("--role", "worker")):
        found = await mesh(small, tmp_path, "lookup", *question)
        good = [record for record in found["records"] if record["verdict"] == "good"]
        assert {record["id"] for record in good} == workers
        assert all(record["linked"] and record["state"] == "ready" and 0 < record["expires_in_s"] <= 20 for record in good)
        assert all(len(record["holders"]) >= 2 for record in good)
        assert found["complete"]
        assert found["nodes"] == 2
        assert {step["outcome"] for step in found["path"]} == {"answered"}
        assert {step["id"] for step in found["path"]} == workers | {small.bootstrap.id}
        assert 0 < found["lookup_s"] <= found["took_s"]

    doctor = await mesh(small, tmp_path, "doctor")
    assert doctor["worst"] == "ok"
    assert {"clock", "peers", "bootstraps", "records", "links", "epoch", "credentials"} <= {one["check"] for one in doctor["findings"]}


async def test_killed_worker_is_named_with_what_is_known_of_it(small: SmallMesh, tmp_path: Path) -> None:
    await until_well(small)
    dead, alive = small.workers
    await dead.kill()

    async def unlinked() -> bool:
        return (await findings(small))["links"]["severity"] == "warn"

    await until(unlinked, what="the doctor to notice the dead worker")
    said = await findings(small)
    assert dead.id[:12] in said["links"]["detail"]
    assert "connection refused" in said["links"]["detail"]
    assert alive.id[:12] not in said["links"]["detail"]

    async def gone() -> bool:
        listed = await findings(small)
        return any(dead.id[:12] in listed[check]["detail"] for check in ("unreachable", "lost") if check in listed)

    await until(gone, what="the dead worker to be a silent peer")
    doctor = await mesh(small, tmp_path, "doctor")
    assert doctor["worst"] == "warn", "one of two workers is gone: nothing has failed"


async def test_bootstrap_nodes_that_are_all_down_fail_the_check(small: SmallMesh, tmp_path: Path) -> None:
    await until_well(small)
    await small.bootstrap.kill()
    doctor = await mesh(small, tmp_path, "doctor", code=1)
    failed = {finding["check"]: finding for finding in doctor["findings"] if finding["severity"] == "fail"}
    assert failed.keys() == {"bootstraps", "enrolment"}, "over UDP and over TCP"
    assert all(small.mesh.bootstraps[0] in finding["detail"] and finding["advice"] for finding in failed.values())


async def test_outbound_workers_are_well_too(deployment: Deployment) -> None:
    bootstrap = await deployment.bootstrap()
    proxy = await deployment.proxy()
    async with FakeEngine() as one, FakeEngine() as two:
        workers = await external(deployment, "w1", one, "--outbound"), await external(deployment, "w2", two)
        await deployment.until_ready(proxy, *workers)
        await until_well(SmallMesh(deployment, bootstrap, proxy, workers, (one, two), deployment.key()))


async def test_questions_that_make_no_sense_or_are_too_many_are_refused(small: SmallMesh) -> None:
    for query in ("", "?model=", "?role=king", "?model=m&role=worker", f"?model={'x' * 300}"):
        status, body = await small.mesh.get(f"{small.proxy.root}/mesh/v1/lookup{query}", small.key)
        assert (status, body["error"]["code"]) == (400, "invalid_request")
    key = small.mesh.key("invoker")
    for path in ("peers", "lookup?model=fake", "doctor"):
        status, body = await small.mesh.get(f"{small.proxy.root}/mesh/v1/{path}", key)
        assert (status, body["error"]["code"]) == (403, "key_not_allowed")
    url = f"{small.proxy.root}/mesh/v1/doctor"
    statuses = {status for status, _ in await asyncio.gather(*(small.mesh.get(url, small.key) for _ in range(30)))}
    assert 200 in statuses <= {200, 429}


async def test_metrics_tell_of_the_directory_with_their_types(small: SmallMesh) -> None:
    async def read() -> dict[str, Any]:
        async with aiohttp.ClientSession() as session, session.get(f"{small.proxy.root}/metrics") as response:
            return {family.name: family for family in text_string_to_metric_families(await response.text())}

    async def known() -> bool:
        samples = (await read())["infermesh_directory_records_known"].samples
        return {sample.labels["role"]: sample.value for sample in samples}.get("worker") == 2

    await until(known, what="the view to have both workers")
    families = await read()

    def value(name: str, **labels: str) -> float:
        family = families[f"infermesh_directory_{name}"]
        return next(s.value for s in family.samples if labels.items() <= s.labels.items() and not s.name.endswith("_created"))

    for name in ("bytes_in", "bytes_out", "lookups", "stores", "refused"):
        assert families[f"infermesh_directory_{name}"].type == "counter"
    assert families["infermesh_directory_lookup_seconds"].type == "histogram"
    assert value("bytes_in") > 0
    assert value("bytes_out") > 0
    assert value("lookups") > 0
    assert value("table_size") == 3
    assert value("stores", verdict="accepted") > 0
    assert value("lookup_seconds", le="+Inf") > 0
    assert 0 <= value("record_age_seconds", role="worker", which="oldest") < 30
