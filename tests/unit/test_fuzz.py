"""Every parser that strangers or malicious members can reach, fuzzed a little: the corpus, and a sample. `scripts/fuzz` does millions."""

from __future__ import annotations

import pytest

from tests.support.fuzz import TARGETS, Report, read_corpus, run_target, try_one

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
