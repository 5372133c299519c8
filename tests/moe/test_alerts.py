"""Alerts: each kind is raised by what it is for and by nothing else, told once, cleared once, and resumed."""

import json
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.core.errors import ConfigError
from flanmoe.moe.alerts import (
    Alert,
    AlertConfig,
    AlertMonitor,
    WatchedLayer,
    balance_score,
    evenness,
)
from flanmoe.moe.routing_sums import RoutingSums

EVEN = (250, 250, 250, 250)


def layer_sums(
    counts: Sequence[int], *, top_k: int = 1, dropped: int = 0, unserved: int = 0, rms: float = 1.0
) -> RoutingSums:
    """Sums of one layer in one step; tokens follow from what was kept and dropped."""
    kept = sum(counts)
    tokens = (kept + dropped) // top_k if top_k else kept + unserved
    doubles = {
        "entropy": 0.5 * tokens,
        "confidence": 0.5 * tokens,
        "squared_logits": rms**2 * tokens,
    }
    return RoutingSums(
        tokens=torch.tensor([tokens]),
        asked=torch.tensor([kept + dropped if top_k else 0]),
        dropped=torch.tensor([dropped]),
        unserved=torch.tensor([unserved]),
        assignments=torch.tensor([list(counts)]),
        gate_mass=torch.tensor([list(counts)]).double(),
        **{name: torch.tensor([value], dtype=torch.double) for name, value in doubles.items()},
    )


def monitor(
    *top_k: int, names: Sequence[str] = (), num_experts: int = 4, **settings: float
) -> AlertMonitor:
    config = AlertConfig.parse({"window_steps": 2, "dead_steps": 4, **settings})
    places = names or [f"model.layers.{number}.mlp" for number in range(len(top_k))]
    layers = [
        WatchedLayer(number, name, num_experts, k)
        for number, (name, k) in enumerate(zip(places, top_k, strict=True))
    ]
    return AlertMonitor(config, layers)


def run(
    watching: AlertMonitor, steps: Sequence[Sequence[RoutingSums]], *, start: int = 1
) -> list[Alert]:
    told: list[Alert] = []
    for step, layers in enumerate(steps, start=start):
        told += watching.after_step(step, layers)
    return told


def kinds(alerts: Sequence[Alert]) -> list[tuple[str, int | None]]:
    return [(alert.kind, alert.layer) for alert in alerts]


def test_an_even_load_raises_nothing() -> None:
    watching = monitor(1, 1, 0)
    steps = [[layer_sums(EVEN), layer_sums(EVEN), layer_sums(EVEN, top_k=0)]] * 20
    assert run(watching, steps) == []
    assert watching.alerts == watching.up == ()


def test_a_layer_that_collapses_is_named_once() -> None:
    watching = monitor(1, 1)
    told = run(watching, [[layer_sums(EVEN), layer_sums((980, 20, 0, 0))]] * 3)
    assert kinds(told) == [("collapse", 1)]
    (alert,) = told
    assert (alert.name, alert.step, alert.limit) == ("model.layers.1.mlp", 2, 0.5)
    assert alert.value == pytest.approx(evenness((0.98, 0.02, 0.0, 0.0), 1))
    assert alert.words == (
        "The router of layer 1 (model.layers.1.mlp) has collapsed: its load has 7 % of the evenness that "
        "top-1 of 4 experts can have (limit 50 %), and expert 0 serves 98 % of the tokens. The experts left "
        "out learn nothing: the run pays for a larger model than it trains. Raise "
        "`router.balance_coefficient` or lower `learning_rate`, and go back to a checkpoint from before."
    )
    # Its dead experts are told apart; the collapse itself is not told again.
    later = run(watching, [[layer_sums(EVEN), layer_sums((980, 20, 0, 0))]] * 9, start=4)
    assert kinds(later) == [("dead_expert", 1)]
    assert kinds(watching.up) == [("collapse", 1), ("dead_expert", 1)]


def test_collapse_knows_how_many_experts_a_token_has() -> None:
    # Everything to the same two of four: with two choices a token that is collapse, with one half use.
    load = (500, 500, 0, 0)
    assert kinds(run(monitor(2), [[layer_sums(load, top_k=2)]] * 2)) == [("collapse", 0)]
    assert run(monitor(1), [[layer_sums(load)]] * 2) == []
    assert evenness((0.5, 0.5, 0.0, 0.0), 2) == 0
    assert evenness((0.5, 0.5, 0.0, 0.0), 1) == pytest.approx(0.5)
    assert evenness((0.25,) * 4, 2) == pytest.approx(1)


def test_one_expert_that_serves_everybody_is_collapse_too() -> None:
    # Of two choices one is always expert 3, the other is spread: the load alone looks harmless.
    (alert,) = run(monitor(2), [[layer_sums((340, 330, 330, 1000), top_k=2)]] * 2)
    assert evenness((0.17, 0.165, 0.165, 0.5), 2) > 0.5
    assert (alert.kind, alert.value, alert.limit) == ("collapse", 1.0, 0.9)
    assert "expert 3 serves 100 % of the tokens" in alert.words


