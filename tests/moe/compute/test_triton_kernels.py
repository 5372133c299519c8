"""Fused products against their definitions written out, in Triton's interpreter or on a GPU.

The interpreter runs kernels on CPU tensors, a program at a time, in numpy. `TRITON_INTERPRET=1` would
have to be set before anything imports Triton, and torch does as it likes; so kernels that were made
for a GPU are wrapped for the interpreter here.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flanmoe.core.errors import ModelError
from flanmoe.moe.compute import (
    FusedExperts,
    Gated,
    expert_ffn,
    expert_ffn_reference,
    triton_kernels,
)
from flanmoe.moe.compute.grouping import Segments
from flanmoe.moe.compute.triton_kernels import (
    available,
    gathered_mm,
    gathered_outer,
    scattered_mm,
)

# Triton 3.9 says so at the first launch; no kernel here adds a product to anything but in `dot`.
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset:UserWarning")

TABLES = {name: getattr(triton_kernels, name) for name in ("_MM_BLOCKS", "_OUTER_BLOCKS")}
# Small tiles, so that small sizes are several of them.
SMALL = ((math.inf, triton_kernels._Blocks(16, 16, 16, 4, 2)),)
# bfloat16 keeps 8 bits. The interpreter cuts the others off where a GPU rounds.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}


def _correct_dot(interpreter: Any) -> Callable[..., Any]:
    """Return the interpreter's `dot` for bfloat16 too, which it multiplies as the integers it is held in.

    That is https://github.com/triton-lang/triton/issues/11584.
    """
    tl = interpreter.tl
    found = interpreter.InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = interpreter._convert_float(handle.data, tl.bfloat16, tl.float32, None)
        return interpreter.TensorHandle(bits.view("float32"), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return found(self, widened(a), widened(b), *rest)

    return create_dot


def _interpret(patch: pytest.MonkeyPatch) -> None:
    jit = pytest.importorskip("triton.runtime.jit")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patch.setenv("TRITON_INTERPRET", "1")
    patch.setattr(interpreter.InterpreterBuilder, "create_dot", _correct_dot(interpreter))
    for name, kernel in list(vars(triton_kernels).items()):
        if isinstance(kernel, jit.JITFunction):
            patch.setattr(triton_kernels, name, interpreter.InterpretedFunction(kernel.fn))


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where to multiply: on the CPU interpreted, on CUDA compiled; in small tiles on both."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "cpu":
            _interpret(patch)
        elif not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        for name in TABLES:
            patch.setattr(triton_kernels, name, {2: SMALL, 4: SMALL})
        yield request.param


# The run is in the middle of all experts: some come before, and one behind.
BEFORE = 2
COUNTS = st.lists(st.sampled_from([0, 0, 1, 5, 16, 17, 40]), min_size=1, max_size=3)
WIDTHS = st.sampled_from([1, 16, 20, 35])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
few = settings(max_examples=40)


def segments_of(counts: Sequence[int], device: str, *, before: int = BEFORE) -> Segments:
    ends = torch.tensor(counts).cumsum(0).to(device, torch.int32)
    return Segments(before, 3 * before, tuple(counts), ends)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def drawn(most: int, count: int) -> Tensor:
    return torch.randint(most, (count,), generator=torch.Generator().manual_seed(count))


def matrices_of(
    segments: Segments, inner: int, width: int, dtype: torch.dtype, *, transposed: bool
) -> Tensor:
    experts = segments.experts.stop + 1
    if transposed:
        return normal(experts, width, inner, dtype=dtype).transpose(1, 2)
    return normal(experts, inner, width, dtype=dtype)


def by_definition(rows: Tensor, matrices: Tensor, segments: Segments) -> Tensor:
    """Return float32 products of rows as they are."""
    products = torch.empty(rows.shape[0], matrices.shape[2])
    for expert, start, end in segments.used():
        matrix = matrices[segments.first_expert + expert]
        products[start:end] = rows[start:end].float() @ matrix.float()
    return products


def assert_like(found: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCES[found.dtype]
    # Where a sum comes out small, its terms still were of the size of 1.
    found, expected = found.cpu().float(), expected.float()
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@few
@given(COUNTS, WIDTHS, WIDTHS, DTYPES, st.booleans(), st.sampled_from([torch.int32, torch.int64]))
def test_rows_are_fetched_from_their_tokens(
    device: str,
    counts: list[int],
    inner: int,
    width: int,
    dtype: torch.dtype,
    transposed: bool,
    ids_dtype: torch.dtype,
) -> None:
    segments = segments_of(counts, device)
    tokens = normal(7, inner, dtype=dtype)
    token_ids = drawn(7, sum(counts))
    matrices = matrices_of(segments, inner, width, dtype, transposed=transposed)
    found = gathered_mm(
        tokens.to(device), token_ids.to(device, ids_dtype), matrices.to(device), segments
    )
    assert found.dtype == dtype
    assert found.shape == (sum(counts), width)
    assert_like(found, by_definition(tokens[token_ids], matrices, segments))


@few
@given(COUNTS, WIDTHS, WIDTHS, DTYPES, st.booleans(), st.booleans(), st.booleans())
def test_rows_are_written_to_their_places(
    device: str,
    counts: list[int],
    inner: int,
    width: int,
    dtype: torch.dtype,
    transposed: bool,
    gated: bool,
    widened: bool,
) -> None:
    segments = segments_of(counts, device)
    rows = normal(sum(counts), inner, dtype=dtype)
    matrices = matrices_of(segments, inner, width, dtype, transposed=transposed)
    # Some places are no row's: assignments that were dropped.
    places = sum(counts) + 3
    order = torch.randperm(places, generator=torch.Generator().manual_seed(0))[: sum(counts)]
    gates = normal(sum(counts)) if gated else None
    out = torch.full((places, width), 7.0, dtype=torch.float32 if widened else dtype)
    products = by_definition(rows, matrices, segments)
    expected = out.float().clone()
    expected[order] = products if gates is None else products * gates.unsqueeze(1)
    found = out.to(device, copy=True)
    scattered_mm(
        rows.to(device),
        matrices.to(device),
        segments,
        order=order.to(device),
        gates=None if gates is None else gates.to(device),
        out=found,
    )
    assert_like(found, expected)


@few
@given(COUNTS, WIDTHS, WIDTHS, DTYPES, st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_products_of_columns(
    device: str,
    counts: list[int],
    left_width: int,
    right_width: int,
    dtype: torch.dtype,
    left_fetched: bool,
    right_fetched: bool,
    transposed: bool,
    widened: bool,
) -> None:
    segments = segments_of(counts, device)
    num_rows = sum(counts)
    left = normal(7 if left_fetched else num_rows, left_width, dtype=dtype)
    right = normal(9 if right_fetched else num_rows, right_width, dtype=dtype)
    left_ids = drawn(7, num_rows) if left_fetched else None
    right_ids = drawn(9, num_rows) if right_fetched else None
    out = matrices_of(
        segments,
        left_width,
        right_width,
        torch.float32 if widened else dtype,
        transposed=transposed,
    ).clone(memory_format=torch.preserve_format)
    expected = out.float().clone()
    left_rows = left if left_ids is None else left[left_ids]
    right_rows = right if right_ids is None else right[right_ids]
    for expert, start, end in segments.used():
        product = left_rows[start:end].float().t() @ right_rows[start:end].float()
        expected[segments.first_expert + expert] = product
    found = out.to(device, copy=True)
    gathered_outer(
        left.to(device),
        right.to(device),
        segments,
        left_ids=None if left_ids is None else left_ids.to(device),
        right_ids=None if right_ids is None else right_ids.to(device),
        out=found,
    )
    assert_like(found, expected)
    # To the bit, where the product is no expert's of the run or the expert has no rows.
    for expert, matrix in enumerate(found.cpu()):
        number = expert - segments.first_expert
        if not 0 <= number < len(counts) or not counts[number]:
            assert matrix.equal(out[expert])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_tiles_of_one_expert(device: str, dtype: torch.dtype) -> None:
    # More tiles of rows than go through the columns together, the last ones incomplete.
    segments = segments_of([0, 170, 3], device)
    tokens, token_ids = normal(9, 20, dtype=dtype), drawn(9, 173)
    matrices = matrices_of(segments, 20, 40, dtype, transposed=True)
    arguments = (tokens.to(device), token_ids.to(device), matrices.to(device), segments)
    found = gathered_mm(*arguments)
    assert_like(found, by_definition(tokens[token_ids], matrices, segments))
    assert found.equal(gathered_mm(*arguments))
    left, right = normal(173, 150, dtype=dtype), normal(173, 40, dtype=dtype)
    gradients = torch.full((6, 150, 40), 7.0, device=device)
    ids = {"left_ids": None, "right_ids": None}
    gathered_outer(left.to(device), right.to(device), segments, **ids, out=gradients)
    assert (gradients[: BEFORE + 1] == 7).all()
    for expert, start, end in segments.used():
        expected = left[start:end].float().t() @ right[start:end].float()
        assert_like(gradients[BEFORE + expert], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", [[3, 20], [0, 30], [70, 1], [150, 60]], ids=str)
@pytest.mark.parametrize(("inner", "width"), [(70, 150), (8, 12)])
def test_the_sizes_of_the_tables(
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    counts: list[int],
    dtype: torch.dtype,
    inner: int,
    width: int,
) -> None:
    for name, table in TABLES.items():
        monkeypatch.setattr(triton_kernels, name, table)
    segments = segments_of(counts, device, before=0)
    rows = normal(sum(counts), inner, dtype=dtype)
    matrices = matrices_of(segments, inner, width, dtype, transposed=True)
    products = torch.empty(sum(counts), width, device=device)
    order = torch.arange(sum(counts), device=device).flip(0)
    on_device = rows.to(device)
    scattered_mm(on_device, matrices.to(device), segments, order=order, gates=None, out=products)
    expected = by_definition(rows, matrices, segments)
    assert_like(products, expected.flip(0))
    gradients = torch.empty(len(counts), inner, width, device=device)
    right = expected.to(dtype)
    ids = {"left_ids": None, "right_ids": None}
    gathered_outer(on_device, right.to(device), segments, **ids, out=gradients)
    for expert, start, end in segments.used():
        exact = rows[start:end].float().t() @ right[start:end].float()
        torch.testing.assert_close(gradients[expert].cpu(), exact, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("complete", [True, False])
def test_a_whole_layer(device: str, complete: bool) -> None:
    """Forward and backward through `expert_ffn`, against the definition."""
    tokens, choices, experts, hidden, width = 21, 2, 4, 24, 20
    expert_ids = torch.stack([drawn(experts, tokens), drawn(experts - 1, tokens + 1)[1:]], dim=1)
    if not complete:
        expert_ids[3, 1] = experts
    sizes = (
        (tokens, hidden),
        (tokens, choices),
        (experts, 2 * width, hidden),
        (experts, hidden, width),
    )
    leaves = [normal(*size).to(device).requires_grad_() for size in sizes]
    inputs, gates, gate_up, down = leaves
    layer = FusedExperts(gate_up, down, Gated("silu"), kernels="triton")
    ids = expert_ids.to(device)
    expected = expert_ffn_reference(inputs, ids, gates, layer)
    output = expert_ffn(inputs, ids, gates, layer)
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    found = torch.autograd.grad(output.square().sum(), leaves)
    for ours, theirs in zip((output, *found), (expected, *wanted), strict=True):
        scale = float(theirs.detach().abs().max())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("name", list(TABLES))
@pytest.mark.parametrize("num_bytes", [2, 4])
def test_tables_fit_the_shared_memory(name: str, num_bytes: int) -> None:
    lines = TABLES[name][num_bytes]
    assert [most for most, _ in lines] == sorted(most for most, _ in lines)
    assert lines[-1][0] == math.inf
    for _, blocks in lines:
        reads = blocks.stages * blocks.inner * (blocks.rows + blocks.columns)
        assert reads * num_bytes <= 99 * 1024


def test_tiles_go_through_experts_in_order() -> None:
    experts, first_rows = triton_kernels._tiles(segments_of([0, 33, 1, 0, 16], "cpu"), 16, 5)
    assert experts.tolist() == [1, 1, 1, 2, 4]
    assert first_rows.tolist() == [0, 16, 32, 33, 34]
    assert experts.dtype == first_rows.dtype == torch.int32


def _calls(rows: Tensor, matrices: Tensor) -> list[Callable[[], object]]:
    segments = segments_of([2], "cpu", before=0)
    out = torch.zeros(2, matrices.shape[2])
    order = torch.arange(2)
    ids = {"left_ids": None, "right_ids": None}
    gradients = torch.zeros(1, rows.shape[1], matrices.shape[2])
    right = matrices[0, :2]
    return [
        lambda: gathered_mm(rows, order, matrices, segments),
        lambda: scattered_mm(rows, matrices, segments, order=order, gates=None, out=out),
        lambda: gathered_outer(rows, right, segments, **ids, out=gradients),
    ]


@pytest.mark.parametrize("number", range(3))
def test_without_triton_products_are_refused(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "_HAS_TRITON", False)
    assert not available()
    call = _calls(normal(2, 4), normal(1, 4, 5))[number]
    with pytest.raises(ModelError, match="`triton`, but it is not installed"):
        call()


@pytest.mark.parametrize("number", range(3))
def test_tensors_on_the_cpu_are_refused(number: int) -> None:
    pytest.importorskip("triton")
    with pytest.raises(ModelError, match=r"run on a GPU, but these are on the CPU\."):
        _calls(normal(2, 4), normal(1, 4, 5))[number]()


@pytest.mark.parametrize("number", range(3))
def test_dtypes_are_refused_by_name(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "_HAS_TRITON", True)
    rows, matrices = normal(2, 4), normal(1, 4, 5)
    with pytest.raises(ModelError, match=r"take torch\.float32, .* are torch\.float64"):
        _calls(rows.double(), matrices.double())[number]()
    with pytest.raises(ModelError, match=r"one dtype, but .*torch\.bfloat16 .*torch\.float32"):
        _calls(rows.bfloat16(), matrices)[number]()
