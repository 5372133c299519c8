"""Equal weights hash equal; any other weight, name or type does not."""

import torch

from flanmoe.models.model_hash import model_hash
from flanmoe.testing.tiny_models import tiny_model


def test_the_hash_follows_the_weights() -> None:
    model = tiny_model("mixtral")
    before = model_hash(model)
    assert before == model_hash(tiny_model("mixtral"))
    assert before != model_hash(tiny_model("mixtral", seed=1))
    assert before != model_hash(tiny_model("mixtral").to(torch.bfloat16))
    with torch.no_grad():
        list(model.parameters())[3].view(-1)[-1].add_(1e-6)
    assert model_hash(model) != before


def test_the_hash_tells_names_apart() -> None:
    one, other = torch.nn.Module(), torch.nn.Module()
    one.register_parameter("left", torch.nn.Parameter(torch.ones(2)))
    other.register_parameter("right", torch.nn.Parameter(torch.ones(2)))
    assert model_hash(one) != model_hash(other)
