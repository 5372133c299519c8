"""Writing adapters as PEFT does: they load with `peft.PeftModel.from_pretrained` on the plain native model.

PEFT has one rank and one scale for all parameters, no dropout and no shared A on them. What is saved computes
the same all the same (`flanmoe.tuners.peft_layout`); dropout does not matter once training is over.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from flanmoe.core.files import whole_folder
from flanmoe.moe.compute.low_rank import LowRankExperts
from flanmoe.tuners.expert_matrices import MATRICES, parameter_name
from flanmoe.tuners.linear_layers import ADAPTER, LinearLayers, PeftLayer, factors_of, plain_alpha
from flanmoe.tuners.peft_layout import PeftScale, common_scale, padded, to_peft

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# What PEFT puts before the path of a module in the model.
PREFIX = "base_model.model."
WRAPPED = ".base_layer"


def write_adapter(
    model: PreTrainedModel,
    changes: Mapping[str, LowRankExperts],
    linear: LinearLayers,
    folder: Path,
) -> None:
    """Write low-rank changes of a model as an adapter of PEFT.

    Args:
        model: the model, without the changes or with them.
        changes: by the path of an experts module, the changes of its experts.
        linear: those of layers beside the experts.
        folder: is replaced; holds `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        DiskError: if it cannot be written.
    """
    factors = [one for change in changes.values() for one in change.factors.values()]
    routers = [linear.layers[path] for path in linear.routers]
    saved = common_scale(factors, [layer.r[ADAPTER] for layer in routers])
    tensors = {**_of_experts(model, changes, saved), **_of_layers(linear, saved)}
    config = _config(model, changes, linear, saved)
    with whole_folder(folder, marker=ADAPTER_CONFIG) as partial:
        save_file(tensors, partial / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(partial))


def nested(experts: nn.Module, names: Collection[str]) -> list[str]:
    """Return the wrapped parameters of a module in the order of PEFT's nesting, the innermost first."""
    return [name for name, _ in experts.named_parameters(recurse=False) if name in names]


def _of_experts(
    model: nn.Module, changes: Mapping[str, LowRankExperts], saved: PeftScale
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path, change in changes.items():
        experts = model.get_submodule(path)
        by_name = _parameters(experts, change)
        order = nested(experts, by_name)
        for place, name in enumerate(order):
            wrapped = WRAPPED * (len(order) - 1 - place)
            matrices = to_peft(change.factors[by_name[name]], saved)
            tensors |= _named(f"{path}{wrapped}", matrices)
    return tensors


def _parameters(experts: nn.Module, change: LowRankExperts) -> dict[str, str]:
    """Return the names of the changed parameters of an experts module, with those of their matrices."""
    return {
        parameter_name(experts, matrix): matrix for matrix in MATRICES if matrix in change.factors
    }


def _of_layers(linear: LinearLayers, saved: PeftScale) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    routers = set(linear.routers)
    for path, layer in linear.layers.items():
        a, b = (factor.detach() for factor in factors_of(layer))
        if path in routers:
            a, b = padded(a, b, layer.scaling[ADAPTER], saved)
        tensors |= _named(path, (a, b))
    return tensors


def _named(path: str, matrices: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return {
        f"{PREFIX}{path}.lora_{name}.weight": matrix.detach().cpu().contiguous()
        for name, matrix in zip("AB", matrices, strict=True)
    }


def _config(
    model: PreTrainedModel,
    changes: Mapping[str, LowRankExperts],
    linear: LinearLayers,
    saved: PeftScale,
) -> LoraConfig:
    parameters = {
        f"{path}.{name}"
        for path, change in changes.items()
        for name in _parameters(model.get_submodule(path), change)
    } | {f"{path}.weight" for path in linear.routers}
    layers = {
        path: layer for path, layer in linear.layers.items() if path not in set(linear.routers)
    }
    module_names = [name for name, _ in _unwrapped(model.named_modules())]
    parameter_names = [name for name, _ in _unwrapped(model.named_parameters())]
    # A pattern is compared with the names of parameters as well.
    pattern_names = _short_names(layers, [*module_names, *parameter_names])
    alpha = plain_alpha(saved.alpha)
    return LoraConfig(
        r=saved.rank,
        lora_alpha=alpha,
        use_rslora=saved.rank_stabilised,
        target_modules=sorted(set(_short_names(layers, module_names).values())),
        target_parameters=sorted(set(_short_names(parameters, parameter_names, parts=2).values())),
        rank_pattern=_pattern(layers, pattern_names, lambda layer: layer.r[ADAPTER], saved.rank),
        alpha_pattern=_pattern(layers, pattern_names, lambda layer: _alpha(layer, saved), alpha),
        base_model_name_or_path=model.name_or_path or None,
        inference_mode=True,
    )


def _unwrapped(named: Iterable[tuple[str, Any]]) -> Iterable[tuple[str, Any]]:
    """Go through names as they are in the native model."""
    return ((name.replace(WRAPPED, ""), value) for name, value in named)


def _short_names(
    wanted: Iterable[str], known: Collection[str], *, parts: int = 1
) -> dict[str, str]:
    """Return for each path its last parts where these name nothing that is not wanted, else the path."""
    paths = set(wanted)
    short: dict[str, str] = {}
    for path in paths:
        end = ".".join(path.split(".")[-parts:])
        also = {name for name in known if name == end or name.endswith(f".{end}")}
        short[path] = end if also <= paths else path
    return short


def _pattern(
    layers: Mapping[str, PeftLayer],
    names: Mapping[str, str],
    value_of: Callable[[PeftLayer], Any],
    usual: Any,
) -> dict[str, Any]:
    """Return the values that are not the usual one, by the names of their layers.

    Layers of one short name that differ are named by their paths.
    """
    values = {path: value_of(layer) for path, layer in layers.items()}
    found: dict[str, Any] = {}
    for path, value in values.items():
        alike = {values[other] for other in values if names[other] == names[path]}
        if len(alike) > 1 or value != usual:
            found[names[path] if len(alike) == 1 else path] = value
    return found


def _alpha(layer: PeftLayer, saved: PeftScale) -> Any:
    """Return the alpha that gives a layer its scale under the rule of the adapter."""
    rank = layer.r[ADAPTER]
    return plain_alpha(
        float(layer.scaling[ADAPTER]) * rank ** (0.5 if saved.rank_stabilised else 1.0)
    )
