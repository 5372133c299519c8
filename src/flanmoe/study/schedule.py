"""Which stage runs when: legs are handed to an executor until every arm is finished or stopped.

Nothing here loads torch. The state is what lies on disk, so that several processes may work on one study: each
takes stages whose lock nobody holds, and waits for the others only where nothing else is left to do.
"""

import time
from collections.abc import Generator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from flanmoe.core import files
from flanmoe.core.console import say
from flanmoe.core.errors import DiskError, FlanmoeError, Interrupted
from flanmoe.core.memory import peak_memory_bytes, peak_memory_of_children_bytes
from flanmoe.core.rundir import RunDir
from flanmoe.study.board import Board, Failure
from flanmoe.study.branches import link_branches, write_branch
from flanmoe.study.child import as_answer
from flanmoe.study.display import Display, PlainDisplay
from flanmoe.study.executor import COSTS_FILE, Executor, Leg, threads_of
from flanmoe.study.kept_models import forget_intermediate_models
from flanmoe.study.leg import is_taken
from flanmoe.study.nodes import FAILURE_FILE, Branch, StageGraph, has_model

# What a process takes before its first stage, most of it for loading torch and transformers. A stage that is
# planned to take less goes along with the leg that makes its model, up to a limit that leaves work for others.
_PROCESS_SECONDS = 8.0
_MOST_SECONDS_ALONG = 80.0
# How often the folder is looked at for what other processes have finished.
_SECONDS_BETWEEN_LOOKS = 0.5


