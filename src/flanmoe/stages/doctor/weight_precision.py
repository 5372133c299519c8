"""Do AdamW's updates reach weights that are kept in bfloat16?

bfloat16 has 8 bits of precision. An update smaller than half the distance to the next number is rounded away,
and at fine-tuning rates most are.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from flanmoe.stages.doctor.check import Check, Measured
from flanmoe.stages.doctor.tiny import tiny_decoder, token_rows
from flanmoe.stages.doctor.trainers import TrainingJob, plain_trainer

STEPS = 20
LEARNING_RATE = 2e-5
_LENGTH = 16


def _unchanged_share(dtype: torch.dtype) -> float:
    """Return the share of a checkpoint's matrix entries that are the same after some steps of `Trainer`.

    The checkpoint is loaded as transformers loads it when no dtype is named.
    """
    with tempfile.TemporaryDirectory() as name, torch.random.fork_rng(devices=()):
        saved = Path(name) / "model"
        written: Any = tiny_decoder()
        written.to(dtype).save_pretrained(saved)
        model = AutoModelForCausalLM.from_pretrained(saved)
        before = {n: p.detach().clone() for n, p in model.named_parameters() if p.ndim > 1}
        job = TrainingJob(
            model=model,
            rows=token_rows(STEPS, _LENGTH).tolist(),
            rows_per_batch=1,
            micro_batches=1,
            steps=STEPS,
            folder=str(Path(name) / "run"),
            learning_rate=LEARNING_RATE,
        )
        plain_trainer(job).train()
        after = dict(model.named_parameters())
        same = sum(int((after[n] == weight).sum()) for n, weight in before.items())
        return same / sum(weight.numel() for weight in before.values())


def _probe() -> Measured:
    return Measured(
        _unchanged_share(torch.bfloat16),
        f"Of the same checkpoint in float32: {_unchanged_share(torch.float32):.4f}.",
    )


CHECKS = (
    Check(
        name="bfloat16_weights",
        library="transformers",
        measures=(
            f"Trainer on a bfloat16 checkpoint: share of weights that {STEPS} AdamW steps at "
            f"{LEARNING_RATE:g} leave as they were"
        ),
        expected=0.0,
        tolerance=0.05,
        meaning=(
            "Updates smaller than half the distance between two bfloat16 numbers are lost: most weights do not "
            "move, the larger ones never do, and more steps do not help."
        ),
        way_out=(
            "Keep weights in float32 and compute in bfloat16: flanmoe does; in transformers load with "
            "`dtype=torch.float32` and train with `bf16=True`."
        ),
        probe=_probe,
    ),
)
