"""Evaluation without capacity drops: what a model says to one text must not depend on an expert being full."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import nn

_UNLIMITED = 2**31 - 1


@contextmanager
def without_drops(model: nn.Module) -> Generator[None]:
    """Let every expert take all of its tokens inside the `with` block.

    transformers' Switch routers count an expert's tokens within one pass of one text (`expert_capacity`, Fedus
    et al. 2021, arXiv 2101.03961, section 2.2) and drop those above. The tokens of an answer that is read in
    two passes, or written one by one, would be counted differently from those of one that is read at once.
    """
    routers = _limited(model)
    capacities = [router.expert_capacity for router in routers]
    for router in routers:
        router.expert_capacity = _UNLIMITED
    try:
        yield
    finally:
        for router, capacity in zip(routers, capacities, strict=True):
            router.expert_capacity = capacity


def drops_tokens(model: nn.Module) -> bool:
    """Return whether any expert of a model takes a limited number of tokens."""
    return bool(_limited(model))


def _limited(model: nn.Module) -> list[Any]:
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, "expert_capacity", None), int)
    ]
