"""Takes out of a text what looks like a secret or leads to a person: mail addresses, telephone and card numbers, keys and passwords. Pure.

By patterns, not by understanding: names and addresses of streets stay, and now and then a harmless number goes. Where in doubt it goes.

Texts come from strangers, and a match holds the interpreter's lock as long as it runs. So every pattern takes time in proportion to the
text (what repeats is possessive or bounded), and long texts are looked at a window at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

WINDOW = 2 * 1024
_PEM_BEGIN, _PEM_END = "-----BEGIN ", "-----END "
LONG = 12
"""The shortest key that is known by its prefix."""

_NAMES = r"pass(?:word|wd|phrase)?|pwd|secret|token|(?:api|access|secret|private)[_-]?key"
_NAME = re.compile(rf"(?i)(?:[a-z]{{1,16}}[_-])?(?:{_NAMES})")
_NAMED = re.compile(
    rf"(?i)(?<![a-z0-9])(?P<name>{_NAMES})"
    r"(?P<sign>[\"']?\s{0,4}[:=]\s{0,4}[\"']?)[^\s\"',;]{4,}+"
)
_PREFIXED = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:sk|pk|rk|im|imjoin|gh[oprsu]|github_pat|glpat|hf|npm|xox[abeprs]|SG)[-_.][A-Za-z0-9_.-]{12,}+"
    r"|(?:AKIA|ASIA)[A-Z0-9]{12,}+|AIza[A-Za-z0-9_-]{20,}+|eyJ[A-Za-z0-9_-]{8,}+(?:\.[A-Za-z0-9_-]*+){1,2}+)"
)
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s{1,4}[a-z0-9._~+/=-]{12,}+")
_EMAIL = re.compile(r"(?<![\w.%+-])[\w.%+-]++@\w[\w-]*+(?:\.[\w-]++)++")
_CARD = re.compile(r"(?<!\d)\d(?:[ -]?\d){12,18}(?!\d)")
_SEVEN = re.compile(r"\d(?:[ ()./-]{0,2}\d){6}")
_PHONE = re.compile(r"(?<![\w.])(?:\+|00)?\(?\d(?:[ ()./-]{0,2}\d){6,14}(?![\w])")
_RANDOM = re.compile(r"(?<![A-Za-z0-9+/_=-])[A-Za-z0-9+/_=-]{32,}+")


def redact(text: str) -> str:
    """The text with ``[email]``, ``[phone]``, ``[card]`` and ``[key]`` in place of what was there."""
    return "".join(map(_redact_window, _windows(_without_pem(text))))


def names_secret(name: str) -> bool:
    """Whether what goes by this name is a secret, whatever it looks like."""
    return _NAME.fullmatch(name) is not None


def _redact_window(text: str) -> str:
    """Most of a text holds nothing of the kind, which searching for plain words tells at a tenth of a pattern's price."""
    lower = text.lower()
    if any(word in lower for word in ("pass", "pwd", "secret", "token", "key")):
        text = _NAMED.sub(r"\g<name>\g<sign>[key]", text)
    if "bearer" in lower or "basic" in lower:
        text = _BEARER.sub(r"\1 [key]", text)
    if "@" in text:
        text = _EMAIL.sub("[email]", text)
    if max(map(len, text.split()), default=0) >= LONG:
        text = _RANDOM.sub(_random, _PREFIXED.sub("[key]", text))
    if _SEVEN.search(text) is not None:
        text = _PHONE.sub(_phone, _CARD.sub(_card, text))
    return text


def _card(match: re.Match[str]) -> str:
    digits = [int(char) for char in match[0] if char.isdigit()]
    windows = (digits[at : at + size] for size in range(13, 20) for at in range(len(digits) - size + 1))
    return "[card]" if any(map(_luhn, windows)) else match[0]


def _luhn(digits: list[int]) -> bool:
    """ISO/IEC 7812-1, annex B."""
    doubled = (2 * digit - 9 * (digit > 4) for digit in digits[-2::-2])
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _phone(match: re.Match[str]) -> str:
    """Seven digits after a plus or 00, else nine. One point alone makes a decimal number."""
    text = match[0]
    digits = sum(map(str.isdigit, text))
    decimal = text.count(".") == 1 and text.replace(".", "").isdigit()
    return text if decimal or digits < (7 if text.startswith(("+", "00")) else 9) else "[phone]"


def _random(match: re.Match[str]) -> str:
    """A long word of letters and digits; one with slashes may be a path, unless it has small and capital letters."""
    text = match[0]
    mixed = any(map(str.isdigit, text)) and any(map(str.isalpha, text))
    return "[key]" if mixed and ("/" not in text or not (text.islower() or text.isupper())) else text


def _without_pem(text: str) -> str:
    """Private keys as they stand in files; one without an end takes the rest along."""
    if _PEM_BEGIN not in text:
        return text
    kept, at = [], 0
    while (begin := text.find(_PEM_BEGIN, at)) >= 0:
        kept.append(text[at:begin] + "[key]")
        end = text.find(_PEM_END, begin)
        at = len(text) if end < 0 else _end_of_line(text, end)
    return "".join([*kept, text[at:]])


def _end_of_line(text: str, at: int) -> int:
    end = text.find("-----", at + len(_PEM_END))
    return len(text) if end < 0 else end + 5


def _windows(text: str) -> Iterator[str]:
    """Parted in the middle of nothing, between two words, where there is such a place."""
    at = 0
    while len(text) - at > WINDOW:
        cut = at + WINDOW
        space = text.rfind(" ", at + WINDOW // 2, cut)
        while space > 0 and not _between_words(text, space):
            space = text.rfind(" ", at + WINDOW // 2, space)
        cut = space + 1 if space > 0 else cut
        yield text[at:cut]
        at = cut
    yield text[at:]


def _between_words(text: str, space: int) -> bool:
    return text[space - 1].isalpha() and text[space + 1].isalpha() and not text[space - 6 : space].lower().endswith(("bearer", "basic"))
