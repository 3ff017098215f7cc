"""The stand-in engine itself: others rely on what it counts and on how it breaks."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import openai
import pytest

from tests.support.fake_engine import FakeEngine, Misbehaviour, Mode, answer_to, encode, next_token, render

HELLO: list[Any] = [{"role": "user", "content": "Hello there"}]


def sdk(engine: FakeEngine) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=engine.url + "/v1", api_key="none", max_retries=0)


async def stream_text(client: openai.AsyncOpenAI, **options: Any) -> tuple[str, Any]:
    """The text of a streamed answer and the last chunk."""
    text, chunk = "", None
    stream = await client.chat.completions.create(model="fake", messages=HELLO, stream=True, **options)
    async for chunk in stream:
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
    return text, chunk


async def test_answers_are_the_same_streamed_or_whole_and_as_announced() -> None:
    async with FakeEngine() as engine, sdk(engine) as client:
        whole = await client.chat.completions.create(model="fake", messages=HELLO, max_tokens=9)
        streamed, last = await stream_text(client, max_tokens=9, stream_options={"include_usage": True})
    assert whole.choices[0].message.content == streamed == answer_to(HELLO, 9)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == last.usage.completion_tokens == 9
    assert last.choices == []


async def test_usage_is_streamed_only_when_asked_for() -> None:
    async with FakeEngine() as engine, sdk(engine) as client:
        _, last = await stream_text(client, max_tokens=3)
    assert last.usage is None
    assert last.choices[0].finish_reason == "length"


async def test_answer_goes_on_exactly_from_the_ids_so_far() -> None:
    ids = encode(render(HELLO))
    async with FakeEngine() as engine, sdk(engine) as client:
        whole = await client.chat.completions.create(model="fake", messages=HELLO, max_tokens=10)
        said: list[int] = []
        for _ in range(4):
            said.append(next_token(ids + said))
        rest = await client.completions.create(model="fake", prompt=ids + said, max_tokens=6)
    assert whole.choices[0].message.content == "".join(f" t{i}" for i in said) + rest.choices[0].text


async def test_token_ids_come_as_vllm_gives_them() -> None:
    async with FakeEngine() as engine, sdk(engine) as client:
        stream = await client.chat.completions.create(
            model="fake", messages=HELLO, stream=True, max_tokens=2, extra_body={"return_token_ids": True}
        )
        chunks = [chunk.model_dump() async for chunk in stream]
    assert chunks[0]["prompt_token_ids"] == encode(render(HELLO))
    assert [len(chunk["choices"][0].get("token_ids") or []) for chunk in chunks] == [0, 1, 1]


async def test_embeddings_and_responses_are_answered() -> None:
    async with FakeEngine() as engine, sdk(engine) as client:
        vectors = await client.embeddings.create(model="fake", input=["a", "b"])
        plain = await client.embeddings.create(model="fake", input=["a", "b"], encoding_format="float")
        answer = await client.responses.create(model="fake", input="Hello", max_output_tokens=3)
        events = [event.type async for event in await client.responses.create(model="fake", input="Hello", stream=True)]
    assert vectors.data[1].embedding == pytest.approx(plain.data[1].embedding)
    assert len(answer.output_text.split()) == 3
    assert (events[0], events[-1]) == ("response.created", "response.completed")


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"model": "other", "messages": HELLO}, openai.NotFoundError),
        ({"model": "fake", "messages": HELLO, "max_tokens": 0}, openai.BadRequestError),
        ({"model": "fake", "messages": []}, openai.BadRequestError),
        ({"model": "fake", "messages": HELLO, "max_tokens": 100_000}, openai.BadRequestError),
    ],
)
async def test_mistakes_of_the_client_are_refused(body: dict[str, Any], error: type[openai.APIStatusError]) -> None:
    async with FakeEngine() as engine, sdk(engine) as client:
        with pytest.raises(error):
            await client.chat.completions.create(**body)
        assert engine.stats.started == 0


async def test_client_that_goes_away_is_counted_as_cancelled() -> None:
    async with asyncio.timeout(10), FakeEngine(tokens_per_s=50, slots=1) as engine, sdk(engine) as client:
        running = await client.chat.completions.create(model="fake", messages=HELLO, stream=True, max_tokens=2_000)
        waiting = asyncio.create_task(client.chat.completions.create(model="fake", messages=HELLO))
        await engine.until(lambda stats: (stats.running, stats.waiting) == (1, 1))
        waiting.cancel()
        await engine.until(lambda stats: stats.cancelled == 1)
        await running.close()
        await engine.until(lambda stats: stats.cancelled == 2)
        assert (engine.stats.running, engine.stats.waiting, engine.stats.finished) == (0, 0, 0)


async def raw_stream(engine: FakeEngine, **options: Any) -> tuple[int, str, bytes]:
    """Status, content type and every byte of a streamed answer."""
    body = {"model": "fake", "messages": HELLO, "stream": True, "max_tokens": 8, **options}
    async with aiohttp.ClientSession() as client, client.post(f"{engine.url}/v1/chat/completions", json=body) as response:
        return response.status, response.content_type, await response.read()


async def test_each_way_to_misbehave_is_what_it_says_and_passes() -> None:
    async with asyncio.timeout(30), FakeEngine() as engine:
        right = (await raw_stream(engine))[2]

        engine.misbehave(Misbehaviour(mode=Mode.STATUS, times=1, status=503))
        assert (await raw_stream(engine))[0] == 503
        engine.misbehave(Misbehaviour(mode=Mode.WRONG_TYPE, times=1))
        assert (await raw_stream(engine))[:2] == (200, "text/html")
        engine.misbehave(Misbehaviour(mode=Mode.CUT, times=1, after_tokens=3))
        with pytest.raises(aiohttp.ClientPayloadError):
            await raw_stream(engine)
        engine.misbehave(Misbehaviour(mode=Mode.END, times=1, after_tokens=3))
        cut = (await raw_stream(engine))[2]
        assert cut.count(b'"content": " t') == 3
        assert b"[DONE]" not in cut
        engine.misbehave(Misbehaviour(mode=Mode.ERROR_EVENT, times=1))
        assert b'data: {"error"' in (await raw_stream(engine))[2]
        engine.misbehave(Misbehaviour(mode=Mode.GARBAGE, times=1))
        assert b"\xff" in (await raw_stream(engine))[2]
        engine.misbehave(Misbehaviour(mode=Mode.GIANT_LINE, times=1))
        assert max(len(line) for line in (await raw_stream(engine))[2].split(b"\n")) > 32 << 20
        assert engine.stats.failed == 7

        engine.misbehave(Misbehaviour(mode=Mode.DRIBBLE, times=1))
        dribbled = (await raw_stream(engine))[2].replace(b": comment\r\n", b"").replace(b"\r\n", b"\n")
        assert len(dribbled) == pytest.approx(len(right), abs=50)  # request numbers differ in length

        assert b"[DONE]" in (await raw_stream(engine))[2]
        assert engine.stats.finished == 3


@pytest.mark.parametrize("mode", [Mode.HANG, Mode.STALL])
async def test_silence_lasts_until_the_client_gives_up(mode: Mode) -> None:
    async with asyncio.timeout(10), FakeEngine() as engine:
        engine.misbehave(Misbehaviour(mode=mode))
        asking = asyncio.create_task(raw_stream(engine))
        await engine.until(lambda stats: stats.running == 1)
        asking.cancel()
        await engine.until(lambda stats: stats.cancelled == 1)


async def test_it_is_steered_and_read_over_http() -> None:
    async with FakeEngine() as engine, aiohttp.ClientSession(engine.url) as client:
        await client.post("/misbehave", json={"mode": "status", "times": 1, "status": 500})
        assert (await raw_stream(engine))[0] == 500
        await client.post("/misbehave", json={"mode": "sick"})
        assert (await client.get("/health")).status == 503
        await client.post("/misbehave", data=json.dumps({}))
        assert (await client.get("/health")).status == 200
        stats = await (await client.get("/stats")).json()
        assert (stats["started"], stats["failed"]) == (1, 1)
        metrics = await (await client.get("/metrics")).text()
        assert 'vllm:num_requests_running{engine="0",model_name="fake"} 0.0' in metrics
