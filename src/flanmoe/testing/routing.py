"""What a routing must be: token choice and expert choice written out, and a contract for both.

The definitions are plain loops over lists, taken from the sources (Flaxformer's masked router,
Mesh-TF where second choices may be given up, the expert-choice paper) and not from our routers.
Slow; for tests.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flanmoe.moe.routers.base import Router, RouterConfig
from flanmoe.moe.routing import Routing

Pair = tuple[int, int]


def best_experts_written_out(
    probabilities: Sequence[Sequence[float]], top_k: int
) -> list[list[int]]:
    """Return the k most probable experts of each token, best first; of equals the lower number."""
    return [
        sorted(range(len(row)), key=lambda expert: (-row[expert], expert))[:top_k]
        for row in probabilities
    ]


def token_choice_written_out(
    choices: Sequence[Sequence[int]],
    asked: Sequence[Sequence[bool]],
    *,
    groups: Sequence[int],
    capacities: Mapping[int, int] | None,
    confidence: Sequence[float] | None = None,
) -> dict[Pair, int]:
    """Return the (token, expert) pairs that are kept, and the place that each has at its expert.

    All first choices are placed one token after another, then all second choices, and so on. What
    is asked for takes the next place of its expert in the token's group, and is kept if that place
    exists.

    Args:
        choices: the experts of each token, best first.
        asked: False where a choice was given up, by a policy or because the token is padding.
        groups: the group of each token.
        capacities: places that an expert has for each group; None for no limit.
        confidence: serve tokens with the largest first (batch-prioritised routing); None for the
            order in which they come.
    """
    order = list(range(len(choices)))
    if confidence is not None:
        order.sort(key=lambda token: (-confidence[token], token))
    requests: Counter[Pair] = Counter()
    places: dict[Pair, int] = {}
    for rank in range(max(map(len, choices), default=0)):
        for token in order:
            if not asked[token][rank]:
                continue
            expert = choices[token][rank]
            place = requests[groups[token], expert]
            requests[groups[token], expert] += 1
            if capacities is None or place < capacities[groups[token]]:
                places[token, expert] = place
    return places


def expert_choice_written_out(
    probabilities: Sequence[Sequence[float]],
    *,
    groups: Sequence[int | None],
    capacities: Mapping[int, int],
) -> list[Pair]:
    """Return the (token, expert) pairs where each expert takes its most probable tokens.

    Args:
        probabilities: of each token, over experts.
        groups: the group of each token, None for padding.
        capacities: tokens that an expert takes from each group; of equals the earlier.
    """
    pairs: list[Pair] = []
    for group, capacity in capacities.items():
        members = [token for token, own in enumerate(groups) if own == group]
        for expert in range(len(probabilities[0])):
            ranked = sorted(members, key=lambda token, e=expert: (-probabilities[token][e], token))
            pairs += [(token, expert) for token in ranked[:capacity]]
    return sorted(pairs)


@dataclass(frozen=True, slots=True)
class RouterInputs:
    """Logits to route by, with padding and examples. T tokens, E experts."""

    logits: Float[Tensor, "T E"]
    valid: Bool[Tensor, " T"]
    segments: Int[Tensor, " T"]

    @classmethod
    def random(
        cls, num_tokens: int, num_experts: int, *, seed: int, ties: bool = False
    ) -> "RouterInputs":
        """Draw float64 logits, a fifth of padding, and up to three examples lying mixed.

        Args:
            num_tokens, num_experts: how many.
            seed: decides everything.
            ties: draw logits from three values, so that experts and tokens are often equal.
        """
        generator = torch.Generator().manual_seed(seed)
        shape = (num_tokens, num_experts)
        if ties:
            logits = torch.randint(3, shape, generator=generator).double()
        else:
            logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
        # Neither sorted nor without gaps: nothing may depend on how examples are numbered.
        numbers = torch.tensor([7, 2, 40])
        return cls(
            logits=logits,
            valid=torch.rand(num_tokens, generator=generator) < 0.8,
            segments=numbers[torch.randint(3, (num_tokens,), generator=generator)],
        )

    def route(self, router: Router) -> Routing:
        """Let a router of `router_of_logits` decide."""
        return router(self.logits, valid=self.valid, segments=self.segments)

    def probabilities(self) -> list[list[float]]:
        """Return the softmax of the logits as lists."""
        return self.logits.softmax(dim=1).tolist()

    def example_groups(self) -> list[int | None]:
        """Return the number of each token's example, None for padding."""
        pairs = zip(self.segments.tolist(), self.valid.tolist(), strict=True)
        return [segment if valid else None for segment, valid in pairs]


