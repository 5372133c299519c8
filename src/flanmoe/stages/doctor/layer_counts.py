"""Is a number of experts that differs from layer to layer built, or refused, or silently ignored?

transformers takes `per_layer_config` in every configuration. A pruned model would need it.
"""

from flanmoe.models.blocks import moe_blocks
from flanmoe.models.meta import meta_model
from flanmoe.stages.doctor.check import Check, Measured
from flanmoe.stages.doctor.tiny import FAMILIES, NUM_EXPERTS, NUM_LAYERS, tiny_config

_FEWER = NUM_EXPERTS // 2


def _built(family: str) -> list[int] | None:
    """Return the numbers of experts that are built where the last layer asks for fewer; None if refused."""
    key, _ = FAMILIES[family]
    try:
        model = meta_model(tiny_config(family, per_layer_config={NUM_LAYERS - 1: {key: _FEWER}}))
    except (ValueError, RuntimeError, TypeError, AttributeError):
        return None
    return [block.num_experts for block in moe_blocks(model)]


def _probe() -> Measured:
    built = {family: _built(family) for family in FAMILIES}
    wanted = [*[NUM_EXPERTS] * (NUM_LAYERS - 1), _FEWER]
    ignored = [name for name, counts in built.items() if counts not in (None, wanted)]
    refused = [name for name, counts in built.items() if counts is None]
    honoured = [name for name, counts in built.items() if counts == wanted]
    said = "; ".join(
        f"{what} by {', '.join(names)}"
        for what, names in (("ignored", ignored), ("refused", refused), ("built", honoured))
        if names
    )
    return Measured(len(ignored), f"A layer with {_FEWER} of {NUM_EXPERTS} experts is {said}.")


CHECKS = (
    Check(
        name="per_layer_experts",
        library="transformers",
        measures=f"of {len(FAMILIES)} sparse families, those that ignore a layer's own number of experts",
        expected=0.0,
        meaning=(
            "The configuration of a model with fewer experts in some layers is accepted, and the model is "
            "built with the global number of experts: the pruned checkpoint does not fit it."
        ),
        way_out="Keep the same number of experts in every layer of a model that stock code has to load.",
        probe=_probe,
    ),
)
