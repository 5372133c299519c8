"""Families of dense models: where their FFNs are, and which sparse class continues them.

Dense models are changed by these tables (DESIGN 5.1). One row says which options of the dense
configuration the sparse class cannot express, and how the sparse configuration is made; everything
that both classes declare is carried over by name.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flanmoe.core.errors import ModelError
from flanmoe.core.names import listing, nearest_name_hint

# What a checkpoint says about itself rather than about its architecture.
_NOT_CARRIED = frozenset({"architectures", "transformers_version"})


@dataclass(frozen=True, slots=True)
class Site:
    """A place in a dense model where an FFN can be replaced. H hidden size, I FFN width.

    The matrices are the model's own, not copies.
    """

    layer: int
    gate: Float[Tensor, "I H"]
    up: Float[Tensor, "I H"]
    down: Float[Tensor, "H I"]


@dataclass(frozen=True, slots=True)
class SparseShape:
    """What the sparse model looks like where the dense one says nothing.

    Attributes:
        num_experts, top_k: counts of each sparse layer.
        expert_width: width I of one expert.
        every: layer i is sparse iff `i % every == every - 1`.
    """

    num_experts: int
    top_k: int
    expert_width: int
    every: int = 1


@dataclass(frozen=True, slots=True)
class Limit:
    """An option of the dense configuration that the sparse class cannot express."""

    option: str
    allowed: Any
    reason: str


@dataclass(frozen=True, slots=True)
class Family:
    """One dense model type and the sparse one that continues it.

    Attributes:
        dense_type, sparse_type: transformers' model types.
        limits: options with the only value that can be carried over.
        also_read: options that the dense class reads although its configuration does not
            declare them.
        sparse_values: gives the options that make the model sparse.
        native_every: whether the sparse class can leave some layers dense.
    """

    dense_type: str
    sparse_type: str
    sparse_values: Callable[[Mapping[str, Any], SparseShape], dict[str, Any]]
    limits: tuple[Limit, ...] = ()
    also_read: tuple[str, ...] = ()
    native_every: bool = False

    def site_parameters(self, layer: int) -> dict[str, str]:
        """Return the names of the FFN's parameters in one layer,
        by matrix (`gate`, `up`, `down`)."""
        return {
            matrix: f"model.layers.{layer}.mlp.{matrix}_proj.weight"
            for matrix in ("gate", "up", "down")
        }

    def sites(self, model: PreTrainedModel) -> list[Site]:
        """Return every FFN of a dense model of this family, in layer order."""
        return [
            Site(
                layer,
                **{
                    matrix: model.get_parameter(name).detach()
                    for matrix, name in self.site_parameters(layer).items()
                },
            )
            for layer in range(model.config.num_hidden_layers)
        ]

    def sparse_config(self, dense: PreTrainedConfig, shape: SparseShape) -> PreTrainedConfig:
        """Return the configuration of the sparse model.

        RoPE settings, head sizes, norms, token ids, tied embeddings, attention biases and
        windows are carried over. transformers' own auxiliary loss is switched off: router losses
        are the trainer's.

        Raises:
            ModelError: if the sparse class cannot express an option of the dense model.
        """
        values = dense.to_dict()
        self._check(values, shape)
        sparse_class = CONFIG_MAPPING[self.sparse_type]
        declared = {field.name for field in dataclasses.fields(sparse_class)}
        carried = {
            name: value
            for name, value in values.items()
            if (name in declared and name not in _NOT_CARRIED) or name in self.also_read
        }
        return sparse_class(
            **{
                **carried,
                **self.sparse_values(values, shape),
                "output_router_logits": False,
                "router_aux_loss_coef": 0.0,
            }
        )

    def _check(self, values: Mapping[str, Any], shape: SparseShape) -> None:
        for limit in self.limits:
            found = values.get(limit.option, limit.allowed)
            if found != limit.allowed:
                raise ModelError(
                    f"To become a {self.sparse_type} model, a {self.dense_type} model must have "
                    f"`{limit.option}` = {limit.allowed}, but it is {found}: {limit.reason}. "
                    "Choose another base model."
                )
        if shape.every > 1 and not self.native_every:
            raise ModelError(
                f"`every` must be 1 for a {self.dense_type} model, but is {shape.every}: the "
                f"native class {self.sparse_type} makes every layer sparse. Use `every: 1`, or a "
                "base model of type "
                f"{listing(name for name, f in FAMILIES.items() if f.native_every)}."
            )
        if shape.every > values["num_hidden_layers"]:
            raise ModelError(
                f"`every` must be at most the number of layers ({values['num_hidden_layers']}), "
                f"but is {shape.every}: no layer would become sparse."
            )


def _mixtral_values(values: Mapping[str, Any], shape: SparseShape) -> dict[str, Any]:
    return {
        "num_local_experts": shape.num_experts,
        "num_experts_per_tok": shape.top_k,
        "intermediate_size": shape.expert_width,
        "router_jitter_noise": 0.0,
    }


def _qwen_moe_values(values: Mapping[str, Any], shape: SparseShape) -> dict[str, Any]:
    return {
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.top_k,
        "moe_intermediate_size": shape.expert_width,
        "norm_topk_prob": True,
        "decoder_sparse_step": shape.every,
        "mlp_only_layers": [],
    }


def _qwen2_moe_values(values: Mapping[str, Any], shape: SparseShape) -> dict[str, Any]:
    return {
        **_qwen_moe_values(values, shape),
        "qkv_bias": True,
        # The class always has a shared expert, and width 0 is refused by some readers of
        # checkpoints. One unit whose weights stay zero is the least that it can be.
        "shared_expert_intermediate_size": 1,
    }


def _qwen3_moe_values(values: Mapping[str, Any], shape: SparseShape) -> dict[str, Any]:
    kinds = set(values["layer_types"])
    if len(kinds) > 1:
        raise ModelError(
            "To become a qwen3_moe model, all layers of a qwen3 model must attend alike, but its "
            f"`layer_types` mix {listing(sorted(kinds))}: the sparse class has one window for all "
            "layers. Choose another base model."
        )
    return {
        **_qwen_moe_values(values, shape),
        "use_sliding_window": kinds == {"sliding_attention"},
    }


_NO_BIAS = "the sparse class has no such biases, so they would be lost"

FAMILIES: Mapping[str, Family] = {
    family.dense_type: family
    for family in (
        Family(
            dense_type="llama",
            sparse_type="mixtral",
            sparse_values=_mixtral_values,
            limits=(
                Limit("attention_bias", allowed=False, reason=_NO_BIAS),
                Limit("mlp_bias", allowed=False, reason=_NO_BIAS),
            ),
        ),
        Family(dense_type="mistral", sparse_type="mixtral", sparse_values=_mixtral_values),
        Family(
            dense_type="qwen2",
            sparse_type="qwen2_moe",
            sparse_values=_qwen2_moe_values,
            also_read=("head_dim",),
            native_every=True,
        ),
        Family(
            dense_type="qwen3",
            sparse_type="qwen3_moe",
            sparse_values=_qwen3_moe_values,
            also_read=("head_dim",),
            native_every=True,
        ),
    )
}


def family_of(model: PreTrainedModel | PreTrainedConfig) -> Family:
    """Return the family of a dense model.

    Raises:
        ModelError: if the model type is not in the table.
    """
    config = model if isinstance(model, PreTrainedConfig) else model.config
    family = FAMILIES.get(config.model_type)
    if family is None:
        sparse = {family.sparse_type for family in FAMILIES.values()}
        hint = (
            " It is sparse already; tune it as it is."
            if config.model_type in sparse
            else nearest_name_hint(config.model_type, FAMILIES)
        )
        raise ModelError(
            f"The base of upcycling must be a dense model of type {listing(FAMILIES)}, but its "
            f"type is `{config.model_type}`.{hint}"
        )
    return family
