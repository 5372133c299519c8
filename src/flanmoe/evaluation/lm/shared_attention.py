"""Attention over keys and values that many rows share, inside unchanged transformers models.

transformers lets a model's attention function be named in its configuration. The one registered
here looks at the `View` of the pass that is running: which keys and values come from a shared
prefix, which from earlier steps of the row itself, and which of the row's own tokens each token
may see. The prefix is stored once, with batch size 1, whatever number of rows attend to it, and
while text is generated its keys are read once a step instead of once a row.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

IMPLEMENTATION = "flanmoe_shared_prefix"


@dataclass(frozen=True, slots=True)
class KeysValues:
    """What one layer keeps of tokens that it has seen; R rows or 1, H key heads, K tokens."""

    keys: Float[Tensor, "R H K D"]
    values: Float[Tensor, "R H K E"]


@dataclass(frozen=True, slots=True)
class Stored:
    """Keys and values of one prefix in every layer that has any.

    Attributes:
        layers: by the index of the layer; R is 1.
        length: tokens of the prefix.
    """

    layers: dict[int, KeysValues]
    length: int


@dataclass(frozen=True, slots=True)
class Heads:
    """What an attention module asks for beside queries, keys and values.

    Attributes:
        scaling: factor on the scores.
        window: how many tokens back a token sees at most, itself included; None for all.
        softcap: bound on the scores (Gemma 2), None for none.
        sinks: one more score per head that takes probability but adds nothing (GPT-OSS), None for none.
    """

    scaling: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None

    @property
    def are_plain(self) -> bool:
        """Whether torch's own attention computes them."""
        return self.softcap is None and self.sinks is None


class RowsView:
    """Rows of whole texts after a shared prefix. B rows, Q tokens.

    Args:
        prefix: what stands before every row, None for nothing.
        positions: place of every token in its text.
        visible: which tokens of its row a token sees; None where each sees those to its left.
        keep: whether the keys and values of the rows are kept.
    """

    def __init__(
        self,
        prefix: Stored | None,
        positions: Int[Tensor, "B Q"],
        visible: Bool[Tensor, "B Q Q"] | None,
        *,
        keep: bool = False,
    ) -> None:
        self._prefix = prefix
        self._positions = positions
        self._visible = visible
        self._masks: dict[int | None, Tensor] = {}
        self._keep = keep
        self.kept: dict[int, KeysValues] = {}

    def attend(
        self, layer: int, query: Tensor, own: KeysValues, heads: Heads
    ) -> Float[Tensor, "B N Q E"]:
        """Return the attended values of the queries of one layer, whose new keys and values are `own`."""
        if self._keep:
            self.kept[layer] = own
        unrestricted = self._prefix is None and self._visible is None and heads.window is None
        if unrestricted and heads.are_plain:
            return scaled_dot_product_attention(
                query, own.keys, own.values, is_causal=True, scale=heads.scaling, enable_gqa=True
            )
        everything = own if self._prefix is None else _joined(self._prefix.layers[layer], own)
        if heads.window not in self._masks:
            self._masks[heads.window] = self._mask(heads.window)
        return _attention(query, everything, self._masks[heads.window], heads)

    def _mask(self, window: int | None) -> Bool[Tensor, "B Q K"]:
        positions = self._positions
        num_rows, length = positions.shape
        visible = self._visible
        if visible is None:
            square = torch.ones(length, length, dtype=torch.bool, device=positions.device)
            visible = square.tril().expand(num_rows, -1, -1)
        key_positions = positions
        if self._prefix is not None:
            before = torch.arange(self._prefix.length, device=positions.device)
            key_positions = torch.cat([before.expand(num_rows, -1), positions], dim=1)
            visible = torch.cat([visible.new_ones(num_rows, length, len(before)), visible], dim=2)
        return _within_window(visible, positions, key_positions, window)


class StepView:
    """One new token for each of B rows that have been read before, each after a prefix.

    Args:
        prefixes: what stands before the rows: for the first so many of them, for the next so many, ...
        earlier: keys and values of the rows' own tokens with room for more, by layer. The new ones are
            written into it.
        column: where in that room the new ones go.
        visible: which columns up to the new one each row sees.
        column_positions: place in its text of every column up to the new one.
    """

    def __init__(
        self,
        prefixes: Sequence[tuple[Stored | None, int]],
        earlier: dict[int, KeysValues],
        column: int,
        visible: Bool[Tensor, "B C"],
        column_positions: Int[Tensor, "B C"],
    ) -> None:
        self._prefixes = prefixes
        self._earlier = earlier
        self._column = column
        self._visible = visible
        self._positions = column_positions
        self._masks: dict[int | None, list[Tensor]] = {}

    def attend(
        self, layer: int, query: Tensor, own: KeysValues, heads: Heads
    ) -> Float[Tensor, "B N 1 E"]:
        """Return the attended values of the queries of one layer, whose new keys and values are `own`."""
        room = self._earlier[layer]
        room.keys[:, :, self._column] = own.keys[:, :, 0]
        room.values[:, :, self._column] = own.values[:, :, 0]
        if heads.window not in self._masks:
            self._masks[heads.window] = self._mask(heads.window)
        found: list[Tensor] = []
        start, end = 0, self._column + 1
        for (stored, number), mask in zip(self._prefixes, self._masks[heads.window], strict=True):
            part = slice(start, start + number)
            earlier = KeysValues(room.keys[part, :, :end], room.values[part, :, :end])
            before = stored.layers[layer] if stored else None
            found.append(_step_attention(query[part], before, earlier, mask, heads))
            start += number
        return torch.cat(found)

    def _mask(self, window: int | None) -> list[Bool[Tensor, "R K"]]:
        masks: list[Tensor] = []
        start = 0
        for stored, number in self._prefixes:
            part = slice(start, start + number)
            visible, positions = self._visible[part], self._positions[part]
            newest = positions[:, -1:]
            if stored is not None:
                before = torch.arange(stored.length, device=positions.device)
                positions = torch.cat([before.expand(number, -1), positions], dim=1)
                visible = torch.cat([visible.new_ones(number, len(before)), visible], dim=1)
            masks.append(_within_window(visible[:, None], newest, positions, window)[:, 0])
            start += number
        return masks


