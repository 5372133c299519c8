"""FlanMoeT5 from and to transformers' Switch: same weights, same logits where nothing is dropped.

transformers' class is arXiv 2101.03961 with a fixed capacity; `switch_reasons` lists what the two cannot say of
each other. Router losses are the trainer's here, so `router_z_loss_coef` and `router_aux_loss_coef` are neither
read nor set.
"""

import copy
from typing import Any

import torch
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from flanmoe.core.console import warn
from flanmoe.core.errors import ModelError
from flanmoe.models.flan_moe_t5.configuration import FlanMoeT5Config, Side
from flanmoe.models.flan_moe_t5.model import FlanMoeT5ForConditionalGeneration
from flanmoe.models.flan_moe_t5.native import (
    HEAD,
    SHARED_TABLE,
    SIDE_TABLES,
    built_from,
    empty_model,
    load_native,
    named_tensors,
    require_tensors,
    shared_settings,
    with_one_table,
)
from flanmoe.models.flan_moe_t5.switch_capacity import our_capacity
from flanmoe.models.flan_moe_t5.switch_reasons import (
    deviations_of_flan_moe_t5,
    deviations_of_switch,
    evaluation_capacity,
    jitter_of_both,
    reasons_against_flan_moe_t5,
    reasons_against_switch,
    sparse_routers,
    their_layers,
    their_step,
)
from flanmoe.models.flan_moe_t5.switch_weights import our_tensors, their_tensors


def load_switch(
    reference: str, *, dtype: torch.dtype = torch.float32
) -> FlanMoeT5ForConditionalGeneration:
    """Load a checkpoint of model type `switch_transformers` as a FlanMoeT5 on the CPU, in evaluation mode.

    With a head of its own a checkpoint may hold one table of embeddings for both sides, as T5's layout has it
    (transformers 5 would leave the sides' tables random).

    Args:
        reference: a folder or a hub id.
        dtype: of the weights but the routers', which stay in float32. Until they are converted all are.

    Raises:
        ModelError: if it cannot be read, is no Switch, cannot be said by FlanMoeT5 (every reason is listed), or
            lacks tensors or holds foreign ones, by name.
    """
    kind = SwitchTransformersForConditionalGeneration
    model, missing = load_native(reference, kind, dtype=torch.float32, may_be_missing=SIDE_TABLES)
    for name in missing:
        model.get_submodule(name.removesuffix(".weight")).weight = model.shared.weight
    sparse = from_switch(model)
    for name, parameter in sparse.named_parameters():
        if not name.endswith(".router.weight"):
            parameter.data = parameter.data.to(dtype)
    return sparse


def from_switch(
    model: SwitchTransformersForConditionalGeneration,
) -> FlanMoeT5ForConditionalGeneration:
    """Return a FlanMoeT5 with copies of a Switch's weights, in their dtype, in evaluation mode.

    What it does otherwise than the Switch is printed (`deviations_of_flan_moe_t5`): above all, it drops no
    token in evaluation, where transformers drops those beyond `expert_capacity` of a sequence.

    Raises:
        ModelError: if FlanMoeT5 cannot say what it is (every reason is listed), its sides do not share their
            embeddings, or a tensor is missing or foreign, by name.
    """
    theirs = model.config
    if reasons := reasons_against_flan_moe_t5(theirs):
        raise ModelError(
            f"A FlanMoeT5 must be able to say all that a Switch's configuration says, but "
            f"{_listed(reasons)}. Choose another checkpoint."
        )
    tensors = named_tensors(model)
    require_tensors(tensors, empty_model(type(model), theirs), of="The Switch given")
    own = our_tensors(with_one_table(tensors), num_experts=theirs.num_experts)
    config = _our_config(theirs, tied_head=own[HEAD] is own[SHARED_TABLE])
    for deviation in deviations_of_flan_moe_t5(theirs):
        warn(deviation)
    sparse = built_from(FlanMoeT5ForConditionalGeneration, config, own)
    sparse.generation_config = copy.deepcopy(model.generation_config)
    return sparse


