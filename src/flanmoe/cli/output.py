"""What a verb says: JSON for machines on stdout, everything else on stderr."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

from flanmoe.core.errors import UserError

Emit = Callable[[Any], None]


class Refusal(UserError):
    """Something that went wrong about which machines are told more than the sentence.

    Args:
        message: the sentence.
        told: what `--json` prints with it, in one object.
        exit_code: the exit status; that of a user's mistake unless given.
    """

    def __init__(
        self, message: str, told: Mapping[str, Any], *, exit_code: int = UserError.exit_code
    ) -> None:
        super().__init__(message)
        self.told = dict(told)
        self.exit_code = exit_code


@contextmanager
def machine_output(enabled: bool) -> Iterator[Emit]:
    """Keep stdout for one JSON object, whatever libraries print meanwhile.

    While the block runs, Python's stdout and file descriptor 1 point at stderr, so that prints of C code
    land there too. The function that is yielded writes its argument to the real stdout when `enabled`, and
    does nothing else.
    """
    if not enabled:
        yield lambda value: None
        return
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
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
