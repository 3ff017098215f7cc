"""The peers: how each is installed, and the command that puts it in front of some engines.

A peer of the package index lives in an environment of its own, `.venv-peers/<name>`; nginx and HAProxy come from the system.
Where one cannot be had, `Missing` says why and the run goes on without it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from bench.native import ROOT

VENVS = ROOT / ".venv-peers"
INSTALL_TIMEOUT_S = 900


class Missing(RuntimeError):
    """The peer cannot be had on this machine; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Tls:
    """A server certificate for a peer's front: PEM files, and both in one for HAProxy."""

    cert: Path
    key: Path
    both: Path


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where a peer is put: its port, a spare one for its metrics, the engines behind it, a folder for its files."""

    port: int
    spare_port: int
    engine_urls: tuple[str, ...]
    folder: Path
    model: str = "bench"
    policy: str = "cache_aware"
    tls: Tls | None = None


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How to start a peer."""

    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One peer. `relaxed` names transitive pins that the index may not satisfy and that do not matter to forwarding."""

    name: str
    command: Callable[[Site], Launch]
    kind: str
    requirement: str | None = None
    system_package: str | None = None
    relaxed: tuple[str, ...] = ()
    rust: bool = False


def _venv_python(name: str) -> str:
    return str(VENVS / name / "bin" / "python")


def _run(argv: Sequence[str]) -> tuple[bool, str]:
    """Run an installer; its last lines when it fails."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip() and "WARNING" not in line]
    return done.returncode == 0, " ".join(lines[-2:])[:300]


