"""Dropout of a model while it trains, apart from that inside experts (`expert_dropout`)."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager

from torch import nn

from flanmoe.core.errors import ConfigError, ModelError

# Where attention keeps its rate, in transformers' classes.
_ATTENTION_RATES = ("dropout", "attention_dropout")


@contextmanager
def dropout(model: nn.Module, rate: float | None) -> Generator[None]:
    """Train with a rate of dropout inside the `with` block, as before it afterwards.

    It reaches every `nn.Dropout` and the rates of attention; a model's configuration sets all of them to one
    value too. Without a rate nothing changes.

    Raises:
        ConfigError: if the rate is not at least 0 and below 1.
        ModelError: if the model has no dropout.
    """
    if rate is None:
        yield
        return
    if not 0 <= rate < 1:
        raise ConfigError(
            f"`dropout` must be at least 0 and below 1, but is {rate}. Choose a rate such as 0.05."
        )
    before = list(_rates(model))
    if not before:
        raise ModelError(
            f"`dropout` needs a model that has some, but {type(model).__name__} has neither dropout layers nor "
            "rates of attention. Leave it out."
        )
    for module, name, _ in before:
        setattr(module, name, rate)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def _rates(model: nn.Module) -> Iterator[tuple[nn.Module, str, float]]:
    """Yield every place that holds a rate: the module, its attribute and the value."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            yield module, "p", module.p
        for name in _ATTENTION_RATES:
            value = getattr(module, name, None)
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield module, name, float(value)
