"""Token ids taken off an engine's events: what the client sees, and what the trail says. The events are those of vLLM 0.32 and of
llama.cpp's server in xllamacpp 2026.10, recorded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesh.errors import EngineUnavailable
from mesh.link.frames import MAX_TOKENS_DATA_BYTES, MAX_TRAIL_PIECE_BYTES
from worker.engine import Task, TokenIds
from worker.engine.base import tells_token_ids
from worker.moving import trail as trails
from worker.moving.ids import WISHES, read_event
from worker.moving.tracked import Piece, TrackedEvents, join_pieces
from worker.moving.trail import Gap, Trail, hash_prompt, parse_trail

VLLM_ROLE = (
    '{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1795268373,"model":"smollm2","choices":[{"index":0,"delta":'
    '{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"prompt_token_ids":%s,"prompt_text":null}'
)
VLLM_TOKEN = (
    '{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1795268373,"model":"smollm2","choices":[{"index":0,"delta":'
    '{"content":%s},"logprobs":null,"finish_reason":null,"token_ids":%s}]}'
)
VLLM_LAST = (
    '{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1795268373,"model":"smollm2","choices":[{"index":0,"delta":'
    '{"content":%s},"logprobs":null,"finish_reason":"stop","stop_reason":null,"token_ids":%s}]}'
)
VLLM_USAGE = (
    '{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1795268373,"model":"smollm2","choices":[],'
    '"usage":{"prompt_tokens":3,"total_tokens":8,"completion_tokens":5},"system_fingerprint":"vllm-0.32.0-57c75872"}'
)
VLLM_TEXT = (
    '{"id":"cmpl-1","object":"text_completion","created":1795268374,"model":"smollm2","choices":[{"index":0,"text":%s,"logprobs":null,'
    '"finish_reason":null,"stop_reason":null,"prompt_token_ids":%s,"token_ids":%s}]}'
)
LLAMA_TOKEN = (
    '{"choices":[{"finish_reason":null,"index":0,"delta":{"content":%s}%s}],"created":1795268336,"id":"chatcmpl-2","model":"smollm2",'
    '"system_fingerprint":"b0-unknown","object":"chat.completion.chunk"%s}'
)
LLAMA_LOGPROBS = (
    ',"logprobs":{"content":[{"id":%d,"token":%s,"bytes":[159],"prob":1.0,"top_probs":[{"id":%d,"token":"]}","bytes":[159],"prob":1.0}]}]}'
)
LLAMA_TIMINGS = ',"timings":{"cache_n":35,"prompt_n":1,"prompt_ms":22.979,"predicted_n":%d,"predicted_ms":30.452}'
LLAMA_LAST = (
    '{"choices":[{"finish_reason":"length","index":0,"delta":{}}],"created":1795268336,"id":"chatcmpl-2","model":"smollm2",'
    '"system_fingerprint":"b0-unknown","object":"chat.completion.chunk"}'
)
LLAMA_USAGE = (
    '{"choices":[],"created":1795268336,"id":"chatcmpl-2","model":"smollm2","object":"chat.completion.chunk",'
    '"usage":{"completion_tokens":9,"prompt_tokens":36,"total_tokens":45,"prompt_tokens_details":{"cached_tokens":35}}}'
)
LLAMA_TEXT = (
    '{"choices":[{"text":%s,"index":0,"logprobs":%s,"finish_reason":null}],"created":1795267876,"model":"smollm2",'
    '"object":"text_completion","id":"chatcmpl-3"%s}'
)
PROMPT = [1, 9690, 198]


def sse(*events: str) -> bytes:
    return "".join(f"data: {event}\n\n" for event in events).encode()


def vllm(ids: bool) -> list[str]:
    """A whole answer, as it is with ids and as it is without."""

    def told(found: list[int]) -> str:
        return json.dumps(found, separators=(",", ":")) if ids else "null"

    return [
        VLLM_ROLE % told(PROMPT),
        VLLM_TOKEN % ('""', told([10813])),
        VLLM_TOKEN % ('"🌟"', told([230, 249])),
        VLLM_TOKEN % (json.dumps('say "token_ids":[7] '), told([7])),
        VLLM_LAST % ('""', told([2])),
        VLLM_USAGE,
        "[DONE]",
    ]


def llama(ids: bool) -> list[str]:
    def event(text: str, last: int, count: int) -> str:
        said = json.dumps(text, ensure_ascii=False)
        return LLAMA_TOKEN % (said, LLAMA_LOGPROBS % (last, said, last) if ids else "", LLAMA_TIMINGS % count if ids else "")

    return [event("🌟", 249, 3), event(" hi", 17, 4), event('"timings":{}', 18, 9), LLAMA_LAST, LLAMA_USAGE, "[DONE]"]


def read(events: TrackedEvents, data: bytes) -> list[Piece]:
    """As the gateway does."""
    usual = events.usual(data)
    return [usual] if usual is not None else events.feed(data)


def run(way: TokenIds, data: bytes, *, sizes: int = 10**9, show_usage: bool = True) -> tuple[bytes, Trail, TrackedEvents]:
    events = TrackedEvents(way, show_usage=show_usage)
    pieces = [piece for at in range(0, len(data), sizes) for piece in read(events, data[at : at + sizes])]
    pieces += events.close()
    assert all(len(trail) <= MAX_TRAIL_PIECE_BYTES and len(data) <= MAX_TOKENS_DATA_BYTES for trail, data in pieces)
    return b"".join(data for _, data in pieces), parse_trail(b"".join(trail for trail, _ in pieces)), events


@pytest.mark.parametrize("sizes", [10**9, 1, 7, 100, 333])
def test_vllms_client_sees_what_it_would_have_seen_and_the_trail_has_every_id(sizes: int) -> None:
    seen, trail, events = run(TokenIds.VLLM, sse(*vllm(True)), sizes=sizes)
    assert seen == sse(*vllm(False))
    assert trail.ids == [10813, 230, 249, 7, 2]
    assert (trail.begin.id, trail.begin.prompt_tokens, trail.begin.prompt_hash) == ("chatcmpl-1", 3, hash_prompt(PROMPT))
    assert (trail.chars, trail.settled, trail.gaps) == (1 + len('say "token_ids":[7] '), 4, [])
    assert (trail.finished, trail.usage_sent, trail.done) == (True, True, True)
    assert (events.usage.prompt, events.usage.completion, events.complete) == (3, 5, True)


@pytest.mark.parametrize("sizes", [10**9, 1, 50])
def test_llamacpps_client_sees_what_it_would_have_seen_and_the_trail_has_ids_or_gaps(sizes: int) -> None:
    seen, trail, events = run(TokenIds.LLAMACPP, sse(*llama(True)), sizes=sizes)
    plain = [
        [json.loads(event) if event != "[DONE]" else event for event in found]
        for found in ([e[6:] for e in seen.decode().split("\n\n")[:-1]], llama(False))
    ]
    assert plain[0] == plain[1]
    assert trail.ids == [0, 0, 249, 17, 0, 0, 0, 0, 18]
    assert trail.gaps == [Gap(at=0, count=3, text="🌟"), Gap(at=4, count=5, text='"timings":{}')]
    assert (trail.begin.id, trail.begin.prompt_tokens, trail.begin.prompt_hash) == ("chatcmpl-2", 36, b"")
    assert (trail.finished, trail.usage_sent, trail.done) == (True, True, True)
    assert (events.usage.prompt, events.usage.completion, events.usage.cached) == (36, 9, 35)


def test_usage_that_nobody_asked_for_is_counted_and_not_shown() -> None:
    seen, trail, events = run(TokenIds.VLLM, sse(*vllm(True)), show_usage=False)
    assert b'"usage"' not in seen
    assert (trail.usage_sent, trail.done, events.usage.completion) == (False, True, 5)


def test_completions_tell_ids_too() -> None:
    data = sse(VLLM_TEXT % ('" the"', "[6403,1980]", "[260]"), VLLM_TEXT % ('" scene"', "null", "[6621]"), "[DONE]")
    seen, trail, _ = run(TokenIds.VLLM, data)
    assert seen == sse(VLLM_TEXT % ('" the"', "null", "null"), VLLM_TEXT % ('" scene"', "null", "null"), "[DONE]")
    assert (trail.ids, trail.begin.prompt_tokens) == ([260, 6621], 2)
    logprobs = '{"content":[{"id":79,"token":"_","bytes":[95],"prob":1.0,"top_probs":[]}]}'
    seen, trail, _ = run(TokenIds.LLAMACPP, sse(LLAMA_TEXT % ('"_"', logprobs, LLAMA_TIMINGS % 1), "[DONE]"))
    assert json.loads(seen.split(b"\n\n")[0][6:]) == json.loads(LLAMA_TEXT % ('"_"', "null", ""))
    assert (trail.ids, trail.begin.prompt_tokens) == ([79], 36)


def delta(**fields: Any) -> str:
    choice = {"index": 0, "delta": fields, "logprobs": None, "finish_reason": None, "token_ids": [5]}
    return json.dumps({"id": "chatcmpl-1", "created": 1, "model": "m", "choices": [choice]})


@pytest.mark.parametrize(
    ("event", "why"),
    [
        (delta(tool_calls=[{"index": 0}]), "tools"),
        (delta(function_call={"name": "f"}), "tools"),
        (delta(reasoning_content="hm"), "reasoning"),
        (delta(reasoning="hm"), "reasoning"),
        (delta(refusal="no"), "shape"),
        (delta(audio={}), "shape"),
        ('{"choices":[{"index":0,"delta":{}},{"index":1,"delta":{}}]}', "shape"),
        ('{"choices":[{"index":1,"delta":{"content":"x"}}]}', "n"),
        ('{"choices":[{"index":0,"delta":{"content":"x"},"token_ids":["a"]}]}', "shape"),
        ('{"choices":[{"index":0,"delta":{"content":"x"},"token_ids":[-1]}]}', "shape"),
        ('{"choices":[{"index":0,"delta":{"content":"x"},"token_ids":[4294967296]}]}', "shape"),
        (VLLM_TOKEN % ('"x"', json.dumps([100_000] * 100)), "shape"),
        (VLLM_TOKEN % (json.dumps("x" * (1 << 17)), "[7]"), "shape"),
    ],
)
def test_what_cannot_be_gone_on_with_is_passed_on_and_said_in_the_trail(event: str, why: str) -> None:
    after = VLLM_TOKEN % ('"y"', "[8]")
    pieces = TrackedEvents(TokenIds.VLLM, show_usage=True)
    found = [piece for data in (sse(vllm(True)[0]), sse(event), sse(after, "[DONE]")) for piece in pieces.feed(data)]
    trail = parse_trail(b"".join(trail for trail, _ in found))
    assert (trail.fixed, trail.ids, trail.done) == (why, [], False)
    assert b"".join(data for _, data in found).endswith(sse(VLLM_TOKEN % ('"y"', "null"), "[DONE]"))
    assert pieces.complete


@pytest.mark.parametrize("event", [b"data: no JSON", b"data: {not json", b"\x00\xff\xfe garbage", b": \x80", b'data: {"id":"\xff"}'])
def test_what_is_no_answer_is_not_passed_on(event: bytes) -> None:
    events = TrackedEvents(TokenIds.VLLM, show_usage=True)
    events.feed(sse(*vllm(True)[:2]))
    with pytest.raises(EngineUnavailable):
        events.feed(event + b"\n\n")


def test_stream_whose_prompt_is_never_told_has_no_trail() -> None:
    events = TrackedEvents(TokenIds.VLLM, show_usage=True)
    found = events.feed(sse(VLLM_TOKEN % ('"y"', "[8]"), VLLM_TOKEN % ('"z"', "[9]")))
    assert b"".join(trail for trail, _ in found) == b""
    assert b"".join(data for _, data in found) == sse(VLLM_TOKEN % ('"y"', "null"), VLLM_TOKEN % ('"z"', "null"))


def test_engine_that_gives_up_in_its_stream_is_heard_and_not_passed_on() -> None:
    events = TrackedEvents(TokenIds.VLLM, show_usage=True)
    found = events.feed(sse(vllm(True)[0], '{"error":{"message":"died","code":500}}', "[DONE]"))
    assert (events.failure is not None, events.complete) == (True, False)
    assert b"error" not in b"".join(data for _, data in found)


def test_answer_without_its_proper_end_is_not_complete() -> None:
    events = TrackedEvents(TokenIds.VLLM, show_usage=True)
    events.feed(sse(*vllm(True)[:-1]))
    assert events.close() == []
    assert not events.complete


def test_crlf_and_comments_are_read() -> None:
    data = b": hello\r\n\r\n" + sse(*vllm(True)).replace(b"\n", b"\r\n")
    seen, trail, _ = run(TokenIds.VLLM, data)
    assert (trail.ids, trail.done) == ([10813, 230, 249, 7, 2], True)
    assert seen.endswith(b"data: [DONE]\n\n")


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=255), st.binary(min_size=1, max_size=3000)), max_size=80))
def test_joined_pieces_are_the_same_bytes_and_no_trail_goes_ahead_of_its_event(pieces: list[tuple[bytes, bytes]]) -> None:
    joined = join_pieces(pieces)
    assert b"".join(data for _, data in joined) == b"".join(data for _, data in pieces)
    assert b"".join(trail for trail, _ in joined) == b"".join(trail for trail, _ in pieces)
    ends = {(sum(len(t) for t, _ in pieces[:n]), sum(len(d) for _, d in pieces[:n])) for n in range(len(pieces) + 1)}
    trail_end = data_end = 0
    for trail, data in joined:
        trail_end, data_end = trail_end + len(trail), data_end + len(data)
        assert (trail_end, data_end) in ends
        assert len(trail) <= MAX_TRAIL_PIECE_BYTES
        assert len(data) <= MAX_TOKENS_DATA_BYTES


def test_long_beginning_goes_ahead_in_pieces() -> None:
    begin = trails.encode_begin(trails.Begin(id="i" * 200, model="m" * 200, created=1, prompt_tokens=1))
    joined = join_pieces([(begin, b""), (b"\x11\x01\x07", b"event")])
    assert [data for _, data in joined] == [b"", b"event"]
    assert b"".join(trail for trail, _ in joined) == begin + b"\x11\x01\x07"


@pytest.mark.parametrize("way", TokenIds)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda kids: (
            st.lists(kids, max_size=3)
            | st.dictionaries(
                st.sampled_from(["choices", "delta", "token_ids", "logprobs", "content", "id", "timings", "text", "index", "usage"]),
                kids,
                max_size=5,
            )
        ),
        max_leaves=12,
    )
)
def test_any_json_is_read_or_refused(way: TokenIds, found: Any) -> None:
    events = TrackedEvents(way, show_usage=True)
    events.feed(sse(json.dumps(found)))
    assert tells_token_ids(way, found if isinstance(found, dict) else {}) in (True, False)


def test_event_of_llamacpp_with_ids_but_no_count_is_odd() -> None:
    assert read_event(TokenIds.LLAMACPP, (LLAMA_TOKEN % ('"x"', LLAMA_LOGPROBS % (7, '"x"', 7), "")).encode(), 0).odd == "shape"


def test_tasks_have_wishes() -> None:
    assert set(WISHES) == {(way, task) for way in TokenIds for task in (Task.CHAT, Task.COMPLETIONS)}


class Slowly(TrackedEvents):
    """Parses everything."""

    def usual(self, data: bytes) -> None:
        return None

    def _several(self, data: bytes) -> None:
        return None


def read_all(events: TrackedEvents, reads: Iterable[bytes]) -> list[Any]:
    """What comes of each read, as the gateway goes about it, until the engine's answer turns out to be none."""
    found: list[Any] = []
    for data in reads:
        try:
            pieces = read(events, data)
        except EngineUnavailable as error:
            return [*found, error.message]
        found.append((b"".join(trail for trail, _ in pieces), b"".join(shown for _, shown in pieces)))
    return [*found, events.so_far, events.complete, events.failure]


