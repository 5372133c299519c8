"""What matrix products are computed in, and which of the two this machine does faster."""

from functools import cache
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator

Precision = Literal["bfloat16", "float32"]

# Instructions for products in bfloat16, by the names that torch gives them: AVX-512 and AMX on x86, NEON
# and SVE on Arm.
_BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16", "sve_bf16")


@cache
def computes_bfloat16() -> bool:
    """Return whether this machine has instructions for products in bfloat16.

    A processor without them works them out in many steps, which takes several times as long as float32
    does (`benchmarks/precision.py`).
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in _BFLOAT16_INSTRUCTIONS)


def _resolved(value: Any) -> Any:
    if value == "auto":
        return "bfloat16" if computes_bfloat16() else "float32"
    return value


# In a configuration: one of the two, or `auto` for the one that this machine has instructions for. What was
# resolved is what a run writes down.
ChosenPrecision = Annotated[Precision, BeforeValidator(_resolved)]
