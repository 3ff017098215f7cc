"""Going on where another worker's trail ends: what is asked of the engine, what its answer becomes, and what is refused."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mesh.errors import EngineUnavailable, InvalidRequest, NotResumed, Overloaded
from tests.support import fake_engine
from worker.engine import ModelSpec, Task, TokenIds
from worker.moving import trail as trails
from worker.moving.resume import Continuation, ResumedEvents, StopFilter, Trailed, continuation, not_resumed
from worker.moving.trail import Begin, hash_prompt, parse_trail

MESSAGES = [{"role": "user", "content": "Say something"}]
PROMPT = fake_engine.encode(fake_engine.render(MESSAGES))
BEGIN = Begin(id="chatcmpl-1", model="theirs", created=7, prompt_tokens=len(PROMPT), prompt_hash=hash_prompt(PROMPT))


@dataclass
class Engine:
    """Implements `worker.moving.spoken.Ask`: the stand-in engine's tokenizer, without its server. It shows special tokens as servers do."""

    split: bool = False
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    instead: dict[str, dict[str, Any]] = field(default_factory=dict)

    async def __call__(self, path: str, fields: dict[str, Any]) -> dict[str, Any]:
        self.asked.append((path, fields))
        if path in self.instead:
            return self.instead[path]
        match path:
            case "/tokenize":
                text = fake_engine.render(fields["messages"]) if "messages" in fields else fields.get("prompt", fields.get("content"))
                return {"tokens": fake_engine.encode(text)}
            case "/apply-template":
                return {"prompt": fake_engine.render(fields["messages"])}
        text = spoken(fields["tokens"], split=self.split)
        return {"prompt": text, "content": text}


SPECIAL = (
    {13: "<|end|>", 14: "<|user|>", 15: "<|is_a_third_one|>"} | {token: f"<|{'x' * token}|>" for token in range(100, 140)} | {140: "<6>"}
)


def spoken(ids: list[int], *, split: bool = False, special: bool = True) -> str:
    runs = groupby(ids, key=lambda token: token in SPECIAL)
    texts = (
        "".join(SPECIAL[token] for token in run) * special if hidden else fake_engine.speak(list(run), split=split) for hidden, run in runs
    )
    return "".join(texts)


def model(way: TokenIds | None = TokenIds.VLLM, context_tokens: int | None = 4096) -> ModelSpec:
    return ModelSpec(name="m", engine_name="inner", tasks=frozenset(Task), token_ids=way, context_tokens=context_tokens)


def trailed(records: bytes, *, begin: Begin = BEGIN, **body: Any) -> Trailed:
    asked = {"model": "m", "messages": MESSAGES, "stream": True, "max_tokens": 10, **body}
    return Trailed(parse_trail(trails.encode_begin(begin) + records), json.dumps(asked).encode())


def said(*ids: int, held: int = 0, split: bool = False) -> bytes:
    """The records of an answer of these ids, the last ``held`` characters of which have not been sent."""
    out, before = b"", 0
    for n in range(1, len(ids) + 1):
        text = fake_engine.speak(list(ids[:n]), split=split)
        after = before if text.endswith("\ufffd") else max(before, len(text) - held)
        out += trails.encode_event(after - before, ids[n - 1 : n])
        before = after
    return out


async def go_on(given: Trailed, engine: Engine | None = None, spec: ModelSpec | None = None, task: Task = Task.CHAT) -> Continuation:
    return await continuation(given, task, spec or model(), "inner", engine or Engine())


# -- what is asked of the engine


async def test_engine_is_asked_for_the_rest_of_the_answer() -> None:
    given = trailed(said(5, 6, 7), temperature=0, seed=3, user="u", stop_token_ids=[9], stream_options={"include_usage": False})
    going_on = await go_on(given)
    request = json.loads(going_on.request())
    assert request == {
        "model": "inner",
        "prompt": [*PROMPT, 5, 6, 7],
        "max_tokens": 7,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "temperature": 0,
        "seed": 3,
        "stop_token_ids": [9],
    }
    assert (going_on.ids, going_on.held) == ([5, 6, 7], "")


