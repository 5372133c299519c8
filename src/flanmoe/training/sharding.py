"""A model whose weights are spread over processes while it trains (PyTorch's FSDP2).

Every process holds a part of each weight, of its gradient and of its optimizer state; a layer is
gathered when it runs and let go afterwards. `fully_shard` is called from here and not through
accelerate, which leaves it out on the CPU without a word and computes with weights in bfloat16,
routers included (docs/decisions/0007). The arithmetic is that of training without sharding: weights
and gradients stay in float32, autocast does the rest.

All functions here but `layers_of` and `refuse_other_sharding` are collective: every process must
call them.
"""

import copy
import os
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainingArguments

from flanmoe.core.errors import ConfigError, ModelError

Sharding = Literal["none", "fsdp"]


def refuse_other_sharding(args: TrainingArguments) -> None:
    """Refuse FSDP and DeepSpeed that something else has switched on.

    Raises:
        ConfigError: if one of them is on.
    """
    # What `accelerate launch` sets; on the CPU accelerate itself would leave FSDP out in silence.
    names = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    is_launched = any(os.environ.get(name, "").lower() == "true" for name in names)
    if is_launched or args.fsdp or args.deepspeed:
        raise ConfigError(
            "Tuning spreads a model by itself where `sharding: fsdp` is set, but FSDP or DeepSpeed "
            "is switched on from outside, which is not supported. Launch with torchrun and without "
            "it."
        )


def sharded_copy(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Return a copy of a model that holds this process's part of the weights.

    The model itself is left without weights until `give_back`, so that they take no memory twice.

    Args:
        model: the whole model, the same in every process.
        device: where this process computes.

    Raises:
        ModelError: if its layers cannot be found.
    """
    layers_of(model)
    sharded = _copy_without_weights(model)
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for module in (*layers_of(sharded), *_embeddings(sharded), sharded):
        fully_shard(module, mesh=mesh)
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)
    return sharded


def give_back(sharded: PreTrainedModel, *, to: PreTrainedModel) -> None:
    """Gather the weights of a sharded copy into the model it was made from, on the CPU."""
    weights = sharded.state_dict()
    for name, own in to.state_dict(keep_vars=True).items():
        own.data = whole(weights[name]).cpu()


def full_weights(sharded: PreTrainedModel) -> dict[str, Tensor]:
    """Return the whole weights on the CPU of the first process, and nothing on the others."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(sharded, options=options))


def set_full_weights(sharded: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Overwrite the weights of a sharded copy with whole ones of the first process.

    Args:
        sharded: what `sharded_copy` returned.
        weights: every weight by its name on the first process; not looked at on the others.
    """
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(sharded, cast(dict[str, Any], weights), options=options)


def whole(value: Tensor) -> Tensor:
    """Return a tensor with the parts of all processes; one that is not spread as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layers of a model: its outermost list of modules of the configured length.

    Raises:
        ModelError: if there is no such list.
    """
    expected = model.config.num_hidden_layers
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for module in lists:
        if len(module) == expected:
            return list(module)
    raise ModelError(
        f"`sharding: fsdp` needs a model with a list of its {expected} layers, but the lists of "
        f"{type(model).__name__} have the lengths {[len(module) for module in lists]}. Set "
        "`sharding: none`."
    )


def _copy_without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Copy everything but the memory of the weights, which both models then look at."""
    own: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, own)


def _embeddings(model: PreTrainedModel) -> Sequence[nn.Module]:
    """Return the embedding and the head; none if they share a weight, which is not to be split."""
    embedding, head = model.get_input_embeddings(), cast(nn.Module, model.get_output_embeddings())
    return [] if embedding.weight is head.weight else [embedding, head]
