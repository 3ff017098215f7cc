"""PROTOCOL.md says what the code does: every frame, every error code, every HTTP status, every limit it names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import mesh
from mesh.apikey import APIKEY_DOMAIN, MAX_KEY_CHARS
from mesh.dht.documents import HISTORY, Answer
from mesh.dht.exchange import INLINE_BYTES
from mesh.dht.protocol import MAX_KEYS, Op
from mesh.documents import DOCUMENT_DOMAIN, MAX_BODY_BYTES, MAX_KIND_CHARS, MAX_NAME_CHARS, MAX_PROJECT_CHARS
from mesh.envelope import MAX_ENVELOPE_BYTES, read_unverified
from mesh.errors import MeshError
from mesh.identity import ALPN
from mesh.invite import INVITE_DOMAIN
from mesh.link.allowance import BURST, BYTES, COSTS, LATE_BYTES, PER_S
from mesh.link.errors import MAX_MESSAGE_CHARS, encode_error, parse_error
from mesh.link.frames import MAX_PAYLOAD_BYTES, Frame
from mesh.link.link import MAX_INCOMING_STREAMS, WINDOW_BYTES
from mesh.link.peers import PROTOCOL_VERSION, LinkConfig
from mesh.membership import MAX_MEMBERSHIP_BYTES, MEMBERSHIP_DOMAIN
from mesh.orders import MAX_ORDER_BYTES, MAX_REASON_CHARS, ORDER_DOMAIN, ORDER_LIFE_S, Action
from mesh.receipts import RECEIPTS_DOMAIN
from mesh.records import MAX_RECORD_BYTES, RECORD_DOMAIN, State
from mesh.trust import KEYSET_DOMAIN, Purpose, Role
from proxy.openai import TASKS
from proxy.respond import STATUS, status_of

PROTOCOL = (Path(mesh.__file__).parent / "PROTOCOL.md").read_text(encoding="utf-8")
VECTORS = Path(__file__).parent / "vectors" / "frames.json"


def section(title: str) -> str:
    """The text under a heading, up to the next of its level or above."""
    match = re.search(rf"^(#+) {title}\n(.*?)(?=^#{{1,3}} |\Z)", PROTOCOL, re.DOTALL | re.MULTILINE)
    assert match, title
    return match[2]


def rows(text: str) -> list[list[str]]:
    """The cells of each row of the tables in a text, heads left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rules = [index for index, row in enumerate(cells) if set(row[0]) == {"-"}]
    return [row for index, row in enumerate(cells) if index not in rules and index + 1 not in rules]


def errors(root: type[MeshError] = MeshError) -> Iterator[type[MeshError]]:
    if root.__module__ == MeshError.__module__:
        yield root
    for kind in root.__subclasses__():
        yield from errors(kind)


def test_every_frame_has_its_row_and_its_vector() -> None:
    documented = [(int(number), name.strip("`")) for number, name, *_ in rows(section("Frames"))]
    assert documented == [(int(kind), kind.name) for kind in Frame]
    vectors = json.loads(VECTORS.read_text(encoding="utf-8"))
    assert {(vector["number"], vector["type"]) for vector in vectors} == set(documented)


def test_streams_of_vectors_are_where_their_rows_say() -> None:
    on_link = {name.strip("`"): stream == "0" for _, name, stream, *_ in rows(section("Frames"))}
    for vector in json.loads(VECTORS.read_text(encoding="utf-8")):
        assert (vector["stream"] == 0) == on_link[vector["type"]]


def test_every_error_that_reaches_a_client_has_its_row() -> None:
    table = {row[0].strip("`"): row for row in rows(section("Errors"))}
    told = {kind.code: kind for kind in errors() if status_of(kind("x"))[0] != 500 or kind is MeshError}
    assert set(table) == set(told)
    for code, kind in told.items():
        status, name = status_of(kind("x"))
        crosses = type(parse_error(encode_error(kind("x")))) is kind
        assert table[code][1:4] == [str(status), f"`{name}`", "yes" if crosses else "no"]


def test_every_status_a_proxy_answers_with_is_in_the_table() -> None:
    documented = {(int(row[1]), row[2].strip("`")) for row in rows(section("Errors"))}
    assert documented == set(STATUS.values())


@pytest.mark.parametrize("kind", list(errors()), ids=lambda kind: kind.code)
def test_every_error_code_is_documented(kind: type[MeshError]) -> None:
    assert f"`{kind.code}`" in section("Errors")


