"""Freezing parts of a model by name while it is tuned, and the table of what trains.

The parts are found by what modules can do, in any model that flanmoe reads:

- `gate`: the routers.
- `experts`: the experts that routers choose from.
- `moe`: whole sparse blocks, which is routers, experts, shared experts and their gates.
- `non_moe`: everything outside sparse blocks, embeddings, norms and head included.
- `attention`: the modules that the model declares to return attention weights; dense models have
  them too.

The first four are the ways to tune that FLAN-MoE compares (arXiv 2305.14705, freezing ablation).
A frozen gate goes on routing. Its router losses then train the layers before it, through the hidden
states that it scores; set their coefficients to 0 where that is not wanted.
"""

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import AfterValidator
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from flanmoe.core.config import Config
from flanmoe.core.errors import ModelError
from flanmoe.core.names import listing
from flanmoe.models.blocks import moe_blocks
from flanmoe.moe.block import MoEBlock
from flanmoe.moe.compute.chosen import ChosenExperts
from flanmoe.moe.compute.low_rank import LowRankExperts

FreezePreset = Literal["gate", "experts", "moe", "non_moe", "attention"]
Part = Literal["adapters", "gate", "experts", "other_moe", "attention", "embeddings", "other"]

# Presets that say something about sparse blocks, and therefore nothing about a dense model.
_ABOUT_SPARSE_BLOCKS = frozenset({"gate", "experts", "moe", "non_moe"})


def _named_once(presets: tuple[FreezePreset, ...]) -> tuple[FreezePreset, ...]:
    twice = sorted({preset for preset in presets if presets.count(preset) > 1})
    if twice:
        raise ValueError(f"must name each preset once, but found {listing(twice)} more than once")
    return presets


FreezePresets = Annotated[tuple[FreezePreset, ...], AfterValidator(_named_once)]


class TrainedPart(Config):
    """How much of one part of a model trains.

    Attributes:
        part: `adapters` are what a tuner has put beside the model's own weights; `gate`, `experts` and
            `other_moe` (shared experts and their gates) make up the sparse blocks; `embeddings` holds the
            head too; `other` is norms, dense FFNs and what is left.
        parameters: numbers in it.
        trained: those of them that the optimizer changes.
    """

    part: Part
    parameters: int
    trained: int

    @property
    def share(self) -> float:
        """`trained` over `parameters`."""
        return self.trained / self.parameters


class WhatTrains(Config):
    """How much of each part of a model trains; parts that a model lacks are left out.

    Attributes:
        parts: every parameter is in one of them, a tied one once.
    """

    parts: tuple[TrainedPart, ...]

    @property
    def parameters(self) -> int:
        """Numbers in the whole model."""
        return sum(part.parameters for part in self.parts)

    @property
    def trained(self) -> int:
        """Those of them that the optimizer changes."""
        return sum(part.trained for part in self.parts)


def freeze(model: PreTrainedModel, presets: Sequence[FreezePreset]) -> None:
    """Switch off the gradients of every parameter that one of the presets names.

    What was frozen before stays frozen. A tied parameter is one, wherever it is used.

    Raises:
        ModelError: if a preset matches no parameter, if the model is dense and a preset is about
            sparse blocks, or if nothing is left to train. The model is then as it was.
    """
    if not presets:
        return
    members = _members(model)
    for preset in presets:
        _require_match(model, preset, members)
    chosen: set[int] = set().union(*(members[preset] for preset in presets))
    _require_rest(model, presets, chosen)
    for parameter in model.parameters():
        if id(parameter) in chosen:
            parameter.requires_grad_(False)


@contextmanager
def frozen(model: PreTrainedModel, presets: Sequence[FreezePreset]) -> Generator[None]:
    """Freeze inside the `with` block; afterwards every parameter trains as it did before.

    Raises:
        ModelError: as `freeze` does.
    """
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    freeze(model, presets)
    try:
        yield
    finally:
        # By name: sharding puts other parameters in the places of those that were frozen.
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])


def what_trains(model: PreTrainedModel) -> WhatTrains:
    """Count for each part of a model how many of its parameters train.

    Experts that a tuner trains as copies count once, as trained.
    """
    members = _members(model)
    copies = _identities(module for module in model.modules() if isinstance(module, ChosenExperts))
    order: dict[Part, set[int]] = {
        "adapters": _adapters(model),
        "gate": members["gate"],
        "experts": members["experts"],
        "other_moe": members["moe"],
        "attention": members["attention"],
        "embeddings": _embeddings(model),
        "other": _identities([model]),
    }
    # A parameter belongs to the first part that holds it.
    left = {id(parameter): parameter for parameter in model.parameters()}
    found: list[TrainedPart] = []
    for part, identities in order.items():
        own = [left.pop(identity) for identity in list(left) if identity in identities]
        parameters = sum(parameter.numel() for parameter in own if id(parameter) not in copies)
        trained = sum(parameter.numel() for parameter in own if parameter.requires_grad)
        if parameters:
            found.append(TrainedPart(part=part, parameters=parameters, trained=trained))
    return WhatTrains(parts=tuple(found))


