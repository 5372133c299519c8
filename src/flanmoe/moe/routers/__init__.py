"""Routers: rules that turn scores into a `Routing`, one file each, chosen by name.

To add one, write a file like its neighbours, and name it here.
"""

from flanmoe.moe.routers.base import Router as Router
from flanmoe.moe.routers.base import RouterConfig as RouterConfig
from flanmoe.moe.routers.base import parse_router as parse_router
from flanmoe.moe.routers.base import routers as routers
from flanmoe.moe.routers.capacity import CapacityConfig as CapacityConfig
from flanmoe.moe.routers.expert_choice import ExpertChoiceConfig as ExpertChoiceConfig
from flanmoe.moe.routers.gshard import GShardConfig as GShardConfig
from flanmoe.moe.routers.st_moe import StMoeConfig as StMoeConfig
from flanmoe.moe.routers.switch import SwitchConfig as SwitchConfig
from flanmoe.moe.routers.top_k import TopKConfig as TopKConfig
