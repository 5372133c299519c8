"""`SeedTree`: draws depend on seed, name and index, and on nothing else."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.core.seeds import SeedTree

_names = st.text(st.characters(exclude_characters="\x1f#", codec="utf-8"), min_size=1, max_size=8)
_paths = st.lists(_names, max_size=4).map(tuple)


def test_values_are_pinned() -> None:
    # A change here changes every run ever made with the same seed.
    branch = SeedTree(17).child("data")
    assert SeedTree(0).integer() == 4761921975702974394
    assert branch.child("epoch", 3).integer() == 2525068752077701746
    assert branch.python().random() == pytest.approx(0.7934418546435432, abs=1e-16)


@given(root=st.integers(), path=_paths, other_root=st.integers(), other_path=_paths)
def test_seeds_are_equal_only_for_equal_places(
    root: int, path: tuple[str, ...], other_root: int, other_path: tuple[str, ...]
) -> None:
    same = (root, path) == (other_root, other_path)
    assert (SeedTree(root, path).integer() == SeedTree(other_root, other_path).integer()) == same


@given(root=st.integers(), path=_paths)
def test_seeds_fit_every_generator(root: int, path: tuple[str, ...]) -> None:
    node = SeedTree(root, path)
    assert 0 <= node.integer() < 2**63
    node.numpy()
    node.torch()


def test_a_twig_is_not_the_branch() -> None:
    tree = SeedTree(3)
    places = [
        tree,
        tree.child("a"),
        tree.child("a", 0),
        tree.child("a", 1),
        tree.child("a").child("a"),
    ]
    assert len({place.integer() for place in places}) == len(places)


def test_drawing_in_one_branch_does_not_move_another() -> None:
    tree = SeedTree(5)
    expected = tree.child("b").numpy().random(4)
    tree.child("a").numpy().random(1000)
    np.testing.assert_array_equal(tree.child("b").numpy().random(4), expected)


def test_every_call_starts_a_new_generator() -> None:
    node = SeedTree(5).child("x")
    assert node.python().random() == node.python().random()
    assert torch.equal(torch.rand(3, generator=node.torch()), torch.rand(3, generator=node.torch()))


def test_global_generators_are_left_alone() -> None:
    random.seed(1)
    torch.manual_seed(1)
    before = (random.getstate(), torch.random.get_rng_state())
    node = SeedTree(5)
    node.python().random()
    torch.rand(2, generator=node.torch())
    assert random.getstate() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])


def test_neighbouring_indices_are_not_correlated() -> None:
    draws = np.array([SeedTree(0).child("row", index).numpy().random() for index in range(2000)])
    assert abs(draws.mean() - 0.5) < 0.03
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.08
