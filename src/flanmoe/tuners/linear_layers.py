"""Low-rank changes of linear layers and routers beside the experts: PEFT's own layers, put in by name.

PEFT replaces a layer by one that holds it. Only its layer classes are used, not its models: those read
names such as `gate_proj` as names of experts in some families, shared experts included.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear, ParamWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from pydantic import Field, field_validator, model_validator
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from flanmoe.core.config import Config
from flanmoe.core.errors import ModelError
from flanmoe.core.names import listing, nearest_name_hint
from flanmoe.models.blocks import moe_blocks

# PEFT's name of the adapter that is there when nobody names one.
ADAPTER = "default"

PeftLayer = Linear | ParamWrapper


class LinearConfig(Config):
    """Low-rank changes of layers beside the experts.

    Attributes:
        targets: names of linear layers, each a whole path in the model or the end of one
            (`q_proj`, `self_attn.o_proj`).
        router: whether routers are changed too.
        rank: of every change.
        alpha: scales a change by alpha / rank.
        dropout: share of the inputs of a change that is set to 0 while it trains; routers have none.
    """

    targets: tuple[str, ...] = ()
    router: bool = False
    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @field_validator("targets")
    @classmethod
    def _named_once(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({name for name in targets if targets.count(name) > 1})
        if twice:
            raise ValueError(
                f"must name each layer once, but found {listing(twice)} more than once"
            )
        return targets

    @model_validator(mode="after")
    def _changes_something(self) -> "LinearConfig":
        if not self.targets and not self.router:
            raise ValueError(
                "must name `targets` or set `router: true`, but found neither; leave `linear` out"
            )
        return self


def matched_layers(model: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """Return the paths of the linear layers that the targets name, in the order of the model.

    Raises:
        ModelError: if a target names no linear layer, with what there is and what comes nearest; or if
            PEFT would take its name for that of experts.
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(_names(target, layer) for layer in layers):
            known = list(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))
            raise ModelError(
                f"`linear.targets` must each name at least 1 linear layer of {type(model).__name__}, but "
                f"`{target}` names 0.{nearest_name_hint(target, [*known, *layers])} There are {listing(known)}."
            )
    _require_same_meaning(model, targets)
    return [layer for layer in layers if any(_names(target, layer) for target in targets)]


def _names(target: str, layer: str) -> bool:
    return layer == target or layer.endswith(f".{target}")


def _require_same_meaning(model: PreTrainedModel, targets: Sequence[str]) -> None:
    """Refuse targets whose saved adapter PEFT would put into experts."""
    config = LoraConfig(target_modules=list(targets), target_parameters=[])
    conversions = get_model_conversion_mapping(model)
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=conversions)
        taken = set(targets) - set(config.target_modules or ())
    except ValueError:
        # Some of the names of fused experts without the others.
        taken = set(targets)
    if taken:
        raise ModelError(
            f"`linear.targets` must not be names that PEFT reads as those of experts in "
            f"{type(model).__name__}, but {listing(sorted(taken))} are: what is saved could not be loaded "
            "there. Leave them out; `matrices` names those of the experts."
        )


def router_paths(model: PreTrainedModel) -> list[str]:
    """Return the paths of the routers of a model, each with a matrix `weight`.

    Raises:
        ModelError: if a router keeps its matrix elsewhere.
    """
    paths = {id(module): name for name, module in model.named_modules()}
    found = [paths[id(block.router)] for block in moe_blocks(model)]
    for path in found:
        own = dict(model.get_submodule(path).named_parameters(recurse=False))
        if "weight" not in own:
            raise ModelError(
                "`linear.router: true` needs routers with a matrix `weight` of their own, but "
                f"{path} ({type(model.get_submodule(path)).__name__}) has {listing(own) or 'none'}. Set it to "
                "false."
            )
    return found


def linear_settings(model: PreTrainedModel, config: LinearConfig | None) -> dict[str, LoraConfig]:
    """Return what is asked for of each layer, by its path.

    Raises:
        ModelError: if a target matches nothing or cannot be changed.
    """
    if config is None:
        return {}
    return {
        **dict.fromkeys(
            matched_layers(model, config.targets),
            peft_settings(config.rank, config.alpha, dropout=config.dropout),
        ),
        **dict.fromkeys(
            router_paths(model) if config.router else (), peft_settings(config.rank, config.alpha)
        ),
    }