# What the attention of one forward pass sees.
View = RowsView | StepView

_running: ContextVar[View] = ContextVar("flanmoe_shared_prefix_view")


@contextmanager
def sharing(model: PreTrainedModel) -> Iterator[None]:
    """Let a model's attention go through the `View` of the pass inside the `with` block."""
    before = str(model.config._attn_implementation)
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def seen_through(view: View) -> Iterator[None]:
    """Let the attention of a `sharing` model see what `view` says inside the `with` block."""
    token = _running.set(view)
    try:
        yield
    finally:
        _running.reset(token)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer; arguments and result as its interface says."""
    heads = Heads(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    # Rotary embeddings may leave queries and keys in float32 where the model computes in less.
    dtype = value.dtype
    with torch.autocast(query.device.type, enabled=False):
        own = KeysValues(key.to(dtype), value)
        found = _running.get().attend(int(module.layer_idx), query.to(dtype), own, heads)
    return found.to(dtype).transpose(1, 2).contiguous(), None


def _no_mask(*_arguments: Any, **_options: Any) -> None:
    """The view knows what is visible; transformers need not make a mask."""


AttentionInterface.register(IMPLEMENTATION, _attend)
AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)


def _joined(prefix: KeysValues, own: KeysValues) -> KeysValues:
    num_rows = len(own.keys)
    return KeysValues(
        torch.cat([prefix.keys.expand(num_rows, -1, -1, -1), own.keys], dim=2),
        torch.cat([prefix.values.expand(num_rows, -1, -1, -1), own.values], dim=2),
    )


def _within_window(
    visible: Bool[Tensor, "B Q K"],
    positions: Int[Tensor, "B Q"],
    key_positions: Int[Tensor, "B K"],
    window: int | None,
) -> Bool[Tensor, "B Q K"]:
    if window is None:
        return visible
    return visible & (positions[:, :, None] - key_positions[:, None, :] < window)


def _attention(
    query: Float[Tensor, "B N Q D"],
    seen: KeysValues,
    mask: Bool[Tensor, "B Q K"],
    heads: Heads,
) -> Float[Tensor, "B N Q E"]:
    num_rows, num_heads, length, _ = query.shape
    num_key_heads = seen.keys.shape[1]
    shared = num_heads // num_key_heads
    # Query heads that share a key head stand behind each other as more queries, so that keys are not copied.
    folded = query.reshape(num_rows, num_key_heads, shared * length, -1)
    if heads.are_plain:
        attended = scaled_dot_product_attention(
            folded,
            seen.keys,
            seen.values,
            attn_mask=mask.repeat(1, shared, 1)[:, None],
            scale=heads.scaling,
        )
    else:
        scores = (folded @ seen.keys.transpose(2, 3)).float()
        scores = scores.view(num_rows, num_key_heads, shared, length, -1)
        weights = _weights(scores, mask[:, None, None], heads).to(seen.values.dtype)
        attended = weights.flatten(2, 3) @ seen.values
    return attended.reshape(num_rows, num_heads, length, -1)


def _step_attention(
    query: Float[Tensor, "B N 1 D"],
    prefix: KeysValues | None,
    earlier: KeysValues,
    mask: Bool[Tensor, "B K"],
    heads: Heads,
) -> Float[Tensor, "B N 1 E"]:
    """One softmax over the prefix and the row's own tokens; the prefix is one product for all rows."""
    num_rows, num_heads = query.shape[:2]
    num_key_heads = earlier.keys.shape[1]
    shared = num_heads // num_key_heads
    queries = query.reshape(num_rows, num_key_heads, shared, -1).float()
    scores = queries @ earlier.keys.float().transpose(2, 3)
    num_before = 0
    if prefix is not None:
        num_before = prefix.keys.shape[2]
        together = queries.transpose(0, 1).flatten(1, 2)
        before = together @ prefix.keys[0].float().transpose(1, 2)
        before = before.unflatten(1, (num_rows, shared)).transpose(0, 1)
        scores = torch.cat([before, scores], dim=-1)
    weights = _weights(scores[:, :, :, None], mask[:, None, None, None], heads)[:, :, :, 0]
    attended = weights[..., num_before:] @ earlier.values.float()
    if prefix is not None:
        together = weights[..., :num_before].transpose(0, 1).flatten(1, 2)
        before = together @ prefix.values[0].float()
        attended = attended + before.unflatten(1, (num_rows, shared)).transpose(0, 1)
    return attended.reshape(num_rows, num_heads, 1, -1)


def _weights(
    scores: Float[Tensor, "B H G Q K"], mask: Bool[Tensor, "B 1 1 Q K"], heads: Heads
) -> Float[Tensor, "B H G Q K"]:
    scores = scores * heads.scaling
    if heads.softcap is not None:
        scores = heads.softcap * torch.tanh(scores / heads.softcap)
    scores = scores.masked_fill(~mask, -math.inf)
    if heads.sinks is None:
        return scores.softmax(dim=-1)
    num_key_heads, shared = scores.shape[1:3]
    sinks = heads.sinks.float().view(1, num_key_heads, shared, 1, 1)
    with_sinks = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], dim=-1)
    return with_sinks.softmax(dim=-1)[..., :-1]