class StudyError(FlanmoeError):
    """Stages failed; the arms that do not need them are finished.

    Args:
        failures: what failed. The exit status is theirs where they agree, else 1.
        way_on: what the user can do.
        told: what the report says of the finished arms, None where there is none.
    """

    def __init__(
        self,
        failures: list[Failure],
        way_on: str = "",
        *,
        told: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(" ".join([*map(str, failures), *([way_on] if way_on else [])]))
        statuses = {failure.error.exit_code for failure in failures}
        self.failures = failures
        self.told = dict(told or {})
        self.exit_code = statuses.pop() if len(statuses) == 1 else 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """How far a study came.

    Attributes:
        finished: arms and seeds all of whose stages have results.
        failures: stages that failed.
    """

    finished: tuple[Branch, ...]
    failures: tuple[Failure, ...]

    def raise_if_stopped(self, way_on: str = "") -> None:
        """Raise what stopped arms.

        Raises:
            FlanmoeError: the error itself where it is one and nothing is finished, else `StudyError`.
        """
        if len(self.failures) == 1 and not self.finished:
            raise self.failures[0].error
        if self.failures:
            raise StudyError(list(self.failures), way_on)


def run_graph(
    run: RunDir, executor: Executor, *, data_dir: Path | None, display: Display | None = None
) -> Outcome:
    """Run all stages of a study's folder that have not finished; a failed one stops the arms that need it.

    Legs on this machine run at one time only where their planned memory fits into what is free.

    Args:
        run: the study's folder, with its graph.
        executor: where legs run.
        data_dir: data folder, None where none was named.
        display: shows how far it is; None for plain lines.

    Raises:
        Interrupted: after Ctrl-C, once every leg has saved its state.
        DiskError: if the disk is full; the legs that run are waited for, and no more are started.
    """
    schedule = _Schedule(run, executor, data_dir, display or PlainDisplay())
    with _costs_noted(run, executor.workers):
        try:
            return schedule.run()
        finally:
            schedule.let_go()
            executor.close()


class _Schedule:
    """One run over a graph."""

    def __init__(
        self, run: RunDir, executor: Executor, data_dir: Path | None, display: Display
    ) -> None:
        self._run = run
        self._graph = StageGraph.read(run.path)
        self._board = Board(run.path, self._graph, workers=executor.workers)
        self._executor = executor
        self._data_dir = data_dir
        self._display = display
        self._legs: dict[Future[None], tuple[tuple[str, ...], Leg]] = {}
        self._written: set[Branch] = set()
        self._num_results = 0
        self._stop: FlanmoeError | None = None
        self._free_bytes = psutil.virtual_memory().available

    def run(self) -> Outcome:
        """Go on until nothing is left to run or to wait for."""
        board = self._board
        link_branches(self._run.path, self._graph)
        with self._display.showing(board):
            self._take_results(begun_before=True)
            while self._is_going():
                with self._interruptible():
                    self._start_legs()
                    self._wait()
                    self._take_ended()
                    self._take_results()
                    self._display.update(board)
        if self._stop is not None:
            raise self._stop
        finished = tuple(branch for branch in self._graph.branches if board.is_finished(branch))
        return Outcome(finished, tuple(board.failed()))

    def let_go(self) -> None:
        """Interrupt what runs still, which is so after an error of ours, and wait for it."""
        if self._legs:
            self._executor.interrupt()
            wait(self._legs)

    def _is_going(self) -> bool:
        if self._legs:
            return True
        left = (key for key in self._graph.nodes if key not in self._board.results)
        return self._stop is None and any(self._board.is_wanted(key) for key in left)

    @contextmanager
    def _interruptible(self) -> Generator[None]:
        """Pass Ctrl-C on to the legs, and start no more."""
        try:
            yield
        except KeyboardInterrupt:
            self._stop = self._stop or Interrupted("The study was stopped by Ctrl-C.")
            self._executor.interrupt()

    def _start_legs(self) -> None:
        while self._stop is None and len(self._legs) < self._executor.workers:
            leg = self._next_leg()
            if leg is None:
                return
            keys, job = leg
            self._board.began(keys)
            self._legs[self._executor.start(job)] = leg

    def _next_leg(self) -> tuple[tuple[str, ...], Leg] | None:
        """Return the first leg that can start now; None where there is none."""
        board = self._board
        for key in self._graph.nodes:
            if key in board.claimed or not self._is_open(key):
                continue
            if is_taken(board.folder(key)):
                board.elsewhere.add(key)
                continue
            board.elsewhere.discard(key)
            # Whoever held the lock a moment ago may have finished the stage.
            board.refresh()
            if not self._is_open(key):
                continue
            branch = next(
                one
                for one in self._graph.users(key)
                if not board.is_stopped(one) and not board.is_finished(one)
            )
            keys = self._with_short_ones(self._chain(key, branch))
            leg = self._leg(keys, branch)
            if self._fits(leg):
                say(f"Arm {branch.arm}, seed {branch.seed}")
                return keys, leg
        return None

    def _is_open(self, key: str) -> bool:
        """Whether a stage is to run and can: its parent's model is there."""
        board, parent = self._board, self._graph.nodes[key].parent
        if key in board.failures or not board.is_wanted(key) or not board.must_run(key):
            return False
        return parent is None or (parent in board.results and has_model(board.folder(parent)))

    def _chain(self, first: str, branch: Branch) -> tuple[str, ...]:
        """Return a stage and those of its branch that can follow it in one process."""
        board = self._board
        chain = [first]
        for key in branch.stages:
            if key in chain or key in board.claimed | board.elsewhere or not board.must_run(key):
                continue
            if self._graph.nodes[key].parent in chain or self._is_open(key):
                chain.append(key)
        return tuple(sorted(chain, key=branch.stages.index))

    def _with_short_ones(self, chain: tuple[str, ...]) -> tuple[str, ...]:
        """Add stages of other arms that take models of the chain and are shorter than starting a process is."""
        board, keys, seconds = self._board, list(chain), 0.0
        busy = board.claimed | board.elsewhere | set(board.failures)
        for key, node in self._graph.nodes.items():
            is_short = 0 < node.seconds < _PROCESS_SECONDS
            if not is_short or node.parent not in keys or key in keys or key in busy:
                continue
            if not (board.is_wanted(key) and board.must_run(key)):
                continue
            if seconds + node.seconds <= _MOST_SECONDS_ALONG:
                seconds += node.seconds
                keys.append(key)
        return tuple(keys)

    def _leg(self, keys: tuple[str, ...], branch: Branch) -> Leg:
        nodes = [self._graph.nodes[key] for key in keys]
        return Leg(
            study_dir=self._run.path,
            stages=tuple(node.folder_name for node in nodes),
            models_needed=tuple(
                node.folder_name for node in nodes if self._board.model_needed(node.key)
            ),
            data_dir=self._data_dir,
            branch=branch,
            memory_bytes=max(node.memory_bytes for node in nodes),
            environment=threads_of(self._executor.workers),
        )

    def _fits(self, leg: Leg) -> bool:
        """Whether the memory has room for a leg beside those that run; alone, the plan has let it pass."""
        if self._executor.remote or not self._legs:
            return True
        planned = sum(running.memory_bytes for _, running in self._legs.values())
        return planned + leg.memory_bytes <= self._free_bytes

    def _wait(self) -> None:
        if self._legs:
            wait(self._legs, timeout=_SECONDS_BETWEEN_LOOKS, return_when=FIRST_COMPLETED)
        elif self._is_going():
            # Only stages of other processes are left.
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _take_results(self, *, begun_before: bool = False) -> None:
        """Take in what has finished: write the results of arms, remove models that nothing needs any more."""
        self._board.refresh()
        if len(self._board.results) == self._num_results:
            return
        self._num_results = len(self._board.results)
        for branch in self._graph.branches:
            if branch not in self._written and self._board.is_finished(branch):
                self._written.add(branch)
                if begun_before:
                    say(f"Arm {branch.arm}, seed {branch.seed}: finished before.")
                write_branch(self._run.path, self._graph, branch, self._board.results)
        forget_intermediate_models(self._board)

    def _take_ended(self) -> None:
        for future in [one for one in self._legs if one.done()]:
            keys, _ = self._legs.pop(future)
            self._board.ended(keys)
            error = future.exception()
            self._board.elsewhere.clear()
            if error is None:
                continue
            if not isinstance(error, FlanmoeError):
                raise error
            if isinstance(error, Interrupted | DiskError):
                # A second Ctrl-C would stop the others without saving.
                if isinstance(error, Interrupted) and self._stop is None:
                    self._executor.interrupt()
                self._stop = error
                continue
            self._note_failure(keys, error)

    def _note_failure(self, keys: tuple[str, ...], error: FlanmoeError) -> None:
        self._board.refresh()
        failed = self._board.in_hand(keys)
        if failed is None:
            # Its stages have all finished, so what went wrong afterwards is no stage's failure.
            raise error
        self._board.failures[failed] = error
        say(f"  {self._graph.nodes[failed].label} failed: {error}")
        files.write_json(self._board.folder(failed) / FAILURE_FILE, as_answer(error))


@contextmanager
def _costs_noted(run: RunDir, workers: int) -> Generator[None]:
    start = time.monotonic()

    def note() -> None:
        row = {
            "seconds": time.monotonic() - start,
            "workers": workers,
            "peak_memory_bytes": peak_memory_bytes(),
            "peak_memory_of_children_bytes": peak_memory_of_children_bytes(),
        }
        run.log(COSTS_FILE, row)

    try:
        yield
    except BaseException:
        # What stopped the study is what the user must hear, not that a full disk cannot take this too.
        with suppress(DiskError):
            note()
        raise
    note()
