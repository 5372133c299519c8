"""Alerts about routing: what goes wrong silently, found in sums over a window of steps and said in words.

A window of steps is judged as a whole, since one small step says little. An alert is raised once, stays
up while the trouble lasts, and is cleared once; one that comes back is counted, not told again. What it
takes is in `AlertConfig`; docs/guide/routing_monitor.md says for each kind what to do.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pydantic import Field

from flanmoe.core.config import Config
from flanmoe.moe.routing_measures import RoutingMeasures, measures_of_layers
from flanmoe.moe.routing_sums import RoutingSums, added_layers

AlertKind = Literal[
    "collapse", "dead_expert", "drops", "router_norm", "imbalance_hidden_by_pooling"
]

# An alert that is up comes down when its value is this far back on the good side of the limit.
_RELIEF = 0.1
# Assignments an expert would have under even use in a window before its load is judged.
_ENOUGH_PER_EXPERT = 10
# An expert that still gets this share of the even share is not dead; chance alone leaves it without a
# token in a window less often than this.
_LIVING_SHARE = 0.05
_CHANCE = 1e-3
# Logits below this decide nothing, so that growth is counted from here.
_LEAST_LOGIT_RMS = 1.0


class AlertConfig(Config):
    """When routing is called wrong.

    Attributes:
        window_steps: optimizer steps that are judged together. A window grows until every expert would
            have 10 assignments under even use.
        min_evenness: a layer is collapsed below this. Evenness is (H - ln k) / (ln E - ln k), with the
            entropy H of the load, k choices a token and E experts: 1 when all experts get the same, 0
            when all tokens go to the same k.
        max_busiest: a layer is also collapsed when its busiest expert is further than this from its even
            share k/E of the tokens (0) to all of them (1).
        dead_steps: an expert is dead after so many steps without a token, given so many assignments in
            its layer that chance does not explain it.
        max_dropped_share: choices that may fail to fit, over all that are asked for.
        max_unserved_share: tokens that may go without any expert, over all; what expert choice is
            judged by.
        max_logit_growth: how many times larger than in the first window a layer's router logits may
            get (root of their mean square; growth is counted from 1 where they begin smaller).
        max_pooled: the load of all layers put together counts as even up to this balance score, E times
            the sum of squared shares; 1 is perfect.
        min_hidden: and hides something where the mean of the layers' own scores lies above this (or, where
            little is possible, above half of what is).
    """

    window_steps: int = Field(default=10, ge=1)
    min_evenness: float = Field(default=0.5, ge=0, le=1)
    max_busiest: float = Field(default=0.9, ge=0, le=1)
    dead_steps: int = Field(default=10, ge=1)
    max_dropped_share: float = Field(default=0.1, ge=0, le=1)
    max_unserved_share: float = Field(default=0.3, ge=0, le=1)
    max_logit_growth: float = Field(default=4.0, gt=1)
    max_pooled: float = Field(default=1.25, ge=1)
    min_hidden: float = Field(default=2.0, gt=1)


class Alert(Config):
    """Something about routing that a user should know.

    Attributes:
        kind: what it is.
        layer: number of the layer; None where it is about several.
        name: path of the block in the model, or what several layers have in common.
        experts: the experts that it is about, where it is about some.
        value: what was found.
        limit: what would still be good.
        words: what was found, what it means for the run, and what to do.
        step: the step after which it was raised first.
        cleared: the step after which it was well again; None while it is up.
        times: how often it was raised.
    """

    kind: AlertKind
    layer: int | None
    name: str
    experts: tuple[int, ...] = ()
    value: float
    limit: float
    words: str
    step: int
    cleared: int | None = None
    times: int = 1

    @property
    def is_up(self) -> bool:
        """Whether the trouble lasts."""
        return self.cleared is None


@dataclass(frozen=True, slots=True)
class WatchedLayer:
    """What is known of a layer beside its sums; `top_k` is 0 where experts choose."""

    layer: int
    name: str
    num_experts: int
    top_k: int


class _Reading(NamedTuple):
    """One judgement: the value against its limit, and the words if it is bad."""

    kind: AlertKind
    place: str
    layer: int | None
    value: float
    limit: float
    bad_above: bool
    words: Callable[[], str]
    experts: tuple[int, ...] = ()

    def is_bad(self, *, was_bad: bool) -> bool:
        """Whether the value is beyond the limit; for one that was, also if only just back."""
        relief = _RELIEF * abs(self.limit) if was_bad else 0.0
        if self.bad_above:
            return self.value > self.limit - relief
        return self.value < self.limit + relief


class AlertMonitor:
    """Watches the sums of each step and keeps the alerts of a run.

    Args:
        config: limits.
        layers: the sparse layers, in the order in which their sums will come.
    """

    def __init__(self, config: AlertConfig, layers: Sequence[WatchedLayer]) -> None:
        self.config = config
        self.layers = tuple(layers)
        self._alerts: dict[tuple[str, str], Alert] = {}
        self._window: list[RoutingSums] = []
        self._steps = 0
        self._idle = [_Idle.of(layer.num_experts) for layer in layers]
        self._first_rms: list[float] | None = None

    @property
    def alerts(self) -> tuple[Alert, ...]:
        """Every alert of the run, one for each kind and place, in the order of their first raising."""
        return tuple(self._alerts.values())

    @property
    def up(self) -> tuple[Alert, ...]:
        """The alerts that are up."""
        return tuple(alert for alert in self.alerts if alert.is_up)

    def after_step(self, step: int, layers: Sequence[RoutingSums]) -> tuple[Alert, ...]:
        """Take the sums of a step; return the alerts that were raised for the first time.

        Args:
            step: its number.
            layers: the sums of each layer over all its tokens, on the CPU; groups are put together.
        """
        own = [sums.together() for sums in layers]
        self._window = added_layers(self._window, own) if self._window else own
        self._steps += 1
        if self._steps < self.config.window_steps or not self._is_enough():
            return ()
        found = [measured for (measured,) in measures_of_layers(self._window)]
        told = [
            alert
            for reading in self._readings(found)
            if (alert := self._take(reading, step)) is not None
        ]
        self._window, self._steps = [], 0
        return tuple(told)

    def state_dict(self) -> dict[str, Any]:
        """Return alerts and what the next window depends on, as plain JSON types."""
        return {
            "alerts": [alert.to_mapping() for alert in self.alerts],
            "window": [sums.state_dict() for sums in self._window],
            "steps": self._steps,
            "idle": [[idle.steps, idle.assignments] for idle in self._idle],
            "first_rms": self._first_rms,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave for a model of the same shape."""
        alerts = [Alert.parse(values) for values in state["alerts"]]
        self._alerts = {(alert.kind, alert.name): alert for alert in alerts}
        self._window = [RoutingSums.from_state(values) for values in state["window"]]
        self._steps = int(state["steps"])
        self._idle = [_Idle(list(steps), list(passed)) for steps, passed in state["idle"]]
        self._first_rms = state["first_rms"]

    def _is_enough(self) -> bool:
        return all(
            int(sums.tokens.sum()) * max(layer.top_k, 1) >= _ENOUGH_PER_EXPERT * layer.num_experts
            for layer, sums in zip(self.layers, self._window, strict=True)
        )

    def _readings(self, found: Sequence[RoutingMeasures]) -> list[_Reading]:
        if self._first_rms is None:
            self._first_rms = [layer.logit_rms for layer in found]
        readings: list[_Reading] = []
        places = zip(self.layers, found, self._idle, self._first_rms, strict=True)
        for layer, measured, idle, first_rms in places:
            idle.add(measured.counts, self._steps)
            if layer.top_k and layer.top_k < layer.num_experts:
                readings.append(_collapse(layer, measured, self.config))
                readings.append(_dead(layer, idle, self.config))
            readings.append(_drops(layer, measured, self.config))
            readings.append(_router_norm(layer, measured, first_rms, self.config))
        return [*readings, *_hidden(self.layers, found, self.config)]

    def _take(self, reading: _Reading, step: int) -> Alert | None:
        """Raise, keep, clear or leave one alert; return it if it was raised for the first time."""
        key = (reading.kind, reading.place)
        old = self._alerts.get(key)
        is_up = old is not None and old.is_up
        if not reading.is_bad(was_bad=is_up):
            if old is not None and is_up:
                self._alerts[key] = old.model_copy(update={"cleared": step})
            return None
        now: dict[str, Any] = {
            "value": reading.value,
            "limit": reading.limit,
            "experts": reading.experts,
            "words": reading.words(),
        }
        if old is None:
            alert = Alert(
                kind=reading.kind, layer=reading.layer, name=reading.place, step=step, **now
            )
            self._alerts[key] = alert
            return alert
        again = {} if is_up else {"cleared": None, "times": old.times + 1}
        self._alerts[key] = old.model_copy(update=now | again)
        return None


