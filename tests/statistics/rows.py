"""Hand-made rows of tokens, models to run them through, and what statistics are, written out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flanmoe.models.blocks import moe_blocks
from flanmoe.models.experts_interface import fused_experts
from flanmoe.models.flan_moe_t5 import FlanMoeT5Config, FlanMoeT5ForConditionalGeneration
from flanmoe.moe.compute import FusedExperts, expert_ffn_reference
from flanmoe.moe.layer import Experts
from flanmoe.moe.routing import Routing
from flanmoe.statistics import StatisticsBatch
from flanmoe.testing.tiny_models import tiny_model

GROUPS = ("sums", "tales", "unread")
DECODERS = ("mixtral", "qwen2_moe", "olmoe", "gpt_oss", "deepseek_v3", "granitemoe")
ENCODER_DECODERS = ("top_k", "switch", "gshard")
_VOCABULARY = 61


def decoder(name: str = "mixtral", *, seed: int = 0) -> PreTrainedModel:
    """A tiny sparse decoder in float64, in which near ties are no ties."""
    return tiny_model(name, seed=seed).double()


def encoder_decoder(router: str) -> PreTrainedModel:
    """A tiny FlanMoeT5 in float64, its sides with different numbers of experts."""
    torch.manual_seed(0)
    kinds: dict[str, dict[str, Any]] = {
        "top_k": {"kind": "top_k.v1", "top_k": 2},
        "switch": {"kind": "switch.v1"},
        "gshard": {"kind": "gshard.v1"},
    }
    config = FlanMoeT5Config(
        vocab_size=_VOCABULARY,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=4,
        num_heads=4,
        encoder_router={**kinds[router], "num_experts": 4},
        decoder_router={**kinds[router], "num_experts": 3},
    )
    return FlanMoeT5ForConditionalGeneration(config).eval().double()


@dataclass(frozen=True)
class Row:
    """One example: token ids of its only side or of the encoder, and of the decoder; its group."""

    tokens: list[int]
    group: int
    target: list[int]


def rows(count: int = 6) -> list[Row]:
    """Rows of different lengths, in two of the three groups."""
    generator = torch.Generator().manual_seed(3)

    def draw(length: int) -> list[int]:
        return torch.randint(3, _VOCABULARY, (length,), generator=generator).tolist()

    lengths = [5, 9, 3, 12, 7, 4, 8, 6][:count]
    return [
        Row(draw(length), group=number % 2, target=draw(length // 2 + 1))
        for number, length in enumerate(lengths)
    ]


def _padded(lines: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, lines))
    ids = torch.tensor([[*line, *[0] * (width - len(line))] for line in lines])
    valid = torch.tensor([[place < len(line) for place in range(width)] for line in lines])
    return ids, valid


def _groups(given: Sequence[Row], valid: Tensor) -> Tensor:
    numbers = torch.tensor([row.group for row in given]).unsqueeze(1)
    # Padding may say anything.
    return torch.where(valid, numbers, 99).flatten()


def batch_of(model: PreTrainedModel, given: Sequence[Row]) -> StatisticsBatch:
    """Rows padded on the right to the longest."""
    ids, valid = _padded([row.tokens for row in given])
    if not model.config.is_encoder_decoder:
        return StatisticsBatch(
            inputs={"input_ids": ids, "attention_mask": valid.long()},
            valid={"decoder": valid.flatten()},
            groups={"decoder": _groups(given, valid)},
        )
    targets, target_valid = _padded([row.target for row in given])
    return StatisticsBatch(
        inputs={
            "input_ids": ids,
            "attention_mask": valid.long(),
            "decoder_input_ids": targets,
            "decoder_attention_mask": target_valid.long(),
        },
        valid={"encoder": valid.flatten(), "decoder": target_valid.flatten()},
        groups={"encoder": _groups(given, valid), "decoder": _groups(given, target_valid)},
    )


def batches_of(model: PreTrainedModel, given: Sequence[Row], size: int) -> list[StatisticsBatch]:
    """Rows in batches of `size`."""
    return [batch_of(model, given[start : start + size]) for start in range(0, len(given), size)]


@dataclass
class WrittenOut:
    """What one layer did, token by token and expert by expert. Sums by [group][expert]."""

    assignments: list[list[int]]
    gate_mass: list[list[float]]
    norms: list[list[float]]
    squared_norms: list[list[float]]
    gated_norms: list[list[float]]
    share_norms: list[list[float]]
    coactivation: list[list[list[int]]]
    largest_norm: list[float]
    outputs: Tensor
    logits: list[Tensor]
    groups: list[int]


def _nothing(num_experts: int, hidden_size: int) -> WrittenOut:
    def table(value: Any) -> list[list[Any]]:
        return [[value] * num_experts for _ in GROUPS]

    return WrittenOut(
        assignments=table(0),
        gate_mass=table(0.0),
        norms=table(0.0),
        squared_norms=table(0.0),
        gated_norms=table(0.0),
        share_norms=table(0.0),
        coactivation=[[[0] * num_experts for _ in range(num_experts)] for _ in GROUPS],
        largest_norm=[0.0] * num_experts,
        outputs=torch.zeros(num_experts, hidden_size, dtype=torch.double),
        logits=[],
        groups=[],
    )


def written_out(model: PreTrainedModel, given: Sequence[StatisticsBatch]) -> list[WrittenOut]:
    """The definition of statistics: each output computed by itself, for one token and one expert."""
    blocks = moe_blocks(model)
    found = [_nothing(block.num_experts, block.hidden_size) for block in blocks]
    for batch in given:
        seen: dict[int, dict[str, Any]] = {place: {} for place in range(len(blocks))}
        hooks = []
        for place, block in enumerate(blocks):
            own = seen[place]
            hooks.append(
                block.experts.register_forward_pre_hook(
                    lambda _, arguments, own=own: own.update(arguments=arguments)
                )
            )
            hooks.append(
                block.router.register_forward_hook(
                    lambda _, __, returned, own=own: own.update(returned=returned)
                )
            )
        with torch.no_grad():
            model(**batch.inputs, use_cache=False)
        for hook in hooks:
            hook.remove()
        for place, block in enumerate(blocks):
            side = "encoder" if block.name.startswith("encoder.") else "decoder"
            returned = seen[place]["returned"]
            logits = returned.logits if isinstance(returned, Routing) else returned[0]
            fused = (
                block.experts.fused()
                if isinstance(block.experts, Experts)
                else fused_experts(block.experts)
            )
            _add(
                found[place],
                logits.reshape(-1, block.num_experts),
                seen[place]["arguments"],
                fused,
                batch.valid[side].tolist(),
                batch.groups[side].tolist(),
            )
    return found


@torch.no_grad()
def _add(
    found: WrittenOut,
    logits: Tensor,
    arguments: tuple[Tensor, Tensor, Tensor],
    fused: FusedExperts,
    valid: list[bool],
    groups: list[int],
) -> None:
    hidden, expert_ids, gates = arguments
    for token, is_real in enumerate(valid):
        if not is_real:
            continue
        group = groups[token]
        found.logits.append(logits[token])
        found.groups.append(group)
        chosen = [
            (int(expert), float(gate))
            for expert, gate in zip(expert_ids[token], gates[token], strict=True)
            if int(expert) < fused.num_experts
        ]
        for expert, gate in chosen:
            output = expert_ffn_reference(
                hidden[token : token + 1],
                torch.tensor([[expert]]),
                torch.ones(1, 1, dtype=hidden.dtype),
                fused,
            )[0]
            norm = float(sum(float(value) ** 2 for value in output)) ** 0.5
            found.assignments[group][expert] += 1
            found.gate_mass[group][expert] += gate
            found.norms[group][expert] += norm
            found.squared_norms[group][expert] += norm**2
            found.gated_norms[group][expert] += gate * norm
            found.share_norms[group][expert] += gate / sum(one for _, one in chosen) * norm
            found.largest_norm[expert] = max(found.largest_norm[expert], norm)
            found.outputs[expert] += output
            for other, _ in chosen:
                found.coactivation[group][expert][other] += 1
