"""Logging: what comes out, and what must not."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from mesh import log as logs


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_json_line_has_event_level_time_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(json=True)
    structlog.get_logger("x").info("engine.ready", port=7)
    (line,) = lines(capsys)
    assert (line["event"], line["level"], line["port"]) == ("engine.ready", "info", 7)
    assert "timestamp" in line


def test_bound_request_id_is_on_every_line_inside_and_none_outside(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(json=True)
    log = structlog.get_logger("x")
    with logs.bound(request_id="r-1"):
        log.info("inside")
    log.info("outside")
    inside, outside = lines(capsys)
    assert inside["request_id"] == "r-1"
    assert "request_id" not in outside


def test_level_is_honoured_and_libraries_speak_from_warning_up(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(level="info", json=True)
    structlog.get_logger("x").debug("quiet")
    logging.getLogger("aiohttp.server").info("chatter")
    logging.getLogger("aiohttp.server").warning("trouble")
    (line,) = lines(capsys)
    assert (line["event"], line["logger"]) == ("trouble", "aiohttp.server")


@pytest.mark.parametrize("secret", ["im_" + "a1B2" * 20, "imjoin_" + "a1B2" * 20, "sk-" + "a1B2" * 8, "hf_" + "a1B2" * 8])
def test_whatever_looks_like_a_key_is_blotted_out(capsys: pytest.CaptureFixture[str], secret: str) -> None:
    logs.configure(json=True)
    structlog.get_logger("x").warning(f"bad {secret}", header=f"Bearer {secret}")
    logging.getLogger("aiohttp.server").error("failed on %s", secret)
    try:
        raise ValueError(secret)
    except ValueError:
        structlog.get_logger("x").exception("crashed")
    assert secret not in capsys.readouterr().err


def test_console_lines_are_readable(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(json=False)
    structlog.get_logger("x").info("engine.ready", port=7)
    assert "engine.ready" in (shown := capsys.readouterr().err)
    assert "port=7" in shown
