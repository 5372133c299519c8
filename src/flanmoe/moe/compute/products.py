"""Matrix products over the segments of sorted rows, and the one table of how they are done.

Six products make one step of an expert FFN: two forward, two for the gradients of what went in, two
for those of the matrices. All of them are `segment_mm` or `segment_outer`. Both can write into a
place that the caller gives, so that nothing is stacked afterwards. None is differentiated by
autograd: whoever calls them knows the derivative.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from flanmoe.moe.compute.grouping import Segments

# Rows of an expert are rounded up to a multiple of this where kernels are compiled for each shape.
ROW_MULTIPLE = 32

# Numbers in a row of what grouped_mm takes have to fill multiples of 16 bytes.
_ALIGNMENT_BYTES = 16
# The first CUDA devices whose matrix units take bfloat16.
_FIRST_CAPABILITY = (8, 0)

ProductPath = Literal["expert", "rounded", "grouped", "triton"]


class Choice(NamedTuple):
    """One row of the table: a way to do the products, when it is taken, and why.

    Attributes:
        path: `expert` is one product an expert; `rounded` the same with rows rounded up to
            ROW_MULTIPLE; `grouped` is one call of torch's grouped_mm for all experts; `triton` kernels of ours.
        taken: whether it is taken, told the rows and the matrices.
        reason: in a sentence, for whoever asks.
    """

    path: ProductPath
    taken: Callable[[Tensor, Tensor], bool]
    reason: str


def _on_matrix_units(rows: Tensor, matrices: Tensor) -> bool:
    if rows.device.type != "cuda" or rows.dtype != torch.bfloat16:
        return False
    multiple = _ALIGNMENT_BYTES // rows.element_size()
    aligned = all(size % multiple == 0 for size in matrices.shape[-2:])
    return aligned and torch.cuda.get_device_capability(rows.device) >= _FIRST_CAPABILITY


def _compiles_per_shape(rows: Tensor, matrices: Tensor) -> bool:
    return rows.device.type == "cpu" and rows.dtype == torch.bfloat16


def _always(rows: Tensor, matrices: Tensor) -> bool:
    return True


# The first that is taken is. docs/performance.md has the measurements, and what is not in here.
CHOICES: tuple[Choice, ...] = (
    Choice(
        "grouped",
        _on_matrix_units,
        "bfloat16 on CUDA: one kernel for all experts, whatever their rows (not measured yet)",
    ),
    Choice(
        "rounded",
        _compiles_per_shape,
        "bfloat16 on the CPU: oneDNN compiles a kernel for every number of rows that it meets and "
        f"keeps the last thousand, so rows are rounded up to multiples of {ROW_MULTIPLE}",
    ),
    Choice(
        "expert",
        _always,
        "one product an expert over its own rows, written into its place",
    ),
)


# In no table, for nobody has measured it: experts ask for it (`FusedExperts.kernels`).
ASKED_FOR = Choice(
    "triton",
    _always,
    "asked for: kernels of ours that fetch rows and put them back (not measured yet)",
)


def product_choice(rows: Float[Tensor, "N A"], matrices: Float[Tensor, "E A B"]) -> Choice:
    """Return how products of such rows with such matrices are done, and why."""
    return next(choice for choice in CHOICES if choice.taken(rows, matrices))


def rounded_rows(count: int) -> int:
    """Return how many rows the path `rounded` multiplies for an expert that has so many."""
    return count if count <= ROW_MULTIPLE else count + -count % ROW_MULTIPLE


def segment_mm(
    rows: Float[Tensor, "N A"],
    matrices: Float[Tensor, "E A B"],
    segments: Segments,
    *,
    out: Float[Tensor, "N B"] | None = None,
    accumulate: bool = False,
) -> Float[Tensor, "N B"]:
    """Multiply the rows of each expert by its matrix.

    Args:
        rows: the segments' rows.
        matrices: of all experts, those outside the segments too; any strides.
        segments: which rows are whose.
        out: where the products can go. A kernel that makes its own result leaves it unused: take
            what is returned.
        accumulate: add to what `out` holds, and return `out`.
    """
    path = product_choice(rows, matrices).path
    own = matrices[segments.experts]
    if path == "grouped":
        products = F.grouped_mm(rows, own, offs=segments.ends)
        return out.add_(products) if accumulate and out is not None else products
    if out is None:
        out = rows.new_empty(rows.shape[0], matrices.shape[2])
    by_expert = _mm_rounded if path == "rounded" else _mm_by_expert
    by_expert(rows, own, segments, out, accumulate)
    return out


def segment_outer(
    left: Float[Tensor, "N A"],
    right: Float[Tensor, "N B"],
    segments: Segments,
    *,
    out: Float[Tensor, "E A B"],
) -> None:
    """Write the product of the transposed left rows and the right rows of each expert into its place.

    These are the gradients of matrices. Experts without rows keep what `out` holds: see
    `new_gradient`.

    Args:
        left, right: the segments' rows.
        segments: which rows are whose.
        out: of all experts; any strides, and any dtype: products are made in the rows' and then
            converted.
    """
    path = product_choice(left, out).path
    _SEGMENT_OUTER[path](left, right, out[segments.experts], segments)


def segment_sum(
    rows: Float[Tensor, "N A"],
    segments: Segments,
    *,
    out: Float[Tensor, "E A"],
    weights: Float[Tensor, " N"] | None = None,
) -> None:
    """Write the sum of each expert's rows, times their weights, into its place.

    These are the gradients of biases. Experts without rows keep what `out` holds.
    """
    own = out[segments.experts]
    for expert, start, end in segments.used():
        if weights is None:
            own[expert] = rows[start:end].sum(dim=0, dtype=out.dtype)
        else:
            own[expert] = weights[start:end].to(rows.dtype) @ rows[start:end]


def segment_add(
    rows: Float[Tensor, "N A"], vectors: Float[Tensor, "E A"], segments: Segments
) -> None:
    """Add each expert's vector, its bias, to its rows."""
    own = vectors[segments.experts]
    for expert, start, end in segments.used():
        rows[start:end] += own[expert]


