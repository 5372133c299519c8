"""`MoEBlock` views of any transformers model, found by what its modules can do.

A sparse block is a module with two children: *experts*, which hold their matrices fused into 3-D
parameters, and a *router*, which turns hidden states into (logits, gates, expert ids). No list of
model types is kept (DESIGN 5.1). What transformers' experts modules say about their own layout is
read in `ExpertLayout` here and in `experts_interface`, and what a router does is measured on
random inputs; nothing else in flanmoe looks into foreign sparse modules.
"""

import copy
import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from flanmoe.core.errors import ModelError
from flanmoe.core.names import listing
from flanmoe.moe.block import ExpertWeights, MoEBlock
from flanmoe.moe.layer import SparseFFN
from flanmoe.moe.routers.token_choice import TokenChoiceRouter
from flanmoe.moe.routing import Routing

_NUM_PROBE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class RouterOutput:
    """What a native router module returned. T tokens, E experts, k choices a token."""

    logits: Float[Tensor, "T E"]
    gates: Float[Tensor, "T k"]
    expert_ids: Int[Tensor, "T k"]


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """How an experts module stores its matrices. E experts, H hidden size, I expert width.

    Attributes:
        transposed: matrices are stored as (input, output), not as (output, input).
        gated: there is a gate matrix, fused with the up matrix.
        interleaved: gate and up alternate along the fused axis; otherwise all gate units
            come first.
        biased: every matrix has a bias.
    """

    transposed: bool
    gated: bool
    interleaved: bool
    biased: bool

    @classmethod
    def of(cls, experts: nn.Module) -> "ExpertLayout":
        """Read the flags that transformers sets on every experts module of its experts interface.

        Raises:
            ModelError: if the module does not say how its matrices lie.
        """
        flags = {
            name: getattr(experts, name, None)
            for name in ("has_gate", "is_transposed", "is_concatenated", "has_bias")
        }
        if None in flags.values():
            raise ModelError(
                f"Experts must say how their matrices lie, but {type(experts).__name__} has no "
                f"flag {listing(name for name, value in flags.items() if value is None)}. flanmoe "
                "reads models that use transformers' experts interface."
            )
        return cls(
            transposed=bool(flags["is_transposed"]),
            gated=bool(flags["has_gate"]),
            interleaved=not flags["is_concatenated"],
            biased=bool(flags["has_bias"]),
        )