@pytest.mark.parametrize(
    ("title", "said"),
    [
        ("Envelope", f"{MAX_ENVELOPE_BYTES:,} bytes"),
        *(
            ("Envelope", f"`{domain}`")
            for domain in (
                KEYSET_DOMAIN,
                MEMBERSHIP_DOMAIN,
                RECORD_DOMAIN,
                APIKEY_DOMAIN,
                INVITE_DOMAIN,
                DOCUMENT_DOMAIN,
                ORDER_DOMAIN,
                RECEIPTS_DOMAIN,
            )
        ),
        ("Envelope", f"{MAX_MEMBERSHIP_BYTES} bytes"),
        ("Envelope", f"{MAX_ORDER_BYTES} bytes"),
        ("Envelope", f"`{ORDER_DOMAIN}`"),
        *(("Order", f"`{action}`") for action in Action),
        ("Order", f"at most {2 * ORDER_LIFE_S:.0f} s apart"),
        ("Order", f"at most {MAX_REASON_CHARS}"),
        ("Control payloads", f"`order` bytes, at most {MAX_ORDER_BYTES}"),
        ("Envelope", f"{MAX_RECORD_BYTES:,} bytes"),
        ("Document", f"bytes, at most {MAX_BODY_BYTES:,}"),
        ("Document", f"printable text, 1 to {MAX_KIND_CHARS}"),
        ("Document", f"printable text, at most {MAX_NAME_CHARS}"),
        ("Document", f"printable text, at most {MAX_PROJECT_CHARS}"),
        ("Directory", f"at most {INLINE_BYTES} bytes"),
        ("Directory", f"each of at most {HISTORY} versions"),
        ("Directory", f"at most {MAX_KEYS} keys"),
        ("API key", f"{MAX_KEY_CHARS:,} characters"),
        *(("Keyset", f"`{purpose}`") for purpose in Purpose),
        *(("Membership", f"`{role}`") for role in Role),
        *(("Record", f"`{state}`") for state in State),
        ("Link", f"`{ALPN}`"),
        ("Frames", f"{MAX_PAYLOAD_BYTES:,} bytes"),
        ("Streams and credit", f"{WINDOW_BYTES:,} bytes"),
        ("Streams and credit", f"{MAX_INCOMING_STREAMS:,} streams"),
        ("Streams and credit", f"{LATE_BYTES:,} bytes"),
        ("Streams and credit", f"{BURST:,.0f} at once, {PER_S:,.0f} more"),
        ("Streams and credit", f"count as {COSTS[Frame.OPEN]:g}, HELLO and RECORD as {COSTS[Frame.RECORD]:g}"),
        ("Streams and credit", f"{BYTES} bytes of payload"),
        ("Control payloads", f"(this page: {PROTOCOL_VERSION})"),
        ("Control payloads", f"{MAX_MESSAGE_CHARS:,}\ncharacters"),
        *(("Control payloads", f"`{task}`") for task in TASKS.values()),
        ("Liveness", f"{LinkConfig().silent_s:g} s"),
        ("Liveness", f"{LinkConfig().handshake_s:g} s"),
    ],
)
def test_what_is_said_is_so(title: str, said: str) -> None:
    assert said in section(title)


def test_fields_of_control_payloads_are_those_of_the_vectors() -> None:
    text = section("Control payloads")
    for vector in json.loads(VECTORS.read_text(encoding="utf-8")):
        for name in vector.get("fields", ()):
            assert f"`{name}`" in text, (vector["type"], name)


def test_every_field_of_a_document_has_its_row() -> None:
    vector = json.loads((VECTORS.parent / "document.json").read_text(encoding="utf-8"))
    assert {row[0].strip("`") for row in rows(section("Document"))} == set(read_unverified(bytes.fromhex(vector["document"])).payload)


def test_every_request_of_the_directory_has_its_row() -> None:
    documented = [(int(number), name.strip("`")) for number, name, *_ in rows(section("Directory"))]
    assert documented == [(int(op), op.name) for op in Op]


@pytest.mark.parametrize("answer", list(Answer), ids=lambda answer: answer.name)
def test_every_answer_to_an_offer_is_documented(answer: Answer) -> None:
    assert re.search(rf"\b{int(answer)} [a-z]", section("Directory").partition("Answers to")[2])


def test_links_of_the_page_lead_somewhere() -> None:
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line.lstrip("#").strip().lower()).replace(" ", "-") for line in PROTOCOL.splitlines() if line[:1] == "#"
    }
    assert set(re.findall(r"\]\(#([a-z0-9-]+)\)", PROTOCOL)) <= headings
