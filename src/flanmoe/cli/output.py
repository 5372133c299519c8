"""What a verb says: JSON for machines on stdout, everything else on stderr."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Emit = Callable[[Any], None]


@contextmanager
def machine_output(enabled: bool) -> Iterator[Emit]:
    """Keep stdout for one JSON object, whatever libraries print meanwhile.

    While the block runs, file descriptor 1 points at stderr, so that prints of C code land there too. The
    function that is yielded writes its argument to the real stdout when `enabled`, and does nothing else.
    """
    if not enabled:
        yield lambda value: None
        return
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)
    try:
        yield lambda value: _write(real, value)
    finally:
        sys.stdout.flush()
        os.dup2(real, 1)
        os.close(real)


def _write(descriptor: int, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    view = memoryview(text.encode())
    while view:
        view = view[os.write(descriptor, view) :]
