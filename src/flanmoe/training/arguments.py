"""`TuneConfig`, what a user says about a tuning run, and what transformers.Trainer is told for it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch.optim import Optimizer
from transformers import TrainingArguments

from flanmoe.core.config import Config
from flanmoe.core.errors import ConfigError
from flanmoe.core.seeds import SeedTree
from flanmoe.models.freezing import FreezePresets
from flanmoe.models.precision import ChosenPrecision
from flanmoe.training.adafactor import Adafactor
from flanmoe.training.router_losses import RouterLossConfig
from flanmoe.training.routing_monitor import RoutingMonitorConfig
from flanmoe.training.sharding import Sharding
from flanmoe.tuners.tuning import TunerConfig

_SCHEDULERS = {
    "constant": "constant_with_warmup",
    "linear": "linear",
    "cosine": "cosine",
    "inverse_sqrt": "inverse_sqrt",
}


class TuneConfig(Config):
    """How a model is tuned.

    Attributes:
        steps: optimizer steps.
        rows_per_step: packed rows of one optimizer step, over all processes.
        micro_batch_rows: rows that go through the model at once; changes memory and speed, not the
            result (but for the router-loss scope `micro_batch`).
        length: tokens in a row, of an encoder-decoder in a row of the encoder.
        target_length: tokens in a row of the decoder of an encoder-decoder; None for decoders.
        optimizer: `adamw`, or `adafactor`, whose learning rate is relative to the scale of each weight
            (`flanmoe.training.adafactor`; docs/guide/training.md).
        learning_rate: the largest learning rate, reached after the warm-up.
        warmup_steps: steps over which the learning rate rises linearly from 0.
        schedule: what the learning rate does after the warm-up; `linear` and `cosine` fall to 0,
            `inverse_sqrt` with the square root of the steps: learning_rate * sqrt(warmup_steps / step).
        weight_decay: decoupled weight decay (biases and norms are left out).
        max_grad_norm: gradients with a larger norm are scaled down to it; 0 turns that off.
        adam_beta1, adam_beta2: decay of AdamW's moments; without effect on Adafactor.
        precision: `bfloat16` computes in bfloat16 where autocast does, with float32 weights and
            optimizer state; `float32` computes everything in float32; `auto` stands for bfloat16 on
            machines with instructions for it, for float32 elsewhere (`flanmoe.models.precision`).
        router: the router losses; without effect on a dense model.
        routing: what is recorded of the routing, and when it is called wrong; without effect on a dense
            model.
        freeze: parts of the model that keep their weights, any of `gate`, `experts`, `moe`,
            `non_moe` and `attention` together; see `flanmoe.models.freezing`. FLOPs are counted as
            if everything trained.
        tuner: trains something small in place of the model's own weights, which all stay frozen: low-rank
            changes of experts, or the experts that a task uses; see `flanmoe.tuners`.
        dropout: rate of all dropout of the model but that inside experts while it trains; None leaves the
            model's own; see `flanmoe.models.dropout`.
        expert_dropout: share of the hidden units inside routed experts that is dropped, beside
            whatever dropout the model's configuration has; None leaves the experts' own rate, which
            is 0 in native models; see `flanmoe.models.expert_dropout`.
        keep_expert_activation: keep the activations inside routed experts for the backward pass instead of
            computing them again; changes memory and speed, not the result. It takes a number for each unit
            of each expert that a token visits; see `flanmoe.models.kept_activation`.
        checkpoint_every_steps: how often to save, and at the end; None saves after Ctrl-C only.
        keep_checkpoints: how many complete checkpoints stay on disk.
        gradient_checkpointing: compute activations again in the backward pass to save memory.
        sharding: `fsdp` spreads weights, gradients and optimizer state over the processes, of which
            there must be at least 2 (torchrun); with `none` each of them holds everything.
        seed: another value draws dropout and router noise anew; the data stays the same.
    """

    steps: int = Field(default=100, ge=1)
    rows_per_step: int = Field(default=8, ge=1)
    micro_batch_rows: int = Field(default=1, ge=1)
    length: int = Field(default=1024, ge=2)
    target_length: int | None = Field(default=None, ge=2)
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    learning_rate: float = Field(default=2e-5, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "linear"
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    precision: ChosenPrecision = "bfloat16"
    router: RouterLossConfig = RouterLossConfig()
    routing: RoutingMonitorConfig = RoutingMonitorConfig()
    freeze: FreezePresets = ()
    tuner: TunerConfig | None = None
    dropout: float | None = Field(default=None, ge=0, lt=1)
    expert_dropout: float | None = Field(default=None, ge=0, lt=1)
    keep_expert_activation: bool = False
    checkpoint_every_steps: int | None = Field(default=None, ge=1)
    keep_checkpoints: int = Field(default=1, ge=1)
    gradient_checkpointing: bool = False
    sharding: Sharding = "none"
    seed: int = Field(default=0, ge=0)

    @field_validator("micro_batch_rows")
    @classmethod
    def _micro_batches_fill_a_step(cls, value: int, info: ValidationInfo) -> int:
        rows = info.data.get("rows_per_step")
        if rows is not None and rows % value:
            raise ValueError(
                f"must divide `rows_per_step` ({rows}) without remainder, but is {value}; "
                "an optimizer step is made of whole micro-batches"
            )
        return value

    @field_validator("warmup_steps")
    @classmethod
    def _warm_up_ends(cls, value: int, info: ValidationInfo) -> int:
        steps = info.data.get("steps")
        if steps is not None and value > steps:
            raise ValueError(
                f"must be at most `steps` ({steps}), but is {value}; "
                "the learning rate would never be reached"
            )
        return value

    @field_validator("schedule")
    @classmethod
    def _inverse_square_root_begins(cls, value: str, info: ValidationInfo) -> str:
        if value == "inverse_sqrt" and info.data.get("warmup_steps") == 0:
            raise ValueError(
                "must not be `inverse_sqrt` with `warmup_steps: 0`; the learning rate falls with the steps as "
                "multiples of the warm-up, so set `warmup_steps`"
            )
        return value

    @field_validator("tuner")
    @classmethod
    def _tuner_freezes(cls, value: TunerConfig | None, info: ValidationInfo) -> TunerConfig | None:
        frozen = info.data.get("freeze")
        if value is not None and frozen:
            raise ValueError(
                f"must not be set beside `freeze` ({', '.join(frozen)}), but is {value.kind}; with a tuner "
                "all of the model is frozen, so leave one of them out"
            )
        return value

    @field_validator("sharding")
    @classmethod
    def _optimizer_can_be_sharded(cls, value: Sharding, info: ValidationInfo) -> Sharding:
        if value != "none" and info.data.get("optimizer") == "adafactor":
            raise ValueError(
                f"must be `none` with `optimizer: adafactor`, but is `{value}`; its statistics are taken over "
                "whole weights"
            )
        return value


def require_target_length(config: TuneConfig, *, is_encoder_decoder: bool) -> None:
    """Check that a decoder's rows have a length exactly where there is an encoder as well.

    Args:
        config: the user's settings.
        is_encoder_decoder: whether the model to be tuned is one.

    Raises:
        ConfigError: says which of the two is wrong.
    """
    if is_encoder_decoder and config.target_length is None:
        raise ConfigError(
            "An encoder-decoder needs `target_length`, the tokens in a row of its decoder, but it is "
            "not set. Set it beside `length`, which is that of the encoder."
        )
    if not is_encoder_decoder and config.target_length is not None:
        raise ConfigError(
            f"`target_length` is for encoder-decoders, but is {config.target_length} and the model is "
            "a decoder, whose rows hold prompt and response together. Leave it out."
        )


def chosen_optimizer(
    config: TuneConfig,
) -> tuple[type[Optimizer], Mapping[str, Any]] | None:
    """Return class and settings of an optimizer that transformers does not have; None for its AdamW."""
    if config.optimizer == "adamw":
        return None
    return Adafactor, {"lr": config.learning_rate}


def training_arguments(config: TuneConfig, folder: Path, seeds: SeedTree) -> TrainingArguments:
    """Return what transformers.Trainer is to be told.

    Args:
        config: the user's settings.
        folder: where checkpoints go.
        seeds: the branch of the seed tree that belongs to this run.

    Raises:
        ConfigError: if the rows of a step cannot be shared evenly between the processes, or there
            are too few processes to shard over.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.micro_batch_rows,
        learning_rate=config.learning_rate,
        lr_scheduler_type=_SCHEDULERS[config.schedule],
        warmup_steps=config.warmup_steps,
        optim="adamw_torch_fused",
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        bf16=config.precision == "bfloat16",
        # float32 means float32: no TF32 inside matrix products that are not in bfloat16.
        tf32=False,
        activation_checkpointing=config.gradient_checkpointing,
        # The recorder needs the first pass to have gradients, which the reentrant variant lacks.
        activation_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=not torch.accelerator.is_available(),
        save_strategy="steps" if config.checkpoint_every_steps else "no",
        save_steps=config.checkpoint_every_steps or config.steps,
        # Every step is logged, by our own callbacks; a loss that is not finite stops the run.
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        # Values below 2**32, which is what numpy takes.
        seed=seeds.child("trainer", config.seed).integer() % 2**32,
        # The stream restores its own position; see trainer.py.
        ignore_data_skip=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        # Gradients that are summed up before they are spread would be held whole by every process.
        accelerator_config={
            "gradient_accumulation_kwargs": {"sync_each_batch": config.sharding == "fsdp"}
        },
    )
    _require_processes(config, arguments.world_size)
    arguments.gradient_accumulation_steps = _micro_batches(config, arguments.world_size)
    return arguments


def _require_processes(config: TuneConfig, num_processes: int) -> None:
    if config.sharding == "fsdp" and num_processes < 2:
        raise ConfigError(
            "`sharding: fsdp` needs at least 2 processes to spread the model over, but there is "
            f"{num_processes}. Start a script with `torchrun --nproc-per-node 2` "
            "(`docs/guide/distributed.md`), or set `sharding: none`."
        )


def _micro_batches(config: TuneConfig, num_processes: int) -> int:
    rows = config.micro_batch_rows * num_processes
    if config.rows_per_step % rows:
        raise ConfigError(
            f"`rows_per_step` must be a multiple of `micro_batch_rows` ({config.micro_batch_rows}) "
            f"times the number of processes ({num_processes}), but is {config.rows_per_step}. "
            f"Set it to a multiple of {rows}."
        )
    return config.rows_per_step // rows
