"""Models: loading, upcycling, counting.

Importing this package makes flanmoe's expert compute and FlanMoeT5 known to transformers.
"""

from flanmoe.models.experts_interface import register_experts_implementation
from flanmoe.models.flan_moe_t5 import register_flan_moe_t5

register_experts_implementation()
register_flan_moe_t5()
