"""What the conversions from and to transformers' T5 and Switch share: reading checkpoints, building models.

transformers warns of tensors that a checkpoint lacks or has too many, and goes on with random ones. Here both
are refused by name.
"""

import copy
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from flanmoe.core.errors import ModelError
from flanmoe.core.names import listing
from flanmoe.models.loading import load_config, loading_errors, resolve_reference

HEAD = "lm_head.weight"
SHARED_TABLE = "shared.weight"
SIDE_TABLES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")

# Settings that T5, Switch and FlanMoeT5 spell alike and mean alike.
_SHARED_FIELDS = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_layers",
    "num_decoder_layers",
    "num_heads",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "dropout_rate",
    "layer_norm_epsilon",
    "initializer_factor",
    "use_cache",
    "pad_token_id",
    "eos_token_id",
    "decoder_start_token_id",
)

Model = TypeVar("Model", bound=PreTrainedModel)


def shared_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the settings that T5, Switch and FlanMoeT5 have in common; those not given are left out."""
    given = config.to_dict()
    return {name: given[name] for name in _SHARED_FIELDS if name in given}


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter under each of its names; tied ones are one object under several."""
    return dict(model.named_parameters(remove_duplicate=False))


def with_one_table(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by name, the three tables of token embeddings being one object.

    Raises:
        ModelError: names the tables of the encoder or the decoder that are not `shared.weight`.
    """
    table = tensors[SHARED_TABLE]
    differing = [name for name in SIDE_TABLES if not torch.equal(tensors[name], table)]
    if differing:
        raise ModelError(
            f"FlanMoeT5 has one table of token embeddings for both sides, but {listing(differing)} and "
            f"`{SHARED_TABLE}` differ. Choose a checkpoint whose sides share it."
        )
    return {**tensors, **dict.fromkeys(SIDE_TABLES, table)}


def require_tensors(tensors: Mapping[str, Tensor], like: PreTrainedModel, *, of: str) -> None:
    """Refuse tensors that are not, name by name and shape by shape, those of a model.

    Args:
        tensors: what is to be converted or filled in.
        like: the model that should hold them.
        of: whose tensors they are, for the message.

    Raises:
        ModelError: names what is missing, foreign or of another shape.
    """
    expected = named_tensors(like)
    other_shape = [
        f"{name} {tuple(tensors[name].shape)} for {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & tensors.keys())
        if tensors[name].shape != expected[name].shape
    ]
    _refuse(
        f"{of} must hold exactly the tensors that a {type(like).__name__} of its configuration has",
        missing=expected.keys() - tensors.keys(),
        foreign=tensors.keys() - expected.keys(),
        other_shape=other_shape,
    )


def _refuse(
    rule: str, *, missing: Collection[str], foreign: Collection[str], other_shape: Collection[str]
) -> None:
    kinds = (("missing", missing), ("foreign", foreign), ("of another shape", other_shape))
    found = [f"{len(names)} {kind} ({listing(sorted(names))})" for kind, names in kinds if names]
    if found:
        raise ModelError(f"{rule}, but there are {' and '.join(found)}. Get a complete checkpoint.")


def empty_model(kind: type[Model], config: PreTrainedConfig) -> Model:
    """Return a model of a class on the meta device: names and shapes, no weights."""
    with torch.device("meta"), no_init_weights():
        return kind(copy.deepcopy(config))


def built_from(kind: type[Model], config: PreTrainedConfig, tensors: Mapping[str, Tensor]) -> Model:
    """Return a model of a class that takes its weights over, in evaluation mode; nothing is copied.

    Names under which `tensors` has one object share one parameter of the model.

    Args:
        kind: the class.
        config: its configuration.
        tensors: a tensor for each of the class's parameters, in any dtype and on any device.

    Raises:
        ModelError: names tensors that are missing, foreign or of another shape.
    """
    model = empty_model(kind, config)
    require_tensors(tensors, model, of="What is converted")
    parameters: dict[int, nn.Parameter] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in parameters:
            parameters[id(tensor)] = nn.Parameter(tensor.detach())
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, parameters[id(tensor)])
    return model.eval()


def load_native(
    reference: str,
    kind: type[Model],
    *,
    dtype: torch.dtype,
    may_be_missing: Collection[str] = (),
) -> tuple[Model, frozenset[str]]:
    """Load a checkpoint into the transformers class that it was written from, every tensor accounted for.

    Args:
        reference: a folder or a hub id.
        kind: the class.
        dtype: of the weights.
        may_be_missing: names that a checkpoint may lack.

    Returns:
        The model, and which of `may_be_missing` it lacked: these hold random values.

    Raises:
        ModelError: if it cannot be read, is of another model type, or lacks or has tensors that the class has
            not or lacks, by name.
    """
    config = load_config(reference)
    wanted = getattr(kind.config_class, "model_type", None)
    if config.model_type != wanted:
        raise ModelError(
            f"A checkpoint of type `{wanted}` is needed, but {reference} is of type "
            f"`{config.model_type}`. Name another one."
        )
    with loading_errors(reference, "weights"):
        loaded: Any = kind.from_pretrained(
            resolve_reference(reference),
            config=config,
            dtype=dtype,
            # Only so that they are reported with the others and by name.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    model, report = loaded
    missing = frozenset(report["missing_keys"])
    _refuse(
        f"The checkpoint {reference} must hold exactly the tensors of {kind.__name__}",
        missing=missing.difference(may_be_missing),
        foreign=report["unexpected_keys"],
        other_shape=[
            f"{name} {tuple(found)} for {tuple(expected)}"
            for name, found, expected in report["mismatched_keys"]
        ],
    )
    return model.eval(), missing
