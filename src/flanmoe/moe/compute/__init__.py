"""Expert compute: one fast function for every sparse block, and the sum that defines it.

Axes: T tokens, k choices a token, E experts, H hidden size, I expert width, F width of the first
product (2I for gated experts). An expert id of E or above stands for "no expert": the assignment
adds nothing. That is how a dropped token, or an expert that lives on another rank, is written.
"""

from flanmoe.moe.compute.activations import POINTWISE as POINTWISE
from flanmoe.moe.compute.activations import Gated as Gated
from flanmoe.moe.compute.activations import Plain as Plain
from flanmoe.moe.compute.fused import ExpertObserver as ExpertObserver
from flanmoe.moe.compute.fused import ExpertOutputs as ExpertOutputs
from flanmoe.moe.compute.fused import FusedExperts as FusedExperts
from flanmoe.moe.compute.fused import expert_observer as expert_observer
from flanmoe.moe.compute.fused import gated as gated
from flanmoe.moe.compute.fused import hidden_dropout as hidden_dropout
from flanmoe.moe.compute.fused import keep_activation as keep_activation
from flanmoe.moe.compute.fused import observed_outputs as observed_outputs
from flanmoe.moe.compute.fused import set_hidden_dropout as set_hidden_dropout
from flanmoe.moe.compute.fused import set_keep_activation as set_keep_activation
from flanmoe.moe.compute.grouped import expert_ffn as expert_ffn
from flanmoe.moe.compute.grouped import product_path as product_path
from flanmoe.moe.compute.products import ROW_MULTIPLE as ROW_MULTIPLE
from flanmoe.moe.compute.reference import expert_ffn_reference as expert_ffn_reference
from flanmoe.moe.compute.work import rows_at_a_time as rows_at_a_time
