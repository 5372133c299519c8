"""flanmoe's expert compute in every family of transformers that uses the experts interface, against `eager`.

Families are found by reading the installed modelling files; each is built at a tiny size from its own
configuration class. A family that cannot be built so is skipped by name, with the reason.
"""

import functools
import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from flanmoe.models.experts_interface import (
    EXPERTS_IMPLEMENTATION,
    experts_forward,
    register_experts_implementation,
)

pytestmark = pytest.mark.slow

_DECORATOR = "@use_experts_implementation"
# What a configuration is asked for, as far as it knows the name.
_SMALL = {
    **dict.fromkeys(("hidden_size", "vocab_size_per_layer_input", "out_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size"), 48),
    **dict.fromkeys(
        ("moe_intermediate_size", "expert_ffn_hidden_size", "shared_intermediate_size"), 16
    ),
    "shared_expert_intermediate_size": 16,
    **dict.fromkeys(("num_hidden_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 0),
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "sliding_window": 16,
    "hidden_size_per_layer_input": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Larger ones have a size that none of the names above sets.
_MOST_PARAMETERS = 2_500_000
_FEWEST_FAMILIES = 20


class Built(NamedTuple):
    """A family's tiny model, or the reason why there is none."""

    model: PreTrainedModel | None
    reason: str


def _files() -> dict[str, Path]:
    """Return the modelling file of each family whose experts use the interface."""
    folder = Path(transformers.__file__).parent / "models"
    return {
        path.parent.name: path
        for path in sorted(folder.glob("*/modeling_*.py"))
        if _DECORATOR in path.read_text(encoding="utf-8")
    }


_FAMILIES = _files()


def _model_class(module: Any) -> type[PreTrainedModel] | None:
    """Return the family's causal language model, or its text model without a head."""
    own = {
        name: value
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, PreTrainedModel)
        and value.__module__ == module.__name__
        and not name.endswith("PreTrainedModel")
    }
    for ending in ("ForCausalLM", "TextModel", "Model"):
        found = [value for name, value in own.items() if name.endswith(ending)]
        if found:
            return found[0]
    return None


def _small_config(config_class: type) -> Any:
    known = vars(config_class())
    return config_class(**{name: value for name, value in _SMALL.items() if name in known})


def _tokens() -> Tensor:
    return torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))


def _output(model: PreTrainedModel) -> Tensor:
    return model(input_ids=_tokens(), use_cache=False)[0]


@contextmanager
def _counted() -> Iterator[list[int]]:
    """Yield a list that grows with every call of flanmoe's experts."""
    register_experts_implementation()
    calls: list[int] = []

    def counting(module: Any, *arguments: Any) -> Tensor:
        calls.append(module.num_experts)
        return experts_forward(module, *arguments)

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, counting)
    try:
        yield calls
    finally:
        ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)


@functools.cache
def _built(family: str) -> Built:
    """Build a family's tiny model, which runs with transformers' own experts."""
    path = _FAMILIES[family]
    module = importlib.import_module(f"transformers.models.{family}.{path.stem}")
    model_class = _model_class(module)
    if model_class is None:
        return Built(None, "no causal or text model")
    try:
        config = _small_config(model_class.config_class)
        with torch.device("meta"):
            on_meta = model_class._from_config(config, attn_implementation="eager")
        number = sum(parameter.numel() for parameter in on_meta.parameters())
        if number > _MOST_PARAMETERS:
            return Built(None, f"{number} parameters at the tiny size")
        model = model_class._from_config(config, attn_implementation="eager").double().eval()
        _draw(model)
        model.set_experts_implementation("eager")
        output = _output(model)
    # Whatever a foreign configuration or forward pass objects to.
    except Exception as error:
        return Built(None, f"{type(error).__name__}: {str(error)[:120]}")
    return Built(model, "") if output.isfinite().all() else Built(None, "not finite")


def _draw(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)


def _step(model: PreTrainedModel, implementation: str) -> tuple[Tensor, dict[str, Tensor]]:
    model.set_experts_implementation(implementation)
    model.zero_grad()
    output = _output(model)
    output.square().mean().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.detach(), gradients


@pytest.mark.parametrize("family", _FAMILIES)
def test_logits_and_gradients_equal_eager(family: str) -> None:
    model, reason = _built(family)
    if model is None:
        pytest.skip(f"{family} cannot be built at a tiny size: {reason}")
    with _counted() as calls:
        ours = _step(model, EXPERTS_IMPLEMENTATION)
    if not calls:
        pytest.skip(f"{family} has no sparse layer at a tiny size")
    theirs = _step(model, "eager")
    # Some families compute parts in float32 whatever the model's precision.
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    assert ours[1].keys() == theirs[1].keys()
    for name, expected in theirs[1].items():
        scale = max(expected.abs().max().item(), 1e-12)
        difference = (ours[1][name] - expected).abs().max().item()
        assert difference <= 1e-5 * scale, f"{name}: {difference} beside gradients up to {scale}"


def test_at_least_twenty_families_are_compared() -> None:
    compared = []
    with _counted() as calls, torch.no_grad():
        for family in _FAMILIES:
            model = _built(family).model
            if model is not None:
                model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
                before = len(calls)
                _output(model)
                compared += [family] if len(calls) > before else []
    assert len(compared) >= _FEWEST_FAMILIES, compared
