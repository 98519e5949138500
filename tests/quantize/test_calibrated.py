"""Calibrated quantizers: each lowers the error that it is there to lower, computed and of real outputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from hasten.core.errors import HastenError
from hasten.kernels.modules import Quantized
from hasten.kernels.rounding import quantize_integer
from hasten.quantize import AWQ, GPTQ, SVDQuant
from hasten.quantize.engine.error import output_error, relative_error
from hasten.quantize.engine.gptq import cholesky, gptq
from hasten.quantize.engine.grids import clipped_grid, diagonal_blocks, grid_of, group_errors
from hasten.quantize.engine.low_rank import correction, leading, product_of, whitening
from hasten.quantize.engine.sites import Site
from hasten.quantize.engine.smoothing import activation_noise
from hasten.quantize.engine.statistics import InputStatistics, Running, quadratic

K, N = 64, 48


def correlated(tokens: int = 600, seed: int = 0) -> torch.Tensor:
    """Inputs whose channels depend on each other, some of them large."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=torch.Generator().manual_seed(9)) * torch.logspace(0.5, -1, K)
    large = torch.ones(K).index_fill_(0, torch.tensor([3, 40]), 8.0)
    return torch.randn(tokens, K, generator=generator) @ mix.T * large


def statistics(x: torch.Tensor) -> InputStatistics:
    """With products of channels trusted entirely."""
    running = Running(x.shape[1], x.device)
    running.add(x)
    sums = running.sums()
    return InputStatistics(sums.counts[0], sums.absmax, sums.mean_abs, sums.halves[0])


def site(dtype: torch.dtype = torch.float32) -> Site:
    layer = nn.Linear(K, N)
    generator = torch.Generator().manual_seed(3)
    layer.weight.data = torch.randn(N, K, generator=generator) * 0.1
    return Site("transformer", "blocks.0.to_q", nn.Module(), layer.to(dtype))


KNOWN = statistics(correlated())


@torch.no_grad()
def real_error(module: nn.Module, of: Site) -> float:
    """On inputs that were not calibrated with."""
    x = correlated(seed=1).to(of.weight.dtype)
    return float((module(x) - of.layer(x)).float().square().sum(1).mean())


@torch.no_grad()
def solved(technique: GPTQ | AWQ | SVDQuant, at: Site) -> Quantized:
    return technique.solve([at], KNOWN)[0]


def rounded(at: Site, bits: int = 4, *, symmetric: bool = False) -> float:
    weight = quantize_integer(at.weight, bits, 64, symmetric=symmetric, scales=torch.float16)
    return output_error(at.weight, weight, KNOWN.second)


def test_the_computed_error_is_that_of_real_outputs() -> None:
    at, x = site(), correlated()
    weight = quantize_integer(at.weight, 3, 16)
    change = at.weight - weight.dequantize()
    assert output_error(at.weight, weight, KNOWN.second) == pytest.approx(
        float((x @ change.T).square().sum(1).mean()), rel=1e-4
    )
    whole = float((x @ at.weight.T).square().sum(1).mean())
    assert relative_error(at.weight, weight, KNOWN.second) == pytest.approx(
        output_error(at.weight, weight, KNOWN.second) / whole, rel=1e-4
    )
    assert output_error(at.weight, at.weight, KNOWN.second) == 0


@pytest.mark.parametrize(
    ("technique", "gain"),
    [
        (GPTQ(), 4.0),
        (GPTQ(symmetric=True), 3.0),
        (GPTQ(act_order=False), 2.5),
        (AWQ(), 1.15),
        (SVDQuant(rank=4, activations=16), 2.0),
        (SVDQuant(rank=4, activations=16, gptq=True, smooth=False), 6.0),
    ],
    ids=str,
)
def test_errors_are_lower_than_those_of_nearest_rounding(technique: GPTQ | AWQ | SVDQuant, gain: float) -> None:
    at = site()
    module = solved(technique, at)
    plain = rounded(at)
    assert output_error(at.weight, module, KNOWN.second) < plain / gain
    # The same on other inputs of the kind, computed by the layer itself.
    assert real_error(module, at) < 1.3 * plain / gain


def test_gptq_leaves_nearest_rounding_where_inputs_are_independent() -> None:
    at = site()
    grid = grid_of(at.weight, 4, 16, symmetric=True)
    assert torch.equal(gptq(at.weight, torch.eye(K)[None], grid), grid.nearest(at.weight))


def test_gptq_solves_blocks_of_columns_as_it_would_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    at = site()
    grid = grid_of(at.weight, 3, 16, symmetric=False)
    whole = gptq(at.weight, KNOWN.second, grid)
    monkeypatch.setattr("hasten.quantize.engine.gptq.COLUMNS", 7)
    assert (gptq(at.weight, KNOWN.second, grid) != whole).float().mean() < 0.02


def test_gptq_bears_dead_inputs_and_moments_of_low_rank() -> None:
    at, x = site(), correlated(tokens=5)
    x[:, 7] = 0
    grid = grid_of(at.weight, 4, 16, symmetric=True)
    found = gptq(at.weight, statistics(x).second, grid)
    assert found.isfinite().all()
    with pytest.raises(HastenError, match="cannot be inverted"):
        cholesky(torch.full((4, 4), float("nan")), 0.01)


