"""A tree of seeds: every draw is a function of the root seed, a name and an index.

Nothing in flanmoe draws from a global generator. Two branches with different names are independent, and
adding a draw in one place never shifts the draws of another.
"""

import hashlib
import random
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class SeedTree:
    """A node of the tree. Children are named; leaves give generators or plain integers."""

    root: int
    path: tuple[str, ...] = ()

    def child(self, name: str, index: int | None = None) -> "SeedTree":
        """Return the branch `name`, or the `index`-th twig of that branch."""
        part = name if index is None else f"{name}#{index}"
        return SeedTree(self.root, (*self.path, part))

    def integer(self) -> int:
        """Return this node's seed, uniform over 63 bits, the same on every machine."""
        text = "\x1f".join((str(self.root), *self.path)).encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1

    def python(self) -> random.Random:
        """Return a new `random.Random` seeded at this node."""
        return random.Random(self.integer())

    def numpy(self) -> np.random.Generator:
        """Return a new numpy generator seeded at this node."""
        return np.random.default_rng(self.integer())

    def torch(self) -> torch.Generator:
        """Return a new CPU torch generator seeded at this node."""
        return torch.Generator().manual_seed(self.integer())
