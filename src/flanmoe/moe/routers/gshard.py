"""GShard: each token goes to its two best experts (Lepikhin et al. 2020, arXiv 2006.16668).

In the paper an expert takes 2N/(G E) assignments of a group, which is factor 2 here, and the second
choice is dispatched with probability min(1, 2 g2): `random` with the threshold 0.5. T5X's
`tokens_choose` models, which FLAN-GS most likely is, keep raw probabilities and all second choices:
`normalize: false, second_choice: all, capacity: {train: 1.25}`.
"""

from typing import Literal, final

from pydantic import Field

from flanmoe.moe.routers.base import routers
from flanmoe.moe.routers.capacity import CapacityConfig
from flanmoe.moe.routers.top_two import TopTwoConfig


@final
class GShardConfig(TopTwoConfig):
    """Top-2 token choice with GShard's defaults; see `TopTwoConfig`."""

    kind: Literal["gshard.v1"] = "gshard.v1"
    capacity: CapacityConfig = CapacityConfig(train=2.0)
    threshold: float = Field(default=0.5, gt=0, le=1)


routers.register("gshard.v1")(GShardConfig)