def llama_event(text: str, token: str, count: str) -> str:
    return LLAMA_TOKEN % (text, LLAMA_LOGPROBS.replace("%d", "%s") % (token, text, token), LLAMA_TIMINGS.replace("%d", "%s") % count)


def llama_text(text: str, token: str, count: str) -> str:
    return LLAMA_TEXT % (
        text,
        LLAMA_LOGPROBS.replace("%d", "%s").partition(":")[2] % (token, text, token),
        LLAMA_TIMINGS.replace("%d", "%s") % count,
    )


FORMS: dict[str, tuple[TokenIds, list[str], Callable[[str, str, str], str]]] = {
    "vllm chat": (TokenIds.VLLM, [VLLM_ROLE % "[1,2]"], lambda text, token, _: VLLM_TOKEN % (text, f"[{token}]")),
    "vllm text": (TokenIds.VLLM, [VLLM_TEXT % ('"a"', "[1,2]", "[3]")], lambda text, token, _: VLLM_TEXT % (text, "null", f"[{token}]")),
    "llama chat": (TokenIds.LLAMACPP, [], llama_event),
    "llama text": (TokenIds.LLAMACPP, [], llama_text),
}
TEXTS = st.text(max_size=12).map(json.dumps) | st.text(max_size=12).map(lambda text: json.dumps(text, ensure_ascii=False))
ODD_TEXTS = [
    "",
    '"',
    '"a',
    ' "a" ',
    '"a" ',
    '"a\x01b"',
    '"a\tb"',
    '"a\nb"',
    '"a\n\nb"',
    '"a\\"',
    '"\\ud83d"',
    '"\udcff"',
    '"a"b"',
    "null",
    "5",
]
ODD_TEXTS += ['"a","content":"b"', '"x","text":"y"', '"x"},"delta":{"content":"y"', '"x","tool_calls":[{}]', '"' + "e" * 65_090 + '"']
ODD_TEXTS += [
    '"tricky\\","logprobs":null,"finish_reason":null,"token_ids":[9]"',
    '"},"logprobs":null,"finish_reason":null,"token_ids":[7]}]}',
]
ODD_TOKENS = ["", "07", "-1", "+1", " 5", "5 ", "1.0", "1e3", "5,6", "2147483647", "2147483648", "9" * 30, "null", "true", '"5"', "[5]"]
ODD_TOKENS += ["5]}]}\n\n", '5],"index":[1', "5\n", "\n5", "5\r", "5 \r\n"]


