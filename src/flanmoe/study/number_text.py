"""Number formats: counts, sizes, times, shares, differences and p-values as a reader sees them."""

from collections.abc import Sequence
from typing import Literal

# The two scores that every report knows.
Metric = Literal["loss", "accuracy"]

_MINUTES_A_DAY = 24 * 60
_DAYS_A_YEAR = 365.25
_SUFFIXES = ("", " k", " M", " G", " T", " P", " E")


def exact(number: int) -> str:
    """Format a count in full: 134,515,008."""
    return f"{number:,}"


def short(number: float) -> str:
    """Format a count to four digits with a suffix: 134.5 M. Below 1000 it stays as it is."""
    magnitude = float(number)
    for suffix in _SUFFIXES:
        # Compared after rounding, so that 999,960 reads 1.000 M and not 1000 k.
        if abs(float(f"{magnitude:.4g}")) < 1000 or suffix == _SUFFIXES[-1]:
            break
        magnitude /= 1000
    return f"{number:g}" if not suffix else f"{magnitude:#.4g}{suffix}"


def size(num_bytes: int) -> str:
    """Format a size in GiB, small ones in MiB."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Format seconds: 8.4 s, 5 min 12 s, 2 h 05 min, 12.5 days, 340 years."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    if minutes < _MINUTES_A_DAY:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    days = minutes / _MINUTES_A_DAY
    if days < 2 * _DAYS_A_YEAR:
        return f"{days:,.1f} days"
    return f"{days / _DAYS_A_YEAR:,.0f} years"


def percent(share: float, digits: int = 1) -> str:
    """Format a share between 0 and 1."""
    return f"{100 * share:.{digits}f} %"


def signed(number: float, digits: int) -> str:
    """Format with its sign, minus as a minus sign, and no sign at zero."""
    text = f"{number:+.{digits}f}".replace("-", "\N{MINUS SIGN}")
    return text[1:] if not float(f"{number:.{digits}f}") else text


def ratio_text(arm: float, baseline: float) -> str:
    """Format how many times the baseline something is: 2.10×."""
    return f"{arm / baseline:.2f}×" if baseline else "n/a"


def listed(words: Sequence[str], *, most: int | None = None) -> str:
    """Join words: a, b and c. Of more than `most` the first ones: a, b and 7 more."""
    if most is not None and len(words) > most:
        words = (*words[:most], f"{exact(len(words) - most)} more")
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def difference_unit(metric: Metric) -> str:
    """Unit that differences of a metric are shown in."""
    return "nats per token" if metric == "loss" else "percentage points"


def difference_scale(metric: Metric) -> float:
    """Factor that turns a difference into its shown unit."""
    return 1.0 if metric == "loss" else 100.0


def p_text(p_value: float) -> str:
    """Format a p-value."""
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"
