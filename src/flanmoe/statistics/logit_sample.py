"""`LogitSample`: the router's logits of a fixed number of tokens, drawn at random from all of them.

Every token has a priority, which is a function of the seed and of its number among the real tokens of the data;
those with the lowest are the sample. So it does not depend on how the data are cut into batches or spread over
processes, and the samples of two parts make that of the whole ("bottom-k sketch", Cohen and Kaplan 2007,
*Summarizing data using bottom-k sketches*, PODC). S sampled tokens, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt64
from torch import Tensor

from flanmoe.core.errors import RunError
from flanmoe.core.seeds import SeedTree

# Those of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", OOPSLA).
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIXING = ((30, np.uint64(0xBF58476D1CE4E5B9)), (27, np.uint64(0x94D049BB133111EB)))
_LAST_SHIFT = np.uint64(31)


@dataclass(frozen=True, slots=True)
class LogitSample:
    """Logits of some tokens in one layer. The layers of a side hold the same tokens.

    Attributes:
        token_numbers: which token of the side each is, counted over the real tokens of the data; ascending.
        groups: the number of each one's group.
        logits: raw router logits, before softmax.
    """

    token_numbers: Int[Tensor, " S"]
    groups: Int[Tensor, " S"]
    logits: Float[Tensor, "S E"]

    @classmethod
    def none(cls, num_experts: int) -> "LogitSample":
        """Return the sample of no tokens."""
        numbers = torch.zeros(0, dtype=torch.long)
        return cls(numbers, numbers.clone(), torch.zeros(0, num_experts))


def priorities(token_numbers: Int[Tensor, " T"], seed: int) -> UInt64[np.ndarray, " T"]:
    """Return the priority of each token: different for different tokens, uniform over 64 bits."""
    key = np.uint64(SeedTree(seed).child("logit sample").integer())
    return mixed(token_numbers.numpy().astype(np.uint64) * _STEP + key)


def mixed(values: UInt64[np.ndarray, " T"]) -> UInt64[np.ndarray, " T"]:
    """Mix the bits of numbers, different ones to different ones (SplitMix64)."""
    for shift, factor in _MIXING:
        values = (values ^ (values >> np.uint64(shift))) * factor
    return values ^ (values >> _LAST_SHIFT)


def drawn(token_numbers: Int[Tensor, " T"], *, size: int, seed: int) -> Int[Tensor, " S"]:
    """Return the positions of the `size` tokens with the lowest priorities, by ascending token number."""
    values = priorities(token_numbers, seed)
    if len(values) > size:
        kept = torch.from_numpy(np.argpartition(values, size)[:size])
    else:
        kept = torch.arange(len(values))
    return kept[token_numbers[kept].argsort()]


@dataclass(frozen=True, slots=True)
class Candidates:
    """Tokens of one batch that may belong to the sample of everything read so far. C candidates.

    Attributes:
        token_numbers: which token of the side each is.
        groups: the number of each one's group.
        places: where each lies among the tokens of the batch, padding included.
    """

    token_numbers: Int[Tensor, " C"]
    groups: Int[Tensor, " C"]
    places: Int[Tensor, " C"]

    @classmethod
    def of(
        cls,
        valid: Bool[Tensor, " T"],
        groups: Int[Tensor, " T"],
        *,
        start: int,
        sample: LogitSample,
        size: int,
        seed: int,
    ) -> "Candidates":
        """Choose the candidates among the tokens of a batch.

        Args:
            valid: False where a token is padding.
            groups: for each token the number of its group.
            start: real tokens that come before this batch.
            sample: what was drawn so far.
            size: of the sample.
            seed: of the sample.
        """
        valid, groups = valid.cpu(), groups.cpu()
        places = valid.nonzero()[:, 0]
        numbers = start + torch.arange(len(places))
        kept = drawn(numbers, size=size, seed=seed)
        if len(sample.token_numbers) >= size:
            last = priorities(sample.token_numbers, seed).max()
            kept = kept[torch.from_numpy(priorities(numbers[kept], seed) < last)]
        return cls(numbers[kept], groups[places[kept]], places[kept])

    def sample(self, logits: Float[Tensor, "T E"]) -> LogitSample:
        """Return the logits of the candidates in one layer, in the computer's own memory."""
        own = logits[self.places.to(logits.device)]
        return LogitSample(self.token_numbers, self.groups, own.float().cpu())


def joined(
    first: Sequence[LogitSample], second: Sequence[LogitSample], *, size: int, seed: int
) -> list[LogitSample]:
    """Return the sample of both parts, layer by layer of one side.

    Raises:
        RunError: if a token is in both.
    """
    if not first or not len(second[0].token_numbers):
        return list(first)
    numbers = torch.cat([first[0].token_numbers, second[0].token_numbers])
    _require_apart(numbers)
    places = drawn(numbers, size=size, seed=seed)
    numbers = numbers[places]
    groups = torch.cat([first[0].groups, second[0].groups])[places]
    return [
        LogitSample(numbers, groups, torch.cat([own.logits, other.logits])[places])
        for own, other in zip(first, second, strict=True)
    ]


def _require_apart(numbers: Int[Tensor, " T"]) -> None:
    twice = len(numbers) - len(numbers.unique())
    if twice:
        raise RunError(
            f"Parts of statistics must come from different tokens of the data, but {twice} sampled tokens are "
            "in both. Give each process its own batches with `flanmoe.statistics.share_of_rank`, and add no "
            "part twice."
        )