def new_gradient(
    like: Float[Tensor, "E ..."], counts: tuple[int, ...], *, dtype: torch.dtype
) -> Float[Tensor, "E ..."]:
    """Make room for a gradient of one matrix or vector an expert, strides as `like`'s.

    Only the places of experts without rows are set to 0; the others wait for `segment_outer`.
    """
    gradient = torch.empty_like(like, dtype=dtype)
    unused = [expert for expert, count in enumerate(counts) if not count]
    if unused and like.device.type == "cpu":
        for expert in unused:
            gradient[expert].zero_()
    elif unused:
        gradient[torch.tensor(unused, device=like.device)] = 0
    return gradient


def _mm_by_expert(
    rows: Tensor, matrices: Tensor, segments: Segments, out: Tensor, accumulate: bool
) -> None:
    own = (_of_experts(rows, segments), matrices.unbind(), _of_experts(out, segments))
    for own_rows, matrix, place in zip(*own, strict=True):
        if own_rows.shape[0]:
            _mm_into(place, own_rows, matrix, accumulate)


def _mm_rounded(
    rows: Tensor, matrices: Tensor, segments: Segments, out: Tensor, accumulate: bool
) -> None:
    """Let products run over into the next experts' rows, which are overwritten when it is their turn.

    Where no rows follow, zeros do, and in a copy.
    """
    for expert, start, end in segments.used():
        stop = start + rounded_rows(end - start)
        if stop == end or (stop <= rows.shape[0] and not accumulate):
            _mm_into(out[start:stop], rows[start:stop], matrices[expert], accumulate)
            continue
        product = torch.mm(_padded(rows[start:end]), matrices[expert])[: end - start]
        out[start:end] = out[start:end] + product if accumulate else product


def _of_experts(rows: Float[Tensor, "N A"], segments: Segments) -> Sequence[Tensor]:
    """Return the rows of each expert, without rows too: cheaper than a slice for each."""
    parts: Sequence[Tensor] = torch.split(rows, segments.counts)  # pyright: ignore
    return parts


def _mm_into(out: Tensor, rows: Tensor, matrix: Tensor, accumulate: bool) -> None:
    if accumulate:
        out.addmm_(rows, matrix)
    else:
        torch.mm(rows, matrix, out=out)


def _outer_by_expert(left: Tensor, right: Tensor, out: Tensor, segments: Segments) -> None:
    own = (_of_experts(left, segments), _of_experts(right, segments), out.unbind())
    for own_left, own_right, place in zip(*own, strict=True):
        if own_left.shape[0]:
            _outer_into(place, own_left, own_right)


def _outer_rounded(left: Tensor, right: Tensor, out: Tensor, segments: Segments) -> None:
    for expert, start, end in segments.used():
        _outer_into(out[expert], _padded(left[start:end]), _padded(right[start:end]))


def _outer_grouped(left: Tensor, right: Tensor, out: Tensor, segments: Segments) -> None:
    """Leave experts without rows alone: what the kernel writes for them is not promised anywhere."""
    products = F.grouped_mm(left.t(), right, offs=segments.ends)
    if all(segments.counts):
        out.copy_(products)
        return
    used = torch.tensor([segment.expert for segment in segments.used()], device=out.device)
    out[used] = products[used].to(out.dtype)


def _outer_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    if out.dtype == left.dtype:
        torch.mm(left.t(), right, out=out)
    else:
        out.copy_(torch.mm(left.t(), right))


def _padded(rows: Float[Tensor, "N A"]) -> Float[Tensor, "M A"]:
    """Return rows with zeros behind them, up to what `rounded_rows` says."""
    missing = rounded_rows(rows.shape[0]) - rows.shape[0]
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


_SEGMENT_OUTER: Mapping[ProductPath, Callable[[Tensor, Tensor, Tensor, Segments], None]] = {
    "expert": _outer_by_expert,
    "rounded": _outer_rounded,
    "grouped": _outer_grouped,
}
