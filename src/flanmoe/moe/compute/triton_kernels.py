"""Grouped expert products that fetch their rows, and put them back, in the same Triton kernel.

The products of `products` take rows that lie sorted by expert. Here a product reads each row from its
token, and writes it, times its gate, to the place of its assignment: neither the copy of all rows
before nor the one after is made. Kernels come in two shapes. `_mm_kernel` does one tile of one
expert's rows times its matrix; which tiles there are is a table made on the device. `_outer_kernel`
does one tile of the gradient of one expert's matrix, and goes through all rows of the expert. Sums
are float32, and each number is written by one program: results repeat to the bit.

Block sizes are read from two small tables. They are not measured yet: they are sizes that dense
products are commonly given, cut down where experts have few rows.

None of this is differentiated by autograd: whoever calls it knows the derivative. Triton comes with
CUDA builds of torch. Without it this module can be imported, and its products are refused.
"""

import importlib
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from flanmoe.core.errors import ModelError
from flanmoe.moe.compute.grouping import Segments

# Imported by name, as no plain install asks for it. `tl` is what kernels have to know it by. An install that
# is broken is none: nobody may have asked for it.
triton: Any = None
tl: Any = None
with suppress(ImportError):
    triton, tl = importlib.import_module("triton"), importlib.import_module("triton.language")
_HAS_TRITON = tl is not None
# Of a kernel's arguments, those that it is compiled for.
constexpr: Any = tl.constexpr if _HAS_TRITON else int

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Tensor cores take no smaller tile.
_SMALLEST_BLOCK = 16
# Tiles of rows that go through the columns together: what they read of a matrix stays in the L2 cache.
_GROUP = 8