def test_clipped_ranges_err_no_more_in_any_group() -> None:
    at = site()
    moments = diagonal_blocks(KNOWN.second, 16)
    assert torch.equal(moments[1], KNOWN.second[0, 16:32, 16:32])
    errors = [
        group_errors(at.weight - grid.nearest(at.weight), moments)
        for grid in (grid_of(at.weight, 3, 16, False), clipped_grid(at.weight, KNOWN.second, 3, 16, False))
    ]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert errors[1].sum() < 0.97 * errors[0].sum()


def test_the_correction_is_the_best_of_its_rank() -> None:
    change, factor = site().weight.clone(), whitening(KNOWN.second)
    best = quadratic(change - product_of(correction(change, factor, 4, torch.float32)), KNOWN.second).sum()
    left, values, right = leading(change, 4)
    plain = quadratic(change - (left * values) @ right.mT, KNOWN.second).sum()
    assert best < 0.8 * plain
    spectrum = torch.linalg.svdvals((change @ factor[0]).double()).square()
    assert float(best) == pytest.approx(float(spectrum[4:].sum()), rel=0.02)


def test_random_projections_find_the_leading_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(80, 60, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -3, 60)
    exact = leading(matrix, 5)
    monkeypatch.setattr("hasten.quantize.engine.low_rank.EXACT", 10)
    found = leading(matrix, 5)
    assert torch.allclose(found[1], exact[1], rtol=1e-3)
    assert torch.allclose((found[0] * found[1]) @ found[2].mT, (exact[0] * exact[1]) @ exact[2].mT, atol=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(found, leading(matrix, 5), strict=True))


@pytest.mark.parametrize(("kind", "levels", "group"), [("int8", 127, K), ("int4", 7, 64)])
def test_the_noise_of_rounded_inputs_is_foreseen(kind: str, levels: int, group: int) -> None:
    from hasten.kernels.activations import rounded as round_inputs

    x = torch.randn(2000, K, generator=torch.Generator().manual_seed(0))
    true = (round_inputs(x, kind) - x).square().mean(0)  # pyright: ignore[reportArgumentType]
    assert 0.7 < float((activation_noise(statistics(x), kind) / true).mean()) < 1.5  # pyright: ignore


def test_more_rank_and_more_turns_err_less() -> None:
    at = site()
    errors = [
        output_error(at.weight, solved(SVDQuant(rank=rank, refine=refine, activations=16), at), KNOWN.second)
        for rank, refine in ((2, 0), (2, 20), (16, 20))
    ]
    assert errors[1] < 0.95 * errors[0]
    assert errors[2] < 0.5 * errors[1]


def test_four_bit_activations_gain_from_smoothing_and_keep_the_bound_of_the_paper() -> None:
    at = site()
    errors = [real_error(solved(SVDQuant(rank=4, activations=4, smooth=smooth), at), at) for smooth in (False, True)]
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("seed", range(4))
def test_the_error_bound_of_the_paper(seed: int) -> None:
    """Proposition 4.1: |XW - Q(X)Q(W)| <= |X||W - Q(W)| + |X - Q(X)|(|W| + |W - Q(W)|), in Frobenius norms."""
    at = site()
    module = solved(SVDQuant(rank=4, activations=4), at)
    x = correlated(tokens=20, seed=seed)
    smoothed = x if module.smooth is None else x / module.smooth
    from hasten.kernels.activations import rounded as round_inputs

    codes = module.quantized.dequantize()
    assert module.down is not None
    assert module.up is not None
    rest = (at.weight - module.up.float() @ module.down.float()) * (1 if module.smooth is None else module.smooth)
    error = (module(x) - at.layer(x)).norm()
    weight_error, input_error = (rest - codes).norm(), (round_inputs(smoothed, "int4") - smoothed).norm()
    assert error <= 1.001 * (smoothed.norm() * weight_error + input_error * (rest.norm() + weight_error))
    assert error > 0


def test_layers_that_share_an_input_share_their_factors() -> None:
    one, other = site(), replace(site(), path="blocks.0.to_k")
    other.layer.weight.data *= torch.linspace(0.1, 4, K)
    for technique in (AWQ(), SVDQuant(rank=2, activations=4, refine=1)):
        modules = technique.solve([one, other], KNOWN)
        assert modules[0].smooth is not None
        assert modules[1].smooth is not None
        assert torch.equal(modules[0].smooth, modules[1].smooth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("technique", [GPTQ(), AWQ(), SVDQuant(rank=4), SVDQuant(rank=999, smooth=False)], ids=str)
def test_outlines_are_of_the_size_of_what_is_solved(technique: GPTQ | AWQ | SVDQuant, dtype: torch.dtype) -> None:
    at = site(dtype)
    module = solved(technique, at)
    expected = {name: (b.shape, b.dtype) for name, b in module.named_buffers()}
    meta = replace(at, layer=nn.Linear(K, N, device="meta", dtype=dtype))
    assert {name: (b.shape, b.dtype) for name, b in technique.outline(meta).named_buffers()} == expected
    assert technique.stored(at) == sum(buffer.nbytes for buffer in module.buffers())
    assert module(torch.randn(2, K, dtype=dtype)).dtype == dtype


def test_what_is_rounded_is_what_the_layer_holds_in_16_bits() -> None:
    at = site(torch.bfloat16)
    module = solved(AWQ(clip=False), at)
    error = output_error(at.weight, module, KNOWN.second)
    assert error < 1.05 * output_error(at.weight, solved(AWQ(clip=False), site()), KNOWN.second)
