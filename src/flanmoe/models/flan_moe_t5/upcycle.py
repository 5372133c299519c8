"""Upcycling of T5, T5.1.1 and FLAN-T5 to FlanMoeT5: the encoder-decoder counterpart of `models.upcycle`.

Each side gets a router of its own, or stays dense. Experts are made from the FFN that they replace, in the
ways of `models.experts_from_ffn`; everything else is copied under the name that it has.

Equal to the dense model before any training are `copy` and `granular` with routers whose gates sum to 1 and
that turn nothing away in evaluation: `top_k` with `normalize`, `gshard` and `st_moe` with `normalize` and
all second choices, `switch` with `gate: straight_through`. Raw probabilities scale an FFN's output by
themselves, and expert choice serves a token as often as it likes: such models start elsewhere.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, T5ForConditionalGeneration

from flanmoe.core.errors import ModelError
from flanmoe.core.seeds import SeedTree
from flanmoe.models.blocks import require_moe_blocks
from flanmoe.models.experts_from_ffn import Mode, ModeConfig, fill_experts, fill_router
from flanmoe.models.flan_moe_t5.chosen_router import ChosenRouter
from flanmoe.models.flan_moe_t5.configuration import SIDES, FlanMoeT5Config, Side, placed_layers
from flanmoe.models.flan_moe_t5.model import FlanMoeT5ForConditionalGeneration
from flanmoe.models.upcycle import copy_shared, empty_sparse, require_floating_weights
from flanmoe.moe.block import ExpertWeights
from flanmoe.moe.routers import RouterConfig, SwitchConfig, TopKConfig
from flanmoe.moe.routers.top_two import TopTwoConfig

# What a checkpoint says about itself rather than about its architecture.
_NOT_CARRIED = frozenset({"architectures", "transformers_version"})


class T5UpcycleConfig(ModeConfig):
    """How a dense T5 becomes a FlanMoeT5; see `ModeConfig` for what is not listed here.

    Attributes:
        mode: how experts are made; `granular` needs `top_k` routers, `sliced` takes
            any.
        encoder_router, decoder_router: settings of a router (`{kind: top_k, num_experts: 8}`), null for a
            side that stays dense. Rows are drawn with the router's `init_std`.
        encoder_every, decoder_every: every n-th layer of a side becomes sparse.
        placement: which layer of every n: the last, or the second as in transformers' Switch; see
            `FlanMoeT5Config`.
        extra_dense_ffn: give every sparse layer a dense FFN after it (ST-MoE). Its output matrix starts at
            zero, so that it adds nothing at first. The rest of it, its norm included, is a copy of the
            layer's own FFN: its units answer to such inputs already, whereas random ones would have to be
            trained through an output matrix that starts at zero.
        extra_ffn_width: units of that FFN, the first ones of the layer's own; null for all.
        expert_dropout: dropout on the units inside experts; null for the model's own rate.
    """

    mode: Mode = "copy"
    encoder_router: ChosenRouter = None
    decoder_router: ChosenRouter = None
    encoder_every: int = Field(default=2, ge=1)
    decoder_every: int = Field(default=2, ge=1)
    placement: Literal["last", "second"] = "last"
    extra_dense_ffn: bool = False
    extra_ffn_width: int | None = Field(default=None, ge=1)
    expert_dropout: float | None = Field(default=None, ge=0, lt=1)

    def router(self, side: Side) -> RouterConfig | None:
        """Return the router of a side, None where it stays dense."""
        return self.encoder_router if side == "encoder" else self.decoder_router

    def every(self, side: Side) -> int:
        """Return n where every n-th layer of a side becomes sparse."""
        return self.encoder_every if side == "encoder" else self.decoder_every

    @property
    def changed_by(self) -> str | None:
        """What makes the sparse model differ from the dense one at step 0; None if nothing does."""
        reasons = [
            f"{reason} of `{side}_router`"
            for side in SIDES
            if (router := self.router(side)) and (reason := _changing_option(router))
        ]
        return f"Mode `{self.mode}` with {' and '.join(reasons)}" if reasons else super().changed_by

    @model_validator(mode="after")
    def _some_side_is_sparse(self) -> "T5UpcycleConfig":
        if self.encoder_router is None and self.decoder_router is None:
            raise ValueError(
                "a sparse T5 needs `encoder_router`, `decoder_router` or both, but found neither"
            )
        for side in SIDES:
            default = type(self).model_fields[f"{side}_every"].default
            if self.router(side) is None and self.every(side) != default:
                raise ValueError(
                    f"`{side}_every` only has an effect with `{side}_router`, but is {self.every(side)} "
                    "without it; leave it out"
                )
        return self

    @model_validator(mode="after")
    def _a_width_has_an_effect(self) -> "T5UpcycleConfig":
        if self.extra_ffn_width is not None and not self.extra_dense_ffn:
            raise ValueError(
                "`extra_ffn_width` only has an effect with `extra_dense_ffn: true`, but is "
                f"{self.extra_ffn_width} without it; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _the_decoder_is_causal(self) -> "T5UpcycleConfig":
        if self.decoder_router is not None and (reason := self.decoder_router.looks_ahead):
            raise ValueError(
                f"`decoder_router` must not look at later tokens, but is one that does: {reason}; use token "
                "choice in natural order (`top_k`, `switch`, `gshard` or `st_moe`)"
            )
        return self

    @model_validator(mode="after")
    def _slices_stay_together(self) -> "T5UpcycleConfig":
        for side in SIDES:
            router = self.router(side)
            if self.mode != "granular" or router is None:
                continue
            if reason := _splitting(router):
                raise ValueError(
                    f"`{side}_router` must be `top_k` with `normalize: true` in mode `granular`, but is "
                    f"`{_kind(router)}`: {reason}; use `mode: sliced` or `mode: copy`"
                )
            for name, count in router.to_mapping().items():
                if name in ("top_k", "num_experts") and count % self.granularity:
                    raise ValueError(
                        f"`{side}_router.{name}` must be a multiple of `granularity` ({self.granularity}), but "
                        f"is {count}: a token needs every slice of the FFN once"
                    )
        return self


def _kind(router: RouterConfig) -> str:
    return str(router.to_mapping()["kind"])


def _changing_option(router: RouterConfig) -> str | None:
    """Return the setting that keeps evaluation from giving the FFN's output; None if there is none."""
    match router:
        case TopKConfig(normalize=False) | TopTwoConfig(normalize=False):
            return "`normalize: false`"
        case TopKConfig():
            return None
        case SwitchConfig(gate="probability"):
            return "`gate: probability`"
        case TopTwoConfig(evaluation_second_choice=policy) if policy != "all":
            return f"`evaluation_second_choice: {policy}`"
        case SwitchConfig() | TopTwoConfig():
            limit = router.capacity.evaluation
            return None if limit is None else f"`capacity.evaluation: {limit:g}`"
        case _:
            return f"`kind: {_kind(router)}`"


