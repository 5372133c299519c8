"""How experts are made from an FFN: slices add up to it, noise and new units are as large as they say."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flanmoe.models.experts_from_ffn import granular_slice, with_noise, with_redrawn_units
from flanmoe.moe.block import ExpertWeights


def test_the_factor_belongs_on_down_alone() -> None:
    # The sum over slices, with gates 1/g each, is the FFN. The factor's cube root on all three
    # matrices, as released elsewhere, is something else under SiLU.
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(8, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    down = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    whole = ExpertWeights(gate, up, down)
    x = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    exact = _ffn(whole, x)
    slices = [granular_slice(whole, index, 2) for index in range(2)]
    torch.testing.assert_close(sum(_ffn(part, x) for part in slices) / 2, exact)
    root = 2 ** (1 / 3)
    spread = [ExpertWeights(p.gate * root, p.up * root, p.down / 2 * root) for p in slices]
    assert (sum(_ffn(part, x) for part in spread) / 2 - exact).abs().max() > 0.1


def _ffn(weights: ExpertWeights, x: Tensor) -> Tensor:
    up = F.linear(x, weights.up)
    inner = F.relu(up) if weights.gate is None else F.silu(F.linear(x, weights.gate)) * up
    return F.linear(inner, weights.down)


def _whole(dtype: torch.dtype = torch.float64) -> ExpertWeights:
    generator = torch.Generator().manual_seed(1)
    return ExpertWeights(
        gate=torch.randn(400, 60, generator=generator).to(dtype) * 0.3 + 0.5,
        up=torch.randn(400, 60, generator=generator).to(dtype) * 0.7 - 1.0,
        down=torch.randn(60, 400, generator=generator).to(dtype) * 1.5,
    )


def test_drop_redraws_the_same_units_in_all_three_matrices() -> None:
    whole = _whole()
    redrawn = with_redrawn_units(whole, 0.25, torch.Generator().manual_seed(0))
    gate = (redrawn.gate != whole.gate).any(dim=1)
    up = (redrawn.up != whole.up).any(dim=1)
    down = (redrawn.down != whole.down).any(dim=0)
    assert int(gate.sum()) == 100
    assert torch.equal(gate, up)
    assert torch.equal(gate, down)
    # A unit that is redrawn is redrawn in full.
    assert (redrawn.gate != whole.gate)[gate].all()
    assert (redrawn.down != whole.down)[:, down].all()


def test_drop_draws_with_the_mean_and_deviation_of_what_it_replaces() -> None:
    whole = _whole()
    redrawn = with_redrawn_units(whole, 0.5, torch.Generator().manual_seed(0))
    changed = (redrawn.gate != whole.gate).any(dim=1)
    for old, new in (
        (whole.gate[changed], redrawn.gate[changed]),
        (whole.up[changed], redrawn.up[changed]),
        (whole.down[:, changed], redrawn.down[:, changed]),
    ):
        assert abs(float(new.mean() - old.mean())) < 0.05 * float(old.std())
        assert abs(float(new.std() / old.std()) - 1) < 0.05


def test_noise_is_in_units_of_each_matrix() -> None:
    whole = _whole()
    noisy = with_noise(whole, 0.1, torch.Generator().manual_seed(0))
    for old, new in ((whole.gate, noisy.gate), (whole.up, noisy.up), (whole.down, noisy.down)):
        noise = new - old
        assert abs(float(noise.std() / old.std()) - 0.1) < 0.005
        assert abs(float(noise.mean())) < 0.005 * float(old.std())


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("num_slices", [1, 2, 4])
def test_slices_add_up_to_the_ffn(num_slices: int, gated: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(7, 60, generator=generator, dtype=torch.float64)
    whole = _whole() if gated else _without_gate(_whole())
    slices = [granular_slice(whole, index, num_slices) for index in range(num_slices)]
    torch.testing.assert_close(sum(_ffn(part, x) for part in slices) / num_slices, _ffn(whole, x))
    assert {part.up.shape for part in slices} == {(400 // num_slices, 60)}


def test_without_a_gate_the_same_is_done_to_the_other_two() -> None:
    whole = _without_gate(_whole())
    redrawn = with_redrawn_units(whole, 0.25, torch.Generator().manual_seed(0))
    up = (redrawn.up != whole.up).any(dim=1)
    assert int(up.sum()) == 100
    assert torch.equal(up, (redrawn.down != whole.down).any(dim=0))
    noisy = with_noise(whole, 0.1, torch.Generator().manual_seed(0))
    for old, new in ((whole.up, noisy.up), (whole.down, noisy.down)):
        assert abs(float((new - old).std() / old.std()) - 0.1) < 0.005
    assert redrawn.gate is None
    assert noisy.gate is None


def _without_gate(whole: ExpertWeights) -> ExpertWeights:
    return ExpertWeights(None, whole.up, whole.down)
