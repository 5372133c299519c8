"""`SparseTrainer`: transformers.Trainer that owns the whole loss of a model, sparse or dense.

An optimizer step is made of micro-batches on several processes. Whatever enters the loss is divided
by what the whole step holds, so that the gradient does not depend on how the step is cut:
cross-entropy by the loss tokens, router losses by the real tokens or the examples that the routers of
their side see. What a batch is, of a decoder or of an encoder-decoder, is a `BatchForm`'s business.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers import TrainingArguments as Arguments

from flanmoe.core.errors import DataError, FlanmoeError
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.router_precision import run_routers_outside_autocast
from flanmoe.moe.recorder import RoutingRecorder
from flanmoe.moe.routing import Routing
from flanmoe.moe.stacked_sums import StackedSums
from flanmoe.training import checkpoints
from flanmoe.training.batch_forms import form_of
from flanmoe.training.callbacks.base import StepCallback
from flanmoe.training.cross_entropy import summed_cross_entropy
from flanmoe.training.in_one_go import Change, in_one_go
from flanmoe.training.interruption import StopRequest
from flanmoe.training.model_checks import require_batches_understood, require_full_precision
from flanmoe.training.router_losses import (
    LayerUse,
    RouterLossConfig,
    router_losses,
    scope_of,
)
from flanmoe.training.routing_monitor import (
    DEFAULT_MONITOR,
    RoutingMonitor,
    RoutingMonitorConfig,
    require_same_tasks,
)
from flanmoe.training.rows import Batch, RowStream, StepTotals, micro_batches
from flanmoe.training.saving import SavingTrainer
from flanmoe.training.sharding import (
    Sharding,
    give_back,
    refuse_other_sharding,
    sharded_copy,
    whole,
)
from flanmoe.training.step import Step, added


class SparseTrainer(SavingTrainer):
    """Trains on packed rows with cross-entropy and, for sparse models, router losses.

    The model's own auxiliary loss stays off. Logits are computed only where a prediction enters the
    loss. Where rows are shared, the model is asked before anything else whether it keeps their examples
    apart.

    Args:
        model: a causal language model, FlanMoeT5, or a dense encoder-decoder of transformers; sparse
            blocks are found by capability.
        args: as `training_arguments` makes them; every step must be logged.
        stream: source of packed rows, already sliced for this process.
        router: router losses; without effect on a dense model.
        routing: what is recorded of the routing; with None nothing is.
        optimizer: class and settings of an optimizer in place of the one that `args` name.
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
        routing: RoutingMonitorConfig | None = DEFAULT_MONITOR,
        optimizer: tuple[type[Optimizer], Mapping[str, Any]] | None = None,
        callbacks: Sequence[StepCallback] = (),
        keep_checkpoints: int = 1,
        stop: StopRequest | None = None,
        sharding: Sharding = "none",
    ) -> None:
        if args.logging_strategy != "steps" or args.logging_steps != 1:
            raise ValueError("SparseTrainer reports every step: `logging_steps` must be 1.")
        refuse_other_sharding(args)
        require_full_precision(model)
        run_routers_outside_autocast(model)
        self.form = form_of(model)
        require_batches_understood(
            model,
            moe_blocks(model),
            self.form,
            shares_rows=stream.shares_rows,
            sharding=sharding,
        )
        self._given = model
        self._sharding: Sharding = sharding
        if sharding == "fsdp":
            model = sharded_copy(model, args.device)
        use_cache = model.config.use_cache
        super().__init__(
            model=model,
            args=args,
            callbacks=[_Start(self)],
            optimizer_cls_and_kwargs=(optimizer[0], dict(optimizer[1])) if optimizer else None,
        )
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
        require_same_tasks(stream.task_names)
        self._monitor = RoutingMonitor(routing, stream.task_names) if routing else None
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

    # ---- Data ----

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return a plain loader: the stream slices by process itself, so accelerate must not."""
        rows = self.args.per_device_train_batch_size
        numbers = self._monitor.task_numbers if self._monitor else None
        collated = partial(self.form.collated, task_numbers=numbers)
        return micro_batches(self.stream, rows=rows, collated=collated)

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
        sides = {
            side: self._summed_totals(totals) for side, totals in self.form.totals(batches).items()
        }
        totals = StepTotals.together(sides.values())
        if totals.loss_tokens == 0:
            raise DataError(
                f"A step needs at least 1 token that enters the loss, but the {totals.rows} rows "
                f"of step {self.state.global_step + 1} hold 0. Check the responses of the data."
            )
        of_layers = [sides[self.form.side_of(block)] for block in self.blocks]
        self._step = Step(totals=totals, of_layers=of_layers, num_batches=len(batches))
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
                _, layers = self._forward(model, moved, positions=no_logits)
                use = added(use, self._use(layers))
        self._start_scope(use)
        step.counted_tokens = step.totals.tokens
        step.counting_seconds = time.monotonic() - start

    def _use(self, layers: Sequence[Routing]) -> list[LayerUse]:
        counting = self.router_config.rules.counting
        return [LayerUse.of(layer, counting) for layer in layers]

    def _start_scope(self, use: Sequence[LayerUse]) -> None:
        summed = list(use)

        def each(change: Change) -> None:
            summed[:] = [layer.summed(change) for layer in summed]

        in_one_go(each, self._summed)
        self.scope.start_step(summed, self._current_step().of_layers)

    def _sums(self, batch: Batch, layers: Sequence[Routing]) -> StackedSums | None:
        if self._monitor is None or not layers:
            return None
        task_ids = self.form.task_ids(batch)
        of_layers = [task_ids[self.form.side_of(block)] for block in self.blocks]
        return self._monitor.sums(layers, of_layers)

    def _forward(
        self, model: nn.Module, batch: Batch, *, positions: Tensor
    ) -> tuple[Any, list[Routing]]:
        with self._recorder.recording(**self.form.told_to_recorder(batch)) as layers:
            outputs = self.form.run(model, batch, positions=positions)
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
        targets = self.form.targets(inputs)
        outputs, layers = self._forward(model, inputs, positions=targets.positions)
        summed = summed_cross_entropy(outputs.logits, targets.labels)
        loss = cross_entropy = summed / step.totals.loss_tokens
        losses, use = None, list[LayerUse]()
        if layers:
            starts_scope = self.scope.needs_use and step.num_batches == 1
            if starts_scope or self.scope.keeps_use:
                use = self._use(layers)
            if starts_scope:
                self._start_scope(use)
            losses = router_losses(
                layers, scope=self.scope, totals=step.of_layers, weights=self.router_config.weights
            )
            loss = loss + losses.total(self.router_config)
        step.add(cross_entropy, losses, use, self._sums(inputs, layers))
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
            self.scope.finish_step(step.use, step.of_layers)

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
            if report.router is not None:
                logs |= report.router.layer_metrics([block.name for block in self.blocks])
            for callback in self.step_callbacks:
                callback.after_step(report)
            if self._stop_agreed:
                self.control.should_save = self.control.should_training_stop = True
        super().log(logs, start_time)
        # Trackers have had them, and our own files have them; transformers would keep every step's in
        # memory and in each checkpoint.
        history = self.state.log_history
        history[-1] = {name: x for name, x in history[-1].items() if "routing/" not in name}

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: the ledger counts FLOPs, of active parameters only."""
        return 0

    # ---- Checkpoints ----

    def _run_state(self) -> checkpoints.RunState:
        return checkpoints.RunState(
            rows_trained=self._rows_trained,
            stream=dict(self.stream.state_after(self._rows_trained)),
            scope=self.scope.state_dict(),
            callbacks={callback.name: callback.state_dict() for callback in self.step_callbacks},
            layout=self._layout,
        )

    def _go_on_from(self, state: checkpoints.RunState) -> None:
        self._rows_trained = state.rows_trained
        self.stream.load_state_dict(state.stream)
        self.scope.load_state_dict(state.scope)
        for callback in self.step_callbacks:
            callback.load_state_dict(state.callbacks[callback.name])


class _Start(TrainerCallback):
    """Tells the step callbacks that training begins, once a checkpoint has been loaded."""

    def __init__(self, trainer: SparseTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.start_callbacks(state.global_step)