@pytest.mark.parametrize(
    ("body", "context", "left"),
    [({"max_tokens": None}, 100, 100 - len(PROMPT) - 3), ({"max_tokens": 90}, 50, 50 - len(PROMPT) - 3), ({"max_tokens": 3}, 100, 0)],
)
async def test_answer_may_have_what_is_left(body: dict[str, Any], context: int, left: int) -> None:
    assert (await go_on(trailed(said(5, 6, 7), **body), spec=model(context_tokens=context))).left == left


async def test_vllm_without_a_known_context_needs_a_limit() -> None:
    with pytest.raises(NotResumed, match="context"):
        await go_on(trailed(said(5), max_tokens=None), spec=model(context_tokens=None))
    assert (await go_on(trailed(said(5), max_tokens=None), spec=model(TokenIds.LLAMACPP, None))).left is None


async def test_tokens_that_brought_no_text_are_made_again() -> None:
    going_on = await go_on(trailed(said(5, 6, 910, split=True)), Engine(split=True))
    assert (going_on.ids, going_on.held, going_on.left) == ([5, 6], "", 8)


async def test_text_held_back_for_a_stop_string_is_known_from_the_ids() -> None:
    going_on = await go_on(trailed(said(5, 6, 7, held=4), stop="never"))
    assert (going_on.ids, going_on.held) == ([5, 6, 7], "6 t7")
    half = await go_on(trailed(said(5, 6, 910, held=4, split=True), stop="never"), Engine(split=True))
    assert (half.ids, half.held) == ([5, 6], "5 t6")


@pytest.mark.parametrize(
    "events",
    [
        [[5], [13], [6], [14], [15], [7]],
        [[13], [5], [13], [6], [13], [7]],
        [[5, 13, 6], [7, 14, 14, 8], [9, 13, 13, 15, 10]],
        [[5], [910], [13], [6]],
        [[5, 910], [960, 13, 6, 14], [7]],
        [[5], [6, 13], [910]],
        *[
            [[token] for pair in zip(range(200, 240), range(100, 100 + hidden), strict=False) for token in pair] + [[240]]
            for hidden in (1, 2, 32)
        ],
    ],
)
@pytest.mark.parametrize("stop", [None, ["never"], ["a stop"]])
async def test_special_tokens_are_known_by_what_the_text_is_longer_by_than_what_clients_got(events: list[list[int]], stop: Any) -> None:
    """Whether the engine tells them one by one, or several tokens at a time."""
    shown, text, so_far, records = 0, "", list[int](), b""
    for ids in events:
        for token in ids:
            so_far.append(token)
            whole = spoken(so_far, split=True, special=False)
            text = text if whole.endswith("\ufffd") else whole
        now = max(shown, len(text) - (len(stop[0]) - 1 if stop else 0))
        records += trails.encode_event(now - shown, ids)
        shown = now
    given = trailed(records, stop=stop)
    going_on = await go_on(given, Engine(split=True))
    got = spoken(going_on.ids, split=True, special=False)
    assert text.startswith(got)
    assert going_on.held == got[shown:], "nothing is said that an undisturbed answer had not shown"
    if not stop:
        assert going_on.ids == so_far[: len(going_on.ids)]
        assert len(got) == shown


async def test_llamacpp_renders_the_template_and_tokenizes_its_text() -> None:
    engine = Engine()
    begin = Begin(id="i", model="m", created=1, prompt_tokens=len(PROMPT))
    going_on = await go_on(trailed(said(5, 6), begin=begin), engine, model(TokenIds.LLAMACPP))
    assert going_on.prompt_ids == PROMPT
    assert [path for path, _ in engine.asked[:2]] == ["/apply-template", "/tokenize"]
    assert engine.asked[1][1]["add_special"] is True