def trains_table(trains: WhatTrains) -> Table:
    """Return a table of what trains, one row a part and one for the whole model."""
    table = Table(title="What trains")
    table.add_column("")
    for column in ("parameters", "trained", "share"):
        table.add_column(column, justify="right")
    rows = [(part.part, part.parameters, part.trained) for part in trains.parts]
    for name, parameters, trained in (*rows, ("all", trains.parameters, trains.trained)):
        label = name.replace("_", " ")
        table.add_row(label, f"{parameters:,}", f"{trained:,}", f"{trained / parameters:.1%}")
    return table


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that a model declares to return attention weights.

    Every transformers model that can hand out attention weights names the classes of the modules
    that they come from (`can_record_outputs`). Mixers without such weights, linear attention and
    state spaces, are not among them.
    """
    classes = tuple(
        kind
        for part in model.modules()
        if isinstance(part, PreTrainedModel)
        for kind in _attention_classes(part)
    )
    return [module for module in model.modules() if isinstance(module, classes)]


def _attention_classes(model: PreTrainedModel) -> list[type]:
    declared: dict[str, Any] = model.can_record_outputs
    entries = [
        entry
        for output, value in declared.items()
        if output.endswith("attentions")
        for entry in (value if isinstance(value, list) else [value])
    ]
    kinds = [
        entry.target_class if isinstance(entry, OutputRecorder) else entry for entry in entries
    ]
    # A plain name stands for a class of another model, which declares it itself.
    return [kind for kind in kinds if isinstance(kind, type)]


def _members(model: PreTrainedModel) -> dict[FreezePreset, set[int]]:
    """Return for each preset the identities of its parameters."""
    blocks = moe_blocks(model)
    attention = _identities(attention_modules(model))
    moe = set[int]().union(*(_block_members(model, block, attention) for block in blocks))
    return {
        "gate": _identities(block.router for block in blocks),
        "experts": _identities(block.experts for block in blocks),
        "moe": moe,
        "non_moe": _identities([model]) - moe,
        "attention": attention,
    }


def _block_members(model: nn.Module, block: MoEBlock, attention: set[int]) -> set[int]:
    members = _identities([model.get_submodule(block.name)])
    # Where router and experts lie in the decoder layer itself (Gemma 4), the layer is no block.
    return _identities([block.router, block.experts]) if members & attention else members


def _adapters(model: nn.Module) -> set[int]:
    """Return what low-rank tuners, ours and PEFT's, have put into a model."""
    found = _identities(module for module in model.modules() if isinstance(module, LowRankExperts))
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            found |= _identities(getattr(module, name) for name in module.adapter_layer_names)
    return found


def _embeddings(model: PreTrainedModel) -> set[int]:
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings()
    return _identities(tables if head is None else [*tables, head])


def _identities(modules: Iterable[nn.Module]) -> set[int]:
    return {id(parameter) for module in modules for parameter in module.parameters()}


def _require_match(
    model: nn.Module, preset: FreezePreset, members: dict[FreezePreset, set[int]]
) -> None:
    name = type(model).__name__
    if preset in _ABOUT_SPARSE_BLOCKS and not members["gate"]:
        raise ModelError(
            f"`freeze: {preset}` needs a sparse model, but {name} is dense: it has no module with "
            f"a router and experts. Leave `{preset}` out, or make the model sparse first with "
            "`flanmoe upcycle`."
        )
    if not members[preset]:
        total = len(_identities([model]))
        raise ModelError(
            f"`freeze: {preset}` must match at least 1 of the {total} weights of {name}, but "
            f"matches 0. Leave `{preset}` out."
        )


def _require_rest(model: nn.Module, presets: Sequence[FreezePreset], chosen: set[int]) -> None:
    if not any(p.requires_grad for p in model.parameters() if id(p) not in chosen):
        total = len(_identities([model]))
        raise ModelError(
            f"Tuning needs at least 1 weight that trains, but `freeze: {', '.join(presets)}` "
            f"leaves 0 of the {total} of {type(model).__name__}. Leave a preset out."
        )
