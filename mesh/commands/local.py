"""For whoever tries it on one machine: `mesh up` and `mesh down`."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.status import Status

from mesh.commands.shared import Duration, MeshCommand, home_option, json_option, note, print_json
from mesh.errors import LocalMeshError
from mesh.local import LocalMesh, Stopped, running, tail
from mesh.settings import DEFAULT_HOME
from mesh.up import DEFAULT_MODEL, Plan, Up, bring_up

_STAGES = {
    "mesh": "trust: root key, issuers, keyset",
    "bootstrap": "bootstrap node",
    "proxy": "proxy",
    "workers": "workers enrolled",
    "engines": "engines ready, workers linked",
    "answer": "a real answer",
}


@click.command(cls=MeshCommand, epilog="Examples: mesh up --detach\n\n  mesh up --engine external --engine-url URL --model NAME")
@click.option("--workers", type=click.IntRange(1, 64), metavar="N", help="How many workers. [2; 1 for an external engine]")
@click.option("--engine", type=click.Choice(["llamacpp", "vllm", "external"]), default="llamacpp", show_default=True)
@click.option("--model", multiple=True, metavar="M", help=f"What the workers serve. [{DEFAULT_MODEL}]")
@click.option("--served-name", multiple=True, metavar="NAME", help="Under which name, in the order of --model.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Port of the API; 0 takes a free one.")
@click.option("--engine-url", default="", metavar="URL", help="Base URL of an external engine.")
@click.option("--engine-key-env", default="", metavar="VARIABLE", help="Environment variable with that engine's key.")
@click.option("--vllm-command", default="", metavar="COMMAND", help="How to start vLLM. [vllm serve]")
@click.option("--threads", type=click.IntRange(0), default=0, metavar="N", help="CPU threads per engine. [cores / workers]")
@click.option("--context-tokens", type=click.IntRange(0), default=0, metavar="N", help="Context length. [the engine's own]")
@click.option("--ready-within", type=Duration(), default="15m", show_default=True, metavar="TIME", help="Give up after this.")
@click.option("--detach", is_flag=True, help="Leave it running; `mesh down` stops it.")
@click.argument("engine_args", nargs=-1, type=click.UNPROCESSED, metavar="[-- ENGINE_ARGS…]")
@home_option
@json_option
def up(
    workers: int | None,
    engine: str,
    model: tuple[str, ...],
    served_name: tuple[str, ...],
    port: int,
    engine_url: str,
    engine_key_env: str,
    vllm_command: str,
    threads: int,
    context_tokens: int,
    ready_within: float,
    detach: bool,
    engine_args: tuple[str, ...],
    home: Path,
    as_json: bool,
) -> None:
    """Run a whole mesh on this machine: a bootstrap node, a proxy and workers, each a real process."""
    plan = Plan(
        home=home,
        workers=workers or (1 if engine == "external" else 2),
        engine=engine,
        models=model,
        served_names=served_name,
        port=port,
        engine_url=engine_url,
        engine_key_env=engine_key_env,
        vllm_command=vllm_command,
        threads=threads,
        context_tokens=context_tokens,
        engine_args=engine_args,
        ready_within_s=ready_within,
    )
    with _only_one(home), _interruptible():
        mesh = LocalMesh(home)
        try:
            up_now = bring_up(plan, mesh, _Progress())
            if detach:
                _show(up_now, as_json=as_json, detach=True)
                return
            with contextlib.suppress(KeyboardInterrupt):  # from here on, the way to end it
                _show(up_now, as_json=as_json, detach=False)
                _watch(mesh)
        except BaseException:
            _stop(mesh)
            raise
        _stop(mesh)


@click.command(cls=MeshCommand, epilog="Example: mesh down")
@click.option("--drain", type=Duration(), default="30s", show_default=True, metavar="TIME", help="Then they are killed.")
@home_option
@json_option
def down(drain: float, home: Path, as_json: bool) -> None:
    """Stop what `mesh up` started under this home, and nothing else."""
    mesh = running(home)
    if mesh is None:
        if as_json:
            print_json({"stopped": []})
        else:
            click.echo("nothing is running")
        return
    outcomes = mesh.stop(drain, lambda item: None if as_json else _say_stopped(item))
    if as_json:
        print_json({"stopped": [{"name": item.name, "pid": item.pid, "outcome": item.outcome} for item in outcomes]})


class _Progress:
    """The stages as lines on stderr, the current one with a spinner on a terminal."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._status: Status | None = None
        self._began = time.monotonic()

    def __call__(self, stage: str, detail: str) -> None:
        if detail:
            text = f"{_STAGES[stage]}: {detail}"
            if self._status is None:
                self._status = self._console.status(text)
                if self._console.is_terminal:
                    self._status.start()
            else:
                self._status.update(text)
            return
        if self._status is not None:
            self._status.stop()
            self._status = None
        self._console.print(f"✓ {_STAGES[stage]}  ({time.monotonic() - self._began:.1f} s)")