async def test_of_several_tokens_that_might_be_the_hidden_one_any_will_do_where_all_text_is_out() -> None:
    going_on = await go_on(trailed(trails.encode_event(12, [5, 140, 6, 7, 8])))
    assert (going_on.ids, going_on.held) == ([5, 140, 6, 7, 8], "")


async def test_text_from_the_beginning_of_a_stop_string_on_is_held_as_llamacpp_holds_it() -> None:
    going_on = await go_on(trailed(said(5, 6, held=2), stop=["t6 and more", "t"]))
    assert (going_on.ids, going_on.held) == ([5, 6], "t6")


async def test_before_a_client_has_got_anything_all_is_made_again() -> None:
    going_on = await go_on(trailed(said(5, 13, 6, held=99), stop="x" * 100))
    assert (going_on.ids, going_on.held, going_on.left) == ([], "", 10)


async def test_gap_is_filled_by_its_text() -> None:
    records = said(5) + trails.encode_gap(6, 2, 7, " t6 t7")
    going_on = await go_on(
        trailed(records, begin=Begin(id="i", model="m", created=1, prompt_tokens=len(PROMPT))), spec=model(TokenIds.LLAMACPP)
    )
    assert going_on.ids == [5, 6, 7]


@pytest.mark.parametrize("prompt", ["Once upon a time", [4, 5, 6]])
async def test_prompt_of_a_completion(prompt: Any) -> None:
    ids = prompt if isinstance(prompt, list) else fake_engine.encode(prompt)
    begin = Begin(id="i", model="m", created=1, prompt_tokens=len(ids), prompt_hash=hash_prompt(ids))
    body = json.dumps({"model": "m", "prompt": prompt, "stream": True}).encode()
    given = Trailed(parse_trail(trails.encode_begin(begin) + said(5)), body)
    going_on = await go_on(given, task=Task.COMPLETIONS)
    assert (going_on.prompt_ids, going_on.left) == (ids, 15), "vLLM's own limit is 16"


# -- what is refused


@pytest.mark.parametrize(
    ("given", "engine", "spec"),
    [
        (trailed(said(5), begin=Begin(id="i", model="m", created=1, prompt_tokens=99)), Engine(), model()),
        (trailed(said(5), begin=Begin(id="i", model="m", created=1, prompt_tokens=len(PROMPT), prompt_hash=b"x" * 8)), Engine(), model()),
        (trailed(said(5) + trails.encode_event(1, [6])), Engine(), model()),
        (trailed(said(5) + trails.encode_event(100, [6])), Engine(), model()),
        (trailed(trails.encode_event(4, [])), Engine(), model()),
        (trailed(said(5, 6, 7, held=6), stop=" t6 t"), Engine(), model()),
        (trailed(said(5, 6, 7, held=2), stop=" t6 t"), Engine(), model()),
        (trailed(trails.encode_event(4, [5, 13, 14])), Engine(), model()),
        (trailed(trails.encode_event(9 * 3 + 3 * 4, [*range(1, 10), 13, *range(20, 23)])), Engine(), model()),
        (trailed(trails.encode_event(8, [5, 140, 6, 7, 8]), stop="never"), Engine(), model()),
        (trailed(b"".join(trails.encode_event(3, [token % 5, token]) for token in range(100, 133))), Engine(), model()),
        (trailed(said(5) + trails.encode_gap(6, 3, 7, " t6 t7")), Engine(), model()),
        (trailed(said(5) + trails.encode_gap(6, 2, 8, " t6 t7")), Engine(), model()),
        (trailed(said(5) + trails.encode_fixed("reasoning")), Engine(), model()),
        (trailed(said(5), tools=[{"type": "function"}]), Engine(), model()),
        (trailed(said(5)), Engine(), model(None)),
        (trailed(said(5)), Engine(instead={"/tokenize": {}}), model()),
        (trailed(said(5)), Engine(instead={"/tokenize": {"tokens": ["a"]}}), model()),
        (trailed(said(5)), Engine(instead={"/tokenize": {"tokens": [-1]}}), model()),
        (trailed(said(5)), Engine(instead={"/detokenize": {}}), model()),
        (trailed(said(5)), Engine(instead={"/detokenize": {"prompt": "always the same"}}), model()),
    ],
)
async def test_what_would_not_be_exact_is_refused(given: Trailed, engine: Engine, spec: ModelSpec) -> None:
    with pytest.raises(NotResumed):
        await go_on(given, engine, spec)


