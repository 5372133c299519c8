"""`RoutingMonitor`: the routing of each micro-batch as sums by task, for every sparse layer."""

from collections.abc import Sequence

from torch import Tensor, distributed

from flanmoe.core.config import Config
from flanmoe.core.errors import DataError
from flanmoe.moe.alerts import AlertConfig, WatchedLayer
from flanmoe.moe.block import MoEBlock
from flanmoe.moe.routing import Routing
from flanmoe.moe.stacked_sums import StackedSums


class RoutingMonitorConfig(Config):
    """What is recorded of routing while a model trains. Load, entropy and drops always are.

    Attributes:
        coactivation: also count which experts serve a token together; experts x experts numbers for
            each task and layer.
        alerts: when routing is called wrong.
    """

    coactivation: bool = False
    alerts: AlertConfig = AlertConfig()


DEFAULT_MONITOR = RoutingMonitorConfig()


class RoutingMonitor:
    """Makes sums of what the routers decided.

    Args:
        config: what is recorded.
        task_names: the tasks, whose places are the numbers that tokens carry.
    """

    def __init__(self, config: RoutingMonitorConfig, task_names: Sequence[str]) -> None:
        self.config = config
        self.task_numbers = {name: number for number, name in enumerate(task_names)}

    def sums(self, layers: Sequence[Routing], task_ids: Sequence[Tensor]) -> StackedSums:
        """Return the sums of one micro-batch.

        Args:
            layers: what the routers decided.
            task_ids: for each layer the number of the task of every token that it sees; one tensor for all
                layers of a side.
        """
        return StackedSums.of(
            layers,
            task_ids,
            num_groups=len(self.task_numbers),
            coactivation=self.config.coactivation,
        )


def require_same_tasks(task_names: Sequence[str]) -> None:
    """Check that the streams of all processes name the same tasks; every process must call it.

    Raises:
        DataError: if they do not; their sums would be of different tasks.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return
    named: list[tuple[str, ...]] = [()] * distributed.get_world_size()
    distributed.all_gather_object(named, tuple(task_names))
    if len(set(named)) > 1:
        sizes = ", ".join(str(len(names)) for names in named)
        raise DataError(
            "The streams of all processes must name the same tasks in the same order, but theirs differ "
            f"({sizes} tasks). Give each stream the `task_names` of the whole data."
        )


def watched(blocks: Sequence[MoEBlock]) -> list[WatchedLayer]:
    """Return what alerts must know of the sparse blocks of a model."""
    return [
        WatchedLayer(block.layer, block.name, block.num_experts, block.top_k) for block in blocks
    ]