@pytest.mark.parametrize("form", FORMS)
def test_odd_text_or_id_alone_is_read_as_parsing_reads_it(form: str) -> None:
    way, before, event = FORMS[form]
    for text, token in [*((text, "7") for text in ODD_TEXTS), *(('"a"', token) for token in ODD_TOKENS)]:
        written = [*before, event('"word"', "5", "1"), event('" and"', "6", "2"), event(text, token, "3"), event('"more"', "8", "4")]
        reads = [f"data: {found}\n\n".encode("utf-8", "surrogateescape") for found in written]
        assert read_all(TrackedEvents(way, show_usage=True), reads) == read_all(Slowly(way, show_usage=True), reads)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    said=st.lists(
        st.tuples(
            TEXTS | st.sampled_from(ODD_TEXTS),
            st.integers(0, 200_000).map(str) | st.sampled_from(ODD_TOKENS),
            st.sampled_from([0, 0, 0, 0, 1, -1]),
        ),
        max_size=8,
    ),
    together=st.integers(1, 3),
    spoil=st.none() | st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 3), st.binary(max_size=3)),
    end=st.booleans(),
)
def test_quick_way_gives_what_parsing_gives(
    form: str, said: list[tuple[str, str, int]], together: int, spoil: tuple[float, int, bytes] | None, end: bool
) -> None:
    """Whatever the engine says: odd texts and ids, events in one read, bytes put in or taken out anywhere, nothing at all."""
    way, before, event = FORMS[form]
    usual = [('"word"', "5", 0), ('" and"', "6", 0), *said, ('"more"', "7", 0)]
    written = [event(text, token, str(number + off)) for number, (text, token, off) in enumerate(usual, start=1)]
    reads = [f"data: {found}\n\n".encode("utf-8", "surrogateescape") for found in [*before, *written]]
    first = len(before) + 2
    reads = reads[:first] + [b"".join(reads[at : at + together]) for at in range(first, len(reads), together)]
    if spoil is not None:
        where, gone, put = spoil
        number = first - 1 + int(where * (len(reads) - first + 1))
        at = int(where * 977 * len(reads[number])) % len(reads[number])
        reads[number] = reads[number][:at] + put + reads[number][at + gone :]
    if end:
        reads.append(b"data: [DONE]\n\n")
    assert read_all(TrackedEvents(way, show_usage=True), reads) == read_all(Slowly(way, show_usage=True), reads)


