"""Bad input is refused in one sentence: what, the limit, the value found, the way out."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from flanmoe.core.errors import ConfigError, ModelError
from flanmoe.moe.routers import (
    ExpertChoiceConfig,
    GShardConfig,
    RouterConfig,
    StMoeConfig,
    SwitchConfig,
    TopKConfig,
    parse_router,
    routers,
)
from flanmoe.training.router_losses import RouterLossConfig


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises((ConfigError, ModelError)) as caught:
        action()
    return str(caught.value)


def parsed(**values: Any) -> str:
    """What is said about a router of eight experts, without the heading."""
    text = refusal(lambda: parse_router({"num_experts": 8, **values}))
    heading, _, problem = text.partition("\n")
    assert heading == "router has 1 problem:"
    return problem.strip()


def test_more_choices_than_experts() -> None:
    assert parsed(kind="top_k", top_k=9) == (
        "(top level): `top_k` must be at most `num_experts` (8), but is 9"
    )


@pytest.mark.parametrize("top_k", [0, -1])
def test_no_choice_at_all(top_k: int) -> None:
    assert parsed(kind="top_k", top_k=top_k) == (
        f"top_k: Input should be greater than or equal to 1, but is {top_k}."
    )


@pytest.mark.parametrize("kind", ["gshard", "st_moe"])
def test_two_choices_among_one_expert(kind: str) -> None:
    assert parsed(kind=kind, num_experts=1) == (
        "(top level): `num_experts` must be at least 2, since each token asks for 2, but is 1"
    )


@pytest.mark.parametrize("num_experts", [0, -2])
def test_no_experts(num_experts: int) -> None:
    assert parsed(kind="switch", num_experts=num_experts) == (
        f"num_experts: Input should be greater than or equal to 1, but is {num_experts}."
    )


@pytest.mark.parametrize("kind", ["switch", "gshard", "st_moe"])
@pytest.mark.parametrize("mode", ["train", "evaluation"])
@pytest.mark.parametrize("factor", [0, -1.25])
def test_a_capacity_factor_that_is_not_above_0(kind: str, mode: str, factor: float) -> None:
    assert parsed(kind=kind, capacity={mode: factor}) == (
        f"capacity.{mode}: Input should be greater than 0, but is {factor}."
    )


@pytest.mark.parametrize("factor", [0, -1])
def test_a_factor_of_expert_choice_that_is_not_above_0(factor: int) -> None:
    assert parsed(kind="expert_choice", capacity_factor=factor) == (
        f"capacity_factor: Input should be greater than 0, but is {factor}."
    )


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_factor_that_is_no_number(factor: float) -> None:
    # No limit is written `null`, not infinity.
    assert parsed(kind="switch", capacity={"train": factor}) == (
        f"capacity.train: Input should be a finite number, but is {factor}."
    )
    assert parsed(kind="expert_choice", capacity_factor=factor) == (
        f"capacity_factor: Input should be a finite number, but is {factor}."
    )


def test_a_minimum_below_1() -> None:
    assert parsed(kind="switch", capacity={"minimum": 0}) == (
        "capacity.minimum: Input should be greater than or equal to 1, but is 0."
    )


def test_a_group_size_without_effect() -> None:
    assert parsed(kind="switch", capacity={"group": "segment", "group_size": 64}) == (
        "capacity: `group_size` only has an effect with `group: batch`, but is 64 with "
        "`group: segment`; leave it out"
    )


def test_an_unknown_rounding() -> None:
    assert parsed(kind="switch", capacity={"rounding": "floor"}) == (
        "capacity.rounding: Input should be 'nearest', 'down' or 'up', but is 'floor'."
    )


def test_an_unknown_policy() -> None:
    assert parsed(kind="gshard", second_choice="sampling") == (
        "second_choice: Input should be 'all', 'none', 'threshold' or 'random', but is 'sampling'."
    )


@pytest.mark.parametrize("threshold", [0, 1.5])
def test_a_threshold_outside_0_to_1(threshold: float) -> None:
    limit = "greater than 0" if threshold == 0 else "less than or equal to 1"
    assert parsed(kind="st_moe", threshold=threshold) == (
        f"threshold: Input should be {limit}, but is {threshold}."
    )


@pytest.mark.parametrize(
    ("jitter", "limit"), [(-0.1, "greater than or equal to 0"), (1, "less than 1")]
)
def test_jitter_outside_0_to_1(jitter: float, limit: str) -> None:
    assert parsed(kind="switch", jitter=jitter) == (
        f"jitter: Input should be {limit}, but is {jitter}."
    )


def test_an_option_of_another_router() -> None:
    assert parsed(kind="switch", capacity_factor=1.25) == (
        "capacity_factor: unknown key `capacity_factor`. Did you mean `capacity`? Known: "
        "`num_experts`, `jitter`, `init_std`, `capacity`, `order`, `kind`, `gate`."
    )


KNOWN = "`expert_choice`, `gshard`, `st_moe`, `switch`, `top_k`"


@pytest.mark.parametrize(
    ("kind", "nearest"),
    [("expert_choise", "expert_choice"), ("switch.v2", "switch"), ("topk", "top_k")],
)
def test_an_unknown_kind(kind: str, nearest: str) -> None:
    assert refusal(lambda: parse_router({"kind": kind, "num_experts": 8})) == (
        f"The router `{kind}` is not known. Did you mean `{nearest}`? Known: {KNOWN}."
    )


def test_no_kind() -> None:
    assert refusal(lambda: parse_router({"num_experts": 8}, origin="encoder.router")) == (
        f"encoder.router must name its `kind` ({KNOWN}), but has none."
    )


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("switch", SwitchConfig),
        ("gshard", GShardConfig),
        ("st_moe", StMoeConfig),
        ("top_k", TopKConfig),
        ("expert_choice", ExpertChoiceConfig),
    ],
)
def test_every_kind_is_found_with_and_without_its_version(
    kind: str, config: type[RouterConfig]
) -> None:
    expected = config(num_experts=8)
    assert parse_router({"kind": kind, "num_experts": 8}) == expected
    # What is written into a record reads back.
    assert parse_router(expected.to_mapping()) == expected
    assert f"{kind}.v1" in list(routers)


def test_an_unknown_loss_convention() -> None:
    text = refusal(lambda: RouterLossConfig.parse({"convention": "t5"}, origin="train.router"))
    assert text == (
        "train.router has 1 problem:\n"
        "  convention: Input should be 't5x', 'mesh_tf' or 'huggingface', but is 't5'."
    )


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["switch", "gshard", "top_k", "expert_choice"])
def test_logits_that_are_not_finite_are_counted(kind: str, broken: float) -> None:
    config = parse_router({"kind": kind, "num_experts": 2})
    router = config.build(hidden_size=1)
    router.weight.data.fill_(1.0)
    hidden = torch.tensor([[broken], [1.0], [broken], [2.0], [broken]])
    valid = torch.tensor([False, True, True, True, True])
    assert refusal(lambda: router(hidden, valid=valid)) == (
        f"Router logits must be finite, but a router ({type(router).__name__}) gave NaN or "
        "infinity for 2 of 4 tokens, the first is token 2. Its input has overflowed: lower the "
        "learning rate, or go back to the last checkpoint."
    )


CAUSAL = "A router in a causal decoder must not look at later tokens, but "
WAY_OUT = (
    ". Use token choice in natural order there (`top_k`, `switch`, `gshard` or `st_moe`), and this "
    "router in an encoder."
)


def test_expert_choice_in_a_causal_decoder() -> None:
    config = ExpertChoiceConfig(num_experts=4)
    assert refusal(lambda: config.build(hidden_size=4, causal=True)) == (
        f"{CAUSAL}`expert_choice` lets each expert take its favourites among all tokens of an "
        f"example, so that a later token can push out an earlier one{WAY_OUT}"
    )


@pytest.mark.parametrize("config", [SwitchConfig, GShardConfig, StMoeConfig])
def test_batch_priority_in_a_causal_decoder(config: Any) -> None:
    by_confidence = config(num_experts=4, order="batch_priority")
    assert refusal(lambda: by_confidence.build(hidden_size=4, causal=True)) == (
        f"{CAUSAL}`order: batch_priority` serves the most confident tokens of a group first, later "
        f"ones before earlier ones{WAY_OUT}"
    )
    # Allowed where nothing is causal, and in natural order.
    by_confidence.build(hidden_size=4)
    config(num_experts=4).build(hidden_size=4, causal=True)


def test_dropless_top_k_may_sit_in_a_causal_decoder() -> None:
    router = TopKConfig(num_experts=4).build(hidden_size=4, causal=True)
    assert router.top_k == 2
