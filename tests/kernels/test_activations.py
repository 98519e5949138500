"""Activations rounded while the model runs."""

from __future__ import annotations

import pytest
import torch

from hasten.kernels.activations import Activations, float8_blocks, float8_tokens, int8_tokens, rounded

LIMITS: dict[Activations, float] = {"int8": 0.012, "float8": 0.04, "float8_block": 0.04, "int4": 0.16}


@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_those_of_the_number_system(kind: Activations, dtype: torch.dtype) -> None:
    values = torch.randn(64, 256).to(dtype)
    found = rounded(values, kind)
    error = (found - values.float()).norm() / values.float().norm()
    assert LIMITS[kind] / 4 < error < LIMITS[kind]


@pytest.mark.parametrize("kind", LIMITS)
def test_a_token_of_zeros_and_an_empty_input(kind: Activations) -> None:
    values = torch.randn(3, 64)
    values[1] = 0
    found = rounded(values, kind)
    assert found.isfinite().all()
    assert not found[1].any()
    assert rounded(values[:0], kind).shape == (0, 64)


def test_one_large_token_does_not_disturb_the_others() -> None:
    values = torch.randn(8, 64)
    alone = rounded(values[1:], "int8")
    values[0] *= 3000
    assert torch.equal(rounded(values, "int8")[1:], alone)


def test_numbers_beyond_half_precision() -> None:
    values = torch.randn(4, 64).bfloat16() * 66000
    codes, scale = int8_tokens(values)
    assert scale.dtype == torch.float32
    assert torch.allclose(codes * scale, values.float(), atol=float(scale.max()))


def test_a_fixed_scale_clips() -> None:
    values = torch.tensor([[1.0, 2.0, 1000.0, -1000.0]])
    codes, scale = float8_tokens(values, torch.tensor(0.5))
    assert (codes.float() * scale).tolist() == [[1.0, 2.0, 224.0, -224.0]]


def test_blocks_of_a_token_have_scales_of_their_own() -> None:
    values = torch.randn(2, 256)
    alone = rounded(values[:, 128:], "float8")
    values[:, :128] *= 1e6
    assert torch.equal(rounded(values, "float8_block")[:, 128:], alone)
    assert not torch.equal(rounded(values, "float8")[:, 128:], alone)
    assert float8_blocks(torch.randn(3, 96))[1].shape == (3, 3), "groups of 32 where 128 does not divide"


def test_none_leaves_them_alone() -> None:
    values = torch.randn(2, 8)
    assert rounded(values, "none") is values