@dataclass(slots=True)
class FusedBlock:
    """A `MoEBlock` over a router and fused experts, those of transformers or ours."""

    name: str
    layer: int
    router: nn.Module
    experts: nn.Module
    num_experts: int
    top_k: int
    hidden_size: int
    expert_width: int
    norm_top_k: bool
    layout: ExpertLayout

    def read_expert(self, index: int) -> ExpertWeights:
        """Return copies of one expert's matrices, in `nn.Linear` orientation.

        Raises:
            ModelError: if there is no expert of that index.
        """
        copies = {name: view.clone() for name, view in self._views(index).items()}
        return ExpertWeights(**{"gate": None, **copies})

    def write_expert(self, index: int, weights: ExpertWeights) -> None:
        """Overwrite one expert's matrices in place.

        Raises:
            ModelError: if there is no expert of that index, a shape differs, or a gate or biases are
                given to experts without them or missing for experts with them.
        """
        targets = self._views(index)
        sources = _given(weights)
        expected = {name: tuple(target.shape) for name, target in targets.items()}
        found = {name: tuple(source.shape) for name, source in sources.items()}
        if found != expected:
            raise ModelError(
                f"An expert of {self.name} has matrices and biases of shapes "
                f"{list(expected.values())}, but {list(found.values())} were given. Write an expert "
                "that was read from a block of the same shape."
            )
        for name, target in targets.items():
            target.copy_(sources[name])

    def routing(
        self,
        returned: Any,
        *,
        valid: Bool[Tensor, " T"] | None = None,
        segments: Int[Tensor, " T"] | None = None,
    ) -> Routing:
        """Read what the router module's forward returned: a `Routing`, or (logits, gates, expert ids).

        Gates are detached: the router losses need the gradient through the logits alone, and an
        operation with a gradient here would save tensors inside a checkpointed region, which the
        recompute then misses.

        Raises:
            ModelError: if our router was told of other padding than `valid`.
        """
        if isinstance(returned, Routing):
            self._require_padding(returned, valid)
            return dataclasses.replace(
                returned,
                gates=returned.gates.detach(),
                segments=returned.segments if segments is None else segments,
            )
        logits, gates, expert_ids = (tensor.reshape(-1, tensor.shape[-1]) for tensor in returned)
        return Routing.from_top_k(
            logits, expert_ids, gates.detach(), valid=valid, segments=segments
        )

    def _require_padding(self, routing: Routing, valid: Bool[Tensor, " T"] | None) -> None:
        if valid is not None and not torch.equal(valid, routing.valid):
            raise ModelError(
                f"The router of {self.name} must know which tokens are padding, but counted "
                f"{int(routing.valid.sum())} real tokens where there are {int(valid.sum())}. Pass "
                "`valid` to the block in the model's forward."
            )

    def _parameter(self, name: str) -> Tensor:
        # Detached: a view of it can be written without autograd noticing, as an optimizer does.
        return self.experts.get_parameter(name).detach()

    def _views(self, index: int) -> dict[str, Tensor]:
        """Return views of what one expert holds, by their names in `ExpertWeights` and in its order."""
        self._check_index(index)
        # Ours has one name for it, transformers' experts without a gate have another.
        own = {name for name, _ in self.experts.named_parameters(recurse=False)}
        first = "gate_up_proj" if "gate_up_proj" in own else "up_proj"
        views = {
            **self._parts(self._matrix(first, index), suffix=""),
            "down": self._matrix("down_proj", index),
        }
        if self.layout.biased:
            views |= self._parts(self._parameter(f"{first}_bias")[index], suffix="_bias")
            views["down_bias"] = self._parameter("down_proj_bias")[index]
        return views

    def _matrix(self, name: str, index: int) -> Tensor:
        stored = self._parameter(name)[index]
        return stored.T if self.layout.transposed else stored

    def _parts(self, fused: Tensor, *, suffix: str) -> dict[str, Tensor]:
        """Split what is fused along its first axis into gate and up; without a gate it is the up part."""
        if not self.layout.gated:
            return {f"up{suffix}": fused}
        if self.layout.interleaved:
            gate, up = fused[0::2], fused[1::2]
        else:
            gate, up = fused[: self.expert_width], fused[self.expert_width :]
        return {f"gate{suffix}": gate, f"up{suffix}": up}

    def _check_index(self, index: int) -> None:
        if not 0 <= index < self.num_experts:
            raise ModelError(
                f"{self.name} has experts 0 to {self.num_experts - 1}, but expert {index} was "
                "asked for."
            )


def _given(weights: ExpertWeights) -> dict[str, Tensor]:
    """Return what an expert has, by name."""
    values = {field.name: getattr(weights, field.name) for field in dataclasses.fields(weights)}
    return {name: value for name, value in values.items() if value is not None}


def moe_blocks(model: nn.Module) -> list[MoEBlock]:
    """Return the sparse blocks of a model in layer order; none for a dense model.

    Works on the meta device too: nothing but shapes and the routers' code is looked at.

    Raises:
        ModelError: if experts do not say how their matrices lie, or no child beside them works as a
            router.
    """
    blocks: list[MoEBlock] = []
    for name, module in model.named_modules():
        if isinstance(module, SparseFFN):
            blocks.append(_own_block(name, module))
            continue
        for experts in module.children():
            if _holds_fused_experts(experts):
                router, kind = _find_router(name, module, experts)
                blocks.append(_block(name, router, kind, experts))
    return blocks


def require_moe_blocks(model: nn.Module) -> list[MoEBlock]:
    """Return the sparse blocks of a model that must have some.

    Raises:
        ModelError: if the model is dense.
    """
    blocks = moe_blocks(model)
    if not blocks:
        raise ModelError(
            f"This needs a sparse model, but {type(model).__name__} has no module with a router "
            "and experts. Make it sparse first with `flanmoe upcycle`."
        )
    return blocks


def _holds_fused_experts(module: nn.Module) -> bool:
    shapes = {name: parameter.ndim for name, parameter in module.named_parameters(recurse=False)}
    return shapes.get("down_proj") == 3 and (
        shapes.get("gate_up_proj") == 3 or shapes.get("up_proj") == 3
    )


