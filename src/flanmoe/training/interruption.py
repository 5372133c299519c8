"""Ctrl-C during training: the first finishes the step and saves, the second stops at once."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

from flanmoe.core.console import say


class StopRequest:
    """Whether the user has asked the run to stop."""

    def __init__(self) -> None:
        self.is_set = False


@contextmanager
def stop_on_interrupt() -> Generator[StopRequest]:
    """Turn the first Ctrl-C inside the block into a request; the second raises KeyboardInterrupt.

    Signals reach the main thread only; in any other the request is never set.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if request.is_set:
            raise KeyboardInterrupt
        request.is_set = True
        say("Stopping after this step and saving. Press Ctrl-C again to stop at once, unsaved.")

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield request
    finally:
        signal.signal(signal.SIGINT, before)
