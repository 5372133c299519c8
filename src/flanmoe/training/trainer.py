"""`SparseTrainer`: transformers.Trainer that owns the whole loss of a decoder, sparse or dense.

An optimizer step is made of micro-batches on several processes. Whatever enters the loss is divided
by what the whole step holds, so that the gradient does not depend on how the step is cut:
cross-entropy by the loss tokens, router losses by the real tokens or the examples.
"""

import math
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers import TrainingArguments as Arguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

from flanmoe.core.errors import DataError, FlanmoeError, ModelError
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.packing import require_packing_without_leak
from flanmoe.models.router_precision import run_routers_outside_autocast
from flanmoe.moe.recorder import RoutingRecorder
from flanmoe.moe.routing import Routing
from flanmoe.training import checkpoints
from flanmoe.training.callbacks.base import StepCallback
from flanmoe.training.cross_entropy import summed_cross_entropy
from flanmoe.training.interruption import StopRequest
from flanmoe.training.router_losses import (
    LayerUse,
    RouterLossConfig,
    router_losses,
    scope_of,
)
from flanmoe.training.rows import (
    Batch,
    RowStream,
    StepTotals,
    example_numbers,
    micro_batches,
    target_positions,
    valid_tokens,
)
from flanmoe.training.sharding import (
    Sharding,
    full_weights,
    give_back,
    refuse_other_sharding,
    sharded_copy,
    whole,
)
from flanmoe.training.step import Step, added


