"""ScatterMoE and sonic-moe beside the others in `moe_layer.py`, where they are installed.

Both need CUDA. ScatterMoE takes our choices of experts; sonic-moe routes by itself, so its layer is timed with
its router, like that of st-moe-pytorch. Not run by us yet: there was no GPU.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

from torch import Tensor, nn

Peer = tuple[Callable[[], Tensor], tuple[Tensor, ...]]


def cuda_peers(
    hidden: Tensor, expert_ids: Tensor, gates: Tensor, *, num_experts: int, width: int
) -> dict[str, Peer]:
    """Return for each library that is installed its forward pass, and what a step differentiates.

    Args:
        hidden: hidden states (T, H), on a CUDA device.
        expert_ids, gates: the choices of each token (T, k).
        num_experts: number of experts.
        width: width of a gated expert.
    """
    found: dict[str, Peer] = {}
    if find_spec("scattermoe") is not None:
        found["scattermoe"] = _scattermoe(hidden, expert_ids, gates, num_experts, width)
    if find_spec("sonicmoe") is not None:
        found["sonic-moe"] = _sonic_moe(hidden, expert_ids.shape[1], num_experts, width)
    return found


def _scattermoe(
    hidden: Tensor, expert_ids: Tensor, gates: Tensor, num_experts: int, width: int
) -> Peer:
    layer = (
        import_module("scattermoe.mlp")
        .GLUMLP(
            input_size=hidden.shape[1],
            hidden_size=width,
            num_experts=num_experts,
            top_k=expert_ids.shape[1],
            activation=nn.SiLU(),
        )
        .to(hidden)
    )
    return lambda: layer(hidden, gates, expert_ids), (hidden, gates, *layer.parameters())


def _sonic_moe(hidden: Tensor, top_k: int, num_experts: int, width: int) -> Peer:
    library = import_module("sonicmoe")
    layer = library.MoE(
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        hidden_size=hidden.shape[1],
        intermediate_size=width,
        activation_function=import_module("sonicmoe.enums").ActivationType.SWIGLU,
        add_bias=False,
        std=0.02,
    ).to(hidden)
    backend = library.KernelBackendMoE.sonicmoe
    return lambda: layer(hidden, kernel_backend_moe=backend)[0], (hidden, *layer.parameters())
