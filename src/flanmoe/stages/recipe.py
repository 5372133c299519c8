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
from flanmoe.core.errors import ConfigError
from flanmoe.data.denoised_stream import DenoisingConfig
from flanmoe.data.documents import DocumentsConfig
from flanmoe.data.mixture import MixtureConfig
from flanmoe.data.packing import PackingConfig
from flanmoe.data.tokenizer_training import TokenizerTrainingConfig
from flanmoe.evaluation.suites import SuiteConfig
from flanmoe.models.flan_moe_t5.shape import shape_config
from flanmoe.models.flan_moe_t5.upcycle import T5UpcycleConfig
from flanmoe.models.flops import STATED_CONTEXT_LENGTH
from flanmoe.models.upcycle import UpcycleConfig
from flanmoe.training.arguments import TuneConfig


class UpcycleStage(UpcycleConfig):
    """Turn the dense decoder in hand into a sparse one."""

    stage: Literal["upcycle"]
    label: str = "upcycle"


class UpcycleT5Stage(T5UpcycleConfig):
    """Turn the dense T5 in hand into a FlanMoeT5."""

    stage: Literal["upcycle_t5"]
    label: str = "upcycle"


def _require_one_process(train: TuneConfig) -> None:
    if train.sharding != "none":
        raise ValueError(
            f"`train.sharding` must be `none` in a recipe, which runs in one process, but is "
            f"`{train.sharding}`; tune in several processes from Python (`docs/guide/distributed.md`)"
        )


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
    def _one_target_length(self) -> "TuneStage":
        if self.packing.target_length != self.train.target_length:
            raise ValueError(
                "`packing.target_length` and `train.target_length` must be equal, but found "
                f"{self.packing.target_length} and {self.train.target_length}; set both for an "
                "encoder-decoder, none for a decoder"
            )
        return self

    @model_validator(mode="after")
    def _in_one_process(self) -> "TuneStage":
        _require_one_process(self.train)
        return self


class PretrainStage(Config):
    """Train the encoder-decoder in hand, or a new one, to put back what was left out of plain texts.

    Attributes:
        shape: of a model that starts from nothing: a name (`st_moe_base`) or settings of `FlanMoeT5Config`;
            None to go on with the model in hand.
        tokenizer: which tokenizer is trained on the documents for it.
        documents: which texts.
        denoising: how they become rows.
        train: steps, rates, router losses; `length` and `target_length` follow from `denoising`.
    """

    stage: Literal["pretrain"]
    label: str = "pretrain"
    shape: str | dict[str, Any] | None = None
    tokenizer: TokenizerTrainingConfig | None = None
    documents: DocumentsConfig
    denoising: DenoisingConfig = DenoisingConfig()
    train: TuneConfig = TuneConfig()

    @model_validator(mode="after")
    def _a_shape_has_a_tokenizer(self) -> "PretrainStage":
        if (self.shape is None) != (self.tokenizer is None):
            missing = "shape" if self.shape is None else "tokenizer"
            raise ValueError(
                f"a new model needs `shape` and `tokenizer`, but `{missing}` is not set; set both, or neither "
                "to go on with the model in hand"
            )
        if self.shape is not None and self.tokenizer is not None:
            try:
                shape_config(self.shape, vocabulary_size=self.tokenizer.vocabulary_size)
            except ConfigError as error:
                raise ValueError(str(error)) from error
        return self

    @model_validator(mode="after")
    def _lengths_follow(self) -> "PretrainStage":
        """Put the lengths of the rows into `train`, where the trainer looks for them."""
        lengths = self.denoising.built().lengths(self.denoising.length)
        follows = {"length": lengths.inputs, "target_length": lengths.targets}
        for name, expected in follows.items():
            found, default = getattr(self.train, name), TuneConfig.model_fields[name].default
            if found not in (expected, default):
                raise ValueError(
                    f"`train.{name}` follows from `denoising` ({expected}), but is {found}; leave it out"
                )
        return self.model_copy(update={"train": self.train.model_copy(update=follows)})

    @model_validator(mode="after")
    def _in_one_process(self) -> "PretrainStage":
        _require_one_process(self.train)
        return self

    @model_validator(mode="after")
    def _all_of_it_trains(self) -> "PretrainStage":
        if self.train.tuner is not None:
            raise ValueError(
                f"`train.tuner` is for stages of the kind `tune`, but is {self.train.tuner.kind} in a "
                "pre-training; leave it out"
            )
        return self


class EvaluateStage(SuiteConfig):
    """Score the model in hand on tasks that it is not trained on."""

    stage: Literal["evaluate"]
    label: str = "evaluate"


Stage = Annotated[
    PretrainStage | UpcycleStage | UpcycleT5Stage | TuneStage | EvaluateStage,
    Field(discriminator="stage"),
]


class StageDefaults(Config):
    """Settings that stand under every stage of a kind; each a part of what the kind has."""

    pretrain: dict[str, Any] = {}
    upcycle: dict[str, Any] = {}
    upcycle_t5: dict[str, Any] = {}
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


def leaves_model(stage: Stage) -> bool:
    """Return whether a stage leaves a model behind: not a score, nor a tuner that is not merged."""
    if isinstance(stage, TuneStage | PretrainStage):
        return stage.train.tuner is None or stage.train.tuner.merge
    return not isinstance(stage, EvaluateStage)


def _nothing_follows_an_adapter(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    for stage in stages[:-1]:
        if not isinstance(stage, EvaluateStage) and not leaves_model(stage):
            raise ValueError(
                f"a stage whose tuner is not merged must be the last, but found {len(stages)} stages with "
                f"`{stage.label}` before the last: they would work on the model as it was; set "
                "`tuner.merge: true`"
            )
    return stages


Stages = Annotated[
    tuple[Stage, ...],
    Field(min_length=1),
    AfterValidator(_labels_are_unique),
    AfterValidator(_nothing_follows_an_adapter),
]


def require_a_start(model: str | None, stages: Sequence[Stage]) -> None:
    """Check that stages have a model to begin with: one that is named, or one that the first of them makes.

    Raises:
        ValueError: if there is none, or there are two.
    """
    makes_one = isinstance(stages[0], PretrainStage) and stages[0].shape is not None
    if model is None and not makes_one:
        raise ValueError(
            "`model` must be named, unless the first stage is `pretrain` with a `shape`, but is not set; name "
            "a model, or give that stage"
        )
    if model is not None and makes_one:
        raise ValueError(
            f"`model` must not be set where the first stage makes one (`shape`), but is `{model}`; leave one "
            "of them out"
        )


class Recipe(Config):
    """A model and the stages that it goes through.

    Attributes:
        name: names the run folder.
        description: one sentence for the report.
        model: `smollm2-135m-instruct`, a folder, or a hub id; None where the first stage makes one.
        seed: root of every draw.
        stages: in the order in which they run; labels are unique.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    model: str | None = None
    seed: int = 0
    stages: Stages

    @model_validator(mode="after")
    def _there_is_a_model(self) -> "Recipe":
        require_a_start(self.model, self.stages)
        return self


def stated_lengths(stages: Sequence[Stage]) -> tuple[int, int | None]:
    """Return the row that the FLOPs of an arm's model are stated at: that of its last training.

    The second length is that of an encoder-decoder's targets.
    """
    lengths = [
        (stage.train.length, stage.train.target_length)
        for stage in stages
        if isinstance(stage, TuneStage | PretrainStage)
    ]
    return lengths[-1] if lengths else (STATED_CONTEXT_LENGTH, None)
