"""Which stage runs when: on graphs made by hand, with stages that only write that they ran."""

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.core import files
from flanmoe.core.errors import DiskError, FlanmoeError, Interrupted, UserError
from flanmoe.core.rundir import RunDir
from flanmoe.study import schedule
from flanmoe.study.board import Board
from flanmoe.study.executor import Leg
from flanmoe.study.leg import StageIsTakenError, locked
from flanmoe.study.nodes import Branch, Node, StageGraph, is_finished
from flanmoe.study.schedule import StudyError, run_graph

GIB = 2**30


def node(name: str, parent: str | None = None, **changes: Any) -> Node:
    """A stage; names that begin with `score` leave no model."""
    values: dict[str, Any] = {
        "key": f"{name:x<10}",
        "label": name,
        "kind": "evaluate" if name.startswith("score") else "tune",
        "parent": None if parent is None else f"{parent:x<10}",
        "model": "base" if parent is None else None,
        "changes_model": not name.startswith("score"),
        "settings": {},
        "seed": 0,
        "files": {},
        "code": "",
        "versions": {},
        "lengths": (64, None),
        "memory_bytes": GIB,
        "seconds": 100.0,
    }
    return Node(**{**values, **changes})


def graph_of(nodes: list[Node], arms: dict[str, list[str]]) -> StageGraph:
    """A graph of one seed."""
    branches = [
        Branch(arm, 0, tuple(f"{name:x<10}" for name in names)) for arm, names in arms.items()
    ]
    return StageGraph({one.key: one for one in nodes}, tuple(branches))


# One pre-training for three arms, each scored.
TREE = graph_of(
    [
        node("start"),
        *(node(f"tune{arm}", "start") for arm in "abc"),
        *(node(f"score{arm}", f"tune{arm}") for arm in "abc"),
    ],
    {arm: ["start", f"tune{arm}", f"score{arm}"] for arm in "abc"},
)


def write_result(folder: Path) -> None:
    """Do what a stage does as far as others see it."""
    about = json.loads((folder / "node.json").read_text())
    if about["changes_model"]:
        files.write_json(folder / "model" / "config.json", {})
    result = {"seconds": 2.0, "hardware": {}, "size": {}, "label": about["label"]}
    files.write_json(folder / "result.json", result)


