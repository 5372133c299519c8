"""Upcycling: a dense decoder becomes a sparse one in a native transformers class.

Every FFN that becomes sparse is replaced by experts made from its own matrices (`experts_from_ffn`) and
a router with random rows. Encoder-decoders have `flan_moe_t5.upcycle`, which shares what is public here.
"""

import copy
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from flanmoe.core.console import say, warn
from flanmoe.core.errors import ModelError
from flanmoe.core.names import listing
from flanmoe.core.seeds import SeedTree
from flanmoe.models.blocks import require_moe_blocks
from flanmoe.models.experts_from_ffn import ModeConfig, fill_experts, fill_router
from flanmoe.models.experts_interface import EXPERTS_IMPLEMENTATION
from flanmoe.models.families import SparseShape, family_of
from flanmoe.models.meta import auto_class
from flanmoe.models.router_precision import run_routers_outside_autocast
from flanmoe.moe.block import ExpertWeights

STEP0_TOLERANCE = 1e-3


class UpcycleConfig(ModeConfig):
    """How a dense decoder becomes sparse; see `ModeConfig` for what is not listed here.

    Attributes:
        num_experts: experts of each sparse layer.
        top_k: experts that each token visits.
        every: layer i becomes sparse iff `i % every == every - 1`.
        router_std: standard deviation of the router's random rows.
    """

    num_experts: int = Field(default=8, ge=2)
    top_k: int = Field(default=2, ge=1)
    every: int = Field(default=1, ge=1)
    router_std: float = Field(default=0.02, gt=0)

    @model_validator(mode="after")
    def _counts_fit(self) -> "UpcycleConfig":
        if self.top_k > self.num_experts:
            raise ValueError(
                f"`top_k` must be at most `num_experts` ({self.num_experts}), but is {self.top_k}"
            )
        for name, count in (("top_k", self.top_k), ("num_experts", self.num_experts)):
            if count % self.experts_per_row:
                raise ValueError(
                    f"`{name}` must be a multiple of `granularity` ({self.granularity}), but "
                    f"is {count}: a token needs every slice of the FFN once"
                )
        return self


def sparse_config(dense: PreTrainedConfig, config: UpcycleConfig) -> PreTrainedConfig:
    """Return the configuration of the sparse model that `upcycle` would build.

    Raises:
        ModelError: if the model type or one of its options cannot be upcycled, or the FFN cannot be
            cut into `granularity` equal slices.
    """
    if dense.is_encoder_decoder:
        raise ModelError(
            f"The base of the stage `upcycle` must be a decoder, but its type is `{dense.model_type}`. Name "
            "its routers: `encoder_router` and `decoder_router` of the stage `upcycle_t5`, "
            "`--encoder-router` and `--decoder-router` of `flanmoe upcycle`."
        )
    family = family_of(dense)
    shape = SparseShape(
        num_experts=config.num_experts,
        top_k=config.top_k,
        expert_width=config.expert_width(dense.intermediate_size),
        every=config.every,
    )
    return family.sparse_config(dense, shape)


@torch.no_grad()
def upcycle(dense: PreTrainedModel, config: UpcycleConfig, seeds: SeedTree) -> PreTrainedModel:
    """Return a new sparse model made from `dense`, which stays as it is.

    The result is in the native class of its family (Mixtral, Qwen2-MoE, Qwen3-MoE), in the
    dense model's dtype, on the CPU, in evaluation mode. Memory: the dense and the sparse weights,
    and one expert.

    Args:
        dense: a model of a known family with floating-point weights.
        config: how the experts are made.
        seeds: every layer's router and every expert draws from a branch of its own.

    Raises:
        ModelError: if the model cannot be upcycled as asked.
    """
    config_of_sparse = sparse_config(dense.config, config)
    family = family_of(dense)
    require_floating_weights(dense)
    if config.top_k == 1:
        warn(
            "With `top_k` 1 the renormalised gate is always 1, so the task's loss gives the "
            "routers no gradient; only router losses will train them. Use `top_k` 2 or more to let "
            "them learn."
        )
    sparse = empty_sparse(dense, config_of_sparse)
    blocks = require_moe_blocks(sparse)
    copy_shared(
        dense,
        sparse,
        replaced=[
            name for block in blocks for name in family.site_parameters(block.layer).values()
        ],
        made=[block.name for block in blocks],
    )
    sites = family.sites(dense)
    for block in blocks:
        site = sites[block.layer]
        _silence(sparse.get_submodule(block.name))
        fill_router(
            block,
            std=config.router_std,
            experts_per_row=config.experts_per_row,
            seeds=seeds.child("router", block.layer),
        )
        whole = ExpertWeights(site.gate, site.up, site.down)
        fill_experts(block, whole, config, seeds.child("experts", block.layer))
    run_routers_outside_autocast(sparse)
    return sparse


