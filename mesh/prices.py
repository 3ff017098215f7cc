"""Prices: what tokens and GPU time cost, from when on. Pure, and in whole numbers throughout.

Prices are in millionths of the currency (micro), per million tokens or per GPU-hour. So a token at a price of p micro costs p · 10⁻¹² of
the currency: costs are counted in those, exactly, and add up the same in any order. Only a stretch of GPU time is rounded, once, when its
receipt is priced.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from typing import Any

from mesh.errors import UsageError
from mesh.receipts import Kind
from mesh.usage import Charge

KIND, NAME = "prices", "prices"
"""The document they are kept in."""
ANY = "*"
"""The model whose price holds for those that have none."""
MICRO = 10**6
COST_DIGITS = 12
MAX_MICRO = 10**15
MAX_PERIODS = 400
MAX_MODELS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPrice:
    """Micro per million tokens."""

    input: int = 0
    cached: int = 0
    output: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Period:
    """What holds from ``since`` (wall-clock seconds) until the next period."""

    since: int
    models: Mapping[str, TokenPrice] = field(default_factory=dict)
    gpu_hour: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceList:
    """``currency`` as in ISO 4217; periods from the earliest on."""

    currency: str
    periods: tuple[Period, ...] = ()

    def at(self, moment_ms: int) -> Period | None:
        """What holds at a moment."""
        return next((period for period in reversed(self.periods) if period.since * 1000 <= moment_ms), None)

    def cost(self, charge: Charge) -> int | None:
        """In 10⁻¹² of the currency; None without a price."""
        period = self.at(charge.at)
        if charge.kind == Kind.UPTIME:
            if not charge.gpus:
                return 0
            hourly = None if period is None else period.gpu_hour.get(charge.model, period.gpu_hour.get(ANY))
            # micro · 10⁶ a GPU-hour over 3.6 · 10⁶ ms, to the nearest
            return None if hourly is None else (charge.took_ms * charge.gpus * hourly * 5 + 9) // 18
        if not charge.prompt and not charge.completion:
            return 0
        price = None if period is None else period.models.get(charge.model, period.models.get(ANY))
        if price is None:
            return None
        return (charge.prompt - charge.cached) * price.input + charge.cached * price.cached + charge.completion * price.output


def with_price(prices: PriceList, since: int, model: str, *, tokens: TokenPrice | None = None, gpu_hour: int | None = None) -> PriceList:
    """The list with a model's price changed from ``since`` (wall-clock seconds) on, in the periods that come after it too."""
    former = prices.at(since * 1000)
    begun = Period(since=since) if former is None else replace(former, since=since)
    later = [period for period in prices.periods if period.since > since]
    changed = [
        replace(
            period,
            models=dict(period.models) | ({model: tokens} if tokens is not None else {}),
            gpu_hour=dict(period.gpu_hour) | ({model: gpu_hour} if gpu_hour is not None else {}),
        )
        for period in (begun, *later)
    ]
    earlier = [period for period in prices.periods if period.since < since]
    return replace(prices, periods=(*earlier, *changed))


def encode_prices(prices: PriceList) -> bytes:
    """A document's body."""
    periods = [
        {
            "from": period.since,
            "models": {
                name: {"input": price.input, "cached": price.cached, "output": price.output} for name, price in period.models.items()
            },
            "gpu_hour": dict(period.gpu_hour),
        }
        for period in prices.periods
    ]
    return json.dumps({"currency": prices.currency, "periods": periods}, sort_keys=True, ensure_ascii=False).encode()


def parse_prices(body: bytes) -> PriceList:
    """From a document's body. Raises `UsageError`."""
    try:
        told = json.loads(body)
        currency, periods = told["currency"], told["periods"]
        if not isinstance(currency, str) or not currency.isalpha() or not currency.isascii() or len(currency) != 3:
            raise ValueError("a currency is three letters")
        if len(periods) > MAX_PERIODS:
            raise ValueError("too many periods")
        parsed = tuple(sorted((_parse_period(period) for period in periods), key=lambda period: period.since))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"this is no list of prices: {type(error).__name__}: {error}") from None
    return PriceList(currency=currency.upper(), periods=parsed)


def _parse_period(told: Mapping[str, Any]) -> Period:
    models, hours = told.get("models", {}), told.get("gpu_hour", {})
    if len(models) > MAX_MODELS or len(hours) > MAX_MODELS:
        raise ValueError("too many models")
    return Period(
        since=_whole(told["from"], 10**11),
        models={
            str(name): TokenPrice(**{kind: _whole(price.get(kind, 0), MAX_MICRO) for kind in ("input", "cached", "output")})
            for name, price in models.items()
        },
        gpu_hour={str(name): _whole(price, MAX_MICRO) for name, price in hours.items()},
    )


def _whole(value: Any, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{value!r:.40} is not a whole number up to {most}")
    return value


def parse_amount(text: str) -> int:
    """``0.15`` → 150,000 micro. Raises `UsageError`: nothing is rounded."""
    try:
        micro = Decimal(text.strip()) * MICRO
        if micro.is_finite() and micro == micro.to_integral_value() and 0 <= micro <= MAX_MICRO:
            return int(micro)
    except (InvalidOperation, ValueError):
        pass
    raise UsageError(f"'{text[:40]}' is not a price: a number like 0.15, with at most six decimals")


def show_micro(micro: int) -> str:
    """150,000 → ``0.15``."""
    return _decimal(micro, 6)


def show_cost(cost: int) -> str:
    """A cost in 10⁻¹² of the currency, exactly."""
    return _decimal(cost, COST_DIGITS)


def due(cost: int, decimals: int = 2) -> str:
    """A sum rounded to what can be paid, half up: once, on the whole of a statement."""
    unit = 10 ** (COST_DIGITS - decimals)
    rounded = (cost + unit // 2) // unit
    whole, rest = divmod(rounded, 10**decimals)
    return f"{whole}.{rest:0{decimals}}" if decimals else str(whole)


def _decimal(amount: int, digits: int) -> str:
    whole, rest = divmod(amount, 10**digits)
    decimals = f"{rest:0{digits}}".rstrip("0").ljust(2, "0")
    return f"{whole}.{decimals}"
