"""Numbers as people read them."""

import math
import statistics
from collections.abc import Sequence


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; NaN of nothing."""
    return statistics.fmean(values) if values else math.nan


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation; None below two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def size(count: float | None) -> str:
    """Bytes in decimal units."""
    if count is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def number(value: float) -> str:
    """A count with a short suffix."""
    for limit, suffix in ((1e9, " bn"), (1e6, " M"), (1e3, " k")):
        if value >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.0f}"


def seconds(value: float | None) -> str:
    """A time span."""
    if value is None:
        return "–"
    if value < 10:
        return f"{value:.1f} s"
    if value < 100:
        return f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def percent(share: float) -> str:
    """A share of one in per cent: to one decimal, or to two digits where that says more."""
    value = 100 * share
    return f"{value:.1f} %" if value >= 1 or value == 0 else f"{value:.2g} %"


def metric(value: float | None, spread_: float | None = None) -> str:
    """A metric to three decimals, with its spread."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.3f}" + (f" ± {spread_:.3f}" if spread_ is not None else "")


def rate(value: float | None) -> str:
    """A learning rate."""
    if value is None:
        return "–"
    text = (
        f"{value:.0e}" if f"{value:.0e}" == f"{value:.1e}".replace(".0e", "e") else f"{value:.1e}"
    )
    return text.replace("e-0", "e-").replace("e+0", "e")