def test_engines_refusal_is_not_the_clients_mistake() -> None:
    assert isinstance(not_resumed(InvalidRequest("Token id 999999 is out of vocabulary")), NotResumed)
    assert isinstance(not_resumed(Overloaded("full")), Overloaded)


# -- what becomes of the engine's answer


def completion(text: str, ids: list[int], finish: str | None = None) -> str:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish, "token_ids": ids}
    return json.dumps({"id": "cmpl-9", "object": "text_completion", "created": 9, "model": "inner", "choices": [choice]})


USAGE = json.dumps(
    {"id": "cmpl-9", "choices": [], "usage": {"prompt_tokens": 99, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 64}}}
)


def sse(*events: str) -> bytes:
    return "".join(f"data: {event}\n\n" for event in events).encode()


def parsed(data: bytes) -> list[Any]:
    return [event if event == "[DONE]" else json.loads(event) for event in (part[6:] for part in data.decode().split("\n\n") if part)]


async def resumed(
    given: Trailed, *pieces: bytes, task: Task = Task.CHAT, engine: Engine | None = None
) -> tuple[list[Any], bytes, ResumedEvents]:
    going_on = await continuation(given, task, model(), "inner", engine or Engine())
    events = ResumedEvents(going_on)
    found = events.begin()
    for piece in pieces:
        found += events.feed(piece)
    found += events.close() if pieces else []
    return parsed(b"".join(data for _, data in found)), b"".join(trail for trail, _ in found), events


async def test_answer_goes_on_in_the_clients_shape_and_ends_once() -> None:
    given = trailed(said(5, 6), stream_options={"include_usage": True})
    data = sse(completion(" t7", [7]), completion(" t8", [8], "length"), USAGE, "[DONE]")
    told, trail, events = await resumed(given, data)
    names = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 7, "model": "theirs"}
    assert all({name: event[name] for name in names} == names for event in told[:-1])
    assert [event["choices"] for event in told[:-2]] == [
        [{"index": 0, "delta": {"content": " t7"}, "logprobs": None, "finish_reason": None}],
        [{"index": 0, "delta": {"content": " t8"}, "logprobs": None, "finish_reason": None}],
        [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}],
    ]
    prompt = len(PROMPT)
    usage = {
        "prompt_tokens": prompt,
        "total_tokens": prompt + 4,
        "completion_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": prompt},
    }
    assert told[-2]["usage"] == usage
    assert told[-1] == "[DONE]"
    assert (events.usage.prompt, events.usage.completion, events.usage.resumed, events.usage.cached) == (prompt + 2, 2, 2, 64)
    whole = parse_trail(trails.encode_begin(BEGIN) + said(5, 6) + trail)
    assert (whole.ids, whole.chars, whole.done) == ([5, 6, 7, 8], 12, True)


async def test_trail_of_what_was_made_again_replaces_it() -> None:
    before = said(5, 910, split=True)
    data = sse(completion("", [911]), completion(" \U0001f600", [951]), completion(" t7", [7], "stop"), "[DONE]")
    _, trail, _ = await resumed(trailed(before), data, engine=Engine(split=True))
    assert parse_trail(trails.encode_begin(BEGIN) + before + trail).ids == [5, 911, 951, 7]