def _show(up_now: Up, *, as_json: bool, detach: bool) -> None:
    if as_json:
        click.echo(json.dumps(up_now.describe()))
        return
    settings, model = up_now.settings, up_now.models[0]
    if up_now.kept_settings is not None:
        note(f"the client settings that were here are now in {up_now.kept_settings}")
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Say hello"}]})
    python = (
        "from openai import OpenAI; "
        f"client = OpenAI(base_url={json.dumps(settings.base_url)}, api_key={json.dumps(settings.api_key)}); "
        f'print(client.chat.completions.create(model={json.dumps(model)}, messages=[{{"role": "user", "content": "Say hello"}}])'
        ".choices[0].message.content)"
    )
    click.echo(f"\nbase URL  {settings.base_url}\nAPI key   {settings.api_key}\nmodels    {', '.join(up_now.models)}\n")
    click.echo(
        f"curl {settings.base_url}/chat/completions -H 'authorization: Bearer {settings.api_key}' "
        f"-H 'content-type: application/json' -d {shlex.quote(body)}\n"
    )
    click.echo(f"python -c {shlex.quote(python)}\n")
    where = "" if up_now.home == Path(DEFAULT_HOME).expanduser() else f" --home {shlex.quote(str(up_now.home))}"
    click.echo(f'mesh chat{where} --stream "Why is the sky blue?"\n')
    click.echo(f"it runs on; `mesh down{where}` stops it" if detach else "Ctrl-C stops it")


def _watch(mesh: LocalMesh) -> None:
    """Say when a node dies, until Ctrl-C or SIGTERM. Raises `LocalMeshError` when none is left."""
    said: set[str] = set()
    while True:
        dead = mesh.dead()
        for node in dead:
            if node.name not in said:
                said.add(node.name)
                note(f"{node.name} ended; the end of {node.log}:\n{tail(Path(node.log))}")
        if len(dead) == len(mesh.nodes):
            raise LocalMeshError("every node has ended")
        time.sleep(0.5)


def _stop(mesh: LocalMesh) -> None:
    if mesh.nodes:
        mesh.stop(30.0, lambda item: note(_outcome(item)))


def _say_stopped(item: Stopped) -> None:
    click.echo(_outcome(item))


def _outcome(item: Stopped) -> str:
    words = {"stopped": "stopped", "killed": "killed: it did not stop within its deadline", "gone": "had ended before"}
    return f"{item.name} (pid {item.pid}) {words[item.outcome]}"


@contextlib.contextmanager
def _only_one(home: Path) -> Iterator[None]:
    """One `mesh up` a home. Raises `LocalMeshError` if one runs, in front or detached."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (home / "up.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LocalMeshError(f"another `mesh up` runs with {home}; stop it with `mesh down` or Ctrl-C") from None
        if running(home) is not None:
            raise LocalMeshError(f"a mesh is already running in {home}; `mesh status` shows it, `mesh down` stops it")
        (home / "up.json").unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does; either one before the mesh is up makes the command fail."""

    def interrupt(_number: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        note("interrupted")
        sys.exit(1)
    finally:
        signal.signal(signal.SIGTERM, previous)
