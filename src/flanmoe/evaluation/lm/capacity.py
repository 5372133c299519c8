"""Evaluation without capacity drops: what a model says to one text must not depend on an expert being full."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import nn

from flanmoe.moe.routers.token_choice import TokenChoiceRouter

_UNLIMITED = 2**31 - 1


@contextmanager
def without_drops(model: nn.Module) -> Generator[None]:
    """Let every expert take all of its tokens inside the `with` block.

    Our own routers have a capacity in evaluation only where their settings name a factor for it
    (`CapacityConfig.evaluation`); expert choice has none to lift. transformers' Switch routers count an
    expert's tokens within one pass of one text (`expert_capacity`, Fedus et al. 2021, arXiv 2101.03961,
    section 2.2) and drop those above. The tokens of an answer that is read in two passes, or written one by
    one, would be counted differently from those of one that is read at once.
    """
    limits = _limits(model)
    for router, name, _ in limits:
        setattr(router, name, None if isinstance(router, TokenChoiceRouter) else _UNLIMITED)
    try:
        yield
    finally:
        for router, name, capacity in limits:
            setattr(router, name, capacity)


def drops_tokens(model: nn.Module) -> bool:
    """Return whether any expert of a model takes a limited number of tokens."""
    return bool(_limits(model))


def _limits(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Return every router that drops in evaluation mode, the attribute that says when, and its value."""
    limits: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        if isinstance(module, TokenChoiceRouter):
            if module.capacity is not None and module.capacity.evaluation is not None:
                limits.append((module, "capacity", module.capacity))
        elif isinstance(getattr(module, "expert_capacity", None), int):
            limits.append((module, "expert_capacity", module.expert_capacity))
    return limits
