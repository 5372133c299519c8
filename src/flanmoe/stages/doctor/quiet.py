"""What libraries print, log, warn and draw, kept away from the person who asked something else."""

import os
import sys
import tempfile
import warnings
from collections.abc import Generator
from contextlib import contextmanager, redirect_stderr, redirect_stdout


@contextmanager
def quiet() -> Generator[None]:
    """Send everything that is printed inside the `with` block into a file that is thrown away.

    File descriptors 1 and 2 as well, which C code writes to, and warnings of Python. Errors pass.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    try:
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as sink:
            for descriptor in (1, 2):
                os.dup2(sink.fileno(), descriptor)
            with (
                redirect_stdout(sink),
                redirect_stderr(sink),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                yield
            sink.flush()
    finally:
        for descriptor, before in zip((1, 2), kept, strict=True):
            os.dup2(before, descriptor)
            os.close(before)
