"""Tuners by configuration: put into a model for the time of a `with` block, and counted before there is one."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from flanmoe.core.errors import ConfigError
from flanmoe.core.seeds import SeedTree
from flanmoe.models.meta import meta_model
from flanmoe.statistics import ExpertStatistics
from flanmoe.tuners.attached import AttachedTuner
from flanmoe.tuners.expert_specialised import (
    ExpertSpecialisedConfig,
    ExpertSpecialisedTuner,
    most_experts,
    selection_of,
)
from flanmoe.tuners.low_rank import LowRankConfig, attach_low_rank

TunerConfig = Annotated[LowRankConfig | ExpertSpecialisedConfig, Field(discriminator="kind")]


def attach(
    model: PreTrainedModel, config: LowRankConfig | ExpertSpecialisedConfig, seeds: SeedTree
) -> AttachedTuner:
    """Put a tuner into a model and freeze everything else.

    Args:
        model: a sparse model that runs flanmoe's compute.
        config: which tuner.
        seeds: the branch of the seed tree that new weights are drawn from.

    Raises:
        ModelError: if the tuner does not suit the model.
        ConfigError: if experts are to be chosen without statistics.
        RunError: if the file of statistics cannot be read.
    """
    if isinstance(config, LowRankConfig):
        return attach_low_rank(model, config, seeds.child("low_rank").torch())
    if config.statistics is None:
        raise ConfigError(
            "`tuner: {kind: expert_specialised}` needs `statistics`, a file of what the model does with the "
            "task, but it is not set. Gather it with `flanmoe.statistics.collect`; a recipe gathers its own."
        )
    statistics = ExpertStatistics.load(Path(config.statistics))
    return ExpertSpecialisedTuner(model, selection_of(config, model, statistics))


@contextmanager
def attached(
    model: PreTrainedModel,
    config: LowRankConfig | ExpertSpecialisedConfig | None,
    seeds: SeedTree,
) -> Generator[AttachedTuner | None]:
    """Have a tuner in a model inside the `with` block; without a configuration nothing changes.

    What is not merged by then is taken off at the end, and the model is as it was.

    Raises:
        ModelError, ConfigError, RunError: as `attach` does.
    """
    if config is None:
        yield None
        return
    tuner = attach(model, config, seeds)
    try:
        yield tuner
    finally:
        tuner.detach()


def planned_parameters(
    model: PreTrainedModel, config: LowRankConfig | ExpertSpecialisedConfig
) -> list[nn.Parameter]:
    """Return what a tuner would train in a model, without memory (meta device).

    Where it depends on statistics that are not there yet it is the most that it can be.

    Raises:
        ModelError: if the tuner does not suit the model.
        RunError: if the file of statistics cannot be read.
    """
    twin = meta_model(model.config)
    if isinstance(config, LowRankConfig):
        tuner: AttachedTuner = attach_low_rank(twin, config, SeedTree(0).torch())
    elif config.statistics is None:
        tuner = ExpertSpecialisedTuner(twin, most_experts(config, twin))
    else:
        statistics = ExpertStatistics.load(Path(config.statistics))
        tuner = ExpertSpecialisedTuner(twin, selection_of(config, twin, statistics))
    return list(tuner.trained.values())
