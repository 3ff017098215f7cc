"""The life of keys among real processes: taken back, replaced, delegated, and issuers that come and go while everything runs."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mesh.cli import main
from mesh.clock import SystemClock
from mesh.enrol import enrol as enrol_node
from mesh.errors import EnrolError
from mesh.invite import parse_token
from mesh.trust import Role
from tests.support.deployment import Deployment, Node, until

SECONDS = 5.0
"""How long a change may take to be in force everywhere."""


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[Deployment]:
    async with Deployment(tmp_path) as mesh:
        await mesh.bootstrap()
        await asyncio.gather(mesh.proxy("p1"), mesh.proxy("p2"))
        yield mesh


def proxies(mesh: Deployment) -> list[Node]:
    return [node for node in mesh.nodes if node.role == Role.PROXY and node.process.returncode is None]


async def command(mesh: Deployment, *arguments: str, home: Path | None = None, code: int = 0, stdin: str = "") -> dict[str, Any]:
    """Run `mesh … --json` as an operator would, told where a proxy is and given no key."""
    environ = {name: None for name in os.environ if name.startswith("MESH_")} | {"MESH_URL": mesh.nodes[1].root}
    line = [*arguments, "--home", str(home or mesh.home), "--json"]
    result = await asyncio.to_thread(lambda: CliRunner().invoke(main, line, input=stdin, env=environ))
    assert result.exit_code == code, result.output
    return dict(json.loads(result.stdout)) if code == 0 else {"error": result.stderr}


async def verdicts(mesh: Deployment, key: str) -> list[tuple[int, str]]:
    """What each proxy says to a key: status and message."""

    async def ask(node: Node) -> tuple[int, str]:
        status, body = await mesh.get(f"{node.api}/models", key)
        return status, body.get("error", {}).get("message", "")

    return [await ask(node) for node in proxies(mesh)]


async def until_said(mesh: Deployment, key: str, status: int, *, words: str = "") -> float:
    async def everywhere() -> bool:
        return all(said == status and words in message for said, message in await verdicts(mesh, key))

    return await until(everywhere, what=f"every proxy to say {status} {words}", within_s=SECONDS)


async def test_a_revoked_key_is_refused_everywhere_and_others_are_not(mesh: Deployment) -> None:
    made = await command(mesh, "key", "create", "--project", "search")
    kept = await command(mesh, "key", "create", "--project", "ads")
    await until_said(mesh, made["key"], 200)
    answer = await command(mesh, "key", "revoke", made["id"], "--reason", "lost")
    assert answer["seq"] == 1
    await until_said(mesh, made["key"], 401, words="it has been revoked")
    await until_said(mesh, kept["key"], 200)
    listed = {entry["id"]: entry["revoked"] for entry in (await command(mesh, "key", "list"))["keys"]}
    assert listed == {made["id"]: True, kept["id"]: False}

    await command(mesh, "key", "revoke", "-", stdin=kept["key"] + "\n")
    await until_said(mesh, kept["key"], 401, words="it has been revoked")
    assert "lost" in (mesh.home / "mesh" / "revoked.jsonl").read_text()

    for node in proxies(mesh):
        await node.kill()
    await mesh.proxy("p2", fresh=False)
    assert await verdicts(mesh, made["key"]) == [(401, "Incorrect API key: it has been revoked")], "from the first request after a restart"


async def test_a_project_and_all_keys_of_a_time_are_taken_back_at_once(mesh: Deployment) -> None:
    old = [mesh.key(project=project) for project in ("search", "ads")]
    await command(mesh, "key", "revoke", "--project", "search")
    await until_said(mesh, old[0], 401, words="all keys of its time")
    await until_said(mesh, old[1], 200)
    await command(mesh, "key", "revoke", "--before", "now")
    await until_said(mesh, old[1], 401, words="all keys of its time")
    await asyncio.sleep(1.1)  # times in keys are whole seconds
    await until_said(mesh, (await command(mesh, "key", "create", "--project", "search"))["key"], 200)
    assert "one thing at a time" in (await command(mesh, "key", "revoke", "--project", "a", "--issuer", "b", code=2))["error"]


async def test_a_rotated_key_works_until_its_overlap_is_over(mesh: Deployment) -> None:
    made = await command(mesh, "key", "create", "--project", "search", "--model", "m", "--rps", "3")
    replaced = await command(mesh, "key", "rotate", made["id"], "--overlap", "4s")
    assert {name: replaced[name] for name in ("project", "models", "rps", "roles")} == {
        name: made[name] for name in ("project", "models", "rps", "roles")
    }
    assert [status for status, _ in await verdicts(mesh, made["key"])] == [200, 200]
    await until(lambda: _are(mesh, made["key"], 401), what="the old key to end", within_s=4 + SECONDS)
    assert time.time() >= replaced["old_ends"] - 0.5
    await until_said(mesh, replaced["key"], 200)


async def _are(mesh: Deployment, key: str, status: int) -> bool:
    return all(said == status for said, _ in await verdicts(mesh, key))


async def test_issuers_come_and_go_without_a_restart(mesh: Deployment) -> None:
    made = await command(mesh, "issuer", "create", "search-1", "--project", "search", "--rps", "5", "--role", "invoker")
    assert made["published"]
    key = await command(mesh, "key", "create", "--project", "search", "--issuer", "search-1")
    assert (key["kid"], key["rps"]) == ("search-1", 5.0), "what was left open took the issuer's bound"
    await until_said(mesh, key["key"], 200)
    refused = await command(mesh, "key", "create", "--project", "ads", "--issuer", "search-1", code=1)
    assert "may not sign for its project" in refused["error"]

    await command(mesh, "key", "revoke", "--issuer", "nobody", "--before", "1h")  # a list that keys-1 signs
    rotated = await command(mesh, "issuer", "rotate", "keys-1")
    assert (rotated["kid"], rotated["signed_again"]) == ("keys-2", 1)
    old = mesh.key()
    await until_said(mesh, old, 200)
    new = await command(mesh, "key", "create", "--project", "search")
    assert new["kid"] == "keys-2"
    await until_said(mesh, new["key"], 200)

    retired = await command(mesh, "issuer", "retire", "keys-1")
    assert retired["published"]
    await until_said(mesh, old, 401, words="not issued for this mesh")
    await until_said(mesh, new["key"], 200)
    token = await command(mesh, "invite", "worker", "--bootstrap", mesh.bootstraps[0])
    await enrol(mesh, token["token"])
    viewer = await command(mesh, "key", "create", "--project", "p", "--role", "viewer")
    _, body = await mesh.get(f"{proxies(mesh)[1].root}/mesh/v1/documents", viewer["key"])
    assert {entry["kind"]: entry["signer"] for entry in body["documents"]} == {"keyset": "keys-2", "revocations": "keys-2"}
    listed = await command(mesh, "issuer", "list")
    assert [entry["kid"] for entry in listed["issuers"]] == ["nodes-1", "search-1", "keys-2"]


async def test_a_delegation_makes_narrower_keys_with_nobody_told(mesh: Deployment, tmp_path: Path) -> None:
    theirs, file = tmp_path / "theirs", tmp_path / "search.issuer"
    made = await command(
        mesh, "issuer", "delegate", "search-admin", "--project", "search", "--model", "m", "--max-ttl", "1d", "--out", str(file)
    )
    taken = await command(mesh, "issuer", "import", str(file), home=theirs)
    assert taken["bounds"] == {"projects": ["search"], "models": ["m"], "ttl_s": 86400.0}
    key = await command(mesh, "key", "create", "--project", "search", home=theirs)
    assert (key["models"], key["expires"] - key["not_before"]) == (["m"], 86400.0)
    await until_said(mesh, key["key"], 200)
    wider = await command(mesh, "key", "create", "--project", "ads", home=theirs, code=1)
    assert "may not sign for its project" in wider["error"]
    further = tmp_path / "further.issuer"
    await command(mesh, "issuer", "delegate", "intern", "--rps", "1", "--out", str(further), home=theirs)
    await command(mesh, "issuer", "import", str(further), home=tmp_path / "interns")
    small = await command(mesh, "key", "create", "--project", "search", home=tmp_path / "interns")
    assert (small["rps"], small["models"]) == (1.0, ["m"])
    await until_said(mesh, small["key"], 200)
    await command(mesh, "key", "revoke", made["id"])
    for text in (key["key"], small["key"]):
        await until_said(mesh, text, 401, words="what it was made with has been revoked")


async def test_a_revoked_join_token_admits_nobody_more(mesh: Deployment) -> None:
    token = await command(mesh, "invite", "worker", "--uses", "5", "--bootstrap", mesh.bootstraps[0])
    await enrol(mesh, token["token"])
    await command(mesh, "invite", "revoke", token["token"])

    async def refused() -> bool:
        try:
            await enrol(mesh, token["token"])
        except EnrolError as error:
            return "revoked" in error.message
        return False

    await until(refused, what="the bootstrap node to refuse the token", within_s=40)


async def enrol(mesh: Deployment, text: str) -> None:
    await enrol_node(parse_token(text), Ed25519PrivateKey.generate(), tuple(mesh.bootstraps), clock=SystemClock(), rng=random.Random())


async def test_a_proxy_that_is_cut_off_accepts_nothing_after_a_while(tmp_path: Path) -> None:
    async with Deployment(tmp_path) as mesh:
        bootstrap = await mesh.bootstrap()
        one = await mesh.proxy("p1", "--revocations-stale", "3s")
        two = await mesh.proxy("p2")
        key = mesh.key()
        await command(mesh, "key", "revoke", "0123456789abcdef")

        async def heard() -> bool:
            status, body = await mesh.get(f"{one.root}/mesh/v1/status", key)
            return status == 200 and body["revocations"]["seq"] == 1 and any(entry["linked"] for entry in body["proxies"])

        await until(heard, what="the list to be there and the proxies to be linked")
        for node in (bootstrap, two):
            node.process.send_signal(signal.SIGSTOP)  # as if the network had gone

        async def stale() -> bool:
            status, body = await mesh.get(f"{one.api}/models", key)
            assert status in (200, 503)
            return status == 503 and body["error"]["code"] == "revocations_stale"

        await until(stale, what="the proxy to refuse keys", within_s=40)
        status, body = await mesh.get(f"{one.root}/readyz")
        assert (status, body["status"]) == (503, "its list of revoked keys is not confirmed")
        for node in (bootstrap, two):
            node.process.send_signal(signal.SIGCONT)

        async def serves() -> bool:
            return (await mesh.get(f"{one.api}/models", key))[0] == 200

        await until(serves, what="the proxy to accept keys again", within_s=40)
