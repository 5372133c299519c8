"""Names and layouts of weights: transformers' Switch on one side, FlanMoeT5 on the other.

Outside the FFNs both have T5's names. A dense FFN is `layer.J.mlp.{wi,wo}` there and
`layer.J.DenseReluDense.{wi,wo}` here; the classifier of `layer.J.mlp.router` is the router itself here; and
each expert is a module of its own there, `layer.J.mlp.experts.expert_E.{wi,wo}`, where ours are fused along a
first axis.
"""

import copy
import re
from collections.abc import Mapping

import torch
from torch import Tensor

_THEIR_EXPERT = re.compile(
    r"^(?P<experts>.+\.mlp\.experts)\.expert_\d+\.(?P<matrix>wi|wo)\.weight$"
)
_OUR_EXPERTS = re.compile(r"^(?P<experts>.+\.mlp\.experts)\.(?P<matrix>gate_up_proj|down_proj)$")
_FUSED: Mapping[str, str] = {"wi": "gate_up_proj", "wo": "down_proj"}
_SINGLE: Mapping[str, str] = {fused: single for single, fused in _FUSED.items()}


def our_tensors(theirs: Mapping[str, Tensor], *, num_experts: int) -> dict[str, Tensor]:
    """Return copies of a Switch's tensors under FlanMoeT5's names, experts fused.

    Args:
        theirs: every tensor of a Switch by name; one object under several names stays one.
        num_experts: experts of a sparse layer, every one of which is there.
    """
    plain = {name: tensor for name, tensor in theirs.items() if not _THEIR_EXPERT.match(name)}
    ours = {_our_name(name): tensor for name, tensor in copy.deepcopy(plain).items()}
    fused = {
        (found["experts"], found["matrix"])
        for name in theirs
        if (found := _THEIR_EXPERT.match(name))
    }
    for experts, matrix in sorted(fused):
        names = (f"{experts}.expert_{number}.{matrix}.weight" for number in range(num_experts))
        ours[f"{experts}.{_FUSED[matrix]}"] = torch.stack([theirs[name].detach() for name in names])
    return ours


def their_tensors(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of a FlanMoeT5's tensors under Switch's names, each expert by itself.

    Args:
        ours: every tensor by name; experts without a gate matrix, dense FFNs likewise.
    """
    plain = {name: tensor for name, tensor in ours.items() if not _OUR_EXPERTS.match(name)}
    theirs = {_their_name(name): tensor for name, tensor in copy.deepcopy(plain).items()}
    for name, fused in ours.items():
        if found := _OUR_EXPERTS.match(name):
            for number, matrix in enumerate(fused.detach()):
                expert = f"{found['experts']}.expert_{number}"
                theirs[f"{expert}.{_SINGLE[found['matrix']]}.weight"] = matrix.clone()
    return theirs


def _our_name(name: str) -> str:
    name = re.sub(r"\.mlp\.router\.classifier\.weight$", ".mlp.router.weight", name)
    return re.sub(r"\.mlp\.(wi|wo)\.weight$", r".DenseReluDense.\1.weight", name)


def _their_name(name: str) -> str:
    name = re.sub(r"\.mlp\.router\.weight$", ".mlp.router.classifier.weight", name)
    return re.sub(r"\.DenseReluDense\.(wi|wo)\.weight$", r".mlp.\1.weight", name)
