"""What is wrong with a model's routing on the data that it was inspected with.

Limits and judgement are those of training (`flanmoe.moe.alerts`); the words are others, since nothing is being
trained: an expert without a token here may have its tokens elsewhere. Growth of router logits needs two points
in time and is not looked for.
"""

from flanmoe.core.config import Config
from flanmoe.moe.alerts import Alert, AlertConfig, AlertMonitor, WatchedLayer
from flanmoe.statistics import ExpertStatistics

# One pass is one step, judged by itself.
_ONE_PASS = {"window_steps": 1, "dead_steps": 1}
_MOST_EXPERTS = 12


class InspectAlert(Config):
    """Something about routing that a user should know.

    Attributes:
        kind: what it is, by its name in `flanmoe.moe.alerts`.
        layer: number of the layer; None where it is about several.
        name: path of the layer, or what several have in common.
        experts: the experts that it is about, where it is about some.
        value, limit: what was found, and what would still be good.
        words: what it means and what to do.
    """

    kind: str
    layer: int | None
    name: str
    experts: tuple[int, ...]
    value: float
    limit: float
    words: str


def inspect_alerts(statistics: ExpertStatistics) -> tuple[tuple[InspectAlert, ...], bool]:
    """Judge the tokens of all groups together.

    Returns:
        the alerts, and whether there were enough tokens to judge; without enough there are none.
    """
    layers = [
        WatchedLayer(layer.layer, layer.name, layer.num_experts, layer.top_k)
        for layer in statistics.layers
    ]
    monitor = AlertMonitor(AlertConfig(**_ONE_PASS), layers)
    found = monitor.after_step(1, [layer.sums for layer in statistics.layers])
    # A window that is too small stays open for the next step, which never comes.
    judged = not monitor.state_dict()["steps"]
    return tuple(map(_told, found)), judged


def _told(alert: Alert) -> InspectAlert:
    return InspectAlert(
        kind=alert.kind,
        layer=alert.layer,
        name=alert.name,
        experts=alert.experts,
        value=alert.value,
        limit=alert.limit,
        words=_words(alert),
    )


def _words(alert: Alert) -> str:
    where = f"layer {alert.layer} ({alert.name})"
    if alert.kind == "collapse":
        return (
            f"Collapse: the router of {where} sends nearly everything to few experts (value {alert.value:.2f}, "
            f"limit {alert.limit:.2f}). On these tasks the other experts are memory without use: train with a "
            "larger `router.balance_coefficient`, or prune them."
        )
    if alert.kind == "dead_expert":
        number = len(alert.experts)
        named = ", ".join(map(str, alert.experts[:_MOST_EXPERTS]))
        more = ", ..." if number > _MOST_EXPERTS else ""
        return (
            f"Unused: {number} {'expert' if number == 1 else 'experts'} of {where} got no token of these "
            f"tasks, more than chance explains ({named}{more}). Inspect other tasks before you prune; an "
            "expert that stays without tokens in training learns nothing."
        )
    if alert.kind == "drops":
        return (
            f"Drops: {100 * alert.value:.0f} % of what was asked of {where} was not computed (limit "
            f"{100 * alert.limit:.0f} %); such tokens pass the layer unchanged. Raise the capacity factor of "
            "its router. Capacity is shared out within a batch, so the share depends on what is read together."
        )
    return (
        f"Hidden by pooling: the {alert.name}, are uneven each in other places, so that their loads together "
        f"look even (mean balance score of the layers {alert.value:.2f}, limit {alert.limit:.2f}, 1 is even). "
        "Go by the figures of each layer; a balance loss over pooled layers, as transformers' own, sees "
        "nothing."
    )
