"""How experts are made from an FFN when a dense model becomes sparse, and what their router starts with.

Five ways, all for FFNs with and without a gate matrix:

- `granular`: an expert is one of `granularity` slices of the FFN. Experts e*g to e*g+g-1 form a
  group that holds every slice once and shares one router row, so that a token's choices always
  complete whole FFNs. With top_k = granularity the sparse model does the dense one's work, no
  more. Exact at step 0.
- `sliced`: the same slices, but every expert has a router row of its own, so that a token may get any of
  them, one slice twice and another not at all. It makes narrow experts for routers that cannot keep
  groups together (GShard, ST-MoE, expert choice), at the price of another model at step 0.
- `copy`: every expert is the whole FFN (sparse upcycling, arXiv 2212.05055). Exact at step 0.
- `noise`: copies with Gaussian noise, so that experts differ at once.
- `drop`: copies in which a share of the intermediate units is drawn anew (Drop-Upcycling,
  arXiv 2502.19261).

Exact means: where a token's gates sum to 1 and no choice is turned away, the sparse layer gives what the
FFN gave. Grouped router rows are the "virtual groups" of arXiv 2410.07524 (released in Megatron-Core).
There the scale of the output is spread over all three matrices; here it is on `down` alone
(see `granular_slice`).
"""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from flanmoe.core.config import Config
from flanmoe.core.errors import ModelError
from flanmoe.core.seeds import SeedTree
from flanmoe.moe.block import ExpertWeights, MoEBlock

Mode = Literal["granular", "sliced", "copy", "noise", "drop"]
_SLICING: tuple[Mode, ...] = ("granular", "sliced")


class ModeConfig(Config):
    """How experts are made from an FFN.

    Attributes:
        mode: one of the five ways above.
        granularity: `granular` and `sliced` only: slices of the FFN. An expert is 1/granularity of its
            width.
        noise_std: `noise` only: standard deviation of the noise, in units of each matrix's own.
        drop_fraction: `drop` only: share of the intermediate units of each expert that is
            drawn anew.
    """

    mode: Mode = "granular"
    granularity: int = Field(default=2, ge=1)
    noise_std: float = Field(default=0.1, gt=0)
    drop_fraction: float = Field(default=0.5, gt=0, le=1)

    @property
    def num_slices(self) -> int:
        """How many experts together hold the FFN once."""
        return self.granularity if self.mode in _SLICING else 1

    @property
    def experts_per_row(self) -> int:
        """How many experts share one row of the router."""
        return self.granularity if self.mode == "granular" else 1

    @property
    def changed_by(self) -> str | None:
        """What makes the sparse model differ from the dense one at step 0; None if nothing does."""
        return None if self.mode in ("granular", "copy") else f"Mode `{self.mode}`"

    @property
    def exact(self) -> bool:
        """Whether the sparse model equals the dense one at step 0, up to rounding."""
        return self.changed_by is None

    def expert_width(self, ffn_width: int) -> int:
        """Return the width of an expert made from an FFN of a width.

        Raises:
            ModelError: if the FFN cannot be cut into `granularity` equal slices.
        """
        if ffn_width % self.num_slices:
            raise ModelError(
                f"The FFN's width ({ffn_width}) must be a multiple of `granularity`, but "
                f"`granularity` is {self.granularity}. Choose a divisor of the width."
            )
        return ffn_width // self.num_slices

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> "ModeConfig":
        owners: dict[str, tuple[Mode, ...]] = {
            "granularity": _SLICING,
            "noise_std": ("noise",),
            "drop_fraction": ("drop",),
        }
        for name, modes in owners.items():
            value = getattr(self, name)
            if self.mode not in modes and value != type(self).model_fields[name].default:
                raise ValueError(
                    f"`{name}` only has an effect in mode {' or '.join(f'`{mode}`' for mode in modes)}, but is "
                    f"{value} in mode `{self.mode}`; leave it out"
                )
        return self


def fill_router(block: MoEBlock, *, std: float, experts_per_row: int, seeds: SeedTree) -> None:
    """Draw a router's rows, one for every `experts_per_row` experts."""
    weight = block.router.get_parameter("weight")
    shape = (block.num_experts // experts_per_row, block.hidden_size)
    rows = torch.randn(shape, generator=seeds.torch()) * std
    # All experts of a group share one row: their logits are equal, so they are chosen together.
    weight.copy_(rows.repeat_interleave(experts_per_row, dim=0))


def fill_experts(
    block: MoEBlock, whole: ExpertWeights, config: ModeConfig, seeds: SeedTree
) -> None:
    """Make every expert of a block from the FFN that it replaces, as the mode says."""
    for index in range(block.num_experts):
        generator = seeds.child("expert", index).torch()
        match config.mode:
            case "granular" | "sliced":
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
    width = whole.up.shape[0] // num_slices
    units = slice(index * width, (index + 1) * width)
    return ExpertWeights(
        gate=None if whole.gate is None else whole.gate[units],
        up=whole.up[units],
        down=whole.down[:, units] * num_slices,
    )


def with_noise(whole: ExpertWeights, noise_std: float, generator: torch.Generator) -> ExpertWeights:
    """Return a copy whose matrices carry noise of `noise_std` times
    their own standard deviation."""

    def noisy(matrix: Float[Tensor, "R C"]) -> Float[Tensor, "R C"]:
        noise = torch.randn(matrix.shape, generator=generator).to(matrix)
        return matrix + noise * (noise_std * matrix.std())

    gate = None if whole.gate is None else noisy(whole.gate)
    return ExpertWeights(gate, noisy(whole.up), noisy(whole.down))


def with_redrawn_units(
    whole: ExpertWeights, fraction: float, generator: torch.Generator
) -> ExpertWeights:
    """Return a copy in which a share of the intermediate units is drawn anew (Drop-Upcycling).

    A unit is a row of `gate`, the same row of `up` and the same column of `down`. One set of units
    is drawn and replaced in all three, as arXiv 2502.19261 describes (its released script draws a
    set for each matrix, which leaves units half old and half new). New values are normal with the
    mean and the standard deviation of what they replace.
    """
    width = whole.up.shape[0]
    units = torch.randperm(width, generator=generator)[: round(fraction * width)]

    def redraw(matrix: Float[Tensor, "R C"], dim: int) -> Float[Tensor, "R C"]:
        old = matrix.index_select(dim, units)
        new = torch.randn(old.shape, generator=generator).to(matrix) * old.std() + old.mean()
        return matrix.index_copy(dim, units, new)

    gate = None if whole.gate is None else redraw(whole.gate, 0)
    return ExpertWeights(gate, redraw(whole.up, 0), redraw(whole.down, 1))
