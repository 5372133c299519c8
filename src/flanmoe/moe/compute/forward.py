"""The forward pass over sorted rows, a run of experts at a time."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flanmoe.moe.compute.buffers import Buffers
from flanmoe.moe.compute.fused import ExpertOutputs
from flanmoe.moe.compute.grouping import Grouping, Segments
from flanmoe.moe.compute.products import segment_add
from flanmoe.moe.compute.sums import add_rows, gather_rows
from flanmoe.moe.compute.work import Work


class Kept(NamedTuple):
    """What the backward pass needs of each run.

    Attributes:
        products: first products with their bias; none where no backward pass follows.
        activated: activations; none where they are computed again.
        masks: which hidden units stayed; none without dropout.
    """

    products: list[Float[Tensor, "N F"]]
    activated: list[Float[Tensor, "N I"]]
    masks: list[Bool[Tensor, "N I"]]


def forward_pass(
    work: Work, inputs: Float[Tensor, "T H"], gates: Float[Tensor, "T k"]
) -> tuple[Float[Tensor, "T H"], Kept]:
    """Return the gate-weighted sums, in the dtype of sums, and what is kept."""
    runs, width = work.runs(), inputs.shape[1]
    buffers = Buffers(max((run.num_rows for run in runs), default=0), inputs)
    total = torch.zeros_like(inputs, dtype=work.accumulate)
    own_gates = sorted_gates(gates, work.grouping, work.accumulate)
    kept, shown = Kept([], [], []), list[Tensor]()
    for run in runs:
        rows = buffers.take("rows", run.num_rows, width)
        gather_rows(inputs, work.grouping, run, out=rows)
        product = first_product(work, rows, run, buffers)
        inner = activation(work, product, kept, buffers)
        if work.hidden_dropout:
            mask = _drawn_mask(inner, run, work.hidden_dropout)
            inner = dropped(inner, mask, work.hidden_dropout)
            kept.masks.append(mask)
        outputs = second_product(work, inner, run, buffers)
        if work.norm is not None:
            outputs = work.norm(outputs)
        if work.keep:
            kept.products.append(product)
        if work.observer is not None:
            shown.append(outputs.clone())
        add_rows(total, outputs, work.grouping, run, gates=own_gates[run.rows], buffers=buffers)
    if work.observer is not None:
        _show(work, shown or [total[:0]], own_gates)
    return total, kept if work.keep else Kept([], [], [])


def first_product(
    work: Work, rows: Float[Tensor, "N H"], run: Segments, buffers: Buffers
) -> Float[Tensor, "N F"]:
    """Return the first product with its bias: a new tensor if it is to be kept."""
    width = work.first.matrices.shape[1]
    out = None if work.keep else buffers.place("product", rows.shape[0], width)
    product = work.first.forward(rows, run, out=out)
    if work.first_bias is not None:
        segment_add(product, work.first_bias, run)
    return product


def activation(
    work: Work, product: Float[Tensor, "N F"], kept: Kept, buffers: Buffers
) -> Float[Tensor, "N I"]:
    """Return what lies between the products, until the next call; adds to `kept` what is kept of it."""
    activated = None
    if work.keep and work.keep_activation:
        activated = product.new_empty(product.shape[0], work.second.matrices.shape[2])
        kept.activated.append(activated)
    return work.combine.forward(product, buffers, activated=activated).to(work.dtype)


def second_product(
    work: Work, inner: Float[Tensor, "N I"], run: Segments, buffers: Buffers
) -> Float[Tensor, "N H"]:
    """Return the second product with its bias."""
    out = buffers.place("outputs", inner.shape[0], work.second.matrices.shape[1])
    outputs = work.second.forward(inner, run, out=out)
    if work.second_bias is not None:
        segment_add(outputs, work.second_bias, run)
    return outputs


def sorted_gates(
    gates: Float[Tensor, "T k"], grouping: Grouping, dtype: torch.dtype
) -> Float[Tensor, " N"]:
    """Return the gate of each sorted row."""
    return gates.reshape(-1)[grouping.order].to(dtype)


def dropped(
    values: Float[Tensor, "N I"], mask: Bool[Tensor, "N I"], share: float
) -> Float[Tensor, "N I"]:
    """Return values where the mask is True, scaled up; 0 elsewhere."""
    return values * mask.to(values.dtype).div_(1 - share)


def _drawn_mask(inner: Float[Tensor, "N I"], run: Segments, share: float) -> Bool[Tensor, "N I"]:
    """Draw expert after expert, so that the draws do not depend on how experts were put into runs."""
    parts = [
        torch.empty_like(inner[start:end]).bernoulli_(1 - share) for _, start, end in run.used()
    ]
    return torch.cat(parts).bool()


def _show(work: Work, outputs: list[Float[Tensor, "_ H"]], gates: Float[Tensor, " N"]) -> None:
    assert work.observer is not None
    grouping = work.grouping
    counts = torch.tensor(grouping.counts, device=gates.device)
    experts = torch.arange(len(grouping.counts), device=gates.device)
    work.observer(
        ExpertOutputs(
            outputs=torch.cat(outputs),
            expert_ids=experts.repeat_interleave(counts),
            token_ids=grouping.token_ids,
            gates=gates,
        )
    )
