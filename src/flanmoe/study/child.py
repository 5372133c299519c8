"""A child process that does one thing and answers over a pipe.

What loads torch runs in one, so that `flanmoe run` itself stays small beside its worker, and each child's
memory is its own. What a child prints goes to stderr. The answer takes a pipe and not a file: the disk may
be full, which is then the very thing to be said.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from flanmoe.core.console import Progressed
from flanmoe.core.errors import DiskError, FlanmoeError, Interrupted, UserError

_STDERR = 2
# The last line of what a child writes into the pipe; those before it are of how far it has come.
_PROGRESS = "progress"


class Watch(Protocol):
    """Who shows what a child says, where the screen is not the child's own."""

    def said(self, line: str) -> None:
        """Take one line that the child printed."""
        ...

    def progressed(self, name: str, progress: Progressed) -> None:
        """Take how far a long step of a child has come; `name` is its errand's."""
        ...

    def ended(self, name: str) -> None:
        """Take note that a child has ended."""
        ...


@dataclass(frozen=True, slots=True)
class Errand:
    """What a child process is sent to do.

    Attributes:
        task: its name in `worker`.
        values: arguments by name, as JSON types.
        name: how messages call it, at the start of a sentence.
        way_out: what the user can do when the process was killed.
        traceback_file: where the traceback of an unexpected error goes; None keeps it to
            FLANMOE_TRACEBACK.
        environment: variables that the child has beside ours; None takes one away.
    """

    task: str
    values: Mapping[str, Any]
    name: str
    way_out: str
    traceback_file: Path | None = None
    environment: Mapping[str, str | None] = field(default_factory=dict)


def ask(
    errand: Errand,
    *,
    watch: Watch | None = None,
    started: Callable[["subprocess.Popen[bytes]"], None] | None = None,
) -> Any:
    """Send a child process, pass each Ctrl-C on to it once, and return its answer.

    Args:
        errand: what it does.
        watch: takes what the child prints; without one it prints to our stderr.
        started: is given the process. Ctrl-C only arrives in the main thread, so who asks in another one
            passes it on.

    Raises:
        FlanmoeError: what the child raised, with its exit status; or that it ended without an answer.
    """
    reading, writing = os.pipe()
    said: list[Mapping[str, Any]] = []
    watched = "watched" if watch else ""
    command = [sys.executable, "-m", "flanmoe.study.worker", str(writing), errand.task]
    command += [json.dumps(dict(errand.values)), str(errand.traceback_file or ""), watched]
    # A session of its own: the terminal's Ctrl-C reaches only us, and the child gets exactly one. Its stdin
    # tells the child when we are gone, so that a killed study leaves no orphan writing on.
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE if watch else _STDERR,
        stderr=subprocess.STDOUT if watch else None,
        start_new_session=True,
        pass_fds=(writing,),
        env=_environment(errand.environment),
    ) as child:
        os.close(writing)
        if started is not None:
            started(child)
        # In threads, where no Ctrl-C can come between reading and keeping.
        jobs: list[Callable[[], None]] = [lambda: _read(reading, said, errand.name, watch)]
        if watch is not None:
            jobs.append(lambda: _pass_lines_on(child, watch))
        readers = [threading.Thread(target=job, daemon=True) for job in jobs]
        for reader in readers:
            reader.start()
        status = _wait(child)
        for reader in readers:
            reader.join()
    if watch is not None:
        watch.ended(errand.name)
    return _outcome(errand, status, said)


def _environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    values = {**os.environ, **changes}
    return {name: value for name, value in values.items() if value is not None}


def _read(descriptor: int, said: list[Mapping[str, Any]], name: str, watch: Watch | None) -> None:
    with open(descriptor, encoding="utf-8") as stream:
        for line in stream:
            try:
                value: Any = json.loads(line)
            except ValueError:
                # A child that was killed in the middle of a line has not answered.
                return
            if _PROGRESS not in value:
                said.append(value)
            elif watch is not None:
                watch.progressed(name, Progressed(**value[_PROGRESS]))


def _pass_lines_on(child: "subprocess.Popen[bytes]", watch: Watch) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        # Bars of other libraries redraw their line; the last state is the one to keep.
        text = line.decode("utf-8", errors="replace").rstrip("\n").rpartition("\r")[2]
        if text.strip():
            watch.said(text)


def _wait(child: "subprocess.Popen[bytes]") -> int:
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            child.send_signal(signal.SIGINT)


def _outcome(errand: Errand, status: int, said: list[Mapping[str, Any]]) -> Any:
    if not said:
        raise _without_answer(errand, status)
    answer = said[-1]
    if "message" in answer:
        raise as_error({**answer, "message": answer["message"] or _stopped(errand)})
    return answer["value"]


def as_error(answer: Mapping[str, Any]) -> FlanmoeError:
    """Return the error that `message`, `exit_code` and `on_disk` of an answer stand for."""
    if answer.get("on_disk"):
        return DiskError(answer["message"])
    kind = {2: UserError, 130: Interrupted}.get(answer["exit_code"], FlanmoeError)
    return kind(answer["message"])


def as_answer(error: FlanmoeError) -> dict[str, Any]:
    """Return an error as an answer; see `as_error`."""
    return {
        "message": str(error),
        "exit_code": error.exit_code,
        "on_disk": isinstance(error, DiskError),
    }


def _without_answer(errand: Errand, status: int) -> FlanmoeError:
    if status in (130, -signal.SIGINT):
        return Interrupted(_stopped(errand))
    cause = (
        f"signal {-status} ({signal.strsignal(-status)})" if status < 0 else f"exit status {status}"
    )
    return FlanmoeError(
        f"{errand.name} ended with {cause} before its process could say why. {errand.way_out}"
    )


def _stopped(errand: Errand) -> str:
    return f"{errand.name} was stopped by Ctrl-C."
