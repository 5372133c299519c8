"""`StatisticsParts`: what a pass gathers beside the sums of routing."""

from pydantic import Field

from flanmoe.core.config import Config


class StatisticsParts(Config):
    """What is gathered beside counts, gates, entropy, confidence and drops.

    Attributes:
        coactivation: which experts serve a token together: groups x E x E numbers a layer.
        outputs: what experts return: E x H numbers a layer. Needs a model that runs flanmoe's compute.
        logit_sample: of so many tokens the router's logits are kept: E numbers a token and layer. 0 for none.
        seed: decides which tokens.
    """

    coactivation: bool = True
    outputs: bool = True
    logit_sample: int = Field(default=16_384, ge=0)
    seed: int = Field(default=0, ge=0)
