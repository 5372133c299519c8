"""Reading adapters that PEFT or `write_adapter` wrote into low-rank changes of a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from flanmoe.core.errors import ModelError
from flanmoe.core.names import listing
from flanmoe.models.blocks import require_moe_blocks
from flanmoe.models.loading import loading_errors
from flanmoe.moe.block import MoEBlock
from flanmoe.moe.compute.low_rank import LowRankExperts, LowRankFactors
from flanmoe.tuners.adapter_saving import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PREFIX,
    WRAPPED,
    nested,
)
from flanmoe.tuners.attached import require_tunable_experts
from flanmoe.tuners.expert_matrices import MATRICES, ExpertMatrix, parameter_name, stored_matrices
from flanmoe.tuners.linear_layers import factors_of, peft_settings
from flanmoe.tuners.low_rank import LowRankTuner
from flanmoe.tuners.peft_layout import fill


class _Pair(NamedTuple):
    """A and B of one change, as they are in the file."""

    a: Float[Tensor, "_ n"]
    b: Float[Tensor, "m _"]


def load_adapter(model: PreTrainedModel, folder: Path) -> LowRankTuner:
    """Put an adapter of PEFT into a sparse model; everything else is frozen.

    Args:
        model: the native model that it was trained on, running flanmoe's compute.
        folder: what PEFT's `save_pretrained` or `LowRankTuner.save` wrote.

    Raises:
        ModelError: if the folder holds no LoRA adapter, or one that does not suit the model.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(
            f"An adapter folder must hold {ADAPTER_CONFIG}, but {folder} has none. Name a folder that PEFT or "
            "flanmoe wrote."
        )
    with loading_errors(str(folder), "adapter"):
        config = PeftConfig.from_pretrained(str(folder))
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    if not isinstance(config, LoraConfig):
        raise ModelError(
            f"flanmoe reads LoRA adapters, but {folder} holds one of the kind {config.peft_type}. Use it "
            "with PEFT."
        )
    return _attached(model, config, _pairs(tensors, folder))


def _pairs(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, _Pair]:
    """Return A and B by the path of PEFT's layer, `base_layer`s included."""
    paths = {
        name.removeprefix(PREFIX).removesuffix(f".lora_{kind}.weight")
        for name in tensors
        for kind in "AB"
        if name.endswith(f".lora_{kind}.weight")
    }
    expected = {f"{PREFIX}{path}.lora_{kind}.weight" for path in paths for kind in "AB"}
    if expected != tensors.keys():
        raise ModelError(
            f"An adapter must hold pairs of `lora_A` and `lora_B` alone, but {folder} also holds or lacks "
            f"{listing(sorted(expected ^ tensors.keys()), limit=4)}. Biases, DoRA and whole modules are not "
            "read; use it with PEFT."
        )
    return {
        path: _Pair(*(tensors[f"{PREFIX}{path}.lora_{kind}.weight"] for kind in "AB"))
        for path in sorted(paths)
    }


def _attached(
    model: PreTrainedModel, config: LoraConfig, pairs: Mapping[str, _Pair]
) -> LowRankTuner:
    blocks = {_path(model, block.experts): block for block in require_moe_blocks(model)}
    by_module: dict[str, dict[int, _Pair]] = {}
    for path, pair in pairs.items():
        by_module.setdefault(path.replace(WRAPPED, ""), {})[path.count(WRAPPED)] = pair
    changes: dict[str, LowRankExperts] = {}
    linear: dict[str, LoraConfig] = {}
    for path, found in by_module.items():
        if path in blocks:
            require_tunable_experts(blocks[path])
            changes[blocks[path].name] = _change(blocks[path], path, config, found)
        else:
            linear[path] = _linear(model, path, config, found)
    tuner = LowRankTuner(model, changes, linear)
    with torch.no_grad():
        for path, layer in tuner.linear.layers.items():
            for factor, saved in zip(factors_of(layer), by_module[path][0], strict=True):
                factor.copy_(saved)
    return tuner


def _change(
    block: MoEBlock, path: str, config: LoraConfig, found: Mapping[int, _Pair]
) -> LowRankExperts:
    experts = block.experts
    matrices: dict[str, ExpertMatrix] = {
        parameter_name(experts, matrix): matrix for matrix in MATRICES
    }
    targets = tuple(config.target_parameters or ())
    chosen = {
        name
        for name in matrices
        if any(f".{path}.{name}".endswith(f".{target}") for target in targets)
    }
    order = nested(experts, chosen)
    if sorted(found) != list(range(len(order))):
        raise ModelError(
            f"An adapter must hold 1 pair of matrices for each parameter of {path} that its "
            f"`target_parameters` name, which are {listing(order) or 'none'}, but holds {len(found)}. It was "
            "trained on experts that are stored in another way; load it with PEFT and save it again."
        )
    factors: dict[ExpertMatrix, LowRankFactors] = {
        matrices[name]: _factors(
            experts, matrices[name], f"{path}.{name}", config, found[len(order) - 1 - place]
        )
        for place, name in enumerate(order)
    }
    return LowRankExperts(factors.get("gate_up"), factors.get("down"))


def _factors(
    experts: nn.Module, matrix: ExpertMatrix, path: str, config: LoraConfig, pair: _Pair
) -> LowRankFactors:
    stored = stored_matrices(experts, matrix)
    num_experts, outputs, inputs = stored.shape
    rank = len(pair.a) // num_experts
    expected = ((rank * num_experts, inputs), (outputs, rank * num_experts))
    if rank == 0 or (pair.a.shape, pair.b.shape) != expected:
        raise ModelError(
            f"An adapter of {path} must hold matrices of shapes (rank x {num_experts}, {inputs}) and "
            f"({outputs}, rank x {num_experts}), but holds {tuple(pair.a.shape)} and {tuple(pair.b.shape)}. "
            "Name the model that it was trained on."
        )
    factors = LowRankFactors(
        (rank,) * num_experts,
        alpha=_alpha(config, path),
        rank_stabilised=config.use_rslora,
        inputs=inputs,
        outputs=outputs,
        shared_a=False,
        device=stored.device,
        dtype=torch.promote_types(stored.dtype, torch.float32),
    )
    fill(factors, pair.a, pair.b)
    return factors


def _linear(
    model: nn.Module, path: str, config: LoraConfig, found: Mapping[int, _Pair]
) -> LoraConfig:
    module = _submodule(model, path)
    weight = None if module is None else dict(module.named_parameters(recurse=False)).get("weight")
    pair = found.get(0)
    suits = (
        weight is not None
        and weight.ndim == 2
        and len(found) == 1
        and pair is not None
        and (pair.b.shape[0], pair.a.shape[1]) == tuple(weight.shape)
    )
    if not suits or pair is None:
        raise ModelError(
            f"An adapter must be of experts, linear layers and routers of the model, but holds a change of "
            f"{path}, which {'is not there' if module is None else 'is none of them or has another shape'}. "
            "Name the model that it was trained on."
        )
    is_router = not isinstance(module, nn.Linear)
    alpha = _alpha(config, f"{path}.weight" if is_router else path)
    return peft_settings(len(pair.a), alpha, rank_stabilised=config.use_rslora)


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    return dict(model.named_modules()).get(path)


def _alpha(config: LoraConfig, path: str) -> float:
    patterns: dict[str, Any] = config.alpha_pattern or {}
    return float(patterns.get(get_pattern_key(list(patterns), path), config.lora_alpha))


def _path(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, found in model.named_modules() if found is module)
