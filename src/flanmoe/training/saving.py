"""`SavingTrainer`: how a trainer's model lies on processes, is saved, and is taken over from a checkpoint.

Checkpoints are complete or do not count (`flanmoe.training.checkpoints`). Weights are read back by the model
class itself: transformers' own loading does not know the per-expert names that sparse models have on disk,
would keep the experts as they are, and only warn.
"""

from abc import abstractmethod
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import AutocastKwargs
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

from flanmoe.training import checkpoints
from flanmoe.training.sharding import Sharding, full_weights
from flanmoe.training.trained_weights import load_trained, save_trained
from flanmoe.tuners.attached import has_tuner


class SavingTrainer(Trainer):
    """A trainer whose model may be sharded and whose checkpoints are complete or absent.

    Attributes:
        keep_checkpoints: how many complete checkpoints stay on disk.
    """

    keep_checkpoints: int
    _given: PreTrainedModel
    _sharding: Sharding

    @abstractmethod
    def _run_state(self) -> checkpoints.RunState:
        """Return what this process goes on from beside weights, optimizer and random state."""

    @abstractmethod
    def _go_on_from(self, state: checkpoints.RunState) -> None:
        """Take over what `_run_state` gave."""

    @property
    def _layout(self) -> checkpoints.Layout:
        return checkpoints.Layout(num_processes=self.args.world_size, sharding=self._sharding)

    # ---- Sharding ----

    def _leave_sharding_alone(self) -> None:
        # Read by transformers: neither wrap the model for data parallelism nor spread it again.
        self.is_distributed_loading_by_transformers = True
        # The cache would hold every gathered weight a second time, in bfloat16, until the end of
        # the forward pass.
        cast(Any, self.accelerator).autocast_handler = AutocastKwargs(cache_enabled=False)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        # Sharded weights are where they belong.
        if self._sharding == "none":
            super()._move_model_to_device(model, device)

    # ---- Saving ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir))
        step = self.state.global_step
        with checkpoints.writing(folder, step=step, is_writer=self.args.should_save) as partial:
            self._save_weights(partial)
            self._save_optimizer_and_scheduler(str(partial))
            self._save_scaler(str(partial))
            self._save_rng_state(str(partial))
            if self.args.should_save:
                self.state.save_to_json(str(partial / TRAINER_STATE_NAME))
            process = self.args.process_index
            checkpoints.write_run_state(partial, self._run_state(), process=process)
            self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.remove_older(folder, keep=self.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _save_weights(self, folder: Path) -> None:
        model = cast(PreTrainedModel, self.model)
        if has_tuner(model):
            is_writer = self.args.should_save
            save_trained(model, folder, sharding=self._sharding, is_writer=is_writer)
            return
        weights = None
        if self._sharding == "fsdp":
            weights = full_weights(model)
        if self.args.should_save:
            self._save(str(folder), state_dict=weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._sharding == "none":
            super()._save_optimizer_and_scheduler(output_dir)
            return
        model, optimizer, scheduler = self._prepared()
        checkpoints.save_sharded_optimizer(model, optimizer, Path(output_dir))
        if self.args.should_save:
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    # ---- Going on ----

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._sharding == "none" or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        model, optimizer, scheduler = self._prepared()
        checkpoints.load_sharded_optimizer(model, optimizer, Path(checkpoint))
        scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _prepared(self) -> tuple[PreTrainedModel, Optimizer, LRScheduler]:
        model = cast(PreTrainedModel, self.model)
        return model, cast(Optimizer, self.optimizer), cast(LRScheduler, self.lr_scheduler)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        folder = Path(resume_from_checkpoint)
        state = checkpoints.read_run_state(
            folder, layout=self._layout, process=self.args.process_index
        )
        own = cast(PreTrainedModel, self.model)
        if has_tuner(own):
            load_trained(own, folder, sharding=self._sharding)
        elif self._sharding == "fsdp":
            checkpoints.load_sharded_weights(own, folder, kind=type(self._given))
        else:
            checkpoints.load_weights(own, folder)
        self._go_on_from(state)
