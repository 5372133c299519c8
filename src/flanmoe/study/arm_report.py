"""What a report shows of one arm, as frozen data: sizes, costs, scores, curves, expert load.

Units are those of `report_data`.
"""

import math
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from flanmoe.core.config import Config
from flanmoe.core.ledger import Ledger
from flanmoe.moe.alerts import Alert


def _none_unless_finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# A diverged run has losses that are not numbers. JSON has none of those, so they are kept as None and shown
# as "not finite": the report of such a run matters most.
Measured = Annotated[float | None, BeforeValidator(_none_unless_finite)]


class Score(Config):
    """A mean over examples and how far it may be off.

    Attributes:
        mean: the mean, None where it is not finite.
        standard_error: its standard error, None where the sample does not tell (one example).
        num_examples: how many examples the mean is over.
        chance: what guessing scores on the same examples; None where that has no meaning (a loss).
    """

    mean: Measured
    standard_error: Measured = None
    num_examples: int
    chance: float | None = None


class TaskScore(Config):
    """Scores on one task.

    Attributes:
        task: name of the task.
        loss: nats per token of the reference answer, None where none is scored.
        accuracy: share of right answers, None where nothing is right or wrong.
        num_seen: how many of the evaluated examples the model was trained on.
        num_truncated: how many prompts were cut on their left to fit into the model's positions.
    """

    task: str
    loss: Score | None
    accuracy: Score | None = None
    num_seen: int = 0
    num_truncated: int = 0


class ClusterScore(Config):
    """Scores on the tasks of one kind, every task counting the same.

    Attributes:
        cluster: the kind.
        num_tasks: tasks of that kind.
        loss: nats per token of the reference answer, None where none is scored; its examples are tasks.
        accuracy: share of right choices, None where no task has choices.
    """

    cluster: str
    num_tasks: int
    loss: Score | None
    accuracy: Score | None = None


class Evaluation(Config):
    """Scores of one model over all held-out tasks.

    Attributes:
        loss: mean over all examples, None where no reference answers are scored.
        accuracy: mean over the examples that have choices, None where none has.
        tasks: the same task by task.
        clusters: the same by kind of task.
    """

    loss: Score | None
    accuracy: Score | None = None
    tasks: tuple[TaskScore, ...] = ()
    clusters: tuple[ClusterScore, ...] = ()

    @property
    def num_seen(self) -> int:
        """How many evaluated examples the model was trained on."""
        return sum(task.num_seen for task in self.tasks)


class CurvePoint(Config):
    """Training loss at one moment.

    Attributes:
        tokens: real tokens (padding left out) trained on so far.
        loss: cross-entropy of the step in nats per loss token, router losses left out; None where it is
            not finite.
        flops: floating-point operations of the arm's tunings so far; None where they were not counted.
    """

    tokens: int
    loss: Measured
    flops: float | None = None


class LossCurve(Config):
    """The training losses of one seed, in order."""

    seed: int
    points: tuple[CurvePoint, ...]


class Parameters(Config):
    """Parameter counts; tied embeddings count once.

    Attributes:
        total: all of them.
        active: those that one token passes through.
        trainable: those that the optimizer changes.
    """

    total: int
    active: int
    trainable: int


class Flops(Config):
    """Floating-point operations of one token's forward pass; training costs three times as much.

    Attributes:
        body: all matrix products of the layers.
        head: the output layer.
        attention_scores: queries times keys and weights times values, at `context_length`.
        context_length: tokens that the attention scores are counted for.
    """

    body: float
    head: float
    attention_scores: float
    context_length: int

    @property
    def total(self) -> float:
        """Body, head and attention scores together."""
        return self.body + self.head + self.attention_scores


class Memory(Config):
    """What was estimated before the run beside what was measured in it, in bytes.

    Attributes:
        estimate: name of each part (weights, gradients, ...) to its size.
        measured: peak during training, None where the system cannot tell.
    """

    estimate: dict[str, int]
    measured: int | None = None

    @property
    def estimate_total(self) -> int:
        """All parts of the estimate together."""
        return sum(self.estimate.values())

    @property
    def relative_error(self) -> float | None:
        """How far the estimate lies above (+) or below (-) the measurement, as a share of it."""
        if not self.measured:
            return None
        return self.estimate_total / self.measured - 1


class TaskLoad(Config):
    """Where the tokens of one task went.

    Attributes:
        task: name of the task.
        tokens: its tokens that the layer that saw most of them saw.
        shares: for each layer the share of its assignments that each expert got.
        entropy_share: for each layer the entropy of that row as a share of the largest there is.
        confidence: for each layer the mean largest router probability of its tokens.
    """

    task: str
    tokens: int
    shares: tuple[tuple[float, ...], ...]
    entropy_share: tuple[float, ...]
    confidence: tuple[float, ...]