def require_floating_weights(dense: PreTrainedModel) -> None:
    """Refuse a model whose weights are not numbers that can be copied and sliced as they are.

    Raises:
        ModelError: names the first such parameter.
    """
    for name, parameter in dense.named_parameters():
        if not parameter.is_floating_point():
            raise ModelError(
                f"Upcycling needs floating-point weights, but {name} holds {parameter.dtype}. Load "
                "the model without quantization."
            )


def empty_sparse(dense: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model of a configuration without drawing weights: everything in it is still to be filled.

    It gets the dense model's dtype, attention and generation settings, and evaluation mode.
    """
    with no_init_weights():
        sparse = auto_class(config).from_config(
            config,
            dtype=dense.dtype,
            attn_implementation=dense.config._attn_implementation,
            experts_implementation=EXPERTS_IMPLEMENTATION,
        )
    sparse.tie_weights()
    sparse.generation_config = copy.deepcopy(dense.generation_config)
    return sparse.eval()


def copy_shared(
    dense: PreTrainedModel,
    sparse: PreTrainedModel,
    *,
    replaced: Collection[str],
    made: Iterable[str],
) -> None:
    """Copy what stays as it is; every parameter of both models must be accounted for.

    Args:
        dense, sparse: the models.
        replaced: parameters of the dense model that experts are made of.
        made: modules of the sparse model that are filled otherwise.

    Raises:
        ModelError: names the parameters that only one of the two models has.
    """
    prefixes = tuple(f"{name}." for name in made)
    sources = {name: p for name, p in dense.named_parameters() if name not in replaced}
    targets = {name: p for name, p in sparse.named_parameters() if not name.startswith(prefixes)}
    if differing := sources.keys() ^ targets.keys():
        raise ModelError(
            "Upcycling must carry over every parameter, but the dense and the sparse class do not "
            f"share {listing(sorted(differing))}. This base model has parts of its own; choose "
            "another."
        )
    for name, target in targets.items():
        target.copy_(sources[name])


def _silence(block: nn.Module) -> None:
    """Set all of a new sparse block to zero; what is not then filled is a shared expert.

    With all its matrices at zero it adds nothing, gets no gradient, and so never will: the model
    is what was asked for although the class insists on a shared expert.
    """
    for parameter in block.parameters():
        parameter.zero_()


def step0_max_abs_diff(
    dense: PreTrainedModel, sparse: PreTrainedModel, input_ids: Int[Tensor, "B L"]
) -> float:
    """Return the largest absolute difference between two models' logits, in float32, without dropout.

    Encoder-decoders read each row in the encoder and are asked to write it in the decoder.
    """
    differences: list[Tensor] = []
    with torch.no_grad(), _float32_evaluation(dense), _float32_evaluation(sparse):
        for row in input_ids.split(1):
            inputs = _inputs(sparse, row)
            logits = [model(**inputs, use_cache=False).logits for model in (dense, sparse)]
            differences.append((logits[0] - logits[1]).abs().max())
    # Not Python's max, which loses a NaN.
    return float(torch.stack(differences).max())


def _inputs(model: PreTrainedModel, row: Int[Tensor, "1 L"]) -> dict[str, Int[Tensor, "1 L"]]:
    if not model.config.is_encoder_decoder:
        return {"input_ids": row}
    shifted: Any = model.prepare_decoder_input_ids_from_labels
    return {"input_ids": row, "decoder_input_ids": shifted(row)}


def check_step0(
    dense: PreTrainedModel,
    sparse: PreTrainedModel,
    input_ids: Int[Tensor, "B L"],
    config: ModeConfig,
) -> float:
    """Return `step0_max_abs_diff`, which stays below `STEP0_TOLERANCE` where the configuration is exact.

    Elsewhere the gap is what was asked for; it is printed.

    Raises:
        ModelError: if the configuration is exact and the models differ.
    """
    difference = step0_max_abs_diff(dense, sparse, input_ids)
    if config.changed_by:
        say(
            f"{config.changed_by} changes the model: its logits differ from the dense model's by "
            f"up to {difference:.3g} before any training."
        )
    # Written so that a NaN fails too.
    elif not difference <= STEP0_TOLERANCE:
        raise ModelError(
            f"Before any training the sparse model's logits must equal the dense model's within "
            f"{STEP0_TOLERANCE:g} in float32, but differ by {difference:.3g}. The base model is "
            "probably changed in a way that its configuration does not say; choose another."
        )
    return difference


@contextmanager
def _float32_evaluation(model: PreTrainedModel) -> Iterator[None]:
    """Turn dropout off and raise the weights to float32 for a while; lower precisions come back.

    Only parameters: RoPE's buffers are float32 in models of any dtype and must not be rounded
    on the way back.
    """
    training = model.training
    dtypes = [(parameter, parameter.dtype) for parameter in model.parameters()]
    model.eval()
    for parameter, _ in dtypes:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        model.train(training)
        for parameter, dtype in dtypes:
            parameter.data = parameter.data.to(dtype)
