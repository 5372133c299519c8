"""Low-rank changes of expert matrices (LoRA, Hu et al. 2021, arXiv 2106.09685), one for each expert.

Expert e computes `W_e x + scale_e * B_e (A_e x)` in place of `W_e x`, each for its own rows. The change of a
matrix is never written out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from flanmoe.moe.compute.grouping import Segments
from flanmoe.moe.compute.products import new_gradient, product_choice, segment_mm, segment_outer

# Attribute of an experts module that holds its low-rank change.
_LOW_RANK = "flanmoe_low_rank"


class ExpertFactors(NamedTuple):
    """The change of one expert's matrix: `scale * b.T @ a`. r rank, n inputs, m outputs."""

    a: Float[Tensor, "r n"]
    b: Float[Tensor, "r m"]
    scale: float


class LowRankFactors(nn.Module):
    """The changes of one matrix of every expert. R ranks of all experts together, n inputs, m outputs.

    An expert of rank 0 stays as it is. A new change is one of nothing, since `b` is 0.

    Args:
        ranks: of each expert.
        alpha: an expert of rank r scales its change by alpha / r.
        rank_stabilised: scale by alpha / sqrt(r) instead (rsLoRA, arXiv 2312.03732).
        inputs, outputs: sizes of the matrices.
        shared_a: all experts have one A; an expert of rank r uses its first r rows.
        device, dtype: of the factors.

    Attributes:
        a: A of each expert below that of the one before (R, n); with `shared_a` the one (largest rank, n).
        b: B of each expert, transposed, in the same order (R, m).
    """

    def __init__(
        self,
        ranks: Sequence[int],
        *,
        alpha: float,
        rank_stabilised: bool,
        inputs: int,
        outputs: int,
        shared_a: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.ranks = tuple(ranks)
        self.alpha = alpha
        self.rank_stabilised = rank_stabilised
        self.shared_a = shared_a
        rows = max(self.ranks) if shared_a else sum(self.ranks)
        self.a = nn.Parameter(torch.zeros(rows, inputs, device=device, dtype=dtype))
        self.b = nn.Parameter(torch.zeros(sum(self.ranks), outputs, device=device, dtype=dtype))

    @property
    def num_experts(self) -> int:
        """Number of experts."""
        return len(self.ranks)

    @property
    def scales(self) -> tuple[float, ...]:
        """What each expert's change is multiplied by; 0 where its rank is 0."""
        power = 0.5 if self.rank_stabilised else 1.0
        return tuple(self.alpha / rank**power if rank else 0.0 for rank in self.ranks)

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        """Draw A uniformly between -1 / sqrt(n) and 1 / sqrt(n), as PEFT does, and set B to 0."""
        limit = self.a.shape[1] ** -0.5
        drawn = torch.rand(self.a.shape, generator=generator, dtype=torch.float32)
        self.a.copy_((2 * drawn - 1) * limit)
        self.b.zero_()

    def stacked(self) -> tuple[Float[Tensor, "_ r n"], Float[Tensor, "E r m"]]:
        """Return A of each expert, or the one of all, and B of each expert times its scale.

        r is the largest rank; smaller ones are filled up with zeros.
        """
        largest = max(self.ranks)
        a, b = self.a, self.b
        if min(self.ranks) < largest:
            places = self._places(largest)
            b = _with_zeros(b)[places]
            a = a if self.shared_a else _with_zeros(a)[places]
        scales = torch.tensor(self.scales, dtype=b.dtype).to(b.device)
        return (
            a.view(-1, largest, a.shape[-1]),
            b.view(self.num_experts, largest, -1) * scales.view(-1, 1, 1),
        )

    def _places(self, largest: int) -> Tensor:
        """Return for each rank of each expert its row, that of zeros where the expert has fewer ranks."""
        ranks = torch.tensor(self.ranks)
        within = torch.arange(largest).expand(self.num_experts, -1)
        rows = within + (ranks.cumsum(0) - ranks).unsqueeze(1)
        return rows.where(within < ranks.unsqueeze(1), sum(self.ranks)).to(self.b.device)

    def of_expert(self, expert: int) -> ExpertFactors:
        """Return views of one expert's factors."""
        start = sum(self.ranks[:expert])
        rank = self.ranks[expert]
        a = self.a[:rank] if self.shared_a else self.a[start : start + rank]
        return ExpertFactors(a, self.b[start : start + rank], self.scales[expert])


class LowRankExperts(nn.Module):
    """The changes of the matrices of all experts of one block.

    Args:
        gate_up: of the first matrices, None where they stay as they are.
        down: of the second matrices, None where they stay as they are.
        dropout: share of the inputs of A that is set to 0 in training mode, the rest scaled up by
            1 / (1 - share).
    """

    def __init__(
        self,
        gate_up: LowRankFactors | None,
        down: LowRankFactors | None,
        *,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down = down
        self._dropout = dropout

    @property
    def dropout(self) -> float:
        """The share of the inputs of A that is dropped now: none in evaluation mode."""
        return self._dropout if self.training else 0.0

    @property
    def factors(self) -> dict[str, LowRankFactors]:
        """Those that there are, by `gate_up` and `down`."""
        both = {"gate_up": self.gate_up, "down": self.down}
        return {name: factors for name, factors in both.items() if factors is not None}


@dataclass(slots=True)
class _LastRun:
    """What the last run of experts needed, which the next call about the same run needs again."""

    first_row: int = -1
    mask: Tensor | None = None
    gradient: Tensor | None = None
    of_inner: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LowRankMatrices:
    """One matrix an expert and its low-rank change: an `ExpertLinear`.

    Attributes:
        weight: the matrices.
        a: A of each expert, or one for all experts.
        b: B of each expert, transposed and scaled.
        dropout: share of the inputs of A that is set to 0, the rest scaled up; to 1 / 65536. Which ones is a
            function of `seed`, the expert and the place among its rows, so that every pass over the rows drops
            the same.
        seed: of what is dropped.
    """

    weight: Float[Tensor, "E B A"]
    a: Float[Tensor, "_ r A"]
    b: Float[Tensor, "E r B"]
    dropout: float = 0.0
    seed: int = 0
    _last: _LastRun = field(default_factory=_LastRun)

    @classmethod
    def of(
        cls, weight: Float[Tensor, "E B A"], factors: LowRankFactors, *, dropout: float
    ) -> "LowRankMatrices":
        """Put matrices and their change together; draws a seed from torch's global generator if need be."""
        seed = int(torch.randint(2**62, ())) if dropout else 0
        return cls(weight, *factors.stacked(), dropout, seed)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The matrices, A and B."""
        return (self.weight, self.a, self.b)

    @property
    def matrices(self) -> Float[Tensor, "E B A"]:
        """The matrices."""
        return self.weight

    def with_tensors(self, tensors: Sequence[Tensor]) -> "LowRankMatrices":
        """Return the same map of other tensors."""
        weight, a, b = tensors
        return LowRankMatrices(weight, a, b, self.dropout, self.seed)

    def forward(
        self,
        rows: Float[Tensor, "N A"],
        segments: Segments,
        *,
        out: Float[Tensor, "N B"] | None = None,
    ) -> Float[Tensor, "N B"]:
        """Return each row's product."""
        product = segment_mm(rows, self.weight.transpose(1, 2), segments, out=out)
        inner = self._inner(self._dropped(rows, segments), segments)
        return segment_mm(inner, self.b, segments, out=product, accumulate=True)

    def input_gradient(
        self,
        gradient: Float[Tensor, "N B"],
        segments: Segments,
        *,
        out: Float[Tensor, "N A"] | None = None,
    ) -> Float[Tensor, "N A"]:
        """Return the gradient of the rows."""
        of_rows = segment_mm(gradient, self.weight, segments, out=out)
        of_inner = self._inner_gradient(gradient, segments)
        a = self.a.expand(len(self.weight), -1, -1)
        if not self.dropout:
            return segment_mm(of_inner, a, segments, out=of_rows, accumulate=True)
        own = slice(segments.num_rows)
        of_rows[own] += self._dropped(segment_mm(of_inner, a, segments), segments)[own]
        return of_rows

    def new_gradients(
        self, counts: tuple[int, ...], wanted: Sequence[torch.dtype | None]
    ) -> list[Tensor | None]:
        """Make room for the gradients of the matrices, A and B."""
        return [
            None
            if dtype is None
            else new_gradient(tensor, counts, dtype=dtype)
            if len(tensor) == len(counts)
            # One for all experts is added up.
            else torch.zeros_like(tensor, dtype=dtype)
            for tensor, dtype in zip(self.tensors, wanted, strict=True)
        ]

    def weight_gradients(
        self,
        gradient: Float[Tensor, "N B"],
        rows: Float[Tensor, "N A"],
        segments: Segments,
        into: Sequence[Tensor | None],
    ) -> None:
        """Write the gradients of the used experts' matrices and factors; add to that of one A for all."""
        of_weight, of_a, of_b = into
        if of_weight is not None:
            segment_outer(gradient, rows, segments, out=of_weight)
        inputs = self._dropped(rows, segments)
        if of_b is not None:
            segment_outer(self._inner(inputs, segments), gradient, segments, out=of_b)
        if of_a is None:
            return
        of_inner = self._inner_gradient(gradient, segments)
        if self._is_shared:
            own = slice(segments.num_rows)
            of_a[0] += of_inner[own].t() @ inputs[own]
        else:
            segment_outer(of_inner, inputs, segments, out=of_a)

    @property
    def _is_shared(self) -> bool:
        return len(self.a) < len(self.weight)

    def _inner(self, inputs: Float[Tensor, "N A"], segments: Segments) -> Float[Tensor, "N r"]:
        if self._is_shared:
            return (self.a[0] @ inputs.t()).t()
        return _narrow_mm(inputs, self.a, segments)

    def _inner_gradient(
        self, gradient: Float[Tensor, "N B"], segments: Segments
    ) -> Float[Tensor, "N r"]:
        last = self._of_run(segments)
        # The gradients of rows and of factors are asked for one after the other, with the same tensor.
        if last.of_inner is None or last.gradient is not gradient:
            last.gradient = gradient
            last.of_inner = _narrow_mm(gradient, self.b, segments)
        return last.of_inner

    def _dropped(self, rows: Float[Tensor, "N A"], segments: Segments) -> Float[Tensor, "N A"]:
        """Set a share of the inputs to 0 and scale the others up."""
        if not self.dropout:
            return rows
        last = self._of_run(segments)
        if last.mask is None:
            last.mask = self._drawn(rows, segments)
        dropped = torch.empty_like(rows)
        own = slice(segments.num_rows)
        torch.mul(rows[own], last.mask, out=dropped[own])
        return dropped

    def _drawn(self, rows: Float[Tensor, "N A"], segments: Segments) -> Float[Tensor, "M A"]:
        """Draw what each input is multiplied by. Experts are whole in every cut of the rows into runs."""
        generator = torch.Generator(rows.device)
        parts: list[Tensor] = []
        for expert, start, end in segments.used():
            generator.manual_seed((self.seed + segments.first_expert + expert) % 2**63)
            parts.append(_sixteen_bits((end - start) * rows.shape[1], generator))
        kept = torch.cat(parts) >= round(self.dropout * 2**16) - 2**15
        return kept.view(-1, rows.shape[1]).to(rows.dtype).div_(1 - self.dropout)

    def _of_run(self, segments: Segments) -> _LastRun:
        last = self._last
        if last.first_row != segments.first_row:
            last.first_row = segments.first_row
            last.mask = last.gradient = last.of_inner = None
        return last


def _narrow_mm(
    rows: Float[Tensor, "N A"], factors: Float[Tensor, "E r A"], segments: Segments
) -> Float[Tensor, "N r"]:
    """Multiply the rows of each expert by its few columns.

    Where it is one product an expert, its transpose is made: few rows are twice as fast as few columns on the
    CPU. What comes back is a view with the strides of that.
    """
    columns = factors.transpose(1, 2)
    if product_choice(rows, columns).path != "expert":
        return segment_mm(rows, columns, segments)
    transposed = rows.new_empty(factors.shape[1], rows.shape[0])
    own = factors[segments.experts]
    for expert, start, end in segments.used():
        torch.mm(own[expert], rows[start:end].t(), out=transposed[:, start:end])
    return transposed.t()


def _sixteen_bits(number: int, generator: torch.Generator) -> Int[Tensor, " {number}"]:
    """Draw so many whole numbers of 16 bits, four from each draw of the generator."""
    drawn = torch.empty(-(-number // 4), dtype=torch.int64, device=generator.device)
    drawn.random_(-(2**63), None, generator=generator)
    return drawn.view(torch.int16)[:number]


def _with_zeros(rows: Float[Tensor, "R n"]) -> Float[Tensor, "R+1 n"]:
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])


def low_rank_experts(experts: nn.Module) -> LowRankExperts | None:
    """Return the low-rank change of an experts module, ours or not, None if it has none."""
    return getattr(experts, _LOW_RANK, None)


def set_low_rank_experts(experts: nn.Module, change: LowRankExperts | None) -> None:
    """Put a low-rank change beside the matrices of an experts module, as its child; None takes it off."""
    if change is not None:
        setattr(experts, _LOW_RANK, change)
    elif low_rank_experts(experts) is not None:
        delattr(experts, _LOW_RANK)
