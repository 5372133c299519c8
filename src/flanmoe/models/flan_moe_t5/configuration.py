"""`FlanMoeT5Config`: what a T5 is told, and which of its FFNs are sparse and how they route."""

import copy
from collections.abc import Mapping
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from flanmoe.core.errors import ConfigError
from flanmoe.core.names import listing
from flanmoe.moe.layer import ExpertsConfig
from flanmoe.moe.routers import parse_router
from flanmoe.moe.routers.base import RouterConfig

Side = Literal["encoder", "decoder"]
SIDES: tuple[Side, Side] = ("encoder", "decoder")

# transformers' names of activations and ours.
_ACTIVATIONS: Mapping[str, str] = {
    "relu": "relu",
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
}


def placed_layers(num_layers: int, *, every: int, placement: str) -> tuple[int, ...]:
    """Return which of so many layers are sparse by the rules of `FlanMoeT5Config`."""
    remainder = every - 1 if placement == "last" else min(1, every - 1)
    return tuple(layer for layer in range(num_layers) if layer % every == remainder)


@strict
class FlanMoeT5Config(PreTrainedConfig):
    """Configuration of `FlanMoeT5ForConditionalGeneration`. Names shared with T5 mean what they mean there.

    Which layers are sparse: with `<side>_router` set and s = `<side>_sparse_every`, layer i of that side,
    counted from 0, iff i mod s == s - 1 (`sparse_placement: last`; Flaxformer, NLLB-MoE), or iff i mod s == 1,
    all if s is 1 (`second`; transformers' Switch). The two rules differ from s = 3 on.

    Attributes:
        encoder_router, decoder_router: settings of a router, as `flanmoe.moe.routers.parse_router` reads them
            (`{"kind": "top_k.v1", "num_experts": 8, "top_k": 2}`); None leaves that side dense.
        encoder_sparse_every, decoder_sparse_every: s above.
        sparse_placement: the rule above.
        expert_width: intermediate units of an expert; None for `d_ff`.
        expert_dropout: dropout on an expert's intermediate units; None for `dropout_rate`, as in T5X.
        extra_dense_ffn: whether every sparse layer has a dense FFN after it, with a norm and a residual
            connection of its own (ST-MoE, arXiv 2202.08906).
        extra_ffn_width: intermediate units of that FFN; None for `d_ff`.
        feed_forward_proj: `relu` (T5) or `gated-gelu` (T5.1.1); of experts too. Any of relu, silu, gelu,
            gelu_new, with or without `gated-` before it.
        tied_head: whether the head is the embedding table. (transformers' `tie_word_embeddings` is always
            true: it is what makes both sides share one table.)
        scale_decoder_outputs: whether the head's input is multiplied by d_model ** -0.5; T5 does where it
            ties, T5.1.1 does not.
    """

    model_type = "flan_moe_t5"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
        "intermediate_size": "d_ff",
    }

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 1024
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float | int = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "gated-gelu"
    encoder_router: dict | None = None
    decoder_router: dict | None = None
    encoder_sparse_every: int = 2
    decoder_sparse_every: int = 2
    sparse_placement: str = "last"
    expert_width: int | None = None
    expert_dropout: float | int | None = None
    extra_dense_ffn: bool = False
    extra_ffn_width: int | None = None
    scale_decoder_outputs: bool = False
    tied_head: bool = False
    tie_word_embeddings: bool = True
    is_encoder_decoder: bool = True
    is_decoder: bool = False
    use_cache: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    decoder_start_token_id: int | None = 0

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what follows from the rest."""
        if self.num_decoder_layers is None:
            self.num_decoder_layers = self.num_layers
        self.tie_word_embeddings = True
        super().__post_init__(**kwargs)

    @property
    def is_gated_act(self) -> bool:
        """Whether FFNs are gated; read by transformers' T5 modules."""
        return self.feed_forward_proj.startswith("gated-")

    @property
    def dense_act_fn(self) -> str:
        """Name of the activation, as transformers' T5 modules read it."""
        name = self.feed_forward_proj.rpartition("-")[2]
        return "gelu_new" if self.feed_forward_proj == "gated-gelu" else name

    def validate_architecture(self) -> None:
        """Check what the fields say together.

        Raises:
            ConfigError: names the field, what it may be and what it is.
        """
        kind = self.feed_forward_proj.rpartition("-")[0]
        if self.dense_act_fn not in _ACTIVATIONS or kind not in ("", "gated"):
            raise ConfigError(
                f"`feed_forward_proj` must be {listing(_ACTIVATIONS)}, with or without `gated-` before it, but "
                f"is `{self.feed_forward_proj}`."
            )
        if self.sparse_placement not in ("last", "second"):
            raise ConfigError(
                f"`sparse_placement` must be `last` or `second`, but is `{self.sparse_placement}`."
            )
        for side in SIDES:
            self._check_side(side)
        if self.extra_ffn_width is not None and not self.extra_dense_ffn:
            raise ConfigError(
                "`extra_ffn_width` only has an effect with `extra_dense_ffn`, but is "
                f"{self.extra_ffn_width} without it. Set that, or leave it out."
            )
        if self.extra_dense_ffn and not any(self.sparse_layers(side) for side in SIDES):
            raise ConfigError(
                "`extra_dense_ffn` puts an FFN beside each sparse layer, but no layer is sparse. Name a router "
                "or leave it out."
            )

    def _check_side(self, side: Side) -> None:
        every = getattr(self, f"{side}_sparse_every")
        if every < 1:
            raise ConfigError(f"`{side}_sparse_every` must be at least 1, but is {every}.")
        if self.router(side) is not None and not self.sparse_layers(side):
            raise ConfigError(
                f"`{side}_sparse_every` must leave a sparse layer, but with {every} none of the "
                f"{self.layers(side)} layers is sparse. Lower it, or set `{side}_router` to null."
            )

    def layers(self, side: Side) -> int:
        """Return the number of layers of a side."""
        return self.num_layers if side == "encoder" else int(self.num_decoder_layers or 0)

    def router(self, side: Side) -> RouterConfig | None:
        """Return the router of a side's sparse layers; None where it is dense.

        Raises:
            ConfigError: if the settings are not those of a router.
        """
        values = self.encoder_router if side == "encoder" else self.decoder_router
        return None if values is None else parse_router(values, origin=f"{side}_router")

    def experts(self, side: Side) -> ExpertsConfig | None:
        """Return the experts of a side's sparse layers; None where it is dense."""
        router = self.router(side)
        if router is None:
            return None
        rate = self.dropout_rate if self.expert_dropout is None else self.expert_dropout
        return ExpertsConfig.parse(
            {
                "num_experts": router.num_experts,
                "expert_width": self.expert_width or self.d_ff,
                "activation": _ACTIVATIONS[self.dense_act_fn],
                "gated": self.is_gated_act,
                "dropout": float(rate),
            },
            origin="experts",
        )

    def sparse_layers(self, side: Side) -> tuple[int, ...]:
        """Return the numbers of a side's sparse layers."""
        every = getattr(self, f"{side}_sparse_every")
        if getattr(self, f"{side}_router") is None:
            return ()
        return placed_layers(self.layers(side), every=every, placement=self.sparse_placement)

    def of_side(self, side: Side) -> "FlanMoeT5Config":
        """Return what transformers' T5 modules of one side read."""
        config = copy.deepcopy(self)
        config.is_decoder = side == "decoder"
        config.num_layers = self.layers(side)
        config.use_cache = self.use_cache and side == "decoder"
        return config
