"""ST-MoE: top-2 with a z-loss beside it (Zoph et al. 2022, arXiv 2202.08906).

The router is GShard's with a second choice that is kept with probability min(1, g2 / 0.2), a
capacity factor of 1.25 rounded down, and sequences as groups. What makes ST-MoE stable is the
z-loss on its logits (`moe/losses.py`) and a dense FFN beside each sparse one.
"""

from typing import Literal, final

from flanmoe.moe.routers.base import routers
from flanmoe.moe.routers.capacity import CapacityConfig
from flanmoe.moe.routers.top_two import TopTwoConfig


@final
class StMoeConfig(TopTwoConfig):
    """Top-2 token choice with ST-MoE's defaults; see `TopTwoConfig`."""

    kind: Literal["st_moe.v1"] = "st_moe.v1"
    capacity: CapacityConfig = CapacityConfig(train=1.25, rounding="down", group="segment")


routers.register("st_moe.v1")(StMoeConfig)
