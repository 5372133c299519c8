"""What the FFNs of an encoder-decoder save while it trains: T5's, Switch's and ours.

With c bytes a number in matrix products (tests compare with what autograd really saves):

- an FFN of width I keeps its input, its activation and both factors where it is gated, c * I each;
  gelu_new, written out in transformers, keeps four activations;
- dropout keeps one number for each unit that it may drop;
- a sparse block keeps the first product of each expert that the token visits, the activation beside it
  where that is not computed again, and its input once.
"""

import math
from typing import Any

from scipy.stats import binom
from torch import nn
from transformers.activations import NewGELUActivation

from flanmoe.models.activations import FLOAT32_BYTES, SideBatch
from flanmoe.models.expert_visits import RoutedExperts
from flanmoe.moe.compute import hidden_dropout, keep_activation
from flanmoe.moe.layer import Experts


def dense_bytes(ffn: Any, batch: SideBatch) -> int:
    """Return what a dense FFN of T5 or Switch saves for a token."""
    gated = "wi" not in dict(ffn.named_children())
    if isinstance(ffn.act, NewGELUActivation):
        activation = 4
    else:
        activation = _kept_by_activation(
            isinstance(ffn.act, nn.ReLU),
            gated=gated,
            # Autocast makes another of it too: transformers casts to the dtype of the weights before.
            dropping=batch.dropping or batch.precision == "bfloat16",
        )
    kept = _kept_in_ffn(activation, gated=gated, dropping=batch.dropping)
    return batch.inputs(2 if gated else 1) + batch.width * kept * ffn.wo.in_features


def _kept_by_activation(relu: bool, *, gated: bool, dropping: bool) -> int:
    """Return how many numbers an activation saves for a unit that nothing else saves.

    ReLU goes backward by its output, which the gated product keeps, or the next layer unless
    dropout makes another of it.
    """
    return int(dropping and not gated) if relu else 1


def _kept_in_ffn(activation: int, *, gated: bool, dropping: bool) -> int:
    """Return how many numbers an FFN saves for a unit: also factors, draws, and its last layer's input."""
    return activation + (2 if gated else 0) + int(dropping) + 1


def sparse_bytes(routed: RoutedExperts, batch: SideBatch) -> int:
    """Return what a router and its experts save for the tokens of a micro-batch."""
    experts: Any = routed.experts
    hidden, tokens, num_experts = batch.hidden_size, batch.num_tokens, routed.num_experts
    router = FLOAT32_BYTES * (hidden + num_experts) * tokens
    if not isinstance(experts, Experts):
        # Switch: beside what an expert computes with, its output before and after the gate.
        visit = dense_bytes(next(experts.children()), batch) + batch.inputs(1)
        return router + (visit + FLOAT32_BYTES * hidden) * tokens
    # Of each visit the first product, the activation where it is kept, and one byte for each unit that
    # dropout may take.
    numbers = (2 if experts.has_gate else 1) + int(keep_activation(experts))
    units = batch.width * numbers * experts.expert_width
    if hidden_dropout(experts) > 0:
        units += experts.expert_width
    # Without a cast experts and router keep one input.
    inputs = 0 if batch.precision == "float32" else batch.width * hidden * tokens
    return router + round(units * routed.share * num_experts * tokens) + inputs


def slots_of(routed: RoutedExperts, num_tokens: int) -> int:
    """Return the most experts that any of so many tokens visits.

    Where experts choose it is what one token in so many exceeds if they choose independently.
    """
    visits = routed.share * routed.num_experts
    if routed.asked:
        return int(visits)
    most = binom.isf(1 / num_tokens, routed.num_experts, float(routed.share))
    return max(math.ceil(most), 1)
