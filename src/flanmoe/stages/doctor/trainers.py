"""The trainers of other libraries, set up alike: the CPU, nothing saved, nothing reported."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from flanmoe.stages.doctor.installed import library
from flanmoe.stages.doctor.tiny import tiny_tokenizer


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """What a trainer is to do.

    Attributes:
        model: what is trained, in place.
        rows: token ids, one list a row; all of them are targets.
        rows_per_batch: rows of one micro-batch on one process.
        micro_batches: micro-batches of a step.
        steps: optimizer steps.
        folder: for what a trainer cannot help writing.
        learning_rate: constant over the steps.
        optimizer: None takes the trainer's own.
        callbacks: of transformers' kind.
    """

    model: PreTrainedModel
    rows: Sequence[list[int]]
    rows_per_batch: int
    micro_batches: int
    steps: int
    folder: str
    learning_rate: float = 0.0
    optimizer: torch.optim.Optimizer | None = None
    callbacks: list[TrainerCallback] = field(default_factory=list)

    def settings(self) -> dict[str, Any]:
        """Return it as transformers' `TrainingArguments` spell it."""
        return {
            "output_dir": self.folder,
            "per_device_train_batch_size": self.rows_per_batch,
            "gradient_accumulation_steps": self.micro_batches,
            "max_steps": self.steps,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "bf16": False,
            "use_cpu": True,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
        }


MakeTrainer = Callable[[TrainingJob], Trainer]


def plain_trainer(job: TrainingJob) -> Trainer:
    """Return transformers' own `Trainer`."""
    return Trainer(
        model=job.model,
        args=TrainingArguments(**job.settings()),
        train_dataset=_examples(job),  # pyright: ignore[reportArgumentType]
        callbacks=job.callbacks,
        optimizers=(job.optimizer, None),
    )


def sft_trainer(job: TrainingJob, **options: Any) -> Trainer:
    """Return TRL's `SFTTrainer`; `options` are further ones of its `SFTConfig`."""
    trl = library("trl")
    return trl.SFTTrainer(
        model=job.model,
        args=trl.SFTConfig(**{**job.settings(), "max_length": None, **options}),
        train_dataset=Dataset.from_list(_examples(job)),
        processing_class=tiny_tokenizer(),
        callbacks=job.callbacks,
        optimizers=(job.optimizer, None),
    )


def _examples(job: TrainingJob) -> list[dict[str, list[int]]]:
    return [{"input_ids": row, "labels": row} for row in job.rows]