@dataclass(slots=True)
class _Idle:
    """For each expert of a layer the steps and assignments that passed since it got a token."""

    steps: list[int]
    assignments: list[int]

    @classmethod
    def of(cls, num_experts: int) -> "_Idle":
        return cls([0] * num_experts, [0] * num_experts)

    def add(self, counts: Sequence[int], steps: int) -> None:
        """Take the counts of a window."""
        total = sum(counts)
        for expert, count in enumerate(counts):
            self.steps[expert] = 0 if count else self.steps[expert] + steps
            self.assignments[expert] = 0 if count else self.assignments[expert] + total


def evenness(load: Sequence[float], top_k: int) -> float:
    """Return (H - ln k) / (ln E - ln k) of a load: 1 when even, 0 when all tokens have the same k experts."""
    entropy = sum(share * math.log(1 / share) for share in load if share)
    least = math.log(top_k)
    return (entropy - least) / (math.log(len(load)) - least)


def balance_score(load: Sequence[float]) -> float:
    """Return E times the sum of squared shares: 1 when even, E when one expert has everything.

    What the balance loss (`flanmoe.moe.losses.balance_loss`, a single choice counted) would be if the
    router's probabilities were its load.
    """
    return len(load) * sum(share * share for share in load)


def _where(layer: WatchedLayer) -> str:
    return f"layer {layer.layer} ({layer.name})"


