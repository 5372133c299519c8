"""Legs as tasks of Ray: on this machine, or on a cluster whose nodes see the study's folder.

Ray is an optional dependency (`pip install 'flanmoe[ray]'`). RAY_ADDRESS names a cluster; without it Ray is
started here for as long as the study runs. A task sends the same child process as `LocalExecutor`, with as many
threads, so numbers are the same.
"""

import importlib
import importlib.util
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import closing
from dataclasses import replace
from typing import Any

from flanmoe.core.errors import ConfigError, FlanmoeError, Interrupted, UserError
from flanmoe.study.child import as_answer, as_error
from flanmoe.study.executor import Leg
from flanmoe.study.executors.local import LocalExecutor
from flanmoe.study.leg import is_taken
from flanmoe.study.nodes import STAGES_FOLDER

_ADDRESS = "RAY_ADDRESS"
# Nothing large is handed over, so Ray's store of objects can be small.
_OBJECT_STORE_BYTES = 100 * 2**20
_SECONDS_BETWEEN_LOOKS = 0.2


class RayExecutor:
    """Legs as Ray tasks.

    Args:
        workers: how many run at a time.

    Raises:
        ConfigError: if Ray is not installed.
    """

    # Ray itself waits for a node that has the memory.
    remote = True

    def __init__(self, workers: int = 1) -> None:
        if importlib.util.find_spec("ray") is None:
            raise ConfigError(
                "`--executor ray` needs the package `ray`, but it is not installed. Run "
                "`pip install 'flanmoe[ray]'`, or leave the option out."
            )
        self.workers = workers
        self._ray: Any = None
        self._running: list[Any] = []

    def start(self, leg: Leg) -> "Future[None]":
        """Hand the leg to Ray, which runs it on a node with enough memory; without one it fails at once."""
        future: Future[None] = Future()
        ray = self._started()
        if refusal := _refusal(leg, ray.nodes()):
            future.set_exception(refusal)
            return future
        task = ray.remote(num_cpus=1, memory=leg.memory_bytes, max_retries=0)(_run)
        # A node of the cluster has another working folder.
        data_dir = None if leg.data_dir is None else leg.data_dir.absolute()
        running = task.remote(replace(leg, study_dir=leg.study_dir.absolute(), data_dir=data_dir))
        self._running.append(running)
        threading.Thread(target=_settle, args=(ray, running, leg, future), daemon=True).start()
        return future

    def _started(self) -> Any:
        if self._ray is None:
            ray = importlib.import_module("ray")
            # As many places as workers, whatever the number of cores: legs share these out among themselves.
            here = {"num_cpus": self.workers, "object_store_memory": _OBJECT_STORE_BYTES}
            ray.init(include_dashboard=False, **({} if _ADDRESS in os.environ else here))
            self._ray = ray
        return self._ray

    def interrupt(self) -> None:
        """Cancel every task once, which raises KeyboardInterrupt in it."""
        for running in self._running:
            self._ray.cancel(running)

    def close(self) -> None:
        """Leave Ray."""
        if self._ray is not None:
            self._ray.shutdown()


def _refusal(leg: Leg, nodes: Sequence[Mapping[str, Any]]) -> UserError | None:
    """Say why Ray would wait with a leg for ever; None where it would not."""
    largest = max(float(node["Resources"].get("memory", 0)) for node in nodes)
    if leg.memory_bytes <= largest:
        return None
    return UserError(
        f"{leg.branch.name} needs about {leg.memory_bytes / 2**30:.2f} GiB of memory, but the largest node of "
        f"Ray has {largest / 2**30:.2f} GiB for tasks. Lower `length`, or add a larger node."
    )


def _run(leg: Leg) -> dict[str, Any] | None:
    """Run a leg on a node; an error is answered, since Ray would wrap it."""
    with closing(LocalExecutor()) as executor:
        future = executor.start(leg)
        while not future.done():
            try:
                # Ray's Ctrl-C does not end a wait for a process, so there are many short ones.
                wait([future], timeout=_SECONDS_BETWEEN_LOOKS)
            except KeyboardInterrupt:
                executor.interrupt()
    error = future.exception()
    if error is not None and not isinstance(error, FlanmoeError):
        raise error
    return None if error is None else as_answer(error)


def _settle(ray: Any, running: Any, leg: Leg, future: "Future[None]") -> None:
    try:
        answer = ray.get(running)
    except ray.exceptions.TaskCancelledError:
        # Said at once; the leg has yet to save its state, and holds a lock until it has.
        folders = [leg.study_dir / STAGES_FOLDER / name for name in leg.stages]
        while any(is_taken(folder) for folder in folders):
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        answer = as_answer(Interrupted(f"{leg.branch.name} was stopped by Ctrl-C."))
    except ray.exceptions.RayError as error:
        answer = as_answer(FlanmoeError(f"Ray could not run it: {error}"))
    if answer is None:
        future.set_result(None)
    else:
        future.set_exception(as_error(answer))