async def test_nothing_left_to_compute_needs_no_engine() -> None:
    told, _, events = await resumed(trailed(said(5, 6), max_tokens=2))
    assert events.over
    assert [event["choices"][0]["finish_reason"] for event in told[:-1]] == ["length"]
    told, _, events = await resumed(trailed(said(5, 6) + trails.FINISH, stream_options={"include_usage": True}))
    assert events.over
    assert ([event["usage"]["completion_tokens"] for event in told[:-1]], told[-1]) == ([2], "[DONE]")
    told, _, events = await resumed(trailed(said(5, 6) + trails.FINISH + trails.USAGE, stream_options={"include_usage": True}))
    assert told == ["[DONE]"]
    told, _, events = await resumed(trailed(said(5, 6) + trails.FINISH + trails.DONE))
    assert (told, events.over, events.complete) == ([], True, True)


@pytest.mark.parametrize("shown", [False, True])
async def test_stop_string_across_the_cut_ends_the_answer(shown: bool) -> None:
    held = 0 if shown else 5
    body: dict[str, Any] = {
        "stop": [" t6 t7"],
        "include_stop_str_in_output": shown,
        "max_tokens": 9,
        "stream_options": {"include_usage": True},
    }
    told, _, events = await resumed(trailed(said(5, 6, held=held), **body), sse(completion(" t7", [7]), completion(" t8", [8])))
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in told[:-2])
    sent = len(" t5 t6") - held
    assert (" t5 t6"[:sent] + text) == (" t5 t6 t7" if shown else " t5")
    assert told[-3]["choices"][0]["finish_reason"] == "stop"
    assert told[-2]["usage"]["completion_tokens"] == 3
    assert events.over, "the engine is not listened to any longer"


@pytest.mark.parametrize(
    "event", ["nonsense", '{"choices":[]}', '{"choices":[{"index":1}]}', '{"choices":[{"text":"x","token_ids":["a"]}]}']
)
async def test_engine_that_answers_nonsense_is_not_believed(event: str) -> None:
    with pytest.raises(EngineUnavailable):
        await resumed(trailed(said(5)), sse(event))


async def test_engine_that_ends_without_a_reason_is_not_believed() -> None:
    with pytest.raises(EngineUnavailable):
        await resumed(trailed(said(5)), sse(completion(" t7", [7]), "[DONE]"))
    _, _, events = await resumed(trailed(said(5)), sse(completion(" t7", [7])))
    assert not events.complete


async def test_engine_that_gives_up_is_heard() -> None:
    told, _, events = await resumed(trailed(said(5)), sse('{"error":{"message":"died"}}', "[DONE]"))
    assert (told, events.failure is not None, events.complete) == ([], True, False)


TEXT = st.text(alphabet="ab\n", max_size=24)


@given(
    TEXT, st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3), st.lists(st.integers(1, 5), max_size=30), st.booleans()
)
@example("aab", ["ab"], [1, 1], False)
def test_stop_filter_gives_the_same_whatever_the_pieces(text: str, stops: list[str], sizes: list[int], shown: bool) -> None:
    pieces, rest = [], text
    for size in sizes:
        pieces.append(rest[:size])
        rest = rest[size:]
    stop = StopFilter(tuple(stops), shown=shown)
    out = "".join(stop.feed(piece) for piece in [*pieces, rest])
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(found) for found in stops)]
    if not ends:
        assert not stop.stopped
        assert out + stop.flush() == text
        return
    assert stop.stopped
    assert stop.flush() == ""
    assert text.startswith(out)
    assert any(out.endswith(found) for found in stops) if shown else not any(found in out for found in stops)


def test_every_cut_of_an_answer_goes_on_to_the_same_text() -> None:
    """The stand-in's own answer, cut after each token, in the trail as it would be and gone on with."""
    ids = fake_engine.continue_ids(PROMPT, 10, split=True)

    async def run() -> None:
        for cut in range(len(ids) + 1):
            before = said(*ids[:cut], split=True)
            going_on = await go_on(trailed(before), Engine(split=True))
            again = fake_engine.continue_ids(going_on.prompt_ids + going_on.ids, 10 - len(going_on.ids), split=True)
            assert going_on.ids + again == ids
            assert going_on.left == len(again)

    asyncio.run(run())
