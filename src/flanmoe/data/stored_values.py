"""What records hold beside texts, as JSON that gives it back: for the store of examples."""

import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from datetime import date, datetime, timedelta
from datetime import time as clock_time
from decimal import Decimal
from typing import Any, cast


class NotStorableError(TypeError):
    """A value has no form in JSON that could be read back."""


# Values of parquet files and hub data sets that JSON has no word for: how each is written and read.
_FORMS: Mapping[type, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    tuple: (list, tuple),
    # Only where it has other keys than text.
    dict: (lambda value: [list(item) for item in value.items()], dict),
    bytes: (lambda value: b64encode(value).decode(), b64decode),
    datetime: (datetime.isoformat, datetime.fromisoformat),
    date: (date.isoformat, date.fromisoformat),
    clock_time: (clock_time.isoformat, clock_time.fromisoformat),
    timedelta: (
        lambda value: [value.days, value.seconds, value.microseconds],
        lambda parts: timedelta(*parts),
    ),
    Decimal: (str, Decimal),
}
_READ_BACK = {kind.__name__: read for kind, (_, read) in _FORMS.items()}
_SCALARS = frozenset({str, int, float, bool, type(None)})
_TAG = "\x00python"


def encoded(value: Any) -> Any:
    """Return a value as JSON types alone, so that `from_json` gives an equal one."""
    kind = cast("type[Any]", type(value))
    if kind in _SCALARS:
        return value
    if kind is list:
        return [encoded(item) for item in value]
    if kind is dict and all(type(name) is str for name in value) and _TAG not in value:
        return {name: encoded(item) for name, item in value.items()}
    if kind in _FORMS:
        return {_TAG: [kind.__name__, encoded(_FORMS[kind][0](value))]}
    raise NotStorableError(f"its records hold a {kind.__name__}, which has no form as text.")


def from_json(text: str) -> Any:
    """Return what `to_json` wrote of an `encoded` value."""
    return json.loads(text, object_hook=_decoded) if _TAG_TEXT in text else json.loads(text)


def _decoded(value: dict[str, Any]) -> Any:
    if _TAG not in value:
        return value
    name, written = value[_TAG]
    return cast(Any, _READ_BACK[name](written))


_TAG_TEXT = json.dumps(_TAG)


def to_json(value: Any) -> str:
    """Write an `encoded` value as JSON that any file encoding can hold."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        # Half a character in a field that nothing is made of: as an escape it can be kept.
        return json.dumps(value)
    return text