def _collapse(layer: WatchedLayer, found: RoutingMeasures, config: AlertConfig) -> _Reading:
    """Too few experts in use, or one of them in use by nearly everybody."""
    even = layer.top_k / layer.num_experts
    tokens_of_busiest = max(found.counts) / max(found.tokens, 1)
    busiest = (tokens_of_busiest - even) / (1 - even)
    spread = evenness(found.load, layer.top_k)

    def words() -> str:
        return (
            f"The router of {_where(layer)} has collapsed: its load has {100 * max(spread, 0):.0f} % of the "
            f"evenness that top-{layer.top_k} of {layer.num_experts} experts can have (limit "
            f"{100 * config.min_evenness:.0f} %), and expert {found.counts.index(max(found.counts))} serves "
            f"{100 * tokens_of_busiest:.0f} % of the tokens. The experts left out learn nothing: the run pays "
            "for a larger model than it trains. Raise `router.balance_coefficient` or lower "
            "`learning_rate`, and go back to a checkpoint from before."
        )

    by_busiest = busiest > config.max_busiest and spread >= config.min_evenness
    value, limit = (busiest, config.max_busiest) if by_busiest else (spread, config.min_evenness)
    return _Reading(
        "collapse", layer.name, layer.layer, value, limit, bad_above=by_busiest, words=words
    )


def _dead(layer: WatchedLayer, idle: _Idle, config: AlertConfig) -> _Reading:
    """Experts without a token for longer than chance explains."""
    enough = -math.log(_CHANCE) * layer.num_experts / _LIVING_SHARE
    dead = tuple(
        expert
        for expert in range(layer.num_experts)
        if idle.steps[expert] >= config.dead_steps and idle.assignments[expert] >= enough
    )

    def words() -> str:
        named = ", ".join(map(str, dead[:8])) + (", ..." if len(dead) > 8 else "")
        steps = min(idle.steps[expert] for expert in dead)
        experts = f"Expert {named} of" if len(dead) == 1 else f"{len(dead)} experts ({named}) of"
        return (
            f"{experts} {_where(layer)} got no token in the last {steps} steps or more, "
            f"{min(idle.assignments[expert] for expert in dead):,} assignments of the layer. An expert "
            "without tokens gets no gradient and does not come back by itself, but costs memory. Raise "
            "`router.balance_coefficient`, or prune it."
        )

    return _Reading(
        "dead_expert",
        layer.name,
        layer.layer,
        float(len(dead)),
        0.0,
        bad_above=True,
        words=words,
        experts=dead,
    )