def ensure_venv(name: str, requirement: str, relaxed: Sequence[str] = ()) -> Path:
    """An environment that holds the requirement, made on first use. Returns its python. Raises Missing."""
    folder = VENVS / name
    python, mark = folder / "bin" / "python", folder / ".holds"
    if mark.exists() and mark.read_text() == requirement and python.exists():
        return python
    if not python.exists():
        ok, words = _run([sys.executable, "-m", "venv", str(folder)])
        if not ok:
            raise Missing(f"no environment could be made: {words}")
    ok, words = _run([str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", requirement])
    if not ok and relaxed:
        ok, words = _install_relaxed(folder, requirement, relaxed)
    if not ok:
        raise Missing(f"pip install {requirement} failed: {words}")
    mark.write_text(requirement)
    return python


def _install_relaxed(folder: Path, requirement: str, relaxed: Sequence[str]) -> tuple[bool, str]:
    """uv can drop a pin of a dependency's dependency; pip cannot."""
    uv = ROOT / ".venv" / "bin" / "uv"
    if not uv.exists():
        _run([str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "uv"])
        uv = folder / "bin" / "uv"
    overrides = folder / "overrides.txt"
    overrides.write_text("\n".join(relaxed) + "\n")
    return _run(
        [
            str(uv),
            "pip",
            "install",
            "-q",
            "--python",
            str(folder / "bin" / "python"),
            "--override",
            str(overrides),
            requirement,
        ]
    )


def ensure_system(package: str) -> None:
    """A program of the system, installed with apt-get where we may. Raises Missing."""
    if shutil.which(package, path=f"{os.environ.get('PATH', '')}:/usr/sbin"):
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise Missing(f"{package} is not installed, and only root on a Debian system could do it here")
    _run(["apt-get", "update", "-q"])
    ok, words = _run(["apt-get", "install", "-y", "-q", "--no-install-recommends", package])
    if not ok:
        raise Missing(f"apt-get install {package} failed: {words}")


def ensure(peer: Peer) -> None:
    """Make the peer runnable. Raises Missing."""
    if peer.system_package:
        ensure_system(peer.system_package)
    if peer.requirement:
        ensure_venv(peer.name, peer.requirement, peer.relaxed)


def _router_argv(site: Site) -> list[str]:
    """The options that the three Rust routers share: they are forks of one program."""
    tls = ["--tls-cert-path", str(site.tls.cert), "--tls-key-path", str(site.tls.key)] if site.tls else []
    return [
        *("--host", "127.0.0.1", "--port", str(site.port), "--policy", site.policy, "--worker-urls", *site.engine_urls),
        *(
            "--prometheus-host",
            "127.0.0.1",
            "--prometheus-port",
            str(site.spare_port),
            "--worker-startup-check-interval",
            "1",
        ),
        *("--max-concurrent-requests", "100000", "--queue-size", "10000", *tls),
    ]


def _sglang(site: Site) -> Launch:
    module = ("-m", "sglang_router.launch_router")
    return Launch(argv=[_venv_python("sglang-router"), *module, *_router_argv(site), "--log-level", "warn"])


def _vllm_router(site: Site) -> Launch:
    if site.tls:
        raise Missing("vllm-router does not serve TLS")
    module = ("-m", "vllm_router.launch_router")
    return Launch(argv=[_venv_python("vllm-router"), *module, *_router_argv(site), "--log-level", "warning"])


def _smg(site: Site) -> Launch:
    extra = ("--log-level", "warn", "--disable-tokenizer-autoload", "--load-monitor-interval", "1", "--backend", "vllm")
    return Launch(argv=[_venv_python("smg"), "-m", "smg", "launch", *_router_argv(site), *extra])


def _litellm(site: Site) -> Launch:
    config = site.folder / "litellm.yaml"
    models = "".join(
        f"  - model_name: {site.model}\n    litellm_params: {{model: openai/{site.model}, api_base: '{url}/v1', api_key: none}}\n"
        for url in site.engine_urls
    )
    config.write_text(f"model_list:\n{models}litellm_settings: {{telemetry: false}}\n")
    tls = ["--ssl_certfile_path", str(site.tls.cert), "--ssl_keyfile_path", str(site.tls.key)] if site.tls else []
    program = str(VENVS / "litellm" / "bin" / "litellm")
    argv = [
        program,
        "--config",
        str(config),
        "--host",
        "127.0.0.1",
        "--port",
        str(site.port),
        "--num_workers",
        "1",
        *tls,
    ]
    return Launch(
        argv=argv,
        env={
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_LOG": "ERROR",
            "DISABLE_ADMIN_UI": "True",
            "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
        },
    )


def _nginx(site: Site) -> Launch:
    servers = "".join(f"    server {urlsplit(url).netloc};\n" for url in site.engine_urls)
    tls = f"ssl_certificate {site.tls.cert}; ssl_certificate_key {site.tls.key};" if site.tls else ""
    (site.folder / "nginx.conf").write_text(f"""\
worker_processes 1;
daemon off;
pid {site.folder}/nginx.pid;
error_log {site.folder}/nginx-error.log;
worker_rlimit_nofile 20000;
events {{ worker_connections 16000; }}
http {{
  access_log off;
  client_body_temp_path {site.folder}/body;
  proxy_temp_path {site.folder}/proxy;
  fastcgi_temp_path {site.folder}/fastcgi;
  uwsgi_temp_path {site.folder}/uwsgi;
  scgi_temp_path {site.folder}/scgi;
  keepalive_requests 100000000;
  upstream engines {{
{servers}    keepalive 512;
    keepalive_requests 100000000;
  }}
  server {{
    listen 127.0.0.1:{site.port}{" ssl" if site.tls else ""} backlog=8192;
    {tls}
    location / {{
      proxy_pass http://engines;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_read_timeout 600s;
      client_max_body_size 64m;
    }}
  }}
}}
""")
    return Launch(
        argv=[
            "nginx",
            "-p",
            str(site.folder),
            "-c",
            str(site.folder / "nginx.conf"),
            "-e",
            str(site.folder / "nginx-error.log"),
        ]
    )


def _haproxy(site: Site) -> Launch:
    servers = "".join(f"  server e{number} {urlsplit(url).netloc}\n" for number, url in enumerate(site.engine_urls))
    tls = f" ssl crt {site.tls.both}" if site.tls else ""
    (site.folder / "haproxy.cfg").write_text(f"""\
global
  nbthread 1
  maxconn 9000
defaults
  mode http
  option http-no-delay
  http-reuse always
  timeout connect 5s
  timeout client 600s
  timeout server 600s
frontend front
  bind 127.0.0.1:{site.port} backlog 8192{tls}
  default_backend engines
backend engines
  balance leastconn
{servers}""")
    return Launch(argv=["haproxy", "-db", "-q", "-f", str(site.folder / "haproxy.cfg")])


PEERS = {
    peer.name: peer
    for peer in (
        Peer(name="sglang-router", kind="Rust router", requirement="sglang-router==0.3.2", command=_sglang, rust=True),
        Peer(name="vllm-router", kind="Rust router", requirement="vllm-router==0.1.17", command=_vllm_router, rust=True),
        Peer(name="smg", kind="Rust router", requirement="smg==1.13.0", command=_smg, rust=True),
        Peer(
            name="litellm",
            kind="Python gateway",
            requirement="litellm[proxy]==1.109.1",
            relaxed=("certifi", "litellm-proxy-extras"),
            command=_litellm,
        ),
        Peer(name="nginx", kind="plain proxy", system_package="nginx", command=_nginx),
        Peer(name="haproxy", kind="plain proxy", system_package="haproxy", command=_haproxy),
    )
}
