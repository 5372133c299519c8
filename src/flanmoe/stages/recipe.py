"""`Recipe`: a chain of stages as data.

A recipe names a model and what is done to it, in order. Every stage is one entry of `stages` with its kind
under `stage`:

    name: first-steps
    model: smollm2-135m-instruct
    stages:
      - {stage: upcycle, num_experts: 8, top_k: 2}
      - stage: tune
        data: {tasks: [{name: exemplars/mmlu_cot/*}]}
        train: {steps: 20}
      - {stage: evaluate, label: after, tasks: [{name: exemplars/bbh/*}]}
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from flanmoe.core.config import Config
from flanmoe.data.mixture import MixtureConfig
from flanmoe.data.packing import PackingConfig
from flanmoe.evaluation.suites import SuiteConfig
from flanmoe.models.flops import STATED_CONTEXT_LENGTH
from flanmoe.models.upcycle import UpcycleConfig
from flanmoe.training.arguments import TuneConfig


class UpcycleStage(UpcycleConfig):
    """Turn the dense model in hand into a sparse one."""

    stage: Literal["upcycle"]
    label: str = "upcycle"


class TuneStage(Config):
    """Tune the model in hand on a mixture of tasks.

    Attributes:
        data: which tasks, at which rates.
        packing: how examples are put into rows.
        train: steps, rates, router losses.
    """

    stage: Literal["tune"]
    label: str = "tune"
    data: MixtureConfig
    packing: PackingConfig = PackingConfig()
    train: TuneConfig = TuneConfig()

    @model_validator(mode="after")
    def _one_length(self) -> "TuneStage":
        if self.packing.length != self.train.length:
            raise ValueError(
                f"`packing.length` and `train.length` must be equal, but found {self.packing.length} "
                f"and {self.train.length}; set both"
            )
        return self

    @model_validator(mode="after")
    def _in_one_process(self) -> "TuneStage":
        if self.train.sharding != "none":
            raise ValueError(
                f"`train.sharding` must be `none` in a recipe, which runs in one process, but is "
                f"`{self.train.sharding}`; tune in several processes from Python "
                "(`docs/guide/distributed.md`)"
            )
        return self


class EvaluateStage(SuiteConfig):
    """Score the model in hand on tasks that it is not trained on."""

    stage: Literal["evaluate"]
    label: str = "evaluate"


Stage = Annotated[UpcycleStage | TuneStage | EvaluateStage, Field(discriminator="stage")]


class StageDefaults(Config):
    """Settings that stand under every stage of a kind; each a part of what the kind has."""

    upcycle: dict[str, Any] = {}
    tune: dict[str, Any] = {}
    evaluate: dict[str, Any] = {}

    @property
    def given(self) -> dict[str, dict[str, Any]]:
        """The kinds that the file names, with their settings."""
        return {kind: settings for kind, settings in self if kind in self.model_fields_set}


def _labels_are_unique(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    labels = [stage.label for stage in stages]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(
            f"stage labels must be unique, but found {', '.join(twice)} more than once; set `label`"
        )
    return stages


Stages = Annotated[tuple[Stage, ...], Field(min_length=1), AfterValidator(_labels_are_unique)]


class Recipe(Config):
    """A model and the stages that it goes through.

    Attributes:
        name: names the run folder.
        description: one sentence for the report.
        model: `smollm2-135m-instruct`, a folder, or a hub id.
        seed: root of every draw.
        stages: in the order in which they run; labels are unique.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    model: str
    seed: int = 0
    stages: Stages


def stated_context_length(stages: Sequence[Stage]) -> int:
    """Return the context that the FLOPs of an arm's model are stated at: the last tuning's rows."""
    lengths = [stage.train.length for stage in stages if isinstance(stage, TuneStage)]
    return lengths[-1] if lengths else STATED_CONTEXT_LENGTH
