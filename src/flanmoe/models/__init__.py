"""Models: loading, upcycling, counting.

Importing this package makes flanmoe's expert compute known to transformers.
"""

from flanmoe.models.experts_interface import register_experts_implementation

register_experts_implementation()
