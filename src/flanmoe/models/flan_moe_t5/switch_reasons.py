"""What transformers' Switch cannot say of a FlanMoeT5, and the other way round.

A *reason* is why the other class would compute other logits in evaluation mode; one is enough to refuse. A
*deviation* is what remains different although the logits agree, which mostly is training.
"""

from collections.abc import Iterator

from transformers import SwitchTransformersConfig

from flanmoe.core.errors import ConfigError
from flanmoe.models.flan_moe_t5.configuration import SIDES, FlanMoeT5Config, Side, placed_layers
from flanmoe.models.flan_moe_t5.switch_capacity import UNLIMITED, their_capacity
from flanmoe.moe.routers import RouterConfig, SwitchConfig, TopKConfig
from flanmoe.moe.routers.capacity import CapacityConfig


def reasons_against_switch(config: FlanMoeT5Config) -> tuple[str, ...]:
    """Return every reason why a FlanMoeT5 is no native Switch; none if `to_switch` can write it."""
    sparse = sparse_routers(config)
    reasons = [*_reasons_of_layers(config), *_reasons_of_head(config)]
    for side, router in sparse.items():
        reasons += [*_reasons_of_placement(config, side), *_reasons_of_router(router, side)]
    return (*reasons, *_reasons_of_both(sparse))


def sparse_routers(config: FlanMoeT5Config) -> dict[Side, RouterConfig]:
    """Return the routers of the sides that have sparse layers."""
    routers: dict[Side, RouterConfig] = {}
    for side in SIDES:
        if (router := config.router(side)) is not None:
            routers[side] = router
    return routers


def their_layers(num_layers: int, step: int) -> tuple[int, ...]:
    """Return which layers transformers makes sparse: i mod step == 1, all for step 1, none for step 0."""
    return placed_layers(num_layers, every=step, placement="second") if step else ()


def their_step(config: FlanMoeT5Config, side: Side) -> int | None:
    """Return the step with which transformers makes the same layers of a side sparse; None if there is none.

    Where there are several it is the one that transformers derives from the number of sparse layers.
    """
    layers, wanted = config.layers(side), config.sparse_layers(side)
    derived = layers // len(wanted) if wanted else 0
    steps = (derived, *range(layers + 1))
    return next((step for step in steps if their_layers(layers, step) == wanted), None)


def evaluation_capacity(router: RouterConfig) -> int | None:
    """Return transformers' integer for the limit in evaluation; None if there is none."""
    return their_capacity(_capacity(router), router.num_experts, training=False)


def _reasons_of_layers(config: FlanMoeT5Config) -> Iterator[str]:
    is_sparse = bool(sparse_routers(config))
    if not is_sparse:
        yield "no layer is sparse, which makes it a T5 (`to_t5`)"
    if config.is_gated_act:
        yield (
            f"`feed_forward_proj` is `{config.feed_forward_proj}`, and the FFNs of a Switch have no gate matrix"
        )
    if is_sparse and config.expert_width not in (None, config.d_ff):
        yield (
            f"`expert_width` is {config.expert_width}, and the experts of a Switch are as wide as its "
            f"dense FFNs (`d_ff`, {config.d_ff})"
        )
    if config.extra_dense_ffn:
        yield "`extra_dense_ffn` is set, and a Switch has no dense FFN beside a sparse one"


def _reasons_of_head(config: FlanMoeT5Config) -> Iterator[str]:
    if config.tied_head != config.scale_decoder_outputs:
        yield (
            f"`tied_head` is {_yaml(config.tied_head)} and `scale_decoder_outputs` "
            f"{_yaml(config.scale_decoder_outputs)}, and a Switch has both or neither (`tie_word_embeddings`)"
        )


def _reasons_of_placement(config: FlanMoeT5Config, side: Side) -> Iterator[str]:
    if their_step(config, side) is None:
        every = getattr(config, f"{side}_sparse_every")
        yield (
            f"`{side}_sparse_every` is {every} with `sparse_placement: {config.sparse_placement}`, which "
            f"makes the layers {_numbers(config.sparse_layers(side))} sparse, and a Switch can only have "
            "those with i mod step == 1"
        )


def _reasons_of_router(router: RouterConfig, side: Side) -> Iterator[str]:
    where = f"{side}_router"
    if isinstance(router, TopKConfig):
        if router.top_k != 1:
            yield f"`{where}.top_k` is {router.top_k}, and a token of a Switch visits one expert"
        if router.normalize:
            yield f"`{where}.normalize` is true, and the gate of a Switch is the raw probability"
        return
    if not isinstance(router, SwitchConfig):
        kind = getattr(router, "kind", type(router).__name__)
        yield f"`{where}.kind` is `{kind}`, and a Switch routes by `switch.v1`"
        return
    if router.gate != "probability":
        yield f"`{where}.gate` is `{router.gate}`, and the gate of a Switch is the raw probability"
    yield from _reasons_of_capacity(router, where)


