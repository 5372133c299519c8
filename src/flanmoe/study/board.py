"""How far a study has come: the state of every stage, what has been measured, and the time that is left."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flanmoe.core.errors import FlanmoeError
from flanmoe.core.files import read_json_file
from flanmoe.study.nodes import RESULT_FILE, Branch, Node, StageGraph, has_model, stage_folder

# `elsewhere`: another process runs it. `stopped`: it needs a stage that failed, or only such arms need it.
State = Literal["waiting", "running", "elsewhere", "done", "failed", "stopped"]


@dataclass(frozen=True, slots=True)
class Failure:
    """A stage that failed, and the arms that cannot be finished for it."""

    node: Node
    arms: tuple[str, ...]
    error: FlanmoeError

    def __str__(self) -> str:
        return f"Stage `{self.node.label}` of {', '.join(self.arms)} failed: {self.error}"


class Board:
    """The states of all stages of a study, read from its folder.

    Args:
        study_dir: folder of the study.
        graph: its stages.
        workers: how many stages run at a time.
    """

    def __init__(self, study_dir: Path, graph: StageGraph, *, workers: int) -> None:
        self.study_dir = study_dir
        self.graph = graph
        self.workers = workers
        self.failures: dict[str, FlanmoeError] = {}
        self.results: dict[str, dict[str, Any]] = {}
        self.elsewhere: set[str] = set()
        self._legs: list[tuple[str, ...]] = []
        self._began: dict[str, float] = {}

    def folder(self, key: str) -> Path:
        """The folder of a stage."""
        return stage_folder(self.study_dir, self.graph.nodes[key])

    def began(self, leg: tuple[str, ...]) -> None:
        """Note that a leg of these stages runs."""
        self._legs.append(leg)
        self._began.setdefault(leg[0], time.monotonic())

    def ended(self, leg: tuple[str, ...]) -> None:
        """Note that a leg runs no more."""
        self._legs.remove(leg)

    def in_hand(self, leg: tuple[str, ...]) -> str | None:
        """Return the stage that a leg is at: the first that has to run; None if none has."""
        return next((key for key in leg if self.must_run(key)), None)

    @property
    def claimed(self) -> set[str]:
        """The stages of all legs that run."""
        return {key for leg in self._legs for key in leg}

    def refresh(self) -> None:
        """Read which stages have finished since, here or in another process."""
        self._read_results()
        for leg in self._legs:
            if key := self.in_hand(leg):
                self._began.setdefault(key, time.monotonic())

    def _read_results(self) -> None:
        new = [
            key
            for key in self.graph.nodes
            if key not in self.results and (self.folder(key) / RESULT_FILE).exists()
        ]
        for key in new:
            self.results[key] = read_json_file(self.folder(key) / RESULT_FILE)
            self.elsewhere.discard(key)

    def must_run(self, key: str) -> bool:
        """Say whether a stage has no result, or its model is gone although a stage has yet to take it."""
        if key not in self.results:
            return True
        if not self.model_needed(key) or has_model(self.folder(key)):
            return False
        # Whoever removed it first saw the results of all that take it, so look for them again.
        self._read_results()
        return self.model_needed(key)

    def model_needed(self, key: str) -> bool:
        """Say whether a stage that has yet to run takes the model of this one."""
        return any(
            child.key not in self.results and self.is_wanted(child.key)
            for child in self.graph.children(key)
        )

    def is_wanted(self, key: str) -> bool:
        """Say whether an arm that can still be finished needs a stage."""
        return any(not self.is_stopped(branch) for branch in self.graph.users(key))

    def is_stopped(self, branch: Branch) -> bool:
        """Say whether a stage of a branch has failed."""
        return any(key in self.failures for key in branch.stages)

    def is_finished(self, branch: Branch) -> bool:
        """Say whether all stages of a branch have results."""
        return all(key in self.results for key in branch.stages)

    def state(self, key: str) -> State:
        """Return the state of a stage."""
        if key in self.failures:
            return "failed"
        if any(self.in_hand(leg) == key for leg in self._legs):
            return "running"
        if key in self.results:
            return "done"
        if key in self.elsewhere:
            return "elsewhere"
        return "waiting" if self.is_wanted(key) else "stopped"

    def counts(self) -> dict[State, int]:
        """Return how many stages there are in each state."""
        found: dict[State, int] = dict.fromkeys(
            ("done", "running", "elsewhere", "waiting", "failed", "stopped"), 0
        )
        for key in self.graph.nodes:
            found[self.state(key)] += 1
        return found

    def seconds_left(self) -> float | None:
        """Estimate the time left: the plan's, corrected by what finished stages took; None if unknown."""
        if not any(node.seconds for node in self.graph.nodes.values()):
            return None
        ratios = self._ratios()
        left = 0.0
        for key, node in self.graph.nodes.items():
            expected = node.seconds * ratios.get(node.kind, ratios[""])
            state = self.state(key)
            if state in ("waiting", "elsewhere"):
                left += expected
            elif state == "running":
                spent = time.monotonic() - self._began.get(key, time.monotonic())
                left += max(0.0, expected - spent)
        return left / self.workers

    def _ratios(self) -> Mapping[str, float]:
        """Return measured over planned seconds by kind of stage, and of all kinds together as ``""``."""
        planned: dict[str, float] = {}
        measured: dict[str, float] = {}
        for key, result in self.results.items():
            node = self.graph.nodes[key]
            for kind in (node.kind, ""):
                planned[kind] = planned.get(kind, 0.0) + node.seconds
                measured[kind] = measured.get(kind, 0.0) + result["seconds"]
        ratios = {kind: measured[kind] / planned[kind] for kind in planned if planned[kind]}
        return {"": 1.0, **ratios}

    def failed(self) -> list[Failure]:
        """Return what failed, with the arms that need it."""
        return [
            Failure(
                self.graph.nodes[key],
                tuple(dict.fromkeys(branch.arm for branch in self.graph.users(key))),
                error,
            )
            for key, error in self.failures.items()
        ]
