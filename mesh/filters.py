"""``latency>1000ms and not status=ok``: a small language to choose records by. Pure; a parser, and nothing is ever evaluated.

::

    either  = both { "or" both }
    both    = single { "and" single }
    single  = "not" single | "(" either ")" | field operator value
    operator: =  !=  >  >=  <  <=  ~ (contains)
    value: a number, a time (250ms, 1.5s, 2m), a word, or text in quotes
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from mesh.errors import UsageError
from mesh.settings import parse_duration_s

MAX_CHARS = 1000
MAX_DEPTH = 32

Test = Callable[[Mapping[str, Any]], bool]
_TOKEN = re.compile(r"""\s*(?:(?P<sign>\(|\)|!=|>=|<=|==|=|>|<|~)|"(?P<double>[^"]*)"|'(?P<single>[^']*)'|(?P<word>[^\s()=!<>~"']+))""")
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}


def parse_filter(text: str, *, numbers: Mapping[str, str], texts: Mapping[str, str]) -> Test:
    """From a filter to what it asks of a record. Raises `UsageError`, which says where it went wrong.

    ``numbers`` and ``texts`` give, for each field's name in the language, its name in a record; one that ends in ``_ms`` takes times.
    """
    if len(text) > MAX_CHARS:
        raise UsageError(f"a filter has at most {MAX_CHARS} characters")
    return _Parser(_tokens(text), numbers, texts).parse()


def _tokens(text: str) -> list[tuple[str, str]]:
    """Kind (``sign``, ``word`` or ``text``) and value of each."""
    found, at = [], 0
    text = text.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise UsageError(f"the filter cannot be read from here on: {text[at : at + 20]}")
        kind = match.lastgroup or ""
        found.append(("text" if kind in ("double", "single") else kind, match[kind]))
        at = match.end()
    return found


class _Parser:
    def __init__(self, tokens: list[tuple[str, str]], numbers: Mapping[str, str], texts: Mapping[str, str]) -> None:
        self._tokens = tokens
        self._numbers = numbers
        self._texts = texts
        self._at = 0

    def parse(self) -> Test:
        test = self._either(0)
        if self._at < len(self._tokens):
            raise UsageError(f"the filter goes on after its end: {self._tokens[self._at][1]}")
        return test

    def _either(self, depth: int) -> Test:
        test = self._both(depth)
        while self._takes("or"):
            test = _or(test, self._both(depth))
        return test

    def _both(self, depth: int) -> Test:
        test = self._single(depth)
        while self._takes("and"):
            test = _and(test, self._single(depth))
        return test

    def _single(self, depth: int) -> Test:
        if depth > MAX_DEPTH:
            raise UsageError("the filter is nested too deeply")
        if self._takes("not"):
            inner = self._single(depth + 1)
            return lambda record: not inner(record)
        if self._takes("("):
            test = self._either(depth + 1)
            if not self._takes(")"):
                raise UsageError("the filter lacks a closing parenthesis")
            return test
        return self._comparison()

    def _comparison(self) -> Test:
        kind, name = self._next("a field")
        if kind != "word" or (name not in self._numbers and name not in self._texts):
            raise UsageError(f"the filter knows no field '{name}'; there are {', '.join(sorted([*self._numbers, *self._texts]))}")
        _, sign = self._next(f"= != > >= < <= or ~ after '{name}'")
        kind, value = self._next(f"a value after '{name}{sign}'")
        if kind == "sign":
            raise UsageError(f"the filter lacks a value after '{name}{sign}'")
        if sign == "~" and name in self._texts:
            field = self._texts[name]
            return lambda record: value in record[field]
        compare = _COMPARE.get(sign)
        if compare is None or (name in self._texts and sign not in ("=", "==", "!=")):
            raise UsageError(f"'{name}' takes {'= != ~' if name in self._texts else '= != > >= < <='}, not '{sign}'")
        if name in self._texts:
            field = self._texts[name]
            return lambda record: compare(record[field], value)
        field, number = self._numbers[name], _number(name, value, is_time=self._numbers[name].endswith("_ms"))
        return lambda record: compare(record[field], number)

    def _takes(self, value: str) -> bool:
        if self._at < len(self._tokens) and self._tokens[self._at][0] != "text" and self._tokens[self._at][1] == value:
            self._at += 1
            return True
        return False

    def _next(self, wanted: str) -> tuple[str, str]:
        if self._at >= len(self._tokens):
            raise UsageError(f"the filter ends where it needs {wanted}")
        self._at += 1
        return self._tokens[self._at - 1]


def _number(name: str, text: str, *, is_time: bool) -> float:
    try:
        if is_time and not re.fullmatch(r"\d+(\.\d+)?", text):
            return parse_duration_s(text) * 1000
        number = float(text)
        if number == number:
            return number
    except (UsageError, ValueError):
        pass
    raise UsageError(f"'{name}' is compared with {'a time such as 250ms or 2s' if is_time else 'a number'}, not '{text}'")


def _or(one: Test, other: Test) -> Test:
    return lambda record: one(record) or other(record)


def _and(one: Test, other: Test) -> Test:
    return lambda record: one(record) and other(record)
