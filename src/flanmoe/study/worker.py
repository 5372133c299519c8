"""The child's side of `child`: `python -m flanmoe.study.worker DESCRIPTOR TASK VALUES TRACEBACK_FILE WATCHED`.

Whatever goes wrong is answered as one sentence and an exit status, for the parent to raise again.
"""

import importlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from flanmoe.core import files
from flanmoe.core.console import tell_progress_to
from flanmoe.core.errors import DiskError, FlanmoeError, unexpected
from flanmoe.study.child import as_answer

# Imported by name once we are ready for Ctrl-C: most of them load torch, which takes seconds.
_TASKS = {
    "prepare": ("flanmoe.study.prepare", "prepare"),
    "prepare_quickstart": ("flanmoe.study.prepare", "prepare_quickstart"),
    "run_leg": ("flanmoe.study.leg", "run_leg"),
    "report": ("flanmoe.study.outcome", "rebuild_report"),
}
_STOPPED = 130


def main(arguments: list[str]) -> int:
    """Do one task, answer on the descriptor, and return the exit status."""
    descriptor, task, values, traceback_file, watched = arguments
    threading.Thread(target=die_with_parent, daemon=True).start()
    answer: dict[str, Any] = {}
    # A parent that is gone has nobody to tell; line by line, because it shows how far we are.
    with (
        suppress(BrokenPipeError),
        open(int(descriptor), "w", encoding="utf-8", buffering=1) as stream,
    ):
        if watched:
            tell_progress_to(lambda progress: _write(stream, {"progress": asdict(progress)}))
        answer = _answer(task, json.loads(values), Path(traceback_file) if traceback_file else None)
        _write(stream, answer)
    return answer.get("exit_code", 0)


def _write(stream: TextIO, value: Mapping[str, Any]) -> None:
    with suppress(BrokenPipeError):
        stream.write(json.dumps(value) + "\n")


def die_with_parent() -> None:
    """Interrupt this process when its stdin closes, which it does when the parent is gone."""
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGINT)


def _answer(task: str, values: Mapping[str, Any], traceback_file: Path | None) -> dict[str, Any]:
    try:
        module, name = _TASKS[task]
        return {"value": getattr(importlib.import_module(module), name)(**values)}
    except KeyboardInterrupt:
        return {"message": "", "exit_code": _STOPPED}
    except FlanmoeError as error:
        return as_answer(error)
    except Exception as error:
        return {"message": _unexpected(error, traceback_file), "exit_code": 1}


def _unexpected(error: Exception, traceback_file: Path | None) -> str:
    """Keep the traceback of the error in hand, and say where."""
    if os.environ.get("FLANMOE_TRACEBACK"):
        traceback.print_exc()
    if traceback_file is None:
        return unexpected(error)
    try:
        files.write_text(traceback_file, traceback.format_exc())
    except DiskError as full:
        return unexpected(error, way_out=str(full))
    return unexpected(error, way_out=f"The details are in {traceback_file}; please report it.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
