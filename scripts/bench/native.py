"""The native tools, compiled when first used: a benchmark must not measure its own generator."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parents[1]
CACHE = ROOT / ".cache" / "bench"


class CompilerMissing(RuntimeError):
    """No C compiler: nothing can be measured."""


def build(source: Path) -> Path:
    """Compile one C file of the benchmarks and return the binary; unchanged sources are not compiled twice.

    Raises CompilerMissing, or CalledProcessError with the compiler's words.
    """
    sources = [source, *sorted((BENCH / "native").glob("*.h"))]
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    binary = CACHE / f"{source.parent.name}-{source.stem}-{digest}"
    if binary.exists():
        return binary
    compiler = os.environ.get("CC") or next((cc for cc in ("cc", "gcc", "clang") if shutil.which(cc)), None)
    if compiler is None:
        raise CompilerMissing("a C compiler is needed (cc, gcc or clang): the generator and the stand-in are C")
    CACHE.mkdir(parents=True, exist_ok=True)
    partial = binary.with_suffix(f".{os.getpid()}")
    subprocess.run([compiler, "-O2", "-std=gnu11", "-o", str(partial), str(source), "-lm"], check=True)
    partial.rename(binary)
    return binary