class ExpertLoadReport(Config):
    """How evenly the experts were used.

    Attributes:
        layers: number of each sparse layer in its model, in the order of `shares`.
        shares: for each layer the share of assignments that each expert got; each row sums to 1.
        entropy_nats: for each layer the entropy of its row; ln(experts) means even use.
        sides: for each layer of an encoder-decoder the side that it is on; empty for decoders.
        dropped_share: for each layer the choices that did not fit, over those that were asked for.
        unserved_share: for each layer the tokens that no expert took, over all.
        tasks: where the tokens of single tasks went; of many tasks those with the most tokens.
        num_tasks: how many tasks there were.
    """

    layers: tuple[int, ...]
    shares: tuple[tuple[float, ...], ...] = Field(min_length=1)
    entropy_nats: tuple[float, ...] = ()
    sides: tuple[str, ...] = ()
    dropped_share: tuple[float, ...] = ()
    unserved_share: tuple[float, ...] = ()
    tasks: tuple[TaskLoad, ...] = ()
    num_tasks: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """What each layer is called: its number, with its side where there are two."""
        if not self.sides:
            return tuple(str(layer) for layer in self.layers)
        return tuple(f"{side} {layer}" for side, layer in zip(self.sides, self.layers, strict=True))

    @model_validator(mode="after")
    def _one_row_a_layer(self) -> "ExpertLoadReport":
        if len(self.layers) != len(self.shares):
            raise ValueError(
                f"`layers` must name every row of `shares` ({len(self.shares)}), but found "
                f"{len(self.layers)} names"
            )
        if len({len(row) for row in self.shares}) != 1 or not self.shares[0]:
            raise ValueError("every layer must have the same number of experts, but found several")
        return self

    @property
    def num_experts(self) -> int:
        """Experts of a layer."""
        return len(self.shares[0])

    @property
    def max_over_mean(self) -> float:
        """The busiest expert of any layer, as a multiple of the even share."""
        return max(max(row) for row in self.shares) * self.num_experts

    @property
    def num_unused(self) -> int:
        """Experts that no token was sent to, over all layers."""
        return sum(share == 0 for row in self.shares for share in row)


class RoutingCurvePoint(Config):
    """How even the load was at one moment.

    Attributes:
        tokens: real tokens trained on so far.
        worst, mean: entropy of the load as a share of the largest there is, of the most uneven layer and
            as a mean over layers.
    """

    tokens: int
    worst: float
    mean: float


class AlertReport(Config):
    """An alert about routing, and the tuning that raised it."""

    seed: int
    stage: str
    alert: Alert


class RouterLosses(Config):
    """Settings of the router losses and what they were at the end of training.

    Attributes:
        settings: coefficients and scope.
        last: raw values (before their coefficients) of the last step, mean over layers.
    """

    settings: dict[str, float | str] = {}
    last: dict[str, Measured] = {}


class PretrainingReport(Config):
    """One pre-training of an arm.

    Attributes:
        label: name of the stage.
        tokens: tokens that it went through, padding left out.
        epochs: how often its documents were gone through.
        loss: cross-entropy of the last step, in nats per target token.
        held_out_loss: the same on texts kept from training, None where none were.
    """

    label: str
    tokens: int
    epochs: float
    loss: float
    held_out_loss: float | None


class ArmReport(Config):
    """One arm of the study: what was built, what it cost, how it scored.

    Attributes:
        label: name of the arm.
        description: what the arm is, in a few words.
        seeds: the seeds it ran with.
        parameters: counts of the model that the arm ends with; trainable is what its last tuning trained, 0
            where nothing was tuned.
        flops: operations of one token in that model.
        pretraining: every pre-training of the first seed, in order.
        ledger: costs of every tuning, all seeds together.
        memory: estimate and measurement of the last tuning.
        before: scores before tuning, None where nothing was evaluated then.
        after: scores after tuning; over several seeds the mean over seeds.
        curves: training losses, one curve a seed through all its tunings.
        expert_load: use of experts during training, None for a dense model.
        routing_curve: how even the load was in the course of the first seed's tunings.
        alerts: what was wrong with the routing in any tuning of any seed.
        router_losses: None for a dense model.
        step0_max_abs_diff: largest logit difference between the sparse model before tuning and the dense
            model that it was made from; None for an arm that was not upcycled.
    """

    label: str
    description: str = ""
    seeds: tuple[int, ...] = (0,)
    parameters: Parameters
    flops: Flops
    pretraining: tuple[PretrainingReport, ...] = ()
    ledger: Ledger
    memory: Memory | None = None
    before: Evaluation | None = None
    after: Evaluation | None = None
    curves: tuple[LossCurve, ...] = ()
    expert_load: ExpertLoadReport | None = None
    routing_curve: tuple[RoutingCurvePoint, ...] = ()
    alerts: tuple[AlertReport, ...] = ()
    router_losses: RouterLosses | None = None
    step0_max_abs_diff: float | None = None

    @property
    def was_tuned(self) -> bool:
        """Whether the arm trained at all."""
        return self.ledger.steps > 0