def _splitting(router: RouterConfig) -> str | None:
    """Return why a router may give a token some slices of an FFN without the others; None if it cannot."""
    match router:
        case TopKConfig(normalize=True):
            return None
        case TopKConfig():
            return "with `normalize: false` the gates of an FFN's slices do not sum to 1"
        case SwitchConfig():
            return "a token visits one expert, which is one slice of the FFN"
        case TopTwoConfig():
            return (
                "a second choice that is given up or does not fit leaves a token with half an FFN"
            )
        case _:
            return "the gates of an FFN's slices do not sum to 1"


def sparse_t5_config(dense: PreTrainedConfig, config: T5UpcycleConfig) -> FlanMoeT5Config:
    """Return the configuration of the sparse model that `upcycle_t5` would build.

    Whether a T5's head is its embedding table is a matter of its weights; here it counts as one where the
    head's input is scaled, as in T5 and not in T5.1.1.

    Raises:
        ModelError: if the base is no dense T5, the FFN cannot be cut into `granularity` equal slices or is
            narrower than `extra_ffn_width`, or no layer of a side would become sparse.
    """
    if dense.model_type not in ("t5", FlanMoeT5Config.model_type):
        raise _refusal(f"its type is `{dense.model_type}`")
    values = dense.to_dict()
    if any(values.get(f"{side}_router") for side in SIDES):
        raise ModelError(
            "The base of upcycling must be dense, but this FlanMoeT5 is sparse already. Tune it as it is."
        )
    declared = {field.name for field in dataclasses.fields(FlanMoeT5Config)} - _NOT_CARRIED
    carried = {name: value for name, value in values.items() if name in declared}
    for side in SIDES:
        _check_a_layer_is_left(dense, config, side)
    if config.extra_ffn_width is not None and config.extra_ffn_width > dense.d_ff:
        raise ModelError(
            f"`extra_ffn_width` must be at most the FFN's width ({dense.d_ff}), whose units it takes, but is "
            f"{config.extra_ffn_width}. Lower it, or leave it out for all of them."
        )
    return FlanMoeT5Config(
        **{
            "tied_head": values["scale_decoder_outputs"],
            **carried,
            **{f"{side}_router": _settings(config.router(side)) for side in SIDES},
            **{f"{side}_sparse_every": config.every(side) for side in SIDES},
            "sparse_placement": config.placement,
            "expert_width": config.expert_width(dense.d_ff),
            "expert_dropout": config.expert_dropout,
            "extra_dense_ffn": config.extra_dense_ffn,
            "extra_ffn_width": config.extra_ffn_width,
        }
    )


def _refusal(found: str) -> ModelError:
    return ModelError(
        "The base of a FlanMoeT5 must be a T5, T5.1.1 or FLAN-T5 with its head, or a dense FlanMoeT5, but "
        f"{found}. A decoder is upcycled without `encoder_router` and `decoder_router`, by the stage `upcycle`."
    )


def _settings(router: RouterConfig | None) -> dict[str, Any] | None:
    return None if router is None else router.to_mapping()


