"""Weights of a checkpoint where a tuner trains: those that train, and not the frozen model around them."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed
from transformers import PreTrainedModel

from flanmoe.core.errors import RunError
from flanmoe.training.sharding import Sharding, full_weights, set_full_weights

_WEIGHTS_FILE = "trained.safetensors"


def save_trained(
    model: PreTrainedModel, checkpoint: Path, *, sharding: Sharding, is_writer: bool
) -> None:
    """Write the weights that train; every process must call it where the model is sharded."""
    names = _trained(model)
    weights = full_weights(model) if sharding == "fsdp" else model.state_dict()
    if is_writer:
        found = {name: weights[name].detach().cpu().contiguous() for name in names}
        save_file(found, checkpoint / _WEIGHTS_FILE, metadata={"format": "pt"})


def load_trained(model: PreTrainedModel, checkpoint: Path, *, sharding: Sharding) -> None:
    """Take over what `save_trained` wrote; every process must call it where the model is sharded.

    Raises:
        RunError: if the checkpoint is of something else than what trains in the model.
    """
    saved = load_file(checkpoint / _WEIGHTS_FILE)
    own = _trained(model)
    different = sorted(
        name
        for name in own.keys() | saved.keys()
        if name not in own or name not in saved or own[name].shape != saved[name].shape
    )
    if different:
        raise RunError(
            f"The checkpoint {checkpoint} must hold the {len(own)} weights that the tuner trains, but "
            f"{len(different)} differ, the first is {different[0]}. Start a new run."
        )
    if sharding == "fsdp":
        weights = full_weights(model)
        is_first = distributed.get_rank() == 0
        set_full_weights(model, {**weights, **saved} if is_first else weights)
        return
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])


def _trained(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
