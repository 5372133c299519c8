"""FlanMoeT5: the sparse encoder-decoder of FLAN-MoE (arXiv 2305.14705), a T5 whose FFNs may be experts.

One class covers Switch, GShard, expert choice and ST-MoE by configuration (DESIGN 5.2). Attention, norms and
dense FFNs are transformers' T5; routers and experts are flanmoe's. Importing `flanmoe.models` makes it known
to transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModelForSeq2SeqLM

from flanmoe.models.flan_moe_t5.configuration import FlanMoeT5Config
from flanmoe.models.flan_moe_t5.model import FlanMoeT5ForConditionalGeneration

__all__ = ["FlanMoeT5Config", "FlanMoeT5ForConditionalGeneration", "register_flan_moe_t5"]


def register_flan_moe_t5() -> None:
    """Make FlanMoeT5 known to transformers' Auto classes; doing it twice changes nothing."""
    AutoConfig.register(FlanMoeT5Config.model_type, FlanMoeT5Config, exist_ok=True)
    AutoModelForSeq2SeqLM.register(
        FlanMoeT5Config, FlanMoeT5ForConditionalGeneration, exist_ok=True
    )
