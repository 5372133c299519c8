"""The forward and backward pass with kernels that fetch rows and put them back by themselves.

Products read the rows of their tokens where these lie, and write each output into the place of its choice, gate
included, so that neither sorted inputs nor sorted outputs exist. A token's choices are then added up in their
order: like the other pass this one repeats to the bit. Experts ask for it by name (`FusedExperts.kernels`): it
has never run on a GPU, so nothing takes it by itself.
"""

from jaxtyping import Bool, Float
from torch import Tensor

from flanmoe.core.errors import ModelError
from flanmoe.moe.compute.backward import BackwardPass
from flanmoe.moe.compute.buffers import Buffers
from flanmoe.moe.compute.forward import Kept, activation, sorted_gates
from flanmoe.moe.compute.grouping import Grouping, Segments
from flanmoe.moe.compute.linear import FullMatrices
from flanmoe.moe.compute.products import segment_add
from flanmoe.moe.compute.triton_kernels import available, gathered_mm, gathered_outer, scattered_mm
from flanmoe.moe.compute.work import Work


def require_triton(work: Work) -> None:
    """Refuse what the kernels cannot compute.

    Raises:
        ModelError: if Triton is not installed, or something lies between a product and the rows of tokens.
    """
    if not available():
        raise ModelError(
            "Triton's kernels for experts need the package `triton`, which is not installed; PyTorch's CUDA "
            'builds bring it. Install it, or compute with `set_experts_implementation("flanmoe")`.'
        )
    found = _in_between(work)
    if found:
        raise ModelError(
            f"Triton's kernels for experts compute full matrices, at most with a bias of the first, but these "
            f'experts have {", ".join(found)}. Compute them with `set_experts_implementation("flanmoe")`.'
        )


def _in_between(work: Work) -> list[str]:
    """Return by name what of this work stands between a product and the rows of tokens."""
    full = isinstance(work.first, FullMatrices) and isinstance(work.second, FullMatrices)
    present = {
        "low-rank changes": not full,
        "a bias of the second matrices": work.second_bias is not None,
        "a norm of their outputs": work.norm is not None,
        "expert dropout": work.hidden_dropout > 0,
        "an observer of their outputs": work.observer is not None,
    }
    return [name for name, is_there in present.items() if is_there]


def triton_forward_pass(
    work: Work, inputs: Float[Tensor, "T H"], gates: Float[Tensor, "T k"]
) -> tuple[Float[Tensor, "T H"], Kept]:
    """Return the gate-weighted sums, in the dtype of sums, and what is kept: as `forward_pass` does."""
    kept = Kept([], [], [])
    buffers = Buffers(max((run.num_rows for run in work.runs()), default=0), inputs)
    own_gates = sorted_gates(gates, work.grouping, work.accumulate)
    visits = _Visits(work, inputs, num_rows=work.grouping.order.numel())
    for run in work.runs():
        token_ids = work.grouping.token_ids[run.rows]
        product = gathered_mm(inputs, token_ids, work.first.matrices.transpose(1, 2), run)
        if work.first_bias is not None:
            segment_add(product, work.first_bias, run)
        inner = activation(work, product, kept, buffers)
        visits.add(inner, work.second.matrices.transpose(1, 2), run, gates=own_gates[run.rows])
        if work.keep:
            kept.products.append(product)
    return visits.sums(), kept


class TritonBackwardPass(BackwardPass):
    """Gradients of one `Work` that `require_triton` lets pass."""

    def _through_second(
        self, inner: Float[Tensor, "N I"], mask: Bool[Tensor, "N I"] | None, run: Segments
    ) -> Float[Tensor, "N I"]:
        """Return the gradient of what the second product took."""
        work, gates = self._work, self._own_gates[run.rows].unsqueeze(1)
        token_ids = work.grouping.token_ids[run.rows]
        back = gathered_mm(self._gradient, token_ids, work.second.matrices, run)
        if self._of_gates is not None:
            self._of_gates.append((back.to(work.accumulate) * inner).sum(dim=1))
        (into,) = self._into_second
        if into is not None:
            scaled = (inner * gates).to(inner.dtype)
            gathered_outer(
                self._gradient, scaled, run, left_ids=token_ids, right_ids=None, out=into
            )
        return back.mul_(gates)

    def _add_to_first(self, product: Float[Tensor, "N F"], run: Segments) -> None:
        """Give the first matrices what comes back through the first product."""
        (into,) = self._into_first
        assert into is not None
        token_ids = self._work.grouping.token_ids[run.rows]
        gathered_outer(product, self._inputs, run, left_ids=None, right_ids=token_ids, out=into)

    def _add_to_hidden(
        self, total: Float[Tensor, "T H"], product: Float[Tensor, "N F"], run: Segments
    ) -> None:
        """Give the hidden states what comes back through the first product."""
        visits = _Visits(self._work, self._inputs, num_rows=run.num_rows)
        visits.add(product, self._work.first.matrices, run, gates=None)
        total += visits.sums()


class _Visits:
    """A row for each choice of each token, 0 for those that are not written.

    Args:
        work: whose choices.
        like: gives the size of a row, dtype and device.
        num_rows: how many will be written.
    """

    def __init__(self, work: Work, like: Float[Tensor, "T H"], *, num_rows: int) -> None:
        self._grouping: Grouping = work.grouping
        self._accumulate = work.accumulate
        num_tokens, choices = self._grouping.shape
        all_rows = num_tokens * choices
        make = like.new_empty if num_rows == all_rows else like.new_zeros
        self._rows = make(all_rows, like.shape[1])

    def add(
        self,
        rows: Float[Tensor, "N A"],
        matrices: Float[Tensor, "E A B"],
        run: Segments,
        *,
        gates: Float[Tensor, " N"] | None,
    ) -> None:
        """Write the products of a run's rows, times their gates, into the places of their choices."""
        order = self._grouping.order[run.rows]
        scattered_mm(rows, matrices, run, order=order, gates=gates, out=self._rows)

    def sums(self) -> Float[Tensor, "T B"]:
        """Return for each token the sum of its choices."""
        num_tokens, choices = self._grouping.shape
        by_choice = self._rows.view(num_tokens, choices, self._rows.shape[1])
        return by_choice.sum(dim=1, dtype=self._accumulate)
