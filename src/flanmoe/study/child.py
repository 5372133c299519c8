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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flanmoe.core.errors import FlanmoeError, Interrupted, UserError

_STDERR = 2


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
    """

    task: str
    values: Mapping[str, Any]
    name: str
    way_out: str
    traceback_file: Path | None = None


def ask(errand: Errand) -> Any:
    """Send a child process, pass each Ctrl-C on to it once, and return its answer.

    Raises:
        FlanmoeError: what the child raised, with its exit status; or that it ended without an answer.
    """
    reading, writing = os.pipe()
    said: list[bytes] = []
    command = [sys.executable, "-m", "flanmoe.study.worker", str(writing), errand.task]
    command += [json.dumps(dict(errand.values)), str(errand.traceback_file or "")]
    # A session of its own: the terminal's Ctrl-C reaches only us, and the child gets exactly one. Its stdin
    # tells the child when we are gone, so that a killed study leaves no orphan writing on.
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=_STDERR,
        start_new_session=True,
        pass_fds=(writing,),
    ) as child:
        os.close(writing)
        # In a thread, where no Ctrl-C can come between reading and keeping.
        reader = threading.Thread(target=lambda: said.append(_read(reading)), daemon=True)
        reader.start()
        status = _wait(child)
        reader.join()
    return _outcome(errand, status, b"".join(said))


def _read(descriptor: int) -> bytes:
    with open(descriptor, "rb") as stream:
        return stream.read()


def _wait(child: "subprocess.Popen[bytes]") -> int:
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            child.send_signal(signal.SIGINT)


def _outcome(errand: Errand, status: int, said: bytes) -> Any:
    try:
        answer: Any = json.loads(said)
    except ValueError:
        raise _without_answer(errand, status) from None
    if "message" in answer:
        kind = {2: UserError, 130: Interrupted}.get(answer["exit_code"], FlanmoeError)
        raise kind(answer["message"] or _stopped(errand))
    return answer["value"]


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
