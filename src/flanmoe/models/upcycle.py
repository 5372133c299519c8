"""Upcycling: a dense model becomes a sparse one in a native transformers class.

Every FFN that becomes sparse is replaced by experts made from its own matrices and a router with
random rows. Four ways of making the experts:

- `granular`: an expert is one of `granularity` slices of the FFN. Experts e*g to e*g+g-1 form a
  group that holds every slice once and shares one router row, so that a token's choices always
  complete whole FFNs. With top_k = granularity the sparse model does the dense one's work, no
  more. Exact at step 0.
- `copy`: every expert is the whole FFN (sparse upcycling, arXiv 2212.05055). Exact at step 0.
- `noise`: copies with Gaussian noise, so that experts differ at once.
- `drop`: copies in which a share of the intermediate units is drawn anew (Drop-Upcycling,
  arXiv 2502.19261).

Grouped router rows are the "virtual groups" of arXiv 2410.07524 (released in Megatron-Core).
There the scale of the output is spread over all three matrices; here it is on `down` alone
(see `_granular_expert`).
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from flanmoe.core.config import Config
from flanmoe.core.console import say, warn
from flanmoe.core.errors import ModelError
from flanmoe.core.names import listing
from flanmoe.core.seeds import SeedTree
from flanmoe.models.blocks import require_moe_blocks
from flanmoe.models.experts_interface import EXPERTS_IMPLEMENTATION
from flanmoe.models.families import Family, Site, SparseShape, family_of
from flanmoe.models.router_precision import run_routers_outside_autocast
from flanmoe.moe.block import ExpertWeights, MoEBlock

STEP0_TOLERANCE = 1e-3

Mode = Literal["granular", "copy", "noise", "drop"]


class UpcycleConfig(Config):
    """How a dense model becomes sparse.

    Attributes:
        num_experts: experts of each sparse layer.
        top_k: experts that each token visits.
        mode: how experts are made from the FFN; see the module's text.
        granularity: `granular` only: slices of the FFN. An expert is 1/granularity of its width.
        every: layer i becomes sparse iff `i % every == every - 1`.
        noise_std: `noise` only: standard deviation of the noise, in units of each matrix's own.
        drop_fraction: `drop` only: share of the intermediate units of each expert that is
            drawn anew.
        router_std: standard deviation of the router's random rows.
    """

    num_experts: int = Field(default=8, ge=2)
    top_k: int = Field(default=2, ge=1)
    mode: Mode = "granular"
    granularity: int = Field(default=2, ge=1)
    every: int = Field(default=1, ge=1)
    noise_std: float = Field(default=0.1, gt=0)
    drop_fraction: float = Field(default=0.5, gt=0, le=1)
    router_std: float = Field(default=0.02, gt=0)

    @property
    def exact(self) -> bool:
        """Whether the sparse model equals the dense one at step 0, up to rounding."""
        return self.mode in ("granular", "copy")

    @model_validator(mode="after")
    def _counts_fit(self) -> "UpcycleConfig":
        if self.top_k > self.num_experts:
            raise ValueError(
                f"`top_k` must be at most `num_experts` ({self.num_experts}), but is {self.top_k}"
            )
        if self.mode == "granular":
            for name, count in (("top_k", self.top_k), ("num_experts", self.num_experts)):
                if count % self.granularity:
                    raise ValueError(
                        f"`{name}` must be a multiple of `granularity` ({self.granularity}), but "
                        f"is {count}: a token needs every slice of the FFN once"
                    )
        return self

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> "UpcycleConfig":
        owners = {"granularity": "granular", "noise_std": "noise", "drop_fraction": "drop"}
        for name, mode in owners.items():
            value = getattr(self, name)
            if mode != self.mode and value != type(self).model_fields[name].default:
                raise ValueError(
                    f"`{name}` only has an effect in mode `{mode}`, but is {value} in mode "
                    f"`{self.mode}`; leave it out"
                )
        return self


def sparse_config(dense: PreTrainedConfig, config: UpcycleConfig) -> PreTrainedConfig:
    """Return the configuration of the sparse model that `upcycle` would build.

    Raises:
        ModelError: if the model type or one of its options cannot be upcycled, or the FFN cannot be
            cut into `granularity` equal slices.
    """
    family = family_of(dense)
    num_slices = config.granularity if config.mode == "granular" else 1
    if dense.intermediate_size % num_slices:
        raise ModelError(
            f"The FFN's width ({dense.intermediate_size}) must be a multiple of `granularity`, but "
            f"`granularity` is {num_slices}. Choose a divisor of the width."
        )
    shape = SparseShape(
        num_experts=config.num_experts,
        top_k=config.top_k,
        expert_width=dense.intermediate_size // num_slices,
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
    family = family_of(dense)
    _check_weights(dense)
    if config.top_k == 1:
        warn(
            "With `top_k` 1 the renormalised gate is always 1, so the task's loss gives the "
            "routers no gradient; only router losses will train them. Use `top_k` 2 or more to let "
            "them learn."
        )
    sparse = _empty_sparse(dense, sparse_config(dense.config, config))
    blocks = require_moe_blocks(sparse)
    _copy_shared(dense, sparse, family, blocks)
    sites = family.sites(dense)
    for block in blocks:
        _silence(sparse.get_submodule(block.name))
        _fill_router(block, config, seeds.child("router", block.layer))
        _fill_experts(block, sites[block.layer], config, seeds.child("experts", block.layer))
    run_routers_outside_autocast(sparse)
    return sparse


def _check_weights(dense: PreTrainedModel) -> None:
    for name, parameter in dense.named_parameters():
        if not parameter.is_floating_point():
            raise ModelError(
                f"Upcycling needs floating-point weights, but {name} holds {parameter.dtype}. Load "
                "the model without quantization."
            )


def _empty_sparse(dense: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    with no_init_weights():
        sparse = AutoModelForCausalLM.from_config(
            config,
            dtype=dense.dtype,
            attn_implementation=dense.config._attn_implementation,
            experts_implementation=EXPERTS_IMPLEMENTATION,
        )
    sparse.tie_weights()
    sparse.generation_config = copy.deepcopy(dense.generation_config)
    return sparse.eval()


def _copy_shared(
    dense: PreTrainedModel, sparse: PreTrainedModel, family: Family, blocks: Sequence[MoEBlock]
) -> None:
    """Copy what stays as it is; every parameter of both models must be accounted for."""
    replaced = {name for block in blocks for name in family.site_parameters(block.layer).values()}
    made = tuple(f"{block.name}." for block in blocks)
    sources = {name: p for name, p in dense.named_parameters() if name not in replaced}
    targets = {name: p for name, p in sparse.named_parameters() if not name.startswith(made)}
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


def _fill_router(block: MoEBlock, config: UpcycleConfig, seeds: SeedTree) -> None:
    weight = block.router.get_parameter("weight")
    group = config.granularity if config.mode == "granular" else 1
    shape = (block.num_experts // group, block.hidden_size)
    rows = torch.randn(shape, generator=seeds.torch()) * config.router_std
    # All experts of a group share one row: their logits are equal, so they are chosen together.
    weight.copy_(rows.repeat_interleave(group, dim=0))


def _fill_experts(block: MoEBlock, site: Site, config: UpcycleConfig, seeds: SeedTree) -> None:
    whole = ExpertWeights(site.gate, site.up, site.down)
    for index in range(block.num_experts):
        generator = seeds.child("expert", index).torch()
        match config.mode:
            case "granular":
                expert = granular_slice(whole, index % config.granularity, config.granularity)
            case "copy":
                expert = whole
            case "noise":
                expert = with_noise(whole, config.noise_std, generator)
            case "drop":
                expert = with_redrawn_units(whole, config.drop_fraction, generator)
        block.write_expert(index, expert)


def granular_slice(whole: ExpertWeights, index: int, num_slices: int) -> ExpertWeights:
    """Return one of `num_slices` slices of an FFN, its output multiplied by `num_slices`.

    A group's slices are chosen together with equal gates. Over the m = top_k / num_slices chosen
    groups the gates sum to 1, so each slice of group j has the gate w_j / num_slices with
    sum_j w_j = 1, and the factor makes the sum over slices w_j times the whole FFN.

    The factor is on `down` alone: the FFN is linear in it, and a power of two costs no precision.
    It cannot be on `gate`, which sits inside the activation (SiLU(a x) is not a SiLU(x)), and its
    cube root on each of the three matrices would be inexact there and rounded everywhere.
    """
    width = whole.gate.shape[0] // num_slices
    units = slice(index * width, (index + 1) * width)
    return ExpertWeights(
        gate=whole.gate[units], up=whole.up[units], down=whole.down[:, units] * num_slices
    )


def with_noise(whole: ExpertWeights, noise_std: float, generator: torch.Generator) -> ExpertWeights:
    """Return a copy whose matrices carry noise of `noise_std` times
    their own standard deviation."""

    def noisy(matrix: Float[Tensor, "R C"]) -> Float[Tensor, "R C"]:
        noise = torch.randn(matrix.shape, generator=generator).to(matrix)
        return matrix + noise * (noise_std * matrix.std())

    return ExpertWeights(noisy(whole.gate), noisy(whole.up), noisy(whole.down))


def with_redrawn_units(
    whole: ExpertWeights, fraction: float, generator: torch.Generator
) -> ExpertWeights:
    """Return a copy in which a share of the intermediate units is drawn anew (Drop-Upcycling).

    A unit is a row of `gate`, the same row of `up` and the same column of `down`. One set of units
    is drawn and replaced in all three, as arXiv 2502.19261 describes (its released script draws a
    set for each matrix, which leaves units half old and half new). New values are normal with the
    mean and the standard deviation of what they replace.
    """
    width = whole.gate.shape[0]
    units = torch.randperm(width, generator=generator)[: round(fraction * width)]

    def redraw(matrix: Float[Tensor, "R C"], dim: int) -> Float[Tensor, "R C"]:
        old = matrix.index_select(dim, units)
        new = torch.randn(old.shape, generator=generator).to(matrix) * old.std() + old.mean()
        return matrix.index_copy(dim, units, new)

    return ExpertWeights(redraw(whole.gate, 0), redraw(whole.up, 0), redraw(whole.down, 1))


def step0_max_abs_diff(
    dense: PreTrainedModel, sparse: PreTrainedModel, input_ids: Int[Tensor, "B L"]
) -> float:
    """Return the largest absolute difference between two models' logits,
    in float32, without dropout."""
    differences: list[Tensor] = []
    with torch.no_grad(), _float32_evaluation(dense), _float32_evaluation(sparse):
        for row in input_ids.split(1):
            logits = [model(row, use_cache=False).logits for model in (dense, sparse)]
            differences.append((logits[0] - logits[1]).abs().max())
    # Not Python's max, which loses a NaN.
    return float(torch.stack(differences).max())


def check_step0(
    dense: PreTrainedModel,
    sparse: PreTrainedModel,
    input_ids: Int[Tensor, "B L"],
    config: UpcycleConfig,
) -> float:
    """Return `step0_max_abs_diff`, which the exact modes must keep below `STEP0_TOLERANCE`.

    For the other modes the gap is what they are for; it is printed.

    Raises:
        ModelError: if the mode is exact and the models differ.
    """
    difference = step0_max_abs_diff(dense, sparse, input_ids)
    if not config.exact:
        say(
            f"Mode `{config.mode}` changes the model: its logits differ from the dense model's by "
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
