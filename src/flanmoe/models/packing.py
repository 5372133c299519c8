"""Whether a model keeps the examples of a packed row apart, asked of the model itself.

Native transformers decoders are told where an example begins by `position_ids` that restart, and
build their attention mask from them. A class that does not hand its positions to the mask lets every
example read the ones before it, without a word; so do recurrent layers, which carry a state along the
row. No list of model types is kept (DESIGN 5.1): one short row shows it.

Encoder-decoders are told by the numbers of the examples (`segment_ids`), or cannot share rows. Theirs may
meet at the experts all the same, where these have a number of places for all tokens of a batch: that is how
such models are trained (Switch, GShard, ST-MoE), so it is measured and said, not refused.
"""

import inspect
from collections.abc import Generator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from flanmoe.core.console import warn
from flanmoe.core.errors import ModelError
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.meta import embedding_weight
from flanmoe.models.modes import evaluating
from flanmoe.moe.routers.token_choice import TokenChoiceRouter

# Two rows of two examples each. In a sparse model other tokens make other batches for the experts,
# which rounds differently; where two experts tie, rounding can choose the other one. That happens in
# one row at most, a leak in both.
_NUM_ROWS = 2
_NUM_TOKENS = 8
# Of the spread of the logits: far above what rounding in float32 moves them by, far below what a leak
# does (docs/decisions/0003-packing.md has both).
_TOLERANCE = 0.05
_ONE_IN_A_ROW = "Put one example into each row with `packing: {examples_per_row: 1}`."


def takes_segments(model: PreTrainedModel) -> bool:
    """Return whether an encoder-decoder is told the examples of a row by numbers, as FlanMoeT5 is."""
    taken = inspect.signature(type(model).forward).parameters
    return {"segment_ids", "decoder_segment_ids"} <= taken.keys()


def keeps_examples_apart(model: PreTrainedModel) -> bool:
    """Return whether a decoder's packed examples do not see each other.

    Costs two forward passes over 32 tokens. The model is left as it was.
    """
    with evaluating(model):
        leak, limit = _leak(*_logits_of_second_example(model))
    return leak <= limit


def require_packing_without_leak(model: PreTrainedModel) -> None:
    """Refuse a model whose packed examples see each other.

    Costs two forward passes over 32 tokens, of an encoder-decoder over 64 and twice that where its experts
    have places for the tokens of a whole batch; how far an example then moves with its neighbour is printed,
    with routers in training mode. The model is left as it was, training mode included.

    Raises:
        ModelError: if the logits of an example change with the example before it, or an encoder-decoder is
            not told where an example begins.
    """
    if model.config.is_encoder_decoder:
        _require_pairs_apart(model)
        return
    with evaluating(model):
        before, after = _logits_of_second_example(model)
    _refuse_leak(model, before, after)


def _require_pairs_apart(model: PreTrainedModel) -> None:
    name = type(model).__name__
    if not takes_segments(model):
        raise ModelError(
            f"Examples that share a row must not see each other, but {name} is not told where one "
            f"begins: it has no `segment_ids`. {_ONE_IN_A_ROW}"
        )
    with evaluating(model), _routers_training(model):
        before, after = _logits_of_second_pair(model)
        shared = _routers_with_shared_places(model)
        if not shared:
            _refuse_leak(model, before, after)
            return
        with _without_limits(shared):
            _refuse_leak(model, *_logits_of_second_pair(model))
    moved = float((before - after).abs().max())
    warn(
        f"Examples that share a row meet at the experts of {name}, whose places are given out among all "
        "tokens of a batch: in a short row in training mode the logits of an example moved by up to "
        f"{moved:.2g} (their standard deviation is {float(before.std()):.2g}) when the example before it "
        "changed. `capacity: {group: segment}` keeps examples apart."
    )


def _refuse_leak(
    model: PreTrainedModel, before: Float[Tensor, "B L V"], after: Float[Tensor, "B L V"]
) -> None:
    leak, limit = _leak(before, after)
    if leak > limit:
        raise ModelError(
            "Examples that share a row must not see each other, but the logits of an example in "
            f"{type(model).__name__} moved by {leak:.2g} when the example before it changed (limit "
            f"{limit:.2g}): the class does not read where an example begins. {_ONE_IN_A_ROW}"
        )


