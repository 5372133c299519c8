"""From a study to its stage graph: stages that depend on the same things become one node.

A stage takes a model and leaves one, or scores it. So the parent of a stage is the last one before it that
changed the model, and evaluations have no children: tuning does not depend on whether the model was scored.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flanmoe.core.cache import fingerprint
from flanmoe.core.names import listing
from flanmoe.stages.recipe import EvaluateStage, Stage, leaves_model, stated_lengths
from flanmoe.study.manifest import code_version, model_files, stack_versions, stage_files
from flanmoe.study.nodes import Branch, Node, StageGraph
from flanmoe.study.study import Study


def build_graph(study: Study, data_dir: Path | None) -> StageGraph:
    """Make the stage graph of a study; reads (and hashes) the data files of every stage.

    Raises:
        DataError: if data that a stage names is not there.
    """
    return _Building(study, data_dir).graph()


class _Building:
    """One pass over the arms of a study."""

    def __init__(self, study: Study, data_dir: Path | None) -> None:
        self._study = study
        self._data_dir = data_dir
        self._code = code_version()
        self._versions = stack_versions()
        self._files: dict[str, dict[str, str]] = {}
        self._nodes: dict[str, Node] = {}

    def graph(self) -> StageGraph:
        """Go through every arm with every seed, in the order in which they run."""
        branches = tuple(self._branch(arm, seed) for arm, seed in self._study.jobs)
        return StageGraph(self._nodes, branches)

    def _branch(self, arm: str, seed: int) -> Branch:
        chosen = self._study.arms[arm]
        parent: Node | None = None
        before: list[Stage] = []
        keys: list[str] = []
        for stage in chosen.stages:
            model = chosen.model if parent is None else None
            # A score depends on the questions, which are those of the first seed, and on the model.
            scores = isinstance(stage, EvaluateStage)
            own_seed = self._study.seeds[0] if scores else seed
            lengths = stated_lengths([*before, stage])
            node = self._node(stage, parent, model, own_seed, lengths)
            keys.append(node.key)
            if not scores:
                before.append(stage)
                parent = node
        return Branch(arm, seed, tuple(keys))

    def _node(
        self,
        stage: Stage,
        parent: Node | None,
        model: str | None,
        seed: int,
        lengths: tuple[int, int | None],
    ) -> Node:
        settings = stage.to_mapping()
        described: dict[str, Any] = {
            "parent": None if parent is None else parent.key,
            "model": model,
            "settings": settings,
            "seed": seed,
            "files": {**self._stage_files(stage), **self._model_files(model)},
            "code": self._code,
            "versions": self._versions,
        }
        key = fingerprint(described)
        if key not in self._nodes:
            self._nodes[key] = Node(
                key=key,
                label=stage.label,
                kind=stage.stage,
                changes_model=leaves_model(stage),
                lengths=lengths,
                **described,
            )
        return self._nodes[key]

    def _stage_files(self, stage: Stage) -> dict[str, str]:
        # What is read follows from the settings alone.
        name = fingerprint(stage.to_mapping())
        if name not in self._files:
            self._files[name] = stage_files(stage, self._data_dir)
        return self._files[name]

    def _model_files(self, model: str | None) -> dict[str, str]:
        name = f"model {model}"
        if name not in self._files:
            self._files[name] = model_files(model)
        return self._files[name]


def changes(old: StageGraph, new: StageGraph) -> dict[str, str]:
    """Say of each stage of a study that has changed why it is not the one that it was.

    Stages are held against those of the same arm, seed and label. Stages that only the new study has are left
    out: nothing of them can have run.

    Returns:
        Why, by the key of the new stage.
    """
    before = {
        (branch.arm, branch.seed, old.nodes[key].label): old.nodes[key]
        for branch in old.branches
        for key in branch.stages
    }
    found: dict[str, str] = {}
    for branch in new.branches:
        for key in branch.stages:
            node = new.nodes[key]
            was = before.get((branch.arm, branch.seed, node.label))
            if was is not None and key not in old.nodes:
                found.setdefault(key, _why(was, node, new))
    return found


def _why(was: Node, now: Node, graph: StageGraph) -> str:
    reasons: list[str] = []
    if settings := _differences(was.settings, now.settings):
        shown = "; ".join(settings[:4]) + (
            f" and {len(settings) - 4} more" if len(settings) > 4 else ""
        )
        reasons.append(f"settings changed ({shown})")
    if was.seed != now.seed:
        reasons.append(f"the seed changed ({was.seed} -> {now.seed})")
    if was.model != now.model and was.parent is now.parent is None:
        reasons.append(f"the model changed ({was.model} -> {now.model})")
    if changed := _differences(was.files, now.files):
        names = [one.partition(": ")[0] for one in changed]
        reasons.append(f"data changed ({listing(names, limit=4)})")
    if was.code != now.code:
        reasons.append("flanmoe's code changed")
    if versions := _differences(was.versions, now.versions):
        reasons.append(f"versions changed ({'; '.join(versions)})")
    if not reasons and now.parent is not None:
        reasons.append(f"it follows `{graph.nodes[now.parent].label}`")
    return ", ".join(reasons) or "what it follows changed"


def _differences(was: Any, now: Any, path: str = "") -> list[str]:
    """List the values that differ as `dotted.key: old -> new`."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        keys = dict.fromkeys([*was, *now])
        return [
            difference
            for key in keys
            for difference in _differences(
                was.get(key, "absent"), now.get(key, "absent"), f"{path}.{key}" if path else key
            )
        ]
    if _is_list(was) and _is_list(now) and len(was) == len(now):
        pairs = enumerate(zip(was, now, strict=True))
        return [one for i, pair in pairs for one in _differences(*pair, f"{path}.{i}")]
    return [] if was == now else [f"{path}: {_shown(was)} -> {_shown(now)}"]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