@dataclass(frozen=True, slots=True)
class _Choosing:
    """How a router chooses: experts a token, and whether their gates sum to a constant."""

    top_k: int
    norm_top_k: bool


def _block(name: str, router: nn.Module, choosing: _Choosing, experts: nn.Module) -> FusedBlock:
    layout = ExpertLayout.of(experts)
    num_experts, hidden_size, width = _sizes(experts, layout)
    return FusedBlock(
        name=name,
        layer=_layer_number(name),
        router=router,
        experts=experts,
        num_experts=num_experts,
        top_k=choosing.top_k,
        hidden_size=hidden_size,
        expert_width=width,
        norm_top_k=choosing.norm_top_k,
        layout=layout,
    )


def _sizes(experts: nn.Module, layout: ExpertLayout) -> tuple[int, int, int]:
    """Return the number of experts, the hidden size and the width of an expert."""
    number, first, second = experts.get_parameter("down_proj").shape
    return (number, second, first) if layout.transposed else (number, first, second)


def _own_block(name: str, module: SparseFFN) -> FusedBlock:
    router = module.router
    norm_top_k = False
    if isinstance(router, TokenChoiceRouter):
        probabilities = torch.tensor([[0.5**choice for choice in range(1, router.top_k + 1)]])
        norm_top_k = _sums_are_constant(router.gates(torch.cat([probabilities, probabilities / 2])))
    return _block(name, router, _Choosing(router.top_k, norm_top_k), module.experts)


def _find_router(name: str, parent: nn.Module, experts: nn.Module) -> tuple[nn.Module, _Choosing]:
    num_experts, hidden_size, _ = _sizes(experts, ExpertLayout.of(experts))
    for child in parent.children():
        # One row of weights for each expert is what every learned router has; a plain linear layer
        # (Qwen2-MoE's gate of the shared expert) returns scores alone.
        has_rows = any(p.ndim == 2 and p.shape[0] == num_experts for p in child.parameters())
        if not has_rows or isinstance(child, nn.Linear):
            continue
        output = _probe(child, num_experts, hidden_size)
        if output is not None:
            return child, _Choosing(output.gates.shape[1], _sums_are_constant(output.gates))
    raise ModelError(
        "A sparse block needs a router that returns (logits, gates, expert ids) for hidden states, "
        f"but {name} ({type(parent).__name__}) has none among its children "
        f"({', '.join(child for child, _ in parent.named_children())}). "
        "flanmoe cannot read this architecture yet."
    )


@torch.no_grad()
def _probe(module: nn.Module, num_experts: int, hidden_size: int) -> RouterOutput | None:
    """Run a float32 copy with random weights on random inputs; None if it does not act as a router.

    The copy gets weights of its own so that this works without real weights (meta device) and tells
    a renormalising router from one whose weights happen to be zero. `forward` is called directly:
    hooks on the original are no part of the question.
    """
    generator = torch.Generator().manual_seed(0)
    own: dict[int, Any] = {}
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        values = torch.randn(tensor.shape, generator=generator) / hidden_size**0.5
        own[id(tensor)] = nn.Parameter(values) if isinstance(tensor, nn.Parameter) else values * 0
    hidden = torch.randn(_NUM_PROBE_TOKENS, hidden_size, generator=generator)
    returned = copy.deepcopy(module, own).forward(hidden)
    if not isinstance(returned, tuple) or len(returned) != 3:
        return None
    logits, gates, expert_ids = returned
    if logits.shape != (_NUM_PROBE_TOKENS, num_experts) or gates.shape != expert_ids.shape:
        return None
    return RouterOutput(logits=logits, gates=gates, expert_ids=expert_ids)


def _sums_are_constant(gates: Float[Tensor, "T k"]) -> bool:
    # DeepSeek-V3 scales renormalised gates by a constant, so the sum need not be 1.
    sums = gates.float().sum(dim=-1)
    return bool((sums.max() - sums.min()) <= 1e-4 * sums.abs().max())


def _layer_number(name: str) -> int:
    for part in name.split("."):
        if part.isdigit():
            return int(part)
    return 0