def peft_settings(
    rank: int, alpha: float, *, rank_stabilised: bool = False, dropout: float = 0.0
) -> LoraConfig:
    """Return PEFT's settings of one layer."""
    return LoraConfig(
        r=rank, lora_alpha=plain_alpha(alpha), use_rslora=rank_stabilised, lora_dropout=dropout
    )


def plain_alpha(alpha: float) -> Any:
    """Return alpha as PEFT writes it: without a fraction where it has none.

    PEFT annotates a whole number and takes any.
    """
    return int(alpha) if alpha.is_integer() else alpha


class LinearLayers:
    """Layers of PEFT in a model, by the paths of the layers that they replace.

    Args:
        model: the model.
        settings: by path, what is asked for of each.
    """

    def __init__(self, model: PreTrainedModel, settings: Mapping[str, LoraConfig]) -> None:
        self._model = model
        self._orders = {
            path: [name for name, _ in model.get_submodule(path).named_parameters(recurse=False)]
            for path in settings
        }
        for path, config in settings.items():
            _put(model, path, _wrapped(model.get_submodule(path), config))
        self.layers: dict[str, PeftLayer] = {
            path: cast(PeftLayer, model.get_submodule(path)) for path in settings
        }

    def draw(self, generator: torch.Generator) -> None:
        """Begin with changes of nothing: A drawn as PEFT does, B of zeros."""
        for layer in self.layers.values():
            _draw(layer, generator)

    @property
    def routers(self) -> list[str]:
        """Paths of those that are routers."""
        return [path for path, layer in self.layers.items() if isinstance(layer, ParamWrapper)]

    @property
    def parameters(self) -> Iterator[nn.Parameter]:
        """The matrices A and B of all layers."""
        for layer in self.layers.values():
            yield from factors_of(layer)

    def merge(self) -> list[str]:
        """Add every change to the layer that it is of; returns the paths of those that stayed as they were.

        A change of nothing is no reason to be among them.
        """
        unmoved: list[str] = []
        for path, layer in self.layers.items():
            weight = layer.get_base_layer().get_parameter("weight")
            before = weight.detach().clone()
            has_change = bool(layer.get_delta_weight(ADAPTER).any())
            layer.merge(safe_merge=True)
            if has_change and torch.equal(before, layer.get_base_layer().get_parameter("weight")):
                unmoved.append(path)
        return unmoved

    def take_off(self) -> None:
        """Put the original layers back into their places."""
        for path, layer in self.layers.items():
            original = layer.get_base_layer()
            # PEFT takes a router's matrix out and puts it back behind the other parameters.
            for name in self._orders[path]:
                parameter = original.get_parameter(name)
                delattr(original, name)
                original.register_parameter(name, parameter)
            _put(self._model, path, original)


def factors_of(layer: PeftLayer) -> tuple[nn.Parameter, nn.Parameter]:
    """Return A (r, inputs) and B (outputs, r) of one of PEFT's layers."""
    a, b = (cast(nn.Module, one[ADAPTER]) for one in (layer.lora_A, layer.lora_B))
    return a.get_parameter("weight"), b.get_parameter("weight")


def _wrapped(layer: nn.Module, config: LoraConfig) -> nn.Module:
    sizes: dict[str, Any] = {"r": config.r, "lora_alpha": config.lora_alpha}
    if isinstance(layer, nn.Linear):
        wrapped: PeftLayer = Linear(layer, ADAPTER, config=config, **sizes)
    else:
        wrapped = ParamWrapper(layer, ADAPTER, parameter_name="weight", config=config, **sizes)
    for parameter in factors_of(wrapped):
        # PEFT takes the precision of the layer; what trains has 32 bits at least.
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        parameter.requires_grad_(True)
    return wrapped.train(layer.training)


@torch.no_grad()
def _draw(layer: PeftLayer, generator: torch.Generator) -> None:
    a, b = factors_of(layer)
    drawn = torch.rand(a.shape, generator=generator, dtype=torch.float32)
    a.copy_((2 * drawn - 1) * a.shape[1] ** -0.5)
    b.zero_()


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
