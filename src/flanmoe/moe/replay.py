"""`RoutingReplay`: what a router decided the first time, for when the same pass is computed again.

Activation checkpointing runs a layer a second time during the backward pass. Where kernels round differently
then, two experts that nearly tie can change places, and the gradient would belong to another model than the
loss. The second time therefore makes the assignments of the first; gates are computed anew, since the gradient
runs through them.
"""

from typing import final

from jaxtyping import Bool, Float, Int
from torch import Tensor

from flanmoe.moe.routers.base import Router
from flanmoe.moe.routing import ForcedRouting, Routing


@final
class RoutingReplay:
    """Remembers the first decision of one router for one batch. Make one for each router and pass.

    Args:
        forced: experts to use the first time already, whatever the scores say.
    """

    def __init__(self, forced: ForcedRouting | None = None) -> None:
        self._forced = forced

    def route(
        self,
        router: Router,
        tokens: Float[Tensor, "T H"],
        *,
        valid: Bool[Tensor, " T"] | None,
        segments: Int[Tensor, " T"] | None,
    ) -> Routing:
        """Let the router decide, or decide again as it did.

        Args:
            router: the router.
            tokens, valid, segments: what it is given; see `Router.forward`.
        """
        routing: Routing = router(tokens, valid=valid, segments=segments, forced=self._forced)
        if self._forced is None:
            self._forced = routing.forced
        return routing
