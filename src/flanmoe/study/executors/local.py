"""Legs as child processes of this machine."""

import signal
import subprocess
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from flanmoe.study.child import Watch, ask
from flanmoe.study.executor import Leg, errand


class LocalExecutor:
    """A pool of child processes.

    Args:
        workers: how many run at a time.
        watch: takes what they print; without one they print to our stderr.
    """

    remote = False

    def __init__(self, workers: int = 1, watch: Watch | None = None) -> None:
        self.workers = workers
        self.watch = watch
        self._pool = ThreadPoolExecutor(max_workers=workers)
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._interrupted = False

    def start(self, leg: Leg) -> "Future[None]":
        """Start a child process for the leg, as soon as one of the pool's places is free."""
        return self._pool.submit(self._run, leg)

    def _run(self, leg: Leg) -> None:
        mine: list[subprocess.Popen[bytes]] = []

        def started(child: "subprocess.Popen[bytes]") -> None:
            mine.append(child)
            with self._lock:
                self._running.add(child)
                stop = self._interrupted
            if stop:
                child.send_signal(signal.SIGINT)

        try:
            ask(errand(leg), watch=self.watch, started=started)
        finally:
            with self._lock:
                self._running.difference_update(mine)

    def interrupt(self) -> None:
        """Interrupt every child once."""
        with self._lock:
            self._interrupted = True
            running = list(self._running)
        for child in running:
            with suppress(ProcessLookupError):
                child.send_signal(signal.SIGINT)

    def close(self) -> None:
        """Let the threads of the pool end."""
        self._pool.shutdown()
