"""What a model does with the first rows that it is to be tuned on, for tuners that choose experts by it."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from transformers import PreTrainedModel

from flanmoe.statistics import ExpertStatistics, StatisticsBatch, StatisticsParts, collect
from flanmoe.training.arguments import TuneConfig
from flanmoe.training.batch_forms import BatchForm, form_of
from flanmoe.training.rows import Row, RowStream
from flanmoe.tuners.expert_specialised import ExpertSpecialisedConfig

_HASH_BYTES = 12
# Arguments of the forward pass, of models with one side and with two.
_INPUTS = {
    1: ("input_ids", "position_ids"),
    2: ("input_ids", "segment_ids", "decoder_input_ids", "decoder_segment_ids"),
}
# Choosing experts takes counts and gates alone.
_PARTS = StatisticsParts(coactivation=False, outputs=False, logit_sample=0)


def with_statistics(
    config: TuneConfig, model: PreTrainedModel, stream: RowStream, path: Path
) -> TuneConfig:
    """Return settings whose tuner has the statistics that it needs; they are gathered if none are named.

    The stream stands at its beginning afterwards, so the rows are trained on too. A file that is complete is
    not gathered again: a run that goes on must choose the same experts.

    Args:
        config: the settings.
        model: the model before tuning, running flanmoe's compute.
        stream: the rows, at their beginning.
        path: where statistics are kept.

    Raises:
        ModelError: if the model is dense or cannot be read.
        RunError: if `path` holds something else.
        Interrupted: after Ctrl-C; gathering goes on with the same file.
    """
    tuner = config.tuner
    if not isinstance(tuner, ExpertSpecialisedConfig) or tuner.statistics is not None:
        return config
    rows = list(islice(stream, tuner.rows))
    stream.load_state_dict(stream.state_after(0))
    statistics_of(model, rows, stream.task_names, path, rows_together=config.micro_batch_rows)
    filled = tuner.model_copy(update={"statistics": str(path)})
    return config.model_copy(update={"tuner": filled})


def statistics_of(
    model: PreTrainedModel,
    rows: Sequence[Row],
    task_names: Sequence[str],
    path: Path,
    *,
    rows_together: int,
) -> ExpertStatistics:
    """Gather counts and gates of experts over some rows, by task, and keep them in a file.

    Raises:
        ModelError, RunError, Interrupted: as `flanmoe.statistics.collect` does.
    """
    numbers = {name: number for number, name in enumerate(task_names)}
    form = form_of(model)

    def batches() -> Iterator[StatisticsBatch]:
        for start in range(0, len(rows), rows_together):
            yield _batch(form, rows[start : start + rows_together], numbers)

    digest = hashlib.blake2b(digest_size=_HASH_BYTES)
    for row in rows:
        digest.update(row.input_ids.tobytes())
    return collect(
        model,
        batches(),
        groups=tuple(task_names),
        data_hash=digest.hexdigest(),
        parts=_PARTS,
        path=path,
    )


def _batch(form: BatchForm, rows: Sequence[Row], numbers: dict[str, int]) -> StatisticsBatch:
    batch = form.collated(rows, task_numbers=numbers)
    if "decoder_segment_ids" in batch:
        segments = {"encoder": batch["segment_ids"], "decoder": batch["decoder_segment_ids"]}
    else:
        segments = {"decoder": batch["segment_ids"]}
    return StatisticsBatch(
        inputs={name: batch[name] for name in _INPUTS[len(segments)]},
        valid={side: (ids != 0).flatten() for side, ids in segments.items()},
        groups=dict(form.task_ids(batch).items()),
    )
