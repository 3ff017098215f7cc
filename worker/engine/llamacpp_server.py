"""The child process of the embedded engine: builds llama.cpp's server from options and stays until it is ended.

    python -P llamacpp_server.py '{"model": "/path.gguf", "alias": "name", "port": 1234, …}'

The key comes in INFERMESH_ENGINE_KEY. SIGTERM ends it at once: requests in flight are the worker's to drain.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import xllamacpp

WARNINGS = 2
"""llama.cpp's verbosity: 3 tells six lines a request."""
PROMPT_CACHE_MIB = 512
"""Prompts of finished requests kept in memory; llama.cpp's own default is 8 GiB."""
SPARE_CONNECTIONS = 16
"""For health checks and metrics: every request in flight occupies a thread of the server, and they must not wait."""


def main(options: dict[str, Any]) -> None:
    try:
        server = xllamacpp.Server(build_params(options, os.environ.pop("INFERMESH_ENGINE_KEY", "")))
    except RuntimeError as error:
        raise SystemExit(f"llama.cpp did not start with {options['model']}: {error}") from error
    print(f"listening on {server.listening_address}", flush=True)
    while True:
        signal.pause()


def build_params(options: dict[str, Any], key: str) -> xllamacpp.CommonParams:
    params = xllamacpp.CommonParams()
    params.model.path = options["model"]
    params.model_alias = {options["alias"]}
    params.hostnames = ["127.0.0.1"]
    params.port = options["port"]
    params.api_keys = [key] if key else []
    params.n_parallel = options["parallel"]
    params.n_ctx = options["context_tokens"] * options["parallel"]
    params.n_threads_http = options["connections"] + SPARE_CONNECTIONS
    params.cache_ram_mib = PROMPT_CACHE_MIB
    params.endpoint_metrics = True
    params.endpoint_slots = False
    params.ui = False
    params.verbosity = WARNINGS
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options["threads"]
    if options["embeddings"]:
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
        # A text to embed is computed in one piece, so the piece must hold the longest one.
        params.n_ubatch = params.n_batch
    return params


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