class _Blocks(NamedTuple):
    """The tile of one program.

    Attributes:
        rows, columns: of what it writes.
        inner: how much of a sum it reads at a time.
        warps: that work on it.
        stages: how many reads are under way; `stages * inner * (rows + columns)` numbers have to fit
            the shared memory of a multiprocessor, which is 99 KiB or more from capability 8 on.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


# For bytes a number: the first line whose mean rows of an expert are not exceeded.
_Table = Mapping[int, tuple[tuple[int | float, _Blocks], ...]]

# A tile holds rows of one expert, so it is as tall as experts fill it. float32 is not for tensor cores:
# its products are exact, and tiles are what registers hold.
_MM_BLOCKS: _Table = {
    2: (
        (16, _Blocks(16, 128, 64, 4, 4)),
        (32, _Blocks(32, 128, 64, 4, 4)),
        (96, _Blocks(64, 128, 64, 4, 3)),
        (math.inf, _Blocks(128, 128, 64, 8, 3)),
    ),
    4: (
        (16, _Blocks(16, 64, 32, 4, 3)),
        (32, _Blocks(32, 64, 32, 4, 3)),
        (math.inf, _Blocks(64, 64, 32, 8, 3)),
    ),
}

# Here the rows of an expert are what is summed over: few rows want a short step, not a small tile.
_OUTER_BLOCKS: _Table = {
    2: (
        (16, _Blocks(128, 128, 16, 8, 2)),
        (64, _Blocks(128, 128, 32, 8, 3)),
        (math.inf, _Blocks(128, 128, 64, 8, 3)),
    ),
    4: (
        (16, _Blocks(64, 64, 16, 8, 2)),
        (math.inf, _Blocks(64, 64, 32, 8, 3)),
    ),
}


def available() -> bool:
    """Return whether Triton can be imported."""
    return _HAS_TRITON


def gathered_mm(
    tokens: Float[Tensor, "T A"],
    token_ids: Int[Tensor, " N"],
    matrices: Float[Tensor, "E A B"],
    segments: Segments,
) -> Float[Tensor, "N B"]:
    """Multiply each expert's rows, which are fetched from their tokens, by its matrix.

    Args:
        tokens: what rows are fetched from.
        token_ids: of the segments' rows.
        matrices: of all experts, those outside the segments too; any strides.
        segments: which rows are whose.

    Raises:
        ModelError: if Triton is not installed, or for dtypes that the kernel does not take.
    """
    _check({"tokens": tokens, "matrices": matrices})
    out = tokens.new_empty(token_ids.shape[0], matrices.shape[2])
    _launch_mm(_Mm(tokens, token_ids, matrices, None, None, out), segments)
    return out


def scattered_mm(
    rows: Float[Tensor, "N A"],
    matrices: Float[Tensor, "E A B"],
    segments: Segments,
    *,
    order: Int[Tensor, " N"],
    gates: Float[Tensor, " N"] | None,
    out: Float[Tensor, "M B"],
) -> None:
    """Multiply the rows of each expert by its matrix and its gate, and write each to its place.

    Args:
        rows: the segments' rows.
        matrices: of all experts, those outside the segments too; any strides.
        segments: which rows are whose.
        order: the place of each row in `out`; none twice.
        gates: of each row, None for 1. The float32 sum is multiplied, then rounded to `out`'s dtype.
        out: any strides, and any dtype. Rows that `order` does not name keep what they hold.

    Raises:
        ModelError: if Triton is not installed, or for dtypes that the kernel does not take.
    """
    _check({"rows": rows, "matrices": matrices})
    _launch_mm(_Mm(rows, None, matrices, order, gates, out), segments)


def gathered_outer(
    left: Float[Tensor, "L A"],
    right: Float[Tensor, "R B"],
    segments: Segments,
    *,
    left_ids: Int[Tensor, " N"] | None,
    right_ids: Int[Tensor, " N"] | None,
    out: Float[Tensor, "E A B"],
) -> None:
    """Write the product of the transposed left rows and the right rows of each expert into its place.

    These are the gradients of matrices. Experts without rows keep what `out` holds: see
    `products.new_gradient`.

    Args:
        left, right: the segments' rows, or what they are fetched from.
        segments: which rows are whose.
        left_ids, right_ids: which row of `left` and of `right` is each of the segments' rows, None
            where they lie in order.
        out: of all experts; any strides, and any dtype: sums are float32 and then converted.

    Raises:
        ModelError: if Triton is not installed, or for dtypes that the kernel does not take.
    """
    _check({"left rows": left, "right rows": right})
    own, blocks = out[segments.experts], _outer_blocks(left.dtype, out, segments)
    num_tiles = -(-own.shape[1] // blocks.rows) * -(-own.shape[2] // blocks.columns)
    if not segments.num_rows or not num_tiles:
        return
    with torch.cuda.device_of(left):
        _outer_kernel[(num_tiles, own.shape[0])](
            left,
            right,
            None if left_ids is None else left_ids.contiguous(),
            None if right_ids is None else right_ids.contiguous(),
            own,
            segments.ends,
            own.shape[1],
            own.shape[2],
            *left.stride(),
            *right.stride(),
            *own.stride(),
            LEFT=blocks.rows,
            RIGHT=blocks.columns,
            INNER=blocks.inner,
            GROUP=_GROUP,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )


class _Mm(NamedTuple):
    """What `_mm_kernel` reads and writes; None for what it does without."""

    rows: Tensor
    row_ids: Tensor | None
    matrices: Tensor
    order: Tensor | None
    gates: Tensor | None
    out: Tensor


def _launch_mm(mm: _Mm, segments: Segments) -> None:
    own, blocks = mm.matrices[segments.experts], _mm_blocks(mm.matrices, segments)
    num_columns = own.shape[2]
    num_tiles = sum(-(-count // blocks.rows) for count in segments.counts)
    if not num_tiles or not num_columns:
        return
    experts, first_rows = _tiles(segments, blocks.rows, num_tiles)
    with torch.cuda.device_of(mm.rows):
        _mm_kernel[(num_tiles * -(-num_columns // blocks.columns),)](
            mm.rows,
            None if mm.row_ids is None else mm.row_ids.contiguous(),
            own,
            None if mm.order is None else mm.order.contiguous(),
            None if mm.gates is None else mm.gates.contiguous(),
            mm.out,
            experts,
            first_rows,
            segments.ends,
            num_tiles,
            own.shape[1],
            num_columns,
            *mm.rows.stride(),
            *own.stride(),
            *mm.out.stride(),
            ROWS=blocks.rows,
            COLUMNS=blocks.columns,
            INNER=blocks.inner,
            GROUP=_GROUP,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )


def _tiles(
    segments: Segments, block_rows: int, num_tiles: int
) -> tuple[Int[Tensor, " tiles"], Int[Tensor, " tiles"]]:
    """Return the expert and the first row of each tile of rows; nothing waits for the device."""
    ends = segments.ends
    starts = F.pad(ends[:-1], (1, 0))
    blocks = (ends - starts + (block_rows - 1)) // block_rows
    experts = torch.repeat_interleave(blocks, output_size=num_tiles)
    # An expert's first tile has this number, but its rows start where they start.
    skipped = starts - (blocks.cumsum(0, dtype=ends.dtype) - blocks) * block_rows
    numbers = torch.arange(num_tiles, dtype=ends.dtype, device=ends.device)
    return experts, numbers * block_rows + skipped[experts]


def _mm_blocks(matrices: Float[Tensor, "E A B"], segments: Segments) -> _Blocks:
    blocks = _listed_blocks(_MM_BLOCKS, matrices.dtype, segments)
    return blocks._replace(
        columns=_fitting(blocks.columns, matrices.shape[2]),
        inner=_fitting(blocks.inner, matrices.shape[1]),
    )


def _outer_blocks(dtype: torch.dtype, out: Float[Tensor, "E A B"], segments: Segments) -> _Blocks:
    blocks = _listed_blocks(_OUTER_BLOCKS, dtype, segments)
    return blocks._replace(
        rows=_fitting(blocks.rows, out.shape[1]), columns=_fitting(blocks.columns, out.shape[2])
    )


def _listed_blocks(table: _Table, dtype: torch.dtype, segments: Segments) -> _Blocks:
    num_used = sum(count > 0 for count in segments.counts)
    mean = segments.num_rows / max(num_used, 1)
    return next(blocks for most_rows, blocks in table[dtype.itemsize] if mean <= most_rows)


def _fitting(block: int, size: int) -> int:
    """Return the block, or a smaller one where it covers the whole size: low ranks are small."""
    covering = 1 << max(size - 1, 0).bit_length()
    return min(block, max(covering, _SMALLEST_BLOCK))


def _check(operands: Mapping[str, Tensor]) -> None:
    if not available():
        raise ModelError(
            "Triton's expert products need the package `triton`, but it is not installed. Install a build of "
            'torch for CUDA, which brings it, or compute with `set_experts_implementation("flanmoe")`.'
        )
    found = " and ".join(f"{name} are {tensor.dtype}" for name, tensor in operands.items())
    dtypes = {tensor.dtype for tensor in operands.values()}
    if not dtypes <= set(_DTYPES):
        raise ModelError(
            f"Triton's expert products take {', '.join(map(str, _DTYPES))}, but {found}. Cast them to one of "
            'these, or compute with `set_experts_implementation("flanmoe")`.'
        )
    if len(dtypes) > 1:
        raise ModelError(
            f"The operands of an expert product of Triton's must have one dtype, but {found}. Cast one of them."
        )
    if isinstance(_mm_kernel, triton.JITFunction) and any(t.is_cpu for t in operands.values()):
        raise ModelError(
            "Triton's expert products run on a GPU, but these are on the CPU. Move the model there, or compute "
            'with `set_experts_implementation("flanmoe")`.'
        )


def _jit(function: Callable[..., Any]) -> Any:
    """Hand a kernel to Triton; without Triton nothing launches it."""
    return triton.jit(function) if _HAS_TRITON else function


# `no_type_check`: Triton reads the source of these functions and compiles it. What stands in them is
# its language, and no checker of types may wrap them.


@_jit
@no_type_check
def _in_groups(program, num_lines, num_columns, GROUP: constexpr):
    """Return the line and the column of a program: column after column of GROUP lines, then the next."""
    in_group = GROUP * num_columns
    first = program // in_group * GROUP
    lines = tl.minimum(num_lines - first, GROUP)
    place = program % in_group
    return first + place % lines, place // lines


@_jit
@no_type_check
def _mm_kernel(
    rows,
    row_ids,
    matrices,
    order,
    gates,
    out,
    tile_experts,
    tile_rows,
    ends,
    num_tiles,
    num_inner,
    num_columns,
    row_stride,
    row_step,
    expert_stride,
    inner_stride,
    column_stride,
    out_stride,
    out_step,
    ROWS: constexpr,
    COLUMNS: constexpr,
    INNER: constexpr,
    GROUP: constexpr,
):
    num_blocks = (num_columns + COLUMNS - 1) // COLUMNS
    tile, block = _in_groups(tl.program_id(0), num_tiles, num_blocks, GROUP)
    expert, first_row = tl.load(tile_experts + tile), tl.load(tile_rows + tile)
    row = first_row + tl.arange(0, ROWS)
    within = row < tl.load(ends + expert)
    # Rows behind the expert's last are read as its first one of the tile, and are not written.
    row = tl.where(within, row, first_row).to(tl.int64)
    source = row if row_ids is None else tl.load(row_ids + row).to(tl.int64)
    column = (block * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    inner = tl.arange(0, INNER)
    left = rows + source[:, None] * row_stride + inner[None, :] * row_step
    right = matrices + expert.to(tl.int64) * expert_stride
    right += inner[:, None].to(tl.int64) * inner_stride + column[None, :] * column_stride
    written = column[None, :] < num_columns
    total = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for done in range(0, num_inner, INNER):
        ahead = num_inner - done
        left_tile = tl.load(left, mask=inner[None, :] < ahead, other=0.0)
        right_tile = tl.load(right, mask=(inner[:, None] < ahead) & written, other=0.0)
        total = tl.dot(left_tile, right_tile, total, input_precision="ieee")
        left += INNER * row_step
        right += INNER * inner_stride
    if gates is not None:
        total *= tl.load(gates + row).to(tl.float32)[:, None]
    place = row if order is None else tl.load(order + row).to(tl.int64)
    target = out + place[:, None] * out_stride + column[None, :] * out_step
    tl.store(target, total.to(out.dtype.element_ty), mask=within[:, None] & written)


@_jit
@no_type_check
def _outer_kernel(
    left,
    right,
    left_ids,
    right_ids,
    out,
    ends,
    num_left,
    num_right,
    left_stride,
    left_step,
    right_stride,
    right_step,
    expert_stride,
    out_left_stride,
    out_right_stride,
    LEFT: constexpr,
    RIGHT: constexpr,
    INNER: constexpr,
    GROUP: constexpr,
):
    expert = tl.program_id(1)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    if start == end:
        return
    num_lines, num_blocks = (num_left + LEFT - 1) // LEFT, (num_right + RIGHT - 1) // RIGHT
    line, block = _in_groups(tl.program_id(0), num_lines, num_blocks, GROUP)
    a = (line * LEFT + tl.arange(0, LEFT)).to(tl.int64)
    b = (block * RIGHT + tl.arange(0, RIGHT)).to(tl.int64)
    total = tl.full((LEFT, RIGHT), 0.0, tl.float32)
    for first in range(start, end, INNER):
        row = first + tl.arange(0, INNER)
        within = row < end
        row = row.to(tl.int64)
        left_row, right_row = row, row
        if left_ids is not None:
            left_row = tl.load(left_ids + row, mask=within, other=0).to(tl.int64)
        if right_ids is not None:
            right_row = tl.load(right_ids + row, mask=within, other=0).to(tl.int64)
        left_tile = tl.load(
            left + left_row[None, :] * left_stride + a[:, None] * left_step,
            mask=within[None, :] & (a[:, None] < num_left),
            other=0.0,
        )
        right_tile = tl.load(
            right + right_row[:, None] * right_stride + b[None, :] * right_step,
            mask=within[:, None] & (b[None, :] < num_right),
            other=0.0,
        )
        total = tl.dot(left_tile, right_tile, total, input_precision="ieee")
    target = out + expert.to(tl.int64) * expert_stride
    target += a[:, None] * out_left_stride + b[None, :] * out_right_stride
    written = (a[:, None] < num_left) & (b[None, :] < num_right)
    tl.store(target, total.to(out.dtype.element_ty), mask=written)
