"""The backward pass over sorted rows, a run of experts at a time."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flanmoe.moe.compute.activations import Recomputed
from flanmoe.moe.compute.buffers import Buffers
from flanmoe.moe.compute.forward import Kept, dropped, second_product, sorted_gates
from flanmoe.moe.compute.grouping import Segments
from flanmoe.moe.compute.products import new_gradient, segment_sum
from flanmoe.moe.compute.sums import add_rows, gather_rows
from flanmoe.moe.compute.work import Work


class BackwardPass:
    """Gradients of one `Work`; `run` fills them, `gradients` hands them over.

    Args:
        work: with tensors as they were in the forward pass.
        inputs, gates: of the forward pass.
        gradient: of the output, in the dtype of products.
        hidden_wanted, gates_wanted: whether these are trained.
        wanted: of each of `work.tensors` the dtype of its gradient, None where it is not trained.
    """

    def __init__(
        self,
        work: Work,
        inputs: Float[Tensor, "T H"],
        gates: Float[Tensor, "T k"],
        gradient: Float[Tensor, "T H"],
        *,
        hidden_wanted: bool,
        gates_wanted: bool,
        wanted: Sequence[torch.dtype | None],
    ) -> None:
        self._work = work
        self._inputs = inputs
        self._gates = gates
        self._own_gates = sorted_gates(gates, work.grouping, work.accumulate)
        self._gradient = gradient
        *products, first_bias, second_bias = wanted
        split, counts = len(work.first.tensors), work.grouping.counts
        self._into_first = work.first.new_gradients(counts, products[:split])
        self._into_second = work.second.new_gradients(counts, products[split:])
        self._into_first_bias = _bias_gradient(work.first_bias, counts, first_bias)
        self._into_second_bias = _bias_gradient(work.second_bias, counts, second_bias)
        self._into_hidden = (
            torch.zeros_like(inputs, dtype=work.accumulate) if hidden_wanted else None
        )
        self._of_gates: list[Tensor] | None = [] if gates_wanted else None
        self._into_captured = [torch.zeros_like(parameter) for parameter in work.captured]
        self._first_trained = any(gradient is not None for gradient in self._into_first)
        self._buffers = Buffers(max((run.num_rows for run in work.runs()), default=0), inputs)

    def run(self, kept: Kept) -> None:
        """Go through the runs of experts, with what the forward pass kept of each."""
        for number, (run, product) in enumerate(zip(self._work.runs(), kept.products, strict=True)):
            activated = kept.activated[number] if kept.activated else None
            recomputed = self._work.combine.recompute(product, self._buffers, activated=activated)
            mask = kept.masks[number] if kept.masks else None
            inner = self._through_second(recomputed.inner.to(self._work.dtype), mask, run)
            if self._goes_on():
                self._through_first(recomputed, inner, run)

    def gradients(self, *, hidden_dtype: torch.dtype) -> list[Tensor | None]:
        """Return the gradients of hidden states, gates, `work.tensors` and `work.captured`."""
        hidden = None if self._into_hidden is None else self._into_hidden.to(hidden_dtype)
        return [
            hidden,
            self._gates_gradient(),
            *self._into_first,
            *self._into_second,
            self._into_first_bias,
            self._into_second_bias,
            *self._into_captured,
        ]

    def _goes_on(self) -> bool:
        """Say whether anything before the second product is trained."""
        trained = self._into_hidden is not None or self._into_first_bias is not None
        return trained or self._first_trained or bool(self._work.combine.captured)

    def _through_second(
        self, inner: Float[Tensor, "N I"], mask: Bool[Tensor, "N I"] | None, run: Segments
    ) -> Float[Tensor, "N I"]:
        """Return the gradient of what the second product took, before dropout."""
        work, share = self._work, self._work.hidden_dropout
        gates = self._own_gates[run.rows].unsqueeze(1)
        if mask is not None:
            inner = dropped(inner, mask, share)
        rows = self._buffers.take("rows", run.num_rows, self._gradient.shape[1])
        gather_rows(self._gradient, work.grouping, run, out=rows)
        if work.norm is not None:
            rows, scaled = self._through_norm(rows, inner, run), inner
        else:
            scaled = self._buffers.take("scaled", *inner.shape)
        out = self._buffers.place("inner gradient", *inner.shape)
        back = work.second.input_gradient(rows, run, out=out)
        if work.norm is None:
            if self._of_gates is not None:
                self._of_gates.append(self._output_products(back, inner, rows, run, out=scaled))
            torch.mul(inner, gates, out=scaled)
            back.mul_(gates)
        work.second.weight_gradients(rows, scaled, run, self._into_second)
        if self._into_second_bias is not None:
            weights = None if work.norm is not None else self._own_gates[run.rows]
            segment_sum(rows, run, out=self._into_second_bias, weights=weights)
        return back if mask is None else dropped(back, mask, share)

    def _through_norm(
        self, rows: Float[Tensor, "N H"], inner: Float[Tensor, "N I"], run: Segments
    ) -> Float[Tensor, "N H"]:
        """Return the gradient of the second product, which is made again, gates included."""
        work = self._work
        assert work.norm is not None
        outputs = second_product(work, inner, run, self._buffers)
        normed = work.norm.recompute(outputs, self._buffers)
        if self._of_gates is not None:
            products = normed.inner * rows.to(normed.inner.dtype)
            self._of_gates.append(products.sum(dim=1, dtype=work.accumulate))
        back, captured = normed.backward(rows * self._own_gates[run.rows].unsqueeze(1))
        self._add_captured(captured, len(work.combine.captured))
        return back.to(work.dtype)

    def _output_products(
        self,
        back: Float[Tensor, "N I"],
        inner: Float[Tensor, "N I"],
        rows: Float[Tensor, "N H"],
        run: Segments,
        *,
        out: Float[Tensor, "N I"],
    ) -> Float[Tensor, " N"]:
        """Return the product of each row's output with the gradient of its token: that of its gate.

        `out` is overwritten, or left alone where products are added up in another dtype.
        """
        bias, exact = self._work.second_bias, self._work.accumulate
        is_exact = out.dtype == exact
        products = torch.mul(back, inner, out=out) if is_exact else back.to(exact).mul_(inner)
        found = products.sum(dim=1)
        if bias is not None:
            own = bias[run.experts]
            for expert, start, end in run.used():
                found[start:end] += rows[start:end] @ own[expert]
        return found

    def _through_first(
        self, recomputed: Recomputed, inner: Float[Tensor, "N I"], run: Segments
    ) -> None:
        product, captured = recomputed.backward(inner)
        self._add_captured(captured, 0)
        if self._first_trained:
            self._add_to_first(product, run)
        if self._into_first_bias is not None:
            segment_sum(product, run, out=self._into_first_bias)
        if self._into_hidden is not None:
            self._add_to_hidden(self._into_hidden, product, run)

    def _add_to_first(self, product: Float[Tensor, "N F"], run: Segments) -> None:
        """Give the first matrices what comes back through the first product."""
        rows = self._buffers.take("rows", run.num_rows, self._inputs.shape[1])
        gather_rows(self._inputs, self._work.grouping, run, out=rows)
        self._work.first.weight_gradients(product, rows, run, self._into_first)

    def _add_to_hidden(
        self, total: Float[Tensor, "T H"], product: Float[Tensor, "N F"], run: Segments
    ) -> None:
        """Give the hidden states what comes back through the first product."""
        out = self._buffers.place("rows", run.num_rows, self._inputs.shape[1])
        back = self._work.first.input_gradient(product, run, out=out)
        add_rows(total, back, self._work.grouping, run, gates=None, buffers=self._buffers)

    def _add_captured(self, found: Sequence[Tensor], first: int) -> None:
        own = self._into_captured[first : first + len(found)]
        for into, gradient in zip(own, found, strict=True):
            into += gradient

    def _gates_gradient(self) -> Float[Tensor, "T k"] | None:
        if self._of_gates is None:
            return None
        flat = torch.zeros_like(self._gates).flatten()
        if self._of_gates:
            flat[self._work.grouping.order] = torch.cat(self._of_gates).to(flat.dtype)
        return flat.view_as(self._gates)


def _bias_gradient(
    bias: Float[Tensor, "E _"] | None, counts: tuple[int, ...], dtype: torch.dtype | None
) -> Float[Tensor, "E _"] | None:
    if bias is None or dtype is None:
        return None
    return new_gradient(bias, counts, dtype=dtype)
