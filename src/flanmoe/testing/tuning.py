"""Tuning on rows that are already there, for tests of whatever happens around a step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from flanmoe.core.rundir import RunDir
from flanmoe.core.seeds import SeedTree
from flanmoe.data.example import Packed
from flanmoe.training.arguments import TuneConfig
from flanmoe.training.rows import FixedRows
from flanmoe.training.tune import TuneResult, tune

FLOPS_PER_TOKEN = 300.0


def tune_rows(
    model: PreTrainedModel,
    rows: Sequence[Packed],
    folder: Path,
    *,
    resume: bool = False,
    **values: Any,
) -> TuneResult:
    """Tune on the rows in float32, four a step, a token at `FLOPS_PER_TOKEN`.

    Args:
        model: changed in place.
        rows: in order, from the first again after the last.
        folder: where the run writes.
        resume: go on from its newest checkpoint.
        values: fields of `TuneConfig`.
    """
    return tune(
        model,
        FixedRows(rows),
        TuneConfig.parse({"rows_per_step": 4, "precision": "float32", **values}),
        run=RunDir(folder),
        seeds=SeedTree(0),
        flops_per_token=FLOPS_PER_TOKEN,
        resume=resume,
    )