def test_layers_whose_tokens_have_every_expert_cannot_collapse() -> None:
    assert run(monitor(4), [[layer_sums(EVEN, top_k=4)]] * 4) == []


def test_a_dead_expert_is_named() -> None:
    watching = monitor(1)
    told = run(watching, [[layer_sums((400, 300, 300, 0))]] * 6)
    assert kinds(told) == [("dead_expert", 0)]
    (alert,) = told
    assert (alert.experts, alert.step, alert.value) == ((3,), 4, 1.0)
    assert alert.words == (
        "Expert 3 of layer 0 (model.layers.0.mlp) got no token in the last 4 steps or more, 4,000 "
        "assignments of the layer. An expert without tokens gets no gradient and does not come back by "
        "itself, but costs memory. Raise `router.balance_coefficient`, or prune it."
    )
    # A second one dies: the same alert names both.
    assert run(watching, [[layer_sums((500, 500, 0, 0))]] * 6, start=7) == []
    assert watching.alerts[0].experts == (2, 3)
    assert watching.alerts[0].words.startswith("2 experts (2, 3) of layer 0")


def test_chance_is_not_called_death() -> None:
    # 10 assignments an expert and window are enough to judge the load, not to bury an expert.
    few = [[layer_sums((8, 7, 5, 0))]]
    watching = monitor(1)
    assert run(watching, few * 26) == []
    # -ln(0.001) * 4 / 0.05 = 552.6 assignments: the 28th step makes it 560.
    assert kinds(run(watching, few * 2, start=27)) == [("dead_expert", 0)]


def test_an_expert_that_comes_back_clears_the_alert() -> None:
    watching = monitor(1)
    dead, living = [[layer_sums((400, 300, 300, 0))]], [[layer_sums((400, 300, 299, 1))]]
    run(watching, dead * 4)
    assert kinds(watching.up) == [("dead_expert", 0)]
    run(watching, living * 2, start=5)
    assert watching.up == ()
    assert watching.alerts[0].cleared == 6
    # It dies again: not told again, but counted.
    assert run(watching, dead * 4, start=7) == []
    (alert,) = watching.up
    assert (alert.step, alert.times, alert.cleared) == (4, 2, None)


def test_dropped_choices_and_unserved_tokens() -> None:
    watching = monitor(1, 0)
    layers = [
        layer_sums(EVEN, dropped=250, unserved=250),
        layer_sums(EVEN, top_k=0, unserved=1000),
    ]
    told = run(watching, [layers] * 2)
    assert kinds(told) == [("drops", 0), ("drops", 1)]
    by_tokens, by_experts = told
    assert (by_tokens.value, by_tokens.limit) == (0.2, 0.1)
    assert (by_experts.value, by_experts.limit) == (0.5, 0.3)
    assert by_tokens.words == (
        "20 % of the choices of layer 0 (model.layers.0.mlp) did not fit, 20 % of the tokens got no expert at "
        "all (limit 10 %). Such tokens pass the layer unchanged: they are paid for, but not computed. Raise "
        "the router's capacity factor, or `router.balance_coefficient`."
    )
    assert by_experts.words == (
        "50 % of the tokens of layer 1 (model.layers.1.mlp) were taken by no expert (limit 30 %). Such tokens "
        "pass the layer unchanged: they are paid for, but not computed. Raise the router's capacity factor."
    )


def test_an_alert_comes_down_only_when_it_is_well_past_the_limit() -> None:
    watching = monitor(1)

    def window(dropped: int) -> list[list[RoutingSums]]:
        return [[layer_sums((225,) * 4, dropped=dropped)]] * 2

    assert kinds(run(watching, window(110))) == [("drops", 0)]
    run(watching, window(98), start=3)  # 9.8 %, below the limit of 10 %
    assert kinds(watching.up) == [("drops", 0)]
    run(watching, window(90), start=5)  # 9.1 %
    assert kinds(watching.up) == [("drops", 0)]
    run(watching, window(80), start=7)  # 8.2 %
    assert watching.up == ()
    assert watching.alerts[0].cleared == 8
    run(watching, window(98), start=9)
    assert watching.up == ()


def test_router_logits_that_grow() -> None:
    watching = monitor(1, 1)
    assert run(watching, [[layer_sums(EVEN, rms=0.01), layer_sums(EVEN, rms=2.0)]] * 2) == []
    # From 0.01 growth counts from 1; 7 is less than four times 2.
    told = run(watching, [[layer_sums(EVEN, rms=4.5), layer_sums(EVEN, rms=7.0)]] * 2, start=3)
    assert kinds(told) == [("router_norm", 0)]
    assert told[0].words == (
        "The router logits of layer 0 (model.layers.0.mlp) have grown to 4.5 (root mean square) from 0.01 in "
        "the first window (limit 4.0). Such a router is all but certain of its choices, which then hardly "
        "change any more, and rounds badly in low precision. Raise `router.z_coefficient` or lower "
        "`learning_rate`."
    )


def collapsed_on(expert: int) -> RoutingSums:
    return layer_sums([1000 if expert == own else 0 for own in range(4)])


