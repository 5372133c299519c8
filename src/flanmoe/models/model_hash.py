"""A hash of a model's weights, so that a result says which weights it belongs to."""

import hashlib

import torch
from torch import nn

HASH_BYTES = 12


def model_hash(model: nn.Module) -> str:
    """Hash every saved tensor of a model: name, type, shape and bytes. Equal weights, equal hash.

    Reads each weight once, about a second per gigabyte.
    """
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()
