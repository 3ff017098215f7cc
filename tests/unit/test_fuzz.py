"""Every parser that strangers or malicious members can reach, fuzzed a little: the corpus, and a sample. `scripts/fuzz` does millions."""

from __future__ import annotations

import pytest

from tests.support.fuzz import TARGETS, Keys, Records, Report, read_corpus, run_target, try_one

SAMPLE = {"keys": 700, "records": 2000, "tokens": 700, "frames": 4000, "engines": 3000, "bodies": 5000}


@pytest.mark.parametrize("name", TARGETS)
def test_corpus_holds(name: str) -> None:
    target, report = TARGETS[name](), Report(target=name, seed=0)
    inputs = read_corpus()[name]
    for data in inputs:
        try_one(target, data, report)
    assert report.holes == []
    assert len(report.outcomes) > len(inputs) * 0.8, "the inputs are refused for reasons of their own"


@pytest.mark.parametrize("name", TARGETS)
def test_sample_holds(name: str) -> None:
    report = run_target(name, count=SAMPLE[name], seed=20261121)
    assert report.holes == []
    assert report.count >= SAMPLE[name]
    assert len(report.outcomes) >= 3


def test_flipped_bits_and_every_cut_of_what_is_signed_are_refused() -> None:
    records, keys = Records(), Keys()
    for kind, good in records._good.items():
        signed = good[0]
        step = 1 if kind == b"r" else 9  # every bit of a record; of the others every ninth, each byte in another place
        places = (divmod(place, 8) for place in range(0, 8 * len(signed), step))
        flips = (signed[:at] + bytes((signed[at] ^ 1 << bit,)) + signed[at + 1 :] for at, bit in places)
        cuts = (signed[:at] for at in range(len(signed)))
        longer = (signed + bytes(1), b"\x01" + signed, signed * 2, bytes(100_000))
        for spoilt in (*flips, *cuts, *longer):
            assert ": " in records.run(kind + spoilt), "refused, and for a reason"
    text = keys._good[0].encode()
    for spoilt in (*(text[:at] for at in range(len(text))), text + b"x", text * 2, b"im_" + b"z" * 5000, text[:-6] + b"000000"):
        assert ": " in keys.run(spoilt)