def require_switch(config: FlanMoeT5Config) -> None:
    """Refuse a FlanMoeT5 that is no native Switch.

    Raises:
        ModelError: with every reason.
    """
    if reasons := reasons_against_switch(config):
        raise ModelError(
            "A native Switch must be able to say all that a FlanMoeT5's configuration says, but "
            f"{_listed(reasons)}. Keep the checkpoint that flanmoe wrote, which transformers' Auto "
            "classes read after `import flanmoe.models`, or train with a configuration without these."
        )


def to_switch(
    model: FlanMoeT5ForConditionalGeneration,
) -> SwitchTransformersForConditionalGeneration:
    """Return a Switch with copies of a FlanMoeT5's weights, in their dtype, in evaluation mode.

    Its logits are those of the FlanMoeT5 in evaluation mode. `expert_capacity` is what limits an expert there,
    and larger than any sequence where nothing does. What remains different, which is training, is printed
    (`deviations_of_switch`).

    Raises:
        ModelError: if a Switch cannot say what it is, with every reason; or if a tensor is missing or foreign,
            by name.
    """
    config = model.config
    require_switch(config)
    ours = named_tensors(model)
    require_tensors(ours, empty_model(type(model), config), of="The FlanMoeT5 given")
    for deviation in deviations_of_switch(config):
        warn(f"Not the same in the native Switch: {deviation}.")
    tensors = their_tensors(ours)
    if not config.tied_head:
        # Without tied embeddings transformers has three tables, and saves each only if they are three.
        tensors |= {name: tensors[name].detach().clone() for name in SIDE_TABLES}
    kind = SwitchTransformersForConditionalGeneration
    native = built_from(kind, _their_config(config), tensors)
    native.generation_config = copy.deepcopy(model.generation_config)
    return native


def _our_config(theirs: SwitchTransformersConfig, *, tied_head: bool) -> FlanMoeT5Config:
    router = {
        "kind": "switch.v1",
        "num_experts": theirs.num_experts,
        "jitter": float(theirs.router_jitter_noise),
        "gate": "probability",
        "order": "natural",
        "capacity": our_capacity(theirs.expert_capacity),
    }
    shared = shared_settings(theirs)
    steps = {"encoder": theirs.encoder_sparse_step, "decoder": theirs.decoder_sparse_step}
    layers = {"encoder": theirs.num_layers, "decoder": shared["num_decoder_layers"]}
    of_sides = {}
    for side, step in steps.items():
        if their_layers(layers[side], step):
            of_sides |= {f"{side}_router": router, f"{side}_sparse_every": step}
    return FlanMoeT5Config(
        **shared,
        **of_sides,
        sparse_placement="second",
        feed_forward_proj=theirs.dense_act_fn,
        tied_head=tied_head,
        scale_decoder_outputs=theirs.tie_word_embeddings,
    )


def _their_config(config: FlanMoeT5Config) -> SwitchTransformersConfig:
    """Return the configuration of a FlanMoeT5 against which there are no reasons."""
    router = next(iter(sparse_routers(config).values()))
    of_routers: dict[str, Any] = {
        "num_experts": router.num_experts,
        "expert_capacity": evaluation_capacity(router),
        "router_jitter_noise": jitter_of_both(config),
    }
    return SwitchTransformersConfig(
        **shared_settings(config),
        **of_routers,
        **_placement(config, "encoder"),
        **_placement(config, "decoder"),
        dense_act_fn=config.dense_act_fn,
        tie_word_embeddings=config.tied_head,
    )


def _placement(config: FlanMoeT5Config, side: Side) -> dict[str, Any]:
    return {
        f"num_sparse_{side}_layers": len(config.sparse_layers(side)),
        # Said beside the number: what transformers derives from 0 makes a layer sparse.
        f"{side}_sparse_step": their_step(config, side),
    }


def _listed(reasons: tuple[str, ...]) -> str:
    if len(reasons) == 1:
        return reasons[0]
    numbered = "; ".join(f"({number}) {reason}" for number, reason in enumerate(reasons, start=1))
    return f"{len(reasons)} things have no counterpart there: {numbered}"
