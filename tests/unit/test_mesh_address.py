"""HOST:PORT, from people and from peers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.address import Address, parse_address, reachable_host
from mesh.errors import UsageError


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("mesh.example.org:7600", "mesh.example.org", 7600),
        ("localhost:1", "localhost", 1),
        ("192.0.2.1:65535", "192.0.2.1", 65535),
        ("[2001:db8::1]:7600", "2001:db8::1", 7600),
        ("gpu_1.lan:80", "gpu_1.lan", 80),
    ],
)
def test_address_reads_back_as_written(text: str, host: str, port: int) -> None:
    assert parse_address(text) == Address(host, port)
    assert str(parse_address(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", ":80", "host", "host:", "host:0", "host:65536", "host:-1", "host:8o", "host:80:80", "a:٣", "a" * 300 + ":80"),
        *("::1:80", "[::1]", "[::1]80", "[x]:80", "[::1%eth0]:80x", "256.1.1.1:80", "1.2.3:80"),
        *("-a:80", "a b:80", "http://a:80", "a/b:80"),
    ],
)
def test_anything_else_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        parse_address(text)


def test_port_may_have_a_default() -> None:
    assert parse_address("a.example", default_port=7600) == Address("a.example", 7600)
    assert parse_address("[::1]", default_port=7600) == Address("::1", 7600)
    with pytest.raises(UsageError):
        parse_address("a.example:", default_port=7600)


@given(st.text(max_size=60))
def test_arbitrary_text_raises_nothing_but_a_usage_error(text: str) -> None:
    try:
        address = parse_address(text)
    except UsageError:
        return
    assert parse_address(str(address)) == address


def test_bound_address_is_its_own_answer_and_a_wildcard_is_not() -> None:
    assert reachable_host("127.0.0.1") == "127.0.0.1"
    assert reachable_host("0.0.0.0") not in ("", "0.0.0.0")