def _drops(layer: WatchedLayer, found: RoutingMeasures, config: AlertConfig) -> _Reading:
    """Choices that did not fit, or tokens that no expert took."""
    chosen_by_experts = layer.top_k == 0
    value = found.unserved_share if chosen_by_experts else found.dropped_share
    limit = config.max_unserved_share if chosen_by_experts else config.max_dropped_share

    def words() -> str:
        what = (
            f"{100 * value:.0f} % of the tokens of {_where(layer)} were taken by no expert"
            if chosen_by_experts
            else f"{100 * value:.0f} % of the choices of {_where(layer)} did not fit, "
            f"{100 * found.unserved_share:.0f} % of the tokens got no expert at all"
        )
        return (
            f"{what} (limit {100 * limit:.0f} %). Such tokens pass the layer unchanged: they are paid for, "
            "but not computed. Raise the router's capacity factor"
            f"{'' if chosen_by_experts else ', or `router.balance_coefficient`'}."
        )

    return _Reading("drops", layer.name, layer.layer, value, limit, bad_above=True, words=words)


def _router_norm(
    layer: WatchedLayer, found: RoutingMeasures, first: float, config: AlertConfig
) -> _Reading:
    """Logits that have grown since the beginning."""
    limit = config.max_logit_growth * max(first, _LEAST_LOGIT_RMS)

    def words() -> str:
        return (
            f"The router logits of {_where(layer)} have grown to {found.logit_rms:.1f} (root mean square) from "
            f"{first:.2f} in the first window (limit {limit:.1f}). Such a router is all but certain of its "
            "choices, which then hardly change any more, and rounds badly in low precision. Raise "
            "`router.z_coefficient` or lower `learning_rate`."
        )

    return _Reading(
        "router_norm", layer.name, layer.layer, found.logit_rms, limit, bad_above=True, words=words
    )


def _hidden(
    layers: Sequence[WatchedLayer], found: Sequence[RoutingMeasures], config: AlertConfig
) -> list[_Reading]:
    """Layers that are uneven each, in different places, so that together they look even."""
    groups: dict[tuple[str, int, int], list[RoutingMeasures]] = {}
    for layer, measured in zip(layers, found, strict=True):
        if layer.top_k:
            key = (_side(layer.name), layer.num_experts, layer.top_k)
            groups.setdefault(key, []).append(measured)
    readings: list[_Reading] = []
    for (side, num_experts, top_k), members in groups.items():
        if len(members) > 1 and top_k < num_experts:
            place = f"{len(members)} {side}layers of {num_experts} experts, top-{top_k}"
            readings.append(_hidden_in(place, top_k, members, config))
    return readings


def _hidden_in(
    place: str, top_k: int, members: Sequence[RoutingMeasures], config: AlertConfig
) -> _Reading:
    loads = [member.load for member in members]
    num_experts = len(loads[0])
    own = sum(map(balance_score, loads)) / len(loads)
    pooled = balance_score([sum(column) / len(loads) for column in zip(*loads, strict=True)])
    limit = min(config.min_hidden, 1 + 0.5 * (num_experts / top_k - 1))

    def words() -> str:
        return (
            f"The {place}, are uneven each, but even together: their balance scores have the mean {own:.2f} "
            f"(limit {limit:.2f}; 1 is even, {num_experts / top_k:.3g} the worst), that of their load put "
            f"together is {pooled:.2f}. A balance loss that pools layers, as transformers' own does, sees "
            "nothing wrong and corrects nothing. flanmoe's is taken layer by layer: raise "
            "`router.balance_coefficient`, and do not go by a pooled figure."
        )

    # Not even together means not hidden, whatever the layers are like.
    return _Reading(
        "imbalance_hidden_by_pooling",
        place,
        None,
        own if pooled <= config.max_pooled else 1.0,
        limit,
        bad_above=True,
        words=words,
    )


def _side(name: str) -> str:
    side = name.partition(".")[0]
    return f"{side} " if side in ("encoder", "decoder") else ""