def _check_a_layer_is_left(dense: PreTrainedConfig, config: T5UpcycleConfig, side: Side) -> None:
    layers = dense.num_layers if side == "encoder" else dense.num_decoder_layers
    every = config.every(side)
    sparse = placed_layers(layers, every=every, placement=config.placement)
    if config.router(side) is not None and not sparse:
        raise ModelError(
            f"`{side}_every` must leave a sparse layer, but with {every} and `placement: {config.placement}` "
            f"none of the {layers} layers of the {side} is one. Lower it, or leave `{side}_router` out."
        )


@torch.no_grad()
def upcycle_t5(
    dense: PreTrainedModel, config: T5UpcycleConfig, seeds: SeedTree
) -> FlanMoeT5ForConditionalGeneration:
    """Return a new FlanMoeT5 made from `dense`, which stays as it is.

    It has the dense model's dtype, routers in float32, is on the CPU, and in evaluation mode. Memory: the
    dense and the sparse weights, and one expert.

    Args:
        dense: a `T5ForConditionalGeneration` or a dense FlanMoeT5, with floating-point weights.
        config: which layers become sparse, and how.
        seeds: every layer's router and every expert draws from a branch of its own.

    Raises:
        ModelError: if the model cannot be upcycled as asked, or has parameters that a FlanMoeT5 lacks.
    """
    if not isinstance(dense, T5ForConditionalGeneration | FlanMoeT5ForConditionalGeneration):
        raise _refusal(f"it is a {type(dense).__name__}")
    config_of_sparse = sparse_t5_config(dense.config, config)
    require_floating_weights(dense)
    # transformers' configurations say that every head is tied; the weights know.
    config_of_sparse.tied_head = dense.lm_head.weight is dense.shared.weight
    sparse = cast(FlanMoeT5ForConditionalGeneration, empty_sparse(dense, config_of_sparse))
    places = list(_places(config_of_sparse))
    copy_shared(
        dense,
        sparse,
        replaced={name for place in places for name in place.ffn.values()},
        made=[name for place in places for name in (place.block, place.extra)],
    )
    _fill(dense, sparse, places, config, seeds)
    return sparse


@dataclass(frozen=True, slots=True)
class _Place:
    """One FFN that becomes sparse.

    Attributes:
        side, layer: where it is.
        holder: dotted name of the layer that holds the FFN or the sparse block, with its norm.
        extra: dotted name of the layer after it, which an extra dense FFN would be.
        block: dotted name of the sparse block.
        ffn: names of the dense model's matrices by what they are in an expert.
        router_std: standard deviation of the router's rows.
    """

    side: Side
    layer: int
    holder: str
    extra: str
    block: str
    ffn: Mapping[str, str]
    router_std: float


def _places(config: FlanMoeT5Config) -> Iterator[_Place]:
    matrices = {"gate": "wi_0", "up": "wi_1"} if config.is_gated_act else {"up": "wi"}
    matrices["down"] = "wo"
    for side in SIDES:
        router = config.router(side)
        if router is None:
            continue
        # Behind self-attention, and in the decoder behind attention to the encoder.
        index = 1 if side == "encoder" else 2
        for layer in config.sparse_layers(side):
            layers = f"{side}.block.{layer}.layer"
            ffn = f"{layers}.{index}.DenseReluDense"
            yield _Place(
                side=side,
                layer=layer,
                holder=f"{layers}.{index}",
                extra=f"{layers}.{index + 1}",
                block=f"{layers}.{index}.mlp",
                ffn={matrix: f"{ffn}.{name}.weight" for matrix, name in matrices.items()},
                router_std=router.init_std,
            )


def _fill(
    dense: PreTrainedModel,
    sparse: PreTrainedModel,
    places: Sequence[_Place],
    config: T5UpcycleConfig,
    seeds: SeedTree,
) -> None:
    blocks = {block.name: block for block in require_moe_blocks(sparse)}
    for place in places:
        block, own_seeds = blocks[place.block], seeds.child(place.side)
        # As loading has it, whatever the rest is in: rounded scores tie experts that are not equal.
        block.router.float()
        fill_router(
            block,
            std=place.router_std,
            experts_per_row=config.experts_per_row,
            seeds=own_seeds.child("router", place.layer),
        )
        whole = {name: dense.get_parameter(path).detach() for name, path in place.ffn.items()}
        experts = own_seeds.child("experts", place.layer)
        fill_experts(block, ExpertWeights(**{"gate": None, **whole}), config, experts)
        if config.extra_dense_ffn:
            own = dense.get_submodule(place.holder)
            _fill_extra(sparse.get_submodule(place.extra), own)


def _fill_extra(extra: nn.Module, own: nn.Module) -> None:
    """Make an extra dense FFN of a layer's own, the first units of it; its output matrix is zero."""
    for name, target in extra.named_parameters():
        if name.endswith("wo.weight"):
            target.zero_()
        else:
            target.copy_(own.get_parameter(name)[: len(target)])