class Stages:
    """Runs legs in threads; notes what ran, and how much at a time."""

    remote = False

    def __init__(self, workers: int = 1, fails: dict[str, Exception] | None = None) -> None:
        self.workers = workers
        self.fails = fails or {}
        self.ran: list[str] = []
        self.legs: list[list[str]] = []
        self.together = 0
        self.memory = 0
        self.interrupts = 0
        self._running: list[Leg] = []
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(workers)

    def start(self, leg: Leg) -> "Future[None]":
        """Run a leg in a thread."""
        return self._pool.submit(self._run, leg)

    def _run(self, leg: Leg) -> None:
        with self._lock:
            self._running.append(leg)
            self.legs.append([name[11:] for name in leg.stages])
            self.together = max(self.together, len(self._running))
            self.memory = max(self.memory, sum(one.memory_bytes for one in self._running))
        try:
            time.sleep(0.02)
            for name in leg.stages:
                folder = leg.study_dir / "stages" / name
                with locked(folder):
                    if not is_finished(folder, model_needed=name in leg.models_needed):
                        self._stage(folder, name[11:])
        except StageIsTakenError:
            return
        finally:
            with self._lock:
                self._running.remove(leg)

    def _stage(self, folder: Path, label: str) -> None:
        if label in self.fails:
            raise self.fails[label]
        write_result(folder)
        self.ran.append(label)

    def interrupt(self) -> None:
        """Count."""
        self.interrupts += 1

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the folder often."""
    monkeypatch.setattr(schedule, "_SECONDS_BETWEEN_LOOKS", 0.01)


@pytest.fixture
def study_in(tmp_path: Path) -> Callable[[StageGraph], RunDir]:
    """Writes a graph into a folder."""

    def write(graph: StageGraph) -> RunDir:
        graph.write(tmp_path)
        return RunDir(tmp_path)

    return write


def test_one_worker_goes_through_the_arms_in_order(study_in: Callable[..., RunDir]) -> None:
    run, stages = study_in(TREE), Stages()
    outcome = run_graph(run, stages, data_dir=None)
    assert stages.legs == [["start", "tunea", "scorea"], ["tuneb", "scoreb"], ["tunec", "scorec"]]
    assert [branch.arm for branch in outcome.finished] == ["a", "b", "c"]
    assert outcome.failures == ()
    # The start's model went when all three had taken it; those that arms end with stay.
    models = {path.parent.name[11:] for path in run.path.glob("stages/*/model")}
    assert models == {"tunea", "tuneb", "tunec"}
    for arm in "abc":
        folder = run.path / "arms" / arm / "seed-0"
        result = json.loads((folder / "result.json").read_text())
        assert [stage["label"] for stage in result["stages"]] == [
            "start",
            f"tune{arm}",
            f"score{arm}",
        ]
        assert result["final_model"] == str(
            run.path / "stages" / f"tune{arm}xxxxx-tune{arm}" / "model"
        )
        assert (folder / f"01-tune{arm}" / "model" / "config.json").exists()
        assert result["seconds"] == 6.0
    again = Stages()
    assert len(run_graph(run, again, data_dir=None).finished) == 3
    assert again.ran == []
    assert len(run.rows("seconds.jsonl")) == 2


def test_workers_run_together_as_memory_allows(
    study_in: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Free:
        available = 2.5 * GIB

    monkeypatch.setattr(schedule.psutil, "virtual_memory", lambda: Free)
    stages = Stages(workers=3)
    run_graph(study_in(TREE), stages, data_dir=None)
    assert sorted(stages.ran) == sorted(one.label for one in TREE.nodes.values())
    assert (stages.together, stages.memory) == (2, 2 * GIB)


def test_a_stage_that_is_larger_than_the_memory_runs_alone(
    study_in: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Free:
        available = 2.5 * GIB

    monkeypatch.setattr(schedule.psutil, "virtual_memory", lambda: Free)
    nodes = [node("large", memory_bytes=4 * GIB), node("small"), node("tiny")]
    graph = graph_of(nodes, {one.label: [one.label] for one in nodes})
    stages = Stages(workers=3)
    run_graph(study_in(graph), stages, data_dir=None)
    assert stages.memory == 4 * GIB
    assert len(stages.ran) == 3


def test_a_failure_stops_the_arms_that_need_the_stage_and_no_others(
    study_in: Callable[..., RunDir],
) -> None:
    run = study_in(TREE)
    stages = Stages(fails={"tuneb": UserError("The rows are gone.")})
    outcome = run_graph(run, stages, data_dir=None)
    assert stages.ran == ["start", "tunea", "scorea", "tunec", "scorec"]
    assert [branch.arm for branch in outcome.finished] == ["a", "c"]
    with pytest.raises(StudyError) as caught:
        outcome.raise_if_stopped("Go on.")
    assert str(caught.value) == "Stage `tuneb` of b failed: The rows are gone. Go on."
    assert caught.value.exit_code == 2
    # What it takes stays for going on, and only what is missing runs then.
    assert (run.path / "stages/startxxxxx-start/model/config.json").exists()
    assert json.loads((run.path / "stages/tunebxxxxx-tuneb/failure.json").read_text()) == {
        "message": "The rows are gone.",
        "exit_code": 2,
        "on_disk": False,
    }
    again = Stages()
    assert len(run_graph(run, again, data_dir=None).finished) == 3
    assert again.ran == ["tuneb", "scoreb"]
    assert not (run.path / "stages/startxxxxx-start/model").exists()


def test_a_failure_of_a_shared_stage_stops_all_that_need_it(
    study_in: Callable[..., RunDir],
) -> None:
    graph = StageGraph({**TREE.nodes}, TREE.branches)
    stages = Stages(workers=2, fails={"start": FlanmoeError("It burns.")})
    outcome = run_graph(study_in(graph), stages, data_dir=None)
    assert stages.ran == []
    assert outcome.finished == ()
    # A single failure without anything finished is itself what is raised.
    with pytest.raises(FlanmoeError, match=r"^It burns\.$"):
        outcome.raise_if_stopped()


def test_failures_of_different_kinds_exit_with_1(study_in: Callable[..., RunDir]) -> None:
    fails: dict[str, Exception] = {"tunea": UserError("One."), "scoreb": FlanmoeError("Two.")}
    outcome = run_graph(study_in(TREE), Stages(fails=fails), data_dir=None)
    with pytest.raises(StudyError) as caught:
        outcome.raise_if_stopped()
    assert str(caught.value) == ("Stage `tunea` of a failed: One. Stage `scoreb` of b failed: Two.")
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("kind", [DiskError, Interrupted])
def test_a_full_disk_or_ctrl_c_stops_everything(
    kind: type[FlanmoeError], study_in: Callable[..., RunDir]
) -> None:
    run, stages = study_in(TREE), Stages(fails={"tunea": kind("Enough.")})
    with pytest.raises(kind, match=r"^Enough\.$"):
        run_graph(run, stages, data_dir=None)
    assert stages.ran == ["start"]
    assert not list(run.path.glob("stages/*/failure.json"))
    # Ctrl-C in one reaches the others, once.
    assert stages.interrupts == (kind is Interrupted)


def test_a_model_that_was_removed_is_made_again_for_a_new_arm(
    study_in: Callable[..., RunDir],
) -> None:
    run = study_in(TREE)
    run_graph(run, Stages(), data_dir=None)
    nodes = [*TREE.nodes.values(), node("tuned", "start"), node("scored", "tuned")]
    arms = {
        branch.arm: [TREE.nodes[key].label for key in branch.stages] for branch in TREE.branches
    }
    larger = graph_of(nodes, {**arms, "d": ["start", "tuned", "scored"]})
    larger.write(run.path)
    stages = Stages()
    run_graph(run, stages, data_dir=None)
    assert stages.legs == [["start", "tuned", "scored"]]
    assert stages.ran == ["start", "tuned", "scored"]
    assert not (run.path / "stages/startxxxxx-start/model").exists()


def test_a_stage_of_another_process_is_waited_for_and_not_run(
    study_in: Callable[..., RunDir],
) -> None:
    run, stages = study_in(TREE), Stages()
    folder = run.path / "stages" / "tuneaxxxxx-tunea"
    held, release = threading.Event(), threading.Event()

    def other_process() -> None:
        with locked(folder):
            held.set()
            release.wait(20)
            write_result(folder)

    other = threading.Thread(target=other_process)
    other.start()
    held.wait(20)
    running = threading.Thread(target=lambda: run_graph(run, stages, data_dir=None))
    running.start()
    deadline = time.monotonic() + 20
    # Everything else is taken meanwhile.
    while len(stages.ran) < 5:
        assert time.monotonic() < deadline, stages.ran
        time.sleep(0.01)
    board = Board(run.path, TREE, workers=1)
    board.refresh()
    release.set()
    running.join(20)
    other.join(20)
    assert "tunea" not in stages.ran
    assert stages.ran == ["start", "tuneb", "scoreb", "tunec", "scorec", "scorea"]


@given(
    parents=st.lists(st.integers(-1, 6), min_size=1, max_size=7),
    workers=st.integers(1, 4),
    runs=st.integers(1, 3),
)
def test_several_runs_at_once_do_every_stage_exactly_once(
    parents: list[int], workers: int, runs: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # Stage i takes the model of an earlier one or of none; every stage is where an arm ends.
    names = [f"n{number}" for number in range(len(parents))]
    ancestors = [min(parent, number - 1) for number, parent in enumerate(parents)]
    nodes = [
        node(name, None if parent < 0 else names[parent], memory_bytes=0)
        for name, parent in zip(names, ancestors, strict=True)
    ]

    def chain(number: int) -> list[str]:
        return [*([] if number < 0 else chain(ancestors[number])), *names[number : number + 1]]

    graph = graph_of(nodes, {f"arm{number}": chain(number) for number in range(len(names))})
    run = RunDir(tmp_path_factory.mktemp("study"))
    graph.write(run.path)
    executors = [Stages(workers) for _ in range(runs)]
    outcomes: list[Any] = []
    threads = [
        threading.Thread(target=lambda one=one: outcomes.append(run_graph(run, one, data_dir=None)))
        for one in executors
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(label for one in executors for label in one.ran) == names
    assert [len(outcome.finished) for outcome in outcomes] == [len(names)] * runs


def test_the_time_left_is_the_plan_corrected_by_what_was_measured(
    study_in: Callable[..., RunDir],
) -> None:
    nodes = [
        node("start", seconds=10.0),
        node("tune", "start", seconds=30.0),
        node("score", "tune", seconds=5.0),
    ]
    graph = graph_of(nodes, {"a": ["start", "tune", "score"]})
    run = study_in(graph)
    board = Board(run.path, graph, workers=1)
    assert board.seconds_left() == 45.0
    folder = board.folder(nodes[0].key)
    write_result(folder)
    # It was to take 10 seconds and took 2; of scoring nothing is known but that.
    board.refresh()
    assert board.seconds_left() == pytest.approx((30 + 5) * 2 / 10)
    assert board.counts()["done"] == 1
    two = Board(run.path, graph, workers=2)
    two.refresh()
    assert two.seconds_left() == pytest.approx((30 + 5) * 2 / 10 / 2)
    unplanned = graph_of([node("start", seconds=0.0)], {"a": ["start"]})
    assert Board(run.path, unplanned, workers=1).seconds_left() is None


def tree(seconds: float, number: int = 4) -> StageGraph:
    """A start that takes long, and tunings from it of so many seconds, each scored in one."""
    arms = [f"{place:02d}" for place in range(number)]
    return graph_of(
        [
            node("start"),
            *(node(f"tune{arm}", "start", seconds=seconds) for arm in arms),
            *(node(f"score{arm}", f"tune{arm}", seconds=1.0) for arm in arms),
        ],
        {arm: ["start", f"tune{arm}", f"score{arm}"] for arm in arms},
    )


def test_stages_shorter_than_a_process_takes_to_start_go_along(
    study_in: Callable[..., RunDir],
) -> None:
    stages = Stages()
    run_graph(study_in(tree(5.0)), stages, data_dir=None)
    assert stages.legs == [
        ["start", "tune00", "score00"]
        + [f"{kind}{arm:02d}" for kind in ("tune", "score") for arm in (1, 2, 3)]
    ]


def test_longer_stages_have_a_process_of_their_own(study_in: Callable[..., RunDir]) -> None:
    stages = Stages()
    run_graph(study_in(tree(9.0)), stages, data_dir=None)
    assert [leg[0] for leg in stages.legs] == ["start", "tune01", "tune02", "tune03"]


def test_no_more_goes_along_than_leaves_work_for_others(study_in: Callable[..., RunDir]) -> None:
    stages = Stages()
    run_graph(study_in(tree(7.5, number=30)), stages, data_dir=None)
    # Ten tunings are 75 seconds, and five scores fit beside them.
    assert sum(label.startswith("tune") for label in stages.legs[0]) == 1 + 10
    assert sum(label.startswith("score") for label in stages.legs[0]) == 1 + 5
    assert sorted(stages.ran) == sorted(label for leg in stages.legs for label in leg)


def test_one_that_goes_along_and_fails_stops_its_own_arm_alone(
    study_in: Callable[..., RunDir],
) -> None:
    stages = Stages(fails={"tune01": UserError("no")})
    outcome = run_graph(study_in(tree(5.0)), stages, data_dir=None)
    assert [branch.arm for branch in outcome.finished] == ["00", "02", "03"]
    assert [str(failure.error) for failure in outcome.failures] == ["no"]
