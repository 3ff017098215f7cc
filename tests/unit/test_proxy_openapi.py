"""The proxy's own description: what is read of a body is in it, with its bounds, and nothing that is the engine's."""

from __future__ import annotations

import json

from proxy.access import ACCESS
from proxy.openapi import describe_api

TASK_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")


def test_every_body_is_described_with_what_the_proxy_reads_of_it() -> None:
    document = describe_api([("POST", path) for path in TASK_PATHS])
    chat = document["components"]["schemas"]["ChatRequest"]
    assert chat["required"] == ["model", "messages"]
    assert chat["properties"]["stream"] == {"type": ["boolean", "null"]}
    assert chat["properties"]["max_tokens"]["maximum"] == 2**31 - 1
    assert chat["properties"]["tools"] == {}
    assert json.dumps(document)
    assert chat["properties"]["n"] == {"type": ["integer", "null"], "minimum": 1, "maximum": 2**31 - 1}


def test_every_route_has_its_answers_and_says_whether_it_takes_a_key() -> None:
    document = describe_api(ACCESS)
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert {"200", "400", "404", "405", "408", "431", "500", "503"} <= set(operation["responses"]), (method, path)
            takes_key = "security" not in operation or {"key": []} in operation["security"]
            assert ("401" in operation["responses"]) == takes_key, (method, path)