@pytest.mark.parametrize("form", FORMS)
@given(st.lists(st.tuples(TEXTS, st.integers(0, 200_000)), max_size=8), st.integers(1, 3))
def test_usual_events_go_the_quick_way(form: str, said: list[tuple[str, int]], together: int) -> None:
    way, before, event = FORMS[form]
    events = TrackedEvents(way, show_usage=True)
    for known in (*before, event('"word"', "5", "1")):
        events.feed(sse(known))
    seen = events.so_far.completion
    written = [sse(event(text, str(token), str(seen + number))) for number, (text, token) in enumerate(said, start=1)]
    for data in written:
        usual = events.usual(data)
        assert usual is not None
        assert b'"token_ids":[' not in usual[1]
        assert b'"timings":{' not in usual[1].replace(b'\\"', b"")
    assert events.so_far.completion == seen + len(said)


def test_shape_whose_values_are_not_where_they_seem_is_not_learned() -> None:
    twice = VLLM_TOKEN.replace('"delta":{"content":%s}', '"delta":{"content":"same"},"other":%s')
    for odd in (twice, VLLM_TOKEN.replace('"token_ids":%s', '"more":{"token_ids":%s},"token_ids":[5]')):
        events = TrackedEvents(TokenIds.VLLM, show_usage=True)
        reads = [sse(VLLM_ROLE % "[1,2]"), *(sse(odd % (text, "[5]")) for text in ('"same"', '"same"', '"another"'))]
        assert read_all(events, reads) == read_all(Slowly(TokenIds.VLLM, show_usage=True), reads)
        assert events.usual(sse(odd % ('"third"', "[5]"))) is None
