"""Do examples that share a row see each other?

What is changed is the example in front; what is measured is how far the logits of the one behind it move, in
standard deviations of the logits. 0 is right, rounding apart.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening, PreTrainedModel, Trainer

from flanmoe.models.meta import embedding_weight
from flanmoe.models.modes import evaluating
from flanmoe.stages.doctor.check import Check, Measured
from flanmoe.stages.doctor.tiny import FAMILIES, tiny_decoder, token_rows
from flanmoe.stages.doctor.trainers import TrainingJob, plain_trainer, sft_trainer

# Of the spread of the logits: far above rounding, far below a leak (docs/decisions/0003-packing.md).
TOLERANCE = 0.05
_NUM_ROWS = 2
_FRONT, _BACK = 12, 8
# Larger weights than a new model's, so that attention tells tokens apart.
_SPREAD: dict[str, Any] = {"initializer_range": 0.2}
_ONE_IN_A_ROW = "put one example into each row"


@torch.no_grad()
def moved(model: PreTrainedModel, **inputs: Any) -> float:
    """Return how far the logits of a decoder's second example move with the first, told by positions alone.

    Of two rows the smaller one counts: in a sparse model rounding can tip a router in one of them, a leak
    shows in both. The model is left as it was.

    Args:
        model: a decoder.
        inputs: what its forward is given beside token ids and restarting positions.
    """
    vocabulary = embedding_weight(model).shape[0]
    generator = torch.Generator().manual_seed(0)
    fronts = torch.randint(vocabulary, (2, _NUM_ROWS, _FRONT), generator=generator)
    back = torch.randint(vocabulary, (_NUM_ROWS, _BACK), generator=generator)
    positions = torch.cat([torch.arange(_FRONT), torch.arange(_BACK)]).repeat(_NUM_ROWS, 1)
    with evaluating(model):
        before, after = (
            model(
                input_ids=torch.cat([front, back], dim=1), position_ids=positions, **inputs
            ).logits[:, _FRONT:]
            for front in fronts
        )
    return _distance(before, after)


def _distance(before: Tensor, after: Tensor) -> float:
    before, after = before.double(), after.double()
    return float((before - after).abs().amax(dim=(1, 2)).min() / before.std())


def _leaking_families() -> Measured:
    found = {name: moved(tiny_decoder(name, **_SPREAD), use_cache=False) for name in FAMILIES}
    leaking = [f"{name} ({value:.1f})" for name, value in found.items() if value > TOLERANCE]
    apart = [name for name, value in found.items() if value <= TOLERANCE]
    said = f"Leaking, with standard deviations moved: {', '.join(leaking) or 'none'}; "
    return Measured(len(leaking), f"{said}apart: {', '.join(apart) or 'none'}.")


def _with_mask() -> Measured:
    mask = torch.ones(_NUM_ROWS, _FRONT + _BACK, dtype=torch.long)
    return Measured(moved(tiny_decoder(**_SPREAD), use_cache=False, attention_mask=mask))


def _with_cache() -> Measured:
    return Measured(moved(tiny_decoder(**_SPREAD)))


def _of_trainer(make_trainer: Callable[[TrainingJob], Trainer], rows_per_batch: int) -> float:
    """Return the same for the batches that a trainer makes, run through the model as it left it."""
    model = tiny_decoder(**_SPREAD)
    back = token_rows(1, _BACK, seed=9).tolist()
    logits: list[Tensor] = []
    for seed in (1, 2):
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=()):
            rows = token_rows(1, _FRONT, seed=seed).tolist() + back
            trainer = make_trainer(TrainingJob(model, rows, rows_per_batch, 1, 1, folder))
            batch = dict(next(iter(trainer.get_train_dataloader())))
            logits.append(_logits_of_back(model, batch, back[0]))
    return _distance(*logits)


@torch.no_grad()
def _logits_of_back(model: PreTrainedModel, batch: dict[str, Any], back: list[int]) -> Tensor:
    tokens = batch["input_ids"][0].tolist()
    # Trainers may shuffle what they put side by side; an example in front sees nobody anyway.
    starts = [at for at in range(len(tokens)) if tokens[at : at + len(back)] == back]
    if batch["input_ids"].shape[0] != 1 or len(starts) != 1 or starts[0] == 0:
        raise RuntimeError(
            f"Two examples had to share a row in their order, but the row is {tokens}."
        )
    with evaluating(model):
        output = model(**{name: value for name, value in batch.items() if name != "labels"})
    return output.logits[:, starts[0] : starts[0] + len(back)]


def _flattening(job: TrainingJob) -> Trainer:
    trainer = plain_trainer(job)
    trainer.args.train_sampling_strategy = "sequential"
    trainer.data_collator = DataCollatorWithFlattening()
    return trainer


def _collator() -> Measured:
    return Measured(_of_trainer(_flattening, rows_per_batch=2))


def _sft(strategy: str) -> float:
    options = {"packing": True, "packing_strategy": strategy, "max_length": _FRONT + _BACK}
    return _of_trainer(partial(sft_trainer, **options), rows_per_batch=1)


def _trl() -> Measured:
    wrapped = (
        f"With `packing_strategy: wrapped`, which cuts a stream of tokens: {_sft('wrapped'):.2f}."
    )
    return Measured(_sft("bfd"), wrapped)


def _check(
    name: str, library: str, measures: str, way_out: str, probe: Callable[[], Measured]
) -> Check:
    return Check(
        name=name,
        library=library,
        measures=measures,
        expected=0.0,
        tolerance=TOLERANCE,
        meaning=(
            "An example attends to the ones before it in its row: it is trained on a context that it does not "
            "have when it is used, and the loss looks better than it is."
        ),
        way_out=way_out,
        probe=probe,
    )


_PASS_NEITHER = (
    "Pass neither `attention_mask` nor a cache (`use_cache=False`) with packed rows. flanmoe's trainer does "
    "so, and tests the model before its first step."
)
CHECKS = (
    _check(
        "packing_families",
        "transformers",
        f"of {len(FAMILIES)} sparse families, those that do not read restarting positions",
        f"For these families {_ONE_IN_A_ROW} (`packing: {{examples_per_row: 1}}`); flanmoe insists on it.",
        _leaking_families,
    ),
    _check(
        "packing_with_mask",
        "transformers",
        "Mixtral, restarting positions beside an attention mask of ones: standard deviations moved",
        _PASS_NEITHER,
        _with_mask,
    ),
    _check(
        "packing_with_cache",
        "transformers",
        "Mixtral, restarting positions and `use_cache` left at its default: standard deviations moved",
        _PASS_NEITHER,
        _with_cache,
    ),
    _check(
        "packing_collator",
        "transformers",
        "Trainer with DataCollatorWithFlattening on Mixtral: standard deviations moved",
        f"Tune with flanmoe, or {_ONE_IN_A_ROW}.",
        _collator,
    ),
    _check(
        "packing_trl",
        "trl",
        "SFTTrainer with packing (bfd) on Mixtral: standard deviations moved",
        f"Tune with flanmoe, or {_ONE_IN_A_ROW}.",
        _trl,
    ),
)
