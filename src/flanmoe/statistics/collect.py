"""`collect`: one pass of a model over data, and what its experts did in it."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from flanmoe.core.console import say
from flanmoe.core.errors import DataError, Interrupted
from flanmoe.core.names import listing
from flanmoe.models.flan_moe_t5.configuration import Side
from flanmoe.models.model_hash import model_hash
from flanmoe.models.modes import evaluating
from flanmoe.statistics.batches import StatisticsBatch, numbered, require_sound
from flanmoe.statistics.expert_statistics import ExpertStatistics
from flanmoe.statistics.layer_statistics import LayerStatistics
from flanmoe.statistics.logit_sample import Candidates, LogitSample
from flanmoe.statistics.memory import bytes_of_blocks
from flanmoe.statistics.one_pass import OnePass
from flanmoe.statistics.parts import StatisticsParts
from flanmoe.statistics.progress import Progress
from flanmoe.statistics.readable import readable_blocks, token_inputs


def collect(
    model: PreTrainedModel,
    batches: Iterable[StatisticsBatch],
    *,
    groups: Sequence[str],
    data_hash: str,
    parts: StatisticsParts | None = None,
    path: Path | None = None,
    seconds_between_saves: float = 60.0,
) -> ExpertStatistics:
    """Run a model over batches, in evaluation mode and without gradients, and return what its experts did.

    What does not depend on other tokens of a batch does not depend on how the data are cut into batches:
    counts and the tokens of the sample exactly, sums of floating-point numbers up to rounding. (Routers with
    capacity that tokens of several examples share, and experts that choose, do depend on it.)

    Args:
        model: a sparse model. Says beforehand what statistics of it will hold.
        batches: the data, the same ones in the same order whenever a pass goes on.
        groups: names of the groups (tasks) that the batches number.
        data_hash: of the data, all of them where this process reads a part.
        parts: what to gather; everything without it.
        path: file to go on with and to write: from time to time, after Ctrl-C, and at the end. None to keep
            everything in memory.
        seconds_between_saves: how often that is; a kill loses no more work.

    Raises:
        ModelError: if the model cannot be read (`readable_blocks`), or logits or outputs are not finite.
        DataError: if there are no batches, or one does not fit the model or the groups.
        RunError: if `path` holds the statistics of something else.
        Interrupted: after Ctrl-C, where there is a `path`.
    """
    parts = StatisticsParts() if parts is None else parts
    if not groups or len(set(groups)) < len(groups):
        raise DataError(
            "Tokens are counted by groups, which need different names and be at least 1, but they are "
            f"{listing(groups) or 'none'}. Name each group once."
        )
    blocks = readable_blocks(model, outputs=parts.outputs)
    held = bytes_of_blocks(blocks, len(groups), parts)
    say(f"Statistics of {len(blocks)} sparse layers by {len(groups)} groups hold up to {held}.")
    empty = ExpertStatistics(
        layers=tuple(LayerStatistics.none(one, side, len(groups), parts) for side, one in blocks),
        groups=tuple(groups),
        tokens={side: 0 for side, _ in blocks},
        parts=parts,
        model_hash=model_hash(model),
        data_hash=data_hash,
    )
    progress = Progress(empty, path, seconds_between_saves)
    with evaluating(model):
        _read_all(OnePass(model, blocks, empty), _sound(model, batches, empty), progress)
    return progress.statistics


def _sound(
    model: PreTrainedModel, batches: Iterable[StatisticsBatch], empty: ExpertStatistics
) -> Iterator[StatisticsBatch]:
    inputs = token_inputs(model)
    for batch in batches:
        require_sound(batch, empty.tokens, empty.groups, inputs)
        yield batch


def _read_all(one_pass: OnePass, batches: Iterable[StatisticsBatch], progress: Progress) -> None:
    """Read the batches that have not been read yet."""
    already = progress.batches
    if already is None:
        return
    try:
        for number, batch in enumerate(progress.checked(numbered(batches)), start=1):
            if number > already:
                read = one_pass.read(batch, _candidates(batch, progress.statistics))
                progress.add(read, batches=number)
        progress.finish()
    except KeyboardInterrupt as interrupt:
        if not progress.keep():
            raise
        raise Interrupted(
            f"Statistics were stopped after {progress.batches} batches, which are in {progress.path}. Collect "
            "again with the same file to go on."
        ) from interrupt


def _candidates(batch: StatisticsBatch, statistics: ExpertStatistics) -> dict[Side, Candidates]:
    assert batch.starts is not None
    samples: dict[Side, LogitSample | None] = {
        layer.side: layer.logit_sample for layer in statistics.layers
    }
    return {
        side: Candidates.of(
            batch.valid[side],
            batch.groups[side],
            start=batch.starts[side],
            sample=sample,
            size=statistics.parts.logit_sample,
            seed=statistics.parts.seed,
        )
        for side, sample in samples.items()
        if sample is not None
    }