def _leak(before: Float[Tensor, "B L V"], after: Float[Tensor, "B L V"]) -> tuple[float, float]:
    """Return how far logits moved with the example before theirs, and how far they may for rounding."""
    leak = float((before - after).abs().amax(dim=(1, 2)).min())
    return leak, _TOLERANCE * float(before.std())


@torch.no_grad()
def _logits_of_second_example(
    model: PreTrainedModel,
) -> tuple[Float[Tensor, "B L V"], Float[Tensor, "B L V"]]:
    """Return the logits of the second example of each row after one neighbour and after another."""
    table = embedding_weight(model)
    tokens = _tokens(table.shape[0], 3).to(table.device)
    positions = torch.arange(_NUM_TOKENS, device=table.device).repeat(_NUM_ROWS, 2)
    neighbour, other, second = tokens.split(_NUM_TOKENS, dim=1)
    before, after = (
        model(
            input_ids=torch.cat([first, second], dim=1),
            position_ids=positions,
            use_cache=False,
        ).logits[:, _NUM_TOKENS:]
        for first in (neighbour, other)
    )
    return before.double(), after.double()


@torch.no_grad()
def _logits_of_second_pair(
    model: PreTrainedModel,
) -> tuple[Float[Tensor, "B L V"], Float[Tensor, "B L V"]]:
    """Return the same of an encoder-decoder; what its routers draw is drawn alike in both passes."""
    table = embedding_weight(model)
    tokens = _tokens(table.shape[0], 6).to(table.device)
    segments = torch.arange(1, 3, device=table.device).repeat_interleave(_NUM_TOKENS)
    segments = segments.repeat(_NUM_ROWS, 1)
    neighbours, others, second = tokens.split(2 * _NUM_TOKENS, dim=1)
    found: list[Tensor] = []
    devices = [] if table.device.type == "cpu" else [table.device]
    for first in (neighbours, others):
        inputs, targets = torch.stack([first, second], dim=1).unflatten(2, (2, -1)).unbind(dim=2)
        with torch.random.fork_rng(devices, device_type=table.device.type):
            torch.manual_seed(0)
            output = model(
                input_ids=inputs.flatten(1),
                segment_ids=segments,
                decoder_input_ids=targets.flatten(1),
                decoder_segment_ids=segments,
                use_cache=False,
            )
        found.append(output.logits[:, _NUM_TOKENS:].double())
    return found[0], found[1]


def _tokens(vocabulary_size: int, examples: int) -> Int[Tensor, "B L"]:
    generator = torch.Generator().manual_seed(0)
    shape = (_NUM_ROWS, examples * _NUM_TOKENS)
    return torch.randint(vocabulary_size, shape, generator=generator)


def _routers_with_shared_places(model: PreTrainedModel) -> list[TokenChoiceRouter]:
    """Return the routers whose experts have a number of places for the tokens of several examples."""
    routers = [block.router for block in moe_blocks(model)]
    return [
        router
        for router in routers
        if isinstance(router, TokenChoiceRouter)
        and router.capacity is not None
        and router.capacity.group == "batch"
        and router.capacity.factor(training=True) is not None
    ]


@contextmanager
def _routers_training(model: PreTrainedModel) -> Generator[None]:
    """Put routers alone into training mode inside the `with` block."""
    routers = [block.router for block in moe_blocks(model)]
    before = [router.training for router in routers]
    for router in routers:
        router.training = True
    try:
        yield
    finally:
        for router, mode in zip(routers, before, strict=True):
            router.training = mode


@contextmanager
def _without_limits(routers: list[TokenChoiceRouter]) -> Generator[None]:
    """Let the experts of some routers take all of their tokens inside the `with` block."""
    before = [router.capacity for router in routers]
    for router in routers:
        router.capacity = None
    try:
        yield
    finally:
        for router, capacity in zip(routers, before, strict=True):
            router.capacity = capacity