class SparseTrainer(Trainer):
    """Trains on packed rows with cross-entropy and, for sparse models, router losses.

    The model's own auxiliary loss stays off. Logits are computed only where the next token enters
    the loss. The model is given `position_ids` that restart with every example, no attention mask
    and no cache, which keeps the examples of a row apart in most native transformers decoders; where
    rows are shared, that is checked on the model before anything else.

    Args:
        model: a causal language model; sparse blocks are found by capability.
        args: as `training_arguments` makes them; every step must be logged.
        stream: source of packed rows, already sliced for this process.
        router: router losses; without effect on a dense model.
        callbacks: told about every step, in order.
        keep_checkpoints: how many complete checkpoints stay on disk.
        stop: asked after every step; when set on any process, the run saves and stops.
        sharding: what is spread over the processes. With `fsdp` a copy trains, and the model is
            without weights until `close`.
    """

    # Read by transformers.Trainer: our loss is divided by the totals of the whole step already.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel,
        args: Arguments,
        *,
        stream: RowStream,
        router: RouterLossConfig | None = None,
        callbacks: Sequence[StepCallback] = (),
        keep_checkpoints: int = 1,
        stop: StopRequest | None = None,
        sharding: Sharding = "none",
    ) -> None:
        if args.logging_strategy != "steps" or args.logging_steps != 1:
            raise ValueError("SparseTrainer reports every step: `logging_steps` must be 1.")
        refuse_other_sharding(args)
        _require_full_precision(model)
        run_routers_outside_autocast(model)
        if stream.shares_rows:
            # While the model is whole and without autocast, so that every process finds the same.
            require_packing_without_leak(model)
        self._given = model
        self._sharding: Sharding = sharding
        if sharding == "fsdp":
            model = sharded_copy(model, args.device)
        use_cache = model.config.use_cache
        super().__init__(model=model, args=args, callbacks=[_Start(self)])
        # transformers switches the cache off in the config, from where it would get into what is
        # saved; here it is off in each call.
        model.config.use_cache = use_cache
        if sharding == "fsdp":
            self._leave_sharding_alone()
        # Both write to stdout, which belongs to `--json`.
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.stream = stream
        self.router_config = router or RouterLossConfig()
        self.blocks = moe_blocks(model)
        self.scope = scope_of(self.router_config, self.blocks)
        self.step_callbacks = tuple(callbacks)
        self.keep_checkpoints = keep_checkpoints
        self.stop = stop or StopRequest()
        self._recorder = RoutingRecorder(self.blocks)
        self._step: Step | None = None
        self._rows_trained = 0
        self._stop_agreed = False

    def close(self) -> None:
        """Give the model back as it was: no autocast around it, evaluation mode, nothing held.

        A sharded model gets its weights back, in every process and on the CPU, if training came to
        its end. After an error the other processes may not come along, so nothing is gathered.
        """
        model = cast(PreTrainedModel, self.model)
        self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        self.accelerator.free_memory()
        self.optimizer = self.lr_scheduler = None
        if self.args.activation_checkpointing:
            model.activation_checkpointing_disable()
        model.zero_grad(set_to_none=True)
        model.eval()
        if self._sharding == "fsdp" and not self.is_in_train:
            give_back(model, to=self._given)
            self._given.eval()

    def restore(self, checkpoint: Path) -> None:
        """Take over a checkpoint without training on."""
        self._load_from_checkpoint(str(checkpoint))
        self.state.global_step = checkpoints.checkpoint_step(checkpoint)
        self.start_callbacks(self.state.global_step)

    def start_callbacks(self, step: int) -> None:
        """Tell the callbacks that training begins after `step` steps."""
        for callback in self.step_callbacks:
            callback.start(step)

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

    # ---- Data ----

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return a plain loader: the stream slices by process itself, so accelerate must not."""
        return micro_batches(self.stream, rows=self.args.per_device_train_batch_size)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """Fetch the micro-batches of one step, count what they hold, and count experts if need be.

        Raises:
            DataError: if the stream ends, or no token of the step enters the loss.
        """
        batches = list(islice(epoch_iterator, num_batches))
        if len(batches) < num_batches:
            raise DataError(
                f"Training needs {num_batches} micro-batches for each step, but the data ended "
                f"{len(batches)} into step {self.state.global_step + 1}. Use a stream that repeats."
            )
        totals = self._summed_totals(StepTotals.of(batches))
        if totals.loss_tokens == 0:
            raise DataError(
                f"A step needs at least 1 token that enters the loss, but the {totals.rows} rows "
                f"of step {self.state.global_step + 1} hold 0. Check the responses of the data."
            )
        self._step = Step(totals=totals, num_batches=len(batches))
        if self.blocks and self.scope.needs_use and num_batches > 1:
            self._count_experts(batches)
        return batches, torch.tensor(totals.loss_tokens, device=device)

    def _summed_totals(self, totals: StepTotals) -> StepTotals:
        names = list(StepTotals.__dataclass_fields__)
        values = self._summed(torch.tensor([getattr(totals, name) for name in names]))
        return StepTotals(**dict(zip(names, values.tolist(), strict=True)))

    def _summed(self, values: Tensor) -> Tensor:
        """Add up a tensor over all processes."""
        if self.accelerator.num_processes == 1:
            return values
        return cast(Tensor, self.accelerator.reduce(values.to(self.args.device), reduction="sum"))

    # ---- Losses ----

    def _count_experts(self, batches: Sequence[Batch]) -> None:
        """Run the step without gradients, to know its expert use before its first loss.

        The random state is put back afterwards, so that dropout and router noise fall the same way
        in the pass that trains.
        """
        step = self._current_step()
        model = cast(nn.Module, self.model_wrapped).train()
        device = self.args.device
        devices = [] if device.type == "cpu" else [device]
        start = time.monotonic()
        use: list[LayerUse] = []
        with torch.random.fork_rng(devices, device_type=device.type), torch.no_grad():
            for batch in batches:
                moved = cast(Batch, self._prepare_inputs(cast(Any, batch)))
                no_logits = torch.empty(0, dtype=torch.long, device=device)
                _, layers = self._forward(model, moved, logits_to_keep=no_logits)
                use = added(use, self._use(layers))
        self._start_scope(use)
        step.counted_tokens = step.totals.tokens
        step.counting_seconds = time.monotonic() - start

    def _use(self, layers: Sequence[Routing]) -> list[LayerUse]:
        counting = self.router_config.rules.counting
        return [LayerUse.of(layer, counting) for layer in layers]

    def _start_scope(self, use: Sequence[LayerUse]) -> None:
        summed = [layer.summed(self._summed) for layer in use]
        self.scope.start_step(summed, self._current_step().totals)

    def _forward(
        self, model: nn.Module, batch: Batch, *, logits_to_keep: Tensor
    ) -> tuple[Any, list[Routing]]:
        valid, segments = valid_tokens(batch), example_numbers(batch)
        with self._recorder.recording(valid=valid, segments=segments) as layers:
            outputs = model(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                use_cache=False,
                logits_to_keep=logits_to_keep,
            )
        return outputs, layers

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return what a micro-batch adds to the loss of its step.

        It is multiplied by the number of processes, over which gradients are averaged afterwards.
        """
        step = self._current_step()
        positions = target_positions(inputs)
        outputs, layers = self._forward(model, inputs, logits_to_keep=positions)
        summed = summed_cross_entropy(outputs.logits, inputs["labels"][:, positions + 1])
        loss = cross_entropy = summed / step.totals.loss_tokens
        losses, use = None, list[LayerUse]()
        if layers:
            starts_scope = self.scope.needs_use and step.num_batches == 1
            if starts_scope or self.scope.keeps_use:
                use = self._use(layers)
            if starts_scope:
                self._start_scope(use)
            losses = router_losses(
                layers, scope=self.scope, totals=step.totals, weights=self.router_config.weights
            )
            loss = loss + losses.total(self.router_config)
        step.add(cross_entropy, losses, layers, use)
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self,
        model: nn.Module,
        inputs: Batch,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Run one micro-batch forward and backward; after the last, add up over processes."""
        loss = super().training_step(model, cast(Any, inputs), num_items_in_batch)
        self._rows_trained += len(inputs["input_ids"])
        if self._current_step().done == self._current_step().num_batches:
            self._add_up()
        return loss

    def _add_up(self) -> None:
        step = self._current_step()
        step.sum_over(self._summed)
        self._require_finite("loss", float(step.cross_entropy))
        self._stop_agreed = bool(self._summed(torch.tensor(int(self.stop.is_set))))
        if self.scope.keeps_use:
            self.scope.finish_step(step.use, step.totals)

    def _current_step(self) -> Step:
        if self._step is None:
            raise RuntimeError("A loss was asked for outside an optimizer step.")
        return self._step

    def _require_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise FlanmoeError(
                f"Training needs a finite {what}, but that of step {self.state.global_step + 1} is "
                f"{value}. Lower `learning_rate` or `max_grad_norm`; the last checkpoint is good."
            )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        # transformers asks for it between backward pass and optimizer step, clipping or not.
        norm = float(whole(cast(Tensor, super()._get_grad_norm(model, grad_norm=grad_norm))))
        self._require_finite("gradient norm", norm)
        return norm

    # ---- Reports ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Tell the callbacks about the step that was made, before a checkpoint is written."""
        if "grad_norm" in logs:
            report = self._current_step().report(
                self.state.global_step,
                self.router_config,
                learning_rate=logs["learning_rate"],
                gradient_norm=logs["grad_norm"],
            )
            logs |= report.metrics()
            for callback in self.step_callbacks:
                callback.after_step(report)
            if self._stop_agreed:
                self.control.should_save = self.control.should_training_stop = True
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: the ledger counts FLOPs, of active parameters only."""
        return 0

    # ---- Checkpoints ----

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
        weights = None
        if self._sharding == "fsdp":
            weights = full_weights(cast(PreTrainedModel, self.model))
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

    def _run_state(self) -> checkpoints.RunState:
        return checkpoints.RunState(
            rows_trained=self._rows_trained,
            stream=dict(self.stream.state_after(self._rows_trained)),
            scope=self.scope.state_dict(),
            callbacks={callback.name: callback.state_dict() for callback in self.step_callbacks},
            layout=self._layout,
        )

    @property
    def _layout(self) -> checkpoints.Layout:
        return checkpoints.Layout(num_processes=self.args.world_size, sharding=self._sharding)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        # transformers' own loading does not know the per-expert names that sparse models have on
        # disk: it would keep the experts as they are and only warn.
        folder = Path(resume_from_checkpoint)
        state = checkpoints.read_run_state(
            folder, layout=self._layout, process=self.args.process_index
        )
        own = cast(PreTrainedModel, self.model)
        if self._sharding == "fsdp":
            checkpoints.load_sharded_weights(own, folder, kind=type(self._given))
        else:
            checkpoints.load_weights(own, folder)
        self._rows_trained = state.rows_trained
        self.stream.load_state_dict(state.stream)
        self.scope.load_state_dict(state.scope)
        for callback in self.step_callbacks:
            callback.load_state_dict(state.callbacks[callback.name])


def _require_full_precision(model: nn.Module) -> None:
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    small = {str(value.dtype).rpartition(".")[2] for value in trained if value.itemsize < 4}
    if small:
        raise ModelError(
            f"Tuning needs weights in float32, but some are in {', '.join(sorted(small))}, which "
            "swallows most updates at fine-tuning rates. Load the model with `dtype=torch.float32`; "
            "`precision: bfloat16` computes in bfloat16 all the same."
        )


class _Start(TrainerCallback):
    """Tells the step callbacks that training begins, once a checkpoint has been loaded."""

    def __init__(self, trainer: SparseTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.start_callbacks(state.global_step)
