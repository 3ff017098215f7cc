"""Keys between a worker and its engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mesh.errors import ConfigError

MAX_KEY_BYTES = 8_192


def bearer(key: str | None) -> Mapping[str, str]:
    """The header an OpenAI-compatible server expects the key in; nothing without a key."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def read_key(environment: Mapping[str, str], env_name: str | None, file: Path | None) -> str | None:
    """The key an external engine wants, from an environment variable or a file, never from an argument that the whole
    machine can read. Raises ConfigError when it was named and is not there."""
    if env_name:
        key = environment.get(env_name, "").strip()
        if not key:
            raise ConfigError(f"the environment variable {env_name} with the engine's key is not set")
    elif file:
        try:
            with open(file.expanduser(), "rb") as opened:
                key = opened.read(MAX_KEY_BYTES).decode("ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the engine's key cannot be read from {file}: {error}") from error
        if not key:
            raise ConfigError(f"{file} holds no key")
    else:
        return None
    if not (key.isascii() and key.isprintable()):
        raise ConfigError("the engine's key holds characters that no key has")
    return key
