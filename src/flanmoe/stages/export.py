"""What `flanmoe export` does: write a native checkpoint, reload it, compare it, and only then say done."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flanmoe.core.config import Config
from flanmoe.core.console import progress, say
from flanmoe.core.errors import ModelError
from flanmoe.core.files import require_new_folder, whole_folder
from flanmoe.core.names import listing
from flanmoe.core.rundir import RunDir
from flanmoe.data.example import IGNORED_LABEL
from flanmoe.evaluation.results import write_training_hashes
from flanmoe.models.flan_moe_t5 import FlanMoeT5Config, FlanMoeT5ForConditionalGeneration
from flanmoe.models.flan_moe_t5.switch import require_switch, to_switch
from flanmoe.models.flan_moe_t5.switch_reasons import deviations_of_switch, sparse_routers
from flanmoe.models.flan_moe_t5.t5 import to_t5
from flanmoe.models.loading import MODEL_MARKER, load_config, load_model, save_model
from flanmoe.models.meta import auto_class
from flanmoe.stages.held_model import HeldModel
from flanmoe.stages.upcycle import probe_tokens

# Of the largest logit, or of 1 if that is larger: rounding in float32, many layers deep.
TOLERANCE = 1e-4
_PROBE_ROWS = (128, 48)


class ExportResult(Config):
    """What exporting did.

    Attributes:
        model: the folder that was written.
        format: the transformers class of its model.
        was_native: whether the model was of that class before.
        largest_logit_difference: between the model and what was written and reloaded, in float32.
        num_logits: how many logits were compared.
        deviations: what remains different although the logits agree.
    """

    model: str
    format: str
    was_native: bool
    largest_logit_difference: float
    num_logits: int
    deviations: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Probe:
    """A batch of two rows, the shorter one padded, on which models are compared.

    Attributes:
        inputs: what the model's forward takes.
        real: False where a logit belongs to padding (B, L).
    """

    inputs: dict[str, Tensor]
    real: Tensor


def export_folder(reference: str, out: Path) -> dict[str, Any]:
    """Write a model as a native checkpoint into the new folder `out`; what `flanmoe export` does.

    A FlanMoeT5 becomes a Switch, or a T5 where it is dense; any other model is native already and written as
    it is. The tokenizer and the hashes of what the model was trained on go along, the weights' dtype stays.
    What was written is loaded with transformers' Auto class and must give the model's logits; otherwise
    nothing is kept.

    Args:
        reference: a known name, a folder or a hub id.
        out: folder of the checkpoint.

    Raises:
        RunError: if `out` already holds files.
        ModelError: if the model cannot be loaded, has no native class that says all that it says (every reason
            is listed), or differs from what was written.
    """
    require_new_folder(out, way_out="Name another one as OUT")
    config = load_config(reference)
    if isinstance(config, FlanMoeT5Config) and sparse_routers(config):
        # Before weights are read, which may take minutes.
        require_switch(config)
    result = _export(HeldModel(reference), out, _stored_dtype(config))
    if result.was_native:
        say(
            f"{reference} is a {result.format} and so native already: it was written as it is, and everything "
            "that loads the one loads the other."
        )
    say(
        f"    largest logit difference after reloading: {result.largest_logit_difference:.2e} "
        f"({result.num_logits} logits)"
    )
    say(f"Written to {out} as {result.format}.")
    RunDir(out).write_json("export.json", {**result.to_mapping(), "from": reference})
    return result.to_mapping()


def _export(held: HeldModel, out: Path, dtype: torch.dtype) -> ExportResult:
    # Read before the bar: loading may show one of its own.
    tokenizer, hashes, source = held.tokenizer(), held.training_hashes(), load_model(held.reference)
    probe = probe_for(source, tokenizer)
    with progress("    exporting", total=3, unit="parts") as advance:
        expected = probe_logits(source, probe)
        if dtype != torch.float32:
            source = load_model(held.reference, dtype=dtype)
        native, deviations = as_native(source)
        written_class, was_native = type(native).__name__, native is source
        written_config = native.config
        advance(note="converted")
        with whole_folder(out, marker=MODEL_MARKER) as partial:
            save_model(native, tokenizer, partial)
            write_training_hashes(partial, hashes)
            # The reloaded model takes their place in memory.
            del native, source
            advance(note="written")
            written = _reloaded(partial, written_config)
            difference = _difference(expected, probe_logits(written, probe))
        advance(note="compared")
    return ExportResult(
        model=str(out),
        format=written_class,
        was_native=was_native,
        largest_logit_difference=difference,
        num_logits=expected.numel(),
        deviations=deviations,
    )


def _stored_dtype(config: PreTrainedConfig) -> torch.dtype:
    # A configuration of before it was written down is of float32.
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def as_native(model: PreTrainedModel) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Return the model in a transformers class, and what remains different; itself if it is in one already.

    Raises:
        ModelError: if there is no class that says all that it says, with every reason.
    """
    if not isinstance(model, FlanMoeT5ForConditionalGeneration):
        if not type(model).__module__.startswith("transformers."):
            raise ModelError(
                f"A native checkpoint needs one of transformers' own classes, but there is none for "
                f"{type(model).__name__}. Keep the checkpoint that flanmoe wrote."
            )
        return model, ()
    if not sparse_routers(model.config):
        return to_t5(model), ()
    return to_switch(model), deviations_of_switch(model.config)


def probe_for(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Probe:
    """Return the batch on which a model is compared with what is written of it."""
    tokens = probe_tokens(tokenizer)[0]
    half = len(tokens) // 2
    first, second = (
        part[:size] for part, size in zip(tokens.split(half), _PROBE_ROWS, strict=False)
    )
    rows = pad_sequence([first, second], batch_first=True)
    mask = pad_sequence([torch.ones_like(first), torch.ones_like(second)], batch_first=True)
    inputs = {"input_ids": rows, "attention_mask": mask}
    if not model.config.is_encoder_decoder:
        return Probe(inputs, mask.bool())
    labels = pad_sequence(
        [second, first[: len(second) // 2]], batch_first=True, padding_value=IGNORED_LABEL
    )
    return Probe({**inputs, "labels": labels}, labels != IGNORED_LABEL)


@torch.no_grad()
def probe_logits(model: PreTrainedModel, probe: Probe) -> Tensor:
    """Return a model's logits at the real places of a probe (N, V), in the precision of its weights."""
    return model(**probe.inputs, use_cache=False).logits[probe.real]


def _reloaded(folder: Path, config: PreTrainedConfig) -> PreTrainedModel:
    loaded: Any = auto_class(config).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    model, report = loaded
    amiss = sorted({*report["missing_keys"], *report["unexpected_keys"]})
    if amiss:
        raise ModelError(
            f"transformers must find every tensor of {type(model).__name__} in what was written, and no "
            f"other, but {len(amiss)} are missing or foreign ({listing(amiss)}). Nothing was kept; please "
            "report it."
        )
    return model.eval()


def _difference(expected: Tensor, found: Tensor) -> float:
    difference = float((expected - found).abs().max())
    allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
    # Written so that a NaN fails too.
    if not difference <= allowed:
        raise ModelError(
            f"What was written must give the model's logits within {allowed:.2g} in float32, but after "
            f"reloading they differ by up to {difference:.2g}. Nothing was kept; please report it with "
            "the model's configuration."
        )
    return difference
