"""The training losses of an arm as one line: of one seed as they are, of several their mean and reach."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from flanmoe.study.arm_report import ArmReport, CurvePoint, LossCurve

Cost = Literal["tokens", "flops"]
Points = Float[np.ndarray, " N"]

_POINTS_WITHOUT_SMOOTHING = 40
_MOST_POINTS = 40
_MOST_STEPS = 400


@dataclass(frozen=True, slots=True)
class Series:
    """A line over what was spent.

    Attributes:
        spent: tokens or floating-point operations.
        loss: the loss there; where there are many steps a running mean, of several seeds their mean.
        low, high: the lowest and the highest seed; None with one seed.
        steps: what was spent at single steps, and their losses; None where the line has them all, or is of
            several seeds.
        smoothed: whether the line is a running mean.
    """

    spent: Points
    loss: Points
    low: Points | None = None
    high: Points | None = None
    steps: tuple[Points, Points] | None = None
    smoothed: bool = False


def series(arm: ArmReport, cost: Cost) -> Series | None:
    """Return the line of an arm; None where it has no finite loss, or this cost was not counted.

    Of several seeds it covers what all of them have spent, and ends where the first of them diverged.
    """
    raw = [found for curve in arm.curves if (found := _finite(curve, cost)) is not None]
    if not raw:
        return None
    longest = max(raw, key=lambda found: len(found[0]))
    smoothed = len(longest[0]) > _POINTS_WITHOUT_SMOOTHING
    lines = [_running_mean(*found) if smoothed else found for found in raw if len(found[0]) > 1]
    start = max((spent[0] for spent, _ in lines), default=0.0)
    end = min((spent[-1] for spent, _ in lines), default=0.0)
    if len(lines) < 2 or start >= end:
        spent, loss = _running_mean(*longest) if smoothed else longest
        steps = _thinned(*longest) if smoothed else None
        return Series(*_thinned(spent, loss), steps=steps, smoothed=smoothed)
    grid = _grid(lines, start, end)
    losses = np.stack([np.interp(grid, spent, loss) for spent, loss in lines])
    return Series(
        grid, losses.mean(axis=0), losses.min(axis=0), losses.max(axis=0), smoothed=smoothed
    )


def _finite(curve: LossCurve, cost: Cost) -> tuple[Points, Points] | None:
    def spent(point: CurvePoint) -> float | None:
        return float(point.tokens) if cost == "tokens" else point.flops

    points = [
        (at, point.loss)
        for point in curve.points
        if point.loss is not None and (at := spent(point)) is not None
    ]
    if not points:
        return None
    at, loss = np.array(points, dtype=float).T
    return at, loss


def _grid(lines: list[tuple[Points, Points]], start: float, end: float) -> Points:
    """Where seeds took their steps at the same places these, and otherwise evenly spread ones."""
    first = lines[0][0]
    same = all(np.array_equal(first, spent) for spent, _ in lines)
    if same and len(first) <= _MOST_POINTS:
        return first
    return np.linspace(start, end, min(_MOST_POINTS, max(len(spent) for spent, _ in lines)))


def _running_mean(spent: Points, loss: Points) -> tuple[Points, Points]:
    """Mean over a window of a fifteenth of the points, placed at the window's middle."""
    width = min(len(loss), max(3, len(loss) // 15))
    window = np.ones(width) / width
    return np.convolve(spent, window, mode="valid"), np.convolve(loss, window, mode="valid")


def _thinned(spent: Points, loss: Points) -> tuple[Points, Points]:
    """Keep so many points that a page of many lines stays small, the last among them."""
    if len(spent) <= _MOST_STEPS:
        return spent, loss
    kept = np.unique(np.linspace(0, len(spent) - 1, _MOST_STEPS).round().astype(int))
    return spent[kept], loss[kept]
