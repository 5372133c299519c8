"""The stages of a study as a graph: which there are, whose model each takes, and which arms need it.

A stage that several arms need is one node, run once, with one folder. `graph` makes the nodes of a study; what
is here is read by every process, the command itself included, which loads no torch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flanmoe.core import files

GRAPH_FILE = "graph.json"
NODE_FILE = "node.json"
RESULT_FILE = "result.json"
FAILURE_FILE = "failure.json"
STAGES_FOLDER = "stages"
MODEL_FOLDER = "model"
# `models.loading.MODEL_MARKER`, which this process must not load torch for.
_MODEL_MARKER = "config.json"
_SHORT = 10


@dataclass(frozen=True, slots=True)
class Node:
    """One stage with everything that decides what comes out of it.

    Attributes:
        key: hash of the parent's key, the settings, the data, the model, the seed, the code and its versions.
        label: the stage's name in its arms.
        kind: `tune`, `evaluate`, ...
        parent: key of the stage whose model it takes; None where that is the arm's own `model` or nothing.
        model: the model that it takes where it has no parent; None where it makes one.
        changes_model: whether it leaves a model behind.
        settings: of the stage, resolved.
        seed: root of its draws.
        files: content hashes of the data files that it reads, by task, and of the model's where it is a folder.
        code: hash of the sources of flanmoe that stages run.
        versions: of the packages that decide what comes out.
        lengths: row at which FLOPs of its model are stated (`stages.recipe.stated_lengths`).
        memory_bytes: planned peak of its process; 0 where nothing was planned.
        seconds: planned; 0 where nothing was planned.
    """

    key: str
    label: str
    kind: str
    parent: str | None
    model: str | None
    changes_model: bool
    settings: dict[str, Any]
    seed: int
    files: dict[str, str]
    code: str
    versions: dict[str, str]
    lengths: tuple[int, int | None]
    memory_bytes: int = 0
    seconds: float = 0.0

    @property
    def folder_name(self) -> str:
        """Name of its folder below `stages/`."""
        return f"{self.key[:_SHORT]}-{self.label}"

    def to_mapping(self) -> dict[str, Any]:
        """Return the node as plain JSON types."""
        return asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Node":
        """Return the node that `to_mapping` wrote."""
        return cls(**{**values, "lengths": tuple(values["lengths"])})


@dataclass(frozen=True, slots=True)
class Branch:
    """One arm with one seed: the keys of its stages, in order."""

    arm: str
    seed: int
    stages: tuple[str, ...]

    @property
    def name(self) -> str:
        """How messages call it, at the start of a sentence."""
        return f"Arm `{self.arm}` (seed {self.seed})"

    def folder(self, study_dir: Path) -> Path:
        """The folder with its result and the links to its stages."""
        return study_dir / "arms" / self.arm / f"seed-{self.seed}"


@dataclass(frozen=True, slots=True)
class StageGraph:
    """All stages of a study.

    Attributes:
        nodes: key to node, in the order in which one process runs them; a parent stands before its children.
        branches: every arm with every seed, in the order in which they run.
    """

    nodes: dict[str, Node] = field(default_factory=dict)
    branches: tuple[Branch, ...] = ()

    def users(self, key: str) -> list[Branch]:
        """The arms and seeds that need a stage."""
        return [branch for branch in self.branches if key in branch.stages]

    def children(self, key: str) -> list[Node]:
        """The stages that take a stage's model."""
        return [node for node in self.nodes.values() if node.parent == key]

    def final(self, branch: Branch) -> Node | None:
        """The stage whose model a branch ends with; None where nothing changes its model."""
        changing = [key for key in branch.stages if self.nodes[key].changes_model]
        return self.nodes[changing[-1]] if changing else None

    def folder(self, study_dir: Path, key: str) -> Path:
        """The folder of a stage."""
        return stage_folder(study_dir, self.nodes[key])

    def model_reference(self, study_dir: Path, branch: Branch) -> str:
        """The model that a branch ends with: a folder, or the name that it began with."""
        final = self.final(branch)
        if final is not None:
            return str(stage_folder(study_dir, final) / MODEL_FOLDER)
        return str(self.nodes[branch.stages[0]].model)

    def write(self, folder: Path) -> None:
        """Write the graph into a study's folder, and what each stage is into the folder of the stage.

        Raises:
            DiskError: if the disk is full or the folder cannot be written.
        """
        for node in self.nodes.values():
            place = stage_folder(folder, node) / NODE_FILE
            if not place.exists():
                parent = None if node.parent is None else self.nodes[node.parent].folder_name
                files.write_json(place, {"parent_folder": parent, **node.to_mapping()})
        # Last: who reads it finds the stages.
        files.write_json(folder / GRAPH_FILE, self.to_mapping())

    def to_mapping(self) -> dict[str, Any]:
        """Return the graph as plain JSON types."""
        return {
            "nodes": [node.to_mapping() for node in self.nodes.values()],
            "branches": [asdict(branch) for branch in self.branches],
        }

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "StageGraph":
        """Return the graph that `to_mapping` wrote."""
        nodes = [Node.of(one) for one in values["nodes"]]
        branches = [
            Branch(one["arm"], one["seed"], tuple(one["stages"])) for one in values["branches"]
        ]
        return cls({node.key: node for node in nodes}, tuple(branches))

    @classmethod
    def read(cls, study_dir: Path) -> "StageGraph":
        """Read the graph of a study's folder."""
        return cls.of(files.read_json_file(study_dir / GRAPH_FILE))

    def stage_places(self, branch: Branch) -> Iterator[tuple[str, Node]]:
        """Yield the stages of a branch with the names that they have in the branch's folder."""
        for number, key in enumerate(branch.stages):
            node = self.nodes[key]
            yield f"{number:02d}-{node.label}", node


def stage_folder(study_dir: Path, node: Node) -> Path:
    """Return the folder of a stage in a study's folder."""
    return study_dir / STAGES_FOLDER / node.folder_name


def model_marker(folder: Path) -> Path:
    """Return the file that a whole model in the folder of a stage has."""
    return folder / MODEL_FOLDER / _MODEL_MARKER


def has_model(folder: Path) -> bool:
    """Say whether the folder of a stage holds a whole model."""
    return model_marker(folder).exists()


def is_finished(folder: Path, *, model_needed: bool) -> bool:
    """Say whether the stage in a folder need not run (any more).

    Args:
        folder: of the stage.
        model_needed: whether a stage that has yet to run takes its model, which may have been removed.
    """
    return (folder / RESULT_FILE).exists() and (not model_needed or has_model(folder))
