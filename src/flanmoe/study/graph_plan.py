"""What the stage graph of a study costs: every stage counted once, however many arms need it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from flanmoe.core.config import Config
from flanmoe.study.arm_plan import StageCost
from flanmoe.study.nodes import Node, StageGraph
from flanmoe.study.number_text import duration
from flanmoe.study.number_text import size as size_text
from flanmoe.study.tables.base import TextTable
from flanmoe.study.tables.terminal import TerminalTable

# Beyond these a cell of the table counts the arms.
_MOST_ARMS_NAMED = 3


class StagePlan(Config):
    """A stage as it runs: once for each seed whose draws it depends on.

    Attributes:
        cost: of one run.
        after: label of the stage whose model it takes, empty for none.
        depth: how many stages stand before it.
        arms: the arms that need it.
        runs: how often it runs.
    """

    cost: StageCost
    after: str
    depth: int
    arms: tuple[str, ...]
    runs: int


class GraphTotal(Config):
    """All stages together, each run once.

    Attributes:
        runs: how many.
        tokens: trained on.
        flops: of training and of evaluation.
        seconds: one after the other, on this machine, roughly.
        memory_bytes: of the most demanding one.
        disk_bytes: the most at one time: models until no stage needs them any more, checkpoints until their
            stage has finished.
        kept_bytes: what is left of that at the end: the last model of every arm and seed.
    """

    runs: int
    tokens: int
    flops: float
    seconds: float
    memory_bytes: int
    disk_bytes: int
    kept_bytes: int


def with_costs(graph: StageGraph, costs: Mapping[str, StageCost]) -> StageGraph:
    """Return the graph with what each stage is planned to take."""
    nodes = {
        key: replace(node, memory_bytes=costs[key].memory_bytes, seconds=costs[key].seconds)
        for key, node in graph.nodes.items()
    }
    return StageGraph(nodes, graph.branches)


def stage_costs(graph: StageGraph, arms: Mapping[str, Sequence[StageCost]]) -> dict[str, StageCost]:
    """Return the cost of every stage by its key, from those of each arm's stages."""
    return {
        key: cost
        for branch in reversed(graph.branches)
        for key, cost in zip(branch.stages, arms[branch.arm], strict=True)
    }


def stage_plans(graph: StageGraph, costs: Mapping[str, StageCost]) -> tuple[StagePlan, ...]:
    """Return the stages in the order in which they run; those that only differ by their seed together."""
    groups: dict[tuple[str, tuple[tuple[str, int], ...]], list[Node]] = {}
    for node in graph.nodes.values():
        places = {
            (branch.arm, branch.stages.index(node.key)): None for branch in graph.users(node.key)
        }
        groups.setdefault((node.label, tuple(places)), []).append(node)
    return tuple(
        StagePlan(
            cost=costs[nodes[0].key],
            after="" if nodes[0].parent is None else graph.nodes[nodes[0].parent].label,
            depth=_depth(graph, nodes[0]),
            arms=tuple(dict.fromkeys(arm for arm, _ in places)),
            runs=len(nodes),
        )
        for (_, places), nodes in groups.items()
    )


def graph_total(graph: StageGraph, costs: Mapping[str, StageCost], *, workers: int) -> GraphTotal:
    """Add up the stages of a graph; `workers` of them at a time may hold checkpoints."""
    every = [costs[key] for key in graph.nodes]
    kept = {final.key for branch in graph.branches if (final := graph.final(branch))}
    checkpoints = sorted((cost.checkpoint_bytes for cost in every), reverse=True)
    return GraphTotal(
        runs=len(every),
        tokens=sum(cost.tokens for cost in every),
        flops=sum(cost.flops for cost in every),
        seconds=sum(cost.seconds for cost in every),
        memory_bytes=max(cost.memory_bytes for cost in every),
        # In the order of one process; each further process can have its checkpoints beside that.
        disk_bytes=_most_disk(graph, costs, kept) + sum(checkpoints[1:workers]),
        kept_bytes=sum(costs[key].model_bytes for key in kept),
    )


def _most_disk(graph: StageGraph, costs: Mapping[str, StageCost], kept: set[str]) -> int:
    waiting = {key: {child.key for child in graph.children(key)} for key in graph.nodes}
    held: set[str] = set()
    most = 0
    for key, node in graph.nodes.items():
        held.add(key)
        beside = sum(costs[other].model_bytes for other in held)
        most = max(most, beside + costs[key].checkpoint_bytes)
        if node.parent is not None:
            waiting[node.parent].discard(key)
        held = {other for other in held if waiting[other] or other in kept}
    return most


def graph_table(plans: Sequence[StagePlan], total: GraphTotal, num_arms: int) -> TerminalTable:
    """Return a table of the stages as they run, below what they take together."""
    together = (
        "together",
        "",
        str(total.runs),
        "",
        f"{total.flops:.1e}",
        size_text(total.memory_bytes),
        size_text(total.disk_bytes),
        duration(total.seconds),
    )
    return TerminalTable(
        TextTable(
            header=("stage", "arms", "runs", "parameters", "FLOPs", "memory", "disk", "time"),
            rows=(together, *(_row(plan, num_arms) for plan in plans)),
            title="Stages, each run once: a stage stands below the one whose model it takes",
            group_ends=("together",),
        )
    )


def _row(plan: StagePlan, num_arms: int) -> tuple[str, ...]:
    cost = plan.cost
    return (
        f"{'  ' * plan.depth}{cost.label}",
        _arms_text(plan.arms, num_arms),
        str(plan.runs),
        f"{cost.parameters.total / 1e6:,.1f} M",
        f"{cost.flops:.1e}" if cost.flops else "-",
        size_text(cost.memory_bytes),
        size_text(cost.model_bytes + cost.checkpoint_bytes),
        duration(cost.seconds),
    )


def _arms_text(arms: Sequence[str], num_arms: int) -> str:
    if len(arms) == num_arms > 1:
        return "all"
    return (
        ", ".join(arms) if len(arms) <= _MOST_ARMS_NAMED else f"{arms[0]} and {len(arms) - 1} more"
    )


def _depth(graph: StageGraph, node: Node) -> int:
    return 0 if node.parent is None else 1 + _depth(graph, graph.nodes[node.parent])