def _reasons_of_capacity(router: SwitchConfig, where: str) -> Iterator[str]:
    capacity = router.capacity
    if capacity.evaluation is None:
        return
    if capacity.group == "batch":
        yield (
            f"`{where}.capacity.group` is `batch` with a limit in evaluation, and the tokens of a Switch "
            "compete with those of their own sequence"
        )
    alone = capacity.model_copy(update={"group": "segment", "group_size": None})
    if their_capacity(alone, router.num_experts, training=False) is None:
        yield (
            f"`{where}.capacity.evaluation` is {capacity.evaluation:g}, a limit that grows with the "
            "sequence, and that of a Switch is one integer (set it to null for no limit)"
        )
    if router.order == "batch_priority":
        yield (
            f"`{where}.order` is `batch_priority` with a limit in evaluation, and a Switch serves tokens "
            "as they come"
        )


def _reasons_of_both(sparse: dict[Side, RouterConfig]) -> Iterator[str]:
    if len(sparse) < 2:
        return
    encoder, decoder = (sparse[side] for side in SIDES)
    if encoder.num_experts != decoder.num_experts:
        yield (
            f"the encoder has {encoder.num_experts} experts and the decoder {decoder.num_experts}, and a "
            "Switch has one number for both"
        )
    limits = [evaluation_capacity(router) for router in (encoder, decoder)]
    if None not in limits and limits[0] != limits[1]:
        yield (
            f"in evaluation an expert of the encoder takes {_tokens(limits[0])} of a sequence and one of "
            f"the decoder {_tokens(limits[1])}, and a Switch has one limit for both"
        )


def deviations_of_switch(config: FlanMoeT5Config) -> tuple[str, ...]:
    """Return what the native Switch made from a FlanMoeT5 does otherwise although its logits are the same."""
    return tuple(
        f"{side}: {deviation}"
        for side, router in sparse_routers(config).items()
        for deviation in _deviations(config, router)
    )


def _deviations(config: FlanMoeT5Config, router: RouterConfig) -> Iterator[str]:
    limit = evaluation_capacity(router)
    trained_with = their_capacity(_capacity(router), router.num_experts, training=True)
    if trained_with != limit:
        ours = "a share of the tokens" if trained_with is None else _tokens(trained_with)
        yield (
            f"in training transformers lets an expert take {_tokens(limit)} of a sequence, as in "
            f"evaluation; here it is {ours} (`capacity.train`)"
        )
    if limit is not None and limit != UNLIMITED:
        yield "padding takes an expert's places in transformers and none here"
    if config.expert_dropout not in (None, config.dropout_rate):
        yield (
            f"in training transformers drops {config.dropout_rate:g} of the experts' intermediate units, "
            f"as elsewhere; here it is {config.expert_dropout:g} (`expert_dropout`)"
        )
    if router.jitter != jitter_of_both(config):
        yield (
            f"in training transformers has one jitter for both sides, {jitter_of_both(config):g}; here it "
            f"is {router.jitter:g}"
        )
    if jitter_of_both(config):
        yield "in training the jitter reaches the experts in transformers, and the router alone here"
    if getattr(router, "order", "natural") != "natural":
        yield "in training transformers serves tokens as they come; here by `batch_priority`"


def jitter_of_both(config: FlanMoeT5Config) -> float:
    """Return the one jitter that transformers is told: the larger of the two sides'."""
    return max((router.jitter for router in sparse_routers(config).values()), default=0.0)


def reasons_against_flan_moe_t5(config: SwitchTransformersConfig) -> tuple[str, ...]:
    """Return every reason why a native Switch is no FlanMoeT5; none if `from_switch` can read it."""
    reasons: list[str] = []
    if config.router_bias:
        reasons.append("`router_bias` is true, and routers here have no bias")
    if config.router_dtype != "float32":
        reasons.append(
            f"`router_dtype` is `{config.router_dtype}`, and routers here score in float32, which can "
            "choose other experts"
        )
    if not _is_known(config.dense_act_fn):
        reasons.append(
            f"`dense_act_fn` is `{config.dense_act_fn}`, and `feed_forward_proj` here has no such value "
            "without a gate"
        )
    if config.expert_capacity < 1:
        reasons.append(
            f"`expert_capacity` is {config.expert_capacity}, and an expert here takes at least 1 token"
        )
    return tuple(reasons)


def deviations_of_flan_moe_t5(config: SwitchTransformersConfig) -> tuple[str, ...]:
    """Return what the FlanMoeT5 made from a native Switch does otherwise."""
    deviations: list[str] = []
    if config.expert_capacity < UNLIMITED:
        deviations.append(
            f"In transformers an expert takes the first {config.expert_capacity} tokens of a sequence "
            "that choose it and drops the rest, padding counted. FlanMoeT5 does so in training, padding "
            "not counted, and drops nothing in evaluation."
        )
    if config.router_jitter_noise:
        deviations.append(
            f"`router_jitter_noise` {config.router_jitter_noise:g} reaches the experts in transformers "
            "when it trains; in FlanMoeT5 it reaches the router alone."
        )
    return tuple(deviations)


def _is_known(activation: str) -> bool:
    try:
        return not FlanMoeT5Config(feed_forward_proj=activation).is_gated_act
    except ConfigError:
        return False


def _capacity(router: RouterConfig) -> CapacityConfig | None:
    return router.capacity if isinstance(router, SwitchConfig) else None


def _tokens(limit: int | None) -> str:
    return "any number of tokens" if limit == UNLIMITED else f"{limit} tokens"


def _numbers(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))


def _yaml(value: bool) -> str:
    return str(value).lower()
