"""Heat map of which tasks use which experts."""

import os.path
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from flanmoe.study.arm_report import ExpertLoadReport, TaskLoad
from flanmoe.study.plots.expert_load import load_of, same_in
from flanmoe.study.plots.figure import Drawing, new_figure
from flanmoe.study.report_data import ReportData
from flanmoe.study.shared_tuning import alike

# From less to more than all tasks together; lightness tells both apart from the middle without hue.
_RELATIVE = LinearSegmentedColormap.from_list(
    "relative", ["#2b5c8a", "#8fb4d3", "#f7f4ee", "#e0955a", "#8c2f1e"]
)
_MOST_ARMS = 2
_MOST_LAYERS = 2
_MOST_ROWS = 16
_LONGEST_NAME = 24
# Ratios beyond four times more or less look alike.
_LIMIT = 2.0


def task_loads(data: ReportData) -> list[Drawing | None]:
    """Heat maps of the sparse arms that know their tasks, the baseline first; of many arms the first ones."""
    there = [
        group[0].label
        for group in alike(data.arms, load_of)
        if (load := group[0].expert_load) is not None and len(load.tasks) > 1
    ]
    shown = sorted(there, key=lambda label: label != data.baseline)[:_MOST_ARMS]
    numbers = {arm.label: number for number, arm in enumerate(data.arms)}
    return [task_load(data, numbers[label]) for label in shown]


def task_load(data: ReportData, number: int) -> Drawing | None:
    """Heat map of tasks by experts in the layers that tell tasks apart most; None for fewer than two."""
    arm = data.arms[number]
    load = arm.expert_load
    if load is None or len(load.tasks) < 2:
        return None
    tasks = load.tasks[:_MOST_ROWS]
    spread = spreads(load)
    layers = sorted(np.argsort(spread)[::-1][:_MOST_LAYERS].tolist())
    title = f"Experts that tasks use: {arm.label}"
    height = 0.7 + len(layers) * (0.21 * len(tasks) + 0.75)
    with new_figure(f"task-load-{number}", height=height) as (figure, finish):
        _draw(figure, load, tasks, layers)
        shown = _shown_in_words(load, tasks, layers)
        return finish(
            title,
            f"{title}. {_in_words(load, layers)}.",
            "Share of a task's assignments that an expert gets, over its share of all tasks' assignments. A "
            f"cross marks an expert that no token of the task was sent to. {shown}{same_in(data, arm)}",
        )


def spreads(load: ExpertLoadReport) -> np.ndarray:
    """Return for each layer how far tasks lie from all of them together: mean total variation, 0 to 1."""
    together = np.array(load.shares)
    by_task = np.array([task.shares for task in load.tasks])
    return np.abs(by_task - together).sum(axis=2).mean(axis=0) / 2


def _draw(
    figure: Figure, load: ExpertLoadReport, tasks: Sequence[TaskLoad], layers: Sequence[int]
) -> None:
    panels = figure.subplots(len(layers), 1, squeeze=False)[:, 0]
    labels = _short_names([task.task for task in tasks])
    meshes = [
        _draw_layer(axes, load, tasks, layer) for axes, layer in zip(panels, layers, strict=True)
    ]
    for axes in panels:
        axes.set_yticks(np.arange(len(tasks)) + 0.5, labels)
    panels[-1].set_xlabel("expert")
    bar = figure.colorbar(
        meshes[0], ax=list(panels), location="bottom", pad=0.02, aspect=36, shrink=0.9
    )
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    ticks = [-2, -1, 0, 1, 2]
    bar.set_ticks(ticks, labels=["\N{MULTIPLICATION SIGN}" + f"{2.0**tick:.3g}" for tick in ticks])
    bar.ax.grid(visible=False)


def _draw_layer(
    axes: Axes, load: ExpertLoadReport, tasks: Sequence[TaskLoad], layer: int
) -> QuadMesh:
    shares = np.array([task.shares[layer] for task in tasks])
    together = np.array(load.shares[layer])
    # An expert that nobody uses is used by each task as by all of them.
    ratio = np.divide(shares, together, out=np.ones_like(shares), where=together > 0)
    relative = np.log2(np.maximum(ratio, 2.0 ** (-2 * _LIMIT)))
    mesh = axes.pcolormesh(relative, cmap=_RELATIVE, vmin=-_LIMIT, vmax=_LIMIT, linewidth=0)
    # A picture inside the picture where thousands of cells would make the page slow.
    mesh.set_rasterized(relative.size > 4096)
    _mark(axes, (shares == 0) & (together > 0), colour="#fffffe")
    _mark(axes, (shares == 0) & (together == 0), colour="#1f2329")
    axes.set(xlim=(0, load.num_experts), ylim=(len(tasks), 0))
    axes.set_title(f"layer {load.names[layer]}", fontsize=10, loc="left")
    step = -(-load.num_experts // 16)
    places = range(0, load.num_experts, step)
    axes.set_xticks([place + 0.5 for place in places], [str(place) for place in places])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    return mesh


def _mark(axes: Axes, cells: np.ndarray, *, colour: str) -> None:
    rows, experts = np.nonzero(cells)
    size = 4 if cells.shape[1] <= 32 else 2
    axes.plot(
        experts + 0.5, rows + 0.5, linestyle="none", marker="x", color=colour, markersize=size
    )


def _short_names(names: Sequence[str]) -> list[str]:
    """Names without the folders that all of them have, the beginnings of long ones cut off."""
    common = os.path.commonpath(names) + "/" if len(set(names)) > 1 else ""
    own = [name.removeprefix(common) for name in names]
    return [
        name
        if len(name) <= _LONGEST_NAME
        else f"\N{HORIZONTAL ELLIPSIS}{name[-_LONGEST_NAME + 1 :]}"
        for name in own
    ]


def _shown_in_words(
    load: ExpertLoadReport, tasks: Sequence[TaskLoad], layers: Sequence[int]
) -> str:
    words: list[str] = []
    if len(layers) < len(load.layers):
        words.append(
            f"Shown are the {len(layers)} of {len(load.layers)} layers that tell tasks apart most."
        )
    if len(tasks) < load.num_tasks:
        words.append(f"Of {load.num_tasks} tasks the {len(tasks)} with the most tokens.")
    return " ".join(words)


def _in_words(load: ExpertLoadReport, layers: Sequence[int]) -> str:
    spread = spreads(load)
    far = "; ".join(f"layer {load.names[layer]}: {spread[layer]:.2f}" for layer in layers)
    return (
        f"{load.num_tasks} tasks, {load.num_experts} experts; the share of assignments that a task sends "
        f"elsewhere than all tasks do together (mean over tasks) is {far}"
    )