def test_layers_that_collapse_onto_different_experts_look_even_when_pooled() -> None:
    watching = monitor(1, 1, 1, 1, dead_steps=100)
    told = run(watching, [[collapsed_on(expert) for expert in range(4)]] * 2)
    assert kinds(told) == [
        *(("collapse", layer) for layer in range(4)),
        ("imbalance_hidden_by_pooling", None),
    ]
    hidden = told[-1]
    assert "its load has 0 % of the evenness" in told[0].words
    # transformers' pooled loss gives 1.0, the score of perfect balance, where ours are 4.0.
    assert (hidden.value, hidden.limit) == (4.0, 2.0)
    assert hidden.words == (
        "The 4 layers of 4 experts, top-1, are uneven each, but even together: their balance scores have the "
        "mean 4.00 (limit 2.00; 1 is even, 4 the worst), that of their load put together is 1.00. A balance "
        "loss that pools layers, as transformers' own does, sees nothing wrong and corrects nothing. "
        "flanmoe's is taken layer by layer: raise `router.balance_coefficient`, and do not go by a pooled "
        "figure."
    )


def test_layers_that_collapse_onto_the_same_expert_are_not_hidden() -> None:
    told = run(monitor(1, 1, 1, 1, dead_steps=100), [[collapsed_on(0)] * 4] * 2)
    assert {alert.kind for alert in told} == {"collapse"}


def test_sides_of_an_encoder_decoder_are_not_pooled() -> None:
    names = [f"{side}.block.{layer}" for side in ("encoder", "decoder") for layer in (0, 1)]
    watching = monitor(1, 1, 1, 1, names=names, dead_steps=100, min_evenness=0, max_busiest=1)
    pair = [layer_sums((500, 500, 0, 0)), layer_sums((0, 0, 500, 500))]
    told = run(watching, [[*pair, *[collapsed_on(0)] * 2]] * 2)
    # 2.0 is the limit of four experts; only the encoder's layers cancel, and they do not exceed it.
    assert told == []
    worse = [layer_sums((600, 400, 0, 0)), layer_sums((0, 0, 400, 600))]
    told = run(watching, [[*worse, *[collapsed_on(0)] * 2]] * 2, start=3)
    assert [alert.name for alert in told] == ["2 encoder layers of 4 experts, top-1"]


def test_a_window_grows_until_it_says_something() -> None:
    watching = monitor(1, window_steps=2)
    assert run(watching, [[layer_sums((9, 0, 0, 0))]] * 4) == []
    # 10 assignments an expert: the fifth step has them.
    assert [alert.step for alert in run(watching, [[layer_sums((9, 0, 0, 0))]], start=5)] == [5]


def test_groups_are_put_together() -> None:
    one, other = layer_sums((500, 500, 0, 0)), layer_sums((0, 0, 500, 500))
    both = RoutingSums(
        **{name: torch.cat([x, other.tensors()[name]]) for name, x in one.tensors().items()}
    )
    assert run(monitor(1, dead_steps=2), [[both]] * 4) == []


@given(
    split=st.integers(1, 11),
    loads=st.lists(
        st.sampled_from([EVEN, (990, 10, 0, 0), (400, 300, 300, 0)]), min_size=12, max_size=12
    ),
)
def test_going_on_equals_never_stopping(split: int, loads: list[tuple[int, ...]]) -> None:
    steps = [
        [layer_sums(load, dropped=len(set(load)) * 40), layer_sums(EVEN, rms=1 + number)]
        for number, load in enumerate(loads)
    ]
    whole = monitor(1, 1, window_steps=3)
    told = run(whole, steps)
    first, second = monitor(1, 1, window_steps=3), monitor(1, 1, window_steps=3)
    told_first = run(first, steps[:split])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert told_first + run(second, steps[split:], start=split + 1) == told
    assert second.alerts == whole.alerts
    assert second.state_dict() == whole.state_dict()


def test_alerts_survive_as_json() -> None:
    (alert,) = run(monitor(1), [[layer_sums((980, 20, 0, 0))]] * 2)
    assert Alert.parse(json.loads(json.dumps(alert.to_mapping()))) == alert


def test_balance_score_is_the_loss_of_a_router_whose_probabilities_are_its_load() -> None:
    assert balance_score((0.25,) * 4) == 1
    assert balance_score((1.0, 0.0, 0.0, 0.0)) == 4


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (
            {"window_steps": 0},
            "window_steps: Input should be greater than or equal to 1, but is 0.",
        ),
        (
            {"max_logit_growth": 1.0},
            "max_logit_growth: Input should be greater than 1, but is 1.0.",
        ),
        (
            {"min_even": 0.5},
            "min_even: unknown key `min_even`. Did you mean `min_evenness`?",
        ),
    ],
)
def test_settings_without_sense_are_refused(values: dict[str, float], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AlertConfig.parse(values)
    assert problem in str(caught.value)


def test_the_callable_form_of_words_is_only_used_when_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*arguments: object) -> Callable[[], str]:
        raise AssertionError("No words without an alert.")

    monkeypatch.setattr("flanmoe.moe.alerts._where", never)
    run(monitor(1), [[layer_sums(EVEN)]] * 4)
