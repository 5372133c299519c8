"""Expert dropout: dropout on the hidden units inside experts, apart from a model's other dropout.

It lies between the gated activation and the down projection of every routed expert (Switch, Fedus
et al. 2021, arXiv 2101.03961; the same place in Flaxformer and T5X). Shared experts, attention and
embeddings keep the dropout that the model's configuration gives them.
"""

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn

from flanmoe.core.errors import ConfigError, ModelError
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.own_compute import require_own_compute
from flanmoe.moe.compute import hidden_dropout, set_hidden_dropout


def check_expert_dropout(model: nn.Module, rate: float) -> None:
    """Refuse a rate that this model cannot have; every model can have 0.

    Raises:
        ConfigError: if the rate is not at least 0 and below 1.
        ModelError: if the rate is above 0 and the model is dense.
    """
    if not 0 <= rate < 1:
        raise ConfigError(
            f"`expert_dropout` must be at least 0 and below 1, but is {rate}. Choose a rate such "
            "as 0.1."
        )
    if rate > 0 and not moe_blocks(model):
        raise ModelError(
            f"`expert_dropout` needs a sparse model where it is above 0, but is {rate} for "
            f"{type(model).__name__}, which is dense. Set it to 0, or make the model sparse first "
            "with `flanmoe upcycle`."
        )


def set_expert_dropout(model: nn.Module, rate: float) -> None:
    """Drop a share of every routed expert's hidden units whenever the model trains; 0 turns it off.

    What is kept is scaled up by 1 / (1 - rate). In evaluation mode nothing is dropped. Draws come
    from torch's global generator of the device.

    Raises:
        ConfigError: if the rate is not at least 0 and below 1.
        ModelError: if the rate is above 0 and the model is dense or its experts run something else
            than flanmoe's compute.
    """
    check_expert_dropout(model, rate)
    blocks = moe_blocks(model)
    if rate > 0:
        for block in blocks:
            require_own_compute(block, need="Expert dropout needs experts that")
    for block in blocks:
        set_hidden_dropout(block.experts, rate)


@contextmanager
def expert_dropout(model: nn.Module, rate: float | None) -> Generator[None]:
    """Train with a rate of expert dropout inside the `with` block, as before it afterwards.

    Without a rate nothing changes.

    Raises:
        ConfigError, ModelError: as `set_expert_dropout` does.
    """
    if rate is None:
        yield
        return
    experts = [block.experts for block in moe_blocks(model)]
    before = [hidden_dropout(module) for module in experts]
    set_expert_dropout(model, rate)
    try:
        yield
    finally:
        for module, value in zip(experts, before, strict=True):
            set_hidden_dropout(module, value)