def router_of_logits(config: RouterConfig) -> Router:
    """Build a router that takes logits as hidden states: its weight is the identity."""
    router = config.build(hidden_size=config.num_experts)
    with torch.no_grad():
        router.weight.copy_(torch.eye(config.num_experts))
    return router


def kept_pairs(routing: Routing) -> list[Pair]:
    """Return the (token, expert) pairs of a routing in the order of its list."""
    return list(zip(routing.token_ids.tolist(), routing.expert_ids.tolist(), strict=True))


def check_routing(
    routing: Routing,
    *,
    groups: Sequence[int] | None = None,
    capacities: Mapping[int, int] | None = None,
) -> None:
    """Check what holds for the routing of every router.

    Args:
        routing: what a router decided for logits small enough that no probability is 0.
        groups: the group of each token, where there are capacities.
        capacities: most assignments of an expert in each group.

    Raises:
        AssertionError: says what is broken, and where.
    """
    _check_pairs(routing)
    _check_padding(routing)
    _check_gates(routing)
    if routing.choices.asked.shape[1]:
        _check_choices(routing)
    if groups is not None and capacities is not None:
        loads = Counter((groups[token], expert) for token, expert in kept_pairs(routing))
        over = {cell: load for cell, load in loads.items() if load > capacities[cell[0]]}
        assert not over, f"more than the capacity {dict(capacities)} at (group, expert): {over}"


def _check_pairs(routing: Routing) -> None:
    pairs = kept_pairs(routing)
    twice = [pair for pair, count in Counter(pairs).items() if count > 1]
    assert not twice, f"(token, expert) is assigned twice: {twice}"
    strange = [
        (token, expert)
        for token, expert in pairs
        if not (0 <= token < routing.num_tokens and 0 <= expert < routing.num_experts)
    ]
    assert not strange, f"no such (token, expert): {strange}"


def _check_padding(routing: Routing) -> None:
    padding = {token for token, valid in enumerate(routing.valid.tolist()) if not valid}
    served = [pair for pair in kept_pairs(routing) if pair[0] in padding]
    assert not served, f"padding is served: {served}"
    asking = sorted(padding & set(routing.asked_pairs()[0].tolist()))
    assert not asking, f"padding asks for experts: {asking}"


def _check_gates(routing: Routing) -> None:
    gates = zip(kept_pairs(routing), routing.gates.tolist(), strict=True)
    # A little above 1 for the rounding of a renormalised gate.
    outside = {pair: gate for pair, gate in gates if not 0 < gate <= 1 + 1e-6}
    assert not outside, f"gates must be above 0 and at most 1: {outside}"


def _check_choices(routing: Routing) -> None:
    repeated = [
        token
        for token, row in enumerate(routing.choices.expert_ids.tolist())
        if len(set(row)) < len(row)
    ]
    assert not repeated, f"choices of a token must differ, tokens: {repeated}"
    token_ids, expert_ids = (ids.tolist() for ids in routing.asked_pairs())
    asked = set(zip(token_ids, expert_ids, strict=True))
    uncalled = sorted(set(kept_pairs(routing)) - asked)
    assert not uncalled, f"kept without having been asked for: {uncalled}"
    dropped = len(asked) - len(routing.token_ids)
    assert int(routing.num_dropped) == dropped, f"{dropped} dropped, not {routing.num_dropped}"
