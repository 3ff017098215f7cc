"""What is pure about supervising: pauses, last words, what the log keeps."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.engine.child import describe_exit
from worker.engine.logfile import MAX_LINE_BYTES, TAIL_LINES, EngineLog, LineSplitter, printable, telling
from worker.engine.supervise import Lives, Timing, first_of

TIMING = Timing(backoff_first_s=0.5, backoff_max_s=60.0, stable_after_s=30.0)


def test_pause_doubles_up_to_its_limit() -> None:
    never_less = random.Random(1)
    longest = [max(Lives(crashed=n).pause_s(TIMING, never_less) for _ in range(500)) for n in range(1, 12)]
    expected = [min(60.0, 0.5 * 2 ** (n - 1)) for n in range(1, 12)]
    assert longest == pytest.approx(expected, rel=0.02)


@given(st.integers(0, 10_000), st.integers())
def test_pause_is_never_shorter_than_half_and_never_longer_than_the_limit(crashed: int, seed: int) -> None:
    pause_s = Lives(crashed=crashed).pause_s(TIMING, random.Random(seed))
    assert 0.25 <= pause_s <= 60.0


def test_lives_that_never_got_ready_count_up_until_one_does() -> None:
    lives = Lives().after(None, TIMING).after(None, TIMING)
    assert (lives.crashed, lives.unready) == (2, 2)
    assert lives.after(1.0, TIMING) == Lives(crashed=3, unready=0)


def test_engine_that_ran_for_long_starts_with_a_short_pause_again() -> None:
    assert Lives(crashed=9, unready=0).after(30.0, TIMING) == Lives(crashed=1, unready=0)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "exited with status 0"),
        (3, "exited with status 3"),
        (137, "was ended by SIGKILL"),
        (-9, "was ended by SIGKILL"),
        (127, "could not be started"),
        (255, "exited with status 255"),
    ],
)
def test_exit_is_told_in_words(status: int, words: str) -> None:
    assert describe_exit(status, []) == f"the engine {words}"
    assert describe_exit(status, ["fine", "RuntimeError: no memory"]) == f"the engine {words}: RuntimeError: no memory"


def test_last_words_are_those_that_sound_like_an_error() -> None:
    said = ["ValueError: bad", "bye", "", "cleaning up", "done"]
    assert telling(said) == "ValueError: bad"
    assert telling(["one", "two", "three", "four"]) == "two | three | four"
    assert telling([]) == ""
    assert len(telling(["error " + "x" * 5_000])) <= 600


@given(st.lists(st.binary(max_size=200)))
def test_lines_come_out_the_same_however_they_were_cut(chunks: list[bytes]) -> None:
    splitter, found = LineSplitter(), []
    for chunk in chunks:
        found += splitter.feed(chunk)
    found += splitter.finish()
    whole = b"".join(chunks).split(b"\n")
    assert found == (whole if whole[-1] else whole[:-1])


def test_endless_line_is_cut_and_takes_no_memory() -> None:
    splitter = LineSplitter()
    for _ in range(1_000):
        assert splitter.feed(b"x" * 10_000) == []
    assert splitter.feed(b"\nnext\n") == [b"x" * MAX_LINE_BYTES, b"next"]


@given(st.binary())
def test_lines_are_made_safe_to_show(line: bytes) -> None:
    assert all(char.isprintable() or char == "\t" for char in printable(line))


def test_log_keeps_the_last_lines_and_rotates(tmp_path: Path) -> None:
    log = EngineLog(tmp_path / "state" / "engine.log", max_bytes=1_000, files=3)
    for number in range(1_000):
        log.write([f"line {number}".encode()])
    log.close()
    files = sorted((tmp_path / "state").iterdir())
    assert [file.name for file in files] == ["engine.log", "engine.log.1", "engine.log.2"]
    assert all(file.stat().st_size <= 1_000 for file in files)
    assert files[0].read_text().splitlines()[-1] == "line 999"
    assert list(log.tail) == [f"line {number}" for number in range(1_000 - TAIL_LINES, 1_000)]


def test_log_that_cannot_be_written_still_keeps_the_last_lines(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    log = EngineLog(tmp_path / "file" / "engine.log")
    log.write([b"said"])
    log.write([b"again"])
    assert list(log.tail) == ["said", "again"]


async def test_first_of_cancels_the_others_and_waits_for_them() -> None:
    ended = []

    async def long() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("long")

    async def short() -> None:
        raise ValueError("told")

    with pytest.raises(ValueError, match="told"):
        await first_of(long(), short())
    assert ended == ["long"]
