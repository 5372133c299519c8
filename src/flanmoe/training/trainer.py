"""`SparseTrainer`: transformers.Trainer that owns the whole loss of a decoder, sparse or dense.

An optimizer step is made of micro-batches on several processes. Whatever enters the loss is divided
by what the whole step holds, so that the gradient does not depend on how the step is cut:
cross-entropy by the loss tokens, router losses by the real tokens or the examples.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
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
from transformers.trainer import TRAINER_STATE_NAME

from flanmoe.core.errors import ConfigError, DataError, FlanmoeError, ModelError
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.router_precision import run_routers_outside_autocast
from flanmoe.moe.recorder import RoutingRecorder
from flanmoe.moe.routing import Routing
from flanmoe.training import checkpoints
from flanmoe.training.callbacks.base import StepCallback
from flanmoe.training.interruption import StopRequest
from flanmoe.training.report import RouterReport, StepReport
from flanmoe.training.router_losses import (
    RouterLossConfig,
    RouterLosses,
    balance_scope,
    router_losses,
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


@dataclass(slots=True)
class _Step:
    """The optimizer step in the making. L sparse layers.

    Attributes:
        totals: what it holds over all processes.
        num_batches: micro-batches on this process.
        done: how many of them have been through the model.
        cross_entropy: sum of what they added to the cross-entropy.
        balance, z: the same for the raw router losses, one value a layer; None for a dense model.
        counts: assignments of each expert, layer by layer.
        counted_tokens, counting_seconds: what counting them beforehand took.
    """

    totals: StepTotals
    num_batches: int
    done: int = 0
    cross_entropy: Tensor | float = 0.0
    balance: Tensor | None = None
    z: Tensor | None = None
    counts: list[Tensor] = field(default_factory=list[Tensor])
    counted_tokens: int = 0
    counting_seconds: float = 0.0

    def add(
        self, cross_entropy: Tensor, losses: RouterLosses | None, layers: Sequence[Routing]
    ) -> None:
        self.done += 1
        self.cross_entropy = self.cross_entropy + cross_entropy.detach()
        if losses is not None:
            self.balance = _added(self.balance, losses.balance.detach())
            self.z = _added(self.z, losses.z.detach())
            self.counts = _added_counts(self.counts, layers)


class SparseTrainer(Trainer):
    """Trains on packed rows with cross-entropy and, for sparse models, router losses.

    The model's own auxiliary loss stays off. Logits are computed only where the next token enters
    the loss. The model is given `position_ids` that restart with every example, no attention mask
    and no cache, which keeps the examples of a row apart in native transformers decoders.

    Args:
        model: a causal language model; sparse blocks are found by capability.
        args: as `training_arguments` makes them; every step must be logged.
        stream: source of packed rows, already sliced for this process.
        router: router losses; without effect on a dense model.
        callbacks: told about every step, in order.
        keep_checkpoints: how many complete checkpoints stay on disk.
        stop: asked after every step; when set on any process, the run saves and stops.
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
    ) -> None:
        if args.logging_strategy != "steps" or args.logging_steps != 1:
            raise ValueError("SparseTrainer reports every step: `logging_steps` must be 1.")
        use_cache = model.config.use_cache
        super().__init__(model=model, args=args, callbacks=[_Start(self)])
        # transformers switches the cache off in the config, from where it would get into what is
        # saved; here it is off in each call.
        model.config.use_cache = use_cache
        self._refuse_sharding()
        _require_full_precision(model)
        # Both write to stdout, which belongs to `--json`.
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.stream = stream
        self.router_config = router or RouterLossConfig()
        self.blocks = moe_blocks(model)
        run_routers_outside_autocast(model)
        self.scope = balance_scope(self.router_config, self.blocks)
        self.step_callbacks = tuple(callbacks)
        self.keep_checkpoints = keep_checkpoints
        self.stop = stop or StopRequest()
        self._recorder = RoutingRecorder(self.blocks)
        self._step: _Step | None = None
        self._rows_trained = 0
        self._stop_agreed = False

    def close(self) -> None:
        """Give the model back as it was: no autocast around it, evaluation mode, nothing held."""
        model = cast(PreTrainedModel, self.model)
        self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        self.accelerator.free_memory()
        self.optimizer = self.lr_scheduler = None
        if self.args.activation_checkpointing:
            model.activation_checkpointing_disable()
        model.zero_grad(set_to_none=True)
        model.eval()

    def restore(self, checkpoint: Path) -> None:
        """Take over a checkpoint without training on."""
        self._load_from_checkpoint(str(checkpoint))
        self.state.global_step = checkpoints.checkpoint_step(checkpoint)
        self.start_callbacks(self.state.global_step)

    def start_callbacks(self, step: int) -> None:
        """Tell the callbacks that training begins after `step` steps."""
        for callback in self.step_callbacks:
            callback.start(step)

    def _refuse_sharding(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ConfigError(
                "Tuning runs in one process or with data parallelism (torchrun), but FSDP or "
                "DeepSpeed is switched on; sharded checkpoints are not supported yet. Launch "
                "without it."
            )

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
        self._step = _Step(totals=totals, num_batches=len(batches))
        if self.blocks and self.scope.needs_counts and num_batches > 1:
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
        """Run the step without gradients, to know its expert counts before its first loss.

        The random state is put back afterwards, so that dropout and router noise fall the same way
        in the pass that trains.
        """
        step = self._current_step()
        model = cast(nn.Module, self.model_wrapped).train()
        device = self.args.device
        devices = [] if device.type == "cpu" else [device]
        start = time.monotonic()
        counts: list[Tensor] = []
        with torch.random.fork_rng(devices, device_type=device.type), torch.no_grad():
            for batch in batches:
                moved = cast(Batch, self._prepare_inputs(cast(Any, batch)))
                no_logits = torch.empty(0, dtype=torch.long, device=device)
                _, layers = self._forward(model, moved, logits_to_keep=no_logits)
                counts = _added_counts(counts, layers)
        self.scope.start_step([self._summed(layer) for layer in counts], step.totals)
        step.counted_tokens = step.totals.tokens
        step.counting_seconds = time.monotonic() - start

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
        losses = None
        if layers:
            if self.scope.needs_counts and step.num_batches == 1:
                counts = [self._summed(layer.expert_counts()) for layer in layers]
                self.scope.start_step(counts, step.totals)
            losses = router_losses(layers, scope=self.scope, totals=step.totals)
            loss = loss + losses.weighted(self.router_config)
        step.add(cross_entropy, losses, layers)
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
        step.counts = [self._summed(layer) for layer in step.counts]
        step.cross_entropy = float(self._summed(torch.as_tensor(step.cross_entropy)))
        if step.balance is not None and step.z is not None:
            step.balance, step.z = self._summed(step.balance), self._summed(step.z)
        self._require_finite("loss", step.cross_entropy)
        self._stop_agreed = bool(self._summed(torch.tensor(int(self.stop.is_set))))
        self.scope.finish_step(step.counts, step.totals)

    def _current_step(self) -> _Step:
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
        norm = float(cast(Tensor, super()._get_grad_norm(model, grad_norm=grad_norm)))
        self._require_finite("gradient norm", norm)
        return norm

    # ---- Reports ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Tell the callbacks about the step that was made, before a checkpoint is written."""
        if "grad_norm" in logs:
            report = self._report(logs)
            logs |= report.metrics()
            for callback in self.step_callbacks:
                callback.after_step(report)
            if self._stop_agreed:
                self.control.should_save = self.control.should_training_stop = True
        super().log(logs, start_time)

    def _report(self, logs: dict[str, float]) -> StepReport:
        step = self._current_step()
        cross_entropy = float(step.cross_entropy)
        router = self._router_report(step)
        weighted = router.balance_weighted + router.z_weighted if router else 0.0
        return StepReport(
            step=self.state.global_step,
            totals=step.totals,
            cross_entropy=cross_entropy,
            loss=cross_entropy + weighted,
            learning_rate=logs["learning_rate"],
            gradient_norm=logs["grad_norm"],
            router=router,
            counted_tokens=step.counted_tokens,
            counting_seconds=step.counting_seconds,
        )

    def _router_report(self, step: _Step) -> RouterReport | None:
        if step.balance is None or step.z is None:
            return None
        balance, z = float(step.balance.mean()), float(step.z.mean())
        return RouterReport(
            balance_per_layer=tuple(step.balance.tolist()),
            balance_raw=balance,
            balance_weighted=self.router_config.balance_coefficient * balance,
            z_raw=z,
            z_weighted=self.router_config.z_coefficient * z,
            counts=tuple(counts.cpu() for counts in step.counts),
        )

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: the ledger counts FLOPs, of active parameters only."""
        return 0

    # ---- Checkpoints ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir))
        step = self.state.global_step
        with checkpoints.writing(folder, step=step, is_writer=self.args.should_save) as partial:
            self.save_model(str(partial), _internal_call=True)
            self._save_optimizer_and_scheduler(str(partial))
            self._save_scaler(str(partial))
            self._save_rng_state(str(partial))
            if self.args.should_save:
                self.state.save_to_json(str(partial / TRAINER_STATE_NAME))
                checkpoints.write_run_state(partial, self._run_state())
            self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.remove_older(folder, keep=self.keep_checkpoints)

    def _run_state(self) -> checkpoints.RunState:
        return checkpoints.RunState(
            rows_trained=self._rows_trained,
            stream=dict(self.stream.state_after(self._rows_trained)),
            scope=self.scope.state_dict(),
            callbacks={callback.name: callback.state_dict() for callback in self.step_callbacks},
        )

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        # transformers' own loading does not know the per-expert names that sparse models have on
        # disk: it would keep the experts as they are and only warn.
        folder = Path(resume_from_checkpoint)
        checkpoints.load_weights(cast(PreTrainedModel, self.model), folder)
        state = checkpoints.read_run_state(folder)
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


def summed_cross_entropy(logits: Float[Tensor, "B K V"], targets: Tensor) -> Float[Tensor, ""]:
    """Return the sum of -log p(target) in nats, in float32 or better; targets of -100 count 0."""
    raised = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(raised.flatten(0, 1), targets.flatten(), reduction="sum")


def _added(total: Tensor | None, values: Tensor) -> Tensor:
    return values if total is None else total + values


def _added_counts(total: Sequence[Tensor], layers: Sequence[Routing]) -> list[Tensor]:
    counts = [layer.expert_counts() for layer in layers]
    if not total:
        return counts
    return [old + new for old, new in zip(total, counts, strict=True)]
