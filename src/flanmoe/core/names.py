"""Nearest-name hints for messages about unknown names."""

import difflib
from collections.abc import Iterable


def nearest_name_hint(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean `x`?" for the known name closest to `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean `{matches[0]}`?" if matches else ""


def listing(names: Iterable[str], *, limit: int = 12) -> str:
    """Join names for a message, in order, cut after `limit` of them."""
    quoted = [f"`{name}`" for name in names]
    if len(quoted) <= limit:
        return ", ".join(quoted)
    return ", ".join(quoted[:limit]) + f" and {len(quoted) - limit} more"
